"""What a child tells its parent: one JSON object a line on standard output."""

from __future__ import annotations

import sys

from memfit import wire


def tell(event: str, **fields: object) -> None:
    sys.stdout.write(wire.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()
