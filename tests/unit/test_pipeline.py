"""A whole proof of concept on a user's own job, and what remains of an interrupted one."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memfit.cost.estimate import interval_around
from memfit.cost.memory import memory_profile
from memfit.planner import machine_calibration, plan_space, single_device, trials
from memfit.planner.operator_timer import OperatorTimer
from memfit.planner.request import Planning, make_predictor
from memfit.runtime import local_machine
from memfit.runtime.counting_allocator import available
from memfit.store.database import Store
from memfit.techniques.registry import TECHNIQUES, make_use
from memfit.types import serialization
from memfit.types.errors import NothingFits, UserError
from memfit.types.job import JobRef
from memfit.types.launch import RECORD_BYTES_PER_STEP, LaunchConfig, RunSpec
from memfit.types.machine import Calibration
from memfit.types.plan import Accuracy, Plan, use
from memfit.types.result import Measurement, OutcomeKind, Poc, Run, VerdictKind
from memfit.types.units import MIB
from memfit.workflows import proof_of_concept, single_run
from memfit.workflows.proof_of_concept import (
    ABLATION,
    BASELINE,
    REPEATED,
    Objective,
    Request,
    explain,
    poc,
    report,
    run_plan,
    stored_poc,
)

pytestmark = pytest.mark.usefixtures("forked_workers")
# Activations of 2 MiB each weigh far more than the weights; four blocks keep two of them each.
JOB = """
import torch
from torch import nn
from torch.nn import functional

from memfit.types.job import Job, Metric


def batch(step, seed):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    x = torch.randn(64, 64, 16, generator=generator)
    return x, x[..., :1]


def evaluate(model):
    with torch.no_grad():
        x, y = batch(10**6, 0)
        return float(functional.mse_loss(model(x[:1]), y[:1]))


def build():
    blocks = [nn.Sequential(nn.Linear(128, 128), nn.GELU()) for _ in range(4)]
    return nn.Sequential(nn.Linear(16, 128), nn.Sequential(*blocks), nn.Linear(128, 1))


job = Job(name="own", build_model=build, make_batch=batch, batch_size=64, blocks="1", evaluate=evaluate,
          loss=lambda model, both: functional.mse_loss(model(both[0]), both[1]),
          metric=Metric(name="error", unit="1", higher_is_better=False, margin=1.0, margin_source="a test",
                        naive=1.0, naive_name="zero"))
"""


Whole = tuple[Poc, Store, list[str]]


def quiet(stage: str, done: int, total: int, detail: str) -> None:
    """Ignores the progress."""


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> Request:
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(JOB)
    return Request(
        job_ref=JobRef(spec=f"{path}:job"),
        machine=local_machine.this_machine("world"),
        cap_bytes=19 * MIB,
        accuracy=Accuracy.EXACT,
        goal=Objective.FASTEST,
        threads=1,
    )


@pytest.fixture(scope="module", autouse=True)
def few_techniques() -> Iterator[None]:
    """Only a few techniques, as each costs traces; all are tested elsewhere."""
    names = ("activation-checkpointing", "optimizer-in-backward", "bf16-autocast")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_space, "TECHNIQUES", {name: TECHNIQUES[name] for name in names})
        yield


@pytest.fixture(scope="module")
def whole(
    request_: Request, few_techniques: None, forked_workers: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Poc, Store, list[str]]:
    """One PoC for all tests of this file, with real child processes."""
    stages: list[str] = []
    store = Store(tmp_path_factory.mktemp("store") / "store.sqlite3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine_calibration, "_FIRST_TIMING_S", 2.0)
        patch.setattr(machine_calibration, "_SECOND_TIMING_S", 2.0)
        patch.setattr(single_device, "FINALISTS", 4)
        patch.setattr(proof_of_concept, "_TRIALS_S", 0.0)  # two runs
        found = poc(
            request_,
            store=store,
            seeds=1,
            steps=4,
            report_path=None,
            lang="en",
            command="memfit poc",
            progress=lambda stage, done, total, detail: stages.append(stage),
        )
    return found, store, stages


def test_the_recommendation_trains_where_plain_training_cannot(whole: Whole) -> None:
    found, _, stages = whole
    capped = {r.spec.role: r.measurement for r in found.runs if r.spec.cap_bytes is not None}
    assert capped["baseline"].outcome is OutcomeKind.OOM
    assert (capped["recommended"].outcome, capped["recommended"].reason) == (OutcomeKind.OK, "")
    assert len(capped["recommended"].losses) == 4
    assert (found.finished, found.cap_reason, found.steps_per_run) == (True, "asked for", 4)
    assert {"trace", "search", "calibrate", "finalists", "run"} <= set(stages)


def test_measured_peaks_and_timelines_match_the_predictions(whole: Whole) -> None:
    done = [r for r in whole[0].runs if r.measurement.outcome is OutcomeKind.OK]
    assert len(done) >= 4
    for run in done:
        assert run.measurement.peak_bytes == pytest.approx(run.predicted_peak_bytes, rel=0.01), run.spec.name
    for name, predicted in whole[0].predicted_timeline_bytes.items():
        measured = next(r.measurement.timeline_bytes for r in done if r.spec.name == name)
        assert len(measured) == len(predicted), name  # so that one can be drawn over the other
        assert max(measured) == pytest.approx(max(predicted), rel=0.02), name


def test_an_exact_plan_gets_an_equivalent_verdict_and_is_reproducible(whole: Whole) -> None:
    found = whole[0]
    verdicts = {v.name: v.verdict.kind for v in found.verdicts}
    assert verdicts["recommended"] is VerdictKind.EQUIVALENT
    assert found.reproducibility.reproducible is True
    assert found.step_time_ratio is not None
    assert {i.quantity for i in found.interactions} == {"peak_bytes", "step_s", "metric"}


def test_the_recommendation_is_among_the_plans_that_were_tried(whole: Whole) -> None:
    result = whole[0].search
    assert result.recommended is not None
    assert len([t for t in result.trials if t.step_s]) == 2
    assert result.recommended.estimate.plan in {t.plan for t in result.trials}


def test_all_runs_are_in_the_store_and_the_report_is_written(whole: Whole) -> None:
    found, store, _ = whole
    kinds = [r.kind for r in store.records(found.poc_id)]
    assert kinds == ["begin", *["run"] * len(found.runs), "poc"]
    assert stored_poc(store, found.poc_id) == serialization.loads(Poc, serialization.dumps(found))
    assert "<html" in Path(found.report).read_text(encoding="utf-8")


def test_a_report_can_be_rewritten_in_another_language(whole: Whole, tmp_path: Path) -> None:
    _, store, _ = whole
    path = report(store, poc_id=None, path=tmp_path / "again.html", lang="ja")
    assert 'lang="ja"' in path.read_text(encoding="utf-8")


def test_an_interrupted_poc_keeps_its_finished_runs_and_gets_a_report(whole: Whole, tmp_path: Path) -> None:
    found, store, _ = whole
    begin = serialization.loads(Poc, store.records(found.poc_id, "begin")[0].body)
    cut = Store(tmp_path / "cut.sqlite3")
    cut.append("cut", "begin", begin)
    for run in found.runs[:2]:
        cut.append("cut", "run", run)
    left = stored_poc(cut, "cut")
    assert not left.finished
    assert [r.spec for r in left.runs] == [r.spec for r in found.runs[:2]]
    assert report(cut, poc_id="cut", path=tmp_path / "cut.html", lang="en").stat().st_size > 10_000


def test_a_report_without_a_poc_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "empty.sqlite3")
    with pytest.raises(UserError, match=r"no proof of concept in .*; run `memfit poc` first"):
        report(store, poc_id=None, path=None, lang="en")
    with pytest.raises(UserError, match=r"no PoC 'x' in .*; allowed: none"):
        stored_poc(store, "x")


def test_the_frontier_is_sorted_by_peak_and_the_recommendation_is_the_best_that_fits(whole: Whole) -> None:
    found = whole[0].search
    peaks = [c.estimate.allocated_bytes.value for c in found.frontier]
    assert peaks == sorted(peaks)
    assert found.recommended is not None
    runs = {t.plan: t.step_s for t in found.trials if t.step_s}
    error_ratio = trials.measured_band(list(runs.values())).high
    fastest_s = min(map(statistics.median_low, runs.values()))
    assert statistics.median_low(runs[found.recommended.estimate.plan]) <= fastest_s * (1 + error_ratio)


# --- one plan


def test_explain_gives_the_peak_of_a_whole_trace_and_refuses_impossible_plans(request_: Request) -> None:
    plan = Plan(uses=(use("activation-checkpointing", every=1),))
    found = explain(request_, plan, quiet)
    _, predictor = make_predictor(request_)
    assert found.allocated_bytes.value == memory_profile(predictor.trace(plan), Calibration()).peak_bytes
    with pytest.raises(UserError, match="impossible plan"):
        explain(request_, Plan(uses=(use("sgd"), use("adafactor"))), quiet)


@pytest.mark.parametrize("capped", [False, True])
def test_a_single_run_has_its_prediction_and_if_capped_a_cap_slightly_above_it(
    capped: bool, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[RunSpec] = []
    seen: list[tuple[str, int, int, str]] = []

    def children(config: LaunchConfig, *, on_event: Any, interruption: Any) -> tuple[Measurement, ...]:
        given.append(config.spec)
        on_event(0, {"event": "stage", "stage": "warm-up"})
        on_event(0, {"event": "step", "step": 0})
        on_event(0, {"event": "other"})
        return (Measurement(outcome=OutcomeKind.OK),)

    monkeypatch.setattr(single_run, "run_ranks", children)
    free = dataclasses.replace(request_, cap_bytes=None)
    found = run_plan(
        free,
        Plan(),
        seed=3,
        steps=None,
        capped=capped,
        progress=lambda *told: seen.append(told),
    )
    (spec,) = given
    assert (spec.seed, spec.steps, spec.plan) == (3, 40, Plan())
    assert found.predicted_peak_bytes is not None
    if capped:
        needed_bytes = int(found.predicted_peak_bytes * 1.05) + 2 * MIB
        assert spec.cap_bytes == needed_bytes + RECORD_BYTES_PER_STEP * spec.steps
    else:
        assert spec.cap_bytes is None
    assert [t[1] for t in seen if t[0] == "run"] == [0, 0, 1]


def test_a_plan_of_two_ranks_runs_here_and_its_peak_matches_the_prediction(request_: Request) -> None:
    if (why := available()) is not None:
        pytest.skip(f"no counting allocator: {why}")
    told: list[tuple[object, ...]] = []
    free, plan = dataclasses.replace(request_, cap_bytes=None), Plan(uses=(make_use("ddp", {}),), ranks=2)
    found = run_plan(free, plan, seed=0, steps=2, capped=False, progress=lambda *told_: told.append(told_))
    assert (found.measurement.outcome, found.measurement.reason) == (OutcomeKind.OK, "")
    predicted, measured = found.predicted_peak_bytes, found.measurement.peak_bytes
    assert predicted is not None
    assert measured is not None
    # DDP's first bucket, as large as all gradients, is freed before the second is made if gloo is early
    gradient_bytes = 4 * (17 * 128 + 4 * 129 * 128 + 129)
    assert any(
        measured == pytest.approx(predicted - early_bytes, rel=0.01) for early_bytes in (0, gradient_bytes)
    )
    assert [t[1] for t in told if t[0] == "run"][-1] == 2


def test_more_ranks_than_this_machine_can_start_are_refused(request_: Request) -> None:
    plan = Plan(uses=(use("ddp"),), ranks=4096)
    with pytest.raises(UserError, match="with 4096 ranks cannot run on this machine; allowed: at most"):
        run_plan(request_, plan, seed=0, steps=1, capped=False, progress=lambda *told: None)


def test_an_impossible_cap_is_refused_before_anything_runs(
    request_: Request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        OperatorTimer,
        "measure",
        lambda *a: Calibration(flops_s={"float32": 1e9}, bandwidth_bytes_s=1e9),
    )
    monkeypatch.setattr(single_run, "run_ranks", lambda *a, **k: pytest.fail("something ran"))
    store = Store(tmp_path / "store.sqlite3")
    with pytest.raises(NothingFits):
        poc(
            dataclasses.replace(request_, cap_bytes=MIB),
            store=store,
            seeds=1,
            steps=1,
            report_path=None,
            lang="en",
            command="",
            progress=quiet,
        )
    assert store.records() == ()


# --- what follows from runs


def ran(times_s: tuple[float, ...]) -> Run:
    spec = RunSpec(name="x", role="run", job=JobRef(spec="x"), plan=Plan(), seed=0, steps=1)
    return Run(
        spec=spec,
        predicted_peak_bytes=None,
        predicted_phase_peak_bytes={},
        predicted_step_s=None,
        measurement=Measurement(outcome=OutcomeKind.OK, step_s=times_s),
    )


def test_step_times_are_compared_pair_by_pair() -> None:
    plain = [ran((9.0, 9.0, 1.0)), ran((9.0, 9.0, 2.0)), ran((9.0, 9.0, 4.0))]
    chosen = [ran((9.0, 9.0, 2.0)), ran((9.0, 9.0, 3.0)), ran((9.0, 9.0, 4.0))]
    assert proof_of_concept._paired_ratio(plain, chosen) == 1.5  # of 2, 1.5 and 1
    assert proof_of_concept._paired_ratio(plain[:1], [ran(())]) is None


def test_plain_training_may_be_the_recommendation(whole: Whole, request_: Request, tmp_path: Path) -> None:
    found = whole[0]
    _, predictor = make_predictor(request_)
    result = dataclasses.replace(found.search, recommended=found.search.baseline)
    finished = Planning(
        request=request_, job=predictor.job, predictor=predictor, cap_bytes=1, cap_reason="", result=result
    )
    poc_runner = proof_of_concept._PocRunner(finished, Store(tmp_path / "s.sqlite3"), 1, 4, "", quiet)
    judged = list(poc_runner._verdicts([], [], []))
    assert [(v.name, v.verdict.test, v.verdict.kind) for v in judged] == [
        ("recommended", "identity", VerdictKind.EQUIVALENT)
    ]
    whole_runs = {r.spec.role: r for r in found.runs if r.measurement.outcome is OutcomeKind.OK}
    base, ablation = whole_runs[BASELINE], whole_runs[ABLATION]
    poc_runner.steps = base.spec.steps
    short = dataclasses.replace(ablation, spec=dataclasses.replace(ablation.spec, steps=1))
    judged = list(poc_runner._verdicts([base], [base], [base, ablation, short]))
    assert [v.name for v in judged] == ["recommended", ablation.spec.name], "a shortened run is not judged"
    names = [s.name for s in poc_runner.specs()]
    assert names[:4] == ["baseline", "baseline", "recommended", "recommended again"]
    assert list(poc_runner._interactions([])) == []


def test_a_proof_of_concept_runs_a_plan_with_checkpointing_whatever_it_recommends(whole: Whole) -> None:
    """Nothing of bf16 is allowed here by the accuracy that was asked for."""
    plans = [r.spec.plan for r in whole[0].runs if r.measurement.outcome is OutcomeKind.OK]
    assert any(plan.get("activation-checkpointing") for plan in plans)


def test_runs_on_which_no_verdict_rests_have_fewer_steps_if_they_take_long(
    whole: Whole, request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ablations show memory and step time, the repeated run shows equal losses; runs that are judged keep all
    their steps."""
    _, predictor = make_predictor(request_)
    finished = Planning(
        request=request_,
        job=predictor.job,
        predictor=predictor,
        cap_bytes=1,
        cap_reason="",
        result=whole[0].search,
    )
    estimate = whole[0].search.baseline.estimate
    seconds = {"others": 1.0}
    runner = proof_of_concept._PocRunner(finished, Store(tmp_path / "s.sqlite3"), 1, 40, "", quiet)
    monkeypatch.setattr(
        type(predictor),
        "whole",
        lambda self, plan: dataclasses.replace(
            estimate, step_s=interval_around(seconds.get(plan.label, seconds["others"]), 0.1)
        ),
    )
    specs = [
        spec if spec.name == REPEATED else dataclasses.replace(spec, name=f"{spec.name} {index}")
        for index, spec in enumerate(runner.specs())
    ]
    ablations = [spec for spec in specs if spec.role == ABLATION]
    assert len(ablations) > 1
    share_s = 25.0 / len(ablations)

    def shortened(others: float, **told: float) -> dict[str, int]:
        seconds.clear()
        seconds.update({"others": others, **told})
        short = runner.shorten(specs)
        assert [s.name for s in short] == [s.name for s in specs]
        assert all(s.evaluate == (s.steps == 40) for s in short)
        assert {s.steps for s in short if s.role != ABLATION and s.name != REPEATED} == {40}
        assert [s.steps for s in short if s.name == REPEATED] == [min(40, max(5, int(25.0 / others)))]
        return {s.plan.label: s.steps for s in short if s.role == ABLATION}

    assert set(shortened(share_s / 41).values()) == {40}
    assert set(shortened(share_s / 10.5).values()) <= {10, 11}
    assert set(shortened(100.0).values()) == {5}, "the fewest that show a step's time"
    slow = ablations[0].plan.label
    one_slow = shortened(share_s / 80, **{slow: share_s * 0.099})
    left = (len(ablations) + 1) / 2  # shares, as the others take half of theirs
    assert one_slow.pop(slow) == int(left / 0.099)
    assert set(one_slow.values()) == {40}
