"""Choose which sketches are traced whole on one device: the best, the smallest and the frontier, then the
next best while too few of those traced fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memfit.planner.recompute_budget import Cap
from memfit.planner.selection import Objective, frontier, score, simplest_first, techniques_beside
from memfit.techniques.registry import plain
from memfit.types.plan import Plan
from memfit.types.result import Estimate

_ROUNDS = 3  # most rounds of more finalists
_SKETCHED_RATIO, _SIMPLEST = 0.30, 4  # error of sketched times; number of simplest plans added
_SPARE = 6  # finalists reserved for plans that are not the best by the goal


def finalists(
    sketches: list[Estimate], fits: Callable[[Estimate], bool], goal: Objective, most: int
) -> list[Plan]:
    """Return the distinct plans to trace.

    They are the plain plan, the simplest plans that may be as good as the best, the best fitting plans by the
    goal, the smallest plan, and a sample of the frontier.
    """
    fitting = _ordered([e for e in sketches if fits(e)], goal)
    smallest = sorted(sketches, key=lambda e: (e.allocated_bytes.value, e.plan.fingerprint))
    edge = frontier(sketches)
    step = max(1, len(edge) // 4)
    picked = [
        plain(sketches[0].plan.ranks),
        *(e.plan for e in fitting[: most - _SPARE]),
        smallest[0].plan,
        *(e.plan for e in edge[::step]),
    ]
    simple = simplest_first(fitting, goal)
    if simple:
        limit = score(simple[-1], goal) * (1 + _SKETCHED_RATIO)
        picked[1:1] = [e.plan for e in simple if score(e, goal) <= limit][:_SIMPLEST]
    return list(dict.fromkeys(picked))[: most + _SIMPLEST]


def until_some_fit(
    whole: Callable[[Plan], Estimate],
    look: Callable[[list[Plan]], None],
    sketches: Sequence[Estimate],
    chosen: Sequence[Plan],
    *,
    cap: Cap,
    goal: Objective,
    most: int,
) -> list[Plan]:
    """Add finalists in rounds while fewer of them fit than intended.

    ``look`` is called with each round's plans.
    """
    added: list[Plan] = []
    for _ in range(_ROUNDS):
        more = more_finalists(sketches, [*map(whole, (*chosen, *added))], cap=cap, goal=goal, most=most)
        if not more:
            break
        look(more)
        added += more
    return added


def counterfactuals(
    sketches: Sequence[Estimate], traced: Sequence[Estimate], winner: Estimate, *, cap: Cap, goal: Objective
) -> list[Plan]:
    """Return plans to trace for each technique that the winner lacks, so that its reason rests on a trace.

    For each technique this is the best plan by the goal that may fit, and also the smallest plan if none of
    its traced plans fits.
    """
    by_plan = {e.plan: e for e in sketches}
    ratios = [cap.needs(e) / cap.needs(by_plan[e.plan]) for e in traced if e.plan in by_plan]
    lightest, tried = min([1.0, *ratios]), {e.plan for e in traced}
    wanted = []
    for name in techniques_beside(winner, sketches):
        having = [e for e in sketches if e.plan.get(name)]
        may_fit = _ordered([e for e in having if cap.needs(e) * lightest <= cap.bytes], goal)
        order = [e.plan for e in may_fit[:1]]
        if not any(e.plan.get(name) and cap.has(e) for e in traced):
            smallest = min(having, key=lambda e: (cap.needs(e), e.plan.fingerprint))
            order.append(smallest.plan)
        wanted += [plan for plan in order if plan not in tried]
    return list(dict.fromkeys(wanted))


def more_finalists(
    sketches: Sequence[Estimate], traced: Sequence[Estimate], *, cap: Cap, goal: Objective, most: int
) -> list[Plan]:
    """Return the next best plans if fewer of the ``traced`` plans fit than intended.

    Sketches are corrected by the error of traced plans with the same techniques.
    """
    missing = most - _SPARE - sum(map(cap.has, traced))
    by_plan, heavier = {e.plan: e for e in sketches}, dict[frozenset[str], float]()
    for found in traced:
        if (sketch := by_plan.pop(found.plan, None)) is not None:
            ratio = cap.needs(found) / cap.needs(sketch)
            heavier[_used(found.plan)] = max(ratio, heavier.get(_used(found.plan), 0.0))
    fitting = (e for e in by_plan.values() if cap.host(e))
    left = [e for e in fitting if cap.needs(e) * heavier.get(_used(e.plan), 1.0) <= cap.bytes]
    return [e.plan for e in _ordered(left, goal)[: max(0, missing)]]


def _ordered(estimates: Sequence[Estimate], goal: Objective) -> list[Estimate]:
    return sorted(estimates, key=lambda e: (score(e, goal), e.plan.fingerprint))


def _used(plan: Plan) -> frozenset[str]:
    return frozenset(u.technique for u in plan.uses)
