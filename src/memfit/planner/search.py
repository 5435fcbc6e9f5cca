"""Search the best plan for a job on a machine.

Plain training is traced, the cap decided, and plans are priced by single_device.py, or, where tensor, context
and pipeline parallelism can be searched, by multi_device.py. One of the traced plans is recommended.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from memfit.cost.host import host_holds, host_line
from memfit.cost.memory import step_ops
from memfit.engines.registry import engine
from memfit.planner.capacity import Fits, fits_under, needed_bytes, states_bytes
from memfit.planner.evaluate import Pricer
from memfit.planner.machine_calibration import begin_calibration, calibrate, score_band, timings
from memfit.planner.plan_space import may_share, may_split
from memfit.planner.recompute_budget import Cap
from memfit.planner.request import Planning, Progress, Request, limit_parts, make_pricer
from memfit.planner.search_bound import Facts, extent, rest_of, score_ratios, unfinished_text
from memfit.planner.selection import (
    Objective,
    Prices,
    best,
    decide,
    missed_bounds,
    respects_micro_batch,
    score,
    within_bounds,
)
from memfit.planner.single_device import memory_cap, plans_asked_for, price_plans
from memfit.planner.sketch_errors import may_fit
from memfit.runtime import local_machine
from memfit.techniques.recompute.optimal import NAME
from memfit.techniques.registry import effect_of, make_plain_plan, proposable, refuse_wrong_weights
from memfit.types.deadline import Deadline
from memfit.types.dependence import DependenceCause
from memfit.types.errors import NothingFits, UserError
from memfit.types.job import Job
from memfit.types.plan import use
from memfit.types.result import Choice, Estimate, Reason, SearchExtent, SearchResult
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
    "at least 3 equal blocks; plans that divide the batch over the devices were searched"
)
_GAP_RATIO = 0.05  # optimality gap in a search, where a better answer takes longer than it saves


def search(request: Request, progress: Progress, *, must_run: bool = False) -> Planning:
    """Search the best plan for the request and return the finished search.

    On a machine of the catalog with several devices, plans with tensor, context, pipeline and data
    parallelism are searched if the model has at least 3 blocks, all alike. Otherwise, only plans that divide
    the batch over the ranks are searched. ``must_run``: if the request is for this machine, halve the batch
    until plain training fits the free memory, or has one sample per rank; the returned request has the new
    batch.

    Raises NothingFits with the least memory that would be enough; UserError if the request or the job is
    wrong, or if dividing the batch over ranks would change the training by more than the request's accuracy
    allows; RunError if operators cannot be timed on this machine. Ctrl-C while plans are predicted raises
    SearchInterrupted with the result so far. Before that, and in a search with tensor, context and pipeline
    parallelism, it raises KeyboardInterrupt.

    After the request's ``within_s`` no further plan is traced, and traces in other processes are ended. Plans
    are traced in a fixed order, the most promising first, so that the limit changes only how far the search
    gets. It does not cut what no answer can do without: the trace of plain training, for many devices those
    of the model's parts, and that of one plan that fits, if there is one. A request that does not continue
    (`Request.continues`) takes what an earlier search has kept for the answer, if that was cut.
    """
    deadline = Deadline.after(request.within_s)
    if may_divide := request.machine.device_count > 1 and not request.is_here:
        ranks = request.ranks if request.ranks > 1 else request.machine.device_count
        request = dataclasses.replace(request, ranks=ranks)
        if (planning := _search_many(request, progress, deadline)) is not None:
            return planning
    unsearched = (Reason(kind="cannot", technique="", detail=_NOT_A_CHAIN),) * may_divide
    progress("trace", 0, 0, "plain training")
    job, pricer = make_pricer(request)
    _refuse_ranks(request, pricer)
    limit_parts(pricer, request.accuracy)
    baseline = pricer.whole(make_plain_plan(request.ranks))
    if request.is_here and must_run:
        request, job, pricer, baseline = _runnable(request, job, pricer, baseline)
    pricer.gap_ratio = _GAP_RATIO
    cap_bytes, cap_reason = _cap(request, baseline, job.demonstration_ratio, demonstrates=must_run)
    if request.is_here:
        begin_calibration(pricer, request, progress)
    pricer.deadline = deadline
    batch, bounds = pricer.space.batch_size, dataclasses.replace(request.bounds, steps=job.steps)

    def inside(e: Estimate) -> bool:
        return fits_under(cap_bytes, request.machine)(e)

    def fits(e: Estimate) -> bool:
        return inside(e) and respects_micro_batch(e.plan, bounds, batch) and within_bounds(bounds, e)

    sketches: list[Estimate] = []
    pricing = functools.partial(
        price_plans,
        pricer,
        request,
        progress=progress,
        fits=fits,
        small_state_bytes=_small_state_bytes(request, pricer, baseline, cap_bytes),
        sketches=sketches,
    )
    try:
        estimates, considered, left_out = pricing(cap_bytes)
        if cap_reason.startswith(_DEMONSTRATION) and not any(map(fits, estimates)):
            cap_bytes = _reachable_cap(estimates, request, batch)
            cap_reason = _REACHABLE.format(
                share=job.demonstration_ratio,
                looked_at=" that was looked at in time" if pricer.deadline.cut else "",
            )
            sketches.clear()
            capped_estimates, considered, left_out = pricing(cap_bytes)
            estimates = list({e.plan: e for e in (*estimates, *capped_estimates)}.values())
        result = decide(
            estimates := _measured_if_cut(pricer, request, estimates, fits, progress),
            goal=request.goal,
            cap_bytes=cap_bytes,
            considered=considered,
            fits=fits,
            left_out=(*left_out, *unsearched),
            inside=inside,
            price=_prices(pricer, request, sketches, memory_cap(request, cap_bytes)),
        )
    except KeyboardInterrupt:
        partial_result = _best_so_far(pricer, request, cap_bytes, fits, sketches)
        raise SearchInterrupted(partial_result) from None
    finally:
        pricer.deadline = Deadline()
    planning = Planning(
        request=request,
        job=job,
        pricer=pricer,
        cap_bytes=cap_bytes,
        cap_reason=cap_reason,
        result=result,
        estimates=estimates,
        sketches=sketches,
        fits=fits,
        left_out=(*left_out, *unsearched),
    )
    return _completed(planning, deadline)


def _measured_if_cut(
    pricer: Pricer, request: Request, estimates: list[Estimate], fits: Fits, progress: Progress
) -> list[Estimate]:
    """Return the estimates. If the search is for this machine and was cut by its time limit, first measure
    the operators of plain training and of the best plan that fits, as a search does that is not cut. Memory
    and time of these two are then what an estimate of each alone says."""
    if not (request.is_here and pricer.deadline.cut):
        return estimates
    winner = best(filter(fits, estimates), request.goal, score_band(pricer, request))
    plans = [make_plain_plan(request.ranks), *([winner.plan] if winner else [])]
    with pricer.deadline.overtime():
        calibrate(pricer, request, progress, plans=plans)
        return [pricer.whole(e.plan) for e in estimates]


def _completed(planning: Planning, deadline: Deadline) -> Planning:
    """Return the planning with the result's `SearchExtent`, timings and reason of the cap added, and note on
    disk whether the time limit cut the search. Raises NothingFits if no plan is recommended.
    """
    request, pricer, result = planning.request, planning.pricer, planning.result
    pricer.note_cut(deadline.cut, *plans_asked_for(request))
    facts = Facts(
        priced=len(planning.sketches),
        unpriced=result.considered - len(planning.sketches),
        deadline=deadline,
        limit_s=0.0 if deadline.is_stopped else request.within_s,
    )
    result = dataclasses.replace(
        result,
        cap_reason=planning.cap_reason,
        timings=timings(pricer.calibration) if request.is_here else None,
        extent=_extent(planning, facts),
    )
    if result.recommended is None:
        raise _nothing_fits(planning, result)
    return dataclasses.replace(planning, result=result)


def _small_state_bytes(request: Request, pricer: Pricer, baseline: Estimate, cap_bytes: int) -> int | None:
    """Return the bytes of parameters, gradients and optimizer state if another optimizer would not matter,
    else None: if they are less than 1/32 of the cap and the optimizer takes less than 3 % of plain training's
    step. With the goal of least memory, it may always matter.
    """
    state_bytes = states_bytes(baseline)
    if request.goal is Objective.SMALLEST or state_bytes >= _SMALL_STATES_RATIO * cap_bytes:
        return None
    if pricer.model is None:
        return state_bytes
    ops = step_ops(pricer.trace(baseline.plan))
    update_s, step_s = (
        pricer.model.total_s(chosen)
        for chosen in ([(o, n) for o, n in ops if o.phase is Phase.OPTIMIZER], ops)
    )
    return state_bytes if update_s < _SHORT_UPDATE_RATIO * step_s else None


def _prices(pricer: Pricer, request: Request, sketches: list[Estimate], cap: Cap) -> Prices:
    bounds = dataclasses.replace(request.bounds, steps=pricer.job.steps)
    return Prices(
        pricer.whole,
        pricer.trace_all if request.ranks == 1 else lambda plans: None,
        score_band(pricer, request),
        cap.needs,
        sketches,
        lambda traced: may_fit(sketches, traced, cap, bounds),
    )


def _extent(planning: Planning, facts: Facts) -> SearchExtent:
    traced, request, chosen = planning.estimates, planning.request, planning.result.recommended
    traces, goal = {e.plan: e for e in traced}, request.goal
    bounds = dataclasses.replace(request.bounds, steps=planning.job.steps)
    may = may_fit(planning.sketches, traced, memory_cap(request, planning.cap_bytes), bounds)
    pairs = [(s, traces[s.plan]) for s in planning.sketches if s.plan in traces]
    rest = [s for s in planning.sketches if s.plan not in traces and may(s)]
    best_score = min((score(e, goal) for e in traced if planning.fits(e)), default=math.inf)
    return extent(
        pairs,
        best_score,
        goal=goal,
        chosen=chosen.estimate if chosen else None,
        rest=lambda: rest_of(rest, goal, score_ratios(pairs, goal), best_score),
        facts=facts,
    )


def _nothing_fits(planning: Planning, result: SearchResult) -> NothingFits:
    """Return the error for a search in which no plan fits, with the least memory that would be enough."""
    request, pricer, fits = planning.request, planning.pricer, planning.fits
    bounds = dataclasses.replace(request.bounds, steps=planning.job.steps)
    requested_estimates = [
        e for e in planning.estimates if respects_micro_batch(e.plan, bounds, pricer.space.batch_size)
    ]
    smallest = min(requested_estimates, key=lambda e: e.allocated_bytes.value)
    return NothingFits(
        cap_bytes=result.cap_bytes,
        least_bytes=needed_bytes(smallest, request.machine),
        plan_text=smallest.plan.label,
        missed=missed_bounds(
            bounds, list(filter(fits_under(result.cap_bytes, request.machine), requested_estimates))
        ),
        ways=_ways(pricer, request, requested_estimates, fits),
        host="" if host_holds(smallest, request.machine) else host_line(smallest, request.machine),
        unfinished=unfinished_text(result.extent) if result.extent is not None else "",
    )


class SearchInterrupted(KeyboardInterrupt):
    """Raised on Ctrl-C during a search. ``result`` is the result so far, whose ``unfinished`` is True."""

    def __init__(self, result: SearchResult) -> None:
        super().__init__()
        self.result = result


def _best_so_far(
    pricer: Pricer, request: Request, cap_bytes: int, fits: Fits, sketches: list[Estimate]
) -> SearchResult:
    """Return the result of an interrupted search. Its ``recommended`` is the best plan that fits of those
    traced so far, or of the sketches if no traced plan fits; None if no sketch fits either. Traced plans that
    the request's accuracy, engine or excluded techniques forbid are not recommended.

    Its ``frontier`` has only plain training, the plan with the lowest peak and the recommended one, by
    increasing peak.
    """
    max_effect, refusals_of = request.accuracy.highest, engine(request.engine).supports
    traced_estimates = [
        pricer.whole(plan)
        for plan, rank in list(pricer.traces)
        if rank == 0
        and effect_of(plan, pricer.dependence) <= max_effect
        and not refusals_of(plan)
        and not any(plan.get(name) for name in request.bounds.without)
    ]
    baseline = pricer.whole(make_plain_plan(request.ranks))
    candidates = traced_estimates if any(map(fits, traced_estimates)) else [*traced_estimates, *sketches]
    winner = best(filter(fits, candidates), request.goal, score_band(pricer, request))
    smallest = min([baseline, *candidates], key=lambda e: e.allocated_bytes.value)

    def choice(e: Estimate) -> Choice:
        need_bytes, effect = needed_bytes(e, request.machine), effect_of(e.plan, e.dependence)
        return Choice(estimate=e, fits=fits(e), effect=effect, needed_bytes=need_bytes)

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


def _ways(pricer: Pricer, request: Request, estimates: Sequence[Estimate], fits: Fits) -> tuple[str, ...]:
    """Return (text,) with the change of the request that would allow gradient accumulation, if that would be
    enough for a plan to fit; else ().

    It is () if accumulation was searched, or was excluded by the user. It would be enough if ``fits`` is true
    of plain training, or of the plan of ``estimates`` with the lowest peak that accumulation can be added to,
    when trained in the smallest micro-batches of at least two samples (some layers need more than one).
    """
    name, micro_batches = "gradient-accumulation", dataclasses.replace(pricer.space, least_part=2).parts[-1]
    if micro_batches == 1 or name in request.bounds.without:
        return ()
    dependence = pricer.dependence
    if may_split(dependence, request.accuracy):  # it was searched
        return ()
    by_peak = sorted(estimates, key=lambda e: e.allocated_bytes.value)
    split_plans = [
        plan.with_use(use(name, micro_batches=micro_batches))
        for plan in (make_plain_plan(request.ranks), *(e.plan for e in by_peak))
        if NAME not in plan  # its choice of tensors holds for the whole batch
    ]
    refusals_of = engine(request.engine).supports
    possible_plans = [p for p in split_plans if proposable(p) and not refusals_of(p)]
    if not any(fits(pricer.whole(p)) for p in possible_plans[:2]):
        return ()
    if dependence.cause is DependenceCause.WEIGHTS:
        return (f"{name}, with {dependence.way_out}",)
    return (f"{name}, which {dependence.changes}, under --accuracy any",)


def _refuse_ranks(request: Request, pricer: Pricer) -> None:
    """Raise UserError if the request has several ranks, and dividing the batch over them would change the
    training by more than its accuracy allows. With one rank, nothing is checked.
    """
    if request.ranks == 1 or may_share(pricer.dependence, request.accuracy):
        return
    dependence = pricer.dependence
    effect_on_training = dependence.changes  # such as "changes BatchNorm's statistics"
    how_this_is_known, plan_or_norm_to_use = dependence.reason, dependence.way_out
    refuse_wrong_weights(make_plain_plan(request.ranks), dependence)
    raise UserError(
        f"dividing the batch over {request.ranks} ranks would change the training: it {effect_on_training} "
        f"({how_this_is_known})",
        allowed="--accuracy any",
        hint=f"to keep the training as it is, use {plan_or_norm_to_use}",
    )


def _search_many(request: Request, progress: Progress, deadline: Deadline) -> Planning | None:
    """Search plans with tensor, context, pipeline and data parallelism for up to the request's ranks.

    Returns None, without a search, if the model has fewer than 3 blocks or they are not alike. Raises
    NothingFits if no plan fits, and UserError if `search_scale` does or the job cannot be loaded.
    """
    from memfit.planner.block_costs import BLOCKS
    from memfit.planner.block_traces import is_main_chain
    from memfit.planner.device_pricing import Aim
    from memfit.planner.multi_device import search_scale

    ranks = request.ranks
    progress("trace", 0, 0, "plain training")
    job, pricer = make_pricer(request, replicas=False)
    if pricer.space.block_count < BLOCKS or not (pricer.repeats or is_main_chain(job)):
        return None
    cap_bytes = request.cap_bytes or int(request.machine.device.memory_bytes.value)
    pricer.deadline = deadline
    aim = Aim(
        goal=request.goal,
        accuracy=request.accuracy,
        cap_bytes=cap_bytes,
        needs=lambda estimate: needed_bytes(estimate, request.machine),
        host=lambda estimate: host_holds(estimate, request.machine),
        bounds=dataclasses.replace(request.bounds, steps=job.steps),
        tell=progress,
        limit_s=request.within_s,
    )
    try:
        result = search_scale(pricer, ranks, aim)
    finally:
        pricer.deadline = Deadline()
    reason = "asked for" if request.cap_bytes is not None else "the device's memory"
    return Planning(
        request=request, job=job, pricer=pricer, cap_bytes=cap_bytes, cap_reason=reason, result=result
    )


def _runnable(
    request: Request, job: Job, pricer: Pricer, baseline: Estimate
) -> tuple[Request, Job, Pricer, Estimate]:
    """Return the four arguments, changed to a batch that was halved until plain training fits the memory of
    this machine that is free now, divided by the ranks, or until there is one sample per rank. They are
    returned unchanged if plain training fits already.
    """
    free_bytes = local_machine.free_device_bytes(request.device)
    if request.machine.device.is_host:
        free_bytes //= request.ranks
    while needed_bytes(baseline, request.machine) > free_bytes and job.batch_size > request.ranks:
        smaller_job = dataclasses.replace(request.job, batch=job.batch_size // 2)
        request = dataclasses.replace(request, job=smaller_job)
        job, pricer = make_pricer(request)
        limit_parts(pricer, request.accuracy)
        baseline = pricer.whole(make_plain_plan(request.ranks))
    return request, job, pricer, baseline


def _cap(
    request: Request, baseline: Estimate, ratio: float, *, demonstrates: bool = False
) -> tuple[int, str]:
    """Return (the memory of one device that plans must fit; where that figure is from). ``demonstrates``: a
    request for an accelerator of this machine without a cap is a demonstration, as it is on a CPU; otherwise
    its cap is what is free now. ``ratio``: the cap of a demonstration, as a share of plain training's peak.
    """
    if request.cap_bytes is not None:
        return request.cap_bytes, "asked for"
    if request.machine.device.is_host or (request.is_here and demonstrates):
        if not 0 < ratio <= 1:
            raise UserError(
                "Job(demonstration_ratio=...), the memory cap as a share of plain training's peak, "
                f"is {ratio}",
                allowed="above 0, at most 1",
            )
        ratio_text = {0.25: "a quarter", 0.5: "half"}.get(ratio, f"{ratio:.0%}")
        reason = f"{_DEMONSTRATION} {ratio_text} of the baseline's predicted peak"
        return int(baseline.allocated_bytes.value * ratio), reason
    if request.is_here:
        kernels = request.machine.device.kernels_bytes  # loaded later, outside torch's allocator
        free_bytes = local_machine.free_device_bytes(request.device) - int(kernels.value if kernels else 0)
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
