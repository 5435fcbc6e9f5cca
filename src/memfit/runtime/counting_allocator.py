"""The counting CPU allocator: exact live tensor bytes over all threads.

A small shared library (counting_allocator.cpp) wraps torch's CPU allocator. It is compiled once per torch,
source and compiler, in about a second, and cached in the user's cache folder. Bytes are rounded up to 64 per
storage, torch's alignment on CPU. Storages that existed before the install are not counted.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple

import platformdirs
import torch

from memfit.runtime.child_process import dying_with_parent
from memfit.types.errors import MemfitError

_SOURCE: Final = Path(__file__).with_name("counting_allocator.cpp")
_COMPILERS: Final = ("g++", "clang++", "c++")
_BUILD_LIMIT_S: Final = 120.0


class AllocatorUnavailable(MemfitError):
    """Raised if the counting allocator cannot be built, loaded or installed on this machine. The message says
    why."""


class Counts(NamedTuple):
    """Numbers of allocations and of frees since the install, and of the blocks that are allocated now."""

    allocations: int
    frees: int
    alive: int


class Event(NamedTuple):
    """One allocation (``delta_bytes`` above 0) or free (below 0), with its time on the monotonic clock in ns
    and the operating system's ID of its thread (0 outside Linux)."""

    delta_bytes: int
    time_ns: int
    thread: int


class Log(NamedTuple):
    """Every allocation and free between start_log and stop_log, in the order in which they were counted.
    ``start_bytes``: live bytes when the log started."""

    start_bytes: int
    events: tuple[Event, ...]

    @property
    def deltas_bytes(self) -> tuple[int, ...]:
        """Change in live bytes of each event, in the order of ``events``."""
        return tuple(e.delta_bytes for e in self.events)


def available() -> str | None:
    """Build the counting allocator's library, unless it is in the cache. Return None if the library is there
    then, else the reason why it cannot be built, in one line. Nothing is loaded or installed, which may still
    fail."""
    try:
        _build()
    except AllocatorUnavailable as error:
        return str(error)
    return None


def active_allocator() -> CountingAllocator | None:
    """Return the counting allocator if it is installed in this process, else None. Nothing is installed."""
    return CountingAllocator() if _count_copied_storages.cache_info().currsize else None


class CountingAllocator:
    """Handle of the process's single counting allocator. Constructing it raises AllocatorUnavailable if the
    allocator cannot be built or loaded.

    Storages are counted from `install()` until the process ends, so install it before the model is built."""

    source = "counting allocator"

    def __init__(self) -> None:
        self._library = _load(_build())

    def install(self) -> None:
        """Start counting, unless this process counts already. Raises AllocatorUnavailable if torch's
        allocator cannot be wrapped."""
        if not self._library.memfit_install():
            raise AllocatorUnavailable("torch's current CPU allocator cannot be wrapped")
        _count_copied_storages()

    def live_bytes(self) -> int:
        """Return the bytes of the counted storages that are alive now."""
        return int(self._library.memfit_live())

    def peak_bytes(self) -> int:
        """Return the peak of live bytes since the last reset_peak, or since the install."""
        return int(self._library.memfit_peak())

    def reset_peak(self) -> None:
        """Set the peak to the bytes that are live now."""
        self._library.memfit_reset_peak()

    def counts(self) -> Counts:
        """Return the numbers of allocations and frees since the install, and of the blocks alive now."""
        out = (ctypes.c_int64 * 3)()
        self._library.memfit_counts(out)
        return Counts(*out)

    def start_log(self) -> None:
        """Start a log of every allocation and free. Events of an earlier log are dropped."""
        self._log_start_bytes = int(self._library.memfit_start_log())

    def stop_log(self) -> Log:
        """Stop logging and return the log since start_log, which must have been called. Raises MemoryError if
        no memory was left for the log, as under a memory cap."""
        length = int(self._library.memfit_stop_log())
        if length < 0:
            raise MemoryError("the log of allocations is incomplete: no memory was left for it")
        out = (ctypes.c_int64 * (3 * length))()
        self._library.memfit_read_log(out, length)
        events = tuple(Event(*out[i : i + 3]) for i in range(0, 3 * length, 3))
        return Log(self._log_start_bytes, events)

    def release(self, cap_bytes: int = 0) -> None:
        """Return to the system all freed blocks that are kept for reuse. With `cap_bytes`, freed blocks are
        kept from now on only while they and the live blocks take less than the bytes live now plus 7/8 of
        `cap_bytes`. Without it, this limit ends."""
        self._library.memfit_release(cap_bytes)

    def watch_data(self, on: bool) -> None:
        """Start (``on``) or stop recording the process's highest data segment, read after large allocations
        (64 KiB or more). Starting forgets the earlier highest. Nothing is recorded outside Linux."""
        self._library.memfit_watch_data(int(on))

    def data_peak_bytes(self) -> int:
        """Return the highest bytes of the process's data segment, including the stack, recorded since
        watch_data(True), or 0 if it was never watched."""
        return int(self._library.memfit_data_peak())


@functools.cache
def _count_copied_storages() -> None:
    """Patch the cloning of CPU storages so that the clones are counted. Torch makes the storages that Python
    clones with its default allocator, even if another one is set. These include the buffers of a model's deep
    copy, which are cloned as storages, while parameters are cloned as tensors."""
    inner: Any = torch.UntypedStorage.clone

    def clone(storage: Any) -> Any:
        if storage.device.type != "cpu":
            return inner(storage)
        return torch.empty(storage.nbytes(), dtype=torch.uint8).untyped_storage().copy_(storage)

    torch.UntypedStorage.clone = clone  # type: ignore[method-assign]


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise AllocatorUnavailable(f"the counting allocator does not load: {error}") from error
    for name in ("live", "peak", "start_log", "stop_log", "data_peak"):
        getattr(library, f"memfit_{name}").restype = ctypes.c_int64
    library.memfit_release.argtypes = (ctypes.c_int64,)
    library.memfit_read_log.argtypes = (ctypes.POINTER(ctypes.c_int64), ctypes.c_int64)
    return library


def _build() -> Path:
    """Return the path of the library, and compile it if it is not cached. Raises AllocatorUnavailable if
    there is no compiler (even if it is cached) or compiling fails."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise AllocatorUnavailable(f"no C++ compiler found ({', '.join(_COMPILERS)})")
    command = _command(compiler)
    target = _cache_path(command)
    if not target.exists():
        _compile(command, target)
    return target


def _command(compiler: str) -> tuple[str, ...]:
    torch_dir = Path(torch.__file__).parent
    undefined = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
    return (
        compiler,
        "-std=c++20",
        "-O2",
        "-fPIC",
        "-shared",
        *undefined,
        f"-I{torch_dir / 'include'}",
        str(_SOURCE),
        f"-L{torch_dir / 'lib'}",
        "-lc10",
        f"-Wl,-rpath,{torch_dir / 'lib'}",
    )


def _cache_path(command: tuple[str, ...]) -> Path:
    """Return the library's path in the cache, which differs for each torch, source, compiler and flags."""
    compiler_stat = Path(command[0]).stat()
    parts = (torch.__version__, *command, str(compiler_stat.st_size), str(compiler_stat.st_mtime_ns))
    digest = hashlib.sha256("\0".join(parts).encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    return platformdirs.user_cache_path("memfit") / f"counting_allocator-{digest}.so"


def _compile(command: tuple[str, ...], target: Path) -> None:
    """Compile to a file beside `target` and rename it to `target`, so that two processes may build at the
    same time. Raises AllocatorUnavailable if the folder cannot be written, if compiling fails, or if it takes
    longer than 120 s."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(suffix=".so", dir=target.parent)
    except OSError as error:
        raise AllocatorUnavailable(f"the cache folder cannot be written: {error}") from error
    os.close(handle)
    try:
        subprocess.run(
            dying_with_parent((*command, "-o", draft)),
            check=True,
            capture_output=True,
            text=True,
            timeout=_BUILD_LIMIT_S,
        )
        Path(draft).replace(target)
    except (OSError, subprocess.SubprocessError) as error:
        raise AllocatorUnavailable(f"the counting allocator does not compile: {_why(error)}") from error
    finally:
        Path(draft).unlink(missing_ok=True)


def _why(error: Exception) -> str:
    """Return the first line with "error" that the compiler printed, else the text of ``error``."""
    lines = str(getattr(error, "stderr", None) or "").splitlines()
    return next((line for line in lines if "error" in line), str(error))
