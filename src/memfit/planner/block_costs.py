"""Split small traces of three blocks into the parts from which a search adds up the costs of models with any
number of blocks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy

from memfit.cost.memory import levels
from memfit.cost.op_time import COLLECTIVES
from memfit.cost.stream_simulator import collective_size
from memfit.model.blocks import child_prefix
from memfit.types.errors import UserError
from memfit.types.parts import NUMBERS, PartCosts, Parts, Travel, UpdateCosts
from memfit.types.trace import Category, OpCall, Phase, PhaseSpan, Trace

_TOPS = ("forward_top_bytes", "backward_top_bytes")
_TRAVELS = ("forward_travel", "backward_travel")
BLOCKS = 3  # the middle one has neighbours like itself on both sides

Seconds = Callable[[Sequence[OpCall]], float]


def parts_of(trace: Trace, chains: Mapping[str, int], seconds: Seconds) -> Parts:
    """Return the costs of three pieces of the model on one rank, seen in the last step of ``trace``: of what
    runs before the blocks ("before"), of the middle one of the three blocks ("block"), and of what runs after
    the blocks ("after"). They are seconds, bytes, FLOPs and collectives (`PartCosts`).

    ``trace``: of one rank and one micro-batch, of a model cut to `BLOCKS` (3) blocks, without data
    parallelism. ``chains``: the module path of the blocks, such as "layers" -> the number of blocks of the
    whole model there. With several chains, such as an encoder and a decoder, "block" is the mean over the
    blocks of all, and "before" has what runs between them, too. ``seconds`` returns the total time of a
    sequence of operators.

    The model may run the blocks several times (recycling); the last run of each counts. Raises UserError
    unless the three blocks of each chain all run, one after the other in forward and in reverse order in
    backward, and so do the chains.
    """
    views = {path: _StepView(trace, path, seconds) for path in chains}
    for path, view in views.items():
        forward, backward = view.first_clocks(Phase.FORWARD), view.first_clocks(Phase.BACKWARD)
        is_ordered = forward == sorted(forward) and backward == sorted(backward, reverse=True)
        if len(forward) != BLOCKS or len(backward) != BLOCKS or not is_ordered:
            raise UserError(
                "a search of plans for several devices needs a chain of blocks, but those at "
                f"{path!r} do not all run, one after the other in forward and in reverse order in backward",
                allowed="a chain of blocks, of which each works on the output of the one before it, such as "
                "Job(blocks=...) names it; or --on a machine with one device",
            )
    paths = sorted(views, key=lambda path: views[path].first_clocks(Phase.FORWARD)[0])
    first, last = views[paths[0]], views[paths[-1]]
    forward_span, backward_span = first.span(Phase.FORWARD), first.span(Phase.BACKWARD)
    before = first.piece(
        (forward_span.start, first.first_clocks(Phase.FORWARD)[0]),
        (first.end(Phase.BACKWARD, 0), backward_span.end),
        None,
    )
    after = last.piece(
        (last.end(Phase.FORWARD, BLOCKS - 1), forward_span.end),
        (backward_span.start, last.first_clocks(Phase.BACKWARD)[-1]),
        None,
    )
    between = [_between(views[a], views[b]) for a, b in itertools.pairwise(paths)]
    blocks = [_middle(views[path]) for path in paths]
    weights = [chains[path] / sum(chains.values()) for path in paths]
    return Parts(before=_sum([before, *between]), block=_mean(blocks, weights), after=after)


def _middle(view: _StepView) -> PartCosts:
    """Return the costs of the middle one of the three blocks of a chain."""
    forward, backward = view.first_clocks(Phase.FORWARD), view.first_clocks(Phase.BACKWARD)
    module = f"{child_prefix(view.path)}1"
    return view.piece((forward[1], forward[2]), (backward[1], backward[0]), module)


def _between(chain: _StepView, following: _StepView) -> PartCosts:
    """Return the costs of what runs between two chains of blocks, such as an encoder and a decoder, each
    given by its view of the step. Raises UserError if ``following`` does not begin after the end of ``chain``
    in forward, or ``chain`` not after the end of ``following`` in backward."""
    forward = chain.end(Phase.FORWARD, BLOCKS - 1), following.first_clocks(Phase.FORWARD)[0]
    backward = following.end(Phase.BACKWARD, 0), chain.first_clocks(Phase.BACKWARD)[-1]
    if forward[0] > forward[1] or backward[0] > backward[1]:
        raise UserError(
            "a search of plans for several devices needs chains of blocks that run one after the other, but "
            f"those at {chain.path!r} and {following.path!r} do not",
            allowed="chains of blocks, of which each works on the output of the one before it, such as "
            "Job(blocks=..., more_blocks=...) names them; or --on a machine with one device",
        )
    return chain.piece(forward, backward, None)


def _sum(pieces: Sequence[PartCosts]) -> PartCosts:
    """Return the costs of pieces that run one after the other as those of one piece: the sums, of the memory
    peaks (``forward_top_bytes``, ``backward_top_bytes``) the highest, and the collectives of all."""
    total = pieces[0]
    for piece in pieces[1:]:
        values = {name: getattr(total, name) + getattr(piece, name) for name in (*NUMBERS, *_TRAVELS)}
        values |= {name: max(getattr(total, name), getattr(piece, name)) for name in _TOPS}
        total = PartCosts(**values)
    return total


def _mean(pieces: Sequence[PartCosts], weights: Sequence[float]) -> PartCosts:
    """Return the mean of the pieces' costs with these weights, whose sum is 1. Of the memory peaks
    (``forward_top_bytes``, ``backward_top_bytes``), it has the highest instead of the mean. It has the
    collectives of all pieces, each with its bytes times the weight."""
    if len(pieces) == 1:
        return pieces[0]
    weighted = list(zip(pieces, weights, strict=True))
    values: dict[str, Any] = {name: sum(getattr(p, name) * w for p, w in weighted) for name in NUMBERS}
    values |= {name: max(getattr(p, name) for p in pieces) for name in _TOPS}
    for name in _TRAVELS:
        values[name] = tuple((kind, size * w) for p, w in weighted for kind, size in getattr(p, name))
    return PartCosts(**values)


@dataclasses.dataclass
class _StepView:
    """Access to the last step of ``trace``: its operators, its live bytes, and the runs of the blocks in the
    module at ``path``, such as "layers". ``seconds`` returns the total time of a sequence of operators."""

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

    def _block_of(self, op: OpCall) -> str:
        """Return the index of the block in which the operator runs, as text such as "0". Return "" if it runs
        outside the blocks."""
        prefix = child_prefix(self.path)
        return op.module.removeprefix(prefix).partition(".")[0] if op.module.startswith(prefix) else ""

    def _runs(self, phase: Phase) -> list[tuple[str, list[OpCall]]]:
        """Return (index of the block as text, such as "0"; operators of this run) for each run of a block in
        ``phase`` of the last step, in order of time. A run is a series of operators of one block without
        operators of another block between them."""
        span = self.span(phase)
        block_ops = (o for o in self.ops if span.start <= o.clock < span.end and self._block_of(o))
        groups = itertools.groupby(block_ops, self._block_of)
        return [(number, list(ops)) for number, ops in groups]

    def _of_block(self, phase: Phase, index: int) -> list[OpCall]:
        """Return the operators of the last run of block ``index`` (from 0) in ``phase`` of the last step;
        empty if it does not run.
        """
        return next((ops for number, ops in reversed(self._runs(phase)) if number == str(index)), [])

    def passes(self) -> int:
        """Return how many times the last step runs forward through the blocks: 1, or more with recycling. The
        runs of the middle block are counted.
        """
        return sum(number == "1" for number, _ in self._runs(Phase.FORWARD))

    def first_clocks(self, phase: Phase) -> list[int]:
        runs = [self._of_block(phase, i) for i in range(BLOCKS)]
        return [ops[0].clock for ops in runs if ops]

    def end(self, phase: Phase, index: int) -> int:
        """Return the clock of the first operator after the last operator of block ``index`` in ``phase`` of
        the last step, in which the block must run. If no operator follows within the phase, return the clock
        at which the phase ends.
        """
        last, span = self._of_block(phase, index)[-1].clock, self.span(phase)
        return next((o.clock for o in self.ops if last < o.clock < span.end), span.end)

    def level(self, clock: int) -> int:
        """Return the live bytes just before ``clock``, a time of the trace (`OpCall.clock`); 0 before the
        first allocation."""
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
        """Return the costs of one piece of the model, which runs in the clock ranges ``forward`` and
        ``backward`` of the last step. A range is (start, end), without the end.

        ``module``: the module path of the block, if the piece is a block. None: the piece lies outside the
        blocks, and operators inside blocks do not count towards its forward time, forward FLOPs and forward
        collectives. If the model runs the blocks several times (recycling), these three of a block are
        multiplied by the number of passes. The memory of the earlier passes counts in the piece before the
        blocks, in whose range they run.
        """
        kept_bytes = self.level(forward[1]) - self.level(forward[0])
        step_gradients = (
            a for a in self.trace.allocations if a.category is Category.GRADIENT and a.step == self.last
        )
        gradients = sum(a.size_bytes for a in step_gradients if backward[0] <= a.start < backward[1])
        forward_ops, backward_ops = self.within(forward), self.within(backward)
        if module is None:
            forward_ops = [o for o in forward_ops if not self._block_of(o)]
        pass_count = 1 if module is None else self.passes()
        return PartCosts(
            forward_s=self.seconds(forward_ops) * pass_count,
            backward_s=self.seconds(backward_ops),
            kept_bytes=kept_bytes,
            forward_top_bytes=self.top(forward),
            backward_top_bytes=self.top(backward),
            parameter_bytes=gradients,
            flops=sum(o.times * o.flops for o in (*(forward_ops * pass_count), *backward_ops)),
            forward_travel=_travel(forward_ops) * pass_count,
            backward_travel=_travel(backward_ops),
        )


def _travel(ops: Sequence[OpCall]) -> Travel:
    transfers = [collective_size(op) for op in ops if op.op.startswith(COLLECTIVES)]
    return tuple((kind, float(size)) for kind, size in transfers if kind)


def update_costs_of(trace: Trace, larger: Trace, seconds: Seconds) -> UpdateCosts:
    """Return the costs of the optimizer's step per trainable element of a parameter: seconds, bytes read and
    written, bytes of optimizer state, and bytes of temporary tensors. ``tensor_top_bytes`` of the result is
    not per element: bytes of temporary tensors that do not grow with the number of blocks.

    ``trace``: two steps on one rank. Time, bytes read and written and the peak of temporary tensors are those
    of the second step's optimizer phase; the optimizer state is what is alive at the end. ``larger``: the
    same for a model of more blocks. The peak of temporary tensors lies on the line through both. ``seconds``
    returns the total time of a sequence of operators.
    """
    view = _StepView(trace, "", seconds)
    span = view.span(Phase.OPTIMIZER)
    window = (span.start, span.end)
    state_bytes = sum(
        a.size_bytes for a in trace.allocations if a.category is Category.OPTIMIZER_STATE and a.end is None
    )
    elements = trace.trainable_count
    larger_view = _StepView(larger, "", seconds)
    larger_span = larger_view.span(Phase.OPTIMIZER)
    top_bytes, larger_top_bytes = view.top(window), larger_view.top((larger_span.start, larger_span.end))
    slope = max(0.0, (larger_top_bytes - top_bytes) / max(1, larger.trainable_count - elements))
    return UpdateCosts(
        update_s=seconds(view.within(window)) / elements,
        moved_bytes=sum(o.moved_bytes for o in view.within(window)) / elements,
        state_bytes=state_bytes / elements,
        top_bytes=slope,
        tensor_top_bytes=max(0.0, top_bytes - slope * elements),
    )
