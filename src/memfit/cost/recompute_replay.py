"""Compute the memory level and the cost of a choice of dropped tensors, from a recording."""

from __future__ import annotations

import bisect
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy

from memfit.cost.memory import levels, with_kept
from memfit.types.machine import Calibration
from memfit.types.recording import Recording
from memfit.types.trace import OpCall, Phase, Trace


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A tensor that backward needs and that may be dropped.

    ``sources``: other candidates that its recomputation reads. ``calls``: the calls that recompute it,
    including those for intermediate tensors that are not kept.
    """

    number: int
    size_bytes: int
    gone: int  # clock from which forward does not need it
    first_need: int
    sources: tuple[int, ...]
    calls: tuple[int, ...]
    between: tuple[int, ...]  # numbers of the intermediate tensors


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A recorded forward pass, ready to evaluate choices.

    ``clock``, ``level``: live bytes of the plain step within the pass, including memory inside kernels.
    """

    recording: Recording
    candidates: tuple[Candidate, ...]
    seconds: Sequence[float]  # of each recorded call
    workspace: Sequence[int]  # bytes inside each recorded call, with its outputs
    clock: numpy.ndarray
    level: numpy.ndarray
    outside_bytes: int  # highest level before and after the pass

    def cost_s(self, dropped: frozenset[int]) -> float:
        """Return the seconds of recomputation. ``dropped``: numbers of the candidates."""
        calls = {c for one in self.candidates if one.number in dropped for c in one.calls}
        return sum(self.seconds[c] for c in calls)

    def closure(self, dropped: frozenset[int]) -> frozenset[int]:
        """Return the dropped tensors together with the intermediate ones."""
        return dropped.union(*(c.between for c in self.candidates if c.number in dropped))

    def levels(self, dropped: frozenset[int]) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Return (clock, live bytes) of the pass without these candidates, including instants of
        recomputation.
        """
        return _Played(self, self.closure(dropped)).levels()

    def peak_bytes(self, dropped: frozenset[int]) -> int:
        return max(self.outside_bytes, int(self.levels(dropped)[1].max()))


def replay(
    recording: Recording, seconds: Callable[[OpCall], float], calibration: Calibration, *, least_bytes: int
) -> Replay:
    """Prepare the replay of a recording. Tensors smaller than ``least_bytes`` are always kept."""
    trace = with_kept(recording.trace, calibration)
    ops = {op.clock: op for op in trace.ops}
    called = [ops.get(c.clock) for c in recording.calls]
    inside = [calibration.op_peak_bytes.get(op.signature, 0) if op else 0 for op in called]
    clock, level = levels(trace)
    extra = [
        (op.clock, int(level[max(0, int(numpy.searchsorted(clock, op.clock, side="right")) - 1)]) + own)
        for op in trace.ops
        if (own := calibration.op_peak_bytes.get(op.signature))
    ]
    points = [*zip(clock.tolist(), level.tolist(), strict=True), *extra]
    points.sort(key=lambda p: p[0])
    end = max(s.end for s in trace.spans if s.phase is Phase.BACKWARD)
    within = [p for p in points if recording.start <= p[0] < end]
    return Replay(
        recording=recording,
        candidates=tuple(_candidates(recording, least_bytes)),
        seconds=[seconds(op) if op else 0.0 for op in called],
        workspace=inside,
        clock=numpy.array([p[0] for p in within], dtype=numpy.int64),
        level=numpy.array([p[1] for p in within], dtype=numpy.int64),
        outside_bytes=max(_outside(trace, points), default=0),
    )


def _outside(trace: Trace, points: list[tuple[int, int]]) -> Iterator[int]:
    """Yield the levels while the model is built and while the optimizer steps.

    Other passes are like the recorded one.
    """
    spans = [s for s in trace.spans if s.phase is Phase.OPTIMIZER or not s.start]
    starts = [s.start for s in spans]
    for at, value in points:
        place = bisect.bisect_right(starts, at) - 1
        if place >= 0 and at < spans[place].end:
            yield value


def _candidates(recording: Recording, least_bytes: int) -> list[Candidate]:
    made = recording.made
    wanted = {
        n
        for n, m in enumerate(made)
        if m.needs and not m.pinned and m.size_bytes >= least_bytes and (m.end is None or m.end > m.needs[0])
    }
    found = []
    for number in sorted(wanted):
        sources, calls, between = set[int](), set[int](), set[int]()
        stack, possible = [number], True
        while stack:
            own = made[stack.pop()].calls
            calls.update(own)
            for read in {r for c in own for r in recording.calls[c].reads}:
                if read in wanted and read != number:
                    sources.add(read)
                elif read != number and read not in between and not made[read].needs:
                    possible = possible and not made[read].pinned
                    between.add(read)
                    stack.append(read)
        if possible:
            m = made[number]
            found.append(
                Candidate(
                    number=number,
                    size_bytes=m.size_bytes,
                    gone=m.last_read,
                    first_need=m.needs[0],
                    sources=tuple(sorted(sources)),
                    calls=tuple(sorted(calls)),
                    between=tuple(sorted(between)),
                )
            )
    return found


class _Played:
    """Computes for one choice which tensors are recomputed when, and until when they are held."""

    def __init__(self, replay: Replay, dropped: frozenset[int]) -> None:
        self.replay, self.dropped = replay, dropped
        self.made, self.calls = replay.recording.made, replay.recording.calls
        # change of bytes by clock, relative to the plain step
        self.changes: defaultdict[int, int] = defaultdict(int)
        # (clock, bytes above the changed level) during recomputation
        self.instants: list[tuple[int, int]] = []
        self.present: set[int] = set()
        # tensors still to be recomputed, by the tensor they read
        self.readers: defaultdict[int, set[int]] = defaultdict(set)
        self.above = 0

    def levels(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        for number in self.dropped:
            for source in self._reads(number):
                self.readers[source].add(number)
            m = self.made[number]
            if m.needs and m.end is not None:
                self.changes[m.last_read] -= m.size_bytes
        events = sorted((t, n) for n in self.dropped for t in self.made[n].needs)
        for at, number in events:
            if number not in self.present:
                self._make(number, at)
        clocks = numpy.array(sorted(self.changes), dtype=numpy.int64)
        sums = numpy.cumsum(numpy.array([self.changes[c] for c in clocks.tolist()], dtype=numpy.int64))
        clock, level = self.replay.clock, self.replay.level
        if not len(clocks):
            return clock, level
        own = numpy.concatenate(([0], sums))
        after = level + own[numpy.searchsorted(clocks, clock, side="right")]
        before = {at: 0 for at, _ in self.instants}
        times = numpy.array(sorted(before), dtype=numpy.int64)
        base = level[numpy.maximum(numpy.searchsorted(clock, times, side="right") - 1, 0)]
        base = base + own[numpy.searchsorted(clocks, times, side="left")]
        ground = dict(zip(times.tolist(), base.tolist(), strict=True))
        tops = [(at, ground[at] + more) for at, more in self.instants]
        return (
            numpy.concatenate((clock, numpy.array([t[0] for t in tops], dtype=numpy.int64))),
            numpy.concatenate((after, numpy.array([t[1] for t in tops], dtype=numpy.int64))),
        )

    def _reads(self, number: int) -> set[int]:
        return {r for c in self.made[number].calls for r in self.calls[c].reads} - {number}

    def _make(self, number: int, at: int) -> None:
        """Recompute the tensor, sources first, as at run time.

        Changes at ``at`` apply after it; instants within the recomputation are recorded.
        """
        self.above = 0
        stack = [number]
        while stack:
            top = stack[-1]
            missing = [r for r in self._reads(top) if r in self.dropped and r not in self.present]
            if top in self.present:
                stack.pop()
            elif missing:
                stack += missing
            else:
                self._made(top, at)

    def _made(self, number: int, at: int) -> None:
        m = self.made[number]
        self.present.add(number)
        workspace = max((self.replay.workspace[c] for c in m.calls), default=0)
        self.above += m.size_bytes
        self.instants.append((at, max(self.above, self.above - m.size_bytes + workspace)))
        self.changes[at] += m.size_bytes
        for source in self._reads(number):
            waiting = self.readers[source]
            waiting.discard(number)
            if not waiting:
                self._let_go(source, at)
        if not m.needs and not self.readers[number]:
            self._free(m.size_bytes, at)

    def _let_go(self, source: int, at: int) -> None:
        """Release a source after its last reader, unless backward still needs it."""
        m = self.made[source]
        if source in self.dropped and not m.needs:
            self._free(m.size_bytes, at)
        elif m.end is not None and m.end <= at:  # held longer than in the plain step
            self.changes[m.end] += m.size_bytes
            self.changes[at] -= m.size_bytes

    def _free(self, size_bytes: int, at: int) -> None:
        self.above -= size_bytes
        self.changes[at] -= size_bytes
