"""Search the best plan for a job on a machine.

For one device, or for several that only divide the batch, the search is made here: plain training is traced,
every plan is sketched (estimated by adding up traces of parts), the best ones are traced whole, and one of
these is recommended. Searches with other parallelism are handed over to multi_device.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memfit.cost.host import host_holds, host_line
from memfit.cost.memory_estimate import ASSUMED_RESERVED_RATIO
from memfit.cost.step_time_calibration import merge_calibrations
from memfit.engines import native
from memfit.engines.registry import engine
from memfit.jobs.registry import load
from memfit.model.blocks import find_blocks, find_head
from memfit.planner.evaluate import Pricer
from memfit.planner.plan_space import may_share, may_split, plans, usable
from memfit.planner.recompute_budget import Cap, budgeted
from memfit.planner.selection import (
    MODELLED,
    Band,
    Objective,
    Prices,
    best,
    decide,
    missed_bounds,
    respects_micro_batch,
    timed_band,
    within_bounds,
)
from memfit.planner.shortlist import counterfactuals, finalists, until_some_fit
from memfit.runtime import local_machine
from memfit.runtime.child_process import run
from memfit.store.calibration import CalibrationCache, selected
from memfit.techniques.base import Space
from memfit.techniques.optimizers import is_adamw
from memfit.techniques.recompute.optimal import NAME
from memfit.techniques.registry import effect_of, make_plain_plan, proposable, refuse_wrong_weights, without
from memfit.types import serialization
from memfit.types.dependence import DependenceCause, DependenceKind, SampleDependence
from memfit.types.errors import NothingFits, RunError, UserError
from memfit.types.job import Job, JobRef
from memfit.types.launch import RunSpec
from memfit.types.machine import Calibration, Machine
from memfit.types.plan import Accuracy, Bounds, Plan, Use, use
from memfit.types.result import Choice, Estimate, Reason, SearchResult, Timings

FINALISTS = 14
_FEWER_FINALISTS = 8  # used if traces are long, as for models with thousands of small tensors
_LONG_TRACE_CALLS = 10_000
# Of the cap: techniques that only affect states smaller than this are not worth a search.
_SMALL_STATES_RATIO = 1 / 16
_DEMONSTRATION = "demonstration:"  # start of the cap's reason if no cap was given on a CPU
_DEMONSTRATION_SPARE_RATIO = 1.1
_REACHABLE = (
    _DEMONSTRATION + " what the smallest plan needs plus 10 %, because no plan fits {share:.0%} of the "
    "baseline's predicted peak"
)
_FIRST_BUDGET_S, _SECOND_BUDGET_S = 5.0, 4.0  # nominal seconds of probing operators
# Most rounds, and seconds of each, to measure the best plan and its rivals while the best plan still changes.
_SETTLING_ROUNDS, _SETTLING_BUDGET_S = 3, 3.0
_COUNTERFACTUAL_ROUNDS = 2
_GAP_RATIO = 0.05  # optimality gap in a search, where a better answer takes longer than it saves

# Process memory above its tensors under a hard cap: 1.02x to 1.04x was observed under RLIMIT_DATA.
CPU_HEADROOM_RATIO, CPU_HEADROOM_BYTES = 1.05, 2 * 2**20
# Assumed for context and libraries on an accelerator for which the catalog has no figure.
UNKNOWN_DEVICE_BYTES = 1 * 2**30

Progress = Callable[[str, int, int, str], None]
"""(stage, done, total, detail): called often; total 0 means unknown."""
Fits = Callable[[Estimate], bool]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for.

    ``cap_bytes``: the memory of one device that the plan must fit. None means the memory of the device; on a
    CPU it means a demonstration, whose cap is a share of plain training's peak, by default a quarter, or, if
    no plan fits that, the least that some plan needs plus 10 %. ``threads``: number of this machine's threads
    for measurements and runs; 0: all. ``ranks``: number of processes with one device each. On a machine of
    the catalog with several devices, a search takes 1 to mean all of them. ``bounds``: limits beside memory;
    a search takes the number of steps from the job, not from ``bounds.steps``.
    """

    job: JobRef
    machine: Machine
    cap_bytes: int | None = None
    goal: Objective = Objective.FASTEST
    accuracy: Accuracy = Accuracy.ROUNDING
    threads: int = 0
    timeout_s: float | None = None  # of each training run; None: no limit
    engine: str = "native"
    bounds: Bounds = dataclasses.field(default_factory=Bounds)
    ranks: int = 1
    correction: Calibration = dataclasses.field(default_factory=Calibration)  # from runs on this machine
    recalibrate: bool = False  # time this machine's operators again, ignoring stored times

    @property
    def is_here(self) -> bool:
        return self.machine.device.name == "this machine"


@dataclasses.dataclass(kw_only=True)
class Planning:
    """A finished search, with what is needed to predict further plans in the same way.

    ``cap_bytes``: the memory of one device that plans had to fit. ``cap_reason``: where that figure is from,
    such as "asked for". ``fits``: whether an estimate fits it and keeps to the request's other limits.
    ``left_out``: why techniques were not searched. After a search for many devices with tensor, context or
    pipeline parallelism, ``estimates``, ``sketches`` and ``left_out`` are empty, and ``fits`` is always true.
    """

    request: Request
    job: Job
    pricer: Pricer
    cap_bytes: int
    cap_reason: str
    result: SearchResult
    estimates: Sequence[Estimate] = ()  # of the traced plans
    sketches: Sequence[Estimate] = ()  # of every plan
    fits: Fits = lambda estimate: True
    left_out: tuple[Reason, ...] = ()

    def __post_init__(self) -> None:
        self.result = with_needs(self.result, self.request.machine)


def with_needs(result: SearchResult, machine: Machine) -> SearchResult:
    """Return the result with ``needed_bytes`` of each of its plans set to the bytes of one device's memory
    that are compared with the cap.
    """

    def with_need(choice: Choice) -> Choice:
        return dataclasses.replace(choice, needed_bytes=needed_bytes(choice.estimate, machine))

    return dataclasses.replace(
        result,
        baseline=with_need(result.baseline),
        frontier=tuple(map(with_need, result.frontier)),
        recommended=with_need(result.recommended) if result.recommended else None,
        smallest=with_need(result.smallest),
    )


def space_of(job: Job, device: str, ranks: int = 1, half: str = "bfloat16") -> Space:
    """Return the facts about the job from which techniques propose settings, counted on a model built without
    memory. ``batch_size`` of the result is that of one rank, at least 1.

    ``device``: "cpu" or "cuda". ``half``: what `half_precision_of` returns for the machine. If the job does
    not name its blocks and none are found, ``block_count`` is 0; if it does not name its head and none is
    found, ``has_head`` is False. Raises UserError if the job names blocks or a head that the model does not
    have.
    """
    from memfit.model.chunk_analysis import worth_cutting
    from memfit.model.scalar_parameters import scalars
    from memfit.techniques.adapters import block_linears
    from memfit.trace.tracer import fake_model

    model = fake_model(job)
    try:
        path, modules = find_blocks(model, job.blocks)
        block_count, has_linears = len(modules), any(True for _ in block_linears(model, path))
    except UserError:
        if job.blocks is not None:
            raise
        block_count, has_linears = 0, False
    try:
        vocabulary = find_head(model, job.head)[1].out_features
    except UserError:
        if job.head is not None:
            raise
        vocabulary = 0
    return Space(
        batch_size=max(1, job.batch_size // ranks),
        block_count=block_count,
        has_head=vocabulary > 0,
        vocabulary=vocabulary,
        device=device,
        ranks=ranks,
        half=half,
        linears=has_linears,
        scalars=bool(scalars(model)),
        clipped=job.clip is not None,
        adamw=is_adamw(job.optimizer),
        slices=ranks == 1 and worth_cutting(job, model),
    )


def half_precision_of(machine: Machine) -> str:
    """Return "float16" if the machine's device has a peak rate for it and none for bfloat16, as NVIDIA
    devices before Ampere; else "bfloat16".
    """
    rates = machine.device.peak_flops
    return "float16" if "float16" in rates and "bfloat16" not in rates else "bfloat16"


def autocast(space: Space) -> Use:
    """Return the autocast technique for the half precision of ``space``: fp16-autocast or bf16-autocast."""
    return use("fp16-autocast" if space.half == "float16" else "bf16-autocast")


def make_pricer(request: Request, *, replicas: bool = True) -> tuple[Job, Pricer]:
    """Load the request's job and return (the job, the pricer that predicts its plans on the request's machine
    and engine).

    ``replicas``: whether every rank trains samples of its own. If so, and if the batch has fewer samples than
    there are ranks, raises UserError. Also raises it if the job cannot be loaded, or if it names blocks or a
    head that its model does not have.
    """
    job, ranks = load(request.job), request.ranks
    if replicas and job.batch_size < ranks:
        raise UserError(
            f"a batch of {job.batch_size} has fewer samples than the {ranks} ranks",
            allowed=f"--batch {ranks} or more",
        )
    space = space_of(job, request.machine.device.kind, request.ranks, half_precision_of(request.machine))
    return job, Pricer(
        job=job,
        machine=request.machine,
        space=space,
        engine=request.engine,
        calibration=request.correction,
    )


def model_sizes(name: str, job: Job) -> Mapping[str, str]:
    """Return the model's sizes as options of Megatron-LM's trainer, name of the option -> value, if ``name``
    is the engine "megatron". Empty for other engines, which build the job's own model.

    Raises UserError if Megatron-LM cannot build the model.
    """
    if name != "megatron":
        return {}
    from memfit.engines.megatron.gpt import read, sizes
    from memfit.trace.tracer import fake_model

    return sizes(read(fake_model(job)))


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
    """
    if request.machine.device_count > 1 and not request.is_here:
        ranks = request.ranks if request.ranks > 1 else request.machine.device_count
        request = dataclasses.replace(request, ranks=ranks)
        if (planning := _search_many(request, progress)) is not None:
            return planning
    progress("trace", 0, 0, "plain training")
    job, pricer = make_pricer(request)
    _refuse_ranks(request, pricer)
    limit_parts(pricer, request.accuracy)
    baseline = pricer.whole(make_plain_plan(request.ranks))
    if request.is_here and must_run:
        request, job, pricer, baseline = _runnable(request, job, pricer, baseline)
    pricer.gap_ratio = _GAP_RATIO
    cap_bytes, cap_reason = _cap(request, baseline, job.demonstration_ratio)
    if request.is_here:
        _begin_calibration(pricer, request, progress)
    batch, bounds = pricer.space.batch_size, dataclasses.replace(request.bounds, steps=job.steps)

    def inside(e: Estimate) -> bool:
        return fits_under(cap_bytes, request.machine)(e)

    def fits(e: Estimate) -> bool:
        return inside(e) and respects_micro_batch(e.plan, bounds, batch) and within_bounds(bounds, e)

    state_bytes = states_bytes(baseline)
    small_state_bytes = state_bytes if state_bytes < _SMALL_STATES_RATIO * cap_bytes else None
    sketches: list[Estimate] = []
    try:
        estimates, considered, left_out = _price(
            pricer, request, cap_bytes, progress, fits, small_state_bytes=small_state_bytes, sketches=sketches
        )
        if cap_reason.startswith(_DEMONSTRATION) and not any(map(fits, estimates)):
            cap_bytes = _reachable_cap(estimates, request, batch)
            cap_reason = _REACHABLE.format(share=job.demonstration_ratio)
            sketches.clear()
            capped_estimates, considered, left_out = _price(
                pricer,
                request,
                cap_bytes,
                progress,
                fits,
                small_state_bytes=small_state_bytes,
                sketches=sketches,
            )
            estimates = list({e.plan: e for e in (*estimates, *capped_estimates)}.values())
        result = decide(
            estimates,
            goal=request.goal,
            cap_bytes=cap_bytes,
            considered=considered,
            fits=fits,
            left_out=left_out,
            inside=inside,
            price=_prices(pricer, request, sketches),
        )
    except KeyboardInterrupt:
        partial_result = _best_so_far(pricer, request, cap_bytes, fits, sketches)
        raise SearchInterrupted(partial_result) from None
    result = dataclasses.replace(
        result, cap_reason=cap_reason, timings=timings(pricer.calibration) if request.is_here else None
    )
    if result.recommended is None:
        requested_estimates = [e for e in estimates if respects_micro_batch(e.plan, bounds, batch)]
        ways = _ways(pricer, request, requested_estimates, fits)
        raise _nothing_fits(requested_estimates, request, cap_bytes, bounds, ways=ways)
    return Planning(
        request=request,
        job=job,
        pricer=pricer,
        cap_bytes=cap_bytes,
        cap_reason=cap_reason,
        result=result,
        estimates=estimates,
        sketches=sketches,
        fits=fits,
        left_out=left_out,
    )


def _prices(pricer: Pricer, request: Request, sketches: list[Estimate]) -> Prices:
    return Prices(
        pricer.whole,
        pricer.trace_all if request.ranks == 1 else lambda plans: None,
        _band(pricer, request),
        lambda e: needed_bytes(e, request.machine),
        sketches,
    )


def _nothing_fits(
    requested_estimates: Sequence[Estimate],
    request: Request,
    cap_bytes: int,
    bounds: Bounds,
    *,
    ways: tuple[str, ...],
) -> NothingFits:
    """Return the error for a search in which no plan fits, with the least memory that would be enough.

    ``requested_estimates``: the traced plans with the requested micro-batch. ``ways``: texts of changes, each
    of which alone would be enough.
    """
    smallest = min(requested_estimates, key=lambda e: e.allocated_bytes.value)
    return NothingFits(
        cap_bytes=cap_bytes,
        least_bytes=needed_bytes(smallest, request.machine),
        plan_text=smallest.plan.label,
        missed=missed_bounds(
            bounds, list(filter(fits_under(cap_bytes, request.machine), requested_estimates))
        ),
        ways=ways,
        host="" if host_holds(smallest, request.machine) else host_line(smallest, request.machine),
    )


class SearchInterrupted(KeyboardInterrupt):
    """Raised on Ctrl-C during a search. ``result`` is the result so far, whose ``unfinished`` is True."""

    def __init__(self, result: SearchResult) -> None:
        super().__init__()
        self.result = result


def timings(known: Calibration) -> Timings:
    """Return what says how reliable the calibration's timings of operators are: the spread of repeated calls,
    the load of the machine and the waiting while they were timed, and this machine's number of processors.
    """
    return Timings(
        spread_ratio=known.spread_ratio,
        load_count=known.load_count,
        waited_ratio=known.waited_ratio,
        processor_count=local_machine.threads(),
    )


def _band(pricer: Pricer, request: Request) -> Band:
    """Return the band of scores within which plans count as equally good: for this machine `timed_band` of
    the spread of its timings, else `MODELLED`, 5 %.
    """
    return timed_band(pricer.calibration.spread_ratio) if request.is_here else MODELLED


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
    winner = best(filter(fits, candidates), request.goal, _band(pricer, request))
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


def limit_parts(pricer: Pricer, accuracy: Accuracy) -> None:
    """If samples of a batch depend on each other, set the smallest micro-batch of the pricer's space: two
    samples if ``accuracy`` allows splitting the batch nevertheless (some layers need more than one), else the
    whole batch of a rank. If they do not depend on each other, or if a rank has only one sample, nothing is
    changed.
    """
    space = pricer.space
    if space.batch_size == 1 or pricer.dependence.kind is not DependenceKind.DEPENDENT:
        return
    smallest_part = 2 if may_split(pricer.dependence, accuracy) else space.batch_size
    pricer.space = dataclasses.replace(space, least_part=smallest_part)


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
        if plan.get(NAME) is None  # its choice of tensors holds for the whole batch
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
    refuse_wrong_weights(make_plain_plan(request.ranks), dependence)
    raise UserError(
        f"dividing the batch over {request.ranks} ranks {dependence.changes} ({dependence.reason})",
        allowed="--accuracy any",
        hint=f"instead, use {dependence.way_out}",
    )


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
            hint="relax --without, --accuracy or --micro-batch",
        )
    is_weighted_wrongly = dependence.cause is DependenceCause.WEIGHTS
    return UserError(
        f"a micro-batch of {size} splits the batch, which {dependence.changes} ({dependence.reason})",
        allowed=dependence.way_out if is_weighted_wrongly else "--accuracy any",
        hint="or leave out --micro-batch",
    )


def _search_many(request: Request, progress: Progress) -> Planning | None:
    """Search plans with tensor, context, pipeline and data parallelism for up to the request's ranks.

    Returns None, without a search, if the model has fewer than 3 blocks or they are not alike. Raises
    NothingFits if no plan fits, and UserError if `search_scale` does or the job cannot be loaded.
    """
    from memfit.planner.block_costs import BLOCKS
    from memfit.planner.device_pricing import Aim
    from memfit.planner.multi_device import search_scale

    ranks = request.ranks
    progress("trace", 0, 0, "plain training")
    job, pricer = make_pricer(request, replicas=False)
    if pricer.space.block_count < BLOCKS or not pricer.repeats:
        return None
    cap_bytes = request.cap_bytes or int(request.machine.device.memory_bytes.value)
    aim = Aim(
        goal=request.goal,
        accuracy=request.accuracy,
        cap_bytes=cap_bytes,
        needs=lambda estimate: needed_bytes(estimate, request.machine),
        host=lambda estimate: host_holds(estimate, request.machine),
        bounds=dataclasses.replace(request.bounds, steps=job.steps),
        tell=progress,
    )
    result = search_scale(pricer, ranks, aim)
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
    free_bytes = local_machine.free_bytes() // request.ranks
    while needed_bytes(baseline, request.machine) > free_bytes and job.batch_size > request.ranks:
        smaller_job = dataclasses.replace(request.job, batch=job.batch_size // 2)
        request = dataclasses.replace(request, job=smaller_job)
        job, pricer = make_pricer(request)
        limit_parts(pricer, request.accuracy)
        baseline = pricer.whole(make_plain_plan(request.ranks))
    return request, job, pricer, baseline


def _cap(request: Request, baseline: Estimate, ratio: float) -> tuple[int, str]:
    if request.cap_bytes is not None:
        return request.cap_bytes, "asked for"
    if request.machine.device.kind == "cpu":
        if not 0 < ratio <= 1:
            raise UserError(
                f"the job's demonstration_ratio, the cap as a share of plain training's peak, is {ratio}",
                allowed="above 0, at most 1",
            )
        ratio_text = {0.25: "a quarter", 0.5: "half"}.get(ratio, f"{ratio:.0%}")
        reason = f"{_DEMONSTRATION} {ratio_text} of the baseline's predicted peak"
        return int(baseline.allocated_bytes.value * ratio), reason
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


def needed_bytes(estimate: Estimate, machine: Machine) -> int:
    """Return the least cap in bytes under which the estimate's plan fits: its tensors, and what the process
    or device uses beside them.

    On an accelerator whose context and libraries the catalog knows, it is the estimate's device memory: the
    upper end of its interval for a traced plan, the value for a sketch, which already is an upper bound. On
    any other accelerator it is what the caching allocator reserves, plus 1 GiB. On a CPU, it is the value of
    the peak of tensors plus 5 % and 2 MiB; for a traced plan, at least the upper end of the peak plus 2 MiB.
    Memory of an accelerator's host is not included.
    """
    allocated_bytes = estimate.allocated_bytes.value
    if machine.device.kind == "cpu":
        if estimate.traced:  # the upper end is higher if the workspaces of kernels were not probed
            allocated_bytes = max(allocated_bytes, estimate.allocated_bytes.high / CPU_HEADROOM_RATIO)
        return int(allocated_bytes * CPU_HEADROOM_RATIO) + CPU_HEADROOM_BYTES
    if (device_bytes := estimate.device_bytes) is not None:
        return int(device_bytes.high if estimate.traced else device_bytes.value)
    reserved = estimate.reserved_bytes
    reserved_bytes = reserved.value if reserved else allocated_bytes * ASSUMED_RESERVED_RATIO
    return int(reserved_bytes) + UNKNOWN_DEVICE_BYTES


def fits_under(cap_bytes: int, machine: Machine) -> Fits:
    """Return a function that tells whether an estimate's plan fits: it needs at most ``cap_bytes`` on the
    device (`needed_bytes`), and the host has the memory that it needs there (`host_holds_under`).
    """
    host_fits = host_holds_under(cap_bytes, machine)
    return lambda estimate: needed_bytes(estimate, machine) <= cap_bytes and host_fits(estimate)


def host_holds_under(cap_bytes: int, machine: Machine) -> Fits:
    """Return a function that tells whether the host has the memory that an estimate's plan needs there, as
    `host_holds` does.

    On a CPU with a cap above the machine's memory, the function always returns True: such a cap stands for
    the memory of another machine.
    """
    if machine.device.kind == "cpu" and cap_bytes > machine.device.memory_bytes.value:
        return lambda estimate: True
    return lambda estimate: host_holds(estimate, machine)


def states_bytes(estimate: Estimate) -> int:
    """Return the bytes of parameters, gradients and optimizer state at the peak; 0 for a sketch, which does
    not know them.
    """
    return sum(estimate.at_peak_bytes.get(c, 0) for c in ("parameter", "gradient", "optimizer_state"))


def _price(
    pricer: Pricer,
    request: Request,
    cap_bytes: int,
    progress: Progress,
    fits: Fits,
    *,
    small_state_bytes: int | None,
    sketches: list[Estimate],
) -> tuple[list[Estimate], int, tuple[Reason, ...]]:
    """Sketch every plan, trace the best ones whole, and, if the request is for this machine, time the
    operators that they need.

    Returns (estimates of the traced plans, number of sketched plans, reasons why techniques were left out).
    Plain training is among the traced plans, even if the request forbids its micro-batch.
    ``small_state_bytes``: bytes of parameters, gradients and optimizer state if they are too small for
    another optimizer to matter, else None. The sketches are appended to ``sketches``, so that the caller has
    them if the search is interrupted. Raises UserError if no plan has the requested micro-batch.
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
    pricer.prepare(all_plans, lambda *counts: progress("search", *counts))
    for index, plan in enumerate(all_plans):
        progress("price", index, len(all_plans), plan.label)
        sketches.append(pricer.sketch(plan))
    finalist_count = _FEWER_FINALISTS if is_long(pricer) else FINALISTS
    finalist_plans = finalists(sketches, fits, request.goal, finalist_count)

    def look(these: list[Plan]) -> None:
        pricer.trace_all(these, lambda *counts: progress("finalists", *counts))
        if request.is_here:
            calibrate(pricer, request, progress, plans=these)

    look(finalist_plans)
    cap = Cap(
        bytes=cap_bytes,
        needs=lambda e: needed_bytes(e, request.machine),
        refuses=refusals_of,
        host=host_holds_under(cap_bytes, request.machine),
    )
    finalist_plans += until_some_fit(
        pricer.whole, look, sketches, finalist_plans, cap=cap, goal=request.goal, most=finalist_count
    )
    estimates = _with_rivals(pricer, request, fits, [pricer.whole(plan) for plan in finalist_plans], progress)
    if not is_long(pricer):
        estimates = _with_counterfactuals(pricer, request, fits, estimates, sketches, cap, progress)
    if pricer.space.ranks == 1 and NAME not in request.bounds.without and not is_long(pricer):
        estimates += budgeted(pricer.whole, sketches, estimates, request.goal, cap, progress)
    return estimates, len(all_plans), left_out


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
    winner = best(filter(fits, estimates), request.goal, _band(pricer, request))
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
        previous_winner, winner = winner, best(filter(fits, estimates), request.goal, _band(pricer, request))
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
    of this is done at most twice.
    """
    for _ in range(_COUNTERFACTUAL_ROUNDS):
        band = _band(pricer, request)
        winner = best(filter(fits, estimates), request.goal, band)
        if winner is None:
            break
        candidate_plans = counterfactuals(sketches, estimates, winner, cap=cap, goal=request.goal)
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


def is_long(pricer: Pricer) -> bool:
    """Return whether the plain plan's trace has more than 10,000 operators, so that traces take long."""
    return len(pricer.trace(make_plain_plan(pricer.space.ranks)).ops) > _LONG_TRACE_CALLS


# -- calibration ----------------------------------------------------------------------------------


def calibrate(
    pricer: Pricer,
    request: Request,
    progress: Progress,
    plans: list[Plan] | None = None,
    *,
    budget_s: float = _SECOND_BUDGET_S,
) -> None:
    """Add to the pricer's calibration the times of those operators of ``plans`` that take most of a step's
    time, and the kernel workspaces of at most 32 other operators that could move a plan's peak.

    What is stored for this machine is reused; the rest is measured in a child process on this machine and
    stored. Without ``plans``, as in the first call of a search, the operators are those of plans that span
    the search. The machine's rates of computing and copying are measured too if they are not known.

    ``budget_s`` limits the number of operators: timing them would take about that many seconds on a machine
    of nominal speed (100 GFLOP/s, 10 GB/s). Without ``plans``, the limit is 5 seconds. The choice does not
    depend on how long the measurements take, so the same request finds the same stored times. Raises RunError
    if the child process gives no result.
    """
    from memfit.cost.memory import step_ops
    from memfit.cost.op_time import signatures_to_time
    from memfit.cost.workspaces import unprobed_signatures

    is_first_call = plans is None
    calibrated_plans = _representatives(pricer, request.bounds.without) if plans is None else plans
    if request.ranks == 1:
        pricer.trace_all(calibrated_plans)
    ops = [pair for plan in calibrated_plans for pair in step_ops(pricer.trace(plan))]
    known_signatures = {*pricer.calibration.op_s, *pricer.calibration.not_timed}
    signatures = signatures_to_time(
        ops, known_signatures, budget_s=_FIRST_BUDGET_S if is_first_call else budget_s
    )
    peak_signatures = [
        s for plan in calibrated_plans for s in unprobed_signatures(pricer.trace(plan), pricer.calibration)
    ]
    signatures = list(
        dict.fromkeys(
            (*signatures, *[s for s in peak_signatures if s not in known_signatures][:_MOST_DECISIVE])
        )
    )
    if not is_first_call and not signatures:
        return
    cache = CalibrationCache(_threads(request))
    stored_calibration = cache.read()
    missing_signatures = [
        s for s in signatures if s not in stored_calibration.op_s and s not in stored_calibration.not_timed
    ]
    needs_rates = not stored_calibration.flops_s and not pricer.calibration.flops_s
    if missing_signatures or needs_rates:
        progress("calibrate", 0, 0, f"{len(missing_signatures)} operators")
        stored_calibration = cache.add(
            probe_here(request, missing_signatures, _LONGEST_RATIO * budget_s, needs_rates)
        )
    pricer.recalibrate(merge_calibrations(pricer.calibration, selected(stored_calibration, set(signatures))))


def _begin_calibration(pricer: Pricer, request: Request, progress: Progress) -> None:
    """Run the first calibration of a search (`calibrate` without plans). If the request says ``recalibrate``,
    the timings stored for this machine and number of threads are discarded first.
    """
    if request.recalibrate:
        CalibrationCache(_threads(request)).forget()
    calibrate(pricer, request, progress)


def _representatives(pricer: Pricer, excluded_techniques: Sequence[str]) -> list[Plan]:
    """Return plans whose operators span the search: plain training and plain training with autocast, each
    with the whole batch, with four micro-batches and with the smallest micro-batches, as far as the batch can
    be split so.

    Plans with a technique in ``excluded_techniques`` are left out, except plain training.
    """
    parts = pricer.space.parts
    single_samples = [use("gradient-accumulation", micro_batches=parts[-1])] if parts[-1] > 1 else []
    four_micro_batches = [use("gradient-accumulation", micro_batches=4)] if 4 in parts[:-1] else []
    mixed_precision, plain_plan = autocast(pricer.space), make_plain_plan(pricer.space.ranks)
    candidates = [
        plain_plan,
        plain_plan.with_use(mixed_precision),
        *(plain_plan.with_use(u) for u in four_micro_batches + single_samples),
        *(plain_plan.with_use(mixed_precision).with_use(u) for u in four_micro_batches + single_samples),
    ]
    return [plan for plan in candidates if plan == plain_plan or not any(map(plan.get, excluded_techniques))]


_MOST_DECISIVE = 32  # most operators whose workspaces could move a peak, probed beside those that take time
_CALIBRATION_LIMIT_S = 900.0  # time limit for a busy machine; the measurement itself is short
_LONGEST_RATIO = 20.0  # of the nominal budget: no machine should take longer


def _threads(request: Request) -> int:
    return request.threads or local_machine.threads()


def probe_here(request: Request, signatures: list[str], budget_s: float, rates: bool = True) -> Calibration:
    """Measure the operators with these signatures on this machine, in a child process; with ``rates``, also
    the machine's rates of computing and copying.

    They are measured in the given order; none is begun after ``budget_s`` seconds. The process is stopped
    after 900 seconds. Raises RunError if no result has come when it ends.
    """
    calibrations: list[Calibration] = []

    def listen(event: Mapping[str, Any]) -> None:
        if event["event"] == "calibration":
            calibrations.append(
                serialization.loads(
                    Calibration, serialization.dumps(event["calibration"]), what="calibration"
                )
            )

    spec = RunSpec(
        name="calibration",
        role="calibration",
        job=request.job,
        plan=Plan(),
        seed=0,
        steps=0,
        threads=_threads(request),
        timeout_s=_CALIBRATION_LIMIT_S,
    )
    packages = ["bitsandbytes"] if any('"bitsandbytes.' in s for s in signatures) else []
    config = native.render_calibration(spec, signatures, budget_s=budget_s, packages=packages, rates=rates)
    outcome = run(config, on_event=listen)
    if not calibrations:
        raise RunError(
            "the calibration of this machine, in which operators are timed, ended without a result: "
            f"{outcome.reason or outcome.outcome.value}"
        )
    return calibrations[0]
