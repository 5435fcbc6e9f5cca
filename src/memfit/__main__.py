"""``python -m memfit`` is ``memfit``."""

from __future__ import annotations

import sys

from memfit.cli import main
from memfit.types.gc_pause import collect_rarely, skip_gc_at_exit


def run() -> int:
    """Run the command line and return its exit status, after which the process must end."""
    collect_rarely()
    code = main()
    skip_gc_at_exit()
    return code


if __name__ == "__main__":
    sys.exit(run())
