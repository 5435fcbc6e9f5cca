"""The complete search for many devices: predict grids of plans, trace the best ones whole, answer, and say
what more hardware would bring.

Nothing depends on how long a computation took, so the answer is the same every time, unless the search's time
limit cuts it. The order of the work is fixed, so that the limit changes only how far the search gets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from memfit.planner.evaluate import Predictor
from memfit.planner.multi_device_bound import multi_device_extent, trace_for_bound
from memfit.planner.multi_device_explanations import (
    explain_techniques,
    is_comparable,
    load_reasons,
    nothing_fits,
    sensitivity,
    trace_before_nothing_fits,
    trace_for_reasons,
    unsupported_reasons,
)
from memfit.planner.multi_device_predictor import MultiDevicePredictor, MultiDeviceRequest
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


def search_many_devices(plan_predictor: Predictor, ranks: int, request: MultiDeviceRequest) -> SearchResult:
    """Search plans for up to ``ranks`` devices of ``plan_predictor``'s machine and return the result.

    Fewer devices are tried only for goals that can prefer them (see `counts`). The result's baseline is
    plain training: DDP on ``ranks`` ranks, or on as many as the batch has samples if these are fewer. After
    ``plan_predictor``'s deadline nothing further is traced once a plan fits, nor are further numbers of
    devices tried. Raises NothingFits, with the changes that would help, if no plan meets memory, deadline and
    budget; UserError if no plan is possible, for example because the batch cannot be divided, if the model
    has no repeated blocks, or if the speed of the device is unknown; NoPartsError if none can be predicted
    because the model's blocks do not run one after the other.
    """
    predictor, goal = MultiDevicePredictor(plan_predictor, request), request.goal

    plain_plan = make_plain_plan(
        min(ranks, plan_predictor.job.batch_size)
    )  # each replica needs at least one sample
    may_share_batch = plain_plan.ranks == 1 or may_share(plan_predictor.dependence, request.accuracy)
    has_whole_batch = request.bounds.micro_batch in (0, plan_predictor.job.batch_size // plain_plan.ranks)

    def meets_limits(estimate: Estimate) -> bool:
        requested = estimate.plan != plain_plan or (has_whole_batch and may_share_batch)
        return requested and predictor.fits_memory(estimate) and within_bounds(request.bounds, estimate)

    sizes = counts(ranks, goal)
    estimates = predictor.over(sizes)
    finalists = _finalists(predictor, estimates, sizes, plain_plan, meets_limits)
    traced_plans = {e.plan for e in finalists}
    candidates = [
        *finalists,
        *(e for e in estimates if e.plan not in traced_plans and e.plan not in predictor.refused),
    ]
    baseline = next((e for e in candidates if e.plan == plain_plan), None)
    if baseline is None or (not baseline.traced and meets_limits(baseline)):
        baseline = _baseline(predictor, plain_plan)
    candidates = [e for e in candidates if e.plan != baseline.plan]
    winner = best([e for e in (*finalists, baseline) if e.traced and meets_limits(e)], goal)
    if winner is None:
        unfinished = unfinished_text(multi_device_extent(predictor, sizes, finalists, None, meets_limits))
        raise nothing_fits(predictor, [*finalists, baseline], ranks, unfinished=unfinished)
    winner, known = _elect(predictor, winner, [*candidates, baseline], sizes, meets_limits)
    traced = [e for e in known.values() if e.traced and e.plan != baseline.plan]
    candidates = [*{e.plan: e for e in (*candidates, *traced)}.values()]
    expected = [predictor.expected(e) for e in candidates]  # compare like with like
    frontier_estimates = [
        e
        for e in frontier([*(e for e in expected if is_comparable(e, winner, goal)), baseline])
        if meets_limits(e)
    ]
    by_plan = {e.plan: e for e in (winner, baseline, *frontier_estimates)}
    smallest = min(by_plan.values(), key=lambda e: e.allocated_bytes.value)

    def choice(e: Estimate, reasons: tuple[Reason, ...] = ()) -> Choice:
        return Choice(
            estimate=e, fits=meets_limits(e), effect=effect_of(e.plan, e.dependence), reasons=reasons
        )

    technique_reasons = (
        *explain_techniques(
            predictor, winner, [*known.values()], meets_limits, by_traces=is_quick(predictor)
        ),
        *load_reasons(winner.plan),
        *unsupported_reasons(predictor),
    )
    recommended = choice(
        winner, (*dependence_reasons(winner.plan, plan_predictor.dependence), *technique_reasons)
    )
    considered = sum(f.considered for n, f in predictor.grid_sketches.items() if n in sizes)
    ordered = sorted(by_plan.values(), key=lambda e: e.allocated_bytes.value)
    return SearchResult(
        goal=goal.value,
        cap_bytes=request.cap.bytes,
        considered=considered,
        baseline=choice(baseline),
        frontier=tuple(recommended if e is winner else choice(e) for e in ordered),
        recommended=recommended,
        smallest=choice(smallest),
        sensitivity=tuple(sensitivity(predictor, winner, candidates, ranks)),
        extent=multi_device_extent(
            predictor, sizes, [*traced, baseline] if baseline.traced else traced, winner, meets_limits
        ),
    )


def _finalists(
    predictor: MultiDevicePredictor,
    estimates: Sequence[Estimate],
    sizes: Sequence[int],
    plain_plan: Plan,
    meets_limits: Callable[[Estimate], bool],
) -> list[Estimate]:
    """Return the estimates of the plans that are traced whole before one is recommended:

    - the most promising ones (`FinalistTracer.run`), and for a model of at most 12 blocks also those that may
      be better than the best of these (`FinalistTracer.close`)
    - if none of these fits and there is time left, those that need the least memory of the plans that may
      fit, and then the best by time and by cost if the deadline or the budget is set
    - if one fits, those that could be better than the best by most (`trace_for_bound`)
    """
    tracer = FinalistTracer(predictor, meets_limits)
    finalists = tracer.run(estimates, plain_plan)
    if not any(map(meets_limits, finalists)) and not predictor.deadline.hit_time_limit:
        known = {e.plan: e for e in (*estimates, *predictor.extremes(sizes), *finalists)}
        finalists += trace_before_nothing_fits(predictor, [*known.values()], meets_limits)
    tracer.close([*estimates, *predictor.extremes(sizes)])
    if not any(map(meets_limits, finalists)) and not predictor.deadline.hit_time_limit:
        bounds = (
            (predictor.bounds.deadline_s, Objective.FASTEST),
            (predictor.bounds.budget_usd, Objective.CHEAPEST),
        )
        for requested, objective in bounds:  # how close the best plans by these goals come
            if requested is not None:
                finalists += FinalistTracer(predictor, predictor.fits_memory, objective).run(
                    estimates, plain_plan
                )
        finalists = [*{e.plan: e for e in finalists}.values()]
    if any(map(meets_limits, finalists)):
        finalists += trace_for_bound(predictor, sizes, finalists, meets_limits)
    return finalists


def _baseline(predictor: MultiDevicePredictor, plain_plan: Plan) -> Estimate:
    """Return the estimate of plain training: from its whole trace, or from its sketch if there is no time
    left for the trace. If it has no sketch, it is traced after the deadline."""
    try:
        return predictor.with_bill(predictor.plan_predictor.whole(plain_plan))
    except TimeUp:
        sketch = predictor.sketch_of_plain(plain_plan)
    if sketch is not None:
        return predictor.estimate(sketch)
    with predictor.deadline.overtime():
        return predictor.with_bill(predictor.plan_predictor.whole(plain_plan))


def _elect(
    predictor: MultiDevicePredictor,
    winner: Estimate,
    candidates: Sequence[Estimate],
    sizes: Sequence[int],
    meets_limits: Callable[[Estimate], bool],
) -> tuple[Estimate, dict[Plan, Estimate]]:
    """Return (the winner, what it is compared with: {plan: estimate} as `_plans_compared_with` returns it).

    The winner is the best of the ``candidates`` and of the plans that are traced for reasons. One of these
    may be better than the ``winner`` so far; the comparison is then repeated with it, at most 3 times in all.
    """
    for _ in range(_ELECTIONS):
        known = _plans_compared_with(predictor, winner, candidates, sizes, meets_limits)
        elected = best([e for e in known.values() if e.traced and meets_limits(e)], predictor.request.goal)
        if elected is None or elected.plan == winner.plan:
            break
        winner, candidates = elected, [*known.values()]
    return winner, known


def _plans_compared_with(
    predictor: MultiDevicePredictor,
    winner: Estimate,
    candidates: Sequence[Estimate],
    sizes: Sequence[int],
    meets_limits: Callable[[Estimate], bool],
) -> dict[Plan, Estimate]:
    """Return {plan: estimate} of the plans with which the winner is compared: the ``candidates``, the plans
    that differ from it along one axis of its grid, and the best and the smallest plans with each technique
    and without it (`MultiDevicePredictor.extremes`). Those on which reasons rest are traced
    (`trace_for_reasons`).

    ``sizes``: the numbers of devices that were searched.
    """
    sketch = predictor.sketch_of(winner.plan)
    neighbours = predictor.neighbours(sketch) if sketch is not None else []
    known = {e.plan: e for e in (*neighbours, *predictor.extremes(sizes), *candidates)}
    with contextlib.suppress(TimeUp):
        for traced in trace_for_reasons(
            predictor, winner, [*known.values()], meets_limits, quick=is_quick(predictor)
        ):
            known[traced.plan] = traced
    return known
