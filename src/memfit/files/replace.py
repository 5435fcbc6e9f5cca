"""Write a file as a whole: it has its old content or its new one, never a part."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from memfit.types.errors import UserError

DRAFT: Final = ".part"
_YOUNG_S: Final = 1.0
_PAGE_BYTES: Final = 4096


def write_whole(path: Path, data: bytes, *, durable: bool = True, make_folder: bool = False) -> Path:
    """Write ``data`` to the file ``path`` and return the path. An existing file is replaced; if ``path`` is a
    symbolic link, the link is replaced and its target stays as it is. What is no regular file, such as
    /dev/stdout or a named pipe, is written to directly. Unless ``durable``, the new content may be lost if
    the machine fails soon after. With ``make_folder``, missing folders of ``path`` are made.

    Raises UserError, one line that names the file, if it cannot be written, for example because the disk is
    full or the folder does not exist. The old content is then still there, and no partial file is left.
    """
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        if _is_stream(path):
            path.write_bytes(data)
        else:
            _replace(path, data, durable=durable)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def cannot_write(path: Path, error: OSError) -> UserError:
    """Return the UserError that says why the file ``path`` could not be written."""
    return UserError(f"cannot write {path}: {error.strerror or error}", hint="what was there is unchanged")


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Lock the folder of ``path`` inside this context. Other processes that enter it for a file of the same
    folder wait until it is left, so none changes a file that is read, changed and written back here. If the
    folder cannot be locked, as on file systems without locks, nobody waits."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def must_be_writable(folder: Path, what: str) -> None:
    """Create ``folder`` with its parents if it does not exist, and a file of a page in it, which is removed
    again. Raises UserError if that fails. ``what``: what will be written there, for the message. Call it
    before any long work begins."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".memfit-", dir=folder)
        try:
            os.write(descriptor, bytes(_PAGE_BYTES))  # an empty file can be made on a full disk
        finally:
            os.close(descriptor)
            Path(name).unlink()
    except OSError as error:
        raise UserError(
            f"{what} cannot be written into {folder}: {error.strerror or error}", hint="choose another folder"
        ) from error


def _replace(path: Path, data: bytes, *, durable: bool) -> None:
    """Write ``data`` to a draft with a name that cannot be predicted, and rename it to ``path``."""
    draft = path.with_name(f"{_draft_prefix(path)}{secrets.token_hex(8)}{DRAFT}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(OSError):
                if stat.S_ISREG((status := path.lstat()).st_mode):
                    os.fchmod(descriptor, stat.S_IMODE(status.st_mode))
            file.write(data)
            file.flush()
            if durable:
                os.fsync(descriptor)
            draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    _remove_abandoned_drafts(path)


def _draft_prefix(path: Path) -> str:
    return f".{path.name[:100]}."


def _remove_abandoned_drafts(path: Path) -> None:
    """Remove the drafts of ``path`` whose writers have died."""
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if entry.name.startswith(_draft_prefix(path)) and entry.name.endswith(DRAFT):
                with contextlib.suppress(OSError):
                    _remove_if_unlocked(Path(entry.path))


def _remove_if_unlocked(draft: Path) -> None:
    descriptor = os.open(draft, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if time.time() - os.fstat(descriptor).st_mtime >= _YOUNG_S:  # a younger one may not be locked yet
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft.unlink()
    finally:
        os.close(descriptor)


def _is_stream(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
