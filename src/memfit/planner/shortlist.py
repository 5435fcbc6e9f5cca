"""Choose which plans of a search for one device are traced whole, by their sketches (estimates composed from
traces of parts): the best, the smallest and the frontier, then the next best while too few of those traced
fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from memfit.planner.capacity import Cap
from memfit.planner.reasons import may_overturn, missing_techniques
from memfit.planner.selection import (
    Objective,
    frontier,
    lowest_score_first,
    score,
    simplest_first,
    within_bounds,
)
from memfit.planner.sketch_errors import BestCaseEstimates, may_fit_under
from memfit.techniques.registry import make_plain_plan
from memfit.types.plan import Bounds, Plan
from memfit.types.result import Estimate

_ROUNDS, _PER_ROUND = 3, 4  # most rounds of more finalists; plans of a round if none fits yet
_SKETCHED_RATIO, _SIMPLEST = 0.30, 4  # error of sketched times; number of simplest plans added
_SPARE = 6  # finalists reserved for plans that are not the best by the goal


def finalists(
    sketches: list[Estimate], meets_limits: Callable[[Estimate], bool], goal: Objective, most: int
) -> list[Plan]:
    """Return the plans to trace whole, by their ``sketches`` (estimates from traces of parts): the first
    ``most`` + 4 of these, without repetitions, in this order:

    - plain training
    - at most 4 of the fitting plans of lowest effect class and fewest techniques (`simplest_first`) whose
      score is at most 30 % above the best, which is the error of sketched times
    - the ``most`` - 6 best fitting plans by the goal
    - the plan with the lowest peak
    - at most 7 plans, evenly spread over the `frontier` of peak, step time and effect class
    """
    fitting = lowest_score_first(filter(meets_limits, sketches), goal)
    smallest = sorted(sketches, key=lambda e: (e.allocated_bytes.value, e.plan.fingerprint))
    frontier_sketches = frontier(sketches)
    stride = max(1, len(frontier_sketches) // 4)
    finalist_plans = [
        make_plain_plan(sketches[0].plan.ranks),
        *(e.plan for e in fitting[: most - _SPARE]),
        smallest[0].plan,
        *(e.plan for e in frontier_sketches[::stride]),
    ]
    simplest = simplest_first(fitting, goal)
    if simplest:
        limit = score(simplest[-1], goal) * (1 + _SKETCHED_RATIO)
        finalist_plans[1:1] = [e.plan for e in simplest if score(e, goal) <= limit][:_SIMPLEST]
    return list(dict.fromkeys(finalist_plans))[: most + _SIMPLEST]


def trace_until_some_fit(
    whole: Callable[[Plan], Estimate],
    trace: Callable[[list[Plan]], object],
    sketches: Sequence[Estimate],
    chosen: Sequence[Plan],
    *,
    cap: Cap,
    goal: Objective,
    most: int,
) -> list[Plan]:
    """Trace further plans, in at most 3 rounds, until ``most`` - 6 of the ``chosen`` and the further plans
    together fit, or no other plan may fit. Return the further ones.

    A round has as many plans as are missing, the best by the goal of those that may fit first
    (`more_finalists`). ``trace`` is called with them to trace them. ``whole`` returns the estimate of a plan.
    """
    added: list[Plan] = []
    for _ in range(_ROUNDS):
        round_plans = more_finalists(
            sketches, [*map(whole, (*chosen, *added))], cap=cap, goal=goal, most=most
        )
        if not round_plans:
            break
        trace(round_plans)
        added += round_plans
    return added


def trace_until_one_fits(
    whole: Callable[[Plan], Estimate],
    trace: Callable[[list[Plan]], object],
    sketches: Sequence[Estimate],
    chosen: Sequence[Plan],
    *,
    cap: Cap,
    bounds: Bounds,
) -> list[Plan]:
    """If none of the ``chosen`` plans fits, trace others that may fit by the errors of the sketches seen so
    far, those that need the least device memory first, in at most 3 rounds of 4, until one fits. Return
    them.

    ``trace`` is called with the plans of a round to trace them. ``whole`` returns the estimate of a plan.
    """
    added: list[Plan] = []
    for _ in range(_ROUNDS):
        traced = [*map(whole, (*chosen, *added))]
        if any(cap.holds(e) and within_bounds(bounds, e) for e in traced):
            break
        traced_plans = {e.plan for e in traced}
        may_fit = may_fit_under(cap, bounds, sketches, traced)
        untraced = sorted(
            (e for e in sketches if e.plan not in traced_plans and may_fit(e)),
            key=lambda e: (cap.needs(e), e.plan.fingerprint),
        )
        if not untraced:
            break
        round_plans = [e.plan for e in untraced[:_PER_ROUND]]
        trace(round_plans)
        added += round_plans
    return added


def trace_until_none_better(
    trace: Callable[[list[Plan]], list[Estimate]],
    sketches: Sequence[Estimate],
    traced: Sequence[Estimate],
    *,
    cap: Cap,
    goal: Objective,
    bounds: Bounds,
    near_ratio: float,
    most: int,
) -> list[Estimate]:
    """Trace plans, at most four in a round, until no other one may fit and be better than the best that fits,
    or less than ``near_ratio`` worse, by the errors of the sketches seen so far (`BestCaseEstimates`); at
    most ``most`` in all. Return their estimates. Nothing is traced if none of the ``traced`` plans fits and
    has a finite score.

    Plans so near are traced because that of the lowest effect class and with the fewest techniques is
    recommended of them. ``trace`` traces the plans of a round and returns their estimates.
    """
    added: list[Estimate] = []
    while len(added) < most:
        known = [*traced, *added]
        fitting = [score(e, goal) for e in known if cap.holds(e) and within_bounds(bounds, e)]
        if not fitting or math.isinf(min(fitting)):
            break
        known_plans = {e.plan for e in known}
        candidates = [e for e in sketches if e.plan not in known_plans]
        best_cases, limit = BestCaseEstimates(sketches, known, cap, goal), min(fitting) * (1 + near_ratio)
        promising = most_promising(candidates, best_cases, limit)
        if not promising:
            break
        added += trace([e.plan for e in promising[: min(_PER_ROUND, most - len(added))]])
    return added


def most_promising(
    sketches: Sequence[Estimate], best_cases: BestCaseEstimates, limit: float
) -> list[Estimate]:
    """Return those of the sketches (estimates from traces of parts) whose plans, when traced whole, may fit
    device and host and may have a score of at most ``limit``, the one that may have the lowest score first.
    """
    promising = list[tuple[float, str, Estimate]]()
    for sketch in sketches:
        lowest_score, least_bytes = best_cases.of(sketch)
        if lowest_score <= limit and least_bytes <= best_cases.cap.bytes and best_cases.cap.host(sketch):
            promising.append((lowest_score, sketch.plan.fingerprint, sketch))
    return [sketch for *_, sketch in sorted(promising, key=lambda entry: entry[:2])]


def counterfactuals(
    sketches: Sequence[Estimate],
    traced: Sequence[Estimate],
    winner: Estimate,
    *,
    cap: Cap,
    goal: Objective,
    bounds: Bounds | None = None,
    compares: bool = True,
) -> list[Plan]:
    """Return plans to trace for each technique that a plan of ``sketches`` (estimates from traces of parts)
    has and the winner lacks, so that the reason for leaving it out rests on a trace. Plans that were traced
    already are left out.

    For each technique they are, of the plans with it: the best by the goal that may fit (`may_fit_under`);
    and, if no traced plan fits, the one that needs the least device memory of those that may fit, or of all
    if none was traced. If a traced plan with it fits and ``compares`` is False, only plans that may change
    what is said of the technique count (`may_overturn`).
    """
    traced_plans = {e.plan for e in traced}
    limits = bounds or Bounds()
    may_fit = may_fit_under(cap, limits, sketches, traced)
    plans_to_trace: list[Plan] = []
    for name in missing_techniques(winner, sketches):
        traced_rivals = [e for e in traced if e.plan.get(name)]
        untraced = [e for e in sketches if e.plan.get(name) and e.plan not in traced_plans]
        candidates = lowest_score_first(filter(may_fit, untraced), goal)
        fitting = [e for e in traced_rivals if cap.holds(e) and within_bounds(limits, e)]
        if fitting and not compares:
            candidates = may_overturn(candidates, fitting, winner, sketches, goal)
        smallest = candidates if traced_rivals else untraced
        plans_to_trace += [e.plan for e in candidates[:1]]
        if not fitting and smallest:
            plans_to_trace.append(min(smallest, key=lambda e: (cap.needs(e), e.plan.fingerprint)).plan)
    return list(dict.fromkeys(plans_to_trace))


def more_finalists(
    sketches: Sequence[Estimate], traced: Sequence[Estimate], *, cap: Cap, goal: Objective, most: int
) -> list[Plan]:
    """Return the next plans to trace if fewer than ``most`` - 6 of the ``traced`` plans fit: as many as are
    missing, best by the goal first, or fewer if no others may fit. Empty if enough fit.

    A plan may fit if its sketch fits the host, and fits the device after multiplication by the largest ratio
    of needed memory, trace to sketch, of the traced plans with the same techniques (1 if there are none).
    """
    missing_count = most - _SPARE - sum(map(cap.holds, traced))
    by_plan, ratios = {e.plan: e for e in sketches}, dict[frozenset[str], float]()
    for traced_estimate in traced:
        if (sketch := by_plan.pop(traced_estimate.plan, None)) is not None:
            ratio, names = cap.needs(traced_estimate) / cap.needs(sketch), sketch.plan.techniques
            ratios[names] = max(ratio, ratios.get(names, 0.0))
    fitting = (e for e in by_plan.values() if cap.host(e))
    remaining = [e for e in fitting if cap.needs(e) * ratios.get(e.plan.techniques, 1.0) <= cap.bytes]
    return [e.plan for e in lowest_score_first(remaining, goal)[: max(0, missing_count)]]
