"""Temporary folders that are removed even if the process that made them was killed: the next one removes
them.

A folder contains a file that its process keeps locked while it lives. The system unlocks it however the
process ends, so a folder whose file can be locked has no owner. A lock, unlike a process ID, is not reused
and is valid between containers that share a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PREFIX: Final = "memfit-"
OWNER: Final = ".memfit-owner"
_YOUNG_S: Final = 1.0  # a folder of this age may not be locked yet


@contextlib.contextmanager
def temporary_folder(prefix: str = PREFIX, parent: Path | None = None) -> Iterator[Path]:
    """Yield a new folder that only this user can read, and remove it at the end. ``prefix``: how its name
    begins. ``parent``: the folder in which it is created, which must exist; None: the system's folder for
    temporary files. Folders there with this prefix whose processes have died are removed first
    (`remove_abandoned`). Raises OSError if the folder cannot be created."""
    remove_abandoned(prefix, parent)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    descriptor = -1
    try:
        descriptor = os.open(path / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody removes it
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


def remove_abandoned(prefix: str = PREFIX, parent: Path | None = None) -> list[Path]:
    """Remove the folders that `temporary_folder` made in ``parent`` (None: the system's folder for temporary
    files), whose names begin with ``prefix``, which belong to this user and whose process has died, and
    return their paths. Other folders stay, whatever their names, and links are not followed. Nothing is
    raised: what cannot be removed stays."""
    folder = Path(tempfile.gettempdir()) if parent is None else parent
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        paths = [Path(entry.path) for entry in entries if entry.name.startswith(prefix)]
        return [path for path in paths if _remove_if_abandoned(path)]
    return []


def _remove_if_abandoned(path: Path) -> bool:
    try:
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return False
        descriptor = os.open(path / OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # not a folder of `temporary_folder`, or removed in the meantime
        return False
    try:
        if time.time() - os.fstat(descriptor).st_mtime < _YOUNG_S:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except OSError:  # its process lives
        return False
    finally:
        os.close(descriptor)
    return not path.exists()
