"""From a job and a machine to a recommended plan: trace, cost and search, in that order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memfit.cost.host import host_holds, host_line
from memfit.cost.memory_estimate import ASSUMED_RESERVED_RATIO
from memfit.cost.step_time_calibration import merged
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
    as_asked,
    best,
    decide,
    keeps,
    missed,
    timed_band,
)
from memfit.planner.shortlist import counterfactuals, finalists, until_some_fit
from memfit.runtime import local_machine
from memfit.runtime.child_process import run
from memfit.store.calibration import CalibrationCache, selected
from memfit.techniques.base import Space
from memfit.techniques.recompute.optimal import NAME
from memfit.techniques.registry import effect_of, plain, refuse_wrong_weights, without
from memfit.types import serialization
from memfit.types.dependence import DependenceCause, DependenceKind
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
    _DEMONSTRATION + " what the smallest plan needs and a tenth more, as none fits {share:.0%} of the "
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

    ``cap_bytes`` None means the memory of the device. On a CPU it means a demonstration: a quarter of the
    baseline's peak, or the least that some plan needs if none fits that.
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
    """A finished search, with everything needed to price another plan the same way."""

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
    """Return the result with each plan's needed bytes, which decide whether it fits."""

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
    """Return the search space of the job, counted on a model built without memory.

    ``half`` is `half_of` the machine.
    """
    from memfit.model.chunk_analysis import worth_cutting
    from memfit.model.scalar_parameters import scalars
    from memfit.techniques.adapters import block_linears
    from memfit.trace.tracer import fake_model

    model = fake_model(job)
    try:
        path, found = find_blocks(model, job.blocks)
        blocks, linears = len(found), any(True for _ in block_linears(model, path))
    except UserError:
        if job.blocks is not None:
            raise
        blocks, linears = 0, False
    try:
        vocabulary = find_head(model, job.head)[1].out_features
    except UserError:
        if job.head is not None:
            raise
        vocabulary = 0
    return Space(
        batch_size=max(1, job.batch_size // ranks),
        block_count=blocks,
        has_head=vocabulary > 0,
        vocabulary=vocabulary,
        device=device,
        ranks=ranks,
        half=half,
        linears=linears,
        scalars=bool(scalars(model)),
        clipped=job.clip is not None,
        slices=ranks == 1 and worth_cutting(job, model),
    )


def half_of(machine: Machine) -> str:
    """Return the half precision of the machine's matrix units. Devices before Ampere have float16 only."""
    rates = machine.device.peak_flops
    return "float16" if "float16" in rates and "bfloat16" not in rates else "bfloat16"


def autocast(space: Space) -> Use:
    """Return the mixed-precision technique for the device."""
    return use("fp16-autocast" if space.half == "float16" else "bf16-autocast")


def make_pricer(request: Request, *, replicas: bool = True) -> tuple[Job, Pricer]:
    """Load the job and build its pricer.

    Raises UserError if the ranks are all ``replicas`` of the model and have less than one sample each.
    """
    job, ranks = load(request.job), request.ranks
    if replicas and job.batch_size < ranks:
        raise UserError(f"a batch of {job.batch_size} on {ranks} ranks", allowed=f"--batch {ranks} or more")
    space = space_of(job, request.machine.device.kind, request.ranks, half_of(request.machine))
    return job, Pricer(
        job=job,
        machine=request.machine,
        space=space,
        engine=request.engine,
        calibration=request.correction,
    )


def model_sizes(name: str, job: Job) -> Mapping[str, str]:
    """Return the model sizes that the engine's own trainer needs, as option to value.

    Raises UserError if the engine cannot build that model.
    """
    if name != "megatron":
        return {}
    from memfit.engines.megatron.gpt import read, sizes
    from memfit.trace.tracer import fake_model

    return sizes(read(fake_model(job)))


def search(request: Request, progress: Progress, *, must_run: bool = False) -> Planning:
    """Search the best plan for the request.

    Raises NothingFits with the least memory that would be enough. ``must_run`` halves the batch until plain
    training can run on this machine; the returned request has the new batch.
    """
    if request.machine.device_count > 1 and not request.is_here:
        ranks = request.ranks if request.ranks > 1 else request.machine.device_count
        request = dataclasses.replace(request, ranks=ranks)
        if (found := _search_many(request, progress)) is not None:
            return found
    progress("trace", 0, 0, "plain training")
    job, pricer = make_pricer(request)
    _refuse_ranks(request, pricer)
    limit_parts(pricer, request.accuracy)
    basis = pricer.whole(plain(request.ranks))
    if request.is_here and must_run:
        request, job, pricer, basis = _runnable(request, job, pricer, basis)
    pricer.gap_ratio = _GAP_RATIO
    cap_bytes, cap_reason = _cap(request, basis, job.demonstration_ratio)
    if request.is_here:
        _begin_calibration(pricer, request, progress)
    batch, bounds = pricer.space.batch_size, dataclasses.replace(request.bounds, steps=job.steps)

    def inside(e: Estimate) -> bool:
        return needed_bytes(e, request.machine) <= cap_bytes

    def fits(e: Estimate) -> bool:
        return inside(e) and as_asked(e.plan, bounds, batch) and keeps(bounds, e)

    states = states_bytes(basis)
    small = states if states < _SMALL_STATES_RATIO * cap_bytes else None
    sketches: list[Estimate] = []
    try:
        estimates, considered, left_out = _price(
            pricer, request, cap_bytes, progress, fits, small=small, sketches=sketches
        )
        if cap_reason.startswith(_DEMONSTRATION) and not any(map(fits, estimates)):
            cap_bytes = _reachable_cap(estimates, request, batch)
            cap_reason = _REACHABLE.format(share=job.demonstration_ratio)
            sketches.clear()
            more, considered, left_out = _price(
                pricer, request, cap_bytes, progress, fits, small=small, sketches=sketches
            )
            estimates = list({e.plan: e for e in (*estimates, *more)}.values())
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
        so_far = _best_so_far(pricer, request, cap_bytes, fits, sketches)
        raise SearchInterrupted(so_far) from None
    result = dataclasses.replace(
        result, cap_reason=cap_reason, timings=timings(pricer.calibration) if request.is_here else None
    )
    if result.recommended is None:
        asked = [e for e in estimates if as_asked(e.plan, bounds, batch)]
        raise _nothing_fits(asked, request, cap_bytes, bounds, ways=_ways(pricer))
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
    asked: Sequence[Estimate], request: Request, cap_bytes: int, bounds: Bounds, *, ways: tuple[str, ...]
) -> NothingFits:
    """Return the error with the least memory that would be enough.

    ``asked`` are plans with the requested micro-batch.
    """
    least = min(asked, key=lambda e: e.allocated_bytes.value)
    return NothingFits(
        cap_bytes=cap_bytes,
        least_bytes=needed_bytes(least, request.machine),
        plan_text=least.plan.label,
        missed=missed(bounds, list(filter(fits_under(cap_bytes, request.machine), asked))),
        ways=ways,
        host="" if host_holds(least, request.machine) else host_line(least, request.machine),
    )


class SearchInterrupted(KeyboardInterrupt):
    """Raised on Ctrl-C during a search. ``result`` is the result so far."""

    def __init__(self, result: SearchResult) -> None:
        super().__init__()
        self.result = result


def timings(known: Calibration) -> Timings:
    """Return how reliable the calibration's timings are."""
    return Timings(
        spread_ratio=known.spread_ratio,
        load_count=known.load_count,
        waited_ratio=known.waited_ratio,
        processor_count=local_machine.threads(),
    )


def _band(pricer: Pricer, request: Request) -> Band:
    """Return the band within which plans count as equally fast."""
    return timed_band(pricer.calibration.spread_ratio) if request.is_here else MODELLED


def _best_so_far(
    pricer: Pricer, request: Request, cap_bytes: int, fits: Fits, sketches: list[Estimate]
) -> SearchResult:
    """Return the best of the plans traced so far, or of the sketches if no traced plan fits."""
    highest, refuses = request.accuracy.highest, engine(request.engine).supports
    traced = [
        pricer.whole(plan)
        for plan, rank in list(pricer.traces)
        if rank == 0
        and effect_of(plan, pricer.dependence) <= highest
        and not refuses(plan)
        and not any(plan.get(name) for name in request.bounds.without)
    ]
    basis = pricer.whole(plain(request.ranks))
    pool = traced if any(map(fits, traced)) else [*traced, *sketches]
    winner = best(filter(fits, pool), request.goal, _band(pricer, request))
    smallest = min([basis, *pool], key=lambda e: e.allocated_bytes.value)

    def choice(e: Estimate) -> Choice:
        need, effect = needed_bytes(e, request.machine), effect_of(e.plan, e.dependence)
        return Choice(estimate=e, fits=fits(e), effect=effect, needed_bytes=need)

    shown = {e.plan: e for e in (basis, smallest, *([winner] if winner else []))}
    return SearchResult(
        goal=request.goal.value,
        cap_bytes=cap_bytes,
        considered=len(sketches) or len(pool),
        baseline=choice(basis),
        recommended=choice(winner) if winner else None,
        smallest=choice(smallest),
        frontier=tuple(map(choice, sorted(shown.values(), key=lambda e: e.allocated_bytes.value))),
        unfinished=True,
    )


def limit_parts(pricer: Pricer, accuracy: Accuracy) -> None:
    """Limit micro-batches to the smallest size that the job allows.

    That is the whole batch if it must not be split, and two samples if samples depend on each other, because
    some layers need more than one.
    """
    space = pricer.space
    if space.batch_size == 1 or pricer.dependence.kind is not DependenceKind.DEPENDENT:
        return
    least = 2 if may_split(pricer.dependence, accuracy) else space.batch_size
    pricer.space = dataclasses.replace(space, least_part=least)


def _ways(pricer: Pricer) -> tuple[str, ...]:
    found = pricer.dependence if pricer.space.batch_size > 1 else None
    if found is None or found.kind is not DependenceKind.DEPENDENT:
        return ()
    if found.cause is DependenceCause.WEIGHTS:
        return (f"gradient-accumulation, with {found.way_out}",)
    return (f"gradient-accumulation, which {found.changes}, under --accuracy any",)


def _refuse_ranks(request: Request, pricer: Pricer) -> None:
    """Raise UserError if dividing the batch over ranks would change the training."""
    if request.ranks == 1 or may_share(pricer.dependence, request.accuracy):
        return
    found = pricer.dependence
    refuse_wrong_weights(plain(request.ranks), found)
    raise UserError(
        f"{request.ranks} ranks that share the batch: that {found.changes} ({found.reason})",
        allowed="--accuracy any",
        hint=f"ways out: {found.way_out}",
    )


def _search_many(request: Request, progress: Progress) -> Planning | None:
    """Search layouts for a machine of the catalog.

    Returns None if the model has too few blocks or they differ.
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
    request: Request, job: Job, pricer: Pricer, basis: Estimate
) -> tuple[Request, Job, Pricer, Estimate]:
    """Return the same with the batch halved until plain training fits the memory that is free now."""
    free = local_machine.free_bytes() // request.ranks
    while needed_bytes(basis, request.machine) > free and job.batch_size > request.ranks:
        smaller = dataclasses.replace(request.job, batch=job.batch_size // 2)
        request = dataclasses.replace(request, job=smaller)
        job, pricer = make_pricer(request)
        limit_parts(pricer, request.accuracy)
        basis = pricer.whole(plain(request.ranks))
    return request, job, pricer, basis


def _cap(request: Request, basis: Estimate, share: float) -> tuple[int, str]:
    if request.cap_bytes is not None:
        return request.cap_bytes, "asked for"
    if request.machine.device.kind == "cpu":
        if not 0 < share <= 1:
            raise UserError(f"the job's demonstration_ratio is {share}", allowed="above 0, at most 1")
        told = {0.25: "a quarter", 0.5: "half"}.get(share, f"{share:.0%}")
        reason = f"{_DEMONSTRATION} {told} of the baseline's predicted peak"
        return int(basis.allocated_bytes.value * share), reason
    return int(request.machine.device.memory_bytes.value), "the device's memory"


def _reachable_cap(estimates: Sequence[Estimate], request: Request, batch: int) -> int:
    """Return the cap of a demonstration: the least that a requested plan needs, plus a margin."""
    asked = [e for e in estimates if as_asked(e.plan, request.bounds, batch)]
    return int(min(needed_bytes(e, request.machine) for e in asked) * _DEMONSTRATION_SPARE_RATIO)


def needed_bytes(estimate: Estimate, machine: Machine) -> int:
    """Return the cap that this plan needs: its tensors, and what the process or device uses beside them.

    For a traced plan on a known accelerator this is the upper end of its range. A sketch already is an upper
    bound.
    """
    allocated_bytes = estimate.allocated_bytes.value
    if machine.device.kind == "cpu":
        if estimate.traced:  # the upper end is higher if the workspaces of kernels were not probed
            allocated_bytes = max(allocated_bytes, estimate.allocated_bytes.high / CPU_HEADROOM_RATIO)
        return int(allocated_bytes * CPU_HEADROOM_RATIO) + CPU_HEADROOM_BYTES
    if (whole := estimate.device_bytes) is not None:
        return int(whole.high if estimate.traced else whole.value)
    reserved = estimate.reserved_bytes
    reserved_bytes = reserved.value if reserved else allocated_bytes * ASSUMED_RESERVED_RATIO
    return int(reserved_bytes) + UNKNOWN_DEVICE_BYTES


def fits_under(cap_bytes: int, machine: Machine) -> Fits:
    """Return a function that tells whether an estimate fits ``cap_bytes`` on the device and the host's
    memory.
    """
    holds = host_holds_under(cap_bytes, machine)
    return lambda estimate: needed_bytes(estimate, machine) <= cap_bytes and holds(estimate)


def host_holds_under(cap_bytes: int, machine: Machine) -> Fits:
    """Return a function that tells whether the host has the memory that a plan needs there.

    A cap above this machine's own memory refers to another machine, whose host memory is then taken from the
    cap.
    """
    if machine.device.kind == "cpu" and cap_bytes > machine.device.memory_bytes.value:
        return lambda estimate: True
    return lambda estimate: host_holds(estimate, machine)


def states_bytes(estimate: Estimate) -> int:
    """Return the bytes of parameters, gradients and optimizer state at the peak."""
    return sum(estimate.at_peak_bytes.get(c, 0) for c in ("parameter", "gradient", "optimizer_state"))


def _price(
    pricer: Pricer,
    request: Request,
    cap_bytes: int,
    progress: Progress,
    fits: Fits,
    *,
    small: int | None,
    sketches: list[Estimate],
) -> tuple[list[Estimate], int, tuple[Reason, ...]]:
    """Sketch every plan, trace the best ones whole, and calibrate the operators they need.

    ``small``: bytes of the states if they are too small for another optimizer to matter, else None. The
    sketches are appended to ``sketches``.
    """
    dependence = pricer.dependence if pricer.job.batch_size > 1 else None
    offered, left_out = usable(
        pricer.space, request.accuracy, small_states_bytes=small, dependence=dependence
    )
    techniques = [t for t in offered if t.name not in request.bounds.without]
    carries = engine(request.engine).supports
    basis = plain(request.ranks)  # always priced, because the other plans are compared with it
    every = [
        plan
        for plan in plans(pricer.space, techniques)
        if not carries(plan) and (plan == basis or as_asked(plan, request.bounds, pricer.space.batch_size))
    ]
    pricer.prepare(every, lambda *begun: progress("search", *begun))
    for done, plan in enumerate(every):
        progress("price", done, len(every), plan.label)
        sketches.append(pricer.sketch(plan))
    most = _FEWER_FINALISTS if is_long(pricer) else FINALISTS
    chosen = finalists(sketches, fits, request.goal, most)

    def look(these: list[Plan]) -> None:
        pricer.trace_all(these, lambda *begun: progress("finalists", *begun))
        if request.is_here:
            calibrate(pricer, request, progress, plans=these)

    look(chosen)
    cap = Cap(
        bytes=cap_bytes,
        needs=lambda e: needed_bytes(e, request.machine),
        refuses=carries,
        host=host_holds_under(cap_bytes, request.machine),
    )
    chosen += until_some_fit(pricer.whole, look, sketches, chosen, cap=cap, goal=request.goal, most=most)
    made = _with_rivals(pricer, request, fits, [pricer.whole(plan) for plan in chosen], progress)
    if not is_long(pricer):
        made = _with_counterfactuals(pricer, request, fits, made, sketches, cap, progress)
    if pricer.space.ranks == 1 and NAME not in request.bounds.without and not is_long(pricer):
        made += budgeted(pricer.whole, sketches, made, request.goal, cap, progress)
    return made, len(every), left_out


def _with_rivals(
    pricer: Pricer, request: Request, fits: Fits, made: list[Estimate], progress: Progress
) -> list[Estimate]:
    """Add the plans that lack one of the winner's techniques, which sketches may have overestimated.

    Their operators are measured. This is repeated while it changes the winner.
    """
    refuses = engine(request.engine).supports
    winner = best(filter(fits, made), request.goal, _band(pricer, request))
    for _ in range(_SETTLING_ROUNDS):
        if winner is None:
            break
        less = dict.fromkeys(without(winner.plan, u.technique) for u in winner.plan.uses)
        rivals = [p for p in less if p not in {e.plan for e in made} and not refuses(p)]
        if request.ranks == 1:
            pricer.trace_all(rivals)
        if request.is_here:
            calibrate(pricer, request, progress, [winner.plan, *rivals], budget_s=_SETTLING_BUDGET_S)
            made = [pricer.whole(e.plan) for e in made]  # priced with the new calibration
        made = [*made, *map(pricer.whole, rivals)]
        before, winner = winner, best(filter(fits, made), request.goal, _band(pricer, request))
        if winner is None or winner.plan == before.plan:
            break
    return made


def _with_counterfactuals(
    pricer: Pricer,
    request: Request,
    fits: Fits,
    made: list[Estimate],
    sketches: list[Estimate],
    cap: Cap,
    progress: Progress,
) -> list[Estimate]:
    """Add plans with each technique that the winner lacks, so that its exclusion rests on a trace.

    If one of them beats the winner, its own rivals are added too.
    """
    for _ in range(_COUNTERFACTUAL_ROUNDS):
        band = _band(pricer, request)
        winner = best(filter(fits, made), request.goal, band)
        if winner is None:
            break
        wanted = counterfactuals(sketches, made, winner, cap=cap, goal=request.goal)
        if not wanted:
            break
        if request.ranks == 1:
            pricer.trace_all(wanted, lambda *begun: progress("finalists", *begun))
        if request.is_here:
            calibrate(pricer, request, progress, plans=wanted, budget_s=_SETTLING_BUDGET_S)
        made = [pricer.whole(plan) for plan in dict.fromkeys([*(e.plan for e in made), *wanted])]
        after = best(filter(fits, made), request.goal, band)
        if after is None or after.plan != winner.plan:
            made = _with_rivals(pricer, request, fits, made, progress)
    return made


def is_long(pricer: Pricer) -> bool:
    """Return whether the plain plan's trace has so many operators that traces take long."""
    return len(pricer.trace(plain(pricer.space.ranks)).ops) > _LONG_TRACE_CALLS


# -- calibration ----------------------------------------------------------------------------------


def calibrate(
    pricer: Pricer,
    request: Request,
    progress: Progress,
    plans: list[Plan] | None = None,
    *,
    budget_s: float = _SECOND_BUDGET_S,
) -> None:
    """Add the times of the operators that matter to the pricer's calibration.

    Times stored for this machine are reused; the others are measured in a child process. Without ``plans``
    (the first call), the operators are those that span the search, and the machine's rates are measured too.
    The choice of operators depends on the plans alone and not on how long the probes take, so the same
    question finds the same stored times. ``budget_s`` is in nominal seconds.
    """
    from memfit.cost.memory import step_ops
    from memfit.cost.op_time import signatures_to_time
    from memfit.cost.workspaces import unprobed_signatures

    first = plans is None
    chosen = _representatives(pricer, request.bounds.without) if plans is None else plans
    if request.ranks == 1:
        pricer.trace_all(chosen)
    ops = [pair for plan in chosen for pair in step_ops(pricer.trace(plan))]
    known = {*pricer.calibration.op_s, *pricer.calibration.not_timed}
    wanted = signatures_to_time(ops, known, budget_s=_FIRST_BUDGET_S if first else budget_s)
    decisive = [s for plan in chosen for s in unprobed_signatures(pricer.trace(plan), pricer.calibration)]
    wanted = list(dict.fromkeys((*wanted, *[s for s in decisive if s not in known][:_MOST_DECISIVE])))
    if not first and not wanted:
        return
    cache = CalibrationCache(_threads(request))
    stored = cache.read()
    missing = [s for s in wanted if s not in stored.op_s and s not in stored.not_timed]
    rates = not stored.flops_s and not pricer.calibration.flops_s
    if missing or rates:
        progress("calibrate", 0, 0, f"{len(missing)} operators")
        stored = cache.add(probe_here(request, missing, _LONGEST_RATIO * budget_s, rates))
    pricer.recalibrate(merged(pricer.calibration, selected(stored, set(wanted))))


def _begin_calibration(pricer: Pricer, request: Request, progress: Progress) -> None:
    """Run the first calibration of a search.

    With ``recalibrate``, stored timings of this machine are discarded first.
    """
    if request.recalibrate:
        CalibrationCache(_threads(request)).forget()
    calibrate(pricer, request, progress)


def _representatives(pricer: Pricer, excluded: Sequence[str]) -> list[Plan]:
    """Return plans whose operators span the search: whole batch and single samples, in both precisions.

    Plans with a technique in ``excluded`` are left out.
    """
    parts = pricer.space.parts
    single = [use("gradient-accumulation", micro_batches=parts[-1])] if parts[-1] > 1 else []
    middle = [use("gradient-accumulation", micro_batches=4)] if 4 in parts[:-1] else []
    mixed, basis = autocast(pricer.space), plain(pricer.space.ranks)
    spanning = [
        basis,
        basis.with_use(mixed),
        *(basis.with_use(u) for u in middle + single),
        *(basis.with_use(mixed).with_use(u) for u in middle + single),
    ]
    return [plan for plan in spanning if plan == basis or not any(map(plan.get, excluded))]


_MOST_DECISIVE = 32  # most operators whose workspaces could move a peak, probed beside those that take time
_CALIBRATION_LIMIT_S = 900.0  # time limit for a busy machine; the measurement itself is short
_LONGEST_RATIO = 20.0  # of the nominal budget: no machine should take longer


def _threads(request: Request) -> int:
    return request.threads or local_machine.threads()


def probe_here(request: Request, signatures: list[str], budget_s: float, rates: bool = True) -> Calibration:
    """Measure these operators, and the machine's rates if ``rates``, in a child process.

    Raises RunError if the child process ends without a calibration.
    """
    found: list[Calibration] = []

    def listen(event: Mapping[str, Any]) -> None:
        if event["event"] == "calibration":
            found.append(
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
    if not found:
        raise RunError(f"calibration did not finish: {outcome.reason or outcome.outcome.value}")
    return found[0]
