"""Whole sequences of allocations and frees: the trace's, and where it first parts from an allocator's log."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from memfit.cost.memory import with_kept
from memfit.runtime.counting_allocator import CountingAllocator
from memfit.runtime.op_benchmark import prepare_call
from memfit.types.machine import Calibration
from memfit.types.trace import Allocation, Phase, Trace

Event = tuple[int, str]  # (bytes, negative for a free; who)


class Difference(NamedTuple):
    """The first place at which two sequences part."""

    index: int
    predicted: Event | None
    measured: int | None

    def __str__(self) -> str:
        size, who = self.predicted or (0, "nothing")
        return f"event {self.index}: predicted {size} ({who}), measured {self.measured}"


def tidied(sequence: Iterable[Event]) -> list[Event]:
    """Frees between two allocations in order of size: hash tables, such as autocast's cache, free in none."""
    runs = itertools.groupby(sequence, key=lambda e: e[0] < 0)
    return [e for freed, run in runs for e in (sorted(run) if freed else run)]


def first_difference(
    predicted: Sequence[Event], measured: Sequence[int], *, above: int = 0, strictly: bool = True
) -> Difference | None:
    """None where the sequences of blocks larger than ``above`` bytes are equal; not ``strictly``: frees
    between two allocations in any order."""
    ours = [e for e in predicted if abs(e[0]) > above]
    theirs = [(d, "") for d in measured if abs(d) > above]
    if not strictly:
        ours, theirs = tidied(ours), tidied(theirs)
    for index, (one, other) in enumerate(itertools.zip_longest(ours, theirs)):
        if one is None or other is None or one[0] != other[0]:
            return Difference(index, one, other and other[0])
    return None


_MOST_SCRATCH, _MOST_WAYS = 6, 5000


def equal_but_for_scratch(predicted: Sequence[Event], measured: Sequence[int], *, above: int = 0) -> bool:
    """Whether the sequences are equal once memory that lives inside one operator is left out of the measured
    one: blocks taken and given back while nothing but that operator's own results is made. No kernel is run
    to know them. Every way of telling scratch from results is followed."""
    ours = [e for e in predicted if abs(e[0]) > above]
    ways: set[tuple[int, tuple[int, ...], str]] = {(0, (), "")}  # (matched, open scratch, by which operator)
    for delta in measured:
        if abs(delta) <= above:
            continue
        found = set()
        for at, scratch, who in ways:
            size, op = ours[at] if at < len(ours) else (0, "")
            if size == delta and (not scratch or (delta > 0 and who in ("", op))):
                found.add((at + 1, scratch, op if scratch else ""))
            if delta > 0 and len(scratch) < _MOST_SCRATCH:
                found.add((at, tuple(sorted((*scratch, delta))), who))
            if -delta in scratch:
                rest = list(scratch)
                rest.remove(-delta)
                found.add((at, tuple(rest), who if rest else ""))
        ways = found
        if not ways or len(ways) > _MOST_WAYS:
            return False
    return any(at == len(ours) and not scratch for at, scratch, _ in ways)


def predicted_sequence(trace: Trace, calibration: Calibration | None) -> list[Event]:
    """The last step's events in order. With a calibration, operators that take scratch memory inside
    themselves are run alone once, and what they do stands where they are called."""
    if calibration is not None:
        trace = with_kept(trace, calibration)
    spans = [s for s in trace.spans if s.step == trace.steps - 1 and s.phase is not Phase.SETUP]
    begin, end = spans[0].start, spans[-1].end
    events: dict[int, list[Event]] = {}
    for a in trace.allocations:
        events.setdefault(a.start, []).append((a.size_bytes, a.op))
        if a.end is not None:
            events.setdefault(a.end, []).append((-a.size_bytes, a.op))
    if calibration is not None:
        _put_inside(trace, begin, events)
    return [e for clock in sorted(events) if begin <= clock < end for e in events[clock]]


def _put_inside(trace: Trace, begin: int, events: dict[int, list[Event]]) -> None:
    """Replace each operator's births by all that it does when it runs alone, where the births agree."""
    ops = [op for op in trace.ops if op.clock >= begin]
    births: dict[int, list[Allocation]] = {}
    clocks = [op.clock for op in ops]
    at = 0
    for a in sorted(trace.allocations, key=lambda a: a.start):
        while at + 1 < len(clocks) and clocks[at + 1] <= a.start:
            at += 1
        if clocks and a.start >= clocks[at] and a.op == ops[at].op:
            births.setdefault(at, []).append(a)
    for index, op in enumerate(ops):
        inside = alone(op.signature)
        mine = births.get(index, [])
        if inside is None or not _same(inside, mine):
            continue
        for a in mine:
            events[a.start].remove((a.size_bytes, a.op))
        events.setdefault(op.clock, []).extend((size, op.op) for size in inside)


def _same(inside: Sequence[int], births: Sequence[Allocation]) -> bool:
    """Whether what stays after the call is what the trace saw being made, an opaque workspace aside."""
    stays: Counter[int] = Counter()
    for delta in inside:
        stays[abs(delta)] += 1 if delta > 0 else -1
    made = Counter(a.size_bytes for a in births if a.size_bytes)
    return +(stays - made) == Counter() and +(made - stays) == Counter()


@functools.cache
def alone(signature: str) -> tuple[int, ...] | None:
    """What an operator allocates and frees while it runs, its outputs still held; None if it cannot."""
    counter = CountingAllocator()
    try:
        call, args, kwargs = prepare_call(signature)
        counter.start_log()
        try:
            out = call(*args, **kwargs)
        finally:
            log = counter.stop_log()
        del out
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError):
        return None
    return log.deltas_bytes
