"""Write files atomically."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> Path:
    """Write ``data`` to the file ``path`` and return the path. An existing file is replaced. Under that name
    there is never a partly written file.

    The folder must exist. Raises OSError if it cannot be written to; no partial file is left behind.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
