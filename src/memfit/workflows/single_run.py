"""One plan: where its memory goes, and a run of it compared with its prediction."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Sequence

from memfit.engines.registry import ready_engine, render, supporting_engine
from memfit.jobs import checkpoints
from memfit.jobs.user_job import source_digest
from memfit.monitoring.run_alarms import RunAlarms
from memfit.planner.capacity import needed_bytes, saved_bytes
from memfit.planner.machine_calibration import calibrate
from memfit.planner.recompute_budget import open_budget
from memfit.planner.request import Progress, Request, make_predictor, model_sizes
from memfit.report.explain import TracedEstimate, traced_estimate
from memfit.runtime import local_machine
from memfit.runtime.child_process import Event
from memfit.runtime.interruption import NO_INTERRUPTION, Interruption
from memfit.runtime.ranks import OnEvent, run_ranks
from memfit.runtime.restart import Losses, run_with_restarts
from memfit.store.database import Store
from memfit.techniques.rank_mesh import split_batch
from memfit.techniques.registry import check, refuse_wrong_weights, with_defaults
from memfit.types import serialization
from memfit.types.device_kind import HOST
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.launch import RECORD_BYTES_PER_STEP, RunSpec
from memfit.types.plan import Plan
from memfit.types.result import (
    Estimate,
    Measurement,
    OutcomeKind,
    RankComparison,
    Run,
)
from memfit.workflows.recovery import NO_RECOVERY, RecoverySettings, train_with_recoveries

OnNotice = Callable[[Event], None]


def explain(request: Request, plan: Plan, progress: Progress) -> Estimate:
    """Return the prediction for ``plan`` with the request's job, machine and engine. The plan is not trained;
    if the request is for this machine, its operators are timed here. Raises what `anatomy` raises."""
    return anatomy(request, [plan], progress)[0].estimate


def resolve_plan(request: Request, plan: Plan, progress: Progress) -> Plan:
    """Return the plan with all its settings chosen.

    Only a plan that recomputes tensors so as to stay within a memory budget can have some left: the tensors
    to recompute are then chosen for the request's machine. Any other plan is returned unchanged. Raises
    UserError if the budget cannot be met, and what `anatomy` raises.
    """
    return plan if open_budget(plan) is None else explain(request, plan, progress).plan


def anatomy(
    request: Request, plans: Sequence[Plan], progress: Progress, *, lines: bool = False
) -> tuple[TracedEstimate, ...]:
    """Return the prediction for each plan, in the same order, with the trace of the rank that has the highest
    peak. If the request is for this machine, the plans' operators are timed here first.

    ``lines``: whether the trace has the line of the user's code that made each allocation. Raises UserError
    if the job cannot be loaded, if the request's engine or machine or the job does not support a plan, if a
    plan cannot split the batch equally, or if it splits it in a way that gives the terms of the loss wrong
    weights. Raises RunError if operators cannot be timed here.
    """
    _, predictor = make_predictor(request)
    predictor.lines = lines
    for plan in plans:
        supporting_engine(request.engine, plan)
        split_batch(plan, predictor.job.batch_size)
        if (dependence := predictor.dependence_under(plan)) is not None:
            refuse_wrong_weights(plan, dependence)
        progress("trace", 0, 0, plan.label)
        predictor.whole(check(plan, request.machine))
    if request.is_here:
        calibrate(predictor, request, progress, plans=list(plans))
    estimates = [predictor.whole(plan) for plan in plans]
    return tuple(
        traced_estimate(e, predictor.trace(p, e.rank), predictor.calibration)
        for p, e in zip(plans, estimates, strict=True)
    )


def run_plan(
    request: Request,
    plan: Plan,
    *,
    seed: int | None,
    steps: int | None,
    capped: bool,
    progress: Progress,
    store: Store | None = None,
    recovery: RecoverySettings = NO_RECOVERY,
) -> Run:
    """Train a plan on the request's engine and return the run: its prediction and its measurement.

    ``seed`` None: that of the checkpoint to resume from, or 0 without one. ``steps`` None: the job's own
    number. ``capped``: whether the run is stopped at a memory limit, which is the request's cap, or what the
    plan is predicted to need if the request has none. ``store``: where the run is stored; None: nowhere.
    ``recovery``: whether checkpoints are saved and resumed from, and whether the run continues under a safer
    plan if memory runs out (`train_with_recoveries`).

    The engine "replay" trains nothing. It returns the last run of the same job, seed and plan in ``store``
    (None: the default store), with its prediction replaced by a new one, and stores nothing. Raises UserError
    if there is no such run, if the user's job file has changed since, or if ``recovery`` allows recoveries.

    Also raises UserError if the plan has too many ranks for this machine, if the engine does not support the
    plan or cannot train it here, if the checkpoint to resume from is missing or does not suit, or if the
    process that trains refuses the plan or the job; and what `anatomy` raises.
    """
    ready_engine(request.engine, plan, request.device_kind)
    is_replay = request.engine == "replay"
    if is_replay and recovery.most:
        raise UserError(
            "engine replay trains nothing, so it cannot recover from running out of memory",
            allowed="--engine replay without --on-oom, or another engine",
        )
    device = request.machine.device
    if request.is_here and not device.is_host:
        max_ranks, needs = request.machine.device_count, f"a {device.name}"
    else:
        max_ranks, needs = max(8, 2 * local_machine.threads()), "a process"
    if plan.ranks > max_ranks:
        raise UserError(
            f"a plan with {plan.ranks} ranks cannot run on this machine",
            allowed=f"at most {max_ranks} ranks; each needs {needs} of its own",
            hint="`memfit estimate JOB --plan PLAN` predicts it without running it",
        )
    job = make_predictor(request)[0]
    keep, seed = checkpoints.resolve_settings(recovery.keep, seed, steps or job.steps)
    stored_runs = _find_runs(store or Store(), request, seed) if is_replay else []
    estimate = explain(request, plan, progress)
    plan = estimate.plan
    if is_replay:
        return _replay(stored_runs, request, estimate)
    copy_bytes = saved_bytes(estimate) if keep.save and keep.asynchronous else 0
    bound_bytes = needed_bytes(estimate, request.machine)
    if device.is_host:
        bound_bytes += copy_bytes + RECORD_BYTES_PER_STEP * (steps or job.steps)
    spec = RunSpec(
        name=plan.label,
        role="run",
        job=request.job_ref,
        plan=plan,
        engine=request.engine,
        seed=seed,
        keep=keep,
        timeout_s=request.timeout_s,
        stall_s=recovery.stall_s,
        predicted_step_s=estimate.step_s.value if estimate.step_s else None,
        steps=steps or job.steps,
        batch_size=job.batch_size,
        clip=job.clip,
        sizes=model_sizes(request.engine, job),
        cap_bytes=(request.cap_bytes or bound_bytes) if capped else None,
        save_copy_bytes=copy_bytes,
        cap_scope="run" if request.cap_bytes else "bound",
        device=request.device_kind,
        threads=request.threads or max(1, local_machine.threads() // plan.ranks),
        evaluate=request.evaluates and plan.ranks == 1,
        source_digest=source_digest(request.job_ref.spec),
    )

    def train(spec: RunSpec, estimate: Estimate, losses: Losses, *, strict: bool) -> Run:
        return run_spec(
            spec,
            estimate,
            progress,
            spec.name,
            strict=strict,
            losses=losses,
            on_notice=recovery.on_notice,
        )

    with checkpoints.reserve(spec.keep.save):
        result = train_with_recoveries(train, request, spec, estimate, recovery)
    if store is not None:
        store.append("run", "run", result)
    return result


def _find_runs(store: Store, request: Request, seed: int) -> list[Run]:
    """Return the stored runs of the request's job with this seed, whatever their number of steps, oldest
    first. Raises UserError if there are none."""
    stored_runs = [
        serialization.loads(Run, r.body, what=f"record {r.record_id}") for r in store.records(kind="run")
    ]
    request_key = (_without_steps(request.job_ref), seed)
    if matches := [r for r in stored_runs if (_without_steps(r.spec.job), r.spec.seed) == request_key]:
        return matches
    raise UserError(
        f"{store.path} has no stored run to replay of this job with this seed, --size, --data, --weights, "
        "--batch, --length and --dim (--steps may differ)",
        hint="record one with `memfit run` without --engine replay",
    )


def _replay(stored_runs: Sequence[Run], request: Request, estimate: Estimate) -> Run:
    """Return the last of the stored runs that has the plan of ``estimate``, with ``estimate`` as its
    prediction instead of the stored one. Settings that a stored plan lacks have their default values.

    Raises UserError if no run has this plan, or if the user's job file has changed since that run.
    """
    matches = [r for r in stored_runs if with_defaults(r.spec.plan) == estimate.plan]
    if not matches:
        raise UserError(
            f"no stored run of this job with this seed and these sizes has the plan {estimate.plan.label}",
            hint="record one with `memfit run` without --engine replay",
        )
    if matches[-1].spec.source_digest not in {"", source_digest(request.job_ref.spec)}:
        raise UserError(
            f"the file of {request.job_ref.spec} has changed since the stored run of this plan",
            hint="record one with `memfit run` without --engine replay",
        )
    return dataclasses.replace(
        matches[-1],
        predicted_peak_bytes=int(estimate.allocated_bytes.value),
        predicted_phase_peak_bytes=estimate.phase_peak_bytes,
        predicted_step_s=estimate.step_s.value if estimate.step_s else None,
    )


def run_spec(
    spec: RunSpec,
    estimate: Estimate,
    progress: Progress,
    label: str,
    *,
    strict: bool = False,
    losses: Losses | None = None,
    on_notice: OnNotice = lambda event: None,
) -> Run:
    """Train a plan as ``spec`` says and return the run: its prediction (``estimate``) and its measurement.

    A run that fails raises nothing: the outcome of its measurement says so. With ``strict``, UserError is
    raised if the process that trains refuses the plan or the job; after the first step, it is raised only if
    the run does not go on after a restart. ``label``: name of the run in the texts for ``progress``.
    ``losses``: as for `run_with_restarts`. ``on_notice``: called with events that a person should see at
    once: "stalled" and "restarted".
    """
    refusals: list[UserError] = []
    has_begun = False

    def listen(event: Event) -> None:
        nonlocal has_begun
        kind = event["event"]
        if kind == "refused" and strict:
            error = UserError(str(event["given"]), allowed=str(event["allowed"]), hint=str(event["hint"]))
            if not has_begun:
                raise error
            refusals.append(error)
        elif kind == "step":
            has_begun = True
            alarms.add(event)
            progress("run", int(str(event["step"])) + 1, spec.steps, label)
        elif kind == "stage":
            progress("run", 0, spec.steps, f"{label}: {event['stage']}")
        elif kind == "restarted":
            progress("run", 0, spec.steps, f"{label}: started again, {event['why']}")
        if kind in ("restarted", "stalled"):
            on_notice(event)

    progress("run", 0, spec.steps, label)
    alarms = RunAlarms(estimate, copy_bytes=spec.save_copy_bytes if spec.device == HOST else 0)
    measurement = measure_spec(spec, listen, losses)
    if refusals and measurement.outcome is OutcomeKind.FAILED and str(refusals[-1]) in measurement.reason:
        raise refusals[-1]
    return Run(
        spec=spec,
        predicted_peak_bytes=int(estimate.allocated_bytes.value),
        predicted_phase_peak_bytes=estimate.phase_peak_bytes,
        predicted_step_s=estimate.step_s.value if estimate.step_s else None,
        measurement=measurement,
        dependence=estimate.dependence,
        alarms=alarms.conclude(),
    )


_OF_ALL_RANKS = ("refused", "stalled")  # events that matter whatever rank they are of


def measure_spec(
    spec: RunSpec,
    listen: Callable[[Event], None] = lambda event: None,
    losses: Losses | None = None,
) -> Measurement:
    """Run all ranks of ``spec`` and return the measurement of one of them. ``listen`` is called with each
    event of rank 0, and with those of other ranks that refuse the job or stall.

    Of one rank, it is that rank's. If several ranks are run and some failed, it is that of the first to fail;
    if its outcome is failed, its reason begins with the number of the rank. If none failed, also if all ended
    early after a save, it is that of the rank with the highest peak, as in predictions, with the losses
    averaged over all ranks.

    A run that saves checkpoints receives SIGTERM and SIGUSR1 of this process while it runs, if this is the
    main thread: it saves, and after SIGTERM it ends.
    """

    def on_event(rank: int, event: Event) -> None:
        if rank == 0 or event["event"] in _OF_ALL_RANKS:
            listen(event)

    with (
        Interruption(spec.keep.grace_s) if spec.keep.save else contextlib.nullcontext(NO_INTERRUPTION)
    ) as interruption:

        def start(spec: RunSpec, on_event: OnEvent) -> Sequence[Measurement]:
            return run_ranks(render(spec), on_event=on_event, interruption=interruption)

        measurements = run_with_restarts(
            spec, start, on_event=on_event, losses=losses, interruption=interruption
        )
    return merge_ranks(measurements)


def merge_ranks(measurements: Sequence[Measurement]) -> Measurement:
    """Return one measurement for ``measurements``, those of all ranks in the order of the ranks;
    `measure_spec` says which. If there are several and no rank failed, it has the `RankComparison` of all."""
    if len(measurements) == 1:
        return measurements[0]
    failures = [(r, m) for r, m in enumerate(measurements) if m.outcome is not OutcomeKind.OK]
    if failures and not all(m.outcome is OutcomeKind.INTERRUPTED and m.peak_bytes for m in measurements):
        rank, failure = min(failures, key=lambda pair: pair[1].failed_after_rank is not None)
        is_own = failure.outcome is OutcomeKind.FAILED
        return dataclasses.replace(failure, reason=f"rank {rank}: {failure.reason}") if is_own else failure
    means = tuple(statistics.fmean(step) for step in zip(*(m.losses for m in measurements), strict=True))
    summary = _summary(measurements)
    return dataclasses.replace(measurements[summary.fullest], losses=means, ranks=summary)


def _summary(measurements: Sequence[Measurement]) -> RankComparison:
    peaks = tuple(m.peak_bytes or 0 for m in measurements)
    times = tuple(m.before_backward_s for m in measurements if m.before_backward_s is not None)
    times = times if len(times) == len(measurements) else ()
    nodes = len({m.node for m in measurements})
    return RankComparison(
        collectives=measurements[0].collectives,
        nodes=nodes,
        per_node=len(measurements) // nodes,
        peak_bytes=peaks,
        fullest=peaks.index(max(peaks)),
        before_backward_s=times,
        slowest=times.index(max(times)) if times else None,
    )


def _without_steps(job: JobRef) -> JobRef:
    return dataclasses.replace(job, steps=None)
