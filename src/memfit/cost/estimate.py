"""Combine a Trace and a Machine into one Estimate, with intervals and the basis of each figure."""

from __future__ import annotations

import dataclasses
import math

from memfit.cost.cuda_workspaces import with_temporaries
from memfit.cost.device_overhead import with_workspaces
from memfit.cost.host import HostTensors, host_memory, known_host, oom_probability, ranks_of_host
from memfit.cost.memory import MemoryProfile, memory_profile, step_ops
from memfit.cost.memory_estimate import (
    ASSUMED_RESERVED_RATIO,
    UNKNOWN_FOOTPRINT,
    UNKNOWN_FOOTPRINT_HERE,
    footprint,
    sketch_footprint,
)
from memfit.cost.money import bill, hosts_w
from memfit.cost.op_time import TimeModel, step_basis
from memfit.cost.step_time import simulate_step
from memfit.cost.step_time_calibration import factor
from memfit.cost.stream_simulator import SimulatedStep
from memfit.cost.workspaces import UnprobedWorkspaces, find_unprobed
from memfit.techniques.rank_mesh import layout
from memfit.types.machine import Calibration, Machine
from memfit.types.plan import Plan
from memfit.types.result import Estimate, Interval
from memfit.types.trace import Category, Trace

# Half-widths of the intervals. Memory: twice the worst error of the test matrix (tests/engines); the widths
# for reserved and device memory are explained in cost/memory_estimate.py. Time: of the rates that the
# hardware reaches. Sums of calibrated operators are within the first ratio; the second was set so that 90 %
# of published runs were within it, with constants that had seen them (without: benchmarks/published.md);
# plain rooflines are rough.
MEMORY_RATIO = 0.01
CALIBRATED_TIME_RATIO = 0.25
KERNELS_TIME_RATIO = 0.30
CATALOG_TIME_RATIO = 0.60

_UNKNOWN_STORAGE = (
    "the step time is not predicted, because the rate of the host's local storage is unknown or its ranks "
    "share processors; a machine file can give storage_bytes_s"
)


def estimate(
    trace: Trace,
    plan: Plan,
    *,
    machine: Machine,
    calibration: Calibration,
    model: TimeModel | None,
    step: SimulatedStep | None = None,
    workers: int = 0,
) -> Estimate:
    """Return the predicted memory, seconds, joules, money and CO2 of one optimizer step of ``plan``, from the
    trace of one of its ranks.

    ``calibration``: what was measured on the machine; its memory inside kernels and its corrections of step
    times are used. ``step``: the step if it is already simulated, for plans whose ranks differ. If ``step``
    is None, the step is simulated from ``trace`` with the time model ``model``. If ``model`` is None, too, or
    if the step cannot be simulated, the seconds, joules, money and CO2 are None. Joules are None, too, if the
    power of the devices is unknown, money and CO2 also if the machine has no place. ``workers``: number of
    DataLoader workers of each rank.
    """
    tensors = HostTensors.of(trace)
    if step is None and model is not None:
        step = simulate_step([trace], plan, machine, model)
    trace = with_temporaries(with_workspaces(trace, machine.device), machine.device)
    profile = memory_profile(trace, calibration)
    allocated, unprobed_workspaces = allocated_interval(trace, profile, calibration)
    memory = footprint(trace, allocated, machine)
    # as torch's counter has it: with the rests of cached blocks, which belong to no module
    counted = interval_around(max(allocated.value, memory.counted_bytes), MEMORY_RATIO)
    allocated = Interval(value=counted.value, low=allocated.low, high=max(allocated.high, counted.high))
    host = host_memory(tensors, plan, machine, allocated=allocated, workers=workers)
    ops, local_ranks = step_ops(trace), ranks_of_host(plan, machine)
    step_s = step.step_s * factor(calibration, plan) if step is not None else None
    cost = bill(machine, step_s=step_s)
    unknown = UNKNOWN_FOOTPRINT_HERE if machine.is_here else UNKNOWN_FOOTPRINT
    return Estimate(
        plan=plan,
        allocated_bytes=allocated,
        phase_peak_bytes={**profile.phase_peak_bytes, profile.peak_phase: int(allocated.value)},
        at_peak_bytes=profile.at_peak_bytes,
        by_module_bytes=profile.by_module_bytes,
        step_s=_step_interval(step_s, calibration, machine) if step_s is not None else None,
        step_basis=step_basis(machine.device, calibration) if step_s is not None else "",
        flops_per_step=sum(op.flops * times for op, times in ops),
        energy_j=cost.energy_j,
        energy_boundary=modelled_boundary(machine),
        usd=cost.usd,
        co2_g=cost.co2_g,
        peak_phase=profile.peak_phase,
        peak_op=profile.peak_op,
        workspace_probed=profile.workspace_probed,
        reserved_bytes=memory.reserved_bytes,
        device_bytes=memory.device_bytes,
        device_parts_bytes=memory.device_parts_bytes,
        host_bytes=host.bytes,
        host_parts_bytes=host.parts_bytes,
        host_memory_bytes=known_host(machine)[0],
        host_memory_assumed=known_host(machine)[1],
        storage_bytes=trace.storage_bytes * local_ranks,
        storage_written_bytes=trace.storage_written_bytes * local_ranks,
        oom_probability=oom_probability(memory.oom_probability, host, machine),
        rank=trace.rank,
        assumptions=(
            *trace.assumptions,
            *([unknown] if memory.reserved_bytes is None and not machine.device.is_host else []),
            *([unprobed_workspaces.assumption()] if unprobed_workspaces else []),
            *([_UNKNOWN_STORAGE] if trace.storage_bytes and step is None else []),
        ),
    )


def estimate_of_sketch(
    plan: Plan,
    *,
    machine: Machine,
    allocated: Interval,
    step_s: Interval | None,
    host_tensors: HostTensors,
    workers: int,
    reserved_ratio: float = ASSUMED_RESERVED_RATIO,
) -> Estimate:
    """Return the predicted memory, seconds, joules, money and CO2 of one optimizer step of a plan that was
    not traced. Peaks of phases, what is alive at the peak, and FLOPs are left empty or 0.

    ``allocated``: the peak of live tensors on the device of the rank that needs most. ``step_s``: None if it
    is unknown; joules, money and CO2 are None then. Joules are None, too, if the power of the devices is
    unknown, money and CO2 also if the machine has no place. ``host_tensors``: of one rank. ``workers``:
    number of DataLoader workers of each rank. ``reserved_ratio``: reserved over allocated memory of a traced
    plan of the same job.
    """
    cost = bill(machine, step_s=step_s.value if step_s else None)
    memory = sketch_footprint(
        allocated, machine, reserved_ratio=reserved_ratio, communicators=layout(plan).communicators
    )
    host = host_memory(host_tensors, plan, machine, allocated=allocated, workers=workers)
    return Estimate(
        plan=plan,
        allocated_bytes=allocated,
        phase_peak_bytes={},
        at_peak_bytes={},
        by_module_bytes={},
        step_s=step_s,
        flops_per_step=0,
        energy_j=cost.energy_j,
        energy_boundary=modelled_boundary(machine),
        usd=cost.usd,
        co2_g=cost.co2_g,
        traced=False,
        reserved_bytes=memory.reserved_bytes,
        device_bytes=memory.device_bytes,
        device_parts_bytes=memory.device_parts_bytes,
        oom_probability=oom_probability(memory.oom_probability, host, machine),
        host_bytes=host.bytes,
        host_parts_bytes=host.parts_bytes,
        host_memory_bytes=known_host(machine)[0],
        host_memory_assumed=known_host(machine)[1],
    )


def allocated_interval(
    trace: Trace, profile: MemoryProfile, calibration: Calibration
) -> tuple[Interval, UnprobedWorkspaces | None]:
    """Return (the peak of the live bytes with its interval; the operators whose workspaces could raise it,
    None if there are none).

    ``profile``: of ``trace``. The interval covers the peaks under other values of what the trace had to
    assume, and the upper bounds of workspaces that were not probed.
    """
    around = interval_around(profile.peak_bytes, MEMORY_RATIO)
    low, high = around.low * trace.assumed_low_ratio, around.high * trace.assumed_high_ratio
    workspaces = find_unprobed(trace, profile, calibration)
    if workspaces is not None:
        high = max(high, workspaces.high_bytes)
    return Interval(value=around.value, low=low, high=high), workspaces


def widened(estimate: Estimate, *, high: float, low: float = math.inf) -> Estimate:
    """Return the estimate with the interval of its peak widened, if needed, to contain ``low`` and ``high``,
    in bytes. The high ends of reserved and of device memory rise by as much as that of the peak. The
    probability of running out of memory and the need of host memory stay as they are."""
    peak = estimate.allocated_bytes
    more_bytes = max(0.0, high - peak.high)
    above = {
        name: dataclasses.replace(interval, high=interval.high + more_bytes)
        for name in ("allocated_bytes", "reserved_bytes", "device_bytes")
        if (interval := getattr(estimate, name)) is not None
    }
    above["allocated_bytes"] = dataclasses.replace(above["allocated_bytes"], low=min(peak.low, low))
    return dataclasses.replace(estimate, **above)


def peak_with_batch(estimate: Estimate, ratio: float, batch_bytes: float) -> float:
    """Return the peak of live tensors in bytes, at least 0, with a batch ``ratio`` times as large as that of
    the estimate, which has ``batch_bytes``. Activations and temporary tensors at the peak are taken to grow
    with the batch. The last batch is freed when the next is there, so that batches count twice."""
    growing = (Category.ACTIVATION, Category.TEMPORARY)
    growing_bytes = sum(estimate.at_peak_bytes.get(str(category), 0) for category in growing)
    return max(0.0, estimate.allocated_bytes.value + (growing_bytes + 2 * batch_bytes) * (ratio - 1))


def _step_interval(step_s: float, calibration: Calibration, machine: Machine) -> Interval:
    if calibration.step_spread_ratio is not None:
        return interval_around(step_s, calibration.step_spread_ratio)
    if calibration.flops_s:
        return interval_of_rates(step_s, CALIBRATED_TIME_RATIO)
    return interval_of_rates(step_s, CATALOG_TIME_RATIO if machine.device.is_host else KERNELS_TIME_RATIO)


def interval_of_rates(seconds: float, ratio: float) -> Interval:
    """Return the interval of ``seconds`` of work whose rates are known to within ``ratio``, below 1: from
    ``seconds / (1 + ratio)`` to ``seconds / (1 - ratio)``."""
    return Interval(value=seconds, low=seconds / (1 + ratio), high=seconds / (1 - ratio))


def interval_around(value: float, ratio: float) -> Interval:
    """Return the interval around ``value`` from ``value * (1 - ratio)`` to ``value * (1 + ratio)``."""
    return Interval(value=value, low=value * (1 - ratio), high=value * (1 + ratio))


def modelled_boundary(machine: Machine) -> str:
    """Return a text that says what a modelled energy covers: the "package" of a CPU or else the "board",
    "and host" if the power of the hosts is known, and how it is modelled. Example: "board and host (modelled:
    power x time)".
    """
    device_part = "package" if machine.device.is_host else "board"
    host = "" if hosts_w(machine) is None else " and host"
    return f"{device_part}{host} (modelled: power x time)"
