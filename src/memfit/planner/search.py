"""Search the best plan for a job on a machine.

Plain training is traced and the cap decided. Plans are then estimated by single_device.py, or, where tensor,
context and pipeline parallelism can be searched, by multi_device.py. One of the traced plans is recommended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

from memfit.cost.host import host_holds, host_line
from memfit.cost.memory import step_ops
from memfit.engines.registry import engine
from memfit.planner.capacity import Fits, fits_under, memory_cap, needed_bytes, states_bytes
from memfit.planner.evaluate import Predictor
from memfit.planner.machine_calibration import (
    begin_calibration,
    calibrate,
    one_operator_timer,
    score_band,
    timings,
)
from memfit.planner.plan_space import effect_then_size_key, may_share, may_split
from memfit.planner.reasons import ReasonInputs, reasons_for
from memfit.planner.request import (
    Planning,
    Progress,
    Request,
    make_predictor,
    with_steps_of,
)
from memfit.planner.search_bound import SearchProgress, extent, score_ratios, unfinished_text, untraced_plans
from memfit.planner.selection import (
    Objective,
    best,
    frontier,
    missed_bounds,
    respects_micro_batch,
    score,
    within_bounds,
)
from memfit.planner.single_device import estimate_plans, plans_asked_for, test_dependence, untraceable
from memfit.planner.sketch_errors import may_fit_under
from memfit.runtime import local_machine
from memfit.techniques.recompute.optimal import OPTIMAL_CHECKPOINTING
from memfit.techniques.registry import effect_of, make_plain_plan, proposable, refuse_wrong_weights, without
from memfit.types.deadline import Deadline, TimeUp
from memfit.types.dependence import DependenceCause, DependenceKind, SampleDependence
from memfit.types.errors import NothingFits, UserError
from memfit.types.job import Job
from memfit.types.plan import use
from memfit.types.result import Choice, Estimate, Reason, ReasonKind, SearchExtent, SearchResult
from memfit.types.trace import Phase

# Of the cap and of the step time: other optimizers are not searched where states are smaller and the
# optimizer is quicker.
_SMALL_STATES_RATIO, _SHORT_UPDATE_RATIO = 1 / 32, 0.03
_DEMONSTRATION = "demonstration:"  # start of the cap's reason if no cap was given on a CPU
_DEMONSTRATION_SPARE_RATIO = 1.1
_REACHABLE = (
    _DEMONSTRATION
    + " what the smallest plan needs plus 10 %, because no plan{looked_at} fits {share:.0%} of the "
    "baseline's predicted peak"
)
_NOT_A_CHAIN = (
    "tensor, context, expert and pipeline parallelism are not modelled for this model, which is no chain of "
    "at least 3 equal blocks that run one after the other; plans that divide the batch over the devices were "
    "searched"
)
_OTHER_SPLITS = "another number of micro-batches"


def search(request: Request, progress: Progress, *, must_run: bool = False) -> Planning:
    """Search the best plan for the request and return the finished search.

    On a machine of the catalog with several devices, plans with tensor, context, pipeline and data
    parallelism are searched if the model has at least 3 blocks, all but the first alike. Otherwise, only
    plans that divide the batch over the ranks are searched. ``must_run``: if the request is for this machine,
    halve the batch until plain training fits the free memory, or has one sample per rank; the returned
    request has the new batch.

    Raises NothingFits with the least memory that would be enough; UserError if the request or the job is
    wrong, or if dividing the batch over ranks would change the training by more than the request's accuracy
    allows; RunError if operators cannot be timed on this machine. Ctrl-C while plans are predicted raises
    SearchInterrupted with the result so far. Before that, and in a search with tensor, context and pipeline
    parallelism, it raises KeyboardInterrupt.

    After the request's ``within_s`` no further plan is traced, and traces in other processes are ended. Plans
    are traced in a fixed order, the most promising first, so that the limit changes only how far the search
    gets. What no answer can do without is finished nevertheless: the trace of plain training, for many
    devices those of the model's parts, and that of one plan that fits, if there is one. A request that does
    not continue (`Request.continues`) takes what an earlier search has kept for the answer, if that hit its
    time limit.
    """
    deadline = Deadline.after(request.within_s)
    may_divide = request.machine.device_count > 1 and not request.is_here
    if may_divide:
        ranks = request.ranks if request.ranks > 1 else request.machine.device_count
        request = dataclasses.replace(request, ranks=ranks)
        if (planning := _search_many(request, progress, deadline)) is not None:
            return planning
    unsearched = (Reason(kind=ReasonKind.CANNOT, technique="", detail=_NOT_A_CHAIN),) if may_divide else ()
    return _search_dividing_batch(request, progress, deadline, unsearched, must_run=must_run)


def _search_dividing_batch(
    request: Request,
    progress: Progress,
    deadline: Deadline,
    unsearched: tuple[Reason, ...],
    *,
    must_run: bool,
) -> Planning:
    """Search plans for the request's ranks that at most divide the batch over them. ``unsearched``: why other
    plans were not searched. Techniques that the job's model cannot be traced with are left out, as a model
    that makes float32 inputs of its own cannot with bf16-parameters."""
    progress("trace", 0, 0, "plain training")
    job, predictor = make_predictor(request)
    _refuse_ranks(request, predictor)
    baseline = predictor.whole(request.baseline)
    search_with = functools.partial(
        _search_with, job, predictor, baseline, progress, deadline, must_run=must_run
    )
    try:
        return search_with(request, unsearched)
    except UserError:
        if not (refusals := untraceable(predictor, request)):
            raise
    names = (*request.bounds.without, *refusals)
    request = dataclasses.replace(request, bounds=dataclasses.replace(request.bounds, without=names))
    left_out = [Reason(kind=ReasonKind.CANNOT, technique="", detail=text) for text in refusals.values()]
    return search_with(request, (*unsearched, *left_out))


def _search_with(
    job: Job,
    predictor: Predictor,
    baseline: Estimate,
    progress: Progress,
    deadline: Deadline,
    request: Request,
    unsearched: tuple[Reason, ...],
    *,
    must_run: bool,
) -> Planning:
    """Search as `_search_dividing_batch` does, with its ``predictor`` and the estimate ``baseline``. Raises
    UserError if a plan cannot be traced with the job's model."""
    if request.is_here and must_run:
        request, job, predictor, baseline = _reduce_batch(request, job, predictor, baseline)
    test_dependence(predictor, request, deadline, progress)
    request, unsearched = _split_as_it_is(request, predictor, unsearched)
    request = with_steps_of(request, job)
    predictor.is_searching = True
    cap_bytes, cap_reason = _cap(request, baseline, job.demonstration_ratio, demonstrates=must_run)
    with one_operator_timer(predictor, request):
        if request.is_here:
            begin_calibration(predictor, request, progress)
        predictor.deadline = deadline

        def fits_memory(e: Estimate) -> bool:
            return fits_under(cap_bytes, request.machine)(e)

        def meets_limits(e: Estimate) -> bool:
            return (
                fits_memory(e)
                and respects_micro_batch(e.plan, request.bounds, predictor.job_facts.batch_size)
                and within_bounds(request.bounds, e)
            )

        sketches: list[Estimate] = []
        estimate_under = functools.partial(
            estimate_plans,
            predictor,
            request,
            progress=progress,
            meets_limits=meets_limits,
            negligible_state_bytes=_negligible_state_bytes(request, predictor, baseline, cap_bytes),
            sketches=sketches,
        )
        try:
            estimated = estimate_under(cap_bytes)
            estimates = estimated.traced
            if cap_reason.startswith(_DEMONSTRATION) and not any(map(meets_limits, estimates)):
                cap_bytes = _reachable_cap(estimates, request, predictor.job_facts.batch_size)
                cap_reason = _REACHABLE.format(
                    share=job.demonstration_ratio,
                    looked_at=" that was looked at in time" if predictor.deadline.hit_time_limit else "",
                )
                sketches.clear()
                estimated = estimate_under(cap_bytes)
                estimates = list({e.plan: e for e in (*estimates, *estimated.traced)}.values())
            left_out = (*estimated.left_out, *unsearched)
            result = build_result(
                estimates := _measure_if_out_of_time(predictor, request, estimates, meets_limits, progress),
                goal=request.goal,
                cap_bytes=cap_bytes,
                considered=estimated.count,
                meets_limits=meets_limits,
                left_out=left_out,
                fits_memory=fits_memory,
                inputs=_reason_inputs(predictor, request, sketches, cap_bytes),
            )
            own = next(e for e in estimates if e.plan == request.baseline)
            result = _with_baseline(result, own, fits=fits_memory(own))
        except KeyboardInterrupt:
            partial_result = _best_so_far(predictor, request, cap_bytes, meets_limits, sketches)
            raise SearchInterrupted(partial_result) from None
        finally:
            predictor.deadline = Deadline()
    planning = Planning(
        request=request,
        job=job,
        predictor=predictor,
        cap_bytes=cap_bytes,
        cap_reason=cap_reason,
        result=result,
        estimates=estimates,
        sketches=sketches,
        meets_limits=meets_limits,
        left_out=left_out,
    )
    return _complete(planning, deadline, estimated.unsketched_count)


def _measure_if_out_of_time(
    predictor: Predictor, request: Request, estimates: list[Estimate], meets_limits: Fits, progress: Progress
) -> list[Estimate]:
    """Return the estimates. If the search is for this machine and hit its time limit, first measure the
    operators of the baseline and of the best plan that fits, as a search that ends in time does, and estimate
    all plans anew with these measurements."""
    if not (request.is_here and predictor.deadline.hit_time_limit):
        return estimates
    winner = best(filter(meets_limits, estimates), request.goal, score_band(predictor, request))
    plans = [request.baseline, *([winner.plan] if winner else [])]
    with predictor.deadline.overtime():
        calibrate(predictor, request, progress, plans=plans)
        return [predictor.whole(e.plan) for e in estimates]


def _complete(planning: Planning, deadline: Deadline, unsketched_count: int) -> Planning:
    """Return the planning with the result's `SearchExtent`, timings and reason of the cap added, and note on
    disk whether the search hit its time limit. Raises NothingFits if no plan is recommended.

    ``unsketched_count``: number of plans that there was no time to sketch.
    """
    request, predictor, result = planning.request, planning.predictor, planning.result
    predictor.note_time_limit(deadline.hit_time_limit, *plans_asked_for(request))
    reached = SearchProgress(
        predicted=len(planning.sketches),
        unpredicted=unsketched_count,
        deadline=deadline,
        limit_s=0.0 if deadline.is_stopped else request.within_s,
    )
    result = dataclasses.replace(
        result,
        cap_reason=planning.cap_reason,
        timings=timings(predictor.calibration) if request.is_here else None,
        extent=_extent(planning, reached),
    )
    if result.recommended is None:
        raise _nothing_fits(planning, result)
    return dataclasses.replace(planning, result=result)


def _negligible_state_bytes(
    request: Request, predictor: Predictor, baseline: Estimate, cap_bytes: int
) -> int | None:
    """Return the bytes of parameters, gradients and optimizer state if another optimizer would not matter,
    else None: if they are less than 1/32 of the cap and the optimizer takes less than 3 % of plain training's
    step. If the device's speed is unknown, only the bytes count. With the goal of least memory, it is always
    None."""
    state_bytes = states_bytes(baseline)
    if request.goal is Objective.SMALLEST or state_bytes >= _SMALL_STATES_RATIO * cap_bytes:
        return None
    if predictor.model is None:
        return state_bytes
    ops = step_ops(predictor.trace(baseline.plan))
    update_s, step_s = (
        predictor.model.total_s(chosen)
        for chosen in ([(o, n) for o, n in ops if o.phase is Phase.OPTIMIZER], ops)
    )
    return state_bytes if update_s < _SHORT_UPDATE_RATIO * step_s else None


def _reason_inputs(
    predictor: Predictor, request: Request, sketches: list[Estimate], cap_bytes: int
) -> ReasonInputs:
    cap = memory_cap(cap_bytes, request.machine, request.engine)
    return ReasonInputs(
        predictor.whole,
        predictor.trace_all if request.ranks == 1 else lambda plans: None,
        score_band(predictor, request),
        cap.needs,
        sketches,
        lambda traced: may_fit_under(cap, request.bounds, sketches, traced),
    )


def build_result(
    estimates: Sequence[Estimate],
    *,
    goal: Objective,
    cap_bytes: int,
    considered: int,
    meets_limits: Callable[[Estimate], bool],
    left_out: tuple[Reason, ...],
    inputs: ReasonInputs,
    fits_memory: Callable[[Estimate], bool] | None = None,
) -> SearchResult:
    """Return the search result with the recommended plan and its reasons. If no estimate meets the limits,
    the result's ``recommended`` is None.

    ``estimates`` were traced and include plain training. ``considered``: number of plans of the search that
    were estimated. ``left_out``: reasons to report after those of the recommended plan. ``inputs``: what
    these rest on. ``meets_limits`` tells whether a plan may be recommended. ``fits_memory`` tells whether it
    fits the memory, which the ``fits`` of each choice in the result says; None: ``meets_limits`` checks no
    more than that.

    The result's frontier has the estimates of `frontier` that meet the limits, plain training and the
    recommended plan, and the plan with the lowest peak if it is in `frontier`; by increasing peak.
    """
    baseline = next(e for e in estimates if e.plan == make_plain_plan(e.plan.ranks))
    winner = best([e for e in estimates if meets_limits(e)], goal, inputs.band)
    smallest = min(
        estimates, key=lambda e: (e.allocated_bytes.value, effect_then_size_key(e.plan, e.dependence))
    )

    def choice(e: Estimate, reasons: tuple[Reason, ...] = ()) -> Choice:
        fits = (fits_memory or meets_limits)(e)
        return Choice(estimate=e, fits=fits, effect=effect_of(e.plan, e.dependence), reasons=reasons)

    shown = [e for e in frontier(estimates) if meets_limits(e) or e is smallest] + [baseline]
    by_plan = {e.plan: e for e in ([winner] if winner else []) + shown}
    ordered = sorted(by_plan.values(), key=lambda e: e.allocated_bytes.value)
    recommended = None
    if winner is not None:
        with contextlib.suppress(TimeUp):
            inputs.prepare([without(winner.plan, u.technique) for u in winner.plan.uses])
        winner_reasons = reasons_for(winner, estimates, meets_limits, goal, inputs, cap_bytes)
        recommended = choice(winner, (*winner_reasons, *left_out))
    return SearchResult(
        goal=goal.value,
        cap_bytes=cap_bytes,
        considered=considered,
        baseline=choice(baseline),
        frontier=tuple(recommended if recommended and e is winner else choice(e) for e in ordered),
        recommended=recommended,
        smallest=choice(smallest),
    )


def _with_baseline(result: SearchResult, own: Estimate, *, fits: bool) -> SearchResult:
    """Return the result with ``own``, the estimate of the training as it is, as its baseline, which its
    frontier has, too."""
    shown = next((c for c in result.frontier if c.estimate.plan == own.plan), None)
    baseline = shown or Choice(estimate=own, fits=fits, effect=effect_of(own.plan, own.dependence))
    rows = result.frontier if shown else (*result.frontier, baseline)
    ordered = sorted(rows, key=lambda c: c.estimate.allocated_bytes.value)
    return dataclasses.replace(result, baseline=baseline, frontier=tuple(ordered))


def _split_as_it_is(
    request: Request, predictor: Predictor, unsearched: tuple[Reason, ...]
) -> tuple[Request, tuple[Reason, ...]]:
    """Return the request and the reasons ``unsearched``. They and the ``predictor`` are changed if the
    training as it is splits its batch and the samples depend on each other: plans then keep its
    micro-batches, which change nothing, and a reason says that other numbers of micro-batches were left
    out."""
    count, dependence = request.baseline.micro_batches, predictor.dependence
    if count == 1 or dependence.kind is not DependenceKind.DEPENDENT:
        return request, unsearched
    size = predictor.job.batch_size // count
    predictor.dependence = SampleDependence(kind=DependenceKind.INDEPENDENT, reason="split as it is")
    predictor.job_facts = dataclasses.replace(predictor.job_facts, smallest_micro_batch=size)
    left_out = Reason(kind=ReasonKind.LEFT_OUT_CHANGES, technique=_OTHER_SPLITS, detail=dependence.changes)
    bounds = dataclasses.replace(request.bounds, micro_batch=size)
    return dataclasses.replace(request, bounds=bounds), (*unsearched, left_out)


def _extent(planning: Planning, reached: SearchProgress) -> SearchExtent:
    traced, request, chosen = planning.estimates, planning.request, planning.result.recommended
    traces, goal = {e.plan: e for e in traced}, request.goal
    cap = memory_cap(planning.cap_bytes, request.machine, request.engine)
    may_fit = may_fit_under(cap, request.bounds, planning.sketches, traced)
    pairs = [(s, traces[s.plan]) for s in planning.sketches if s.plan in traces]
    untraced = [s for s in planning.sketches if s.plan not in traces and may_fit(s)]
    best_score = min((score(e, goal) for e in traced if planning.meets_limits(e)), default=math.inf)
    return extent(
        pairs,
        best_score,
        goal=goal,
        chosen=chosen.estimate if chosen else None,
        untraced=lambda: untraced_plans(untraced, goal, score_ratios(pairs, goal), best_score),
        reached=reached,
    )


def _nothing_fits(planning: Planning, result: SearchResult) -> NothingFits:
    """Return the error for a search in which no plan fits and keeps to the limits, with the least memory that
    would be enough for a plan with the requested micro-batch."""
    request, predictor, meets_limits = planning.request, planning.predictor, planning.meets_limits
    requested_estimates = [
        e
        for e in planning.estimates
        if respects_micro_batch(e.plan, request.bounds, predictor.job_facts.batch_size)
    ]
    smallest = min(requested_estimates, key=lambda e: e.allocated_bytes.value)
    return NothingFits(
        cap_bytes=result.cap_bytes,
        least_bytes=needed_bytes(smallest, request.machine),
        plan_text=smallest.plan.label,
        missed=missed_bounds(
            request.bounds, list(filter(fits_under(result.cap_bytes, request.machine), requested_estimates))
        ),
        ways=_ways(predictor, request, requested_estimates, meets_limits),
        host="" if host_holds(smallest, request.machine) else host_line(smallest, request.machine),
        unfinished=unfinished_text(result.extent) if result.extent is not None else "",
    )


class SearchInterrupted(KeyboardInterrupt):
    """Raised on Ctrl-C during a search. ``result`` is the result so far, whose ``unfinished`` is True."""

    def __init__(self, result: SearchResult) -> None:
        super().__init__()
        self.result = result


def _best_so_far(
    predictor: Predictor, request: Request, cap_bytes: int, meets_limits: Fits, sketches: list[Estimate]
) -> SearchResult:
    """Return the result of an interrupted search. Its ``recommended`` is the best plan that fits of those
    traced so far, or of the sketches if no traced plan fits; None if no sketch fits either. Traced plans that
    the request's accuracy, engine or excluded techniques forbid are not recommended.

    Its ``frontier`` has only plain training, the plan with the lowest peak and the recommended one, by
    increasing peak.
    """
    max_effect, refusals_of = request.accuracy.highest, engine(request.engine).refusals
    traced_estimates = [
        predictor.whole(plan)
        for plan, rank in list(predictor.traces)
        if rank == 0
        and effect_of(plan, predictor.dependence) <= max_effect
        and not refusals_of(plan)
        and not any(plan.get(name) for name in request.bounds.without)
    ]
    baseline = predictor.whole(request.baseline)
    candidates = (
        traced_estimates if any(map(meets_limits, traced_estimates)) else [*traced_estimates, *sketches]
    )
    winner = best(filter(meets_limits, candidates), request.goal, score_band(predictor, request))
    smallest = min([baseline, *candidates], key=lambda e: e.allocated_bytes.value)

    def choice(e: Estimate) -> Choice:
        need_bytes, effect = needed_bytes(e, request.machine), effect_of(e.plan, e.dependence)
        return Choice(estimate=e, fits=meets_limits(e), effect=effect, needed_bytes=need_bytes)

    by_plan = {e.plan: e for e in (baseline, smallest, *([winner] if winner else []))}
    return SearchResult(
        goal=request.goal.value,
        cap_bytes=cap_bytes,
        considered=len(sketches) or len(candidates),
        baseline=choice(baseline),
        recommended=choice(winner) if winner else None,
        smallest=choice(smallest),
        frontier=tuple(map(choice, sorted(by_plan.values(), key=lambda e: e.allocated_bytes.value))),
        unfinished=True,
    )


def _ways(
    predictor: Predictor, request: Request, estimates: Sequence[Estimate], meets_limits: Fits
) -> tuple[str, ...]:
    """Return (text,) with the change of the request that would allow gradient accumulation, if that would be
    enough for a plan to fit; else ().

    It is () if accumulation was searched, is impossible, or was excluded by the user. It would be enough if
    ``meets_limits`` is true of plain training, or of the plan of ``estimates`` with the lowest peak that
    accumulation can be added to, when trained in the smallest micro-batches of at least two samples (some
    layers need more than one).
    """
    name, micro_batches = (
        "gradient-accumulation",
        dataclasses.replace(predictor.job_facts, smallest_micro_batch=2).micro_batch_counts[-1],
    )
    if micro_batches == 1 or name in request.bounds.without:
        return ()
    dependence = predictor.dependence
    if may_split(dependence, request.accuracy) or dependence.cause is DependenceCause.SIZE:
        return ()  # it was searched, or is impossible
    by_peak = sorted(estimates, key=lambda e: e.allocated_bytes.value)
    split_plans = [
        plan.with_use(use(name, micro_batches=micro_batches))
        for plan in (make_plain_plan(request.ranks), *(e.plan for e in by_peak))
        if OPTIMAL_CHECKPOINTING not in plan  # its choice of tensors holds for the whole batch
    ]
    refusals_of = engine(request.engine).refusals
    possible_plans = [p for p in split_plans if proposable(p) and not refusals_of(p)]
    if not any(meets_limits(predictor.whole(p)) for p in possible_plans[:2]):
        return ()
    if dependence.cause is DependenceCause.WEIGHTS:
        return (f"{name}, with {dependence.way_out}",)
    return (f"{name}, which {dependence.changes}, under --accuracy any",)


def _refuse_ranks(request: Request, predictor: Predictor) -> None:
    """Raise UserError if the request has several ranks and the batch may not be divided over them: that would
    change the training by more than the request's accuracy allows, would weight the terms of the loss
    wrongly, or is impossible because the step can be computed for the whole batch only. With one rank,
    nothing is checked."""
    if request.ranks == 1 or may_share(predictor.dependence, request.accuracy):
        return
    dependence = predictor.dependence
    effect_on_training, how_this_is_known = dependence.changes, dependence.reason
    one_rank = "one rank: --nproc 1, or --on a machine with one device"
    refuse_wrong_weights(make_plain_plan(request.ranks), dependence)
    if dependence.cause is DependenceCause.SIZE:
        raise UserError(
            f"the batch cannot be divided over {request.ranks} ranks, because the step can be computed for "
            f"the whole batch only ({how_this_is_known})",
            allowed=one_rank,
        )
    norm = f"{dependence.way_out}, or " if dependence.cause is DependenceCause.BATCH_NORM else ""
    raise UserError(
        f"dividing the batch over {request.ranks} ranks {effect_on_training} ({how_this_is_known}), which "
        "would change the training",
        allowed="--accuracy any",
        hint=f"to keep the training as it is, use {norm}{one_rank}",
    )


def _search_many(request: Request, progress: Progress, deadline: Deadline) -> Planning | None:
    """Search plans with tensor, context, pipeline and data parallelism for up to the request's ranks.

    Returns None, without a search, if the model has fewer than 3 blocks or they are not alike; the first may
    have more parameters than the others. Returns None, too, if the blocks do not run one after the other.
    Raises NothingFits if no plan fits, and UserError if no plan is
    possible for so many ranks, if the speed of the device is unknown, or if the job cannot be loaded.
    """
    from memfit.planner.block_costs import BLOCKS
    from memfit.planner.block_traces import is_main_chain
    from memfit.planner.multi_device import search_many_devices
    from memfit.planner.multi_device_predictor import MultiDeviceRequest, NoPartsError

    ranks = request.ranks
    progress("trace", 0, 0, "plain training")
    job, predictor = make_predictor(request, replicas=False)
    if predictor.job_facts.block_count < BLOCKS or not (predictor.repeats or is_main_chain(job)):
        return None
    request = with_steps_of(request, job)
    cap_bytes = request.cap_bytes or int(request.machine.device.memory_bytes.value)
    predictor.deadline = deadline
    many_devices_request = MultiDeviceRequest(
        goal=request.goal,
        accuracy=request.accuracy,
        cap=memory_cap(cap_bytes, request.machine, request.engine),
        bounds=request.bounds,
        progress=progress,
        limit_s=request.within_s,
    )
    try:
        result = search_many_devices(predictor, ranks, many_devices_request)
    except NoPartsError:
        return None
    finally:
        predictor.deadline = Deadline()
    reason = "asked for" if request.cap_bytes is not None else "the device's memory"
    return Planning(
        request=request, job=job, predictor=predictor, cap_bytes=cap_bytes, cap_reason=reason, result=result
    )


def _reduce_batch(
    request: Request, job: Job, predictor: Predictor, baseline: Estimate
) -> tuple[Request, Job, Predictor, Estimate]:
    """Return the four arguments, changed to a batch that was halved until plain training fits the device's
    memory that is free now (on a CPU, its share for one rank), or until there is one sample per rank. They
    are returned unchanged if plain training fits already. Raises UserError if it does not, and the job takes
    no other batch."""
    free_bytes = local_machine.free_device_bytes(request.device_kind)
    if request.machine.device.is_host:
        free_bytes //= request.ranks
    while needed_bytes(baseline, request.machine) > free_bytes and job.batch_size > request.ranks:
        smaller_job = dataclasses.replace(request.job_ref, batch=max(request.ranks, job.batch_size // 2))
        request = dataclasses.replace(request, job_ref=smaller_job)
        try:
            job, predictor = make_predictor(request)
        except UserError as error:
            raise UserError(
                f"plain training of a batch of {job.batch_size} does not fit the free memory of this "
                f"machine, and the batch cannot be halved: {error.given}",
                allowed=error.allowed,
                hint=error.hint,
            ) from error
        baseline = predictor.whole(make_plain_plan(request.ranks))
    return request, job, predictor, baseline


def _cap(
    request: Request, baseline: Estimate, ratio: float, *, demonstrates: bool = False
) -> tuple[int, str]:
    """Return (the memory of one device that plans must fit, in bytes; where that figure is from).
    ``demonstrates``: a request for an accelerator of this machine without a cap is a demonstration, as it is
    on a CPU; otherwise its cap is what is free now. ``ratio``: the cap of a demonstration, as a share of
    plain training's peak. Raises UserError if that is needed and not above 0 and at most 1."""
    if request.cap_bytes is not None:
        return request.cap_bytes, "asked for"
    if request.machine.device.is_host or (request.is_here and demonstrates):
        if not 0 < ratio <= 1:
            raise UserError(
                "Job(demonstration_ratio=...), the memory cap of a demonstration as a share of plain "
                f"training's peak, is {ratio}",
                allowed="above 0, at most 1",
                hint="or set the cap with --memory",
            )
        ratio_text = {0.25: "a quarter", 0.5: "half"}.get(ratio, f"{ratio:.0%}")
        reason = f"{_DEMONSTRATION} {ratio_text} of the baseline's predicted peak"
        return int(baseline.allocated_bytes.value * ratio), reason
    if request.is_here:
        kernels = request.machine.device.kernels_bytes  # loaded later, outside torch's allocator
        free_bytes = local_machine.free_device_bytes(request.device_kind) - int(
            kernels.value if kernels else 0
        )
        return free_bytes, "what is free on the device now"
    return int(request.machine.device.memory_bytes.value), "the device's memory"


def _reachable_cap(estimates: Sequence[Estimate], request: Request, batch: int) -> int:
    """Return a cap that some plan fits, for a demonstration whose first cap, a share of plain training's
    peak, is too low for all: the least bytes that a plan of ``estimates`` with the requested micro-batch
    needs, plus 10 %. ``batch``: samples of one rank.
    """
    requested_estimates = [e for e in estimates if respects_micro_batch(e.plan, request.bounds, batch)]
    return int(
        min(needed_bytes(e, request.machine) for e in requested_estimates) * _DEMONSTRATION_SPARE_RATIO
    )
