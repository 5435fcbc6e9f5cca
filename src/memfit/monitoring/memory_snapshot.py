"""Read a memory snapshot of torch's caching allocator and summarize it.

``torch.cuda.memory._dump_snapshot(FILE)`` writes one. Its blocks say what is allocated; its trace, recorded
after ``torch.cuda.memory._record_memory_history()``, says what was allocated and freed before, and which
request failed. The trace keeps the newest events only, so it may begin in the middle of a training.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from memfit.files.read import read_bytes
from memfit.monitoring.plain_pickle import load_plain
from memfit.monitoring.traceback_text import StackFrame
from memfit.types.errors import UserError, first_line

LARGEST_BYTES: Final = 512 * 2**20  # Python objects take about ten times as much
_LIVE: Final = ("active_allocated", "active_awaiting_free", "active_pending_free")
_MOST_ITEMS: Final = 5_000_000  # blocks, events and frames that are looked at
_SWING: Final = 0.1  # of the peak: what counts as a rise or a fall of memory from step to step
_STACKS: Final = 5
_FEWER: Final = "record fewer events: torch.cuda.memory._record_memory_history(max_entries=100000)"
_SNAPSHOT: Final = "a file that torch.cuda.memory._dump_snapshot wrote, or its content as JSON"

Stack = tuple[StackFrame, ...]  # outermost first


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LiveStack:
    """Live blocks that were allocated from one line of the user's code. ``stack``: of the first of them;
    empty if it was not recorded."""

    stack: Stack
    size_bytes: int
    block_count: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemorySnapshot:
    """What a snapshot says about one device.

    ``reserved_bytes``: taken from the device. ``allocated_bytes``: in live blocks. ``largest_free_bytes``:
    the largest free block. ``free_block_count``: number of free blocks. ``request_bytes``: the request that
    failed last; None if none did or it was not recorded. ``device_free_bytes``: free on the device then.
    ``failed_stack``: its stack. ``event_count``: events of the trace. ``trough_bytes`` and ``peak_bytes``:
    live bytes at the low and high points of the trace, in order, without the rise that ends it.
    ``last_rise_bytes``: live bytes at the end of the trace, with the request that failed. ``stacks``: the
    lines with most live bytes. ``survivors``: lines whose blocks, allocated between the second low point and
    the last, are still live.
    """

    device: int
    reserved_bytes: int
    allocated_bytes: int
    largest_free_bytes: int
    free_block_count: int
    request_bytes: int | None
    device_free_bytes: int | None
    failed_stack: Stack
    event_count: int
    trough_bytes: tuple[int, ...]
    peak_bytes: tuple[int, ...]
    last_rise_bytes: int
    stacks: tuple[LiveStack, ...]
    survivors: tuple[LiveStack, ...]

    @property
    def free_bytes(self) -> int:
        """Reserved memory that is in no live block."""
        return self.reserved_bytes - self.allocated_bytes

    @property
    def leak_bytes(self) -> int:
        """Growth of the low points from the second to the last in bytes, if there are at least four low
        points, at least 70 % of them are above the one before, and they grew by at least 5 % of the highest
        point; else 0. The first is left out, because the first step adds the state of the optimizer."""
        troughs = self.trough_bytes[1:]
        if len(troughs) < 3:
            return 0
        rises = sum(b > a for a, b in itertools.pairwise(troughs))
        growth = troughs[-1] - troughs[0]
        return growth if growth >= 0.05 * max(self.peak_bytes) and rises >= 0.7 * (len(troughs) - 1) else 0


def is_snapshot(head: bytes) -> bool:
    """Return whether a file that begins with ``head`` may be a snapshot: a pickle, or JSON with segments."""
    return head[:1] == b"\x80" or (head.lstrip()[:1] in (b"{", b"[") and b'"segments"' in head[:4096])


def read_snapshot(path: Path) -> list[MemorySnapshot]:
    """Return what the snapshot in ``path``, a pickle or JSON, says about each device that it has memory or
    events of. No code of the file is run. Raises UserError if it cannot be read, is no snapshot, too large or
    damaged."""
    return parse_snapshot(read_bytes(path, most_bytes=LARGEST_BYTES, hint=_FEWER), what=str(path))


def parse_snapshot(data: bytes, *, what: str) -> list[MemorySnapshot]:
    """Return for ``data``, the content of a file, what `read_snapshot` returns. Raises UserError as it does.
    ``what``: name of the file in messages."""
    if len(data) > LARGEST_BYTES:
        raise UserError(
            f"the memory snapshot {what} is too large to be read",
            allowed=f"at most {LARGEST_BYTES} bytes",
            hint=_FEWER,
        )
    if data[:1] == b"\x80":
        value = load_plain(data, what=what)
    else:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"the memory snapshot {what} is neither a pickle nor JSON: {first_line(error)[:200]}",
                allowed=_SNAPSHOT,
            ) from None
    if isinstance(value, list):  # torch.cuda.memory_snapshot() returns the segments alone
        value = {"segments": value}
    try:
        return list(_devices(value))
    except _TooMany:
        raise UserError(
            f"the memory snapshot {what} has more than {_MOST_ITEMS} blocks, events and frames", hint=_FEWER
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{what} is not a memory snapshot: {type(error).__name__}: {error}"[:300],
            allowed=_SNAPSHOT,
        ) from None


class _TooMany(Exception):
    """The snapshot has more items than memfit reads: its lists refer to each other many times."""


class _Budget:
    """Limits the number of items that are read in all. A small file can refer to the same list any number of
    times."""

    def __init__(self) -> None:
        self._left = _MOST_ITEMS

    def items(self, value: Any) -> Iterator[Any]:
        if not isinstance(value, list | tuple):
            raise TypeError(f"a list is expected, not {type(value).__name__}")
        self._left -= len(value)
        if self._left < 0:
            raise _TooMany
        return iter(value)


def _devices(value: Any) -> Iterator[MemorySnapshot]:
    if not isinstance(value, dict) or "segments" not in value:
        raise KeyError("segments")
    budget = _Budget()
    segments = list(budget.items(value["segments"]))
    traces = list(budget.items(value.get("device_traces") or []))
    devices = {_integer(s.get("device", 0)) for s in segments} | {i for i, t in enumerate(traces) if t}
    for device in sorted(devices):
        own = [s for s in segments if _integer(s.get("device", 0)) == device]
        trace = list(budget.items(traces[device])) if device < len(traces) else []
        yield _Reader(device, own, trace, budget).summary()


class _Reader:
    """Summarizes the segments and the trace of one device."""

    def __init__(
        self,
        device: int,
        segments: Sequence[Mapping[str, Any]],
        trace: Sequence[Mapping[str, Any]],
        budget: _Budget,
    ) -> None:
        self._device, self._segments, self._trace, self._budget = device, segments, trace, budget
        self._stacks: dict[int, Stack] = {}  # by identity of the list of frames, which events share

    def summary(self) -> MemorySnapshot:
        blocks = [b for s in self._segments for b in self._budget.items(s["blocks"])]
        live = [b for b in blocks if b["state"] in _LIVE]
        free_bytes = [_integer(b["size"]) for b in blocks if b["state"] not in _LIVE]
        allocated_bytes = sum(_integer(b["size"]) for b in live)
        end = max(
            (i for i, e in enumerate(self._trace) if e.get("action") == "oom"), default=len(self._trace)
        )
        failed = self._trace[end] if end < len(self._trace) else None
        request_bytes = _integer(failed["size"]) if failed else None
        levels = self._levels(allocated_bytes)
        swings = _swings(levels[:end])
        troughs = [level for _, level, is_low in swings if is_low]
        peaks = [level for _, level, is_low in swings if not is_low]
        last_bytes = (levels[end - 1] if end else allocated_bytes) + (request_bytes or 0)
        lows = [row for row, _, is_low in swings if is_low]
        return MemorySnapshot(
            device=self._device,
            reserved_bytes=sum(_integer(s["total_size"]) for s in self._segments),
            allocated_bytes=allocated_bytes,
            largest_free_bytes=max(free_bytes, default=0),
            free_block_count=len(free_bytes),
            request_bytes=request_bytes,
            device_free_bytes=_integer(failed["device_free"]) if failed and "device_free" in failed else None,
            failed_stack=self._stack(failed.get("frames")) if failed else (),
            event_count=len(self._trace),
            trough_bytes=tuple(troughs),
            peak_bytes=tuple(peaks),
            last_rise_bytes=last_bytes,
            stacks=self._largest((b, _frames_of(b)) for b in live),
            survivors=self._largest(self._survivors(lows[1], lows[-1])) if len(lows) >= 3 else (),
        )

    def _levels(self, last_bytes: int) -> list[int]:
        """Return the live bytes after each event. They are counted back from the end, because the trace may
        not begin with the training."""
        changes = []
        for event in self._trace:
            action = event.get("action")
            sign = (action == "alloc") - (action == "free_completed")
            changes.append(sign * _integer(event["size"]) if sign else 0)
        level = last_bytes - sum(changes)
        levels = []
        for change in changes:
            level += change
            levels.append(level)
        return levels

    def _survivors(self, start: int, end: int) -> Iterator[tuple[Mapping[str, Any], Any]]:
        """Yield (event, frames) for each allocation from event ``start`` to ``end`` that was not freed."""
        freed_later: set[int] = set()
        for row in range(len(self._trace) - 1, start, -1):
            event = self._trace[row]
            action = event.get("action")
            if action == "free_completed":
                freed_later.add(_integer(event["addr"]))
            elif action == "alloc":
                address = _integer(event["addr"])
                if address in freed_later:
                    freed_later.discard(address)
                elif row <= end:
                    yield event, event.get("frames")

    def _largest(self, blocks: Iterable[tuple[Mapping[str, Any], Any]]) -> tuple[LiveStack, ...]:
        """Return the five lines of the user's code with most bytes, the largest first."""
        sizes: dict[tuple[str, int], list[Any]] = {}
        for block, frames in blocks:
            stack = self._stack(frames)
            frame = user_frame(stack)
            entry = sizes.setdefault((frame.file, frame.line) if frame else ("", 0), [stack, 0, 0])
            entry[1] += _integer(block["size"])
            entry[2] += 1
        entries = sorted(sizes.values(), key=lambda e: -e[1])[:_STACKS]
        return tuple(LiveStack(stack=s, size_bytes=size, block_count=count) for s, size, count in entries)

    def _stack(self, frames: Any) -> Stack:
        """Return the stack of an allocation, outermost first: of ``frames``, its frames in the snapshot,
        innermost first, those of .py files and notebook cells. Empty if ``frames`` is None or empty."""
        if not frames:
            return ()
        if id(frames) not in self._stacks:
            python_frames = [
                StackFrame(file=_text(f["filename"]), line=_integer(f["line"]), function=_text(f["name"]))
                for f in self._budget.items(frames)
                if _text(f["filename"]).endswith(".py") or _text(f["filename"]).startswith("<ipython")
            ]
            self._stacks[id(frames)] = tuple(reversed(python_frames))
        return self._stacks[id(frames)]


def user_frame(stack: Stack) -> StackFrame | None:
    """Return the innermost frame of a stack outside installed packages; without one, the innermost frame;
    None for an empty stack."""
    return next((f for f in reversed(stack) if not f.is_library), stack[-1] if stack else None)


def _frames_of(block: Mapping[str, Any]) -> Any:
    """Return the frames of a block. Before torch 2.1 they are in its history."""
    history = block.get("history") or [{}]
    return block.get("frames") or history[0].get("frames")


def _swings(levels: Sequence[int]) -> list[tuple[int, int, bool]]:
    """Return the turning points of ``levels``, (index, level, whether it is a low point), between which they
    rise and fall by at least ``_SWING`` of the highest level. The last move, which is not complete, has
    none."""
    least = _SWING * max(levels, default=0)
    points: list[tuple[int, int, bool]] = []
    high = low = 0  # indices of the extremes since the last turning point
    rising: bool | None = None
    for i, level in enumerate(levels):
        high, low = (i if level >= levels[high] else high), (i if level <= levels[low] else low)
        if rising is not False and levels[high] - level >= least > 0:
            points.append((high, levels[high], False))
            rising, low = False, i
        elif rising is not True and level - levels[low] >= least > 0:
            points.append((low, levels[low], True))
            rising, high = True, i
    return points


def _integer(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError(f"a whole number is expected, not {type(value).__name__}")
    return value


def _text(value: Any) -> str:
    """Return a text as it is. Other values are refused: the text of a list that contains itself often would
    not fit the memory."""
    if not isinstance(value, str):
        raise TypeError(f"a text is expected, not {type(value).__name__}")
    return value
