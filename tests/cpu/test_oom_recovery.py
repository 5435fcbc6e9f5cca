"""Runs that run out of memory in their third epoch, whose samples are longer, end by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memfit.planner.request import Request
from memfit.runtime import local_machine
from memfit.techniques.registry import make_use
from memfit.types.job import JobRef
from memfit.types.launch import CheckpointSettings
from memfit.types.plan import EffectClass, Plan, Use
from memfit.types.result import OutcomeKind, Recovery, Run, VerdictKind
from memfit.verify import verdict
from memfit.workflows import single_run
from memfit.workflows.recovery import RecoverySettings

pytestmark = pytest.mark.usefixtures("forked_workers")
MIB = 2**20
FAILED_STEP = 8  # the first of the third epoch
JOB = Path(__file__).parents[1] / "data" / "growing_samples.py"


@pytest.fixture(autouse=True)
def no_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators are not timed, as no step time is tested here."""
    monkeypatch.setattr(single_run, "calibrate", lambda *args, **options: None)


def _run(
    plan: Plan,
    *,
    job: str = "job",
    cap_bytes: int | None = None,
    folder: Path | None = None,
    told: list[Recovery] | None = None,
) -> Run:
    keep = CheckpointSettings() if folder is None else CheckpointSettings(save=str(folder), every_steps=3)
    request = Request(
        job_ref=JobRef(spec=f"{JOB}:{job}"),
        machine=local_machine.this_machine("world", "cpu"),
        cap_bytes=cap_bytes,
        threads=1,
    )
    log: list[Recovery] = [] if told is None else told
    return single_run.run_plan(
        request,
        plan,
        seed=0,
        steps=12,
        capped=cap_bytes is not None,
        progress=lambda *args: None,
        recovery=RecoverySettings(
            keep=keep, most=2, on_recovery=lambda recovery, count: log.append(recovery)
        ),
    )


def _plan(*names: str | Use, ranks: int = 1) -> Plan:
    return Plan(uses=tuple(make_use(n, {}) if isinstance(n, str) else n for n in names), ranks=ranks)


def _judged(undisturbed: Run, recovered: Run, effect: EffectClass) -> Any:
    assert undisturbed.measurement.outcome is OutcomeKind.OK, undisturbed.measurement.reason
    return verdict([undisturbed], [recovered], effect=effect, metric=None)


def test_a_recovered_run_of_class_e0_is_bitwise_equal_to_the_undisturbed_run(tmp_path: Path) -> None:
    told: list[Recovery] = []
    undisturbed = _run(Plan(), job="job_with_dropout")
    recovered = _run(Plan(), job="job_with_dropout", cap_bytes=80 * MIB, folder=tmp_path / "run", told=told)
    assert (recovered.measurement.outcome, recovered.recovery_stop) == (OutcomeKind.OK, "")
    (recovery,) = recovered.recoveries
    assert recovery.reason == f"out of memory in forward of step {FAILED_STEP}"
    assert (recovery.step, recovery.first_step) == (FAILED_STEP, 6)
    assert recovery.checkpoint.endswith("step-00000006")
    assert recovery.plan == recovered.spec.plan == _plan("activation-checkpointing")
    assert recovery.needed_bytes < recovery.limit_bytes == 80 * MIB < recovery.failed_bytes
    assert recovery.verdict is not None
    assert (recovery.verdict.kind, recovery.verdict.effect) == (VerdictKind.EQUIVALENT, EffectClass.E0)
    assert recovery.verdict.reason == "the losses of 2 repeated steps are bitwise equal"
    assert [(r.step, r.verdict) for r in told] == [(FAILED_STEP, None)]
    assert recovered.measurement.losses == undisturbed.measurement.losses
    assert _judged(undisturbed, recovered, EffectClass.E0).kind is VerdictKind.EQUIVALENT


def test_a_recovered_run_of_class_e1_gets_more_micro_batches_and_the_losses_of_the_undisturbed_run(
    tmp_path: Path,
) -> None:
    plan = _plan("gradient-accumulation")
    undisturbed = _run(plan)
    recovered = _run(plan, cap_bytes=60 * MIB, folder=tmp_path / "run")
    assert recovered.measurement.outcome is OutcomeKind.OK
    (recovery,) = recovered.recoveries
    assert recovery.plan == _plan(make_use("gradient-accumulation", {"micro_batches": 4}))
    assert recovery.verdict is not None
    assert (recovery.verdict.kind, recovery.verdict.effect) == (VerdictKind.EQUIVALENT, EffectClass.E1)
    losses, expected = recovered.measurement.losses, undisturbed.measurement.losses
    assert losses[:6] == expected[:6]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses != expected  # it was trained under another plan
    beyond_tolerance = _judged(undisturbed, recovered, EffectClass.E1)
    assert beyond_tolerance.reason == "the job has no metric with a margin"


def test_two_ranks_recover_together(tmp_path: Path) -> None:
    plan = _plan("ddp", ranks=2)
    undisturbed = _run(plan)
    recovered = _run(plan, cap_bytes=50 * MIB, folder=tmp_path / "run")
    assert recovered.measurement.outcome is OutcomeKind.OK, recovered.measurement.reason
    (recovery,) = recovered.recoveries
    assert recovery.plan == _plan("ddp", "gradient-accumulation", ranks=2)
    assert recovery.verdict is not None
    assert recovery.verdict.kind is VerdictKind.EQUIVALENT
    assert recovered.measurement.losses == pytest.approx(undisturbed.measurement.losses, rel=1e-5)


@pytest.mark.long
def test_offload_continues_from_a_checkpoint_of_another_plan(tmp_path: Path) -> None:
    recovered = _run(_plan("activation-checkpointing"), cap_bytes=42 * MIB, folder=tmp_path / "run")
    assert recovered.measurement.outcome is OutcomeKind.OK, recovered.recovery_stop
    (recovery,) = recovered.recoveries
    assert recovery.plan.get("activation-offload") is not None
    assert recovery.verdict is not None
    assert recovery.verdict.kind is VerdictKind.EQUIVALENT
