"""``python THIS_FILE SCRIPT ARGUMENT...`` measures a script as `scripts.measure` does, where torch was
imported before."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import torch

_HOOKS = Path(__file__).parents[2] / "benchmarks" / "scripts" / "counting" / "sitecustomize.py"
_SPEC = importlib.util.spec_from_file_location("counting_hooks", _HOOKS)
assert _SPEC is not None
assert _SPEC.loader is not None
hooks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(hooks)
hooks._after_torch(torch)
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
