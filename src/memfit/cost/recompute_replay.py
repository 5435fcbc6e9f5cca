"""Compute the memory level and the seconds of recomputation of a choice of dropped tensors, from a recording
of a forward pass.
"""

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
    """A tensor that backward needs and that may be dropped after forward and recomputed.

    ``number``: its index in ``Recording.storages``. ``gone``: clock from which forward does not need it.
    ``first_need``: clock at which backward first needs it. ``sources``: numbers of the tensors that its
    recomputation reads and that backward needs, too; some may be no candidates. ``calls``: indices in
    ``Recording.calls`` of the calls that recompute it. They include those for intermediate tensors, which
    are not kept; ``between`` has the numbers of these.
    """

    number: int
    size_bytes: int
    gone: int
    first_need: int
    sources: tuple[int, ...]
    calls: tuple[int, ...]
    between: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A recorded forward pass, with which choices of tensors to drop are evaluated: the peak of the step, and
    the seconds of recomputation.

    ``clock`` and ``level``: clocks, and the live bytes at them without dropping, from the start of the
    forward pass to the end of backward, including memory inside kernels. ``outside_bytes``: the highest level
    while the model is built and while the optimizer steps.
    """

    recording: Recording
    candidates: tuple[Candidate, ...]
    seconds: Sequence[float]  # of each recorded call
    workspace: Sequence[int]  # bytes inside each recorded call, with its outputs
    clock: numpy.ndarray
    level: numpy.ndarray
    outside_bytes: int

    def cost_s(self, dropped: frozenset[int]) -> float:
        """Return the seconds that recomputing the tensors ``dropped`` takes; a call that several of them
        share counts once. ``dropped``: numbers of candidates.
        """
        calls = {c for candidate in self.candidates if candidate.number in dropped for c in candidate.calls}
        return sum(self.seconds[c] for c in calls)

    def closure(self, dropped: frozenset[int]) -> frozenset[int]:
        """Return the numbers of the dropped tensors and of the intermediate ones that their recomputation
        makes.
        """
        return dropped.union(*(c.between for c in self.candidates if c.number in dropped))

    def levels(self, dropped: frozenset[int]) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Return two arrays, clocks and the live bytes at them, from the start of the forward pass to the end
        of backward, if the candidates with the numbers ``dropped`` are dropped. The levels within
        recomputations follow at the end, so the clocks are not sorted.
        """
        return _RecomputeSchedule(self, self.closure(dropped)).levels()

    def peak_bytes(self, dropped: frozenset[int]) -> int:
        return max(self.outside_bytes, int(self.levels(dropped)[1].max()))


def replay(
    recording: Recording, seconds: Callable[[OpCall], float], calibration: Calibration, *, least_bytes: int
) -> Replay:
    """Return the replay of a recorded step.

    ``seconds``: returns the seconds of an operator call. ``calibration``: the kernel workspaces that were
    probed count towards the memory. Tensors smaller than ``least_bytes`` are never candidates for dropping.
    """
    trace = with_kept(recording.trace, calibration)
    ops = {op.clock: op for op in trace.ops}
    recorded_ops = [ops.get(c.clock) for c in recording.calls]
    op_peaks = [calibration.op_peak_bytes.get(op.signature, 0) if op else 0 for op in recorded_ops]
    clock, level = levels(trace)
    op_points = [
        (op.clock, int(level[max(0, int(numpy.searchsorted(clock, op.clock, side="right")) - 1)]) + op_peak)
        for op in trace.ops
        if (op_peak := calibration.op_peak_bytes.get(op.signature))
    ]
    points = [*zip(clock.tolist(), level.tolist(), strict=True), *op_points]
    points.sort(key=lambda p: p[0])
    end = max(s.end for s in trace.spans if s.phase is Phase.BACKWARD)
    pass_points = [p for p in points if recording.start <= p[0] < end]
    return Replay(
        recording=recording,
        candidates=tuple(_candidates(recording, least_bytes)),
        seconds=[seconds(op) if op else 0.0 for op in recorded_ops],
        workspace=op_peaks,
        clock=numpy.array([p[0] for p in pass_points], dtype=numpy.int64),
        level=numpy.array([p[1] for p in pass_points], dtype=numpy.int64),
        outside_bytes=max(_outside(trace, points), default=0),
    )


def _outside(trace: Trace, points: list[tuple[int, int]]) -> Iterator[int]:
    """Yield the live bytes of those ``points``, sorted (clock, live bytes), that lie in the building of the
    model or in an optimizer step.

    Forward and backward passes other than the recorded one are like it, so they are not among these.
    """
    spans = [s for s in trace.spans if s.phase is Phase.OPTIMIZER or not s.start]
    starts = [s.start for s in spans]
    for clock, value in points:
        index = bisect.bisect_right(starts, clock) - 1
        if index >= 0 and clock < spans[index].end:
            yield value


def _candidates(recording: Recording, least_bytes: int) -> list[Candidate]:
    tensors = recording.storages
    droppable = {
        n
        for n, tensor in enumerate(tensors)
        if tensor.needs
        and not tensor.pinned
        and tensor.size_bytes >= least_bytes
        and (tensor.end is None or tensor.end > tensor.needs[0])
    }
    candidates = []
    for number in sorted(droppable):
        sources, calls, intermediates = set[int](), set[int](), set[int]()
        stack, possible = [number], True
        while stack:
            tensor_calls = tensors[stack.pop()].calls
            calls.update(tensor_calls)
            for source in {r for c in tensor_calls for r in recording.calls[c].reads}:
                if source in droppable and source != number:
                    sources.add(source)
                elif source != number and source not in intermediates and not tensors[source].needs:
                    possible = possible and not tensors[source].pinned
                    intermediates.add(source)
                    stack.append(source)
        if possible:
            tensor = tensors[number]
            candidates.append(
                Candidate(
                    number=number,
                    size_bytes=tensor.size_bytes,
                    gone=tensor.last_read,
                    first_need=tensor.needs[0],
                    sources=tuple(sorted(sources)),
                    calls=tuple(sorted(calls)),
                    between=tuple(sorted(intermediates)),
                )
            )
    return candidates


class _RecomputeSchedule:
    """Simulates the recomputation of one choice of dropped tensors in backward: when each tensor is
    recomputed, and until when it is held. `levels` returns the memory that results. ``dropped`` includes the
    intermediate tensors (`Replay.closure`).
    """

    def __init__(self, replay: Replay, dropped: frozenset[int]) -> None:
        self.replay, self.dropped = replay, dropped
        self.storages, self.calls = replay.recording.storages, replay.recording.calls
        # change of bytes by clock, relative to the plain step
        self.changes: defaultdict[int, int] = defaultdict(int)
        # (clock, bytes above the changed level) during recomputation
        self.instants: list[tuple[int, int]] = []
        self.recomputed: set[int] = set()
        # tensors still to be recomputed, by the tensor they read
        self.readers: defaultdict[int, set[int]] = defaultdict(set)
        self.above = 0

    def levels(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        for number in self.dropped:
            for source in self._reads(number):
                self.readers[source].add(number)
            tensor = self.storages[number]
            if tensor.needs and tensor.end is not None:
                self.changes[tensor.last_read] -= tensor.size_bytes
        events = sorted((t, n) for n in self.dropped for t in self.storages[n].needs)
        for instant, number in events:
            if number not in self.recomputed:
                self._recompute(number, instant)
        clocks = numpy.array(sorted(self.changes), dtype=numpy.int64)
        sums = numpy.cumsum(numpy.array([self.changes[c] for c in clocks.tolist()], dtype=numpy.int64))
        clock, level = self.replay.clock, self.replay.level
        if not len(clocks):
            return clock, level
        shifts = numpy.concatenate(([0], sums))
        shifted_level = level + shifts[numpy.searchsorted(clocks, clock, side="right")]
        distinct_instants = {instant: 0 for instant, _ in self.instants}
        instant_clocks = numpy.array(sorted(distinct_instants), dtype=numpy.int64)
        base_level = level[numpy.maximum(numpy.searchsorted(clock, instant_clocks, side="right") - 1, 0)]
        base_level = base_level + shifts[numpy.searchsorted(clocks, instant_clocks, side="left")]
        base_by_clock = dict(zip(instant_clocks.tolist(), base_level.tolist(), strict=True))
        peaks = [(instant, base_by_clock[instant] + extra_bytes) for instant, extra_bytes in self.instants]
        return (
            numpy.concatenate((clock, numpy.array([t[0] for t in peaks], dtype=numpy.int64))),
            numpy.concatenate((shifted_level, numpy.array([t[1] for t in peaks], dtype=numpy.int64))),
        )

    def _reads(self, number: int) -> set[int]:
        return {r for c in self.storages[number].calls for r in self.calls[c].reads} - {number}

    def _recompute(self, number: int, clock: int) -> None:
        """Recompute the tensor ``number`` at ``clock``, as at run time: first the dropped tensors that it is
        made from and that are not recomputed yet.

        What this changes in the live bytes holds after ``clock``; the levels within the recomputation are
        added to ``instants``.
        """
        self.above = 0
        stack = [number]
        while stack:
            current = stack[-1]
            missing = [r for r in self._reads(current) if r in self.dropped and r not in self.recomputed]
            if current in self.recomputed:
                stack.pop()
            elif missing:
                stack += missing
            else:
                self._add_recomputed(current, clock)

    def _add_recomputed(self, number: int, clock: int) -> None:
        tensor = self.storages[number]
        self.recomputed.add(number)
        workspace = max((self.replay.workspace[c] for c in tensor.calls), default=0)
        self.above += tensor.size_bytes
        self.instants.append((clock, max(self.above, self.above - tensor.size_bytes + workspace)))
        self.changes[clock] += tensor.size_bytes
        for source in self._reads(number):
            remaining_readers = self.readers[source]
            remaining_readers.discard(number)
            if not remaining_readers:
                self._release(source, clock)
        if not tensor.needs and not self.readers[number]:
            self._free(tensor.size_bytes, clock)

    def _release(self, source: int, clock: int) -> None:
        """Account for the tensor ``source`` after the last recomputation that reads it, at ``clock``. A
        recomputed intermediate tensor is freed. A tensor that the plain step frees earlier is held until
        ``clock``. Nothing changes for any other.
        """
        tensor = self.storages[source]
        if source in self.dropped and not tensor.needs:
            self._free(tensor.size_bytes, clock)
        elif tensor.end is not None and tensor.end <= clock:  # held longer than in the plain step
            self.changes[tensor.end] += tensor.size_bytes
            self.changes[clock] -= tensor.size_bytes

    def _free(self, size_bytes: int, clock: int) -> None:
        self.above -= size_bytes
        self.changes[clock] -= size_bytes
