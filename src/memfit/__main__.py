"""``python -m memfit`` is ``memfit``."""

from __future__ import annotations

import gc
import sys

from memfit.cli import main


def run() -> int:
    """Run the command line and return its exit status, after which the process must end. Unless Triton is
    loaded, all objects are then excluded from garbage collection, which at the process's end takes longer
    than many a command where torch and transformers are loaded. With Triton it stays on, because otherwise
    Triton's bindings list on stderr what was not collected."""
    code = main()
    if "triton" not in sys.modules:
        gc.freeze()
    return code


if __name__ == "__main__":
    sys.exit(run())
