"""Split small traces of three blocks into the parts from which a search adds up the costs of models with any
number of blocks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy

from memfit.cost.memory import levels
from memfit.cost.op_time import COLLECTIVES
from memfit.cost.stream_simulator import collective_size
from memfit.types.errors import UserError
from memfit.types.parts import PartCosts, Parts, Travel, UpdateCosts
from memfit.types.trace import Category, OpCall, Phase, PhaseSpan, Trace

BLOCKS = 3  # the middle one has neighbours like itself on both sides

Seconds = Callable[[Sequence[OpCall]], float]


def parts_of(trace: Trace, path: str, seconds: Seconds) -> Parts:
    """Return the costs, on the traced rank, of what runs before the blocks, of one block (the middle one),
    and of what runs after them.

    ``trace`` is a trace of `BLOCKS` blocks at the module path ``path``, without data parallelism, of one
    micro-batch. ``seconds`` returns the time of operators. The model may run the blocks several times before
    the pass that gradients flow through, as with recycling. Raises UserError if the blocks do not run one
    after the other forward, and in reverse order backward.
    """
    view = _Look(trace, path, seconds)
    forward, backward = view.firsts(Phase.FORWARD), view.firsts(Phase.BACKWARD)
    is_ordered = forward == sorted(forward) and backward == sorted(backward, reverse=True)
    if len(forward) != BLOCKS or len(backward) != BLOCKS or not is_ordered:
        raise UserError(
            f"the blocks {path!r} do not run one after the other forward, and in reverse order backward",
            allowed="a chain of blocks",
        )
    forward_span, backward_span = view.span(Phase.FORWARD), view.span(Phase.BACKWARD)
    forward_end, backward_end = view.end(Phase.FORWARD, BLOCKS - 1), view.end(Phase.BACKWARD, 0)
    modules = [f"{path}.{i}" for i in range(BLOCKS)]
    return Parts(
        before=view.piece((forward_span.start, forward[0]), (backward_end, backward_span.end), None),
        block=view.piece((forward[1], forward[2]), (backward[1], backward[0]), modules[1]),
        after=view.piece((forward_end, forward_span.end), (backward_span.start, backward[-1]), None),
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
        """Return (number of the block as text, its operators) for each time that a block runs in ``phase``,
        in order.
        """
        span, prefix = self.span(phase), f"{self.path}."
        block_ops = (o for o in self.ops if span.start <= o.clock < span.end and o.module.startswith(prefix))
        groups = itertools.groupby(block_ops, lambda o: o.module.removeprefix(prefix).partition(".")[0])
        return [(number, list(ops)) for number, ops in groups]

    def _of_block(self, phase: Phase, index: int) -> list[OpCall]:
        """Return the operators of the last run of block ``index`` in ``phase``; empty if it does not run."""
        return next((ops for number, ops in reversed(self._runs(phase)) if number == str(index)), [])

    def passes(self) -> int:
        """Return how many times the model runs forward through the blocks in a step (block 1 is counted)."""
        return sum(number == "1" for number, _ in self._runs(Phase.FORWARD))

    def firsts(self, phase: Phase) -> list[int]:
        runs = [self._of_block(phase, i) for i in range(BLOCKS)]
        return [ops[0].clock for ops in runs if ops]

    def end(self, phase: Phase, index: int) -> int:
        """Return the clock of the first operator after the block's last one, or the end of the phase."""
        last, span = self._of_block(phase, index)[-1].clock, self.span(phase)
        return next((o.clock for o in self.ops if last < o.clock < span.end), span.end)

    def level(self, clock: int) -> int:
        """Return the live bytes just before ``clock``."""
        index = int(numpy.searchsorted(self.clock, clock)) - 1
        return int(self.live[index]) if index >= 0 else 0

    def top(self, window: tuple[int, int]) -> int:
        """Return by how many bytes the highest live bytes in the window (start clock, end clock) lie above
        those at its start; at least 0.
        """
        begin, end = numpy.searchsorted(self.clock, window)
        base_bytes = self.level(window[0])
        return max(0, int(self.live[begin:end].max(initial=base_bytes)) - base_bytes)

    def within(self, window: tuple[int, int]) -> list[OpCall]:
        begin, end = numpy.searchsorted(self.clocks, window)
        return self.ops[begin:end]

    def piece(self, forward: tuple[int, int], backward: tuple[int, int], module: str | None) -> PartCosts:
        """Return the costs of one piece of the model, from what lies within these clock ranges.

        ``module`` None: the piece lies before or after the blocks, and of the forward only work outside the
        blocks counts; else it is a block. Forward passes without gradients (recycling) count towards the time
        of the blocks, and towards the memory of what runs before them.
        """
        kept_bytes = self.level(forward[1]) - self.level(forward[0])
        step_gradients = (
            a for a in self.trace.allocations if a.category is Category.GRADIENT and a.step == self.last
        )
        gradients = sum(a.size_bytes for a in step_gradients if backward[0] <= a.start < backward[1])
        forward_ops, backward_ops = self.within(forward), self.within(backward)
        if module is None:
            forward_ops = [o for o in forward_ops if not o.module.startswith(f"{self.path}.")]
        pass_count = 1 if module is None else self.passes()
        return PartCosts(
            forward_s=self.seconds(forward_ops) * pass_count,
            backward_s=self.seconds(backward_ops),
            kept_bytes=kept_bytes,
            forward_top_bytes=self.top(forward),
            backward_top_bytes=self.top(backward),
            parameter_bytes=gradients,
            flops=sum(o.flops for o in (*(forward_ops * pass_count), *backward_ops)),
            forward_travel=_travel(forward_ops) * pass_count,
            backward_travel=_travel(backward_ops),
        )


def _travel(ops: Sequence[OpCall]) -> Travel:
    transfers = [collective_size(op) for op in ops if op.op.startswith(COLLECTIVES)]
    return tuple((kind, float(size)) for kind, size in transfers if kind)


def updating_of(trace: Trace, seconds: Seconds) -> UpdateCosts:
    """Return the costs of the optimizer's step per trainable element of the parameters.

    ``trace`` covers two steps on one rank; its second optimizer phase is divided by the number of elements.
    ``seconds`` returns the time of operators.
    """
    view = _Look(trace, "", seconds)
    span = view.span(Phase.OPTIMIZER)
    window = (span.start, span.end)
    state_bytes = sum(
        a.size_bytes for a in trace.allocations if a.category is Category.OPTIMIZER_STATE and a.end is None
    )
    elements = trace.trainable_count
    return UpdateCosts(
        update_s=seconds(view.within(window)) / elements,
        moved_bytes=sum(o.moved_bytes for o in view.within(window)) / elements,
        state_bytes=state_bytes / elements,
        top_bytes=view.top(window) / elements,
    )
