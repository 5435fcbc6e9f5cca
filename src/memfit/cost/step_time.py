"""Step time of a plan from traces of its distinct ranks: each rank simulated on its streams, or, with a
pipeline, its stages simulated in the order of the schedule.

Not modelled: loading data, ranks that are slower at times, and host synchronisation on tensor values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from memfit.cost.collectives import collective_s
from memfit.cost.host import ranks_of_host
from memfit.cost.op_time import TimeModel
from memfit.cost.schedules import simulate
from memfit.cost.stream_simulator import SimulatedStep, StreamSimulator, payload_bytes
from memfit.techniques.rank_mesh import layout
from memfit.types.machine import Machine
from memfit.types.plan import Plan, Use
from memfit.types.trace import Phase, Trace

_WEIGHT_SHARE = 0.5  # share of backward for weight gradients, in a layer of matrix products


def simulate_step(
    traces: Sequence[Trace], plan: Plan, machine: Machine, model: TimeModel
) -> SimulatedStep | None:
    """Return the simulated step of the plan: that of the rank that takes longest or, with a pipeline, that of
    all ranks in the order of its schedule.

    ``traces``: one for each rank that differs from the others, those of `Layout.distinct_ranks` in that
    order. Returns None for several ranks on a CPU: they share its cores, which is not modelled. Returns None,
    too, for a plan that keeps state on local storage if the rate of that is unknown.
    """
    if plan.ranks > 1 and machine.device.is_host:
        return None
    storage = storage_rates(machine, model, ranks_of_host(plan, machine))
    if storage is None and any(t.storage_bytes for t in traces):
        return None
    pairs = [(StreamSimulator(model=model, machine=machine, members=t.members), t) for t in traces]
    pipeline = plan.get("pipeline")
    if pipeline is not None:
        return _simulate_pipeline(pairs, plan, pipeline, machine)
    steps = [_with_offload(p.step(t), t, machine, model, storage) for p, t in pairs]
    return max(steps, key=lambda step: step.step_s)


def sketched_s(compute_s: float, plan: Plan, parameters: int, machine: Machine, micros: int) -> float | None:
    """Return the estimated seconds of a step of a plan that was not traced: ``compute_s``, the seconds of one
    rank's work, plus the exchange between ranks as far as it takes longer than half of ``compute_s``.

    The exchange is an all-reduce of all gradients or, with fsdp2 or zero, gathers of the parameters and a
    scatter of the gradients. Parameters are gathered once per step if the ranks keep them (fsdp2 without
    reshard, zero below stage 3), else twice per micro-batch. ``parameters``: number of the model's
    parameters. ``micros``: number of micro-batches of a step. This is accurate enough to decide which plans
    are worth a trace. Returns ``compute_s`` for one rank, and None for several ranks on a CPU, which are not
    modelled.
    """
    if plan.ranks == 1:
        return compute_s
    if machine.device.is_host:
        return None
    ranks_per_host = min(plan.ranks, machine.devices_in_host)
    is_bf16 = plan.get("bf16-parameters") or any(u.settings.get("precision") == "bf16" for u in plan.uses)
    size_bytes = parameters * (2.0 if is_bf16 else 4.0)

    def exchange_seconds(kind: str) -> float:
        return float(collective_s(kind, size_bytes, plan.ranks, ranks_per_host, machine))

    shards = plan.get("fsdp2") or plan.get("zero")
    if shards is None:
        exchange_s = exchange_seconds("all_reduce")
    else:
        keeps_parameters = shards.settings.get("reshard") is False or shards.settings.get("stage", 3) != 3
        exchange_s = exchange_seconds("all_gather") * (
            1 if keeps_parameters else 2 * micros
        ) + exchange_seconds("reduce_scatter")
    return compute_s + max(0.0, exchange_s - compute_s / 2)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StorageRates:
    """Rates of local storage for one rank while all ranks of its host use it, in bytes per second."""

    read_bytes_s: float
    write_bytes_s: float

    def seconds(self, *, read_bytes: float, written_bytes: float) -> float:
        """Return the seconds to read and to write that much, one after the other."""
        return read_bytes / self.read_bytes_s + written_bytes / self.write_bytes_s


def storage_rates(machine: Machine, model: TimeModel, local_ranks: int) -> StorageRates | None:
    """Return the rates of local storage for each of ``local_ranks`` ranks of one host; None if they are
    unknown.

    If the device is this machine's processor and the rate of its disk was measured, as a file is written and
    read back through the page cache, that counts; else the host's ``storage_bytes_s``, whose low end is the
    rate of writes.
    """
    if machine.device.is_host and model.calibration.disk_bytes_s:
        rate = model.calibration.disk_bytes_s / local_ranks
        return StorageRates(read_bytes_s=rate, write_bytes_s=rate)
    fact = machine.host.storage_bytes_s if machine.host else None
    if fact is None:
        return None
    return StorageRates(read_bytes_s=fact.value / local_ranks, write_bytes_s=fact.bounds[0] / local_ranks)


def _with_offload(
    step: SimulatedStep, trace: Trace, machine: Machine, model: TimeModel, storage: StorageRates | None
) -> SimulatedStep:
    """Return ``step`` with the seconds that compute waits for offloading added: the copies of tensors to host
    memory or disk and back, and reads and writes of state on local storage. They also become its work of the
    "host link" and of "storage". Reads and writes of state are taken to overlap with nothing, as in DeepSpeed
    unless its pipeline_read and pipeline_write are set. ``storage``: the rates of local storage; None only
    for a trace that keeps no state there.
    """
    copy_s = _scale_to_step(trace, trace.offloaded_bytes + trace.restored_bytes) / host_bytes_s(
        machine, model
    )
    copy_s += model.calibration.disk_file_s * _scale_to_step(trace, trace.offloaded_tensors)
    storage_s = 0.0
    if storage is not None:
        read_bytes, written_bytes = trace.storage_read_bytes, trace.storage_written_bytes
        storage_s = storage.seconds(read_bytes=read_bytes, written_bytes=written_bytes)
    added = {name: s for name, s in (("host link", copy_s), ("storage", storage_s)) if s}
    return dataclasses.replace(step, step_s=step.step_s + copy_s + storage_s, busy_s={**step.busy_s, **added})


def _scale_to_step(trace: Trace, traced_quantity: int) -> float:
    """Return ``traced_quantity``, the sum over the traced micro-batches of a step, scaled to all
    micro-batches of the step.
    """
    forwards = sum(s.phase is Phase.FORWARD and s.step == trace.steps - 1 for s in trace.spans)
    return traced_quantity * (forwards + trace.untraced_passes(Phase.FORWARD)) / max(1, forwards)


def host_bytes_s(machine: Machine, model: TimeModel) -> float:
    """Return the bytes/s between one device and its host's memory while all devices of the host copy: the
    lower of ``host.device_bytes_s`` and an equal part of ``host.shared_bytes_s``.

    If the machine has no host or its ``device_bytes_s`` is None, or if the rate of offloading was measured
    here (to disk on a processor, to the host's memory on an accelerator), it is ``model.offload_bytes_s``.
    """
    host = machine.host
    if host is None or host.device_bytes_s is None or model.calibration.disk_bytes_s:
        return model.offload_bytes_s
    devices_per_host = min(machine.devices_in_host, machine.device_count)
    share_bytes_s = (
        host.shared_bytes_s.value / devices_per_host if host.shared_bytes_s else host.device_bytes_s.value
    )
    return min(host.device_bytes_s.value, share_bytes_s)


def _simulate_pipeline(
    pairs: list[tuple[StreamSimulator, Trace]], plan: Plan, pipeline: Use, machine: Machine
) -> SimulatedStep:
    """Return the simulated step of a pipeline. ``pairs``: the traced ranks in the order of their stages; the
    second stands for all ranks between the first and the last.

    Its work by resource and its ``exposed_s`` are those of the traced rank whose forward and backward take
    longest.
    """
    stages, virtual = layout(plan).pipeline, int(pipeline.settings["virtual"])
    kind = str(pipeline.settings["schedule"])
    chunks = virtual if kind == "interleaved" else 1
    if kind.startswith("zero-bubble"):
        kind = "zero-bubble"  # a rank's chunks run one after the other
    micros = max(1, micro_steps(pairs[0][1]) // virtual)  # the last stage's loss is a separate forward
    pieces = [_phase_seconds(p, t, micros) for p, t in pairs]
    stage_pieces = [pieces[0], *[pieces[min(1, len(pieces) - 1)]] * (stages - 2), pieces[-1]]
    forward, backward = ([piece[i] / chunks for piece in stage_pieces] * chunks for i in range(2))
    simulation = simulate(
        kind,
        forward,
        backward,
        micros,
        virtual=chunks,
        weight_s=[_WEIGHT_SHARE * b for b in backward],
        send_s=_send_s(pairs[0][1], plan, machine),
    )
    slowest, trace = max(zip(pieces, pairs, strict=True), key=lambda pair: sum(pair[0][:2]))[1]
    rank_step = slowest.step(trace)
    return dataclasses.replace(
        rank_step,
        step_s=simulation.step_s + max(piece[2] for piece in pieces),
        idle_s=rank_step.idle_s + simulation.bubble_ratio * simulation.step_s,
    )


def micro_steps(trace: Trace) -> int:
    """Return the number of forwards that the traced rank makes in a step, in a pipeline one per chunk and
    micro-batch. Forwards that were not traced count, too; traced ones without operators do not.
    """
    forwards = [s for s in trace.spans if s.phase is Phase.FORWARD and s.step == trace.steps - 1]
    forward_clocks = {o.clock for o in trace.ops if o.phase is Phase.FORWARD}
    forward_count = sum(any(s.start <= clock < s.end for clock in forward_clocks) for s in forwards)
    return forward_count + trace.untraced_passes(Phase.FORWARD)


def _phase_seconds(simulator: StreamSimulator, trace: Trace, micros: int) -> tuple[float, float, float]:
    """Return the seconds of (a micro-batch's forward, its backward, the optimizer's phase) on this rank.
    ``micros``: micro-batches of a step.
    """
    ops = [o for o in trace.ops if o.step == trace.steps - 1]
    seconds: dict[Phase, float] = {Phase.FORWARD: 0.0, Phase.BACKWARD: 0.0, Phase.OPTIMIZER: 0.0}
    for span in trace.last_step_spans:
        if span_ops := [o for o in ops if span.start <= o.clock < span.end]:
            repetitions = 1 + trace.repeated_micro_steps * (span in trace.repeated_spans)
            seconds[span.phase] += repetitions * simulator.simulate(span_ops).step_s
    forward, backward = (seconds[p] / micros for p in (Phase.FORWARD, Phase.BACKWARD))
    return forward, backward, seconds[Phase.OPTIMIZER]


def _send_s(trace: Trace, plan: Plan, machine: Machine) -> float:
    """Return the seconds to send one stage's output to the next stage: those of the largest send in the trace
    or, if it has none, of a send of 0 bytes.
    """
    sizes = [payload_bytes(o) for o in trace.ops if o.op.startswith("c10d.send")]
    rank_distance = plan.ranks // layout(plan).pipeline
    inside = not machine.devices_per_host or rank_distance < machine.devices_per_host
    return float(collective_s("send", max(sizes, default=0), 2, 2 if inside else 1, machine))
