"""What a process holds in memory beside its private data: shared memory and mapped files. The limit that
enforces a memory cap (RLIMIT_DATA) does not count them, so they are measured."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Final

from memfit.runtime.memory import large_block_bytes, rss_bytes, status_bytes
from memfit.types.result import ResidentMemory

_SMAPS: Final = Path("/proc/self/smaps")
_SHARED_NAMES: Final = ("/dev/shm/", "/dev/zero", "/memfd:", "/SYSV")  # they count as shared memory
_FILES_PERIOD_S: Final = 1.0  # between readings of all mappings, which take milliseconds


class ResidentMeter:
    """Measures the resident memory of this process. Construct it before the job is loaded, and call `begin`
    when training begins. Each call of `sample` reads the resident and the shared memory, and at most once per
    second, or with ``whole``, the mapped files. Of shared memory and mapped files, what there was at
    construction does not count, nor do libraries."""

    def __init__(self) -> None:
        self._known = frozenset(_data_files())
        self._blocks_before, self._shared_before = large_block_bytes() or 0, shared_bytes()
        self._start_bytes = rss_bytes()
        self._loaded_bytes = self._footprint_bytes = 0
        self._peak_bytes = self._shared_peak = self._mapped_peak = 0
        self._next_s = 0.0

    def begin(self) -> None:
        """Record what the process holds when training begins, after what the warm-up used has been freed. The
        peak of resident bytes begins anew; those of shared memory and mapped files do not."""
        self._loaded_bytes = max(0, (large_block_bytes() or 0) - self._blocks_before)
        self._footprint_bytes = self._peak_bytes = rss_bytes()

    def sample(self, peak_bytes: int = 0, *, whole: bool = False) -> None:
        """Read what is resident now and raise the peaks. ``peak_bytes``: a peak of resident bytes that was
        read elsewhere, such as the kernel's, which counts as well. ``whole``: read mapped files, too, even
        within a second of the last such reading."""
        self._peak_bytes = max(self._peak_bytes, peak_bytes, rss_bytes())
        self._shared_peak = max(self._shared_peak, shared_bytes() - self._shared_before)
        if whole or time.monotonic() >= self._next_s:
            mapped_bytes = sum(size for path, size in _data_files().items() if path not in self._known)
            self._mapped_peak = max(self._mapped_peak, mapped_bytes)
            self._next_s = time.monotonic() + _FILES_PERIOD_S

    def observed(self) -> ResidentMemory:
        """Return the peaks so far, and what was held at construction and at `begin` (0 before `begin`)."""
        return ResidentMemory(
            peak_bytes=self._peak_bytes,
            start_bytes=self._start_bytes,
            footprint_bytes=self._footprint_bytes,
            loaded_bytes=self._loaded_bytes,
            shared_bytes=self._shared_peak,
            mapped_bytes=self._mapped_peak,
        )


def shared_bytes() -> int:
    """Return the resident bytes of shared memory of this process: shared mappings without a file, System V
    shared memory and mapped files of memory file systems; 0 on systems without /proc."""
    return status_bytes("RssShmem") or 0


def _data_files() -> dict[str, int]:
    """Return the mapped files that are neither libraries nor shared memory: path -> resident bytes. A file of
    which a part is executable is a library. Empty on systems without /proc."""
    sizes: dict[str, int] = {}
    libraries = set[str]()
    path = ""
    with contextlib.suppress(OSError), _SMAPS.open("rb") as file:
        for raw in file:
            key, _, rest = raw.partition(b" ")
            if not key.endswith(b":"):  # a mapping: addresses, rights, offset, device, inode, path
                fields = raw.decode(errors="replace").split(None, 5)
                path = fields[5].strip() if len(fields) > 5 and fields[5].startswith("/") else ""
                if path and "x" in fields[1]:
                    libraries.add(path)
            elif key == b"Rss:" and path and not path.startswith(_SHARED_NAMES):
                sizes[path] = sizes.get(path, 0) + int(rest.split()[0]) * 1024
    # A file that is mapped several times has its pages once.
    return {p: min(size, _file_bytes(p, size)) for p, size in sizes.items() if p not in libraries}


def _file_bytes(path: str, default_bytes: int) -> int:
    try:
        return Path(path).stat().st_size or default_bytes
    except OSError:  # deleted
        return default_bytes
