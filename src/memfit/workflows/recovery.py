"""Continue a run that has run out of memory, from its newest checkpoint, under a safer plan."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from memfit.jobs import checkpoints
from memfit.planner.request import Request, make_predictor
from memfit.planner.safer_plans import FAILURES, SaferPlan, predictor_of_batch, safer_plan
from memfit.runtime import local_machine
from memfit.runtime.child_process import Event
from memfit.runtime.restart import Losses, resume_newest
from memfit.techniques.registry import effect_of
from memfit.types.device_kind import HOST
from memfit.types.launch import CheckpointSettings, RunSpec
from memfit.types.plan import Plan
from memfit.types.result import Estimate, OutcomeKind, Recovery, Restart, Run
from memfit.verify.repeated_steps import repeated_steps_verdict


class Train(Protocol):
    """Trains a plan as the spec says and returns the run, which has the estimate as its prediction. Puts the
    losses into ``losses``, also those of a run that fails. If the process that trains refuses the plan or the
    job, raises UserError with ``strict``; without, the run fails."""

    def __call__(self, spec: RunSpec, estimate: Estimate, losses: Losses, *, strict: bool) -> Run: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecoverySettings:
    """Which checkpoints a run saves and resumes from (``keep``), and how it recovers from running out of
    memory: at most ``most`` times (0: never), by plans of ``frontier``, which a search has found, before
    others. ``on_recovery`` is called before the run continues, with the recovery and the number of those so
    far, this one included. ``stall_s``: as in `RunSpec`. ``on_notice`` is called with the events "stalled"
    and "restarted" of a run."""

    keep: CheckpointSettings = dataclasses.field(default_factory=CheckpointSettings)
    most: int = 0
    frontier: tuple[Plan, ...] = ()
    on_recovery: Callable[[Recovery, int], None] = lambda recovery, count: None
    stall_s: float | None = None
    on_notice: Callable[[Event], None] = lambda event: None


NO_RECOVERY = RecoverySettings()


def train_with_recoveries(
    train: Train,
    request: Request,
    spec: RunSpec,
    estimate: Estimate,
    settings: RecoverySettings,
) -> Run:
    """Train as ``spec`` says, and whenever memory runs out, but at most ``settings.most`` times, continue
    under the plan that `safer_plan` chooses for the batch of the failed step. No plan is used twice.

    The run continues from the newest complete checkpoint in the folder that it saves in; if there is none,
    from where it began. ``estimate``: the prediction of the first plan. Without a recovery, the run is that
    of ``train``; for others see `Run`.
    """
    losses: Losses = {}
    recoveries: list[Recovery] = []
    restarts: tuple[Restart, ...] = ()
    tried = {spec.plan}
    keep = spec.keep
    while True:
        attempt: Losses = {}
        run = train(spec, estimate, attempt, strict=not recoveries)
        if recoveries:
            recoveries[-1] = _with_verdict(recoveries[-1], losses, attempt, spec.seed)
        losses = {rank: {**losses.get(rank, {}), **by_step} for rank, by_step in attempt.items()}
        restarts = (*restarts, *run.measurement.restarts)
        run = dataclasses.replace(run, measurement=dataclasses.replace(run.measurement, restarts=restarts))
        if run.measurement.outcome is not OutcomeKind.OOM:
            return _with_recoveries(run, keep, recoveries, losses)
        if len(recoveries) == settings.most:
            return _with_recoveries(run, keep, recoveries, losses, _limit_text(settings.most))
        step = run.measurement.first_step + run.measurement.steps_done
        choice = _next_plan(request, spec, step, settings.frontier, tried)
        if isinstance(choice, str):
            return _with_recoveries(run, keep, recoveries, losses, choice)
        next_keep = resume_newest(spec.keep)
        recoveries.append(_recovery(run, step, choice, next_keep))
        settings.on_recovery(recoveries[-1], len(recoveries))
        estimate = choice.estimate
        tried.add(estimate.plan)
        spec = dataclasses.replace(spec, plan=estimate.plan, name=estimate.plan.label, keep=next_keep)


def _limit_text(most: int) -> str:
    if most == 1:
        return "1 recovery was made, the most allowed"
    return f"{most} recoveries were made, the most allowed" if most else ""


def _next_plan(
    request: Request, spec: RunSpec, step: int, frontier: Sequence[Plan], tried: Collection[Plan]
) -> SaferPlan | str:
    """Return the plan to continue with after that of ``spec`` ran out of memory in ``step``, or a text that
    says why there is none. Without a cap, it must fit the memory that is free now."""
    ranks = spec.plan.ranks
    limit_bytes = spec.cap_bytes
    if limit_bytes is None:
        limit_bytes = local_machine.free_device_bytes(spec.device) // (ranks if spec.device == HOST else 1)
    if spec.device == HOST:
        limit_bytes -= spec.save_copy_bytes
    try:
        job, predictor = make_predictor(dataclasses.replace(request, ranks=ranks), replicas=False)
        batch_predictor = predictor_of_batch(predictor, job.make_batch(step, spec.seed))
        return safer_plan(batch_predictor, spec.plan, limit_bytes=limit_bytes, frontier=frontier, tried=tried)
    except FAILURES as error:
        return f"plans cannot be predicted for the batch of step {step}: {error}"


def _recovery(run: Run, step: int, choice: SaferPlan, keep: CheckpointSettings) -> Recovery:
    checkpoint = keep.resume
    return Recovery(
        step=step,
        reason=run.measurement.reason,
        failed_plan=run.spec.plan,
        plan=choice.estimate.plan,
        effect=effect_of(run.spec.plan, run.dependence),
        checkpoint=checkpoint,
        first_step=checkpoints.find(Path(checkpoint))[1].step if checkpoint else 0,
        failed_bytes=choice.failed_bytes,
        needed_bytes=choice.needed_bytes,
        limit_bytes=choice.limit_bytes,
    )


def _with_verdict(recovery: Recovery, before: Losses, after: Losses, seed: int) -> Recovery:
    """Return the recovery with the verdict on the steps that both plans trained; unchanged if there are none,
    as when the checkpoint was saved just before the failed step. ``before``: losses of the steps up to the
    failed one; ``after``: losses of those after the recovery."""
    losses_before, losses_after = _mean_losses(before), _mean_losses(after)
    repeated = [
        s for s in range(recovery.first_step, recovery.step) if s in losses_before and s in losses_after
    ]
    if not repeated:
        return recovery
    verdict = repeated_steps_verdict(
        [losses_before[s] for s in repeated],
        [losses_after[s] for s in repeated],
        effect=recovery.effect,
        first_step=recovery.first_step,
        seed=seed,
    )
    return dataclasses.replace(recovery, verdict=verdict)


def _mean_losses(losses: Losses) -> Mapping[int, float]:
    """Return step -> mean of the ranks' losses, ascending by step, for steps that all ranks have; {} without
    ranks."""
    if not losses:
        return {}
    steps = sorted(set.intersection(*(set(by_step) for by_step in losses.values())))
    return {step: statistics.fmean(by_step[step] for by_step in losses.values()) for step in steps}


def _with_recoveries(
    run: Run, keep: CheckpointSettings, recoveries: Sequence[Recovery], losses: Losses, stop: str = ""
) -> Run:
    """Return the last run with the recoveries, the checkpoint settings of the first run and, if there are
    recoveries, the losses of all steps."""
    if recoveries:
        all_losses = _mean_losses(losses)
        measurement = dataclasses.replace(
            run.measurement,
            losses=tuple(all_losses.values()),
            steps_done=len(all_losses),
            first_step=min(all_losses, default=0),
        )
        run = dataclasses.replace(run, measurement=measurement)
    return dataclasses.replace(
        run,
        spec=dataclasses.replace(run.spec, keep=keep),
        recoveries=tuple(recoveries),
        recovery_stop=stop,
    )
