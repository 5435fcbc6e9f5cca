"""Price a whole grid of one layout at once: seconds of a step, and peak bytes of the rank that needs most.

Everything is added up from traced parts (`Parts`, `UpdateCosts`). The arithmetic here decides how parts
share: which bytes are divided over which ranks, how many micro-batches wait in a pipeline stage, which
communication hides behind which computation. Finalists are traced whole, so this model only has to rank plans
well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy

from memfit.planner.grid_axes import (
    GATHERED,
    Array,
    Axes,
    Elements,
    GridInputs,
    GridPredictions,
    Rates,
    depths,
)
from memfit.planner.parallelism_grid import Grid, GridLayout
from memfit.planner.sharding_costs import State
from memfit.techniques.zero import BUFFER_COUNT

# Copies per tensor: its gradient to the host and its new value back. FSDP2 also updates tensor by tensor.
_CALLS_AWAY = {"zero": 2, "fsdp2": 4}
_OFFLOADED_KEEPS = 0.02  # share of kept bytes that stays: tensors too small to be worth moving


def predict(grid: Grid, inputs: GridInputs, rates: Rates) -> GridPredictions:
    """Return for every plan in the grid the seconds of a step, the peak bytes on the device of the rank that
    needs most, including BLAS workspaces, and the bytes in host memory of the rank that needs most.

    ``inputs``: the parts along the grid's axes, all of one compute precision. ``rates``: speeds of the
    machine.
    """
    layout, axes = grid.layout, Axes(inputs, grid)
    element_bytes = GATHERED[inputs.states[0].compute]
    parts = inputs.inside[0][0]
    ends = inputs.ends[0][0]
    elements = Elements(
        block=parts.block.parameter_bytes / element_bytes - inputs.expert_elements,
        before=ends.before.parameter_bytes / element_bytes,
        after=ends.after.parameter_bytes / element_bytes,
        expert=inputs.expert_elements,
    )
    offloaded = numpy.array([float(bool(u)) for u in grid.away]).reshape(1, 1, 1, -1, 1)
    seconds = _seconds(layout, axes, elements, rates, offloaded)
    peak, host = _bytes(layout, axes, elements, offloaded)
    peak = peak + rates.workspace_bytes
    shape = grid.shape
    return GridPredictions(
        step_s=numpy.broadcast_to(seconds, shape),
        allocated_bytes=numpy.broadcast_to(peak, shape),
        host_bytes=numpy.broadcast_to(host, shape),
    )


# -- seconds ------------------------------------------------------------------------------------------


def _seconds(layout: GridLayout, axes: Axes, elements: Elements, rates: Rates, offloaded: Array) -> Array:
    inputs, counts, is_pipelined = axes.inputs, axes.counts, layout.stages > 1
    sizes = depths(inputs.blocks, layout)
    depth = max(sizes)
    gather_s, reduce_s = _travel(layout, axes, elements.block, rates)
    offload_s = 2 * axes.inside("kept_bytes") * offloaded / rates.host_bytes_s
    each_micro = numpy.maximum(axes.states(lambda s: s.every or s.kind == "zero"), counts == 1)
    stays = axes.states(lambda s: s.stays)
    gathers = _GatherCounts.of(axes, staged=is_pipelined)
    copy_s = axes.states(lambda s: _gather_copy_bytes(s) * elements.block / rates.copied_bytes_s)
    forward = axes.inside("forward_s") + offload_s / 2 + copy_s * gathers.ahead
    backward = axes.inside("backward_s") + offload_s / 2 + copy_s * gathers.back
    # Per block: gathers and reductions hide behind the block's own work as far as it lasts. A stage's
    # backward begins with one more gather, of a block that ran forward before it.
    backward_gather_s = gather_s * gathers.back * (1 + is_pipelined * layout.virtual / depth)
    blocks_s = depth * (
        _overlapped_s(forward, gather_s * gathers.ahead, rates)
        + _overlapped_s(backward, backward_gather_s + reduce_s * each_micro, rates)
    )
    # When the model or a stage begins, no work is running that could hide the first block's gather; when it
    # ends, none that could hide the last reduction.
    chunks = layout.virtual
    exposed_s = chunks * (gather_s * (gathers.ahead + gathers.back * is_pipelined) + reduce_s * each_micro)
    once_s = stays * (chunks * gather_s + depth * (numpy.maximum(gather_s - forward, 0.0) + copy_s)) + (
        1 - each_micro
    ) * (
        chunks * reduce_s
        + depth * numpy.maximum(reduce_s - numpy.maximum(backward - gather_s * gathers.back, 0.0), 0.0)
    )
    first_s = axes.ends("before", "forward_s") + axes.ends("before", "backward_s")
    last_s = axes.ends("after", "forward_s") + axes.ends("after", "backward_s")

    def root(size: float) -> tuple[Array, Array]:
        root_gather_s, root_reduce_s = _travel(layout, axes, size, rates)
        return root_gather_s * (
            gathers.ahead + gathers.back
        ) + root_reduce_s * each_micro, root_gather_s * stays + root_reduce_s * (1 - each_micro)

    rank_elements = depth * elements.block + elements.before + elements.after
    if not is_pipelined:
        micro_s, step = root(elements.before + elements.after)
        step = step + once_s + counts * (blocks_s + exposed_s + first_s + last_s + micro_s)
    else:
        send_s = rates.communicate("send", axes.hidden(), 2, _spread(layout, rates))
        block_s = blocks_s / depth
        ends = [(first_s, *root(elements.before)), (last_s, *root(elements.after))]
        works = [
            n * block_s + end_s + micro_s
            for n, (end_s, micro_s, _) in zip((sizes[0], sizes[-1]), ends, strict=True)
        ]
        stage_times = _MicroBatchTimes(
            busiest=_highest([blocks_s, *works]) + exposed_s,
            through=inputs.blocks * block_s + layout.stages * exposed_s + first_s + last_s,
            ahead=depth * forward,
            send=send_s,
        )
        step = _pipeline_s(layout, counts, stage_times) + once_s + _highest([step for *_, step in ends])
    step = step + _gradient_copy_s(axes, rank_elements, each_micro, rates)
    expert_bytes = depth * elements.expert * axes.states(lambda s: 3 * s.gradient)  # read two, write one
    step = step + (counts - 1) * expert_bytes / rates.copied_bytes_s
    return step + _update(axes, elements, depth, layout, rates)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _GatherCounts:
    """How often (0 or 1) parameters are gathered for each micro-batch, as arrays along the axis ``states``:
    before its forward (``ahead``), and between its forward and its backward (``back``).
    """

    ahead: Array
    back: Array

    @staticmethod
    def of(axes: Axes, *, staged: bool) -> _GatherCounts:
        """Return the numbers of gathers. ``staged``: whether the model is cut into pipeline stages.

        Parameters that are freed after forward are gathered before forward and again before backward. Those
        that stay until the last micro-batch's backward are gathered once per step, which is not counted here.
        Others are freed after backward and gathered once for each micro-batch: before its forward, or, in a
        pipeline, between forward and backward, because forwards run ahead there and most gathers happen at
        the next backward.
        """
        reshard, stays = axes.states(lambda s: s.reshard), axes.states(lambda s: s.stays)
        stays_open = (1 - reshard) * (1 - stays)
        return _GatherCounts(ahead=reshard + stays_open * (not staged), back=reshard + stays_open * staged)


def _gather_copy_bytes(state: State) -> float:
    """Return the bytes that copies around the gather of sharded parameters read and write per gathered
    element; 0 if parameters are not sharded.

    The shard is copied in, in the dtype of the gather, and everything is copied out to the parameters
    (torch.distributed.fsdp, foreach_all_gather).
    """
    if state.parameter_shards == 1:
        return 0.0
    return (state.stored + state.gathered) / state.parameter_shards + 2 * state.gathered


def _gradient_copy_s(axes: Axes, rank_elements: float, each_micro: Array, rates: Rates) -> Array:
    """Return the seconds per step to copy gradients into the buffer of their reduction (FSDP2 and ZeRO only),
    and to accumulate the gradients of several micro-batches.

    ``each_micro``: 1 for states that reduce gradients in each micro-batch; these are then accumulated in
    shards. 0 for states that reduce only in the last one; gradients are then accumulated whole.
    ``rank_elements``: number of parameters of the rank.
    """
    counts, states = axes.counts, axes.states
    communicates = states(lambda s: s.kind in ("fsdp2", "zero") and s.gradient_shards * s.state_shards > 1)
    copied_bytes = communicates * states(lambda s: s.gathered + s.reduced)
    shard_bytes = states(lambda s: 3 * s.gradient / s.gradient_shards)
    whole_bytes = states(lambda s: s.gathered + 2 * s.reduced if s.gradient_shards > 1 else 3 * s.gradient)
    accumulated_bytes = (counts - 1) * (each_micro * shard_bytes + (1 - each_micro) * whole_bytes)
    moved_bytes = copied_bytes * (each_micro * counts + (1 - each_micro)) + accumulated_bytes
    seconds: Array = rank_elements * moved_bytes / rates.copied_bytes_s
    return seconds


def _overlapped_s(work: Array, communication: Array, rates: Rates) -> Array:
    """Return the seconds until both work and communication that begin together have ended. While
    communication runs, work is slower by the factor ``rates.kernel_slowdown``.
    """
    slowed_work = work + (rates.kernel_slowdown - 1) / rates.kernel_slowdown * numpy.minimum(
        communication, work * rates.kernel_slowdown
    )
    return numpy.maximum(slowed_work, communication)


def _spread(layout: GridLayout, rates: Rates) -> int:
    """Return how many of the two ranks of a send between neighbouring pipeline stages are in the same host: 2
    if one stage has fewer ranks than a host has devices, else 1."""
    stage_ranks = layout.ranks // layout.stages
    return 2 if stage_ranks < rates.per_host else 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _MicroBatchTimes:
    """Seconds of one micro-batch in a pipeline: forward and backward in the stage that takes longest
    (``busiest``), forward and backward through all stages (``through``), forward through the blocks of one
    stage (``ahead``), and to send a hidden state from one stage to the next (``send``).
    """

    busiest: Array
    through: Array
    ahead: Array
    send: Array


def _pipeline_s(layout: GridLayout, counts: Array, stage_times: _MicroBatchTimes) -> Array:
    """Return the seconds from the first forward to the last backward of all micro-batches in a pipeline.
    ``counts``: numbers of micro-batches. tests/unit/test_schedules.py has the formulas for equal stages.

    Zero-bubble schedules postpone half of the backward work, so a stage waits only for the forwards of the
    others.
    """
    other_stages = layout.stages - 1
    waiting_s = (stage_times.through - stage_times.busiest) / layout.virtual
    if layout.schedule.startswith("zero-bubble"):
        waiting_s = other_stages * stage_times.ahead
    hops = other_stages
    if layout.schedule == "1f1b":  # every round trip waits for its sends
        hops = other_stages * counts / layout.stages + max(0, layout.stages - 2)
    return counts * stage_times.busiest + waiting_s + 2 * hops * stage_times.send


def _travel(layout: GridLayout, axes: Axes, elements: float, rates: Rates) -> tuple[Array, Array]:
    """Return (seconds to gather ``elements`` parameters, seconds to reduce their gradients), each as an array
    along the axis ``states``. The first is 0 for states whose parameters are not sharded, the second for
    states whose gradients need no reduction."""
    local_ranks = max(1, rates.per_host // layout.tensor)
    gather_s, reduce_s = [], []
    for state in axes.inputs.states:
        shards = state.parameter_shards
        state_gather_s = rates.communicate(
            "all_gather", elements * state.gathered, shards, min(shards, local_ranks)
        )
        gather_s.append(state_gather_s if shards > 1 else 0.0)
        reduce_ranks = max(state.gradient_shards, state.state_shards if state.kind == "zero" else 1)
        seconds = 0.0
        if reduce_ranks > 1:
            kind = "reduce_scatter" if state.gradient_shards > 1 else "all_reduce"
            seconds += rates.communicate(
                kind, elements * state.reduced, reduce_ranks, min(reduce_ranks, local_ranks)
            )
        if state.replicas > 1:
            shard_bytes = elements * state.reduced / reduce_ranks
            replicas_per_host = max(1, local_ranks // reduce_ranks)
            seconds += rates.communicate(
                "all_reduce", shard_bytes, state.replicas, min(state.replicas, replicas_per_host)
            )
        reduce_s.append(seconds)
    shape = (1, 1, 1, 1, -1)
    return numpy.array(gather_s).reshape(shape), numpy.array(reduce_s).reshape(shape)


def _update(axes: Axes, elements: Elements, depth: int, layout: GridLayout, rates: Rates) -> Array:
    rank_elements = depth * elements.block + max(elements.before, elements.after)
    if layout.stages == 1:
        rank_elements = depth * elements.block + elements.before + elements.after

    def seconds(state: State) -> float:
        shard_elements = rank_elements / state.state_shards + depth * elements.expert
        if state.offload:  # updated by the host's cores, copied there and back over the bus
            transfer_s = shard_elements * (state.gradient + state.stored) / rates.host_bytes_s
            calls = _CALLS_AWAY["zero" if state.kind == "zero" else "fsdp2"] * axes.inputs.tensors
            transfer_s += calls / layout.stages * rates.host_call_s
            if state.sub_group and rates.storage is not None:  # all of it is read and written once
                stored_bytes = shard_elements * _stored_bytes(state)
                transfer_s += rates.storage.seconds(read_bytes=stored_bytes, written_bytes=stored_bytes)
            return transfer_s + shard_elements * state.update_costs.moved_bytes / rates.host_update_bytes_s
        gather_s = 0.0
        if state.kind == "zero" and state.parameter_shards == 1 and state.state_shards > 1:
            gather_s = rates.communicate(
                "all_gather",
                rank_elements * state.stored,
                state.state_shards,
                min(state.state_shards, rates.per_host),
            )
        return shard_elements * state.update_costs.update_s + gather_s

    return axes.states(seconds)


# -- bytes --------------------------------------------------------------------------------------------


def _bytes(layout: GridLayout, axes: Axes, elements: Elements, offloaded: Array) -> tuple[Array, Array]:
    """Return (peak bytes on the device, bytes in host memory) of one rank; with a pipeline, each is the
    highest one of a rank in the first stage, of one in the last stage, and of one in the second stage if that
    has more blocks than the first.
    """
    sizes = depths(axes.inputs.blocks, layout)
    stages = [_stage(layout, axes, elements, sizes[0], offloaded, rank=0)]
    if layout.stages > 1:
        stages.append(_stage(layout, axes, elements, sizes[-1], offloaded, rank=layout.stages - 1))
    if layout.stages > 2 and sizes[1] > sizes[0]:
        stages.append(_stage(layout, axes, elements, sizes[1], offloaded, rank=1))
    peak = _highest([p for p, _ in stages])
    host = _highest([h for _, h in stages])
    return peak, host


def _highest(arrays: Sequence[Array]) -> Array:
    highest = arrays[0]
    for array in arrays[1:]:
        highest = numpy.maximum(highest, array)
    return highest


def _waiting(layout: GridLayout, counts: Array, *, rank: int) -> Array:
    """Return the largest number of micro-batches whose activations a pipeline rank keeps at once, for each of
    ``counts``, the numbers of micro-batches. Each stage of the rank counts as 1 / ``virtual`` of a
    micro-batch. ``rank``: the rank's index along the pipeline.

    Sources: Narayanan et al. 2021; torch.distributed.pipelining.schedules.
    """
    p, v = layout.stages, layout.virtual
    if layout.schedule == "gpipe":
        return counts
    if layout.schedule == "1f1b":
        return numpy.minimum(counts, p - rank)
    if layout.schedule == "zero-bubble-v":
        return numpy.minimum(counts, p)
    warmup = (v - 1) * p + 2 * (p - 1 - rank) + 1
    return numpy.minimum(counts * v, warmup) / v


def _stage(
    layout: GridLayout,
    axes: Axes,
    elements: Elements,
    depth: int,
    offloaded: Array,
    *,
    rank: int,
) -> tuple[Array, Array]:
    """Return (peak bytes on the device, bytes in host memory) of the pipeline rank ``rank``, which has
    ``depth`` blocks. ``offloaded``: by plan, 1 where its activations are offloaded, else 0.
    """
    first, last = rank == 0, rank == layout.stages - 1
    counts, states = axes.counts, axes.states
    rank_elements = depth * elements.block + elements.before * first + elements.after * last
    expert_elements = depth * elements.expert
    root_elements = elements.before * first + elements.after * last
    kept_share = 1 - (1 - _OFFLOADED_KEEPS) * offloaded
    kept_block = axes.inside("kept_bytes")
    kept_bytes = depth * kept_block + axes.hidden() * (not first)
    kept_bytes = kept_bytes + axes.ends("before", "kept_bytes") * first
    waiting_micros = _waiting(layout, counts, rank=rank) if layout.stages > 1 else numpy.ones_like(counts)
    # other schedules start the backward right after the loss
    waiting_losses = (waiting_micros - 1) * (layout.schedule == "gpipe")
    held_bytes = (
        (waiting_micros - 1) * kept_bytes + waiting_losses * axes.ends("after", "kept_bytes") * last
    ) * kept_share

    on_device = states(lambda s: s.offload != "all")
    model_state = _model_state(axes, rank_elements, expert_elements)
    gradient, accumulates = model_state.gradient, counts > 1
    # In one round of interleaved micro-batches, each chunk runs them all in a row and then reduces.
    unreduced_elements = rank_elements / numpy.where(counts <= layout.stages, layout.virtual, 1)
    whole_gradients = (
        accumulates
        * unreduced_elements
        * states(lambda s: s.reduced * (not s.every and s.gradient_shards > 1))
    )
    resident_bytes = (
        model_state.fixed
        + gradient * numpy.maximum(states(lambda s: s.kind == "ddp"), accumulates)
        + model_state.expert_gradient * accumulates
    )

    is_sharded = states(lambda s: s.parameter_shards > 1)
    forward_open, backward_open = _gathered_bytes(axes, elements.block, root_elements, depth)
    base_bytes = resident_bytes + held_bytes
    forward_peak = (
        base_bytes
        + kept_bytes * kept_share
        + is_sharded * forward_open
        + axes.inside("forward_top_bytes")
        - kept_block * kept_share
    )
    forward_peak = numpy.maximum(
        forward_peak,
        base_bytes
        + kept_bytes * kept_share
        + is_sharded * forward_open
        + axes.ends("after", "forward_top_bytes") * last,
    )
    loss_bytes = axes.ends("after", "kept_bytes") * last
    backward_base = base_bytes + kept_bytes * kept_share + is_sharded * backward_open + whole_gradients
    backward_peak = numpy.maximum(
        backward_base + loss_bytes + axes.ends("after", "backward_top_bytes") * last,
        backward_base + axes.inside("backward_top_bytes") + kept_block * (1 - kept_share),
    )
    growing_gradient = (1 - accumulates) * (
        gradient * (1 - states(lambda s: s.kind == "ddp")) + model_state.expert_gradient
    )
    backward_end = (
        base_bytes + growing_gradient + (kept_block + axes.ends("before", "kept_bytes") * first) * kept_share
    )
    backward_end = backward_end + axes.inside("backward_top_bytes") + is_sharded * backward_open
    update_peak = (
        model_state.fixed
        + gradient
        + model_state.expert_gradient
        + expert_elements * states(lambda s: s.update_costs.top_bytes)
        + rank_elements * states(lambda s: s.update_costs.top_bytes / s.state_shards * (not s.offload))
        + states(lambda s: _tensor_top(s, layout) * (not s.offload))
    )
    peak = _highest([forward_peak, backward_peak, backward_end, update_peak])
    # the averaged copy of the weights, if the loop keeps one, is in float32
    averaged_elements = rank_elements * states(lambda s: 1 / s.parameter_shards) + expert_elements
    average_bytes = 4.0 * axes.inputs.averaged * averaged_elements
    host = kept_bytes * offloaded * waiting_micros + states(lambda s: _host_bytes(s, rank_elements))
    host = host + states(lambda s: _tensor_top(s, layout) * bool(s.offload))
    return peak + average_bytes * on_device, host + average_bytes * (1 - on_device)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _ModelState:
    """Bytes on the device of one rank: ``fixed``, of parameters, optimizer state and gradient buckets, which
    are there all the time; ``gradient``, of the gradients of all parameters but experts that only this rank
    has; ``expert_gradient``, of the gradients of these.
    """

    fixed: Array
    gradient: Array
    expert_gradient: Array


def _model_state(axes: Axes, rank_elements: Array, expert_elements: Array) -> _ModelState:
    """Return the bytes of the model's state on the device of one rank that has ``rank_elements`` parameters,
    which data-parallel ranks may share, and ``expert_elements`` parameters of experts that only this rank
    has, which are never offloaded."""
    states = axes.states
    on_device, state_here = states(lambda s: s.offload != "all"), states(lambda s: not s.offload)
    parameters = rank_elements * states(lambda s: s.stored / s.parameter_shards) * on_device
    state = rank_elements * states(lambda s: s.update_costs.state_bytes / s.state_shards) * state_here
    bucket = rank_elements * states(lambda s: s.gradient * s.bucket) + states(lambda s: s.bucket_bytes)
    experts = expert_elements * states(lambda s: s.stored + s.update_costs.state_bytes)
    return _ModelState(
        fixed=parameters + state + bucket + experts,
        gradient=rank_elements * states(lambda s: s.gradient / s.gradient_shards) * on_device,
        expert_gradient=expert_elements * states(lambda s: s.gradient),
    )


def _tensor_top(state: State, layout: GridLayout) -> float:
    """Return the bytes of temporary tensors of the optimizer's step that do not grow with the number of
    blocks, on one rank: those of the largest parameter, divided by the shards of the optimizer's state. If
    experts are distributed, it is one of theirs, divided by the number of ranks that hold them.
    """
    return state.update_costs.tensor_top_bytes / (
        state.state_shards if layout.experts == 1 else layout.experts
    )


def _host_bytes(state: State, rank_elements: float) -> float:
    """Return the bytes of host memory on a rank that has ``rank_elements`` parameters before sharding; 0
    without offload.

    Under FSDP2, these are the parameter, its gradient and the optimizer's state. Under ZeRO, they are the
    fp32 master copy and its gradient, the rest of the optimizer's state, and a buffer through which
    parameters or gradients pass, plus the parameter if parameters are offloaded too. In both cases the
    temporary tensors of the update that grow with the number of parameters are added. All is divided by the
    number of ranks over which the optimizer's state is sharded. Optimizer state on local storage counts only
    for the elements that pass through host memory at a time.
    """
    if not state.offload:
        return 0.0
    shard_elements = rank_elements / state.state_shards
    if state.kind != "zero":
        kept_bytes = state.stored + state.gradient + state.update_costs.state_bytes
        return shard_elements * (kept_bytes + state.update_costs.top_bytes)
    kept_bytes = state.stored * (1 + (state.offload == "all"))
    if not state.sub_group:
        return shard_elements * (kept_bytes + _stored_bytes(state) + state.update_costs.top_bytes)
    passing_bytes = 4.0 * BUFFER_COUNT + _moment_bytes(state) + state.update_costs.top_bytes
    return shard_elements * kept_bytes + min(shard_elements, state.sub_group) * passing_bytes


def _stored_bytes(state: State) -> float:
    """Return the bytes per element of the fp32 master copy, its gradient and the optimizer's state under ZeRO
    with offload."""
    return 4.0 + 4.0 + _moment_bytes(state)


def _moment_bytes(state: State) -> float:
    """Return the bytes per element of the optimizer's state under ZeRO, without a master copy."""
    return state.update_costs.state_bytes - 4.0 * (state.stored < 4.0)


def _gathered_bytes(axes: Axes, block: float, root: float, depth: int) -> tuple[Array, Array]:
    """Return (bytes in forward, bytes in backward) of gathered parameters and of gradients in reduction on a
    rank with sharded parameters, along the axis ``states``.

    ``block``, ``root``: numbers of elements of one block, and of what lies outside the blocks. ``depth``:
    number of blocks on the rank. Counted are the gathered parameters of the block at work and outside the
    blocks, those of the block gathered ahead with their flat buffer, and in backward the copy of the gradient
    in the buffer of its reduction (torch.distributed.fsdp, overlapping copies). Without resharding after
    forward, the gathered parameters of all blocks are counted; under ZeRO 3, at least as many parameters as
    it keeps for reuse.
    """
    block_bytes, root_bytes = (
        axes.states(lambda s: block * s.gathered),
        axes.states(lambda s: root * s.gathered),
    )
    reshard = axes.states(lambda s: s.reshard)
    forward_open = (
        root_bytes + reshard * 3 * block_bytes + (1 - reshard) * (depth * block_bytes + 2 * block_bytes)
    )
    reducing_bytes = axes.states(lambda s: block * s.reduced * (1 + 1 / max(1, s.gradient_shards)))
    backward_open = (
        root_bytes + reshard * 3 * block_bytes + (1 - reshard) * depth * block_bytes + reducing_bytes
    )
    live_bytes = axes.states(lambda s: s.gathered * min(s.live, root + depth * block))
    return numpy.maximum(forward_open, live_bytes), numpy.maximum(backward_open, live_bytes)
