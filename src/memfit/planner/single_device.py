"""Choose which plans are worth tracing whole, for one device or for several that only divide the batch.

Every plan is sketched (estimated by adding up traces of parts), the best ones are traced whole, and then
plans that lack a technique of the best one, or have one that it lacks, so that the answer and its reasons
rest on traces.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet

from memfit.engines.registry import engine
from memfit.planner.capacity import Cap, Fits, memory_cap
from memfit.planner.evaluate import SLOW_TO_TRACE, Predictor
from memfit.planner.machine_calibration import calibrate, score_band
from memfit.planner.plan_space import effect_then_size_key, may_split, plans, usable
from memfit.planner.recompute_budget import try_optimal_checkpointing
from memfit.planner.request import Progress, Request, limit_micro_batches
from memfit.planner.selection import (
    TIE_RATIO,
    Objective,
    best,
    lowest_score_first,
    respects_micro_batch,
)
from memfit.planner.shortlist import (
    counterfactuals,
    finalists,
    trace_until_none_better,
    trace_until_one_fits,
    trace_until_some_fit,
)
from memfit.techniques.base import StepPart
from memfit.techniques.recompute.optimal import OPTIMAL_CHECKPOINTING
from memfit.techniques.registry import make_plain_plan, without
from memfit.trace.trace_pool import from_both_ends
from memfit.types.deadline import Deadline, TimeUp
from memfit.types.dependence import DependenceCause, SampleDependence
from memfit.types.errors import UserError
from memfit.types.plan import Plan
from memfit.types.result import Estimate, Interval, Reason, ReasonKind

FINALISTS = 14
_FEWER_FINALISTS = 8  # used if traces are long, as for models with thousands of small tensors
_LONG_TRACE_CALLS = 10_000
# Operators of plain training, over all plans that are traced after the finalists; fewest and most of these.
_MORE_CALLS, _FEWEST_MORE, _MOST_MORE, _PASSES = 40_000, 4, 48, 3
_OFFLOAD = "activation-offload"
_ONLY_SAVING = (SLOW_TO_TRACE, "gradient-accumulation", _OFFLOAD)
_TRACING_SHARE = 0.4  # of the time limit, which is left for traces of whole plans
_SAVING_MOST = ({"activation-checkpointing"}, {"activation-checkpointing", "chunking"})
# Most rounds, and seconds of each, to measure the best plan and its rivals while the best plan still changes.
_SETTLING_ROUNDS, _SETTLING_S = 3, 3.0
# Rounds of plans traced for the reasons: first the best with each technique, then only for techniques with
# which no traced plan fits, though another may. Long traces: one round, of at most so many plans.
_COMPARING_ROUNDS, _FITTING_ROUNDS, _LONG_COUNTERFACTUALS = 2, 4, 4


def _no_micro_batches(request: Request, dependence: SampleDependence | None) -> UserError:
    """Return the error to raise if no plan of the search has the requested micro-batch.

    Its message says why the batch may not be split: the step cannot be computed for a part of it, the terms
    of the loss would get wrong weights, or its samples depend on each other. If it may be split, the message
    says that exclusions, accuracy and engine leave no such plan. ``dependence``: whether samples depend on
    each other; None for a batch of one.
    """
    size = request.bounds.micro_batch
    if dependence is None or may_split(dependence, request.accuracy):
        return UserError(
            f"the excluded techniques, accuracy and engine leave no plan with a micro-batch of {size}",
            hint="relax --without (exclude fewer techniques) or --accuracy (allow larger changes of the "
            "training), or choose another --engine or --micro-batch (or none)",
        )
    effect_on_training = dependence.changes  # such as "changes BatchNorm's statistics"
    how_this_is_known, mean_over_counted_terms = dependence.reason, dependence.way_out
    if dependence.cause is DependenceCause.SIZE:
        return UserError(
            f"a micro-batch of {size} is not possible, because the step can be computed for the whole batch "
            f"only ({how_this_is_known})",
            hint="leave out --micro-batch",
        )
    if dependence.cause is DependenceCause.WEIGHTS:
        return UserError(
            f"a micro-batch of {size} weights the terms of the loss wrongly ({how_this_is_known})",
            allowed=f"a loss that is {mean_over_counted_terms}",
            hint="or leave out --micro-batch",
        )
    return UserError(
        f"a micro-batch of {size} would change the training: splitting the batch {effect_on_training} "
        f"({how_this_is_known})",
        allowed="--accuracy any",
        hint="or leave out --micro-batch",
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EstimatedPlans:
    """What `estimate_plans` returns. ``traced``: estimates of the plans that were traced whole, with plain
    training, even if the request forbids its micro-batch. ``count``: number of plans of the search that were
    estimated, by a sketch or by a trace. ``unsketched_count``: number of plans of the search that there was
    no time to sketch. ``left_out``: reasons why techniques were left out."""

    traced: list[Estimate]
    count: int
    unsketched_count: int
    left_out: tuple[Reason, ...]


def test_dependence(predictor: Predictor, request: Request, deadline: Deadline, progress: Progress) -> None:
    """Test whether samples of the batch depend on each other, and limit micro-batches by that
    (`limit_micro_batches`). Meanwhile, until the deadline, trace the parts of sketches that do not split the
    batch (`Predictor.test_dependence`), except the longest ones if traces take long (`is_long`); but not if
    the request has a micro-batch, which may need none of these."""
    facts = predictor.job_facts
    if facts.batch_size > 1 and not request.bounds.micro_batch:
        techniques = usable(facts, request.accuracy)[0]
        excluded_names = request.bounds.without
        allowed = [t for t in techniques if StepPart.PASSES in t.changes and t.name not in excluded_names]
        refusals_of = engine(request.engine).refusals
        whole_batch_plans = [plan for plan in plans(facts, allowed) if not refusals_of(plan)]
        if is_long(predictor):
            whole_batch_plans = [plan for plan in whole_batch_plans if SLOW_TO_TRACE not in plan]
        with deadline.earlier_by(_TRACING_SHARE * (request.within_s or 0.0)):
            predictor.test_dependence(
                whole_batch_plans, deadline, lambda *counts: progress("search", *counts)
            )
    limit_micro_batches(predictor, request.accuracy)


def untraceable(predictor: Predictor, request: Request) -> dict[str, str]:
    """Return the techniques of the search that the job's model cannot be traced with, each with its first
    setting and as few others as possible, -> a text that says with which techniques, and why."""
    techniques = usable(predictor.job_facts, request.accuracy)[0]
    allowed = [t for t in techniques if t.name not in request.bounds.without]
    refusals_of = engine(request.engine).refusals
    searched = sorted(plans(predictor.job_facts, allowed), key=lambda plan: len(plan.uses))
    refusals = {}
    for name in (t.name for t in allowed if StepPart.PASSES in t.changes):
        plan = next((p for p in searched if name in p and not refusals_of(p)), None)
        if plan is not None and (error := predictor.trace_error(plan)):
            names = " + ".join(sorted(plan.techniques - request.baseline.techniques))
            refusals[name] = f"{names} cannot be traced with this model: {error}"
    return refusals


def estimate_plans(
    predictor: Predictor,
    request: Request,
    cap_bytes: int,
    *,
    progress: Progress,
    meets_limits: Fits,
    negligible_state_bytes: int | None,
    sketches: list[Estimate],
) -> EstimatedPlans:
    """Sketch every plan (estimate it from traces of parts), trace the best ones whole, and, if the request is
    for this machine, time the operators that they need. For another machine, plans with a technique that
    only saves memory are left out if they fit without it (`_may_skip_saving`).

    ``meets_limits`` tells whether a plan fits the memory and keeps to the request's other limits.
    ``negligible_state_bytes``: bytes of parameters, gradients and optimizer state if they are too small for
    another optimizer to matter, else None. The sketches are appended to ``sketches``, so that the caller has
    them if the search is interrupted; after the predictor's deadline they lack those for which parts were not
    traced in time. Raises UserError if the requested micro-batch does not divide the batch, or if no plan has
    it; RunError if operators cannot be timed.
    """
    dependence = predictor.dependence if predictor.job.batch_size > 1 else None
    usable_techniques, left_out = usable(
        predictor.job_facts,
        request.accuracy,
        negligible_state_bytes=negligible_state_bytes,
        dependence=dependence,
    )
    techniques = [t for t in usable_techniques if t.name not in request.bounds.without]
    refusals_of = engine(request.engine).refusals
    plain_plan = make_plain_plan(request.ranks)  # always estimated: the other plans are compared with it
    all_plans = [
        plan
        for plan in plans(predictor.job_facts, techniques)
        if not refusals_of(plan)
        and (plan == plain_plan or respects_micro_batch(plan, request.bounds, predictor.job_facts.batch_size))
    ]
    if not any(
        respects_micro_batch(plan, request.bounds, predictor.job_facts.batch_size) for plan in all_plans
    ):
        raise _no_micro_batches(request, dependence)
    had_hit_limit = not request.continues and predictor.had_hit_time_limit(*plans_asked_for(request))
    if had_hit_limit and any(map(predictor.load_parts, all_plans)):
        known_plans = [plan for plan in all_plans if predictor.load_traces(plan)]
        if any(map(meets_limits, predictor.whole_in_time(known_plans))):
            predictor.deadline.stop()
    kept_s = _TRACING_SHARE * (request.within_s or 0.0)
    may_skip = _may_skip_saving(request)
    saving_plans = [plan for plan in all_plans if may_skip and not plan.techniques.isdisjoint(_ONLY_SAVING)]
    with predictor.deadline.earlier_by(kept_s):
        _sketch([plan for plan in all_plans if plan not in saving_plans], predictor, sketches, progress)
        fitting_plans = {e.plan for e in filter(meets_limits, sketches)}
        skipped_plans = _needless(saving_plans, fitting_plans)
        _sketch([plan for plan in saving_plans if plan not in skipped_plans], predictor, sketches, progress)
    try:
        if not sketches:
            raise TimeUp
        estimates = _trace_best(predictor, request, cap_bytes, progress, meets_limits, sketches)
        # Traces may need more than sketches.
        needs = memory_cap(cap_bytes, request.machine, request.engine).needs
        fitting_plans = _fitting_as_traced(sketches, estimates, meets_limits, needs)
        needed_plans = skipped_plans - _needless(skipped_plans, fitting_plans)
        if needed_plans:
            _sketch([plan for plan in all_plans if plan in needed_plans], predictor, sketches, progress)
            skipped_plans -= needed_plans
            estimates = _trace_best(predictor, request, cap_bytes, progress, meets_limits, sketches)
    except TimeUp:
        estimates = _estimates_in_time(
            predictor,
            request,
            cap_bytes,
            meets_limits,
            sketches,
            [plan for plan in all_plans if plan not in skipped_plans],
            progress,
        )
    all_plans = [plan for plan in all_plans if plan not in skipped_plans]
    for name in _ONLY_SAVING:
        plans_with_it = [plan for plan in saving_plans if name in plan]
        if plans_with_it and skipped_plans.issuperset(plans_with_it):
            left_out = (*left_out, Reason(kind=ReasonKind.LEFT_OUT_ONLY_SAVES, technique=name))
    estimated_plans = {e.plan for e in (*sketches, *estimates)}
    return EstimatedPlans(
        traced=estimates,
        count=sum(plan in estimated_plans for plan in all_plans),
        unsketched_count=len(all_plans) - len(sketches),
        left_out=left_out,
    )


def _may_skip_saving(request: Request) -> bool:
    """Return whether plans with a technique of `_ONLY_SAVING` are left out if they fit without it. These save
    memory and add time, so such a plan is never better unless the goal is memory. On this machine the
    measured time decides."""
    saves_time = request.goal in (Objective.FASTEST, Objective.CHEAPEST, Objective.GREENEST)
    return saves_time and not request.is_here


def _needless(saving_plans: Iterable[Plan], fitting_plans: AbstractSet[Plan]) -> set[Plan]:
    """Return those of ``saving_plans`` that fit without their techniques of `_ONLY_SAVING`: without one of
    them, or without all, the plan is in ``fitting_plans`` and has no offload, whose sketches are too low."""
    sure_plans = {plan for plan in fitting_plans if _OFFLOAD not in plan}

    def reduced(plan: Plan) -> list[Plan]:
        without_one = [plan.without(name) for name in _ONLY_SAVING if name in plan]
        return [*without_one, functools.reduce(Plan.without, _ONLY_SAVING, plan)]

    return {plan for plan in saving_plans if not sure_plans.isdisjoint(reduced(plan))}


def _fitting_as_traced(
    sketches: Sequence[Estimate],
    traced: Sequence[Estimate],
    meets_limits: Fits,
    needs: Callable[[Estimate], int],
) -> set[Plan]:
    """Return the plans that fit by their trace or, if they were not traced, by their sketch with the largest
    ratio of a trace's need to that of its sketch; none if no traced plan fits."""
    by_plan = {e.plan: e for e in traced}
    fitting_plans = {e.plan for e in filter(meets_limits, traced)}
    if not fitting_plans:
        return set()
    pairs = [(s, by_plan[s.plan]) for s in sketches if s.plan in by_plan and _OFFLOAD not in s.plan]
    factor = max([1.0, *(needs(trace) / needs(sketch) for sketch, trace in pairs)])

    def scaled(interval: Interval | None) -> Interval | None:
        return None if interval is None else interval.scaled(factor)

    for sketch in sketches:
        higher = dataclasses.replace(
            sketch,
            allocated_bytes=sketch.allocated_bytes.scaled(factor),
            reserved_bytes=scaled(sketch.reserved_bytes),
            device_bytes=scaled(sketch.device_bytes),
        )
        if sketch.plan not in by_plan and meets_limits(higher):
            fitting_plans.add(sketch.plan)
    return fitting_plans


def _sketch(
    these_plans: Sequence[Plan], predictor: Predictor, sketches: list[Estimate], progress: Progress
) -> None:
    """Trace the parts of ``these_plans`` and append their sketches to ``sketches``, as far as the time of the
    predictor's deadline allows."""
    with contextlib.suppress(TimeUp):
        predictor.prepare(these_plans, lambda *counts: progress("search", *counts))
    predictor.compose()
    for index, plan in enumerate(these_plans):
        progress("price", index, len(these_plans), plan.label)
        with contextlib.suppress(TimeUp):  # parts that are missing would be traced one after another
            sketches.append(predictor.sketch(plan))


def plans_asked_for(request: Request) -> tuple[object, ...]:
    """Return what decides which plans a search considers, beside job, machine and engine, as values that
    ``json`` accepts: number of ranks, accuracy, requested micro-batch, and names of the excluded techniques.
    """
    bounds = request.bounds
    return request.ranks, request.accuracy.value, bounds.micro_batch, sorted(bounds.without)


def _trace_best(
    predictor: Predictor,
    request: Request,
    cap_bytes: int,
    progress: Progress,
    meets_limits: Fits,
    sketches: list[Estimate],
) -> list[Estimate]:
    """Trace the baseline, the plans with the best sketches, and those on which reasons rest, and return their
    estimates. Raises TimeUp if the predictor's deadline passes before that is done; what was traced is kept
    in the predictor."""
    finalist_count = _FEWER_FINALISTS if is_long(predictor) else FINALISTS
    chosen_plans = finalists(sketches, meets_limits, request.goal, finalist_count)
    finalist_plans = list(dict.fromkeys([request.baseline, *chosen_plans]))

    def trace_and_time(these: list[Plan]) -> list[Estimate]:
        in_order = from_both_ends(_best_first(these, sketches, meets_limits, request.goal))
        predictor.trace_all(in_order, lambda *counts: progress("finalists", *counts))
        if request.is_here:
            calibrate(predictor, request, progress, plans=these)
        return [predictor.whole(plan) for plan in these]

    trace_and_time(finalist_plans)
    cap = memory_cap(cap_bytes, request.machine, request.engine)
    finalist_plans += trace_until_some_fit(
        predictor.whole,
        trace_and_time,
        sketches,
        finalist_plans,
        cap=cap,
        goal=request.goal,
        most=finalist_count,
    )
    finalist_plans += trace_until_one_fits(
        predictor.whole, trace_and_time, sketches, finalist_plans, cap=cap, bounds=request.bounds
    )
    estimates, more = [predictor.whole(plan) for plan in finalist_plans], _more_traces(predictor, request)
    for index in range(_PASSES):  # plans that are traced for a reason may be better
        added = trace_until_none_better(
            trace_and_time,
            sketches,
            estimates,
            cap=cap,
            goal=request.goal,
            bounds=request.bounds,
            near_ratio=_near_ratio(predictor, request),
            most=more,
        )
        if index and not added:
            break
        more -= len(added)
        estimates = [predictor.whole(e.plan) for e in (*estimates, *added)]
        estimates = _with_rivals(predictor, request, meets_limits, estimates, progress)
        estimates = _with_counterfactuals(
            predictor, request, meets_limits, estimates, sketches, cap, progress
        )
    if (
        predictor.job_facts.ranks == 1
        and OPTIMAL_CHECKPOINTING not in request.bounds.without
        and not is_long(predictor)
    ):
        estimates += try_optimal_checkpointing(
            predictor.whole, sketches, estimates, request.goal, cap, progress
        )
    return estimates


def _best_first(
    plans: Sequence[Plan], sketches: Sequence[Estimate], meets_limits: Fits, goal: Objective
) -> list[Plan]:
    """Return the plans in the order in which they are traced, so that a time limit leaves out what matters
    least: the two best by their sketches that fit, the one that needs the least memory, and the others as
    they are.
    """
    chosen = [s for s in sketches if s.plan in plans]
    best_fitting = lowest_score_first(filter(meets_limits, chosen), goal)[:2]
    smallest = sorted(chosen, key=lambda e: (e.allocated_bytes.value, e.plan.fingerprint))[:1]
    return list(dict.fromkeys([*(e.plan for e in (*best_fitting, *smallest)), *plans]))


def _estimates_in_time(
    predictor: Predictor,
    request: Request,
    cap_bytes: int,
    meets_limits: Fits,
    sketches: Sequence[Estimate],
    all_plans: Sequence[Plan],
    progress: Progress,
) -> list[Estimate]:
    """Return the estimates of the plans that were traced before the predictor's deadline, with plain training
    and the baseline.

    If none of them fits, more are traced until one does, however long that takes: the best of those whose
    sketch fits; the one that needs the least memory by its sketch; and of the plans without a sketch the
    simplest with activation checkpointing, and with chunking, too, which save the most as a rule. If a
    micro-batch is requested, which plain training may not have, the simplest other plan comes before these.
    """
    traced_plans = {plan for plan, _ in predictor.traces}
    estimates = {e.plan: e for e in predictor.whole_in_time(p for p in all_plans if p in traced_plans)}
    plain_plan = make_plain_plan(request.ranks)
    progress("finalists", 0, 1, request.baseline.label)
    with predictor.deadline.overtime():
        estimates |= {plan: predictor.whole(plan) for plan in (plain_plan, request.baseline)}
    needs = memory_cap(cap_bytes, request.machine, request.engine).needs
    fitting = lowest_score_first(filter(meets_limits, sketches), request.goal)
    smallest = sorted(sketches, key=lambda e: (needs(e), e.plan.fingerprint))
    excluded = {plain_plan, *(e.plan for e in sketches)}
    chosen = [e.plan for e in (*fitting[:1], *smallest[:1])]
    requested: list[set[str]] = [set()] if request.bounds.micro_batch else []
    for techniques in (*requested, *_SAVING_MOST):
        with_these = [p for p in all_plans if p not in excluded and techniques <= p.techniques]
        chosen += sorted(with_these, key=effect_then_size_key)[:1]
    for index, plan in enumerate(chosen):
        if not any(map(meets_limits, estimates.values())):
            progress("finalists", index, len(chosen), plan.label)
            with predictor.deadline.overtime():
                estimates[plan] = predictor.whole(plan)
    return list(estimates.values())


def _with_rivals(
    predictor: Predictor, request: Request, meets_limits: Fits, estimates: list[Estimate], progress: Progress
) -> list[Estimate]:
    """Return the estimates, and with them those of the plans that lack one technique of the best fitting
    plan. Their sketches may have been too high, so that they were not traced. Plans that the engine does not
    support are left out. If no estimate fits, nothing is added.

    The added plans are traced. If the request is for this machine, their operators are timed, too, and all
    estimates are made anew. If the best plan is then another, the same is done for that one, in at most 3
    rounds in all.
    """
    refusals_of = engine(request.engine).refusals
    winner = best(filter(meets_limits, estimates), request.goal, score_band(predictor, request))
    for _ in range(_SETTLING_ROUNDS):
        if winner is None:
            break
        reduced_plans = dict.fromkeys(without(winner.plan, u.technique) for u in winner.plan.uses)
        rivals = [p for p in reduced_plans if p not in {e.plan for e in estimates} and not refusals_of(p)]
        if request.ranks == 1:
            predictor.trace_all(rivals)
        if request.is_here:
            calibrate(predictor, request, progress, [winner.plan, *rivals], timing_s=_SETTLING_S)
            estimates = [predictor.whole(e.plan) for e in estimates]  # by the new calibration
        estimates = [*estimates, *map(predictor.whole, rivals)]
        previous_winner, winner = (
            winner,
            best(filter(meets_limits, estimates), request.goal, score_band(predictor, request)),
        )
        if winner is None or winner.plan == previous_winner.plan:
            break
    return estimates


def _with_counterfactuals(
    predictor: Predictor,
    request: Request,
    meets_limits: Fits,
    estimates: list[Estimate],
    sketches: list[Estimate],
    cap: Cap,
    progress: Progress,
) -> list[Estimate]:
    """Return the estimates, and with them those of the plans that `counterfactuals` names: plans that have a
    technique which the best fitting plan lacks, so that the reason for leaving it out rests on a trace. If no
    estimate fits, nothing is added.

    If another plan is the best one then, `_with_rivals` adds the plans that lack one of its techniques. All
    of this is done at most 6 times; after the first two, only for techniques with which no traced plan fits.
    If traces are long, it is done once, for at most 4 plans: those with the most such techniques.
    """
    rounds = 1 if is_long(predictor) else _COMPARING_ROUNDS + _FITTING_ROUNDS
    for index in range(rounds):
        band = score_band(predictor, request)
        winner = best(filter(meets_limits, estimates), request.goal, band)
        if winner is None:
            break
        candidate_plans = counterfactuals(
            sketches,
            estimates,
            winner,
            cap=cap,
            goal=request.goal,
            bounds=request.bounds,
            compares=rounds > 1 and index < _COMPARING_ROUNDS,
        )
        if rounds == 1:
            candidate_plans = _covering(candidate_plans, winner.plan)[:_LONG_COUNTERFACTUALS]
        if not candidate_plans:
            break
        if request.ranks == 1:
            predictor.trace_all(candidate_plans, lambda *counts: progress("finalists", *counts))
        if request.is_here:
            calibrate(predictor, request, progress, plans=candidate_plans, timing_s=_SETTLING_S)
        estimates = [
            predictor.whole(plan) for plan in dict.fromkeys([*(e.plan for e in estimates), *candidate_plans])
        ]
        new_winner = best(filter(meets_limits, estimates), request.goal, band)
        if new_winner is None or new_winner.plan != winner.plan:
            estimates = _with_rivals(predictor, request, meets_limits, estimates, progress)
    return estimates


def _near_ratio(predictor: Predictor, request: Request) -> float:
    """Return by how much a score may lie above the lowest and still always counts as equal to it in `best`,
    as a ratio: 0.03 for the goals of least memory and fewest devices, else the low end of `score_band`."""
    if request.goal in (Objective.SMALLEST, Objective.FEWEST):
        return TIE_RATIO
    return score_band(predictor, request).low


def _more_traces(predictor: Predictor, request: Request) -> int:
    """Return how many plans may be traced after the finalists: 40,000 over the number of operators of plain
    training, but 4 to 48. On this machine, where the operators of each are timed, it is 4."""
    if request.is_here:
        return _FEWEST_MORE
    calls = len(predictor.trace(make_plain_plan(predictor.job_facts.ranks)).ops)
    return min(max(_MORE_CALLS // calls, _FEWEST_MORE), _MOST_MORE)


def _covering(candidates: list[Plan], winner: Plan) -> list[Plan]:
    """Return candidates chosen one after the other: each time the one with the most techniques that neither
    the ``winner`` nor an earlier one has, until none adds a technique."""
    covered, ordered = winner.techniques, list[Plan]()
    while candidates:
        chosen = max(candidates, key=lambda p: len(p.techniques - covered))
        added = chosen.techniques - covered
        if not added:
            break
        covered |= added
        ordered.append(chosen)
    return ordered


def is_long(predictor: Predictor) -> bool:
    """Return whether the trace of plain training has more than 10,000 operators, so that traces take long."""
    return len(predictor.trace(make_plain_plan(predictor.job_facts.ranks)).ops) > _LONG_TRACE_CALLS
