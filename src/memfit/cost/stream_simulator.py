"""Simulate one rank's step on its streams: compute, each communication stream, and the host that issues the
calls.

A call starts when it is issued, its stream is free, and what its stream waits for is done; a collective also
waits for its links. While a collective runs, concurrent kernels have fewer multiprocessors. Other ranks are
assumed to be equally fast, so no rank waits for another at the start of a collective.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memfit.cost.collectives import KINDS, collective_s
from memfit.cost.kernel_model import bound_by
from memfit.cost.op_time import COLLECTIVES, FUSED, TimeModel
from memfit.types.machine import Machine
from memfit.types.trace import OpCall, Phase, Trace

ASSUMED_CHANNELS = 16  # multiprocessors that a running collective uses, if the catalog has no count
ASSUMED_HOST_BYTES_S = 200e9  # an optimizer on two sockets with eight channels each: half of their bandwidth
FASTER = 0.9  # factor on a resource's time to test whether it is the bottleneck
_SIMULATED_AGAIN = 2  # micro-steps that are simulated; the rest are extrapolated linearly

_KINDS = {
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "broadcast": "broadcast",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "scatter": "broadcast",
    "reduce": "broadcast",
}
_ITEM_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedStep:
    """Result of a simulated step, in seconds. With a pipeline, ``step_s`` is that of all ranks.

    ``busy_s``: seconds of work by resource: "matmul", "attention", "memory", "link" (inside a host),
    "network", "host" (launching operators), "host memory" (work of the host's processor), "host link"
    (offloading of tensors) and "storage" (state on local storage). Resources without work may be absent.
    ``exposed_s``: seconds in which compute waits for communication. ``idle_s``: other gaps in compute.
    """

    step_s: float
    busy_s: Mapping[str, float]
    exposed_s: float
    idle_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class TimedCall:
    """An operator call with the seconds of its work. ``issue_s``: seconds that the host takes to launch it.
    ``resource``: what its work keeps busy, a key of ``SimulatedStep.busy_s``; "" for a wait for another
    stream.
    """

    op: OpCall
    seconds: float
    issue_s: float
    resource: str


@dataclasses.dataclass(kw_only=True)
class StreamSimulator:
    """Simulates steps of one rank on one machine from its trace.

    ``members``: the ranks of each process group, by its name. ``work_factors``: factors on the seconds of
    work, by resource as in ``SimulatedStep.busy_s``; without an entry 1. ``blocking``: whether the host waits
    for every kernel before it launches the next (CUDA_LAUNCH_BLOCKING=1). ``kernel_slowdown``: factor, at
    least 1, on the seconds of a kernel while a collective runs beside it.
    """

    model: TimeModel
    machine: Machine
    members: Mapping[str, Sequence[int]]
    work_factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    blocking: bool = False

    def __post_init__(self) -> None:
        device = self.machine.device
        channels = device.nccl_channels.value if device.nccl_channels else ASSUMED_CHANNELS
        multiprocessors = self.model.kernels.multiprocessors if self.model.kernels else math.inf
        # slowdown of a kernel beside a collective
        self.kernel_slowdown = 1 / (1 - min(0.5, channels / multiprocessors))
        self._times: dict[tuple[str, Phase, str, str], tuple[float, float, str]] = {}

    def time_call(self, op: OpCall) -> TimedCall:
        key = (op.signature, op.phase, op.group, op.stream)
        if key not in self._times or op.waits:
            self._times[key] = self._time_call(op)
        return TimedCall(op, *self._times[key])

    def _time_call(self, op: OpCall) -> tuple[float, float, str]:
        if op.waits:
            return 0.0, 0.0, ""
        if collective_size(op)[0]:
            seconds, resource = self._collective(op)
        elif op.stream == "host":
            seconds, resource = op.moved_bytes * self._host_ranks() / ASSUMED_HOST_BYTES_S, "host memory"
        else:
            seconds, resource = self.model.op_s(op), bound_by(op, self.model.kernels)
        issue_s = self.model.issue_s(op) * self.work_factors.get("host", 1.0)
        return seconds * self.work_factors.get(resource, 1.0), issue_s, resource

    def _host_ranks(self) -> int:
        return max(1, min(self.machine.devices_in_host, self.machine.device_count))

    def _collective(self, op: OpCall) -> tuple[float, str]:
        kind, size_bytes, *placement = collective_size(op)
        if placement:  # a synthetic operator gives its number of ranks and how many of them share a host
            rank_count, local_ranks = placement
            seconds = collective_s(kind, size_bytes, rank_count, local_ranks, self.machine)
            return float(seconds), "link" if local_ranks >= rank_count else "network"
        ranks = self.members.get(op.group, ())
        if len(ranks) < 2:
            return 0.0, "link"
        ranks_per_host = self.machine.devices_per_host or max(ranks) + 1
        local_ranks = max(Counter(r // ranks_per_host for r in ranks).values())
        seconds = collective_s(kind, size_bytes, len(ranks), local_ranks, self.machine)
        return float(seconds), "link" if local_ranks == len(ranks) else "network"

    # -- simulating -----------------------------------------------------------------------------------

    def simulate(self, ops: Iterable[OpCall]) -> SimulatedStep:
        return _Streams(self.kernel_slowdown, self.blocking).run([self.time_call(op) for op in ops])

    def step(self, trace: Trace) -> SimulatedStep:
        """Return the simulation of the last traced step, without setup, with all its micro-steps. Those that
        were not traced are extrapolated linearly from those that were.
        """
        repetitions = trace.repeated_micro_steps
        if trace.repeated_spans:  # a pipeline, whose phases follow its schedule
            whole_step, spans = self.simulate(trace.last_step_ops), trace.repeated_spans
            span_steps = [
                self.simulate(o for o in trace.last_step_ops if s.start <= o.clock < s.end) for s in spans
            ]
            return _add_steps(whole_step, span_steps, repetitions)
        before, micro, after = split(trace)
        if repetitions <= _SIMULATED_AGAIN:
            return self.simulate([*before, *micro * (repetitions + 1), *after])
        shorter, longer = (
            self.simulate([*before, *micro * (n + 1), *after])
            for n in (_SIMULATED_AGAIN - 1, _SIMULATED_AGAIN)
        )
        extra_steps = repetitions - _SIMULATED_AGAIN
        return _add_steps(_add_steps(longer, [longer], extra_steps), [shorter], -extra_steps)

    def bottleneck(self, trace: Trace) -> dict[str, float]:
        """Return for each resource with work how many seconds shorter the step would be if the work of that
        resource took a tenth less time, largest first.
        """
        base = self.step(trace)
        saved_s = {}
        for resource in [*base.busy_s]:
            faster_simulator = dataclasses.replace(self, work_factors={**self.work_factors, resource: FASTER})
            saved_s[resource] = base.step_s - faster_simulator.step(trace).step_s
        return dict(sorted(saved_s.items(), key=lambda kv: -kv[1]))


def _add_steps(base: SimulatedStep, additions: Sequence[SimulatedStep], count: int) -> SimulatedStep:
    """Return ``base`` with the seconds of each of ``additions`` added ``count`` times; a negative count
    subtracts them.
    """
    busy_s = {k: v + count * sum(m.busy_s.get(k, 0.0) for m in additions) for k, v in base.busy_s.items()}
    return SimulatedStep(
        step_s=base.step_s + count * sum(m.step_s for m in additions),
        busy_s=busy_s,
        exposed_s=base.exposed_s + count * sum(m.exposed_s for m in additions),
        idle_s=base.idle_s + count * sum(m.idle_s for m in additions),
    )


class _Streams:
    """State of the simulation of one rank's step, in seconds from its start: until when the host has launched
    all calls so far (``issued``), and when each stream (``free``) and each kind of link (``links``) is free.
    """

    def __init__(self, kernel_slowdown: float, blocking: bool) -> None:
        self.kernel_slowdown, self.blocking = kernel_slowdown, blocking
        self.issued = self.exposed = self.idle = 0.0
        self.free: dict[str, float] = defaultdict(float)
        self.links: dict[str, float] = defaultdict(float)
        self.ends: dict[str, list[float]] = defaultdict(list)
        self.busy: dict[str, float] = defaultdict(float)
        # (start, end) of the collectives that may still be running
        self.running_collectives: list[tuple[float, float]] = []

    def run(self, items: Sequence[TimedCall]) -> SimulatedStep:
        phase = Phase.FORWARD
        for (next_phase, times), group in itertools.groupby(items, lambda x: (x.op.phase, x.op.times)):
            if phase is Phase.BACKWARD and next_phase is not phase:
                self._join()
            phase = next_phase
            self._repeat(list(group), times)
        self._join()
        return SimulatedStep(
            step_s=max(self.issued, *self.free.values(), 0.0),
            busy_s=dict(self.busy),
            exposed_s=self.exposed,
            idle_s=self.idle,
        )

    def _repeat(self, items: Sequence[TimedCall], times: int) -> None:
        """Run these calls ``times`` times, one after the other. Once two passes on the compute stream alone
        take equally long, further ones are added without simulating them, as long as the host stays ahead of
        the stream.
        """
        is_simple = not any(x.op.stream or x.op.waits is not None for x in items)
        change: list[float] = []
        while times:
            before = self._levels()
            for call in items:
                if call.op.waits is not None:
                    self._wait(call.op.stream, *call.op.waits)
                else:
                    self._start(call)
            times -= 1
            last_change, change = change, [b - a for a, b in zip(before, self._levels(), strict=False)]
            if times > 1 and is_simple and not self.running_collectives and _close(change, last_change):
                passes = self._equal_passes(change[0], change[1], times - 1)
                self._add_passes(change, passes)
                times -= passes

    def _levels(self) -> list[float]:
        return [self.issued, self.free[""], self.exposed, self.idle, *self.busy.values()]

    def _equal_passes(self, issued_s: float, busy_s: float, at_most: int) -> int:
        """Return how many more passes can be added before the host, which is ahead of the compute stream, is
        overtaken by it; at most ``at_most``. ``issued_s``, ``busy_s``: seconds of host and stream per
        pass."""
        ahead_s = self.free[""] - self.issued  # how far the host is ahead
        if busy_s >= issued_s or _close([busy_s], [issued_s]):
            return at_most
        return min(at_most, max(0, int(ahead_s / (issued_s - busy_s)) - 1))

    def _add_passes(self, change: Sequence[float], passes: int) -> None:
        self.issued += passes * change[0]
        self.free[""] += passes * change[1]
        self.exposed += passes * change[2]
        self.idle += passes * change[3]
        for resource, seconds in zip(self.busy, change[4:], strict=True):
            self.busy[resource] += passes * seconds

    def _join(self) -> None:
        """Make the compute stream wait for the last call of every other stream, because all gradients must be
        complete at the end of backward, and all work at the end of the step.
        """
        for stream, ends in list(self.ends.items()):
            if stream and ends:
                self._until(ends[-1])

    def _wait(self, stream: str, other_stream: str, lag: int) -> None:
        ends = self.ends[other_stream]
        if len(ends) > lag:
            end = ends[len(ends) - lag - 1]
            if stream:
                self.free[stream] = max(self.free[stream], end)
            else:
                self._until(end)

    def _until(self, end: float) -> None:
        ready = max(self.free[""], self.issued)
        self.exposed += max(0.0, end - ready)
        self.free[""] = max(self.free[""], end)

    def _start(self, call: TimedCall) -> None:
        op, seconds, resource = call.op, call.seconds, call.resource
        self.issued += call.issue_s
        self.busy["host"] += call.issue_s
        self.busy[resource] += seconds
        start = max(self.free[op.stream], self.issued)
        if op.stream.startswith("group"):
            start = max(start, self.free[""])
        if resource in ("link", "network"):
            start = max(start, self.links[resource])
            self.links[resource] = start + seconds
            if op.stream:
                self.running_collectives.append((start, start + seconds))
            else:
                self.exposed += seconds
        elif not op.stream:
            self.idle += max(0.0, start - max(self.free[""], 0.0))
            seconds += self._slowdown_s(start, seconds)
        if op.stream == "host":
            start = max(start, self.free[""])
            self.issued = self.free[""] = start + seconds
        self.free[op.stream] = start + seconds
        self.ends[op.stream].append(start + seconds)
        if self.blocking:
            self.issued = max(self.issued, start + seconds)

    def _slowdown_s(self, start: float, seconds: float) -> float:
        """Return by how many seconds a kernel, which starts at ``start`` and would take ``seconds`` alone,
        takes longer because collectives run at the same time; 0 if none does.
        """
        if not self.running_collectives:
            return 0.0
        self.running_collectives = [f for f in self.running_collectives if f[1] > start]
        end = start + seconds
        overlap_s = sum(
            max(0.0, min(end, other_end) - max(start, other_start))
            for other_start, other_end in self.running_collectives
        )
        return min(overlap_s, seconds) * (self.kernel_slowdown - 1)


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in zip(one, other, strict=True)
    )


def split(trace: Trace) -> tuple[list[OpCall], list[OpCall], list[OpCall]]:
    """Return the operators of the last traced step in three lists: before its last micro-step, of that
    micro-step, and after it. A micro-step is the forward and the backward of one micro-batch. Setup is left
    out.

    If the step has no forward or no backward, all operators are in the third list.
    """
    ops, spans = trace.last_step_ops, trace.last_step_spans
    starts = [s.start for s in spans if s.phase is Phase.FORWARD]
    ends = [s.end for s in spans if s.phase is Phase.BACKWARD]
    start, end = (starts[-1], ends[-1]) if starts and ends else (0, 0)
    return (
        [o for o in ops if o.clock < start],
        [o for o in ops if start <= o.clock < end],
        [o for o in ops if o.clock >= end],
    )


def collective_size(op: OpCall) -> tuple[Any, ...]:
    """Return (``kind``, ``size_bytes``) of a collective, as `collective_s` takes them; a scatter and a reduce
    to one rank count as "broadcast". ("", 0) for other operators, for sends, and for collectives that
    `collective_s` does not model.

    For a synthetic collective (techniques/synthetic_kernel.py) the result is (``kind``, ``size_bytes``,
    number of ranks, how many of them are in each host).
    """
    if op.op.startswith(FUSED):
        _, args, _ = json.loads(op.signature)
        return (args[3], *args[4]) if args[3] in KINDS else ("", 0)
    return _collective_of(op.signature) if op.op.startswith(COLLECTIVES) else ("", 0)


def payload_bytes(op: OpCall) -> int:
    """Return the bytes that a point-to-point send (c10d.send) transfers: those of its first argument, a list
    of tensors."""
    return _bytes(json.loads(op.signature)[1][0])


@functools.lru_cache(maxsize=1 << 14)
def _collective_of(signature: str) -> tuple[str, int]:
    name, args, _ = json.loads(signature)
    base = name.split(".")[1].strip("_").removesuffix("_base").removesuffix("_into_tensor")
    base = (
        base.removesuffix("_coalesced").removesuffix("_tensor").removesuffix("_single").removesuffix("_base")
    )
    kind = next((k for start, k in _KINDS.items() if base.startswith(start)), "")
    sizes = [_bytes(a) for a in args[:2]]
    if not kind or not sizes:
        return "", 0
    if name.startswith("_c10d_functional") and kind == "all_gather":
        return kind, sizes[0] * next((a for a in args[1:] if isinstance(a, int)), 1)
    if name.startswith("_c10d_functional") and kind == "all_to_all":  # (input, rows received, rows sent)
        received, sent = (sum(a) if isinstance(a, list) else 0 for a in args[1:3])
        return kind, sizes[0] * max(received, sent) // max(1, sent) if sent else sizes[0]
    takes_largest = kind in ("all_gather", "reduce_scatter", "all_to_all") and len(sizes) > 1
    return kind, max(sizes) if takes_largest else sizes[0]


def _bytes(value: Any) -> int:
    """Return the bytes of a tensor in a signature, {"t": [shape, strides, dtype, ...]}, or of all tensors in
    a list; 0 for anything else.
    """
    if isinstance(value, list):
        return sum(map(_bytes, value))
    if not isinstance(value, dict) or "t" not in value:
        return 0
    shape, _, dtype = value["t"][:3]
    digits = "".join(c for c in dtype.partition("_")[0] if c.isdigit())
    return int(math.prod(shape)) * _ITEM_BYTES.get(digits, 1 if "8" in digits else 2)
