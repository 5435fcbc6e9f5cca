"""Step time of a plan from its distinct ranks: one rank simulated on its streams, or stages in a pipeline's
order.

Not modelled: loading data, ranks that are slower at times, and host synchronisation on tensor values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from memfit.cost.collectives import collective_s
from memfit.cost.op_time import TimeModel
from memfit.cost.schedules import simulate
from memfit.cost.stream_simulator import Played, Player, payload_bytes
from memfit.techniques.rank_mesh import layout
from memfit.types.machine import Machine
from memfit.types.plan import Plan, Use
from memfit.types.trace import Phase, Trace

_WEIGHT_SHARE = 0.5  # share of backward for weight gradients, in a layer of matrix products


def played(traces: Sequence[Trace], plan: Plan, machine: Machine, model: TimeModel) -> Played | None:
    """Simulate the plan's step.

    ``traces``: one rank of each kind (`Layout.distinct_ranks`), in order. Returns None if it is not modelled:
    several ranks on processors, whose cores they share.
    """
    if plan.ranks > 1 and machine.device.kind == "cpu":
        return None
    pairs = [(Player(model=model, machine=machine, members=t.members), t) for t in traces]
    used = plan.get("pipeline")
    if used is not None:
        return _piped(pairs, plan, used, machine)
    each = [_with_offload(p.step(t), t, machine, model) for p, t in pairs]
    return max(each, key=lambda found: found.step_s)


def sketched_s(compute_s: float, plan: Plan, parameters: int, machine: Machine, micros: int) -> float | None:
    """Return the step seconds including what replicas or shards of the model exchange.

    Half of the compute time hides communication. This is accurate enough to decide which plans are worth a
    trace. Returns None if several ranks are not modelled.
    """
    if plan.ranks == 1:
        return compute_s
    if machine.device.kind == "cpu":
        return None
    near = min(plan.ranks, machine.devices_per_host or machine.device_count)
    narrow = plan.get("bf16-parameters") or any(u.settings.get("precision") == "bf16" for u in plan.uses)
    size = parameters * (2.0 if narrow else 4.0)

    def sent(kind: str) -> float:
        return float(collective_s(kind, size, plan.ranks, near, machine))

    shards = plan.get("fsdp2") or plan.get("zero")
    if shards is None:
        exchanged = sent("all_reduce")
    else:
        whole = shards.settings.get("reshard") is False or shards.settings.get("stage", 3) != 3
        exchanged = sent("all_gather") * (1 if whole else 2 * micros) + sent("reduce_scatter")
    return compute_s + max(0.0, exchanged - compute_s / 2)


def _with_offload(found: Played, trace: Trace, machine: Machine, model: TimeModel) -> Played:
    """Add the copies that leave the device and come back, for which compute waits."""
    more_s = _whole(trace, trace.offloaded_bytes + trace.restored_bytes) / host_bytes_s(machine, model)
    more_s += model.calibration.disk_file_s * _whole(trace, trace.offloaded_tensors)
    busy = {**found.busy_s, "host link": more_s} if more_s else found.busy_s
    return dataclasses.replace(found, step_s=found.step_s + more_s, busy_s=busy)


def _whole(trace: Trace, played: int) -> float:
    """Scale a quantity of the traced micro-batches to all micro-batches of a step."""
    forwards = sum(s.phase is Phase.FORWARD and s.step == trace.steps - 1 for s in trace.spans)
    return played * (forwards + trace.unplayed(Phase.FORWARD)) / max(1, forwards)


def host_bytes_s(machine: Machine, model: TimeModel) -> float:
    """Return the bytes/s between one device and its host's memory while all devices of the host copy."""
    host = machine.host
    if host is None or host.device_bytes_s is None or model.calibration.disk_bytes_s:
        return model.offload_bytes_s
    each = min(machine.devices_per_host or machine.device_count, machine.device_count)
    shared = host.shared_bytes_s.value / each if host.shared_bytes_s else host.device_bytes_s.value
    return min(host.device_bytes_s.value, shared)


def _piped(pairs: list[tuple[Player, Trace]], plan: Plan, used: Use, machine: Machine) -> Played:
    """Simulate a pipeline. The second rank represents all ranks between the first and the last."""
    stages, virtual = layout(plan).pipeline, int(used.settings["virtual"])
    kind = str(used.settings["schedule"])
    chunks = virtual if kind == "interleaved" else 1
    if kind.startswith("zero-bubble"):
        kind = "zero-bubble"  # a rank's chunks run one after the other
    micros = max(1, micro_steps(pairs[0][1]) // virtual)  # the last stage's loss is a separate forward
    pieces = [_pieces(p, t, micros) for p, t in pairs]
    order = [pieces[0], *[pieces[min(1, len(pieces) - 1)]] * (stages - 2), pieces[-1]]
    forward, backward = ([one[i] / chunks for one in order] * chunks for i in range(2))
    line = simulate(
        kind,
        forward,
        backward,
        micros,
        virtual=chunks,
        weight_s=[_WEIGHT_SHARE * b for b in backward],
        send_s=_send_s(pairs[0][1], plan, machine),
    )
    slowest, trace = max(zip(pieces, pairs, strict=True), key=lambda both: sum(both[0][:2]))[1]
    whole = slowest.step(trace)
    return dataclasses.replace(
        whole,
        step_s=line.step_s + max(one[2] for one in pieces),
        idle_s=whole.idle_s + line.bubble_ratio * line.step_s,
    )


def micro_steps(trace: Trace) -> int:
    """Return the number of forwards in a step: one per chunk and micro-batch."""
    forwards = [s for s in trace.spans if s.phase is Phase.FORWARD and s.step == trace.steps - 1]
    worked = {o.clock for o in trace.ops if o.phase is Phase.FORWARD}
    seen = sum(any(s.start <= clock < s.end for clock in worked) for s in forwards)
    return seen + trace.unplayed(Phase.FORWARD)


def _pieces(player: Player, trace: Trace, micros: int) -> tuple[float, float, float]:
    """Return seconds of (a micro-batch's forward, its backward, the rest of the step) on this rank."""
    ops = [o for o in trace.ops if o.step == trace.steps - 1]
    seconds: dict[Phase, float] = {Phase.FORWARD: 0.0, Phase.BACKWARD: 0.0, Phase.OPTIMIZER: 0.0}
    for span in trace.spans:
        inside = [o for o in ops if span.start <= o.clock < span.end]
        if inside and span.step == trace.steps - 1 and span.phase is not Phase.SETUP:
            times = 1 + trace.repeated_micro_steps * (span in trace.repeated_spans)
            seconds[span.phase] += times * player.play(inside).step_s
    forward, backward = (seconds[p] / micros for p in (Phase.FORWARD, Phase.BACKWARD))
    return forward, backward, seconds[Phase.OPTIMIZER]


def _send_s(trace: Trace, plan: Plan, machine: Machine) -> float:
    """Return the seconds to send one stage's output to the next."""
    sizes = [payload_bytes(o) for o in trace.ops if o.op.startswith("c10d.send")]
    apart = plan.ranks // layout(plan).pipeline
    inside = not machine.devices_per_host or apart < machine.devices_per_host
    return float(collective_s("send", max(sizes, default=0), 2, 2 if inside else 1, machine))
