"""``python THIS_FILE SCRIPT ARGUMENT...`` runs a script as `memfit watch` does, where torch was imported
before."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import torch

from memfit.monitoring.startup import sitecustomize

if settings := os.environ.get(sitecustomize.SETTINGS):
    sitecustomize._attempt(lambda: sitecustomize._prepare(torch, settings))
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
runpy.run_path(sys.argv[0], run_name="__main__")
