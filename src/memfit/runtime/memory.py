"""Peak of live tensor bytes, by the best available counter, and this process's memory as the operating system
counts it."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from memfit.runtime.counting_allocator import AllocatorUnavailable, CountingAllocator
from memfit.runtime.devices import accelerator_counter
from memfit.types.device_kind import HOST

if TYPE_CHECKING:
    from torch.profiler import profile

_STATUS: Final = Path("/proc/self/status")
_STATM: Final = Path("/proc/self/statm")
_CLEAR_REFS: Final = Path("/proc/self/clear_refs")
_RESET_PEAK: Final = "5"  # man 5 proc: sets VmHWM to the current resident size
_ALIGN_BYTES: Final = 64


class PeakCounter(Protocol):
    """Counts the live tensor bytes of one device, and their peak. `source` names the method, for example
    "counting allocator"."""

    source: str

    def live_bytes(self) -> int: ...

    def peak_bytes(self) -> int:
        """Return the peak of live bytes since the last reset_peak, or since counting started."""
        ...

    def reset_peak(self) -> None: ...


def peak_counter(device: str | torch.device = HOST) -> PeakCounter:
    """Return a counter for `device` ("cpu", "cuda:1") that is already counting: for an accelerator, torch's
    statistics (`accelerator_counter`), whose peaks are reset; for the CPU, the counting allocator, or
    `TorchEvents` if that is not available. Call it before the model is built, because the counters for a CPU
    do not see earlier tensors."""
    if (counted_device := torch.device(device)).type != HOST:
        return accelerator_counter(counted_device)
    try:
        counter = CountingAllocator()
        counter.install()
    except AllocatorUnavailable:
        return TorchEvents()
    return counter


class TorchEvents:
    """Counts torch.profiler's allocation events, for systems where the counting allocator cannot be built.

    It counts CPU blocks allocated after its construction, rounded up to 64 bytes. It is slower than the
    counting allocator, keeps every event since the last call of a method in memory, and misses frees on
    threads that the profiler does not follow. Each call of a method ends one profile and starts the next."""

    source = "torch allocator events"

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}  # pointer -> rounded bytes
        self._live = self._peak = 0
        self._begin()
        atexit.register(self._end)  # a profile that is open when Python exits crashes it

    def live_bytes(self) -> int:
        self._read()
        return self._live

    def peak_bytes(self) -> int:
        self._read()
        return self._peak

    def reset_peak(self) -> None:
        self._read()
        self._peak = self._live

    def _begin(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._profile: profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def _end(self) -> None:
        self._profile.stop()

    def _read(self) -> None:
        self._end()
        for pointer, size in _allocations(self._profile):
            self._count(pointer, size)
        self._begin()

    def _count(self, pointer: int, size_bytes: int) -> None:
        if size_bytes > 0:
            self._sizes[pointer] = -(-size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
            self._live += self._sizes[pointer]
        else:
            self._live -= self._sizes.pop(pointer, 0)  # 0 for pointers from before counting started
        self._peak = max(self._peak, self._live)


def _allocations(session: profile) -> list[tuple[int, int]]:
    """Return (pointer, +bytes or -bytes) of every CPU allocation and free of a profile, in order of time."""
    from torch._C._profiler import _EventType

    results = session.profiler.kineto_results if session.profiler else None
    events: list[tuple[int, int, int]] = []
    for event in _tree(results.experimental_event_tree() if results else []):
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == HOST:
            fields = event.extra_fields
            events.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    return [(pointer, size) for _, pointer, size in sorted(events, key=lambda item: item[0])]


def _tree(events: list[Any]) -> Iterator[Any]:
    stack = list(events)
    while stack:
        event = stack.pop()
        yield event
        stack.extend(event.children)


def rss_bytes() -> int:
    """Return the resident bytes of this process now."""
    with contextlib.suppress(OSError), _STATM.open("rb", buffering=0) as file:  # faster than _STATUS
        return int(file.read().split()[1]) * mmap.PAGESIZE
    import psutil

    return int(psutil.Process().memory_info().rss)


def rss_peak_bytes() -> int:
    """Return the highest resident bytes of this process since the last reset_rss_peak, or since the process
    started. Return the resident bytes now if the system records no peak, as on macOS."""
    recorded_bytes = status_bytes("VmHWM")
    if recorded_bytes is not None:
        return recorded_bytes
    import psutil

    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


class _MallInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns (man 3 mallinfo)."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    )


@functools.cache
def _mallinfo() -> Any:
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is not None:
        function.restype = _MallInfo
    return function


def heap_bytes() -> int | None:
    """Return the bytes that the C library's allocator has handed out and not got back, or None where it does
    not tell (it needs glibc 2.33). This includes the tensors of a processor, but not Python's small objects.
    Unlike resident memory, it does not include freed memory that is kept for reuse."""
    function = _mallinfo()
    if function is None:
        return None
    info = function()
    return int(info.uordblks + info.hblkhd)


def large_block_bytes() -> int | None:
    """Return the bytes of the blocks that the C library's allocator has mapped one by one, or None where it
    does not tell (it needs glibc 2.33). In a child process with `child_process.CHILD_ENV` these are all
    blocks of 64 KiB or more: tensors, arrays of NumPy, tables of libraries. Pages of the counting allocator
    do not count."""
    function = _mallinfo()
    return None if function is None else int(function().hblkhd)


def reset_rss_peak() -> bool:
    """Set the peak that `rss_peak_bytes` returns to the current resident bytes. Return False if the system
    does not support this, else True."""
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_PEAK)
        return True
    return False


def data_bytes() -> int | None:
    """Return this process's VmData in bytes: private writable memory without the stack, which RLIMIT_DATA
    limits. Return None on systems without /proc."""
    return status_bytes("VmData")


def status_bytes(field: str) -> int | None:
    """Return one of the sizes in /proc/self/status, such as "RssShmem", in bytes; None if there is no such
    field or file."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None
