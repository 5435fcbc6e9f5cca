"""Entry point: ``python -m memfit.capture SPEC.json`` runs a script up to its first steps."""

from __future__ import annotations

import sys
from pathlib import Path

from memfit.types.gc_pause import collect_rarely

if __name__ == "__main__":
    collect_rarely()
    from memfit.capture import child

    child.main(Path(sys.argv[1]))
