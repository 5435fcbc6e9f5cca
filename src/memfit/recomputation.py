"""A budget for the step's peak becomes the tensors to drop: record, solve, trace the answer, correct.

The prediction of a chosen plan is the trace of that very plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from memfit.cost.memory import memory_profile
from memfit.cost.recompute import smallest, solve
from memfit.cost.replay import Replay, replay
from memfit.techniques.recompute import NAME, dropped_text
from memfit.techniques.registry import check, make_use
from memfit.trace.recording import record
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.trace import OpCall
from memfit.types.units import format_bytes

_MIB = 2**20
_TRIES = 6
_SPARE_RATIO = 0.001  # of the budget: how far a measured peak was seen above its prediction, doubled
_LEAST_RATIO = 1 / 20_000  # of the budget: smaller tensors are always kept


def nominal_s(op: OpCall) -> float:
    """At 100 GFLOP/s and 10 GB/s, where nothing is known of the device."""
    return max(op.flops / 1e11, op.moved_bytes / 1e10, 2e-6)


def open_budget(plan: Plan) -> int | None:
    """The budget in bytes of a plan whose tensors are not chosen yet."""
    used = plan.get(NAME)
    return int(used.settings["budget_mib"]) * _MIB if used and not used.settings["dropped"] else None


def chosen(
    job: Job,
    plan: Plan,
    *,
    device: str = "cpu",
    seconds: Callable[[OpCall], float] = nominal_s,
    calibration: Calibration | None = None,
) -> Plan:
    """The plan with its tensors chosen; itself where there is nothing to choose. ``seconds``: of one call.
    Raises UserError with the least possible peak where the budget is below it."""
    budget_bytes = open_budget(check(plan))
    if budget_bytes is None:
        return plan
    known = calibration or Calibration()
    recording = record(job, plan.without(NAME), device=device)
    if memory_profile(recording.trace, known).peak_bytes <= _aim(budget_bytes):
        return _with(plan, "none")
    played = replay(recording, seconds, known, least_bytes=int(budget_bytes * _LEAST_RATIO))

    def traced(dropped: frozenset[int]) -> tuple[Plan, int]:
        made = _with(plan, dropped_text(recording.key, played.closure(dropped)))
        return made, memory_profile(trace(job, made, device=device), known).peak_bytes

    found = _closed(played, traced, _aim(budget_bytes))
    if found is not None:
        return found
    _, least = traced(smallest(played).dropped)
    raise UserError(
        f"{NAME}: a budget of {format_bytes(budget_bytes)}",
        allowed=f"at least {math.ceil(least / (1 - _SPARE_RATIO) / _MIB)} MiB, the least found for this job",
        hint="a smaller batch, gradient-accumulation, or bf16-autocast lowers what there is to keep",
    )


def _aim(budget_bytes: int) -> int:
    return int(budget_bytes * (1 - _SPARE_RATIO))


def _closed(
    played: Replay, traced: Callable[[frozenset[int]], tuple[Plan, int]], wanted_bytes: int
) -> Plan | None:
    """What a whole trace finds above the budget is taken off the next try's; what one finds below it is given
    back once, as long as that still fits."""
    best: tuple[float, Plan] | None = None
    budget_bytes, given_back = wanted_bytes, False
    for _ in range(_TRIES):
        choice = solve(played, budget_bytes)
        if choice is None:
            break
        plan, peak_bytes = traced(choice.dropped)
        off_bytes = peak_bytes - choice.peak_bytes
        if peak_bytes > wanted_bytes:
            if best is not None:
                break
            budget_bytes = min(budget_bytes, choice.peak_bytes) - (peak_bytes - wanted_bytes)
            continue
        if best is None or choice.cost_s < best[0]:
            best = choice.cost_s, plan
        if given_back or off_bytes >= -wanted_bytes * _SPARE_RATIO:
            break
        budget_bytes, given_back = wanted_bytes - off_bytes, True
    return best[1] if best else None


def _with(plan: Plan, dropped: str) -> Plan:
    used = plan.get(NAME)
    assert used is not None
    return plan.with_use(make_use(NAME, {**used.settings, "dropped": dropped}))
