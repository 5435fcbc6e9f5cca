"""Entry point: ``python -m memfit.worker run SPEC.json`` trains, ``... calibrate REQUEST.json`` measures
single operators."""

from __future__ import annotations

import sys
from pathlib import Path

from memfit.worker import calibrate, train

if __name__ == "__main__":
    verb, path = sys.argv[1:3]
    {"run": train.main, "calibrate": calibrate.main}[verb](Path(path))
