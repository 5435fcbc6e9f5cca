"""Turn a memory budget for the step's peak into the tensors to recompute: record, solve, trace the answer,
correct. A search proposes such a budget where it may pay off.

The prediction for a chosen plan is the trace of that same plan.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from memfit.cost.memory import memory_profile
from memfit.cost.op_time import nominal_s
from memfit.cost.recompute_ilp import QUICK, THOROUGH, SolverEffort, refine_choice, smallest, solve
from memfit.cost.recompute_replay import Replay, replay
from memfit.planner.capacity import Cap
from memfit.planner.selection import Objective, best, score
from memfit.techniques.recompute.optimal import OPTIMAL_CHECKPOINTING, encode_dropped
from memfit.techniques.registry import check, make_use, short_label
from memfit.trace.op_recording import record
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.result import Estimate
from memfit.types.trace import OpCall
from memfit.types.units import MIB, format_bytes

_TRIES = 6
_SPARE_RATIO = 0.001  # of the budget: twice the largest excess of a measured peak over its prediction
_LEAST_RATIO = 1 / 20_000  # of the budget: smaller tensors are never recomputed
_SEGMENT = 20 * MIB
_ATTEMPTS, _WORTH = 3, 0.03  # plans that a search tries; the least relative gain it hopes for


def try_optimal_checkpointing(
    whole: Callable[[Plan], Estimate],
    sketches: Sequence[Estimate],
    traced: Sequence[Estimate],
    goal: Objective,
    cap: Cap,
    progress: Callable[[str, int, int, str], None],
) -> list[Estimate]:
    """Take the best plan that does not fit, and try to make it fit by adding optimal-checkpointing, which
    recomputes as many tensors as a memory budget requires.

    A plan is tried only if its estimate, without recomputation, beats the best fitting one of ``traced`` by
    at least 3 % by the goal. There are at most 3 attempts: if a plan with a budget does not fit, the next
    attempt has a smaller budget; if a budget cannot be met, the next best plan is taken. ``whole`` returns
    the estimate of a plan. ``traced``: estimates by whole traces. ``progress`` is called before each attempt
    with (stage "finalists", 0, 1, label of the plan).

    Returns a list of one estimate that fits; an empty list if there is none or the goal is least memory.
    """
    if goal is Objective.SMALLEST:
        return []
    limit = min((score(e, goal) for e in traced if cap.holds(e)), default=math.inf) * (1 - _WORTH)
    traced_plans = {e.plan for e in traced}
    estimates = [*traced, *(e for e in sketches if e.plan not in traced_plans)]
    candidates = [
        e
        for e in estimates
        if score(e, goal) < limit and not cap.holds(e) and cap.can_add_optimal_checkpointing(e.plan)
    ]
    room_bytes, beside_bytes = cap.room_bytes(traced), 0  # device memory beside the step's own tensors
    for _ in range(_ATTEMPTS):
        candidate, budget_bytes = best(candidates, goal), room_bytes - beside_bytes
        if candidate is None or budget_bytes < MIB:
            break
        plan = candidate.plan.with_use(make_use(OPTIMAL_CHECKPOINTING, {"budget_mib": budget_bytes // MIB}))
        progress("finalists", 0, 1, short_label(plan))
        try:
            plan_estimate = whole(plan)
        except UserError:  # does not fit even with everything recomputed
            candidates.remove(candidate)
            continue
        if cap.holds(plan_estimate):
            return [plan_estimate]
        excess_bytes = int(plan_estimate.allocated_bytes.value) - budget_bytes
        if excess_bytes > beside_bytes + MIB:
            beside_bytes = excess_bytes
        else:  # the caching allocator takes segments of 20 MiB or more
            room_bytes -= math.ceil((cap.needs(plan_estimate) - cap.bytes) / _SEGMENT) * _SEGMENT
    return []


def open_budget(plan: Plan) -> int | None:
    """Return the memory budget in bytes of a plan with optimal-checkpointing whose tensors to recompute are
    not chosen yet. None if they are chosen, or if the plan does not have that technique."""
    recomputation = plan.get(OPTIMAL_CHECKPOINTING)
    return (
        int(recomputation.settings["budget_mib"]) * MIB
        if recomputation and not recomputation.settings["dropped"]
        else None
    )


def choose_tensors(
    job: Job,
    plan: Plan,
    *,
    device: str = "cpu",
    seconds: Callable[[OpCall], float] = nominal_s,
    calibration: Calibration | None = None,
    quickly: bool = False,
) -> Plan:
    """Return the plan with the tensors to recompute chosen for its memory budget; with none chosen if the
    step fits the budget without recomputation. A plan that has no budget, or whose tensors are chosen
    already, is returned itself.

    ``device``: torch's name of its kind, such as "cuda". ``seconds`` returns the time of one operator call.
    ``calibration``: the workspaces of operators in it count towards the peak. The time that recomputation
    adds is within 0.3 % of the least that is proven; ``quickly``: within 5 %. Raises UserError if the plan's
    budget cannot be met, which names the smallest budget found, but not if ``quickly``, as that may take a
    minute; also if the plan itself is not valid.
    """
    budget_bytes = open_budget(check(plan))
    if budget_bytes is None:
        return plan
    device_calibration = calibration or Calibration()
    recording = record(job, plan.without(OPTIMAL_CHECKPOINTING), device=device)
    if memory_profile(recording.trace, device_calibration).peak_bytes <= _target_bytes(budget_bytes):
        return _with(plan, "none")
    recording_replay = replay(
        recording, seconds, device_calibration, least_bytes=int(budget_bytes * _LEAST_RATIO)
    )

    def traced(dropped: frozenset[int]) -> tuple[Plan, int]:
        concrete_plan = _with(plan, encode_dropped(recording.key, recording_replay.closure(dropped)))
        return concrete_plan, memory_profile(
            trace(job, concrete_plan, device=device), device_calibration
        ).peak_bytes

    effort = QUICK if quickly else THOROUGH
    budget_plan = _choose_within(recording_replay, traced, _target_bytes(budget_bytes), effort)
    if budget_plan is not None:
        return budget_plan
    if quickly:
        raise UserError(
            f"optimal-checkpointing finds no tensors for a budget of {format_bytes(budget_bytes)}",
            hint="`memfit estimate` of the plan names the smallest budget",
        )
    smallest_choice = smallest(recording_replay)
    smallest_plan, smallest_peak = traced(smallest_choice.dropped)
    # the solver ended without an answer: start from the smallest and refine up to the budget
    if smallest_peak <= _target_bytes(budget_bytes):
        off_bytes = max(0, smallest_peak - smallest_choice.peak_bytes)
        refined_plan, peak_bytes = traced(
            refine_choice(recording_replay, smallest_choice, _target_bytes(budget_bytes) - off_bytes).dropped
        )
        return refined_plan if peak_bytes <= _target_bytes(budget_bytes) else smallest_plan
    smallest_budget_mib = math.ceil(smallest_peak / (1 - _SPARE_RATIO) / MIB)
    raise UserError(
        "optimal-checkpointing finds no tensors whose recomputation reduces the peak to a budget of "
        f"{format_bytes(budget_bytes)}",
        allowed=f"at least {smallest_budget_mib} MiB (budget_mib), the smallest found for this job and plan",
        hint="a smaller batch, gradient-accumulation or bf16-autocast reduces what must be kept in memory",
    )


def resolved_plans(plans: Iterable[Plan], resolve: Callable[[Plan], Plan]) -> Iterator[Plan]:
    """Yield what ``resolve`` returns for each plan. Plans for which it raises UserError, because their memory
    budget for recomputation cannot be met, are skipped.
    """
    for plan in plans:
        with contextlib.suppress(UserError):
            yield resolve(plan)


def _target_bytes(budget_bytes: int) -> int:
    return int(budget_bytes * (1 - _SPARE_RATIO))


def _choose_within(
    recording_replay: Replay,
    traced: Callable[[frozenset[int]], tuple[Plan, int]],
    target_bytes: int,
    effort: SolverEffort,
) -> Plan | None:
    """Choose tensors to recompute and trace the plan, at most 6 times, until the traced peak is at most
    ``target_bytes``. Return the plan found within it whose recomputation takes least time; None if there is
    none.

    ``traced`` returns (the plan that recomputes these tensors, its traced peak). If a traced peak exceeds the
    target, the excess is subtracted from the budget of the next try. If it is within the target and below the
    solver's prediction by more than 0.1 % of the target, there is one more try with this difference added to
    the budget; its plan is used if it fits, too, and recomputes in less time.
    """
    best: tuple[float, Plan] | None = None
    budget_bytes, is_raised = target_bytes, False
    for _ in range(_TRIES):
        choice = solve(recording_replay, budget_bytes, effort=effort)
        if choice is None:
            break
        plan, peak_bytes = traced(choice.dropped)
        off_bytes = peak_bytes - choice.peak_bytes
        if peak_bytes > target_bytes:
            if best is not None:
                break
            budget_bytes = min(budget_bytes, choice.peak_bytes) - (peak_bytes - target_bytes)
            continue
        if best is None or choice.cost_s < best[0]:
            best = choice.cost_s, plan
        if is_raised or off_bytes >= -target_bytes * _SPARE_RATIO:
            break
        budget_bytes, is_raised = target_bytes - off_bytes, True
    return best[1] if best else None


def _with(plan: Plan, dropped: str) -> Plan:
    recomputation = plan.get(OPTIMAL_CHECKPOINTING)
    assert recomputation is not None
    return plan.with_use(make_use(OPTIMAL_CHECKPOINTING, {**recomputation.settings, "dropped": dropped}))
