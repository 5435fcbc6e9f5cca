"""Host memory: what all processes of one host need beside their devices, and whether the host has enough.

A host's need is the larger of two moments. During training: tensors that a plan keeps in host memory, once
per rank of the host; DataLoader workers with the batches they hold ready; and the processes themselves.
Before training: the model built in host memory, from which each rank's part goes to its device. One copy is
counted per host, which holds if ranks load one after the other or one of them loads for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from memfit.types.errors import UserError
from memfit.types.machine import Fact, Host, Machine
from memfit.types.plan import Plan
from memfit.types.result import Estimate, Interval
from memfit.types.trace import Category, Trace
from memfit.types.units import format_bytes

_MIB = 2**20
# Resident bytes of one training process without its tensors. On CPU: measured beside the tensors that the
# counting allocator saw, 328 MiB alone and 349 MiB with a process group (torch 2.13). With CUDA: assumed, for
# libraries and the driver's mappings.
_CPU_PROCESS = Interval(value=328 * _MIB, low=250 * _MIB, high=700 * _MIB)
_CPU_GROUP_BYTES = 21 * _MIB
_CUDA_PROCESS = Interval(value=2.5 * 2**30, low=1.0 * 2**30, high=5.0 * 2**30)
# Private bytes of a forked DataLoader worker: 11 MiB measured directly after the fork; what its dataset
# touches is added to that. A spawned worker imports torch again.
_WORKER = Interval(value=64 * _MIB, low=11 * _MIB, high=400 * _MIB)
_READY_BATCHES = 2  # torch.utils.data.DataLoader's prefetch_factor
_PINNED_ROUNDING = 2.0  # the pinned allocator rounds each block up to a power of two
LOADED_IN_PIECES = frozenset({"qlora"})  # quantized tensor by tensor while it is loaded


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostTensors:
    """Tensors of one rank in host memory.

    ``kept_bytes``: during a step. ``building_bytes``: at most, including while the model is built.
    ``model_bytes``: parameters and buffers as built. ``batch_bytes``: its part of a batch.
    """

    kept_bytes: float
    building_bytes: float
    model_bytes: float
    batch_bytes: float

    @staticmethod
    def of(trace: Trace) -> HostTensors:
        batch = sum(
            a.requested_bytes or a.size_bytes
            for a in trace.allocations
            if a.category is Category.INPUT and a.step == trace.steps - 1
        )
        return HostTensors(
            kept_bytes=trace.host_step_bytes,
            building_bytes=trace.host_peak_bytes,
            model_bytes=trace.model_bytes,
            batch_bytes=batch,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Memory of one host with all its ranks.

    ``parts_bytes`` has "offload", "tensors" (on a CPU), "workers" and "processes" during training, and
    "loading" before training, beside the processes.
    """

    bytes: Interval
    parts_bytes: Mapping[str, int]


def ranks_of_host(plan: Plan, machine: Machine) -> int:
    """Return the number of ranks that share one host."""
    return min(plan.ranks, machine.devices_per_host or max(plan.ranks, machine.device_count))


def host_memory(
    tensors: HostTensors, plan: Plan, machine: Machine, *, allocated: Interval, workers: int
) -> HostMemory:
    """Return the memory that a host needs.

    ``allocated`` is a rank's peak, which lies in the same memory on a CPU. ``workers``: data loader workers
    per rank.
    """
    ranks, cpu = ranks_of_host(plan, machine), machine.device.kind == "cpu"
    process = _times(_CPU_PROCESS if cpu else _CUDA_PROCESS, ranks)
    if cpu and plan.ranks > 1:
        process = _plus(process, _exactly(ranks * _CPU_GROUP_BYTES))
    kept = tensors.kept_bytes
    offload = Interval(value=kept, low=kept, high=kept * (_PINNED_ROUNDING if uses_pinned(plan) else 1.0))
    offload = _times(offload, ranks)
    ready = _times(_WORKER, ranks * workers)
    ready = _plus(ready, _exactly(ranks * workers * (_READY_BATCHES + 1) * tensors.batch_bytes))
    own = _times(allocated, ranks) if cpu else _exactly(0.0)
    loading = 0.0
    if not cpu and not any(u.technique in LOADED_IN_PIECES for u in plan.uses):
        loading = max(tensors.building_bytes * (ranks == 1), tensors.model_bytes)
    training = _plus(_plus(offload, ready), own)
    need = Interval(
        value=max(training.value, loading), low=max(training.low, loading), high=max(training.high, loading)
    )
    parts = {
        "offload": offload.value,
        "tensors": own.value,
        "workers": ready.value,
        "processes": process.value,
        "loading": loading,
    }
    return HostMemory(
        bytes=_plus(need, process), parts_bytes={name: int(size) for name, size in parts.items() if size}
    )


def uses_pinned(plan: Plan) -> bool:
    """Return whether some of what the plan keeps on the host may be pinned."""
    names = {u.technique for u in plan.uses}
    return bool(names & {"fsdp2", "zero", "activation-offload"})


def _exactly(value: float) -> Interval:
    return Interval(value=value, low=value, high=value)


def _times(one: Interval, count: float) -> Interval:
    return Interval(value=one.value * count, low=one.low * count, high=one.high * count)


def _plus(one: Interval, other: Interval) -> Interval:
    return Interval(value=one.value + other.value, low=one.low + other.low, high=one.high + other.high)


def with_host_memory(machine: Machine, size_bytes: int) -> Machine:
    """Return the machine with ``size_bytes`` of memory in each host, as given by the user.

    Raises UserError for a CPU.
    """
    if machine.device.kind == "cpu":
        raise UserError("host memory of a CPU is the memory itself", hint="give it as --memory")
    fact = Fact(value=float(size_bytes), source="asked for", date="", kind="measured")
    host = machine.host or Host(name="your host")
    return dataclasses.replace(machine, host=dataclasses.replace(host, memory_bytes=fact))


# -- does the host have enough? ------------------------------------------------------------------


def memory_bytes(machine: Machine) -> float | None:
    """Return the memory of one host in bytes, or None if it is unknown."""
    if machine.device.kind == "cpu":
        return machine.device.memory_bytes.value
    return machine.host.memory_bytes.value if machine.host and machine.host.memory_bytes else None


def host_holds(estimate: Estimate, machine: Machine) -> bool:
    """Return whether the host has the memory that the plan needs.

    If the host's memory is unknown, a plan that keeps tensors there does not fit.
    """
    need, there = estimate.host_bytes, memory_bytes(machine)
    if need is None:
        return True
    if there is None:
        return not estimate.host_parts_bytes.get("offload")
    return need.value <= there


def known_host(machine: Machine) -> tuple[int | None, bool]:
    """Return (bytes of one host, whether they are assumed)."""
    there = memory_bytes(machine)
    known = machine.host.memory_bytes if machine.host else None
    return (None if there is None else int(there)), known is not None and known.kind == "assumed"


def host_line(estimate: Estimate, machine: Machine) -> str:
    """Return the text that says what the plan needs of a host, what the host has, and what to do.

    Returns "" on a CPU, where the cap already covers this memory.
    """
    need, there = estimate.host_bytes, memory_bytes(machine)
    if machine.device.kind == "cpu" or need is None:
        return ""
    ranks = ranks_of_host(estimate.plan, machine)
    needs = f"needs {format_bytes(need.value)} of host memory"
    needs += f" for {ranks} ranks" if ranks > 1 else ""
    say = "give your host's by --host-memory or in a machine file"
    if there is None:
        if estimate.host_parts_bytes.get("offload"):
            return f"{needs}; host memory unknown: does not fit unless the host has as much ({say})"
        return f"host memory unknown: not checked ({needs})"
    assumed = known_host(machine)[1]
    has = f"the host has {format_bytes(there)}{' (assumed)' if assumed else ''}"
    if need.value > there:
        return f"{needs}, {has}: does not fit" + (f" ({say})" if assumed else "")
    if need.high > there:
        return f"{needs} (up to {format_bytes(need.high)} as pinned blocks are rounded up), {has}"
    return f"{needs}, {has}"
