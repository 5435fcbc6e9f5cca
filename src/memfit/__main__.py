"""``python -m memfit`` does what the command ``memfit`` does."""

from __future__ import annotations

import sys

from memfit.cli import main
from memfit.types.gc_pause import collect_rarely, skip_gc_at_exit


def run() -> int:
    """Run the command line of this process and return its exit status, as `memfit.cli.main` does. The process
    must then end, because garbage is no longer collected."""
    collect_rarely()
    code = main()
    skip_gc_at_exit()
    return code


if __name__ == "__main__":
    sys.exit(run())
