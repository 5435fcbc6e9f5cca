"""The three groups of techniques that every proof of concept compares: mixed precision, checkpointing, and,
on several ranks, sharding; and the best plan with one of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from memfit.planner.capacity import memory_cap
from memfit.planner.request import Planning, autocast
from memfit.planner.selection import by_goal
from memfit.planner.sketch_errors import may_fit_under
from memfit.techniques.registry import TECHNIQUES
from memfit.types.plan import Plan

_MOST_TRACES = 6  # of plans that may fit, if none of those that were traced does


def technique_groups(planning: Planning) -> dict[str, frozenset[str]]:
    """Return the names of the techniques of each group: autocast to the machine's half precision; every way
    to recompute; and, on several ranks, data parallelism that divides parameters, gradients or optimizer
    state over them.
    """
    by_slot: dict[str, set[str]] = {}
    for name, technique in TECHNIQUES.items():
        by_slot.setdefault(technique.slot or "", set()).add(name)
    groups = {
        "mixed precision": frozenset({autocast(planning.predictor.job_facts).technique}),
        "checkpointing": frozenset(by_slot["recomputation"]),
    }
    if planning.request.ranks > 1:
        groups["sharding"] = frozenset(by_slot["data-parallel"] - {"ddp"})
    return groups


def best_of_groups(planning: Planning) -> Iterator[tuple[str, Plan]]:
    """Yield (group, the best plan by the goal that has one of its techniques and fits when it is traced
    whole). A group without such a plan is left out.

    The best is that with the lowest predicted score of the plans that were traced, tried or recommended. If
    none of these fits, at most 6 others that may fit are traced, those with the best sketches (estimates from
    traces of parts) first, until one does.
    """
    for name, techniques in technique_groups(planning).items():
        plan = _best_with(planning, techniques)
        if plan is not None:
            yield name, plan


def _best_with(planning: Planning, techniques: frozenset[str]) -> Plan | None:
    predictor, goal, result = planning.predictor, planning.request.goal, planning.result

    def has_one(plan: Plan) -> bool:
        return any(u.technique in techniques for u in plan.uses)

    known_plans = [*(e.plan for e in planning.estimates), *(t.plan for t in result.trials)]
    if result.recommended is not None:
        known_plans.append(result.recommended.estimate.plan)
    known = [predictor.whole(plan) for plan in dict.fromkeys(known_plans)]
    fitting = [e for e in known if has_one(e.plan) and planning.meets_limits(e)]
    if fitting:
        return min(fitting, key=lambda e: by_goal(e, goal)).plan
    request = planning.request
    cap = memory_cap(planning.cap_bytes, request.machine, request.engine)
    may_fit = may_fit_under(cap, request.bounds, planning.sketches, known)
    traced_plans = {e.plan for e in known}
    candidates = [
        e for e in planning.sketches if has_one(e.plan) and e.plan not in traced_plans and may_fit(e)
    ]
    for sketch in sorted(candidates, key=lambda e: by_goal(e, goal))[:_MOST_TRACES]:
        if planning.meets_limits(predictor.whole(sketch.plan)):
            return sketch.plan
    return None
