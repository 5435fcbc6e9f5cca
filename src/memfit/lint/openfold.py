"""Interpret OpenFold's own settings: presets, changed keys, and the defaults of training.

Source: openfold/config.py and train_openfold.py at ce0029e (2025-09; read 2026-11). `model_config(name,
True)` takes a preset and sets blocks_per_ckpt to 1 and chunk_size to None. The flat JSON of
--experiment_config_json then changes the keys that it names.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from memfit.lint.parse import Options, Setup
from memfit.types.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What a preset of OpenFold sets that memory depends on. The crop of a training sample: ``residues``,
    ``rows`` (sequences) of the clustered MSA, and ``extra_rows`` of the extra MSA. ``templates``: whether the
    network uses templates."""

    residues: int = 256
    rows: int = 128
    extra_rows: int = 1024
    templates: bool = True


_INITIAL, _FINE = Preset(), Preset(residues=384, rows=512, extra_rows=5120)
_UNTEMPLATED = dataclasses.replace(_FINE, templates=False)
_MODELS = {
    "model_1": Preset(extra_rows=5120),
    "model_2": Preset(),
    "model_3": Preset(extra_rows=5120, templates=False),
    "model_4": Preset(extra_rows=5120, templates=False),
    "model_5": Preset(templates=False),
}
PRESETS: Final[Mapping[str, Preset]] = {
    "initial_training": _INITIAL,
    "finetuning": _FINE,
    "finetuning_ptm": _FINE,
    "finetuning_no_templ": _UNTEMPLATED,
    "finetuning_no_templ_ptm": _UNTEMPLATED,
    **_MODELS,
    **{f"{name}_ptm": preset for name, preset in _MODELS.items()},
}
DEFAULT_PRESET: Final = "initial_training"
# Sizes of the job alphafold2 at which it is OpenFold's network -> OpenFold's preset.
JOB, SIZES = (
    "alphafold2",
    {"initial": "initial_training", "paper": "initial_training", "finetune": "finetuning"},
)
EVOFORMER_BLOCKS, TEMPLATE_BLOCKS = 48, 2
KERNELS: Final = ("use_deepspeed_evo_attention", "use_lma", "use_flash")
# All keys of "globals". OpenFold accepts other keys without a warning.
GLOBALS: Final = frozenset(
    {
        "blocks_per_ckpt",
        "chunk_size",
        *KERNELS,
        "offload_inference",
        "c_z",
        "c_m",
        "c_t",
        "c_e",
        "c_s",
        "eps",
        "is_multimer",
        "seqemb_mode_enabled",
    }
)
# These keys share one reference in OpenFold's configuration: setting any of them sets all.
CKPT: Final = (
    "globals.blocks_per_ckpt",
    "model.evoformer_stack.blocks_per_ckpt",
    "model.template.template_pair_stack.blocks_per_ckpt",
)
EXTRA_CKPT: Final = "model.extra_msa.extra_msa_stack.ckpt"
TUNED: Final = (
    "model.evoformer_stack.tune_chunk_size",
    "model.extra_msa.extra_msa_stack.tune_chunk_size",
    "model.template.template_pair_stack.tune_chunk_size",
)


def changed_value(s: Setup, paths: Iterable[str], default: Any = None) -> Any:
    """Return the value that OpenFold's JSON of changed settings gives to a setting with the dotted ``paths``,
    which all mean the same setting: that of the last of ``paths`` which the JSON names. It may be None
    (null). Return ``default`` if the JSON names none of them, or if the set-up has no such JSON."""
    value, settings = default, s.openfold_config
    for path in paths:
        node: Any = settings.data if settings is not None else {}
        for part in path.split("."):
            if not isinstance(node, Mapping) or part not in node:
                break
            node = node[part]
        else:
            value = node
    return value


def arguments(s: Setup) -> Options:
    """Return the arguments that a script passes to train_openfold.py; empty options if the set-up has no such
    script."""
    return s.openfold or Options(file="", data={})


def preset(s: Setup) -> str | None:
    """Return the name of OpenFold's preset (--config_preset). It is initial_training if no preset is given,
    and None if it is known only when the script runs. The name may be one that OpenFold does not have."""
    options = arguments(s)
    if options.raw("config_preset") is None and "config_preset" not in options.unsure:
        return DEFAULT_PRESET
    name = options.get("config_preset")
    return None if name is None else str(name)


def crop(s: Setup) -> Preset | None:
    """Return the preset with the crop sizes and the use of templates that OpenFold's JSON changes. Return
    None if the preset is known only when the script runs, or is not in `PRESETS`: these are presets of the
    network for single chains (the monomer's). Raises UserError for a size in the JSON that is not a whole
    number above 0."""
    base_preset = PRESETS.get(preset(s) or "")
    if base_preset is None:
        return None
    keys = {"residues": "crop_size", "rows": "max_msa_clusters", "extra_rows": "max_extra_msa"}
    sizes = {
        field: _count(
            f"data.train.{key}", changed_value(s, [f"data.train.{key}"], getattr(base_preset, field))
        )
        for field, key in keys.items()
    }
    templates = changed_value(s, ["model.template.enabled"], base_preset.templates) is True
    return dataclasses.replace(base_preset, templates=templates, **sizes)


def blocks_per_ckpt(s: Setup) -> int | None:
    """Return how many blocks are recomputed together, as OpenFold's JSON sets it, by default 1; None if the
    JSON sets null: then no block is recomputed. Raises UserError for any other value that is not a whole
    number above 0."""
    value = changed_value(s, CKPT, 1)
    return None if value is None else _count(CKPT[0], value)


def batch_size(s: Setup) -> int:
    """Return the samples per training step of one process, which OpenFold's JSON sets
    (data.data_module.data_loaders.batch_size), by default 1. Raises UserError for a value that is not a whole
    number above 0."""
    name = "data.data_module.data_loaders.batch_size"
    return _count(name, changed_value(s, [name], 1))


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(
            f"OpenFold's JSON of changed settings sets {name} to {json.dumps(value)}",
            allowed="a whole number above 0"
            + (", or null (no recomputation)" if name.endswith("blocks_per_ckpt") else ""),
        )
    return value


def precision(s: Setup) -> str:
    """Return the training's precision (--precision) under Lightning's full name: 64-true, 32-true, 16-mixed
    or bf16-mixed for the short names 64, 32, 16 and bf16. Any other name is returned as it is. The precision
    is bf16-mixed if none is given or if it is known only when the script runs."""
    value = str(arguments(s).get("precision") or "bf16")
    return {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}.get(value, value)
