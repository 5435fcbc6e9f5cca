"""The complete search for many devices: price grids of plans, trace the best ones whole, answer, and say what
more hardware would bring.

Nothing depends on how long a computation took, so the answer is the same every time, unless the search's time
limit cuts it. The order of the work is fixed, so that the limit changes only how far the search gets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from memfit.planner.device_pricing import Aim, Scale
from memfit.planner.evaluate import Pricer
from memfit.planner.explanations import (
    explain_techniques,
    is_comparable,
    load_reasons,
    nothing_fits,
    sensitivity,
    traced_before_nothing_fits,
    traced_for_reasons,
    unsupported_reasons,
)
from memfit.planner.multi_device_bound import scale_extent, traced_for_bound
from memfit.planner.multi_device_shortlist import FinalistTracer, is_quick
from memfit.planner.plan_space import dependence_reasons, may_share
from memfit.planner.search_bound import unfinished_text
from memfit.planner.selection import Objective, best, frontier, within_bounds
from memfit.techniques.registry import effect_of, make_plain_plan
from memfit.types.deadline import TimeUp
from memfit.types.plan import Plan
from memfit.types.result import Choice, Estimate, Reason, SearchResult

_ELECTIONS = 3  # a plan that is traced for a reason may turn out better than the winner


def counts(ranks: int, goal: Objective) -> tuple[int, ...]:
    """Return the numbers of devices to try, largest first: ``ranks``; and if the goal can prefer fewer
    devices (cheapest, greenest, fewest), also half of that, a quarter and so on, while these are whole
    numbers.
    """
    if goal in (Objective.FASTEST, Objective.SMALLEST):
        return (ranks,)
    rank_counts = [ranks]
    while rank_counts[-1] % 2 == 0:
        rank_counts.append(rank_counts[-1] // 2)
    return tuple(rank_counts)


def search_scale(pricer: Pricer, ranks: int, aim: Aim) -> SearchResult:
    """Search plans for up to ``ranks`` devices of the pricer's machine and return the result.

    Fewer devices are tried only for goals that can prefer them (see `counts`). The result's baseline is DDP
    on ``ranks`` ranks, or on as many as the batch has samples if these are fewer. After the pricer's deadline
    nothing further is traced once a plan fits, nor are further numbers of devices tried. Raises NothingFits,
    with the changes that would help, if no plan meets memory, deadline and budget; UserError if no plan is
    possible, for example because the batch cannot be divided, if the model has no repeated blocks, or if the
    speed of the device is unknown.
    """
    scale, goal = Scale(pricer, aim), aim.goal

    plain_plan = make_plain_plan(min(ranks, pricer.job.batch_size))  # each replica needs at least one sample
    may_share_batch = plain_plan.ranks == 1 or may_share(pricer.dependence, aim.accuracy)
    has_whole_batch = aim.bounds.micro_batch in (0, pricer.job.batch_size // plain_plan.ranks)

    def fits(estimate: Estimate) -> bool:
        requested = estimate.plan != plain_plan or (has_whole_batch and may_share_batch)
        return requested and scale.fits_memory(estimate) and within_bounds(aim.bounds, estimate)

    sizes = counts(ranks, goal)
    estimates = scale.over(sizes)
    finalists = _finalists(scale, estimates, sizes, plain_plan, fits)
    traced_plans = {e.plan for e in finalists}
    candidates = [
        *finalists,
        *(e for e in estimates if e.plan not in traced_plans and e.plan not in scale.refused),
    ]
    baseline = next((e for e in candidates if e.plan == plain_plan), None)
    if baseline is None or (not baseline.traced and fits(baseline)):
        baseline = _baseline(scale, plain_plan)
    candidates = [e for e in candidates if e.plan != baseline.plan]
    winner = best([e for e in (*finalists, baseline) if e.traced and fits(e)], goal)
    if winner is None:
        unfinished = unfinished_text(scale_extent(scale, sizes, finalists, None, fits))
        raise nothing_fits(scale, [*finalists, baseline], ranks, unfinished=unfinished)
    winner, known = _elected(scale, winner, [*candidates, baseline], sizes, fits)
    traced = [e for e in known.values() if e.traced and e.plan != baseline.plan]
    candidates = [*{e.plan: e for e in (*candidates, *traced)}.values()]
    expected = [scale.expected(e) for e in candidates]  # compare like with like
    frontier_estimates = [
        e for e in frontier([*(e for e in expected if is_comparable(e, winner, goal)), baseline]) if fits(e)
    ]
    by_plan = {e.plan: e for e in (winner, baseline, *frontier_estimates)}
    smallest = min(by_plan.values(), key=lambda e: e.allocated_bytes.value)

    def choice(e: Estimate, reasons: tuple[Reason, ...] = ()) -> Choice:
        return Choice(estimate=e, fits=fits(e), effect=effect_of(e.plan, e.dependence), reasons=reasons)

    technique_reasons = (
        *explain_techniques(scale, winner, [*known.values()], fits, by_traces=is_quick(scale)),
        *load_reasons(winner.plan),
        *unsupported_reasons(scale),
    )
    recommended = choice(winner, (*dependence_reasons(winner.plan, pricer.dependence), *technique_reasons))
    considered = sum(f.considered for n, f in scale.found.items() if n in sizes)
    ordered = sorted(by_plan.values(), key=lambda e: e.allocated_bytes.value)
    return SearchResult(
        goal=goal.value,
        cap_bytes=aim.cap_bytes,
        considered=considered,
        baseline=choice(baseline),
        frontier=tuple(recommended if e is winner else choice(e) for e in ordered),
        recommended=recommended,
        smallest=choice(smallest),
        sensitivity=tuple(sensitivity(scale, winner, candidates, ranks)),
        extent=scale_extent(scale, sizes, [*traced, baseline] if baseline.traced else traced, winner, fits),
    )


def _finalists(
    scale: Scale,
    estimates: Sequence[Estimate],
    sizes: Sequence[int],
    plain_plan: Plan,
    fits: Callable[[Estimate], bool],
) -> list[Estimate]:
    """Return the estimates of the plans that are traced whole before one is recommended: those of
    `FinalistTracer`, of a small model all that may be better than the best of these; if none of them fits,
    others that may; and if one does, those of `traced_for_bound`.
    """
    tracer = FinalistTracer(scale, fits)
    finalists = tracer.run(estimates, plain_plan)
    if not any(map(fits, finalists)) and not scale.deadline.cut:
        known = {e.plan: e for e in (*estimates, *scale.extremes(sizes), *finalists)}
        finalists += traced_before_nothing_fits(scale, [*known.values()], fits)
    tracer.close([*estimates, *scale.extremes(sizes)])
    if not any(map(fits, finalists)) and not scale.deadline.cut:
        bounds = ((scale.bounds.deadline_s, Objective.FASTEST), (scale.bounds.budget_usd, Objective.CHEAPEST))
        for requested, objective in bounds:  # how close the best plans by these goals come
            if requested is not None:
                finalists += FinalistTracer(scale, scale.fits_memory, objective).run(estimates, plain_plan)
        finalists = [*{e.plan: e for e in finalists}.values()]
    if any(map(fits, finalists)):
        finalists += traced_for_bound(scale, sizes, finalists, fits)
    return finalists


def _baseline(scale: Scale, plain_plan: Plan) -> Estimate:
    """Return the estimate of plain training: from its whole trace, or from its sketch if there is no time
    left for the trace and it has one.
    """
    try:
        return scale.billed(scale.pricer.whole(plain_plan))
    except TimeUp:
        sketch = scale.sketch_of_plain(plain_plan)
    if sketch is not None:
        return scale.estimate(sketch)
    with scale.deadline.overtime():
        return scale.billed(scale.pricer.whole(plain_plan))


def _elected(
    scale: Scale,
    winner: Estimate,
    candidates: Sequence[Estimate],
    sizes: Sequence[int],
    fits: Callable[[Estimate], bool],
) -> tuple[Estimate, dict[Plan, Estimate]]:
    """Return (the winner, what it is compared with as `_plans_compared_with` has it).

    The winner is the best of the ``candidates`` and of the plans that are traced for reasons: one of these
    may be better than the ``winner`` so far.
    """
    for _ in range(_ELECTIONS):
        known = _plans_compared_with(scale, winner, candidates, sizes, fits)
        elected = best([e for e in known.values() if e.traced and fits(e)], scale.aim.goal)
        if elected is None or elected.plan == winner.plan:
            break
        winner, candidates = elected, [*known.values()]
    return winner, known


def _plans_compared_with(
    scale: Scale,
    winner: Estimate,
    candidates: Sequence[Estimate],
    sizes: Sequence[int],
    fits: Callable[[Estimate], bool],
) -> dict[Plan, Estimate]:
    """Return {plan: estimate} of the plans with which the winner is compared: the ``candidates``, the plans
    that differ from it along one axis of its grid, and the best and the smallest plans with each technique
    and without it (`Scale.extremes`). Those on which reasons rest are traced (`traced_for_reasons`).

    ``sizes``: the numbers of devices that were searched.
    """
    sketch = scale.sketch_of(winner.plan)
    neighbours = scale.neighbours(sketch) if sketch is not None else []
    known = {e.plan: e for e in (*neighbours, *scale.extremes(sizes), *candidates)}
    with contextlib.suppress(TimeUp):
        for traced in traced_for_reasons(scale, winner, [*known.values()], fits, quick=is_quick(scale)):
            known[traced.plan] = traced
    return known
