"""Export the traced step for external viewers: PyTorch's memory snapshot and Chrome's trace events."""

from __future__ import annotations

import bisect
import dataclasses
import json
import pickle
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Final

from memfit.report.explain import TracedEstimate, events, op_name
from memfit.types.trace import Allocation, Trace

Event = dict[str, Any]

_PROTOCOL: Final = 4  # the newest pickle protocol that PyTorch's viewer reads
_FIRST_ADDRESS: Final = 1 << 40  # size of each stream's address space
_PHASES, _MODULES = 1, 2  # thread numbers of the Chrome trace


def snapshot(explained: TracedEstimate) -> bytes:
    """Return the traced step as a pickle in the format of ``torch.cuda.memory._snapshot()``, which ``python
    -m torch.cuda._memory_viz`` and pytorch.org/memory_viz can read.

    There is one segment for each stream. The addresses of live allocations do not overlap, but they are not
    those that the caching allocator would choose. Times are ticks of the trace's clock. Each allocation has
    three stack frames: operator and line; module; category, phase and step. Allocations of 0 bytes are left
    out.
    """
    trace = explained.trace
    streams = dict.fromkeys(a.stream for a in trace.allocations)
    spaces = {s: _Space(address=(i + 1) * _FIRST_ADDRESS) for i, s in enumerate(streams)}
    addresses: dict[int, int] = {}
    frames: dict[int, list[Event]] = {}
    actions: list[Event] = []
    for clock, change_bytes, a in events(trace):
        if not a.size_bytes:
            continue
        is_alloc, key = change_bytes > 0, id(a)
        if is_alloc:
            addresses[key], frames[key] = spaces[a.stream].take(a.size_bytes), _frames(a)
        event = {"addr": addresses[key], "size": a.size_bytes, "frames": frames[key], "time_us": clock}
        event["stream"] = list(streams).index(a.stream)
        actions += [
            {"action": x, **event} for x in (("alloc",) if is_alloc else ("free_requested", "free_completed"))
        ]
        if not is_alloc:
            spaces[a.stream].give(addresses.pop(key), a.size_bytes)
    live_blocks = [(addresses[id(a)], a, frames[id(a)]) for a in trace.allocations if id(a) in addresses]
    segments = [
        _segment(space, index, sorted((x for x in live_blocks if x[1].stream == name), key=lambda x: x[0]))
        for index, (name, space) in enumerate(spaces.items())
    ]
    segment_events = [
        {
            "action": "segment_alloc",
            "addr": s["address"],
            "size": s["total_size"],
            "stream": s["stream"],
            "frames": [],
            "time_us": 0,
        }
        for s in segments
    ]
    return pickle.dumps(
        {"segments": segments, "device_traces": [[*segment_events, *actions]]}, protocol=_PROTOCOL
    )


@dataclasses.dataclass(slots=True)
class _Space:
    """The addresses of one stream's allocations, from ``address`` on.

    An allocation is placed in the smallest hole that is large enough; if there is none, at the end, which
    grows.
    """

    address: int
    total_bytes: int = 0
    holes: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # (size, address), sorted
    starts: dict[int, int] = dataclasses.field(default_factory=dict)  # address -> end of the hole there
    # address -> start of the hole that ends there
    ends: dict[int, int] = dataclasses.field(default_factory=dict)

    def take(self, size_bytes: int) -> int:
        index = bisect.bisect_left(self.holes, (size_bytes, 0))
        if index == len(self.holes):
            self.total_bytes += size_bytes
            return self.address + self.total_bytes - size_bytes
        start = self.holes[index][1]
        end = self._close(start)
        if end > start + size_bytes:
            self._open(start + size_bytes, end)
        return start

    def give(self, start: int, size_bytes: int) -> None:
        end = start + size_bytes
        if start in self.ends:
            start = self.ends[start]
            self._close(start)
        if end in self.starts:
            end = self._close(end)
        self._open(start, end)

    def _open(self, start: int, end: int) -> None:
        bisect.insort(self.holes, (end - start, start))
        self.starts[start], self.ends[end] = end, start

    def _close(self, start: int) -> int:
        end = self.starts.pop(start)
        del self.ends[end], self.holes[bisect.bisect_left(self.holes, (end - start, start))]
        return end


def _frames(a: Allocation) -> list[Event]:
    file, _, line = a.line.rpartition(":")
    return [
        {"name": op_name(a.op), "filename": file or "operator", "line": int(line or 0)},
        {"name": a.module or "model", "filename": "module", "line": 0},
        {"name": f"{a.category} made in {a.phase}, step {a.step + 1}", "filename": "memfit", "line": 0},
    ]


def _segment(space: _Space, stream: int, live_blocks: list[tuple[int, Allocation, list[Event]]]) -> Event:
    """Return the stream's segment as it is at the end of the trace: the blocks still alive, and the gaps
    between them and up to the segment's end as inactive blocks. ``live_blocks``: (address, allocation, stack
    frames), sorted by address."""
    blocks: list[Event] = []
    end = space.address

    def gap(until: int) -> None:
        if until > end:
            size = until - end
            blocks.append(
                {"address": end, "size": size, "requested_size": 0, "state": "inactive", "frames": []}
            )

    for address, a, frames in live_blocks:
        gap(address)
        block = {"address": address, "size": a.size_bytes, "requested_size": a.size_bytes}
        blocks.append({**block, "state": "active_allocated", "frames": frames})
        end = address + a.size_bytes
    gap(space.address + space.total_bytes)
    active = sum(a.size_bytes for _, a, _ in live_blocks)
    return {
        "device": 0,
        "address": space.address,
        "total_size": space.total_bytes,
        "allocated_size": active,
        "active_size": active,
        "requested_size": active,
        "stream": stream,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": blocks,
    }


def chrome_trace(explained: TracedEstimate) -> bytes:
    """Return the traced step as Chrome's trace-event JSON in UTF-8, for ui.perfetto.dev.

    It has counters of the live bytes of each category and of all together, a slice for each phase of each
    step, slices for the operators inside those of their modules, and an instant at the peak. One tick of the
    trace's clock is shown as one microsecond, so the lengths show an order, not times.
    """
    trace, estimate = explained.trace, explained.estimate
    name = f"memfit: {estimate.plan.label}"
    trace_events: list[Event] = [
        _metadata_event("process_name", 0, name),
        _metadata_event("thread_name", _PHASES, "phases"),
    ]
    trace_events += [_metadata_event("thread_name", _MODULES, "modules and operators"), *_counters(trace)]
    trace_events += [
        _slice(f"{s.phase}, step {s.step + 1}", s.start, s.end, _PHASES, {})
        for s in trace.spans
        if s.end > s.start
    ]
    trace_events += _module_slices(trace)
    peak = {
        "bytes": int(estimate.allocated_bytes.value),
        "phase": estimate.peak_phase,
        "op": estimate.peak_op,
    }
    trace_events.append(
        {
            "ph": "i",
            "s": "p",
            "name": "peak",
            "ts": explained.peak_clock,
            "pid": 0,
            "tid": _PHASES,
            "args": peak,
        }
    )
    metadata = {
        "made by": "memfit estimate",
        "clock": "one tick, shown as 1 us, for each operator, allocation and free: an order, not time",
    }
    document = {"traceEvents": trace_events, "displayTimeUnit": "ms", "otherData": metadata}
    return json.dumps(document, separators=(",", ":")).encode()


def _metadata_event(kind: str, thread: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": 0, "tid": thread, "args": {"name": name}}


def _slice(name: str, start: int, end: int, thread: int, args: Event) -> Event:
    return {"ph": "X", "name": name, "ts": start, "dur": end - start, "pid": 0, "tid": thread, "args": args}


def _counters(trace: Trace) -> Iterator[Event]:
    live = Counter[str]()
    for clock, change_bytes, a in events(trace):
        for name in (str(a.category), "live bytes"):
            live[name] += change_bytes
            yield {"ph": "C", "name": name, "ts": clock, "pid": 0, "args": {"bytes": live[name]}}


def _module_slices(trace: Trace) -> Iterator[Event]:
    """Yield a slice for each operator, and slices for the modules in whose forward or backward it runs.

    Consecutive operators of one module, those of its submodules included, share one slice of the module. It
    ends at the next operator outside the module, or at the end of the phase if that is earlier.
    """
    open_modules: list[tuple[str, int]] = []  # (name, start), outermost first
    ends = {s.end for s in trace.spans}
    bounds = sorted(ends)
    for op, next_op in pairwise([*trace.ops, None]):
        assert op is not None
        limit = bounds[min(bisect.bisect_right(bounds, op.clock), len(bounds) - 1)]
        end = min(next_op.clock, limit) if next_op else limit
        path = op.module.split(".") if op.module else []
        while open_modules and [n for n, _ in open_modules] != path[: len(open_modules)]:
            name, start = open_modules.pop()
            yield _slice(name, start, op.clock, _MODULES, {})
        open_modules += [(n, op.clock) for n in path[len(open_modules) :]]
        args = {"flops": op.flops, "moved_bytes": op.moved_bytes, "dtype": op.dtype}
        yield _slice(op_name(op.op), op.clock, end, _MODULES, args)
        while open_modules and (next_op is None or next_op.clock >= limit):
            name, start = open_modules.pop()
            yield _slice(name, start, end, _MODULES, {})
