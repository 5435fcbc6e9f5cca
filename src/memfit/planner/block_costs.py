"""Split small traces into the parts that a search adds up: three traced blocks represent any number."""

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
    """Return the costs of what runs before the blocks, of one block, and of what runs after them.

    ``trace`` is a trace of `BLOCKS` blocks at the module path ``path``, without data parallelism, of one
    micro-batch. The model may run the blocks several times before the pass that gradients flow through, as
    with recycling. Raises UserError if the blocks do not run one after the other.
    """
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
    """Access to the last step of a trace by block and phase."""

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
        """Return (block number, operators) for each time that a block runs in ``phase``, in order."""
        span, prefix = self.span(phase), f"{self.path}."
        within = (o for o in self.ops if span.start <= o.clock < span.end and o.module.startswith(prefix))
        grouped = itertools.groupby(within, lambda o: o.module.removeprefix(prefix).partition(".")[0])
        return [(number, list(ops)) for number, ops in grouped]

    def _of_block(self, phase: Phase, index: int) -> list[OpCall]:
        """Return the operators of the last run of block ``index`` in ``phase``."""
        return next((ops for number, ops in reversed(self._runs(phase)) if number == str(index)), [])

    def passes(self) -> int:
        """Return how many times the model runs forward through a block."""
        return sum(number == "1" for number, _ in self._runs(Phase.FORWARD))

    def firsts(self, phase: Phase) -> list[int]:
        found = [self._of_block(phase, i) for i in range(BLOCKS)]
        return [ops[0].clock for ops in found if ops]

    def end(self, phase: Phase, index: int) -> int:
        """Return the clock of the first operator after the block's last one, or the end of the phase."""
        last, span = self._of_block(phase, index)[-1].clock, self.span(phase)
        return next((o.clock for o in self.ops if last < o.clock < span.end), span.end)

    def level(self, clock: int) -> int:
        """Return the live bytes just before ``clock``."""
        at = int(numpy.searchsorted(self.clock, clock)) - 1
        return int(self.live[at]) if at >= 0 else 0

    def top(self, window: tuple[int, int]) -> int:
        """Return the highest live bytes in the window, above the level at its start."""
        first, end = numpy.searchsorted(self.clock, window)
        before = self.level(window[0])
        return max(0, int(self.live[first:end].max(initial=before)) - before)

    def within(self, window: tuple[int, int]) -> list[OpCall]:
        first, end = numpy.searchsorted(self.clocks, window)
        return self.ops[first:end]

    def piece(self, forward: tuple[int, int], backward: tuple[int, int], module: str | None) -> Piece:
        """Return the costs of one piece within these windows.

        With ``module`` None, only work outside the blocks counts. Forward passes without gradients
        (recycling) count towards the time of the blocks, and towards the memory of what runs before them.
        """
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
    """Return the costs of the optimizer step per trainable parameter.

    ``trace`` covers two steps on one rank. The second optimizer phase is divided by the number of parameters.
    """
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
