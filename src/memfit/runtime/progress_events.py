"""What a child tells its parent: one JSON object a line on standard output."""

from __future__ import annotations

import sys

from memfit.types import serialization


def tell(event: str, **fields: object) -> None:
    sys.stdout.write(serialization.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()
