"""Price a whole grid of one layout at once: seconds of a step, and peak bytes of the rank that needs most.

Everything is added up from traced parts (`Parts`, `Updating`). The arithmetic here decides how parts share:
which bytes are divided over which ranks, how many micro-batches wait in a pipeline stage, which communication
hides behind which computation. Finalists are traced whole, so this model only has to rank plans well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy

from memfit.planner.grid_axes import GATHERED, Array, Axes, Elements, Given, Priced, Rates, deepest
from memfit.planner.parallelism_grid import Grid, GridLayout
from memfit.planner.sharding_costs import State

# Copies per tensor: its gradient to the host and its new value back. FSDP2 also updates tensor by tensor.
_CALLS_AWAY = {"zero": 2, "fsdp2": 4}
_OFFLOADED_KEEPS = 0.02  # share of kept bytes that stays: tensors too small to be worth moving


def price(grid: Grid, given: Given, rates: Rates) -> Priced:
    """Return step time, peak device bytes and host bytes of every plan in the grid."""
    layout, axes = grid.layout, Axes(given, grid)
    size = GATHERED[given.states[0].compute]
    parts = given.inside[0][0]
    ends = given.ends[0][0]
    elements = Elements(
        block=parts.block.parameter_bytes / size,
        before=ends.before.parameter_bytes / size,
        after=ends.after.parameter_bytes / size,
    )
    away = numpy.array([float(bool(u)) for u in grid.away]).reshape(1, 1, 1, -1, 1)
    seconds = _seconds(layout, axes, elements, rates, away)
    peak, host = _bytes(layout, axes, elements, away)
    peak = peak + rates.workspace_bytes
    shape = grid.shape
    return Priced(
        step_s=numpy.broadcast_to(seconds, shape),
        allocated_bytes=numpy.broadcast_to(peak, shape),
        host_bytes=numpy.broadcast_to(host, shape),
    )


# -- seconds ------------------------------------------------------------------------------------------


def _seconds(layout: GridLayout, axes: Axes, elements: Elements, rates: Rates, away: Array) -> Array:
    given, counts, staged = axes.given, axes.counts, layout.stages > 1
    depth = deepest(given.blocks, layout)
    ahead, back = _travel(layout, axes, elements.block, rates)
    moved = 2 * axes.inside("kept_bytes") * away / rates.host_bytes_s
    every = numpy.maximum(axes.states(lambda s: s.every or s.kind == "zero"), counts == 1)
    stays = axes.states(lambda s: s.stays)
    opened = _Opened.of(axes, staged=staged)
    opening = axes.states(lambda s: _opening_bytes(s) * elements.block / rates.copied_bytes_s)
    forward = axes.inside("forward_s") + moved / 2 + opening * opened.ahead
    backward = axes.inside("backward_s") + moved / 2 + opening * opened.back
    # Per block: gathers and reductions hide behind the block's own work as far as it lasts. A stage's
    # backward begins with one more gather, of a block that ran forward before it.
    gathered = ahead * opened.back * (1 + staged * layout.virtual / depth)
    repeated = depth * (
        _beside(forward, ahead * opened.ahead, rates) + _beside(backward, gathered + back * every, rates)
    )
    # When the model or a stage begins, no work is running that could hide the first block's gather; when it
    # ends, none that could hide the last reduction.
    times = layout.virtual
    bare = times * (ahead * (opened.ahead + opened.back * staged) + back * every)
    once = stays * (times * ahead + depth * (numpy.maximum(ahead - forward, 0.0) + opening)) + (1 - every) * (
        times * back + depth * numpy.maximum(back - numpy.maximum(backward - ahead * opened.back, 0.0), 0.0)
    )
    first = axes.ends("before", "forward_s") + axes.ends("before", "backward_s")
    last = axes.ends("after", "forward_s") + axes.ends("after", "backward_s")

    def root(size: float) -> tuple[Array, Array]:
        there, home = _travel(layout, axes, size, rates)
        return there * (opened.ahead + opened.back) + home * every, there * stays + home * (1 - every)

    own = depth * elements.block + elements.before + elements.after
    if not staged:
        micro, step = root(elements.before + elements.after)
        step = step + once + counts * (repeated + bare + first + last + micro)
    else:
        send = rates.communicate("send", axes.hidden(), 2, _spread(layout, rates))
        ends = [(first, *root(elements.before)), (last, *root(elements.after))]
        busiest = repeated + bare + _highest([work + micro for work, micro, _ in ends])
        line = _Line(
            busiest=busiest,
            through=layout.stages * (repeated + bare) + first + last,
            ahead=depth * forward,
            send=send,
        )
        step = _pipelined(layout, counts, line) + once + _highest([step for *_, step in ends])
    step = step + _handed_on(axes, own, every, rates)
    return step + _update(axes, elements, depth, layout, rates)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """How often parameters are gathered for a micro-batch, by state: before its forward and before its
    backward.
    """

    ahead: Array
    back: Array

    @staticmethod
    def of(axes: Axes, *, staged: bool) -> _Opened:
        """Count the gathers.

        Parameters that stay gathered after forward are freed after backward and gathered again for the next
        micro-batch. In a pipeline, where forwards run ahead, it is mostly the next backward that gathers
        them.
        """
        reshard, stays = axes.states(lambda s: s.reshard), axes.states(lambda s: s.stays)
        kept = (1 - reshard) * (1 - stays)
        return _Opened(ahead=reshard + kept * (not staged), back=reshard + kept * staged)


def _opening_bytes(state: State) -> float:
    """Return the bytes copied per gathered element.

    The shard is copied in, in the dtype of the gather, and everything is copied out to the parameters
    (torch.distributed.fsdp, foreach_all_gather).
    """
    if state.parameter_shards == 1:
        return 0.0
    return (state.stored + state.gathered) / state.parameter_shards + 2 * state.gathered


def _handed_on(axes: Axes, own: float, every: Array, rates: Rates) -> Array:
    """Return the seconds per step to copy gradients into the reduction's buffer and to accumulate
    micro-batches.

    Gradients are accumulated in shards if each micro-batch is reduced, and in whole gradients if only the
    last is.
    """
    counts, states = axes.counts, axes.states
    travels = states(lambda s: s.kind in ("fsdp2", "zero") and s.gradient_shards * s.state_shards > 1)
    copied = travels * states(lambda s: s.gathered + s.reduced)
    to_shards = states(lambda s: 3 * s.gradient / s.gradient_shards)
    whole = states(lambda s: s.gathered + 2 * s.reduced if s.gradient_shards > 1 else 3 * s.gradient)
    added = (counts - 1) * (every * to_shards + (1 - every) * whole)
    moved_bytes = copied * (every * counts + (1 - every)) + added
    seconds: Array = own * moved_bytes / rates.copied_bytes_s
    return seconds


def _beside(work: Array, travel: Array, rates: Rates) -> Array:
    """Return the seconds of work and communication together. Work is slowed while communication runs."""
    slowed = work + (rates.beside - 1) / rates.beside * numpy.minimum(travel, work * rates.beside)
    return numpy.maximum(slowed, travel)


def _spread(layout: GridLayout, rates: Rates) -> int:
    """Return how many ranks of two neighbouring pipeline stages share a host: 2, or 1 if a host holds one
    stage.
    """
    apart = layout.ranks // layout.stages
    return 2 if apart < rates.per_host else 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """Seconds of one micro-batch: in the busiest stage (``busiest``), through all stages and back
    (``through``), forward through one stage (``ahead``), and to send from one stage to the next (``send``).
    """

    busiest: Array
    through: Array
    ahead: Array
    send: Array


def _pipelined(layout: GridLayout, counts: Array, line: _Line) -> Array:
    """Return the seconds of all micro-batches, as `cost.schedules.closed_s` computes them for equal stages.

    Zero-bubble schedules postpone half of the backward work, so they wait for forwards only.
    """
    others = layout.stages - 1
    waiting = (line.through - line.busiest) / layout.virtual
    if layout.schedule.startswith("zero-bubble"):
        waiting = others * line.ahead
    hops = others
    if layout.schedule == "1f1b":  # every round trip waits for its sends
        hops = others * counts / layout.stages + max(0, layout.stages - 2)
    return counts * line.busiest + waiting + 2 * hops * line.send


def _travel(layout: GridLayout, axes: Axes, elements: float, rates: Rates) -> tuple[Array, Array]:
    """Return the seconds to gather ``elements`` parameters and to reduce their gradients, by state."""
    close = max(1, rates.per_host // layout.tensor)
    ahead, back = [], []
    for state in axes.given.states:
        shards = state.parameter_shards
        gather = rates.communicate("all_gather", elements * state.gathered, shards, min(shards, close))
        ahead.append(gather if shards > 1 else 0.0)
        spread = max(state.gradient_shards, state.state_shards if state.kind == "zero" else 1)
        seconds = 0.0
        if spread > 1:
            kind = "reduce_scatter" if state.gradient_shards > 1 else "all_reduce"
            seconds += rates.communicate(kind, elements * state.reduced, spread, min(spread, close))
        if state.replicas > 1:
            part = elements * state.reduced / spread
            near = max(1, close // spread)
            seconds += rates.communicate("all_reduce", part, state.replicas, min(state.replicas, near))
        back.append(seconds)
    shape = (1, 1, 1, 1, -1)
    return numpy.array(ahead).reshape(shape), numpy.array(back).reshape(shape)


def _update(axes: Axes, elements: Elements, depth: int, layout: GridLayout, rates: Rates) -> Array:
    own = depth * elements.block + max(elements.before, elements.after)
    if layout.stages == 1:
        own = depth * elements.block + elements.before + elements.after

    def seconds(state: State) -> float:
        mine = own / state.state_shards
        if state.offload:  # updated by the host's cores, copied there and back over the bus
            moved = mine * (state.gradient + state.stored) / rates.host_bytes_s
            calls = _CALLS_AWAY["zero" if state.kind == "zero" else "fsdp2"] * axes.given.tensors
            moved += calls / layout.stages * rates.host_call_s
            return moved + mine * state.updating.moved_bytes / rates.host_update_bytes_s
        extra = 0.0
        if state.kind == "zero" and state.parameter_shards == 1 and state.state_shards > 1:
            extra = rates.communicate(
                "all_gather", own * state.stored, state.state_shards, min(state.state_shards, rates.per_host)
            )
        return mine * state.updating.update_s + extra

    return axes.states(seconds)


# -- bytes --------------------------------------------------------------------------------------------


def _bytes(layout: GridLayout, axes: Axes, elements: Elements, away: Array) -> tuple[Array, Array]:
    """Return (the higher peak of the first and the last stage, host bytes of a rank)."""
    depth = deepest(axes.given.blocks, layout)
    if layout.stages == 1:
        found = [_stage(layout, axes, elements, depth, away, first=True, last=True)]
    else:
        found = [
            _stage(layout, axes, elements, depth, away, first=True, last=False),
            _stage(layout, axes, elements, depth, away, first=False, last=True),
        ]
    peak = _highest([p for p, _ in found])
    host = _highest([h for _, h in found])
    return peak, host


def _highest(arrays: Sequence[Array]) -> Array:
    highest = arrays[0]
    for other in arrays[1:]:
        highest = numpy.maximum(highest, other)
    return highest


def _waiting(layout: GridLayout, counts: Array, *, first: bool) -> Array:
    """Return the most micro-batches whose activations a stage keeps at once, in units of whole stages.

    Sources: Narayanan et al. 2021; torch.distributed.pipelining.schedules.
    """
    p, v = layout.stages, layout.virtual
    if layout.schedule == "gpipe":
        return counts
    if layout.schedule == "1f1b":
        return numpy.minimum(counts, p if first else 1)
    if layout.schedule == "zero-bubble-v":
        return numpy.minimum(counts, p)
    warm = (v - 1) * p + 2 * (p - 1 if first else 0) + 1
    return numpy.minimum(counts * v, warm) / v


def _stage(
    layout: GridLayout, axes: Axes, elements: Elements, depth: int, away: Array, *, first: bool, last: bool
) -> tuple[Array, Array]:
    counts, states = axes.counts, axes.states
    own = depth * elements.block + elements.before * first + elements.after * last
    root = elements.before * first + elements.after * last
    stays = 1 - (1 - _OFFLOADED_KEEPS) * away
    kept_block = axes.inside("kept_bytes")
    kept = depth * kept_block + axes.hidden() * (not first)
    kept = kept + axes.ends("before", "kept_bytes") * first
    waiting = _waiting(layout, counts, first=first) if layout.stages > 1 else numpy.ones_like(counts)
    # other schedules start the backward right after the loss
    losses = (waiting - 1) * (layout.schedule == "gpipe")
    held = ((waiting - 1) * kept + losses * axes.ends("after", "kept_bytes") * last) * stays

    on_device = states(lambda s: s.offload != "all")
    state_here = states(lambda s: not s.offload)
    parameters = own * states(lambda s: s.stored / s.parameter_shards) * on_device
    state = own * states(lambda s: s.updating.state_bytes / s.state_shards) * state_here
    gradient = own * states(lambda s: s.gradient / s.gradient_shards) * on_device
    bucket = own * states(lambda s: s.gradient * s.bucket) + states(lambda s: s.bucket_bytes)
    again = counts > 1
    # In one round of interleaved micro-batches, each chunk runs them all in a row and then reduces.
    unreduced = own / numpy.where(counts <= layout.stages, layout.virtual, 1)
    whole = again * unreduced * states(lambda s: s.reduced * (not s.every and s.gradient_shards > 1))
    resident = (
        parameters + state + bucket + gradient * numpy.maximum(states(lambda s: s.kind == "ddp"), again)
    )

    sharded = states(lambda s: s.parameter_shards > 1)
    open_ahead, open_back = _opened(axes, elements.block, root, depth)
    base = resident + held
    ahead = base + kept * stays + sharded * open_ahead + axes.inside("forward_top_bytes") - kept_block * stays
    ahead = numpy.maximum(
        ahead, base + kept * stays + sharded * open_ahead + axes.ends("after", "forward_top_bytes") * last
    )
    after = axes.ends("after", "kept_bytes") * last
    back_base = base + kept * stays + sharded * open_back + whole
    back = numpy.maximum(
        back_base + after + axes.ends("after", "backward_top_bytes") * last,
        back_base + axes.inside("backward_top_bytes") + kept_block * (1 - stays),
    )
    growing = gradient * (1 - again) * (1 - states(lambda s: s.kind == "ddp"))
    end = base + growing + (kept_block + axes.ends("before", "kept_bytes") * first) * stays
    end = end + axes.inside("backward_top_bytes") + sharded * open_back
    updating = parameters + state + bucket + gradient
    top = own * states(lambda s: s.updating.top_bytes / s.state_shards) * state_here
    peak = _highest([ahead, back, end, updating + top])
    average = _averaged_bytes(axes) * own * states(lambda s: 1 / s.parameter_shards)
    host = kept * away * waiting + own * states(_host_bytes)
    return peak + average * on_device, host + average * (1 - on_device)


def _averaged_bytes(axes: Axes) -> float:
    """Return the bytes per parameter of the averaged copy of the weights; 0 if the loop keeps none."""
    return 4.0 if axes.given.averaged else 0.0


def _host_bytes(state: State) -> float:
    """Return the host memory in bytes per parameter of a rank.

    Under FSDP2: the shard, its gradient and the optimizer's state. Under ZeRO: the fp32 master copy with its
    gradient, the state, and a buffer through which parameters or gradients pass, plus the parameters if those
    are offloaded too. The update's temporaries are added in both cases.
    """
    if not state.offload:
        return 0.0
    if state.kind != "zero":
        kept = state.stored + state.gradient + state.updating.state_bytes
    else:
        moments = state.updating.state_bytes - 4.0 * (state.stored < 4.0)
        kept = 4.0 + 4.0 + moments + state.stored * (1 + (state.offload == "all"))
    return (kept + state.updating.top_bytes) / state.state_shards


def _opened(axes: Axes, block: float, root: float, depth: int) -> tuple[Array, Array]:
    """Return the bytes of gathered parameters and of gradients in reduction on a sharded rank (forward,
    backward).

    Counted are the group at work, the group gathered ahead and its flat buffer, and the copy of the gradient
    in the reduction's buffer (torch.distributed.fsdp, overlapping copies).
    """
    unit, ends = axes.states(lambda s: block * s.gathered), axes.states(lambda s: root * s.gathered)
    reshard = axes.states(lambda s: s.reshard)
    ahead = ends + reshard * 3 * unit + (1 - reshard) * (depth * unit + 2 * unit)
    travelling = axes.states(lambda s: block * s.reduced * (1 + 1 / max(1, s.gradient_shards)))
    back = ends + reshard * 3 * unit + (1 - reshard) * depth * unit + travelling
    return ahead, back
