"""Entry point: ``python -m memfit.worker run SPEC.json`` trains, ``... calibrate REQUEST.json`` measures
single operators, ``... devices`` prints the accelerators of this machine."""

from __future__ import annotations

import sys
from pathlib import Path

from memfit.worker import calibrate, devices, train

if __name__ == "__main__":
    if sys.argv[1] == "devices":
        devices.main()
    elif sys.argv[1] == "calibrate":
        calibrate.main(Path(sys.argv[2]))
    else:
        sys.exit(train.main(Path(sys.argv[2])))
