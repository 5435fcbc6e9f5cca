"""Recovery from out of memory: which plan comes next, how often, what is said, and how it is judged."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import memfit
from memfit.cli.run import RunOptions, lines, most_recoveries, print_recovery
from memfit.cli.views import run_view
from memfit.jobs import checkpoints
from memfit.jobs.registry import load
from memfit.planner.evaluate import Predictor
from memfit.planner.request import Request, job_facts
from memfit.planner.safer_plans import SaferPlan, predictor_of_batch, safer_plan
from memfit.runtime.local_machine import this_machine
from memfit.runtime.restart import Losses, resume_newest
from memfit.techniques.registry import make_use
from memfit.types import serialization
from memfit.types.dependence import DependenceKind, SampleDependence
from memfit.types.errors import UserError
from memfit.types.job import Job, JobRef
from memfit.types.launch import Checkpoint, CheckpointSettings, RunSpec
from memfit.types.plan import EffectClass, Plan, Use
from memfit.types.result import Estimate, Interval, Measurement, OutcomeKind, Run, VerdictKind
from memfit.verify.repeated_steps import repeated_steps_verdict
from memfit.workflows import recovery
from memfit.workflows.recovery import RecoverySettings, train_with_recoveries
from memfit.workflows.single_run import run_plan

MIB = 2**20
JOB = Path(__file__).parents[1] / "data" / "growing_samples.py"
LONG = 8  # a step with long samples


def _plan(*uses: str | Use, ranks: int = 1) -> Plan:
    return Plan(uses=tuple(make_use(u, {}) if isinstance(u, str) else u for u in uses), ranks=ranks)


def _micro(count: int) -> Use:
    return make_use("gradient-accumulation", {"micro_batches": count})


CHECKPOINTING = make_use("activation-checkpointing", {})
OFFLOAD = make_use("activation-offload", {"to": "disk", "minimum_kib": 64})


# --- which plan comes next


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """Predicts plans for a batch of long samples."""
    job: Job = load(JobRef(spec=f"{JOB}:job"))
    machine = this_machine("world", "cpu")
    short = Predictor(job=job, machine=machine, job_facts=job_facts(job, "cpu"))
    return predictor_of_batch(short, job.make_batch(LONG, 0))


def _next(predictor: Predictor, failed: Plan, limit_mib: int, **options: Any) -> Plan:
    choice = safer_plan(predictor, failed, limit_bytes=limit_mib * MIB, **options)
    assert isinstance(choice, SaferPlan), choice
    assert choice.needed_bytes <= choice.limit_bytes
    assert choice.needed_bytes < choice.failed_bytes
    return choice.estimate.plan


def test_the_batch_that_failed_is_predicted(predictor: Predictor) -> None:
    long = predictor.whole(Plan()).allocated_bytes.value
    job = load(JobRef(spec=f"{JOB}:job"))
    short = predictor_of_batch(predictor, job.make_batch(0, 0)).whole(Plan()).allocated_bytes.value
    assert long > 3 * short


def test_a_plan_of_class_e0_is_never_followed_by_one_that_reorders_sums(predictor: Predictor) -> None:
    assert _next(predictor, Plan(), 80) == _plan(CHECKPOINTING)
    assert _next(predictor, Plan(), 42) == _plan(CHECKPOINTING, OFFLOAD)
    reason = safer_plan(predictor, Plan(), limit_bytes=20 * MIB)
    assert isinstance(reason, str)
    assert "of effect class E0 that are left" in reason
    assert "20 MiB may be used; a plan with gradient-accumulation (E1)" in reason


def test_a_plan_of_class_e1_first_gets_the_fewest_micro_batches_that_fit(predictor: Predictor) -> None:
    two = _plan(_micro(2))
    assert _next(predictor, two, 60) == _plan(_micro(4))
    assert _next(predictor, two, 30) == _plan(_micro(8))
    assert _next(predictor, two, 20) == _plan(_micro(4), CHECKPOINTING)


def test_plans_that_were_tried_are_not_tried_again(predictor: Predictor) -> None:
    assert _next(predictor, _plan(_micro(2)), 60, tried=[_plan(_micro(4))]) == _plan(_micro(8))


def test_a_plan_that_failed_though_predicted_to_fit_is_followed_by_one_that_needs_a_tenth_less(
    predictor: Predictor,
) -> None:
    choice = safer_plan(predictor, _plan(_micro(2)), limit_bytes=10_000 * MIB)
    assert isinstance(choice, SaferPlan)
    assert choice.needed_bytes <= choice.limit_bytes == int(0.9 * choice.failed_bytes)


def test_a_plan_of_the_frontier_is_preferred_if_it_can_follow(predictor: Predictor) -> None:
    rare = make_use("activation-checkpointing", {"every": 2})
    other_optimizer, other_class = _plan("sgd", CHECKPOINTING), _plan("bf16-autocast", CHECKPOINTING)
    frontier = [other_optimizer, other_class, _plan(_micro(8)), _plan(rare), Plan(), _plan(CHECKPOINTING)]
    assert _next(predictor, Plan(), 130, frontier=frontier) == _plan(rare)
    assert _next(predictor, Plan(), 60, frontier=frontier) == _plan(CHECKPOINTING)
    # With other micro-batches only, though recomputation needs more memory, so is nearer.
    assert _next(predictor, _plan(_micro(2)), 60, frontier=frontier) == _plan(_micro(8))


def test_a_plan_of_the_frontier_cannot_follow_if_it_has_a_higher_class_or_another_precision(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole(self: Predictor, plan: Plan) -> Estimate:
        value = 200.0 * MIB / (1 + len(plan.uses))
        return dataclasses.replace(
            _estimate(plan), allocated_bytes=Interval(value=value, low=value, high=value)
        )

    monkeypatch.setattr(Predictor, "whole", whole)
    assert _next(predictor, Plan(), 130, frontier=[_plan("chunked-cross-entropy")]) == _plan(CHECKPOINTING)
    assert _next(
        predictor, _plan("sgd"), 90, frontier=[_plan("chunked-cross-entropy", CHECKPOINTING)]
    ) == _plan("sgd", _micro(2))
    cut = _plan(_micro(2), "chunked-cross-entropy")
    assert _next(predictor, _plan(_micro(2)), 90, frontier=[cut]) == cut


@pytest.mark.parametrize("kind", [DependenceKind.DEPENDENT, DependenceKind.NOT_TESTED])
def test_a_batch_is_not_cut_unless_its_samples_are_known_to_be_independent(
    kind: DependenceKind, predictor: Predictor
) -> None:
    unsure = dataclasses.replace(predictor)
    unsure.traces = predictor.traces
    unsure.__dict__["dependence"] = SampleDependence(kind=kind)
    reordered = make_use("adamw-fused", {})  # E1, and does not cut the batch
    assert _next(predictor, _plan(reordered), 80).get("gradient-accumulation") is not None
    assert _next(unsure, _plan(reordered), 80) == _plan(reordered, CHECKPOINTING)
    cut = safer_plan(unsure, _plan(_micro(2)), limit_bytes=60 * MIB)
    assert isinstance(cut, SaferPlan)
    expected = _plan(_micro(4)) if kind is DependenceKind.NOT_TESTED else _plan(_micro(2), CHECKPOINTING)
    assert cut.estimate.plan == expected


def test_a_training_loop_of_the_user_gets_the_next_plan_for_the_batch_that_failed() -> None:
    job = load(JobRef(spec=f"{JOB}:job"))
    prediction = memfit.estimate(
        job.build_model(), job.make_batch(0, 0), loss=job.loss, machine="this:cpu", probe=False
    )
    prediction = dataclasses.replace(prediction, cap_bytes=80 * MIB)
    long = job.make_batch(LONG, 0)
    safer = prediction.safer(long)
    assert safer.plan == _plan(CHECKPOINTING)
    assert safer.fits
    assert not dataclasses.replace(safer, estimate=safer.predictor.whole(Plan())).fits
    with pytest.raises(UserError, match=r"there is no safer plan than .*: of the plans of effect class E0"):
        dataclasses.replace(prediction, cap_bytes=20 * MIB).safer(long)


# --- how often, and from where


def _estimate(plan: Plan) -> Estimate:
    return Estimate(
        plan=plan,
        allocated_bytes=Interval(value=1.0, low=1.0, high=1.0),
        phase_peak_bytes={},
        at_peak_bytes={},
        by_module_bytes={},
        step_s=None,
        flops_per_step=0,
    )


def _spec(**changes: Any) -> RunSpec:
    spec = RunSpec(
        name="plain", role="run", job=JobRef(spec=f"{JOB}:job"), plan=Plan(), seed=0, steps=4, cap_bytes=MIB
    )
    return dataclasses.replace(spec, **changes)


class Trainer:
    """Runs out of memory in the steps ``failures``, one for each call; then all steps end well. A step's loss
    is ten minus its number."""

    def __init__(self, *failures: int, keep_to: int = 0) -> None:
        self.failures, self.keep_to = list(failures), keep_to
        self.specs: list[RunSpec] = []
        self.stricts: list[bool] = []

    def __call__(self, spec: RunSpec, estimate: Estimate, losses: Losses, *, strict: bool) -> Run:
        assert estimate.plan == spec.plan
        self.specs.append(spec)
        self.stricts.append(strict)
        first = checkpoints.about(Path(spec.keep.resume)).step if spec.keep.resume else 0
        end = self.failures.pop(0) if self.failures else spec.steps
        for rank in range(spec.plan.ranks):
            losses[rank] = {step: 10.0 - step for step in range(first, end)}
        if spec.keep.save and self.keep_to > first:
            _checkpoint(Path(spec.keep.save), self.keep_to)
        is_done = end == spec.steps
        measurement = Measurement(
            outcome=OutcomeKind.OK if is_done else OutcomeKind.OOM,
            reason="" if is_done else f"out of memory in forward of step {end}",
            first_step=first,
            steps_done=end - first,
            losses=tuple(losses[0].values()),
        )
        return Run(
            spec=spec,
            predicted_peak_bytes=1,
            predicted_phase_peak_bytes={},
            predicted_step_s=None,
            measurement=measurement,
        )


def _checkpoint(folder: Path, step: int) -> None:
    about = Checkpoint(
        step=step, seed=0, job="x", plan="x", engine="native", ranks=1, shapes={}, optimizer="", state=(),
        files_bytes={},
    )  # fmt: skip
    checkpoints.publish(checkpoints.begin(folder, step), about)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every next plan has one more micro-batch. The steps for whose batches a plan was chosen."""
    steps: list[int] = []

    def choose(request: Request, spec: RunSpec, step: int, frontier: Any, tried: Any) -> SaferPlan | str:
        steps.append(step)
        assert spec.plan in tried
        plan = _plan(_micro(1 + len(tried)))
        return SaferPlan(estimate=_estimate(plan), needed_bytes=1, failed_bytes=3, limit_bytes=2)

    monkeypatch.setattr(recovery, "_next_plan", choose)
    return steps


def _recovered(train: Trainer, most: int = 2, **changes: Any) -> Run:
    request = Request(job_ref=JobRef(spec=f"{JOB}:job"), machine=this_machine("world", "cpu"))
    return train_with_recoveries(
        train, request, _spec(**changes), _estimate(Plan()), RecoverySettings(most=most)
    )


def test_a_run_that_always_fails_ends_after_the_most_recoveries(chosen: list[int]) -> None:
    train = Trainer(1, 1, 1, 1, 1, 1)
    run = _recovered(train, most=3)
    assert run.measurement.outcome is OutcomeKind.OOM
    assert len(train.specs) == 4
    assert len({spec.plan for spec in train.specs}) == 4
    assert (len(run.recoveries), chosen) == (3, [1, 1, 1])
    assert run.recovery_stop == "3 recoveries were made, the most allowed"
    assert train.stricts == [True, False, False, False]


def test_without_recoveries_a_run_is_as_it_was(chosen: list[int]) -> None:
    run = _recovered(Trainer(1), most=0)
    assert (run.measurement.outcome, run.recoveries, run.recovery_stop) == (OutcomeKind.OOM, (), "")
    assert not chosen


def test_a_run_without_checkpoints_begins_again(chosen: list[int]) -> None:
    run = _recovered(Trainer(2))
    (first,) = run.recoveries
    assert (first.checkpoint, first.first_step, first.step) == ("", 0, 2)
    assert first.verdict is not None
    assert first.verdict.reason == "the losses of 2 repeated steps are bitwise equal"
    assert run.measurement.losses == (10.0, 9.0, 8.0, 7.0)


def test_a_run_that_goes_on_exactly_at_the_failed_step_repeats_none(
    chosen: list[int], tmp_path: Path
) -> None:
    run = _recovered(Trainer(3, keep_to=3), keep=CheckpointSettings(save=str(tmp_path / "run")))
    (first,) = run.recoveries
    assert (first.first_step, first.step, first.verdict) == (3, 3, None)
    summary = "\n".join(lines(run))
    assert "undecided" not in summary
    assert "verdict none: the checkpoint is of the failed step" in summary


def test_the_losses_are_those_of_all_steps(chosen: list[int], tmp_path: Path) -> None:
    train = Trainer(3, keep_to=2)
    run = _recovered(train, keep=CheckpointSettings(save=str(tmp_path / "run")))
    (first,) = run.recoveries
    assert (first.first_step, Path(first.checkpoint).name) == (2, "step-00000002")
    assert train.specs[1].keep.resume == first.checkpoint
    assert run.measurement.losses == (10.0, 9.0, 8.0, 7.0)
    assert (run.measurement.steps_done, run.measurement.first_step) == (4, 0)
    assert run.spec.keep.resume == ""  # as the user asked
    assert run.spec.plan == first.plan


def test_a_checkpoint_of_an_earlier_step_than_the_run_resumed_from_is_not_taken(tmp_path: Path) -> None:
    _checkpoint(tmp_path / "own", 2)
    _checkpoint(tmp_path / "other", 5)
    keep = CheckpointSettings(save=str(tmp_path / "own"), resume=str(tmp_path / "other" / "step-00000005"))
    assert resume_newest(keep) == keep
    _checkpoint(tmp_path / "own", 7)
    assert resume_newest(keep).resume == str(tmp_path / "own" / "step-00000007")
    assert resume_newest(CheckpointSettings()) == CheckpointSettings()


def test_a_batch_that_cannot_be_made_ends_the_run_and_not_memfit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = load(JobRef(spec=f"{JOB}:job"))

    def fail(step: int, seed: int) -> Any:
        raise UserError("no such sample")

    broken = dataclasses.replace(job, make_batch=lambda s, seed: fail(s, seed) if s else torch.ones(8, 4, 64))
    monkeypatch.setattr(recovery, "make_predictor", lambda *a, **k: (broken, None))
    run = _recovered(Trainer(1))
    assert run.recovery_stop == "plans cannot be predicted for the batch of step 1: no such sample"


def test_the_engine_that_replays_cannot_recover() -> None:
    request = Request(
        job_ref=JobRef(spec=f"{JOB}:job"), machine=this_machine("world", "cpu"), engine="replay"
    )
    with pytest.raises(UserError, match="engine replay trains nothing"):
        run_plan(
            request,
            Plan(),
            seed=0,
            steps=1,
            capped=False,
            progress=lambda *args: None,
            recovery=RecoverySettings(most=1),
        )


# --- how it is judged


def _verdict(before: Sequence[float], after: Sequence[float], effect: EffectClass) -> Any:
    return repeated_steps_verdict(before, after, effect=effect, first_step=6, seed=0)


def test_repeated_steps_are_judged_by_the_effect_class() -> None:
    rounded = [1.0, 1.0 + 1e-6]
    assert _verdict([1.0, 1.0], [1.0, 1.0], EffectClass.E0).kind is VerdictKind.EQUIVALENT
    different = _verdict([1.0, 1.0], rounded, EffectClass.E0)
    assert (different.kind, different.cause.step) == (VerdictKind.DIFFERENT, 7)
    assert _verdict([1.0, 1.0], rounded, EffectClass.E1).kind is VerdictKind.EQUIVALENT
    beyond = _verdict([1.0], [1.01], EffectClass.E1)
    assert (beyond.kind, beyond.cause.step) == (VerdictKind.DIFFERENT, 6)
    assert "the losses differ at step 6 (counted from 0) by 9.9e-03, more than" in beyond.reason
    for losses, effect in (([], EffectClass.E0), ([1.0], EffectClass.E2)):
        assert _verdict(losses, losses, effect).kind is VerdictKind.UNDECIDED
    long = [1.0] * 9
    assert _verdict(long, long, EffectClass.E1).reason == (
        "the losses of the first 5 of 9 repeated steps are equal within float32 tolerance"
    )


# --- what is said


def test_a_recovery_is_said_and_recorded(
    chosen: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _recovered(Trainer(3, keep_to=2), keep=CheckpointSettings(save=str(tmp_path / "run")))
    print_recovery(run.recoveries[0], 1, most=2)
    told = capsys.readouterr().err
    assert "out of memory in forward of step 3, under plain\n" in told
    assert "recovery 1 of at most 2: from " in told
    assert "step-00000002, after 2 steps, under gradient-accumulation(micro_batches=2)" in told
    summary = "\n".join(lines(run))
    assert "  failed  out of memory in forward of step 3, under plain\n  went on from " in summary
    assert "  verdict E0 equivalent: the losses of 1 repeated step are bitwise equal" in summary
    view = json.loads(serialization.dumps(run_view(run)))
    assert view["recovery_stop"] == ""
    (of_view,) = view["recoveries"]
    assert (of_view["step"], of_view["first_step"], of_view["effect"]) == (3, 2, "E0")
    assert (of_view["failed_label"], of_view["label"]) == (
        "plain",
        "gradient-accumulation(micro_batches=2)",
    )
    assert of_view["verdict"]["kind"] == "equivalent"
    assert serialization.loads(Run, serialization.dumps(run)) == run


def test_why_a_run_did_not_recover_is_said(chosen: list[int]) -> None:
    summary = "\n".join(lines(_recovered(Trainer(1, 1), most=1)))
    assert "  went on from step 0, as there is no checkpoint, under" in summary
    assert "  ended   without recovery: 1 recoveries" not in summary
    assert "  ended   without recovery: 1 recovery was made, the most allowed" in summary


def test_options_of_recovery_are_checked() -> None:
    assert most_recoveries(RunOptions()) == 0
    assert most_recoveries(RunOptions(on_oom="next-plan")) == 2
    assert most_recoveries(RunOptions(on_oom="next-plan", most_recoveries=5)) == 5
    with pytest.raises(UserError, match="unknown --on-oom: 'next'"):
        most_recoveries(RunOptions(on_oom="next"))
    with pytest.raises(UserError, match="--most-recoveries needs --on-oom next-plan"):
        most_recoveries(RunOptions(most_recoveries=1))
