"""Choose which plans are worth tracing whole, for one device or for several that only divide the batch.

Every plan is sketched (estimated by adding up traces of parts), the best ones are traced whole, and then
plans that lack a technique of the best one, or have one that it lacks, so that the answer and its reasons
rest on traces.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

from memfit.engines.registry import engine
from memfit.planner.capacity import Fits, host_holds_under, needed_bytes
from memfit.planner.evaluate import Pricer
from memfit.planner.machine_calibration import calibrate, score_band
from memfit.planner.plan_space import complexity, may_split, plans, usable
from memfit.planner.recompute_budget import Cap, budgeted
from memfit.planner.request import Progress, Request
from memfit.planner.selection import (
    TIE_RATIO,
    Objective,
    best,
    respects_micro_batch,
    score,
)
from memfit.planner.shortlist import (
    counterfactuals,
    finalists,
    until_none_better,
    until_one_fits,
    until_some_fit,
)
from memfit.techniques.recompute.optimal import NAME
from memfit.techniques.registry import make_plain_plan, without
from memfit.trace.trace_pool import from_both_ends
from memfit.types.deadline import TimeUp
from memfit.types.dependence import DependenceCause, SampleDependence
from memfit.types.errors import UserError
from memfit.types.plan import Bounds, Plan
from memfit.types.result import Estimate, Reason

FINALISTS = 14
_FEWER_FINALISTS = 8  # used if traces are long, as for models with thousands of small tensors
_LONG_TRACE_CALLS = 10_000
# Operators of plain training, over all plans that are traced after the finalists; fewest and most of these.
_MORE_CALLS, _FEWEST_MORE, _MOST_MORE, _PASSES = 40_000, 4, 48, 3
_TRACING_SHARE = 0.4  # of the time limit, which is left for traces of whole plans
_SAVING_MOST = ({"activation-checkpointing"}, {"activation-checkpointing", "chunking"})
# Most rounds, and seconds of each, to measure the best plan and its rivals while the best plan still changes.
_SETTLING_ROUNDS, _SETTLING_BUDGET_S = 3, 3.0
# Rounds of plans traced for the reasons: first the best with each technique, then only for techniques with
# which no traced plan fits, though another may. Long traces: one round, of at most so many plans.
_COMPARING_ROUNDS, _FITTING_ROUNDS, _LONG_COUNTERFACTUALS = 2, 4, 4


def _no_micro_batches(request: Request, dependence: SampleDependence | None) -> UserError:
    """Return the error to raise if no plan of the search has the requested micro-batch. If splitting the
    batch is not allowed because its samples depend on each other, the error says so; else that exclusions,
    accuracy and engine leave no such plan. ``dependence``: whether samples depend on each other; None for a
    batch of one.
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
    is_weighted_wrongly = dependence.cause is DependenceCause.WEIGHTS
    return UserError(
        f"a micro-batch of {size} would change the training: splitting the batch {effect_on_training} "
        f"({how_this_is_known})",
        allowed=f"a loss that is {mean_over_counted_terms}" if is_weighted_wrongly else "--accuracy any",
        hint="or leave out --micro-batch",
    )


def price_plans(
    pricer: Pricer,
    request: Request,
    cap_bytes: int,
    *,
    progress: Progress,
    fits: Fits,
    small_state_bytes: int | None,
    sketches: list[Estimate],
) -> tuple[list[Estimate], int, tuple[Reason, ...]]:
    """Sketch every plan, trace the best ones whole, and, if the request is for this machine, time the
    operators that they need.

    Returns (estimates of the traced plans, number of sketched plans, reasons why techniques were left out).
    Plain training is among the traced plans, even if the request forbids its micro-batch.
    ``small_state_bytes``: bytes of parameters, gradients and optimizer state if they are too small for
    another optimizer to matter, else None. The sketches are appended to ``sketches``, so that the caller has
    them if the search is interrupted; after the pricer's deadline they lack those for which parts were not
    traced in time. Raises UserError if no plan has the requested micro-batch.
    """
    dependence = pricer.dependence if pricer.job.batch_size > 1 else None
    usable_techniques, left_out = usable(
        pricer.space, request.accuracy, small_states_bytes=small_state_bytes, dependence=dependence
    )
    techniques = [t for t in usable_techniques if t.name not in request.bounds.without]
    refusals_of = engine(request.engine).supports
    plain_plan = make_plain_plan(request.ranks)  # always priced, because the other plans are compared with it
    all_plans = [
        plan
        for plan in plans(pricer.space, techniques)
        if not refusals_of(plan)
        and (plan == plain_plan or respects_micro_batch(plan, request.bounds, pricer.space.batch_size))
    ]
    if not any(respects_micro_batch(plan, request.bounds, pricer.space.batch_size) for plan in all_plans):
        raise _no_micro_batches(request, dependence)
    was_cut = not request.continues and pricer.was_cut(*plans_asked_for(request))
    if was_cut and any(map(pricer.has_parts, all_plans)):
        known_plans = [plan for plan in all_plans if pricer.is_known(plan)]
        if any(map(fits, pricer.whole_in_time(known_plans))):
            pricer.deadline.stop()
    kept_s = _TRACING_SHARE * (request.within_s or 0.0)
    with pricer.deadline.earlier_by(kept_s):
        with contextlib.suppress(TimeUp):
            pricer.prepare(all_plans, lambda *counts: progress("search", *counts))
        pricer.compose()
        for index, plan in enumerate(all_plans):
            progress("price", index, len(all_plans), plan.label)
            with contextlib.suppress(TimeUp):  # parts that are missing would be traced one after another
                sketches.append(pricer.sketch(plan))
    try:
        if not sketches:
            raise TimeUp
        estimates = _traced(pricer, request, cap_bytes, progress, fits, sketches)
    except TimeUp:
        estimates = _traced_in_time(pricer, request, cap_bytes, fits, sketches, all_plans)
    return estimates, len(all_plans), left_out


def plans_asked_for(request: Request) -> tuple[object, ...]:
    """Return what decides which plans are searched, as what ``json`` accepts."""
    bounds = request.bounds
    return request.ranks, request.accuracy.value, bounds.micro_batch, sorted(bounds.without)


def _traced(
    pricer: Pricer,
    request: Request,
    cap_bytes: int,
    progress: Progress,
    fits: Fits,
    sketches: list[Estimate],
) -> list[Estimate]:
    """Trace the plans with the best sketches, and those on which reasons rest, and return their estimates.
    Raises TimeUp if the pricer's deadline passes before that is done; what was traced is kept.
    """
    finalist_count = _FEWER_FINALISTS if is_long(pricer) else FINALISTS
    finalist_plans = finalists(sketches, fits, request.goal, finalist_count)

    def look(these: list[Plan]) -> list[Estimate]:
        in_order = from_both_ends(_best_first(these, sketches, fits, request.goal))
        pricer.trace_all(in_order, lambda *counts: progress("finalists", *counts))
        if request.is_here:
            calibrate(pricer, request, progress, plans=these)
        return [pricer.whole(plan) for plan in these]

    look(finalist_plans)
    cap = memory_cap(request, cap_bytes)
    finalist_plans += until_some_fit(
        pricer.whole, look, sketches, finalist_plans, cap=cap, goal=request.goal, most=finalist_count
    )
    finalist_plans += until_one_fits(
        pricer.whole, look, sketches, finalist_plans, cap=cap, bounds=_bounds(request, pricer)
    )
    estimates, more = [pricer.whole(plan) for plan in finalist_plans], _more_traces(pricer, request)
    for index in range(_PASSES):  # plans that are traced for a reason may be better
        added = until_none_better(
            look,
            sketches,
            estimates,
            cap=cap,
            goal=request.goal,
            bounds=_bounds(request, pricer),
            near_ratio=_near_ratio(pricer, request),
            most=more,
        )
        if index and not added:
            break
        more -= len(added)
        estimates = [pricer.whole(e.plan) for e in (*estimates, *added)]
        estimates = _with_rivals(pricer, request, fits, estimates, progress)
        estimates = _with_counterfactuals(pricer, request, fits, estimates, sketches, cap, progress)
    if pricer.space.ranks == 1 and NAME not in request.bounds.without and not is_long(pricer):
        estimates += budgeted(pricer.whole, sketches, estimates, request.goal, cap, progress)
    return estimates


def _best_first(
    plans: Sequence[Plan], sketches: Sequence[Estimate], fits: Fits, goal: Objective
) -> list[Plan]:
    """Return the plans in the order in which they are traced, so that a time limit leaves out what matters
    least: the two best by their sketches that fit, the one that needs the least memory, and the others as
    they are.
    """
    chosen = [s for s in sketches if s.plan in plans]
    best_fitting = sorted(filter(fits, chosen), key=lambda e: (score(e, goal), e.plan.fingerprint))[:2]
    smallest = sorted(chosen, key=lambda e: (e.allocated_bytes.value, e.plan.fingerprint))[:1]
    return list(dict.fromkeys([*(e.plan for e in (*best_fitting, *smallest)), *plans]))


def _traced_in_time(
    pricer: Pricer,
    request: Request,
    cap_bytes: int,
    fits: Fits,
    sketches: Sequence[Estimate],
    all_plans: Sequence[Plan],
) -> list[Estimate]:
    """Return the estimates of the plans that were traced before the pricer's deadline, with plain training.

    If none of them fits, more are traced until one does, however long that takes: the best of those whose
    sketch fits; the one that needs the least memory by its sketch; and of the plans without a sketch the
    simplest with activation checkpointing, and with chunking, too, which save the most as a rule.
    """
    traced_plans = {plan for plan, _ in pricer.traces}
    estimates = {e.plan: e for e in pricer.whole_in_time(p for p in all_plans if p in traced_plans)}
    plain_plan = make_plain_plan(request.ranks)
    estimates[plain_plan] = pricer.whole(plain_plan)
    needs = memory_cap(request, cap_bytes).needs
    fitting = sorted(filter(fits, sketches), key=lambda e: (score(e, request.goal), e.plan.fingerprint))
    smallest = sorted(sketches, key=lambda e: (needs(e), e.plan.fingerprint))
    sketched = {e.plan for e in sketches}
    chosen = [e.plan for e in (*fitting[:1], *smallest[:1])]
    for wanted in _SAVING_MOST:
        with_these = [p for p in all_plans if p not in sketched and wanted <= p.techniques]
        chosen += sorted(with_these, key=complexity)[:1]
    for plan in chosen:
        if not any(map(fits, estimates.values())):
            with pricer.deadline.overtime():
                estimates[plan] = pricer.whole(plan)
    return list(estimates.values())


def _with_rivals(
    pricer: Pricer, request: Request, fits: Fits, estimates: list[Estimate], progress: Progress
) -> list[Estimate]:
    """Return the estimates, and with them those of the plans that lack one technique of the best fitting
    plan. Their sketches may have been too high, so that they were not traced. Plans that the engine does not
    support are left out. If no estimate fits, nothing is added.

    The added plans are traced. On this machine, their operators are timed, and all estimates are then made
    anew. If the best plan is then another, the same is done for that one, in at most 3 rounds in all.
    """
    refusals_of = engine(request.engine).supports
    winner = best(filter(fits, estimates), request.goal, score_band(pricer, request))
    for _ in range(_SETTLING_ROUNDS):
        if winner is None:
            break
        reduced_plans = dict.fromkeys(without(winner.plan, u.technique) for u in winner.plan.uses)
        rivals = [p for p in reduced_plans if p not in {e.plan for e in estimates} and not refusals_of(p)]
        if request.ranks == 1:
            pricer.trace_all(rivals)
        if request.is_here:
            calibrate(pricer, request, progress, [winner.plan, *rivals], budget_s=_SETTLING_BUDGET_S)
            estimates = [pricer.whole(e.plan) for e in estimates]  # priced with the new calibration
        estimates = [*estimates, *map(pricer.whole, rivals)]
        previous_winner, winner = (
            winner,
            best(filter(fits, estimates), request.goal, score_band(pricer, request)),
        )
        if winner is None or winner.plan == previous_winner.plan:
            break
    return estimates


def _with_counterfactuals(
    pricer: Pricer,
    request: Request,
    fits: Fits,
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
    bounds = _bounds(request, pricer)
    rounds = 1 if is_long(pricer) else _COMPARING_ROUNDS + _FITTING_ROUNDS
    for index in range(rounds):
        band = score_band(pricer, request)
        winner = best(filter(fits, estimates), request.goal, band)
        if winner is None:
            break
        candidate_plans = counterfactuals(
            sketches,
            estimates,
            winner,
            cap=cap,
            goal=request.goal,
            bounds=bounds,
            compares=rounds > 1 and index < _COMPARING_ROUNDS,
        )
        if rounds == 1:
            candidate_plans = _covering(candidate_plans, winner.plan)[:_LONG_COUNTERFACTUALS]
        if not candidate_plans:
            break
        if request.ranks == 1:
            pricer.trace_all(candidate_plans, lambda *counts: progress("finalists", *counts))
        if request.is_here:
            calibrate(pricer, request, progress, plans=candidate_plans, budget_s=_SETTLING_BUDGET_S)
        estimates = [
            pricer.whole(plan) for plan in dict.fromkeys([*(e.plan for e in estimates), *candidate_plans])
        ]
        new_winner = best(filter(fits, estimates), request.goal, band)
        if new_winner is None or new_winner.plan != winner.plan:
            estimates = _with_rivals(pricer, request, fits, estimates, progress)
    return estimates


def _near_ratio(pricer: Pricer, request: Request) -> float:
    """Return by how much a score may lie above the lowest and always counts as equal to it, as `best` has
    it."""
    if request.goal in (Objective.SMALLEST, Objective.FEWEST):
        return TIE_RATIO
    return score_band(pricer, request).low


def _more_traces(pricer: Pricer, request: Request) -> int:
    """Return how many plans may be traced after the finalists: the more, the fewer operators plain training
    has. On this machine, where the operators of each are timed, at most four."""
    if request.is_here:
        return _FEWEST_MORE
    calls = len(pricer.trace(make_plain_plan(pricer.space.ranks)).ops)
    return min(max(_MORE_CALLS // calls, _FEWEST_MORE), _MOST_MORE)


def _covering(candidates: list[Plan], winner: Plan) -> list[Plan]:
    """Return the candidates such that each adds the most techniques that neither the ``winner`` nor an
    earlier one has; those that add none are left out.
    """
    covered, ordered = winner.techniques, list[Plan]()
    while candidates:
        chosen = max(candidates, key=lambda p: len(p.techniques - covered))
        added = chosen.techniques - covered
        if not added:
            break
        covered |= added
        ordered.append(chosen)
    return ordered


def _bounds(request: Request, pricer: Pricer) -> Bounds:
    return dataclasses.replace(request.bounds, steps=pricer.job.steps)


def memory_cap(request: Request, cap_bytes: int) -> Cap:
    """Return the memory limit of a search for the request: ``cap_bytes`` of a device, and the host's."""
    return Cap(
        bytes=cap_bytes,
        needs=lambda e: needed_bytes(e, request.machine),
        refuses=engine(request.engine).supports,
        host=host_holds_under(cap_bytes, request.machine),
    )


def is_long(pricer: Pricer) -> bool:
    """Return whether the plain plan's trace has more than 10,000 operators, so that traces take long."""
    return len(pricer.trace(make_plain_plan(pricer.space.ranks)).ops) > _LONG_TRACE_CALLS
