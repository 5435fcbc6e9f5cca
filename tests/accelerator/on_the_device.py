"""``python ARGUMENT...`` with simulated accelerators, where torch was imported before they were there."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import simulated_accelerator

simulated_accelerator.activate_by_environment()
if sys.argv[1] == "-m":
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
