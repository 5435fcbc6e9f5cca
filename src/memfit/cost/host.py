"""Host memory: what all processes of one host need beside their devices, and whether the host has enough.

A host's need is that of the processes themselves plus the larger need of two moments. During training:
tensors that a plan keeps in host memory, once per rank of the host, and DataLoader workers with the batches
they hold ready. Before training: the model built in host memory, from which each rank's part goes to its
device. One copy is counted per host, which holds if ranks load one after the other or one of them loads for
all. On a CPU, all tensors are in the host's memory.

A host has enough if it has the upper end of the need, as a device has. What is pinned comes from torch's
caching host allocator (ATen/core/CachingHostAllocator.h), which rounds each block up to a power of two and
keeps freed blocks for later ones of the same power: `HostTensors.pinned_bytes` is computed by this rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from memfit.cost.device_overhead import exceeds_probability
from memfit.techniques.registry import technique
from memfit.types.device_kind import device_kind
from memfit.types.errors import UserError
from memfit.types.machine import Fact, Host, Machine
from memfit.types.plan import Plan
from memfit.types.result import Estimate, Interval
from memfit.types.trace import Category, Trace
from memfit.types.units import GIB, MIB, format_bytes

# Resident bytes of one training process without its tensors. On CPU: measured beside the tensors that the
# counting allocator saw, 328 MiB alone and 349 MiB with a process group (torch 2.13). With CUDA: assumed, for
# libraries and the driver's mappings.
_CPU_PROCESS = Interval(value=328 * MIB, low=250 * MIB, high=700 * MIB)
_CPU_GROUP_BYTES = 21 * MIB
_CUDA_PROCESS = Interval(value=2.5 * GIB, low=1.0 * GIB, high=5.0 * GIB)
# Other accelerators: from a process without libraries for devices to one with those of CUDA.
_OTHER_PROCESS = dataclasses.replace(_CUDA_PROCESS, low=_CPU_PROCESS.low)
# Private bytes of a forked DataLoader worker: 11 MiB measured directly after the fork; what its dataset
# touches is added to that. A spawned worker imports torch again.
_WORKER = Interval(value=64 * MIB, low=11 * MIB, high=400 * MIB)
_READY_BATCHES = 2  # torch.utils.data.DataLoader's prefetch_factor
_PINNED_ROUNDING = 2.0  # the most that a block can grow by; used where the sizes of blocks are unknown


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostTensors:
    """What one rank's tensors need of host memory, in bytes, beside its device.

    ``kept_bytes``: the most at once from the first forward pass on, such as offloaded optimizer state.
    ``optimizer_bytes``: the most at once of those tensors that the optimizer's step makes, which are never
    pinned; 0 if unknown. ``pinned_bytes``: what a pool of pinned memory takes for all other kept tensors;
    None if unknown. ``is_sketch``: the plan was not traced, and ``kept_bytes`` is an upper bound.
    ``building_bytes``: the most at once at any time, also while the model is built. ``model_bytes``:
    parameters and buffers as the job builds them. ``batch_bytes``: the rank's inputs of one step, of which
    each DataLoader worker holds several.
    """

    kept_bytes: float
    building_bytes: float
    model_bytes: float
    batch_bytes: float
    optimizer_bytes: float = 0.0
    pinned_bytes: float | None = None
    is_sketch: bool = False

    @staticmethod
    def of(trace: Trace) -> HostTensors:
        batch = sum(
            a.requested_bytes or a.size_bytes
            for a in trace.allocations
            if a.category is Category.INPUT and a.step == trace.steps - 1
        )
        pinned_bytes = sum(  # each block rounded up to a power of two
            count * (1 << (size - 1).bit_length()) for size, count in trace.host_blocks_bytes
        )
        return HostTensors(
            kept_bytes=trace.host_step_bytes,
            optimizer_bytes=trace.host_optimizer_bytes,
            pinned_bytes=pinned_bytes if trace.host_blocks_bytes else None,
            building_bytes=trace.host_peak_bytes,
            model_bytes=trace.model_bytes,
            batch_bytes=batch,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Memory that one host needs for all its ranks, in bytes.

    ``parts_bytes``: the parts that are not zero. "processes": the processes without tensors; "offload":
    tensors that the plan keeps in host memory; "tensors": all other tensors, on a CPU only; "workers":
    DataLoader workers; "loading": the model while it is built, before training. ``bytes``: "processes" plus
    the larger of "loading" and the sum of "offload", "tensors" and "workers", with its range.
    """

    bytes: Interval
    parts_bytes: Mapping[str, int]


def host_process_bytes(ranks: int, machine: Machine, *, workers: int) -> float:
    """Return the upper end of the bytes that the processes of one host need beside tensors and batches:
    those of its ranks and of the ``workers`` DataLoader workers of each. ``ranks``: number of ranks on all
    hosts."""
    tensors = HostTensors(kept_bytes=0.0, building_bytes=0.0, model_bytes=0.0, batch_bytes=0.0)
    nothing = Interval.exactly(0.0)
    return host_memory(tensors, Plan(ranks=ranks), machine, allocated=nothing, workers=workers).bytes.high


def ranks_of_host(plan: Plan, machine: Machine) -> int:
    """Return how many ranks of the plan run in one host: all if the machine is one host, else at most
    ``machine.devices_per_host``.
    """
    return min(plan.ranks, machine.devices_per_host or max(plan.ranks, machine.device_count))


def host_memory(
    tensors: HostTensors, plan: Plan, machine: Machine, *, allocated: Interval, workers: int
) -> HostMemory:
    """Return the memory that one host needs for all its ranks.

    ``tensors``: of one rank. ``allocated``: the peak of one rank's tensors on its device; it counts only on
    a CPU, whose memory is the host's. ``workers``: number of DataLoader workers of each rank. Building the
    model in host memory counts on accelerators only: with one rank in the host the most at once while it is
    built, with several one copy of the model. It does not count for plans that load the model in pieces,
    such as with qlora.

    If the plan's techniques may pin what they keep in host memory, the value and the upper end count it as
    pinned. If it is not known how large its blocks are, only the upper end does, with the largest rounding.
    """
    ranks, cpu = ranks_of_host(plan, machine), machine.device.is_host
    on_device = _CUDA_PROCESS if device_kind(machine.device.kind).reserves_as_cuda else _OTHER_PROCESS
    process = (_CPU_PROCESS if cpu else on_device).scaled(ranks)
    if cpu and plan.ranks > 1:
        process += Interval.exactly(ranks * _CPU_GROUP_BYTES)
    offload = (Interval.exactly(tensors.kept_bytes) if cpu else _offload(tensors, plan)).scaled(ranks)
    ready_bytes = ranks * workers * (_READY_BATCHES + 1) * tensors.batch_bytes
    workers_memory = _WORKER.scaled(ranks * workers) + Interval.exactly(ready_bytes)
    tensor_memory = allocated.scaled(ranks) if cpu else Interval.exactly(0.0)
    loading_bytes = 0.0
    if not cpu and not any(technique(u.technique).loaded_in_pieces for u in plan.uses):
        loading_bytes = max(tensors.building_bytes * (ranks == 1), tensors.model_bytes)
    training_memory = offload + workers_memory + tensor_memory
    need = Interval(
        value=max(training_memory.value, loading_bytes),
        low=max(training_memory.low, loading_bytes),
        high=max(training_memory.high, loading_bytes),
    )
    parts = {
        "offload": offload.value,
        "tensors": tensor_memory.value,
        "workers": workers_memory.value,
        "processes": process.value,
        "loading": loading_bytes,
    }
    return HostMemory(
        bytes=need + process, parts_bytes={name: int(size) for name, size in parts.items() if size}
    )


def _offload(tensors: HostTensors, plan: Plan) -> Interval:
    """Return the bytes of host memory that the tensors which a rank keeps there take beside an accelerator.
    Blocks that may be pinned count as rounded up to a power of two; if their sizes are unknown, the upper end
    counts them twice, and the value once."""
    kept_bytes, optimizer_bytes = tensors.kept_bytes, tensors.optimizer_bytes
    pinning = [(technique(u.technique), u.settings) for u in plan.uses]
    pinning = [(t, settings) for t, settings in pinning if t.pins_host_memory]
    if not pinning or tensors.is_sketch:
        return Interval.exactly(kept_bytes)
    if tensors.pinned_bytes is None or not all(t.pins_traced_blocks(settings) for t, settings in pinning):
        most_bytes = optimizer_bytes + (kept_bytes - optimizer_bytes) * _PINNED_ROUNDING
        return Interval(value=kept_bytes, low=kept_bytes, high=most_bytes)
    most_bytes = max(kept_bytes, optimizer_bytes + tensors.pinned_bytes)
    return Interval(value=most_bytes, low=kept_bytes, high=most_bytes)


def with_host_memory(machine: Machine, size_bytes: int) -> Machine:
    """Return a copy of the machine in which each host has ``size_bytes`` of memory, as a figure that the user
    gave. A machine without a host gets one with the name "your host".

    Raises UserError if the machine's device is a CPU.
    """
    if machine.device.is_host:
        raise UserError(
            "host memory (--host-memory, or the argument host_memory) cannot be set if the device is a CPU, "
            "whose own memory is the memory of the host",
            hint="leave it out; on the command line, --memory limits the memory of the CPU",
        )
    fact = Fact(value=float(size_bytes), source="asked for", date="", kind="measured")
    host = machine.host or Host(name="your host")
    return dataclasses.replace(machine, host=dataclasses.replace(host, memory_bytes=fact))


# -- does the host have enough? ------------------------------------------------------------------


def _memory_fact(machine: Machine) -> Fact | None:
    if machine.device.is_host:
        return machine.device.memory_bytes
    return machine.host.memory_bytes if machine.host else None


def memory_bytes(machine: Machine) -> float | None:
    """Return the bytes of one host's memory, or None if unknown. On a CPU they are the device's memory."""
    fact = _memory_fact(machine)
    return None if fact is None else fact.value


def host_holds(estimate: Estimate, machine: Machine) -> bool:
    """Return whether the memory of a host of this machine is at least the upper end of what the plan needs
    there. If the host's memory is unknown, it is False for a plan that keeps tensors there and True for any
    other; True also if the need is unknown."""
    available_bytes = memory_bytes(machine)
    known_bytes = None if available_bytes is None else int(available_bytes)
    return not dataclasses.replace(estimate, host_memory_bytes=known_bytes).lacks_host_memory


def oom_probability(on_device: float | None, host: HostMemory, machine: Machine) -> float | None:
    """Return the probability, from 0 to 1, that a plan does not fit the device or the host.

    ``on_device``: the probability that it does not fit the device. Device and host are taken as independent.
    On a CPU the result is ``on_device``, because its memory is the host's. If the host's memory is unknown,
    the result is None for a plan that keeps tensors there, and ``on_device`` for any other. The result is
    None if ``on_device`` is None.
    """
    available_bytes = memory_bytes(machine)
    if on_device is None or machine.device.is_host:
        return on_device
    if available_bytes is None:
        return None if host.parts_bytes.get("offload") else on_device
    return 1 - (1 - on_device) * (1 - exceeds_probability(host.bytes, available_bytes))


def known_host(machine: Machine) -> tuple[int | None, bool]:
    """Return (bytes of one host's memory, or None if they are unknown; whether that figure is marked as
    assumed). On a CPU both are those of the device's memory.
    """
    fact = _memory_fact(machine)
    return (None, False) if fact is None else (int(fact.value), fact.kind == "assumed")


def host_line(estimate: Estimate, machine: Machine) -> str:
    """Return a text for reports: what the plan needs of one host's memory, what the host has, and that the
    plan does not fit if so. Example: "needs up to 300 GiB of host memory for 8 ranks (280 GiB expected), the
    host has 256 GiB: does not fit".

    If the host's memory is unknown, the text says that the plan does not fit unless the host has that much,
    for a plan that keeps tensors there, or that it was not checked, for any other. If a plan does not fit
    because the memory is unknown or only assumed, the text also says how to give it. Returns "" if the need
    is unknown, and on a CPU, where the memory cap already covers this memory.
    """
    need, available_bytes = estimate.host_bytes, memory_bytes(machine)
    need_bytes = estimate.needed_host_bytes
    if machine.device.is_host or need is None or need_bytes is None:
        return ""
    ranks = ranks_of_host(estimate.plan, machine)
    expected, most = format_bytes(need.value), format_bytes(need_bytes)
    need_text = f"needs {expected if most == expected else f'up to {most}'} of host memory"
    need_text += f" for {ranks} ranks" if ranks > 1 else ""
    need_text += "" if most == expected else f" ({expected} expected)"
    hint = "give your host's memory with --host-memory or in a machine file"
    if available_bytes is None:
        if estimate.host_parts_bytes.get("offload"):
            return f"{need_text}; host memory unknown: does not fit unless the host has that much ({hint})"
        return f"host memory unknown: not checked ({need_text})"
    is_assumed = known_host(machine)[1]
    host_text = f"the host has {format_bytes(available_bytes)}{' (assumed)' if is_assumed else ''}"
    if need_bytes > available_bytes:
        return f"{need_text}, {host_text}: does not fit" + (f" ({hint})" if is_assumed else "")
    return f"{need_text}, {host_text}"
