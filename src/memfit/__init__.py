"""memfit fits the training of large models into the memory you have.

This module has the classes with which a job and a plan are described, memfit's errors, and the functions and
classes of `memfit.api`. torch is loaded when the first of the latter is accessed.
"""

from __future__ import annotations

import os
import sys

if (
    sys.argv[:1] == ["-m"]
    and sys.orig_argv[-len(sys.argv)].removeprefix("-m").split(".")[0] == "memfit"
    and not sys.flags.safe_path
):
    # `python -m memfit` puts the current folder first on the path. It is taken off before anything else is
    # imported: a torch.py or random.py in it would replace what memfit and torch import.
    _current_folder = sys.path.pop(0)
    if f"{_current_folder}{os.sep}memfit" in __path__:  # the source itself lies there
        sys.path.append(_current_folder)

import importlib
from typing import TYPE_CHECKING, Any

from memfit.types.errors import MemfitError, UserError
from memfit.types.gc_pause import pause_gc
from memfit.types.job import Job, Metric, OptimizerChoice
from memfit.types.plan import Plan

if TYPE_CHECKING:
    from memfit.api import (
        Fit,
        Prediction,
        apply,
        assert_fits,
        conform,
        estimate,
        from_trainer,
        largest,
        next_plan,
        watch,
    )

__all__ = [
    "Fit",
    "Job",
    "MemfitError",
    "Metric",
    "OptimizerChoice",
    "Plan",
    "Prediction",
    "UserError",
    "apply",
    "assert_fits",
    "conform",
    "estimate",
    "from_trainer",
    "largest",
    "next_plan",
    "watch",
]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        with pause_gc():
            return getattr(importlib.import_module("memfit.api"), name)
    raise AttributeError(f"module 'memfit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def load_ipython_extension(shell: Any) -> None:
    """Add the cell magic ``%%memfit`` to IPython, which calls this for ``%load_ext memfit``."""
    importlib.import_module("memfit.integrations.notebook").register(shell)
