"""What a child process reports to its parent: one JSON object per line on standard output."""

from __future__ import annotations

import sys
from typing import Final

from memfit.types import serialization

SENDER: Final = "memfit"


def tell(event: str, **fields: object) -> None:
    """Write the event with its fields to standard output, as one line ``{"event": ..., "by": "memfit", ...}``
    that is flushed at once. The sender, "by", distinguishes it from JSON lines that the job itself logs."""
    sys.stdout.write(serialization.dumps({"event": event, "by": SENDER, **fields}) + "\n")
    sys.stdout.flush()
