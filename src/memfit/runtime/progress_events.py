"""What a child process reports to its parent: one JSON object per line on standard output."""

from __future__ import annotations

import sys

from memfit.types import serialization


def tell(event: str, **fields: object) -> None:
    """Write the event with its fields to standard output, as one line ``{"event": ..., ...}`` that is flushed
    at once."""
    sys.stdout.write(serialization.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()
