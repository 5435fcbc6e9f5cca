"""Executors: what runs many tasks side by side. Each is one module of this package that defines ``EXECUTOR``,
a subclass of `Executor`; the module's name is the executor's name. Nothing else has to be registered."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from memfit.launch.executors.base import Executor
from memfit.types.errors import UserError, look_up

_SHARED = ("base", "on_node", "submitit_jobs")


def names() -> tuple[str, ...]:
    """Return the names of all executors, such as "local" and "slurm"."""
    return tuple(info.name for info in pkgutil.iter_modules(__path__) if info.name not in _SHARED)


def parse_executor(text: str) -> tuple[str, Mapping[str, str]]:
    """Return (name, settings) of an executor as users write it: ``NAME`` or ``NAME:KEY=VALUE,KEY=VALUE``, for
    example ``slurm:partition=a100,time=60``. Raises UserError for an unknown name, for a setting that is not
    KEY=VALUE, that occurs twice or that the executor does not have, and for a value that it does not
    allow."""
    name, _, rest = text.partition(":")
    look_up("executor", name, dict.fromkeys(names(), True))
    settings: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, separator, value = part.partition("=")
        if not (key and separator and value) or key in settings:
            raise UserError(
                f"--executor {text}: {part!r} is not KEY=VALUE, or repeats a KEY",
                allowed="NAME or NAME:KEY=VALUE,KEY=VALUE and each KEY once, such as slurm:time=60",
            )
        settings[key] = value
    _class_of(name).check(settings)
    return name, settings


def make_executor(name: str, settings: Mapping[str, str], folder: Path, *, device_count: int) -> Executor:
    """Return the executor called ``name`` with the user's ``settings`` (KEY -> VALUE), both as
    `parse_executor` returns them. The executor's own files are in ``folder``, which it creates.
    ``device_count``: number of devices of each task. Raises UserError if submitit is not installed or
    refuses, as for Slurm on a machine without it."""
    return _class_of(name)(settings, folder, device_count=device_count)


def executor_kind(name: str, settings: Mapping[str, str]) -> str:
    """Return the name of the executor, followed by those of its ``settings`` that decide on the kind of
    device, if there are any: "slurm:partition=a100" (`Executor.kind_of`)."""
    return _class_of(name).kind_of(settings)


def _class_of(name: str) -> type[Executor]:
    module = importlib.import_module(f"{__name__}.{name}")
    executor: type[Executor] = module.EXECUTOR
    return executor
