"""Turn a memory budget for the step's peak into the tensors to recompute: record, solve, trace the answer,
correct. A search proposes such a budget where it may pay off.

The prediction for a chosen plan is the trace of that same plan.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from memfit.cost.memory import memory_profile
from memfit.cost.recompute_ilp import GAP_RATIO, refined, smallest, solve
from memfit.cost.recompute_replay import Replay, replay
from memfit.planner.selection import Objective, best, score
from memfit.techniques.recompute.optimal import NAME, dropped_text
from memfit.techniques.registry import brief, check, conflict, make_use
from memfit.trace.op_recording import record
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.result import Estimate
from memfit.types.trace import OpCall
from memfit.types.units import format_bytes

_MIB = 2**20
_TRIES = 6
_SPARE_RATIO = 0.001  # of the budget: twice the largest excess of a measured peak over its prediction
_LEAST_RATIO = 1 / 20_000  # of the budget: smaller tensors are never recomputed
_SEGMENT = 20 * _MIB
# plans that a search tries; the least relative gain it hopes for; share of the cap to use
_ATTEMPTS, _WORTH, _UNDER_CAP = 3, 0.03, 0.99


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """The memory cap of a search.

    ``needs`` returns the bytes that an estimate needs. ``host`` tells whether the host has enough memory for
    it. ``refuses`` returns why an engine does not support a plan.
    """

    bytes: int
    needs: Callable[[Estimate], int]
    refuses: Callable[[Plan], tuple[str, ...]]
    host: Callable[[Estimate], bool] = lambda estimate: True

    def has(self, estimate: Estimate) -> bool:
        """Return whether the estimate fits the device and the host."""
        return self.needs(estimate) <= self.bytes and self.host(estimate)

    def may(self, plan: Plan) -> bool:
        """Return whether a recomputation budget can be added to the plan."""
        budget = plan.with_use(make_use(NAME, {}))
        return conflict(budget) is None and not self.refuses(budget)

    def room_bytes(self, made: Sequence[Estimate]) -> int:
        """Return the highest peak of tensors that fits, on the line through the plans with the lowest and
        highest peak.
        """
        low, high = (f(made, key=lambda e: e.allocated_bytes.value) for f in (min, max))
        tensors, needed = low.allocated_bytes.value, self.needs(low)
        rise = self.needs(high) - needed
        slope = (high.allocated_bytes.value - tensors) / rise if rise > 0 else tensors / needed
        return max(0, int(tensors + (self.bytes * _UNDER_CAP - needed) * slope))


def budgeted(
    whole: Callable[[Plan], Estimate],
    sketches: Sequence[Estimate],
    made: Sequence[Estimate],
    goal: Objective,
    cap: Cap,
    tell: Callable[[str, int, int, str], None],
) -> list[Estimate]:
    """Make the best plan that does not fit fit, by choosing what to recompute.

    Only a plan is tried that would beat the best fitting plan of ``made`` if recomputation were free. Returns
    a list of one estimate, or an empty list.
    """
    if goal is Objective.SMALLEST:
        return []
    limit = min((score(e, goal) for e in made if cap.has(e)), default=math.inf) * (1 - _WORTH)
    traced = {e.plan for e in made}
    known = [*made, *(e for e in sketches if e.plan not in traced)]
    waiting = [e for e in known if score(e, goal) < limit and not cap.has(e) and cap.may(e.plan)]
    room_bytes, beside_bytes = cap.room_bytes(made), 0  # device memory beside the step's own tensors
    for _ in range(_ATTEMPTS):
        bare, budget_bytes = best(waiting, goal), room_bytes - beside_bytes
        if bare is None or budget_bytes < _MIB:
            break
        plan = bare.plan.with_use(make_use(NAME, {"budget_mib": budget_bytes // _MIB}))
        tell("finalists", 0, 1, brief(plan))
        try:
            found = whole(plan)
        except UserError:  # does not fit even with everything recomputed
            waiting.remove(bare)
            continue
        if cap.has(found):
            return [found]
        more = int(found.allocated_bytes.value) - budget_bytes
        if more > beside_bytes + _MIB:
            beside_bytes = more
        else:  # the caching allocator takes segments of 20 MiB or more
            room_bytes -= math.ceil((cap.needs(found) - cap.bytes) / _SEGMENT) * _SEGMENT
    return []


def nominal_s(op: OpCall) -> float:
    """Return the seconds of a call at 100 GFLOP/s and 10 GB/s, for a device of unknown speed."""
    return max(op.flops / 1e11, op.moved_bytes / 1e10, 2e-6)


def open_budget(plan: Plan) -> int | None:
    """Return the plan's budget in bytes if its tensors are not chosen yet, else None."""
    used = plan.get(NAME)
    return int(used.settings["budget_mib"]) * _MIB if used and not used.settings["dropped"] else None


def chosen(
    job: Job,
    plan: Plan,
    *,
    device: str = "cpu",
    seconds: Callable[[OpCall], float] = nominal_s,
    calibration: Calibration | None = None,
    gap_ratio: float = GAP_RATIO,
) -> Plan:
    """Return the plan with its tensors to recompute chosen, or the plan itself if there is nothing to choose.

    ``seconds`` returns the time of one call. ``gap_ratio`` is the optimality gap of the recomputation's cost.
    Raises UserError with the least possible peak if the budget is below it.
    """
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

    found = _closed(played, traced, _aim(budget_bytes), gap_ratio)
    if found is not None:
        return found
    lowest = smallest(played)
    plan_of_least, least = traced(lowest.dropped)
    # the solver ended without an answer: start from the smallest and refine up to the budget
    if least <= _aim(budget_bytes):
        off_bytes = max(0, least - lowest.peak_bytes)
        more, peak_bytes = traced(refined(played, lowest, _aim(budget_bytes) - off_bytes).dropped)
        return more if peak_bytes <= _aim(budget_bytes) else plan_of_least
    raise UserError(
        f"{NAME}: a budget of {format_bytes(budget_bytes)}",
        allowed=f"at least {math.ceil(least / (1 - _SPARE_RATIO) / _MIB)} MiB, the least found for this job",
        hint="a smaller batch, gradient-accumulation, or bf16-autocast lowers what there is to keep",
    )


@dataclasses.dataclass(kw_only=True)
class Choices:
    """Cache of choices: the chosen plan, or the error that says why there is none."""

    kept: dict[Plan, Plan | UserError] = dataclasses.field(default_factory=dict)

    def of(self, job: Job, plan: Plan, **how: Any) -> Plan:
        """Return `chosen` for this plan, computed once."""
        if plan not in self.kept:
            try:
                self.kept[plan] = chosen(job, plan, **how)
            except UserError as error:
                self.kept[plan] = error
        found = self.kept[plan]
        if isinstance(found, UserError):
            raise found
        return found


def possible(plans: Iterable[Plan], settled: Callable[[Plan], Plan]) -> Iterator[Plan]:
    """Yield the settled plans. Plans whose budget cannot be met are skipped."""
    for plan in plans:
        with contextlib.suppress(UserError):
            yield settled(plan)


def _aim(budget_bytes: int) -> int:
    return int(budget_bytes * (1 - _SPARE_RATIO))


def _closed(
    played: Replay, traced: Callable[[frozenset[int]], tuple[Plan, int]], wanted_bytes: int, gap_ratio: float
) -> Plan | None:
    """Solve and trace until the traced peak meets the budget.

    If a trace exceeds the budget, the excess is subtracted from the next try's budget. If it stays below, the
    difference is added back once, provided that the result still fits.
    """
    best: tuple[float, Plan] | None = None
    budget_bytes, given_back = wanted_bytes, False
    for _ in range(_TRIES):
        choice = solve(played, budget_bytes, gap_ratio=gap_ratio)
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
