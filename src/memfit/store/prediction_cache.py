"""Keep traces and what was predicted from them on disk, so that the same question is answered at once.

An entry is a file. Its name is a digest of everything that decides its content, so that an entry is never
changed and never out of date: after a change of the job, of memfit or of torch, another name is looked up.
Old entries are deleted when the cache exceeds its limit, those that were not used for longest first. Several
processes can share the folder, because files are written under a temporary name and then renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from memfit.files.read import read_bytes
from memfit.files.replace import DRAFT, write_whole
from memfit.types.errors import UserError

FOLDER_VARIABLE: Final = "MEMFIT_CACHE"
LIMIT_VARIABLE: Final = "MEMFIT_CACHE_LIMIT"
DEFAULT_LIMIT_BYTES: Final = 2 * 2**30
OFF: Final = "off"
_SUFFIX: Final = ".memfit"
_MAGIC: Final = b"memfit-entry-1\n"
_DIGEST_BYTES: Final = 16
_KEPT_RATIO: Final = 0.8  # of the limit, after entries were deleted
_CHECKED_EVERY_BYTES: Final = 64 * 2**20  # written by this process, between two checks of the limit


def default_folder() -> Path | None:
    """Return the folder of the cache: the environment variable ``MEMFIT_CACHE``, or if that is not set
    ``memfit/predictions`` in the user's cache folder. None if the variable is "off"."""
    import platformdirs

    setting = os.environ.get(FOLDER_VARIABLE, "")
    if setting.lower() == OFF:
        return None
    if setting:
        return Path(setting).expanduser()
    return platformdirs.user_cache_path("memfit", appauthor=False) / "predictions"


def limit_bytes() -> int:
    """Return how many bytes the cache may take: the environment variable ``MEMFIT_CACHE_LIMIT``, such as
    "500MiB", or if that is not set 2 GiB. Raises UserError if the variable is not such a size."""
    from memfit.types.parsing import parse_bytes

    setting = os.environ.get(LIMIT_VARIABLE, "")
    if not setting:
        return DEFAULT_LIMIT_BYTES
    try:
        return parse_bytes(setting)
    except UserError as error:
        raise UserError(
            f"the environment variable {LIMIT_VARIABLE} is {setting!r}",
            allowed="a size such as 500MiB or 4GiB",
            hint=f"{FOLDER_VARIABLE}={OFF} switches the cache off",
        ) from error


def digest_of(*facts: Any) -> str:
    """Return a digest of ``facts``, 40 hexadecimal digits. The facts must be values that ``json.dumps``
    accepts. The order of keys in mappings does not matter."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=20).hexdigest()


def pack(payload: bytes) -> bytes:
    """Return ``payload`` compressed, with a digest by which `unpack` recognizes damage."""
    body = zlib.compress(payload, 1)
    return _MAGIC + hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() + body


def unpack(data: bytes) -> bytes:
    """Return the payload that `pack` was given. Raises ValueError if ``data`` is not whole, or is not from
    `pack`."""
    begin = len(_MAGIC) + _DIGEST_BYTES
    digest, body = data[len(_MAGIC) : begin], data[begin:]
    if not data.startswith(_MAGIC) or hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() != digest:
        raise ValueError("not an entry of memfit's cache, or a damaged one")
    return zlib.decompress(body)


class PredictionCache:
    """Entries in the folder ``folder``: bytes by name.

    If the folder or a file cannot be read or written, nothing is raised: nothing is in the cache then, or
    nothing is added to it. ``limit_bytes``: if the entries take more, the least recently used are deleted
    until they take at most 80 % of it. This is checked at the first write and after every 64 MiB written.
    """

    def __init__(self, folder: Path, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._unchecked_bytes = _CHECKED_EVERY_BYTES  # the first write of a process checks

    def read(self, name: str) -> bytes | None:
        """Return the payload of the entry, and mark it as used now. None if there is no such entry, or if it
        is larger than the cache's limit. What is in its place and is damaged, not from `pack` or no regular
        file is deleted, and None returned."""
        path = self._path(name)
        try:
            data = read_bytes(path, most_bytes=self.limit_bytes)
        except UserError:
            if path.exists() and not path.is_file():  # such as a named pipe, for which a write would wait
                with contextlib.suppress(OSError):
                    path.unlink()
            return None
        try:
            payload = unpack(data)
        except (ValueError, zlib.error):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return payload

    def write(self, name: str, payload: bytes) -> None:
        """Store ``payload`` as the entry ``name``, in place of one that exists. If the limit is exceeded,
        delete the least recently used entries. If the file cannot be written, do nothing."""
        data = pack(payload)
        try:
            write_whole(self._path(name), data, durable=False, make_folder=True)
        except UserError:
            return
        self._unchecked_bytes += len(data)
        if self._unchecked_bytes >= min(_CHECKED_EVERY_BYTES, self.limit_bytes):
            self._unchecked_bytes = 0
            self._shrink()

    def usage(self) -> tuple[int, int]:
        """Return (number of entries, bytes of their files). Temporary files that killed processes have left
        count, too."""
        sizes = [size for _, size, _ in self._files()]
        return len(sizes), sum(sizes)

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}{_SUFFIX}"

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield (time of the last use, size in bytes, path) of each entry, and of each temporary file (suffix
        `DRAFT`), such as killed processes have left."""
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            if path.suffix in (_SUFFIX, DRAFT):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    yield status.st_mtime, status.st_size, path

    def _shrink(self) -> None:
        files = sorted(self._files())
        total_bytes = sum(size for _, size, _ in files)
        if total_bytes <= self.limit_bytes:
            return
        for _, size, path in files:
            if total_bytes <= _KEPT_RATIO * self.limit_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                total_bytes -= size
