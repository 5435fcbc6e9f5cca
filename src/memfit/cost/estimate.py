"""``estimate``: a Trace on a Machine as one Estimate, with intervals and what each figure rests on."""

from __future__ import annotations

from memfit.cost.device import with_workspaces
from memfit.cost.footprint import footprint
from memfit.cost.memory import memory_profile, step_ops
from memfit.cost.money import bill, hosts_w
from memfit.cost.time import TimeModel
from memfit.types.machine import Calibration, Machine
from memfit.types.plan import Plan
from memfit.types.result import Estimate, Interval
from memfit.types.trace import Phase, Trace

# Half-widths of the intervals. Memory: the worst error of the test matrix (tests/engines), doubled; those of
# reserved and device memory are told in cost/footprint.py. Time: calibrated operators add up to within
# this; catalog rooflines are rough.
MEMORY_RATIO = 0.01
CALIBRATED_TIME_RATIO = 0.25
CATALOG_TIME_RATIO = 0.60


def estimate(
    trace: Trace, plan: Plan, *, machine: Machine, calibration: Calibration, model: TimeModel | None
) -> Estimate:
    """Peak memory, seconds, joules, money and carbon of one optimizer step of ``plan``. Communication and
    waiting are not priced, so of several ranks only memory is told."""
    model = model if trace.ranks == 1 else None
    trace = with_workspaces(trace, machine.device)
    profile = memory_profile(trace, calibration)
    allocated = around(profile.peak_bytes, MEMORY_RATIO)
    memory = footprint(trace, allocated, machine)
    ops = step_ops(trace)
    step_s = model.total_s(ops) + offload_s(trace, model) if model is not None else None
    spread = CALIBRATED_TIME_RATIO if calibration.flops_s else CATALOG_TIME_RATIO
    cost = bill(machine, step_s=step_s)
    return Estimate(
        plan=plan,
        allocated_bytes=allocated,
        phase_peak_bytes=profile.phase_peak_bytes,
        at_peak_bytes=profile.at_peak_bytes,
        by_module_bytes=profile.by_module_bytes,
        step_s=around(step_s, spread) if step_s is not None else None,
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
        host_bytes=memory.host_bytes,
        oom_probability=memory.oom_probability,
        rank=trace.rank,
        assumptions=trace.assumptions,
    )


def offload_s(trace: Trace, model: TimeModel) -> float:
    """Time to write out and read back what leaves memory in one whole step."""
    forwards = sum(s.phase is Phase.FORWARD and s.step == trace.steps - 1 for s in trace.spans)
    share = (forwards + trace.repeated_micro_steps) / max(1, forwards)
    return 2 * trace.offloaded_bytes * share / model.offload_bytes_s


def around(value: float, ratio: float) -> Interval:
    return Interval(value=value, low=value * (1 - ratio), high=value * (1 + ratio))


def modelled_boundary(machine: Machine) -> str:
    """What a modelled energy covers."""
    covered = "package" if machine.device.kind == "cpu" else "board"
    host = "" if hosts_w(machine) is None else " and host"
    return f"{covered}{host} (modelled: power x time)"
