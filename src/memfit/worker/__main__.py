"""Entry point: ``python -m memfit.worker run SPEC.json`` trains, ``... calibrate REQUEST.json`` measures
single operators, ``... devices`` prints the accelerators of this machine."""

from __future__ import annotations

import sys
from pathlib import Path

from memfit.types.gc_pause import collect_rarely, skip_gc_at_exit
from memfit.worker import calibrate, devices, train


def main() -> int:
    """Do what the command line says: ``run`` (or any other word) trains, ``calibrate`` measures, ``devices``
    prints. Return the status with which the process must exit: that of `train.main`, else 0. Errors of these
    are raised as they are."""
    collect_rarely()
    code = 0
    if sys.argv[1] == "devices":
        devices.main()
    elif sys.argv[1] == "calibrate":
        calibrate.main(Path(sys.argv[2]))
    else:
        code = train.main(Path(sys.argv[2]))
    skip_gc_at_exit()
    return code


if __name__ == "__main__":
    sys.exit(main())
