"""Write a file as a whole: it has its old content or its new one, never a part."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
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
_OPEN_FILE: Final = re.compile(r"/dev/(?P<name>stdin|stdout|stderr)|/(dev|proc/self)/fd/(?P<number>\d{1,9})")


def write_whole(path: Path, data: bytes, *, durable: bool = True, make_folder: bool = False) -> Path:
    """Write ``data`` to the file ``path`` and return the path. An existing file is replaced and its
    permissions are kept; if ``path`` is a symbolic link, the link is replaced and its target stays as it is.
    What is no regular file, such as a named pipe, is written to directly; /dev/stdout, /dev/stderr and
    /dev/fd/N are this process's open files, also if these are regular files.

    ``durable``: the data are on the disk before the file is replaced, so if the machine fails, the file has
    its old or its new content. Without it, the file may then be empty or cut off. With ``make_folder``,
    missing folders of ``path`` are made.

    Raises UserError, one line that names the file, if it cannot be written, for example because the disk is
    full, the folder does not exist or ``path`` is a folder. A regular file then still has its old content,
    and no partial file is left.
    """
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        if (descriptor := _descriptor(path)) is not None:
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(data)
        elif is_stream(path):
            path.write_bytes(data)
        else:
            _replace(path, data, durable=durable)
    except (OSError, ValueError) as error:
        raise cannot_write(path, error) from error
    return path


def cannot_write(path: Path, error: OSError | ValueError) -> UserError:
    """Return the UserError that says why the file ``path`` could not be written."""
    reason = getattr(error, "strerror", None) or error
    return UserError(f"cannot write {path}: {reason}", hint="what was there is unchanged")


def is_stream(path: Path) -> bool:
    """Return whether `write_whole` writes to ``path`` directly: it exists and is neither a regular file nor a
    folder, or it names an open file of this process, such as /dev/stdout."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    is_special = not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
    return is_special or _descriptor(path) is not None


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Lock the folder of ``path`` inside this context. Other processes and threads that enter it for a file
    of the same folder wait until it is left, so none changes a file that is read, changed and written back
    here. Entered again inside itself for the same folder, it waits forever. If the folder does not exist or
    cannot be locked, as on file systems without locks, nobody waits."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def must_be_writable(folder: Path, what: str) -> None:
    """Create ``folder`` with its parents if it does not exist, and a file of 4 KiB in it, which is removed
    again. Raises UserError if that fails, for example without permission or on a full disk. ``what``: what
    will be written there, for the message. Call it before any long work begins."""
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
    """Write ``data`` to a draft (a file with an unpredictable name in the folder of ``path``) and rename it
    to ``path``, which is replaced. A regular file there gives its permissions to the new one. ``durable``:
    the data are on the disk before the draft is renamed. Then the drafts of ``path`` that writers which died
    have left are removed. Raises OSError if it cannot be written, and ValueError if ``path`` has no file
    name; the draft is then removed, and what was at ``path`` stays."""
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
    """Remove the drafts of ``path`` whose writers have died: those that can be locked and are at least a
    second old. Nothing is raised: what cannot be removed stays."""
    draft_name = re.compile(f"{re.escape(_draft_prefix(path))}[0-9a-f]+{re.escape(DRAFT)}")
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if draft_name.fullmatch(entry.name):
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


def _descriptor(path: Path) -> int | None:
    """Return the file descriptor that ``path`` names, such as 1 for /dev/stdout; None if it names none."""
    match = _OPEN_FILE.fullmatch(str(path))
    if match is None:
        return None
    return int(match["number"]) if match["number"] else {"stdin": 0, "stdout": 1, "stderr": 2}[match["name"]]
