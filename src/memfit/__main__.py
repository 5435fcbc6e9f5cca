"""``python -m memfit`` is ``memfit``."""

from __future__ import annotations

import gc
import sys

from memfit.cli import main


def run() -> int:
    """The command line's own process, which ends with the command: no search for garbage at its end, which
    takes longer than many a command where torch and transformers are loaded. Triton's bindings, in torch for
    CUDA, list on stderr what was not collected: there it is."""
    code = main()
    if "triton" not in sys.modules:
        gc.freeze()
    return code


if __name__ == "__main__":
    sys.exit(run())
