"""What a child process reports to its parent: one JSON object per line on standard output."""

from __future__ import annotations

import sys

from memfit.types import serialization


def tell(event: str, **fields: object) -> None:
    """Write an event to standard output."""
    sys.stdout.write(serialization.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()
