"""A budget for the step's peak becomes the tensors to drop: record, solve, trace the answer, correct. A
search proposes such a budget where it could be worth it.

The prediction of a chosen plan is the trace of that very plan.
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
_SPARE_RATIO = 0.001  # of the budget: how far a measured peak was seen above its prediction, doubled
_LEAST_RATIO = 1 / 20_000  # of the budget: smaller tensors are always kept
_SEGMENT = 20 * _MIB
_ATTEMPTS, _WORTH, _UNDER_CAP = 3, 0.03, 0.99  # plans that a search tries; the gain it hopes for; of the cap


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """``needs``: the part of it that an estimate asks for; ``host``: whether the host holds what it needs
    there; ``refuses``: why an engine has no such plan."""

    bytes: int
    needs: Callable[[Estimate], int]
    refuses: Callable[[Plan], tuple[str, ...]]
    host: Callable[[Estimate], bool] = lambda estimate: True

    def has(self, estimate: Estimate) -> bool:
        return self.needs(estimate) <= self.bytes and self.host(estimate)

    def may(self, plan: Plan) -> bool:
        budget = plan.with_use(make_use(NAME, {}))
        return conflict(budget) is None and not self.refuses(budget)

    def room_bytes(self, made: Sequence[Estimate]) -> int:
        """Peak of all tensors that a plan may have, on the line through the plans with the lowest and the
        highest peak."""
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
    """The best plan that does not fit, made to fit by choosing what to recompute: one that would be quicker
    than the best of ``made`` that fits if recomputation were free. Nothing where there is none."""
    if goal is Objective.SMALLEST:
        return []
    limit = min((score(e, goal) for e in made if cap.has(e)), default=math.inf) * (1 - _WORTH)
    traced = {e.plan for e in made}
    known = [*made, *(e for e in sketches if e.plan not in traced)]
    waiting = [e for e in known if score(e, goal) < limit and not cap.has(e) and cap.may(e.plan)]
    room_bytes, beside_bytes = cap.room_bytes(made), 0  # what a device has beside a step's own tensors
    for _ in range(_ATTEMPTS):
        bare, budget_bytes = best(waiting, goal), room_bytes - beside_bytes
        if bare is None or budget_bytes < _MIB:
            break
        plan = bare.plan.with_use(make_use(NAME, {"budget_mib": budget_bytes // _MIB}))
        tell("finalists", 0, 1, brief(plan))
        try:
            found = whole(plan)
        except UserError:  # not even with everything recomputed
            waiting.remove(bare)
            continue
        if cap.has(found):
            return [found]
        more = int(found.allocated_bytes.value) - budget_bytes
        if more > beside_bytes + _MIB:
            beside_bytes = more
        else:  # the caching allocator takes segments of 20 MiB and more
            room_bytes -= math.ceil((cap.needs(found) - cap.bytes) / _SEGMENT) * _SEGMENT
    return []


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
    gap_ratio: float = GAP_RATIO,
) -> Plan:
    """The plan with its tensors chosen; itself where there is nothing to choose. ``seconds``: of one call.
    ``gap_ratio``: within which what recomputation costs is least. Raises UserError with the least possible
    peak where the budget is below it."""
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
    if least <= _aim(budget_bytes):  # the program ended without an answer: from the least up to the budget
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
    """What was chosen, kept: a plan, or why there is none."""

    kept: dict[Plan, Plan | UserError] = dataclasses.field(default_factory=dict)

    def of(self, job: Job, plan: Plan, **how: Any) -> Plan:
        """`chosen`, once."""
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
    """Settled, those whose budget can be met."""
    for plan in plans:
        with contextlib.suppress(UserError):
            yield settled(plan)


def _aim(budget_bytes: int) -> int:
    return int(budget_bytes * (1 - _SPARE_RATIO))


def _closed(
    played: Replay, traced: Callable[[frozenset[int]], tuple[Plan, int]], wanted_bytes: int, gap_ratio: float
) -> Plan | None:
    """What a whole trace finds above the budget is taken off the next try's; what one finds below it is given
    back once, as long as that still fits."""
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
