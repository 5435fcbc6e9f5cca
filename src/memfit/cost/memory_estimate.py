"""Reserved and device memory of a plan, each with its range, and the probability that it does not fit.

Basis of the ranges. Reserved: at least the live bytes, which no order of frees and no setting of the
allocator changes; at most the highest of replays in the traced order and with frees up to 16 events late (a
free waits for Python and for autograd's thread), plus the error of the sizes themselves. Not yet checked on a
GPU; published runs of FSDP2 reserved less than any of the replays (benchmarks/published.md). Device: the
catalog's ranges for context, kernels and NCCL are added to that, end to end. For probabilities a range is
read as the central 95 % of a split normal distribution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final

import numpy

from memfit.cost.allocator import Event, ReplayResult, Settings, events_of, run
from memfit.cost.device_overhead import device_overhead, exceeds_probability, total_interval
from memfit.types.device_kind import device_kind
from memfit.types.machine import Machine
from memfit.types.result import Interval
from memfit.types.trace import Trace

_LATE_EVENTS = (1, 4, 16)
_BISECTIONS = 6
ASSUMED_RESERVED_RATIO = (
    1.06  # reserved to allocated, median of 20 replayed plans; used for plans that were not traced
)
# One of an estimate's assumptions if its footprint is empty on an accelerator (planner/capacity.py).
_UNKNOWN: Final = "what this kind of device takes beside tensors is unknown"
UNKNOWN_FOOTPRINT_HERE: Final = f"6 % of the tensors' memory for the allocator; {_UNKNOWN}"
UNKNOWN_FOOTPRINT: Final = (  # of a device that is not in this machine
    f"6 % of the tensors' memory for the allocator and 1 GiB for context and libraries; {_UNKNOWN}"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Reserved memory and device memory of one rank of a plan. All is None or empty on the host, and on a
    device whose kind does not reserve memory as CUDA does (`DeviceKind.reserves_as_cuda`): it is unknown.

    ``counted_bytes``: peak of the allocated bytes as the caching allocator counts them, with the rests of
    cached blocks that are too small to be cut off, at most 1 MiB each; 0 if unknown. ``reserved_bytes``:
    what the allocator reserves. ``device_bytes``: ``reserved_bytes`` plus what the process uses outside the
    allocator; None if the catalog lacks a part of that. ``device_parts_bytes``: "reserved" and the known
    parts outside: "context", "kernels" and "nccl". ``oom_probability``: probability, from 0 to 1, that the
    device's memory is not enough; None if ``device_bytes`` is None.
    """

    counted_bytes: int = 0
    reserved_bytes: Interval | None = None
    device_bytes: Interval | None = None
    device_parts_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    oom_probability: float | None = None


def footprint(trace: Trace, allocated: Interval, machine: Machine) -> Footprint:
    """Return the footprint of a traced plan; an empty one, ``Footprint()``, if the device's kind does not
    reserve memory as CUDA does.

    The allocations of ``trace`` must include the BLAS workspaces. ``allocated``: the predicted peak of the
    live bytes, with its range. ``oom_probability``: the need is what the allocator reserves or, if it is
    doubtful whether the plan fits, the smallest memory with which a replay succeeds (`_least_memory`),
    because the allocator gives cached segments back before it fails; in both cases plus the memory outside
    it.
    """
    if not device_kind(machine.device.kind).reserves_as_cuda:
        return Footprint()
    events = events_of(trace.allocations)
    plain = run(events)
    replayed = _reserved_interval(events, plain, allocated)
    reserved = dataclasses.replace(replayed, low=min(replayed.low, allocated.low))
    outside_memory = device_overhead(machine.device, trace.communicators)
    device = total_interval((reserved, outside_memory.total_bytes))
    memory_bytes = machine.device.memory_bytes.value
    required = replayed
    if (
        outside_memory.total_bytes
        and device
        and device.high > memory_bytes > allocated.low + outside_memory.total_bytes.low
    ):
        required = _least_memory(events, plain, replayed, allocated)
    required_total = total_interval((required, outside_memory.total_bytes))
    return Footprint(
        counted_bytes=plain.allocated_peak_bytes,
        reserved_bytes=reserved,
        device_bytes=device,
        device_parts_bytes={"reserved": int(reserved.value), **outside_memory.parts_bytes},
        oom_probability=exceeds_probability(required_total, memory_bytes) if required_total else None,
    )


def sketch_footprint(
    allocated: Interval, machine: Machine, *, reserved_ratio: float, communicators: Sequence[int] = ()
) -> Footprint:
    """Return the footprint of a plan that was not traced; an empty one, ``Footprint()``, if the device's kind
    does not reserve memory as CUDA does.

    ``allocated``: the predicted peak of its tensors. ``communicators``: number of ranks of each NCCL
    communicator. ``reserved_ratio``: reserved over allocated memory of a traced plan of the same job. The
    reserved memory is ``allocated`` times that ratio; its low end is that of ``allocated``, and its high end
    is computed with a ratio of at least 1.06.
    """
    if not device_kind(machine.device.kind).reserves_as_cuda:
        return Footprint()
    reserved = Interval(
        value=allocated.value * reserved_ratio,
        low=allocated.low,
        high=allocated.high * max(reserved_ratio, ASSUMED_RESERVED_RATIO),
    )
    outside_memory = device_overhead(machine.device, [("", ranks) for ranks in communicators])
    device = total_interval((reserved, outside_memory.total_bytes))
    return Footprint(
        reserved_bytes=reserved,
        device_bytes=device,
        device_parts_bytes={"reserved": int(reserved.value), **outside_memory.parts_bytes},
        oom_probability=exceeds_probability(device, machine.device.memory_bytes.value) if device else None,
    )


def _reserved_interval(events: Sequence[Event], plain: ReplayResult, allocated: Interval) -> Interval:
    peaks = [
        plain.reserved_peak_bytes,
        *(run(delay_frees(events, places)).reserved_peak_bytes for places in _LATE_EVENTS),
    ]
    scale_low, scale_high = allocated.low / allocated.value, allocated.high / allocated.value
    return Interval(
        value=plain.reserved_peak_bytes,
        low=min(plain.reserved_peak_bytes, max(allocated.low, min(peaks) * scale_low)),
        high=max(peaks) * scale_high,
    )


def delay_frees(events: Sequence[Event], by: int) -> list[Event]:
    """Return the events with every free moved 0 to ``by`` places later, at random with a fixed seed."""
    shift = numpy.random.default_rng(0).integers(0, by + 1, len(events)) + 0.5
    frees = numpy.fromiter((size < 0 for _, size, _ in events), dtype=bool, count=len(events))
    order: list[int] = numpy.argsort(numpy.arange(len(events)) + shift * frees, kind="stable").tolist()
    return [events[i] for i in order]


def _least_memory(
    events: Sequence[Event], plain: ReplayResult, reserved: Interval, allocated: Interval
) -> Interval:
    """Return about the smallest memory with which a replay of ``events`` succeeds, because it releases cached
    segments on the way. It is found by bisection between the allocated and the reserved peak of ``plain``,
    which is the replay without a limit.

    Its ends are those of ``reserved``, scaled by the result over the reserved peak of ``plain``, but the low
    end is at least that of ``allocated``, unless the result is less.
    """
    low, high = plain.allocated_peak_bytes, plain.reserved_peak_bytes
    for _ in range(_BISECTIONS):
        middle = (low + high) // 2
        if run(events, Settings(cap_bytes=middle)).fits:
            high = middle
        else:
            low = middle
    ratio = high / plain.reserved_peak_bytes
    lowest = min(high, max(allocated.low, reserved.low * ratio))
    return Interval(value=high, low=lowest, high=max(high, reserved.high * ratio))
