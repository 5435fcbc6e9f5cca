"""Recognise errors that a rank raises only because another rank is gone."""

from __future__ import annotations

import re
from typing import Final

PEER_ERRORS: Final = (
    r"[Cc]onnection (?:closed|reset)|Connection refused|Broken pipe|Connection was likely closed|"
    r"DistStoreError|DistNetworkError|remote process exited|ncclRemoteError|NCCL communicator was aborted|"
    r"[Gg]loo connectFullMesh failed|Application timeout caused pair closure|failed to recv, got 0 bytes"
)
"""Regular expression for what gloo, NCCL and torch's store say when the connection to another rank ends."""
_PEER_ERROR: Final = re.compile(PEER_ERRORS)


def is_peer_error(text: str) -> bool:
    """Return whether ``text``, an error message, says that the connection to another rank ended."""
    return _PEER_ERROR.search(text) is not None
