"""Interpret torchtitan's settings that older releases have under other names.

The table parallelism is that of v0.2.2 (config/job_config.py). Older releases have its settings in the tables
training and experimental (config_manager.py; read 2026-11).
"""

from __future__ import annotations

from typing import Final

from memfit.lint.parse import Options

_TABLES: Final = ("parallelism", "training", "experimental")


def parallelism_path(t: Options, name: str) -> str:
    """Return the dotted path at which ``t`` gives the setting ``name`` of the table parallelism: in that
    table or, as older releases have it, in training or experimental. If no table gives it, return the path in
    parallelism."""
    paths = [f"{table}.{name}" for table in _TABLES]
    return next((path for path in paths if t.raw(path) is not None), paths[0])


def compiles_model(t: Options) -> bool:
    """Return whether torch.compile compiles the model. It does if compile.enable is on and compile.components
    is not given or contains "model". It also does if training.compile is on, the name of the setting in older
    releases."""
    is_component = t.raw("compile.components") is None or "model" in t.texts("compile.components")
    return (t.on("compile.enable") and is_component) or t.on("training.compile")
