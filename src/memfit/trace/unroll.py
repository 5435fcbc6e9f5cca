"""Build the trace of a deep model from two shallow traces by repeating the events of one middle block.

Every allocation, free and operator of a trace belongs to the running block, or to none. A trace with ``k``
blocks becomes one with ``n`` blocks by repeating the events of its middle block wherever that block occurs
(construction, forward, backward, each optimizer operator), with the storages it refers to renumbered. That
this is valid for the model, plan and rank is checked: the trace with ``k`` blocks, unrolled by one period,
must equal the trace with that many blocks, event for event. Quantities that depend on the depth are
extrapolated linearly from the two traces: some sizes (a stack of all gradient norms, a flat buffer), the work
of operators on all parameters, and how far back a stream is waited for.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from memfit.types.trace import Allocation, OpCall, Phase, PhaseSpan, Trace, rounded

_ALLOCATE, _FREE, _OPERATE = range(3)


@dataclasses.dataclass(slots=True)
class _Event:
    kind: int
    block: int | None  # the running block; None outside the blocks
    index: int  # into the trace's allocations or ops
    clock: int


_Runs = list[tuple[int | None, list[_Event]]]
_Made = TypeVar("_Made", Allocation, OpCall)


@dataclasses.dataclass(slots=True)
class _Chapter:
    """The events of one span, grouped into runs of one block each."""

    span: PhaseSpan
    runs: _Runs


class _Place(NamedTuple):
    """Where an allocation was made, which identifies its counterpart in another block."""

    chapter: int
    block: int | None
    occurrence: int  # which of that block's runs in the chapter
    offset: int  # within the run


class _Work(NamedTuple):
    """How much an operator's work grows per period."""

    flops: int
    moved_bytes: int
    waited_calls: int

    @staticmethod
    def between(one: OpCall, other: OpCall) -> _Work:
        calls = other.waits[1] - one.waits[1] if one.waits and other.waits else 0
        return _Work(other.flops - one.flops, other.moved_bytes - one.moved_bytes, calls)

    def added(self, op: OpCall, times: int) -> OpCall:
        waits = (op.waits[0], op.waits[1] + times * self.waited_calls) if op.waits else None
        flops, moved_bytes = op.flops + times * self.flops, op.moved_bytes + times * self.moved_bytes
        return dataclasses.replace(op, flops=flops, moved_bytes=moved_bytes, waits=waits)


class Mismatch(Exception):
    """The shallow traces do not differ by exactly one repeated block. The message says where."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """``count`` blocks of the model at the module path ``path``, starting at index ``first``. A ``period`` of
    them repeats as a unit."""

    path: str
    first: int
    count: int
    period: int = 1

    def period_of(self, module: str) -> int | None:
        """Return the index of the period that a module path lies in, or None if it is outside the blocks."""
        if not module.startswith(f"{self.path}."):
            return None
        number = module[len(self.path) + 1 :].partition(".")[0]
        return (int(number) - self.first) // self.period if number.isdecimal() else None

    def moved(self, module: str, first: int, periods: int) -> str:
        """Return the module path in a model whose blocks start at ``first``, ``periods`` periods later."""
        number, dot, rest = module[len(self.path) + 1 :].partition(".")
        return f"{self.path}.{int(number) - self.first + first + periods * self.period}{dot}{rest}"


_ON_A_LINE = (
    "parameter_count",
    "trainable_count",
    "offloaded_bytes",
    "restored_bytes",
    "offloaded_tensors",
    "host_peak_bytes",
    "host_step_bytes",
    "model_bytes",
)


def unroll(shallow: Trace, deeper: Trace, given: Blocks, wanted: Blocks) -> Trace:
    """Return the trace with the ``wanted`` blocks, from ``shallow`` with the ``given`` blocks and ``deeper``
    with one period more.

    Raises Mismatch if unrolling ``shallow`` does not give ``deeper``.
    """
    assert (wanted.count - given.count) % given.period == 0, (given, wanted)
    middle, growth, more = _middle(shallow, deeper, given)
    whole = _Unrolled(shallow, given, wanted, middle)
    times = whole.extra
    ops = tuple(_worked(whole, more))
    grown = [
        _grown(a, times * growth[o], shallow.device) if o in growth else a
        for a, o in zip(whole.trace.allocations, whole.origin, strict=True)
    ]
    line = {
        name: getattr(shallow, name) + times * (getattr(deeper, name) - getattr(shallow, name))
        for name in _ON_A_LINE
    }
    return dataclasses.replace(whole.trace, allocations=tuple(grown), ops=ops, **line)


def renumbered(trace: Trace, path: str, numbers: Mapping[int, int]) -> Trace:
    """Return the trace with the blocks at ``path`` renumbered from the keys of ``numbers`` to its values."""

    def moved(made: _Made) -> _Made:
        if not made.module.startswith(f"{path}."):
            return made
        number, dot, rest = made.module[len(path) + 1 :].partition(".")
        if not number.isdecimal():
            return made
        other = numbers.get(int(number), number)  # a block of another rank, which is built and then dropped
        return dataclasses.replace(made, module=f"{path}.{other}{dot}{rest}")

    return dataclasses.replace(
        trace, allocations=tuple(map(moved, trace.allocations)), ops=tuple(map(moved, trace.ops))
    )


def _middle(
    shallow: Trace, deeper: Trace, given: Blocks
) -> tuple[int, dict[int, int], dict[int, tuple[_Work, _Work]]]:
    """Return a block whose repetition gives the deeper trace, and what grows in addition. The first and last
    blocks, and those that prefetch them, may differ. Raises Mismatch if there is none."""
    reason = "fewer than three periods"
    true, periods = canonical(deeper), -(-given.count // given.period)
    more = dataclasses.replace(given, count=given.count + given.period)
    for middle in sorted(range(1, periods - 1), key=lambda m: abs(2 * m - periods)):
        try:
            made = _Unrolled(shallow, given, more, middle)
            return middle, _growth(made, true), _more_work(made, true)
        except Mismatch as mismatch:
            reason = str(mismatch)
    raise Mismatch(reason)


def _grown(a: Allocation, more_bytes: int, device: str) -> Allocation:
    requested = a.requested_bytes + more_bytes
    return dataclasses.replace(a, requested_bytes=requested, size_bytes=rounded(requested, device))


def _growth(made: _Unrolled, true: Trace) -> dict[int, int]:
    """Return the bytes by which allocations outside the blocks grow per period, by shallow index. Raises
    Mismatch if anything else differs."""
    mine = made.trace
    if len(mine.allocations) != len(true.allocations):
        raise Mismatch(f"{len(true.allocations)} allocations where {len(mine.allocations)} were expected")
    if [(o.clock, o.op) for o in mine.ops] != [(o.clock, o.op) for o in true.ops]:
        raise Mismatch("operators come in another order")
    growth = {}
    for origin, one, other in zip(made.origin, mine.allocations, true.allocations, strict=True):
        if (one.start, one.end, one.op) != (other.start, other.end, other.op):
            raise Mismatch(f"{other.op} in {other.module or 'the model'} lives at another time")
        if one.requested_bytes != other.requested_bytes:
            if made.born[origin].block is not None:
                raise Mismatch(f"{other.op} in {other.module} has another size")
            growth[origin] = other.requested_bytes - one.requested_bytes
    return growth


def _more_work(made: _Unrolled, true: Trace) -> dict[int, tuple[_Work, _Work]]:
    """Return, by shallow index, the additional work of the first and of the last copy of an operator."""
    found: dict[int, list[_Work]] = defaultdict(list)
    for origin, one, other in zip(made.op_origin, made.trace.ops, true.ops, strict=True):
        found[origin].append(_Work.between(one, other))
    return {origin: (more[0], more[-1]) for origin, more in found.items() if any(map(any, more))}


def _worked(made: _Unrolled, more: dict[int, tuple[_Work, _Work]]) -> Iterator[OpCall]:
    copies: dict[int, int] = defaultdict(int)
    for origin, op in zip(made.op_origin, made.trace.ops, strict=True):
        if origin not in more:
            yield op
            continue
        first, last = more[origin]
        yield last.added(first.added(op, made.extra - copies[origin]), copies[origin])
        copies[origin] += 1


def _events(trace: Trace, tag: Callable[[str], int | None]) -> list[_Event]:
    events = []
    for i, a in enumerate(trace.allocations):
        block = tag(a.module)
        events.append(_Event(_ALLOCATE, block, i, a.start))
        if a.end is not None:
            events.append(_Event(_FREE, block, i, a.end))
    events += [_Event(_OPERATE, tag(o.module), i, o.clock) for i, o in enumerate(trace.ops)]
    return sorted(events, key=lambda e: e.clock)


def _spanned(events: list[_Event], spans: tuple[PhaseSpan, ...]) -> Iterator[tuple[PhaseSpan, list[_Event]]]:
    first = 0
    for span in spans:
        last = first
        while last < len(events) and events[last].clock < span.end:
            last += 1
        yield span, events[first:last]
        first = last


def canonical(trace: Trace) -> Trace:
    """Return the same trace with new clocks and with consecutive frees of a phase in the order of their
    allocations."""
    starts, ends, clocks = dict[int, int](), dict[int, int](), dict[int, int]()
    tables = {_ALLOCATE: starts, _FREE: ends, _OPERATE: clocks}
    spans, clock = [], 0
    for span, events in _spanned(_events(trace, lambda module: None), trace.spans):
        began = clock
        for event in (e for group in _groups(events) for e in group):
            tables[event.kind][event.index] = clock
            clock += 1
        spans.append(dataclasses.replace(span, start=began, end=clock))
    return dataclasses.replace(
        trace,
        spans=tuple(spans),
        allocations=tuple(
            dataclasses.replace(a, start=starts[i], end=ends.get(i)) for i, a in enumerate(trace.allocations)
        ),
        ops=tuple(dataclasses.replace(o, clock=clocks[i]) for i, o in enumerate(trace.ops)),
    )


class _Unrolled:
    """A shallow trace made deeper. ``origin[i]`` is the shallow allocation that new allocation ``i`` copies,
    and ``op_origin[i]`` is the shallow operator that new operator ``i`` copies."""

    def __init__(self, shallow: Trace, given: Blocks, wanted: Blocks, middle: int) -> None:
        self.shallow, self.given, self.first, self.middle = shallow, given, wanted.first, middle
        self.periods = -(-given.count // given.period)
        self.extra = (wanted.count - given.count) // given.period
        events = _spanned(_events(shallow, given.period_of), shallow.spans)
        self.chapters = [_Chapter(span, self._runs(own, span.phase)) for span, own in events]
        self.born = self._births()
        self.origin: list[int] = []
        self.op_origin: list[int] = []
        self.trace = self._write()

    # -- reading ------------------------------------------------------------------------------------

    def _runs(self, events: list[_Event], phase: Phase) -> _Runs:
        """Group events into runs. A free belongs to the running block, or to none. If a list is freed at
        once, each free belongs to the block of what is freed."""
        positional = phase in (Phase.FORWARD, Phase.BACKWARD)
        runs: _Runs = []
        for group in _groups(events):
            at_work = runs[-1][0] if runs else None
            listed = len({e.block for e in group} - {None}) > 1 and (at_work is None or not positional)
            for event in group:
                block = event.block if event.kind != _FREE or listed else at_work
                if not runs or block != runs[-1][0]:
                    runs.append((block, []))
                runs[-1][1].append(event)
        return _joined(runs)

    def _births(self) -> dict[int, _Place]:
        born = {}
        for c, chapter in enumerate(self.chapters):
            seen: dict[int | None, int] = {}
            for block, events in chapter.runs:
                occurrence = seen[block] = seen.get(block, -1) + 1
                for offset, event in enumerate(events):
                    if event.kind == _ALLOCATE:
                        born[event.index] = _Place(c, block, occurrence, offset)
        return born

    # -- writing ------------------------------------------------------------------------------------

    def _write(self) -> Trace:
        born: list[dict[str, Any]] = []  # what differs from the shallow allocation
        ops: list[OpCall] = []
        spans: list[PhaseSpan] = []
        made: dict[_Place, int] = {}  # new place -> new index
        clock = 0
        for c, chapter in enumerate(self.chapters):
            began = clock
            seen: dict[int | None, int] = {}
            for template, block, events in self._expanded(chapter):
                occurrence = seen[block] = seen.get(block, -1) + 1
                for offset, event in enumerate(events):
                    if event.kind == _ALLOCATE:
                        made[_Place(c, block, occurrence, offset)] = len(born)
                        module = self._renamed(self.shallow.allocations[event.index].module, template, block)
                        born.append({"start": clock, "end": None, "module": module})
                        self.origin.append(event.index)
                    elif event.kind == _FREE:
                        target = made.get(self._like(self.born[event.index], template, block))
                        if target is None or born[target]["end"] is not None:
                            raise Mismatch("a block frees what no other block has")
                        born[target]["end"] = clock
                    else:
                        op = self.shallow.ops[event.index]
                        module = self._renamed(op.module, template, block)
                        ops.append(dataclasses.replace(op, clock=clock, module=module))
                        self.op_origin.append(event.index)
                    clock += 1
            spans.append(dataclasses.replace(chapter.span, start=began, end=clock))
        like = self.shallow.allocations
        allocations = tuple(
            dataclasses.replace(like[i], **new) for i, new in zip(self.origin, born, strict=True)
        )
        return dataclasses.replace(self.shallow, allocations=allocations, ops=tuple(ops), spans=tuple(spans))

    def _expanded(self, chapter: _Chapter) -> Iterator[tuple[int | None, int | None, list[_Event]]]:
        """Yield (block in the shallow trace, block in the deep one, events). Copies of the middle block
        follow the direction in which the chapter visits blocks."""
        order = [b for b, _ in chapter.runs if b is not None]
        place = 0
        for block, events in chapter.runs:
            if block is None:
                yield None, None, events
                continue
            copies = [block]
            if block > self.middle:
                copies = [block + self.extra]
            elif block == self.middle:
                after = order[place + 1] if place + 1 < len(order) else None
                before = order[place - 1] if place else None
                ascending = after == block + 1 or before == block - 1
                copies = list(range(block, block + self.extra + 1))[:: 1 if ascending else -1]
            place += 1
            for copy in copies:
                yield block, copy, events

    def _like(self, place: _Place, template: int | None, block: int | None) -> _Place:
        """Return the allocation that relates to ``block`` as the one made at ``place`` relates to
        ``template``."""
        if place.block is None:
            return place
        far = template is not None and 2 * abs(place.block - template) > self.periods - 1
        if template is None or block is None or far:  # far: from one end to the other
            moved = place.block + (self.extra if place.block > self.middle else 0)
        else:
            moved = place.block + block - template
        return place._replace(block=moved)

    def _renamed(self, module: str, template: int | None, block: int | None) -> str:
        own = self.given.period_of(module)
        if own is None:
            return module
        if template is None or block is None:
            later = self.extra if own > self.middle else 0
        else:
            later = block - template
        return self.given.moved(module, self.first, later)


def _groups(events: list[_Event]) -> Iterator[list[_Event]]:
    """Group consecutive frees, in the order of their allocations, because a cache may be emptied in any
    order."""
    frees: list[_Event] = []
    for event in events:
        if event.kind == _FREE:
            frees.append(event)
            continue
        if frees:
            yield sorted(frees, key=lambda e: e.index)
            frees = []
        yield [event]
    if frees:
        yield sorted(frees, key=lambda e: e.index)


def _joined(runs: _Runs) -> _Runs:
    """Join runs. Events without a block that lie inside a block, or between neighbouring blocks, join the run
    before."""
    joined: _Runs = []
    for i, (own, events) in enumerate(runs):
        between = own is None and 0 < i < len(runs) - 1
        before, after = (runs[i - 1][0], runs[i + 1][0]) if between else (None, None)
        near = before is not None and after is not None and abs(before - after) <= 1
        block = before if near else own
        if joined and joined[-1][0] == block and block is not None:
            joined[-1][1].extend(events)
        else:
            joined.append((block, events))
    return joined
