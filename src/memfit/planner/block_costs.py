"""From small traces to the parts that a search adds up: three blocks stand for any number of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy

from memfit.cost.memory import levels
from memfit.cost.op_time import COLLECTIVES
from memfit.cost.stream_simulator import sent
from memfit.types.errors import UserError
from memfit.types.parts import Parts, Piece, Travel, Updating
from memfit.types.trace import Category, OpCall, Phase, PhaseSpan, Trace

BLOCKS = 3  # the middle one has neighbours like itself on both sides

Seconds = Callable[[Sequence[OpCall]], float]


def parts_of(trace: Trace, path: str, seconds: Seconds) -> Parts:
    """Of a trace of `BLOCKS` blocks at ``path``, without data parallelism, played for one micro-batch. A
    model may pass through them several times before the pass that it learns from, as recycling does.
    Raises UserError where the blocks do not run one after the other."""
    look = _Look(trace, path, seconds)
    forward, backward = look.firsts(Phase.FORWARD), look.firsts(Phase.BACKWARD)
    ordered = forward == sorted(forward) and backward == sorted(backward, reverse=True)
    if len(forward) != BLOCKS or len(backward) != BLOCKS or not ordered:
        raise UserError(f"the blocks {path!r} do not run one after the other", allowed="a chain of blocks")
    ahead, back = look.span(Phase.FORWARD), look.span(Phase.BACKWARD)
    out, home = look.end(Phase.FORWARD, BLOCKS - 1), look.end(Phase.BACKWARD, 0)
    inside = [f"{path}.{i}" for i in range(BLOCKS)]
    return Parts(
        before=look.piece((ahead.start, forward[0]), (home, back.end), None),
        block=look.piece((forward[1], forward[2]), (backward[1], backward[0]), inside[1]),
        after=look.piece((out, ahead.end), (back.start, backward[-1]), None),
    )


@dataclasses.dataclass
class _Look:
    trace: Trace
    path: str
    seconds: Seconds

    def __post_init__(self) -> None:
        self.last = self.trace.steps - 1
        self.ops = [o for o in self.trace.ops if o.step == self.last]
        self.clocks = numpy.array([o.clock for o in self.ops])
        self.clock, self.live = levels(self.trace)

    def span(self, phase: Phase) -> PhaseSpan:
        return [s for s in self.trace.spans if s.phase is phase and s.step == self.last][-1]

    def _runs(self, phase: Phase) -> list[tuple[str, list[OpCall]]]:
        """What blocks do, (number, operators) of each time that one runs."""
        span, prefix = self.span(phase), f"{self.path}."
        within = (o for o in self.ops if span.start <= o.clock < span.end and o.module.startswith(prefix))
        grouped = itertools.groupby(within, lambda o: o.module.removeprefix(prefix).partition(".")[0])
        return [(number, list(ops)) for number, ops in grouped]

    def _of_block(self, phase: Phase, index: int) -> list[OpCall]:
        """The last time it runs."""
        return next((ops for number, ops in reversed(self._runs(phase)) if number == str(index)), [])

    def passes(self) -> int:
        """Times that the model goes forward through a block."""
        return sum(number == "1" for number, _ in self._runs(Phase.FORWARD))

    def firsts(self, phase: Phase) -> list[int]:
        found = [self._of_block(phase, i) for i in range(BLOCKS)]
        return [ops[0].clock for ops in found if ops]

    def end(self, phase: Phase, index: int) -> int:
        """Just before the first operator after the block's last."""
        last, span = self._of_block(phase, index)[-1].clock, self.span(phase)
        return next((o.clock for o in self.ops if last < o.clock < span.end), span.end)

    def level(self, clock: int) -> int:
        at = int(numpy.searchsorted(self.clock, clock)) - 1
        return int(self.live[at]) if at >= 0 else 0

    def top(self, window: tuple[int, int]) -> int:
        """Above the level at the window's start."""
        first, end = numpy.searchsorted(self.clock, window)
        before = self.level(window[0])
        return max(0, int(self.live[first:end].max(initial=before)) - before)

    def within(self, window: tuple[int, int]) -> list[OpCall]:
        first, end = numpy.searchsorted(self.clocks, window)
        return self.ops[first:end]

    def piece(self, forward: tuple[int, int], backward: tuple[int, int], module: str | None) -> Piece:
        """``module`` None: what is in no block and works in these windows. Passes that nothing is learned
        from take time in the blocks and memory before them."""
        kept = self.level(forward[1]) - self.level(forward[0])
        made = (a for a in self.trace.allocations if a.category is Category.GRADIENT and a.step == self.last)
        gradients = sum(a.size_bytes for a in made if backward[0] <= a.start < backward[1])
        ahead, back = self.within(forward), self.within(backward)
        if module is None:
            ahead = [o for o in ahead if not o.module.startswith(f"{self.path}.")]
        times = 1 if module is None else self.passes()
        return Piece(
            forward_s=self.seconds(ahead) * times,
            backward_s=self.seconds(back),
            kept_bytes=kept,
            forward_top_bytes=self.top(forward),
            backward_top_bytes=self.top(backward),
            parameter_bytes=gradients,
            flops=sum(o.flops for o in (*(ahead * times), *back)),
            forward_travel=_travel(ahead) * times,
            backward_travel=_travel(back),
        )


def _travel(ops: Sequence[OpCall]) -> Travel:
    found = [sent(op) for op in ops if op.op.startswith(COLLECTIVES)]
    return tuple((kind, float(size)) for kind, size in found if kind)


def updating_of(trace: Trace, seconds: Seconds) -> Updating:
    """Of a trace of two steps on one rank: the second optimizer phase, shared out over the parameters."""
    look = _Look(trace, "", seconds)
    span = look.span(Phase.OPTIMIZER)
    window = (span.start, span.end)
    state = sum(
        a.size_bytes for a in trace.allocations if a.category is Category.OPTIMIZER_STATE and a.end is None
    )
    elements = trace.trainable_count
    return Updating(
        update_s=seconds(look.within(window)) / elements,
        moved_bytes=sum(o.moved_bytes for o in look.within(window)) / elements,
        state_bytes=state / elements,
        top_bytes=look.top(window) / elements,
    )
