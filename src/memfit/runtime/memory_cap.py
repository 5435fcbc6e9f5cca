"""The hard memory cap, which a process sets on itself after its warm-up step.

What the process holds by then (interpreter, libraries, kernel caches) is its footprint and is not capped.
`cap_bytes` is what it may use in addition. For the cap to match what tensors hold, freed blocks must return
to the system: start the process with memfit.runtime.child_process.CHILD_ENV. docs/decisions/002-memory-cap.md
says which limit is used, and why.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
from typing import TYPE_CHECKING, Any, Final, Protocol

from memfit.runtime import devices
from memfit.runtime.cgroup import Group
from memfit.runtime.counting_allocator import CountingAllocator
from memfit.runtime.memory import PeakCounter, data_bytes, rss_bytes
from memfit.types.device_kind import HOST
from memfit.types.errors import MemfitError

if TYPE_CHECKING:
    import torch

_PROBE_BYTES: Final = 32 * 1024**2
_SPARE_RATIO, _SPARE_BYTES = 1.05, 2 * 1024**2  # as in planner.capacity


class MemoryLimit:
    """A cap on the memory of this process: `cap_bytes` above the footprint, which is what the process holds
    when `apply` sets the cap. `kind` says what enforces it: "RLIMIT_DATA", "cgroup" or, for an accelerator,
    "memory fraction", a limit on what torch's allocator takes from it.

    Constructing a limit sets no cap. ``device`` None is the CPU. ``counter``: the one that counts the tensors
    of this device; without the counting allocator, `used_bytes` is unknown under RLIMIT_DATA. Raises
    MemfitError for a CPU if neither RLIMIT_DATA nor a control group can be used here."""

    def __init__(
        self, cap_bytes: int, *, device: torch.device | None = None, counter: PeakCounter | None = None
    ) -> None:
        self.cap_bytes = cap_bytes
        self.footprint_bytes: int | None = None  # None until apply()
        self._used_bytes: int | None = None  # None until lift()
        self._lifted = self._was_raised = False
        self._allocator = counter if isinstance(counter, CountingAllocator) else None
        if device is None or device.type == HOST:
            self._cap: _Cap = _cpu_cap(cap_bytes, self._allocator)
        else:
            self._cap = _MemoryFraction(device, counter)

    @property
    def kind(self) -> str:
        return self._cap.kind

    def apply(self, *, at_least_data_bytes: int = 0) -> None:
        """Return free memory to the system and set the cap. From now on an allocation beyond it fails
        (RLIMIT_DATA, memory fraction) or the process is killed (cgroup). ``at_least_data_bytes``: `cap_bytes`
        is raised, if necessary, so that the data segment of the process can grow to this size and a little
        more (5 % of the growth and 2 MiB); 0: it is not raised. It has no effect on an accelerator. Raises
        MemfitError if this kind of accelerator has no such limit."""
        if self._allocator is not None:
            self._allocator.release(self.cap_bytes)
        _trim()
        if at_least_data_bytes and self.kind != _MemoryFraction.kind:
            growth_bytes = at_least_data_bytes - (data_bytes() or 0)
            self.cap_bytes = max(self.cap_bytes, int(growth_bytes * _SPARE_RATIO) + _SPARE_BYTES)
        self.footprint_bytes = self._cap.apply(self.cap_bytes)

    def lift(self) -> None:
        """Remove the cap that `apply` has set, so call it after that. Calling this again does nothing."""
        if not self._lifted:
            self._lifted = True
            self._used_bytes, self._was_raised = self._cap.used_bytes(), self._cap.is_raised()
            self._cap.lift()
            if self._allocator is not None:
                self._allocator.release()

    def was_raised(self) -> bool:
        """Return whether somebody else, such as the job's code, had set a higher limit at lift() (or has now,
        before lift()). This is seen under RLIMIT_DATA only: False under another cap. To be called after
        apply()."""
        return self._was_raised if self._lifted else self._cap.is_raised()

    def used_bytes(self) -> int | None:
        """Return the peak in bytes above the footprint, from apply() to lift() (or to now, before lift()), as
        the cap counts it. Return None if it is unknown. To be called after apply()."""
        return self._cap.used_bytes() if self._used_bytes is None else self._used_bytes


class _Cap(Protocol):
    kind: str

    def apply(self, cap_bytes: int) -> int:
        """Set the cap to `cap_bytes` above what the process holds now (the footprint), and return the
        footprint in bytes."""
        ...

    def lift(self) -> None: ...

    def used_bytes(self) -> int | None: ...

    def is_raised(self) -> bool:
        """Return whether another limit than the one that `apply` has set is in force, and it is higher; False
        if that cannot be seen."""
        ...


def _cpu_cap(cap_bytes: int, allocator: CountingAllocator | None) -> _Cap:
    if _data_limit_holds():
        return _DataLimit(allocator)
    group = Group.of(os.getpid())
    if group is not None:
        with contextlib.suppress(OSError):  # the system does not allow it
            group.make(cap_bytes)
            return _Cgroup(group)
    raise MemfitError("no hard memory cap is possible here: neither RLIMIT_DATA nor a control group works")


def _data_limit_holds() -> bool:
    """Return whether RLIMIT_DATA limits memory mappings here. This is tried out with a mapping of 64 MiB,
    because kernels before Linux 4.7 and some sandboxes do not apply the limit to them. Return False on
    systems without /proc."""
    current_bytes = data_bytes()
    if current_bytes is None:
        return False
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    probe_bytes = current_bytes + _PROBE_BYTES
    if limits[1] != resource.RLIM_INFINITY:
        probe_bytes = min(probe_bytes, limits[1])
    resource.setrlimit(resource.RLIMIT_DATA, (probe_bytes, limits[1]))
    try:
        mmap.mmap(-1, 2 * _PROBE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return True
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    return False


class _DataLimit:
    """A cap by RLIMIT_DATA, which counts private writable memory, touched or not (VmData). If the process
    already has a lower limit, that stays in force instead. `lift` sets the earlier limit again."""

    kind = "RLIMIT_DATA"

    def __init__(self, allocator: CountingAllocator | None) -> None:
        self._allocator = allocator
        self._before = resource.getrlimit(resource.RLIMIT_DATA)

    def apply(self, cap_bytes: int) -> int:
        footprint = data_bytes() or 0
        soft, hard = self._before
        bounds = [b for b in (soft, hard, footprint + cap_bytes) if b != resource.RLIM_INFINITY]
        if self._allocator is not None:
            self._allocator.watch_data(True)
            self._start_bytes = self._allocator.data_peak_bytes()
        self._limit_bytes = min(bounds)
        resource.setrlimit(resource.RLIMIT_DATA, (self._limit_bytes, hard))
        return footprint

    def is_raised(self) -> bool:
        soft = resource.getrlimit(resource.RLIMIT_DATA)[0]
        return soft == resource.RLIM_INFINITY or soft > self._limit_bytes

    def lift(self) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, self._before)
        if self._allocator is not None:
            self._allocator.watch_data(False)

    def used_bytes(self) -> int | None:
        """Return by how many bytes the peak of VmData since apply() exceeds its value at apply(). Return None
        without the counting allocator, which records this peak: the kernel does not record it."""
        return None if self._allocator is None else self._allocator.data_peak_bytes() - self._start_bytes


class _Cgroup:
    """A cap by a control group, which counts the pages that the process touches after `apply` has moved it
    into the group."""

    kind = "cgroup"

    def __init__(self, group: Group) -> None:
        self._group = group

    def apply(self, cap_bytes: int) -> int:
        footprint = rss_bytes()
        self._group.limit(cap_bytes)  # which may be above that with which the group was made
        self._group.enter()
        return footprint

    def lift(self) -> None:
        self._group.leave()
        self._group.remove()

    def used_bytes(self) -> int | None:
        return self._group.peak_bytes()

    def is_raised(self) -> bool:
        return False  # the parent group's owner alone can do that


class _MemoryFraction:
    """A cap by torch's caching allocator of an accelerator, which limits the memory that it takes from the
    device for this process. What it has taken at `apply` is the footprint. `lift` sets torch's default limit
    again."""

    kind = "memory fraction"

    def __init__(self, device: torch.device, counter: PeakCounter | None) -> None:
        self._device = device
        is_usable = isinstance(counter, devices.AllocatorCounter | devices.SampledCounter)
        self._counter: Any = counter if is_usable else devices.accelerator_counter(device)

    def apply(self, cap_bytes: int) -> int:
        devices.free_cache(self._device)
        self._counter.reset_reserved_peak()
        self._start_bytes = devices.reserved_bytes(self._device)
        total_bytes = devices.memory_info(self._device)[1]
        devices.set_memory_fraction(self._device, min(1.0, (self._start_bytes + cap_bytes) / total_bytes))
        return self._start_bytes

    def lift(self) -> None:
        devices.lift_memory_fraction(self._device)

    def used_bytes(self) -> int:
        return int(self._counter.reserved_peak_bytes()) - self._start_bytes

    def is_raised(self) -> bool:
        return False  # torch does not tell the fraction that is set


def _trim() -> None:
    """Return free blocks of the C library's heap to the system, so that the footprint contains none. Do
    nothing if the library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
