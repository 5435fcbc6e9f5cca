"""Assay sensitivity: surrogate endpoints, negative controls, power studies, the verdict "not sensitive"."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from report_fixture import full_poc
from rich.console import Console
from tiny import Q3
from torch.nn import functional

from memfit.decision import rollout_gates
from memfit.engines.registry import render
from memfit.jobs.registry import load
from memfit.jobs.training_step import TrainingStep
from memfit.planner.request import Planning, Request, make_predictor
from memfit.report.html import write_html
from memfit.report.terminal import print_poc
from memfit.runtime import local_machine
from memfit.runtime.child_process import run as run_child
from memfit.store import Store, exchange
from memfit.types import serialization
from memfit.types.errors import UserError
from memfit.types.job import Job, JobRef, Metric
from memfit.types.launch import RunSpec
from memfit.types.plan import EffectClass, Plan, use
from memfit.types.result import (
    ControlResult,
    EndpointDifference,
    Measurement,
    OutcomeKind,
    Poc,
    PowerStudy,
    Run,
    Verdict,
    VerdictKind,
)
from memfit.verify import sensitivity, verdict
from memfit.verify.sensitivity import judge_pair, judge_study, power_study, with_control
from memfit.worker.degraded_training import change_last_bits, degrade, round_weights, scores_by_endpoint
from memfit.workflows import proof_of_concept

pytestmark = pytest.mark.usefixtures("forked_workers")
LOSS = dataclasses.replace(Q3, name="held-out loss", unit="nats", higher_is_better=False, margin=0.1)
ENDPOINTS = (Q3, LOSS)


def make_run(seed: int, score: float, loss: float, *, degraded: str = "", **measured: Any) -> Run:
    spec = RunSpec(
        name="run",
        role="run",
        job=JobRef(spec="protein-ss"),
        plan=Plan(),
        seed=seed,
        steps=3,
        degraded=degraded,
    )
    defaults: dict[str, Any] = {
        "outcome": OutcomeKind.OK,
        "losses": (2.0, 1.5, 1.0),
        "metric": score,
        "surrogates": {"held-out loss": loss},
    }
    return Run(
        spec=spec,
        predicted_peak_bytes=None,
        predicted_phase_peak_bytes={},
        predicted_step_s=None,
        measurement=Measurement(**defaults | measured),
    )


PLAIN = [make_run(seed, 70.0 + seed, 0.5) for seed in range(3)]


def judge(score_differences: Sequence[float], loss_differences: Sequence[float]) -> Verdict:
    others = [
        make_run(seed, 70.0 + seed + score, 0.5 + loss)
        for seed, (score, loss) in enumerate(zip(score_differences, loss_differences, strict=True))
    ]
    return verdict(PLAIN, others, effect=EffectClass.E2, metric=Q3, surrogates=(LOSS,))


INSIDE = judge([0.1, 0.0, -0.1], [0.01, 0.0, -0.01])


# -- surrogates -----------------------------------------------------------------------------------------


def test_a_plan_is_equivalent_only_if_it_is_in_every_endpoint() -> None:
    assert INSIDE.kind is VerdictKind.EQUIVALENT
    assert [(s.name, s.kind) for s in INSIDE.surrogates] == [("held-out loss", VerdictKind.EQUIVALENT)]
    worse = judge([0.1, 0.0, -0.1], [0.3, 0.31, 0.29])
    assert (worse.kind, worse.cause and worse.cause.kind) == (VerdictKind.DIFFERENT, "surrogate_different")
    assert "held-out loss differs by +0.3 nats" in worse.reason
    open_ = judge([0.1, 0.0, -0.1], [0.3, 0.0, -0.3])
    assert (open_.kind, open_.cause and open_.cause.detail) == (VerdictKind.UNDECIDED, "held-out loss")


def test_a_surrogate_that_differs_decides_also_where_the_metric_does_not() -> None:
    assert judge([3.0, 0.0, -3.0], [0.3, 0.31, 0.29]).kind is VerdictKind.DIFFERENT
    assert judge([5.0, 5.1, 4.9], [0.0, 0.01, -0.01]).kind is VerdictKind.DIFFERENT


def test_a_surrogate_that_is_missing_leaves_the_verdict_undecided() -> None:
    others = [make_run(seed, 70.0 + seed, 0.5, surrogates={}) for seed in range(3)]
    judged = verdict(PLAIN, others, effect=EffectClass.E2, metric=Q3, surrogates=(LOSS,))
    assert (judged.kind, judged.reason) == (VerdictKind.UNDECIDED, "a run has no finite held-out loss")


# -- negative controls ----------------------------------------------------------------------------------


def pair_result(score: float, loss: float, **measured: Any) -> ControlResult:
    control = make_run(0, 70.0 + score, 0.5 + loss, degraded="half-steps", **measured)
    return judge_pair(PLAIN[0], control, ENDPOINTS, INSIDE)


@pytest.mark.parametrize(
    ("score", "loss", "noticed"),
    [
        (-6.0, 0.0, True),
        (0.0, 0.5, True),  # only the surrogate notices
        (-1.0, 0.05, False),
        (-2.1, 0.0, False),  # beyond the margin, but not by the width of the interval
        (-2.3, 0.0, True),
    ],
)
def test_a_control_is_noticed_if_an_interval_as_wide_as_the_tests_lies_beyond_the_margin(
    score: float, loss: float, noticed: bool
) -> None:
    assert INSIDE.high is not None
    assert INSIDE.high == pytest.approx(0.169, abs=0.001), "half the width of the interval"
    result = pair_result(score, loss)
    assert (result.noticed, result.source, result.pairs, result.control) == (noticed, "pair", 1, "half-steps")


def test_an_equivalence_that_the_control_shares_is_not_sensitive() -> None:
    missed, noticed = pair_result(-1.0, 0.0), pair_result(-6.0, 0.0)
    judged = with_control(INSIDE, missed)
    assert (judged.kind, judged.control) == (VerdictKind.NOT_SENSITIVE, missed)
    assert judged.reason.endswith("but the test would not have noticed half-steps")
    assert with_control(INSIDE, noticed) == dataclasses.replace(INSIDE, control=noticed)


def test_other_verdicts_do_not_depend_on_the_control() -> None:
    missed = pair_result(-1.0, 0.0)
    for other in (judge([5.0, 5.1, 4.9], [0.0, 0.0, 0.0]), judge([3.0, 0.0, -3.0], [0.0, 0.0, 0.0])):
        assert with_control(other, missed).kind is other.kind
    bitwise = Verdict(kind=VerdictKind.EQUIVALENT, effect=EffectClass.E0, test="bits", reason="")
    assert with_control(bitwise, missed) is bitwise, "equal bits need no control"
    assert with_control(INSIDE, None) is INSIDE


def test_a_control_that_did_not_run_shows_no_sensitivity() -> None:
    failed = pair_result(0.0, 0.0, outcome=OutcomeKind.OOM, reason="out of memory")
    assert (failed.noticed, failed.problem) == (False, "its run ended oom: out of memory")
    assert with_control(INSIDE, failed).kind is VerdictKind.NOT_SENSITIVE


# -- power studies --------------------------------------------------------------------------------------


def endpoint(difference: float, half_width: float, metric: Metric = Q3) -> EndpointDifference:
    low, high = difference - half_width, difference + half_width
    kind = sensitivity.interval_kind(low, high, margin=metric.margin)
    return EndpointDifference(
        name=metric.name,
        unit=metric.unit,
        margin=metric.margin,
        difference=difference,
        low=low,
        high=high,
        kind=kind,
    )


STUDY = PowerStudy(
    job="protein-ss",
    size="tiny",
    steps=40,
    batch_size=8,
    negative_control="half-steps",
    seeds=(0, 1, 2, 3),
    control=(endpoint(-6.0, 1.0),),
    repetition=(endpoint(0.1, 0.2),),
    date="2026-11-29",
)


@pytest.mark.parametrize(("half_width", "noticed"), [(1.0, True), (3.9, True), (4.5, False)])
def test_a_study_shows_sensitivity_only_if_its_control_was_judged_different(
    half_width: float, noticed: bool
) -> None:
    study = dataclasses.replace(STUDY, control=(endpoint(-6.0, half_width),))
    result = judge_study(study)
    assert (result.noticed, result.source, result.pairs) == (noticed, "study", 4)


def stub_job(**fields: Any) -> Job:
    defaults: dict[str, Any] = {"name": "protein-ss", "size": "tiny", "batch_size": 8, "metric": Q3}
    functions = dict.fromkeys(("build_model", "make_batch", "loss"), lambda *a: None)
    return Job(**functions | defaults | fields)


def test_a_study_holds_only_for_the_job_that_it_studied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "power_studies", lambda: (STUDY,))
    spec = RunSpec(
        name="b", role="b", job=JobRef(spec="protein-ss"), plan=Plan(), seed=0, steps=40, batch_size=8
    )
    assert power_study(stub_job(), spec) is STUDY
    assert power_study(stub_job(), dataclasses.replace(spec, steps=10)) is None
    assert power_study(stub_job(), dataclasses.replace(spec, batch_size=4)) is None
    assert power_study(stub_job(negative_control="tenth-learning-rate"), spec) is None
    assert power_study(stub_job(metric=dataclasses.replace(Q3, margin=1.0)), spec) is None
    assert power_study(stub_job(surrogates=(LOSS,)), spec) is None
    own_data = dataclasses.replace(spec, job=JobRef(spec="protein-ss", data="mine.txt"))
    assert power_study(stub_job(), own_data) is None


def test_every_stored_study_is_of_a_built_in_job_as_it_is() -> None:
    for study in sensitivity.power_studies():
        job = load(JobRef(spec=study.job))
        spec = RunSpec(
            name="b",
            role="b",
            job=JobRef(spec=study.job),
            plan=Plan(),
            seed=0,
            steps=job.steps,
            batch_size=job.batch_size,
        )
        if study.job != "alphafold2":
            assert power_study(job, spec) == study, f"{study.job} has changed since its power study"


# -- the job's fields -----------------------------------------------------------------------------------


def test_an_unknown_control_and_surrogates_without_a_metric_are_refused() -> None:
    with pytest.raises(UserError, match=r"half-step.*did you mean 'half-steps'"):
        stub_job(negative_control="half-step")
    for fields in ({"metric": None, "surrogates": (LOSS,)}, {"surrogates": (Q3,)}):
        with pytest.raises(UserError, match="each with another name"):
            stub_job(**fields)


def test_evaluate_returns_a_number_or_every_endpoint() -> None:
    assert scores_by_endpoint(stub_job(), torch.tensor(3.0)) == {"Q3": 3.0}
    both = stub_job(surrogates=(LOSS,))
    scores = {"held-out loss": 0.5, "more": 1.0, "Q3": 70.0}
    assert list(scores_by_endpoint(both, scores).items()) == [("Q3", 70.0), ("held-out loss", 0.5)]
    with pytest.raises(UserError, match="but not held-out loss"):
        scores_by_endpoint(both, 70.0)
    with pytest.raises(UserError, match="returned acc, but the job has no metric"):
        scores_by_endpoint(dataclasses.replace(stub_job(), metric=None), {"acc": 70.0})


@pytest.mark.parametrize("scores", ["high", torch.ones(2), {"Q3": None}])
def test_a_score_that_is_not_a_number_is_refused(scores: Any) -> None:
    with pytest.raises(UserError, match="as Q3, which is not a number"):
        scores_by_endpoint(stub_job(), scores)


# -- degraded trainings ---------------------------------------------------------------------------------


def tiny_job(**fields: Any) -> Job:
    def batch(step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * seed + step))
        return x, x[:, :1]

    return stub_job(
        build_model=lambda: torch.nn.Linear(4, 1),
        make_batch=batch,
        loss=lambda model, both: functional.mse_loss(model(both[0]), both[1]),
        **fields,
    )


def test_rounded_weights_take_255_values() -> None:
    model = torch.nn.Linear(64, 64)
    before = model.weight.detach().clone()
    round_weights(model)
    after, spacing = model.weight.detach(), float(before.abs().max()) / 127
    assert len(after.unique()) <= 255
    assert float((after - before).abs().max()) <= spacing / 2 * 1.001
    assert torch.allclose(after / spacing, (after / spacing).round(), atol=1e-3)


def test_the_last_bits_change_the_same_way_in_every_run_and_leave_the_random_numbers() -> None:
    models = [torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)]
    models[1].load_state_dict(models[0].state_dict())
    before = models[0].weight.detach().clone()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    for model in models:
        change_last_bits(model)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(models[0].weight, models[1].weight)
    assert not torch.equal(models[0].weight, before)
    assert torch.allclose(models[0].weight, before, rtol=2e-7, atol=0)


def test_a_tenth_of_the_learning_rate_takes_a_tenth_of_the_first_step() -> None:
    changes = []
    for control in ("", "tenth-learning-rate"):
        torch.manual_seed(0)
        job = tiny_job()
        step = TrainingStep(job, Plan())
        before = step.model.weight.detach().clone()
        after_step = degrade(step, control)
        step.run(job.make_batch(0, 0))
        after_step()
        changes.append((step.model.weight.detach() - before).abs().mean())
    assert float(changes[1] / changes[0]) == pytest.approx(0.1, rel=1e-3)


# -- whole ----------------------------------------------------------------------------------------------

OWN = """
import torch
from torch.nn import functional
from memfit.types.job import Job, Metric, OptimizerChoice

def batch(step, seed):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1000 * seed + step))
    return x, x.sum(1, keepdim=True)

def scores(model):
    with torch.no_grad():
        x, y = batch(10**6, 0)
        error = float(functional.mse_loss(model(x), y))
        return {"error": error, "log error": float(torch.tensor(error).log())}

def make(margin, control="half-steps"):
    metric = Metric(name="error", unit="", higher_is_better=False, margin=margin, margin_source="a test",
                    naive=16.0, naive_name="zero")
    other = Metric(name="log error", unit="", higher_is_better=False, margin=1e6, margin_source="a test",
                   naive=2.8, naive_name="zero")
    return Job(name="own", build_model=lambda: torch.nn.Linear(16, 1), make_batch=batch,
               batch_size=8, steps=8,
               loss=lambda model, both: functional.mse_loss(model(both[0]), both[1]), evaluate=scores,
               metric=metric, surrogates=(other,), negative_control=control,
               optimizer=OptimizerChoice(learning_rate=0.1))

fine = make(0.5)
coarse = make(1e6)
"""


def quiet(stage: str, done: int, total: int, detail: str) -> None:
    """Ignores the progress."""


def child(job: str) -> Run:
    spec = RunSpec(
        name="baseline",
        role="baseline",
        job=JobRef(spec=job),
        plan=Plan(),
        seed=0,
        steps=8,
        batch_size=8,
        threads=1,
    )
    measurement = run_child(render(spec), on_event=lambda event: None)
    return Run(
        spec=spec,
        predicted_peak_bytes=None,
        predicted_phase_peak_bytes={},
        predicted_step_s=None,
        measurement=measurement,
    )


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize(
    ("name", "kind"), [("fine", VerdictKind.EQUIVALENT), ("coarse", VerdictKind.NOT_SENSITIVE)]
)
def test_a_proof_of_concept_trains_the_control_and_says_whether_it_was_noticed(
    own: Path, name: str, kind: VerdictKind, tmp_path: Path
) -> None:
    """Plain training and the control are real; the plan's runs are those of plain training on three seeds."""
    spec = f"{own}:{name}"
    plain = child(spec)
    bf16 = dataclasses.replace(plain.spec, plan=Plan(uses=(use("bf16-autocast"),)))
    runs = []
    for seed in range(3):
        runs.append(dataclasses.replace(plain, spec=dataclasses.replace(plain.spec, seed=seed)))
        planned = dataclasses.replace(bf16, seed=seed, name="recommended", role="recommended")
        runs.append(dataclasses.replace(plain, spec=planned))
    request = Request(job_ref=JobRef(spec=spec), machine=local_machine.this_machine("world"), threads=1)
    predictor = make_predictor(request)[1]
    poc = full_poc()
    recommended = poc.search.recommended
    assert recommended is not None
    chosen = dataclasses.replace(
        recommended, estimate=dataclasses.replace(recommended.estimate, plan=bf16.plan)
    )
    planning = Planning(
        request=request,
        job=predictor.job,
        predictor=predictor,
        cap_bytes=1,
        cap_reason="",
        result=dataclasses.replace(poc.search, recommended=chosen),
    )
    store = Store(tmp_path / "s.sqlite3")
    poc_runner = proof_of_concept._PocRunner(planning, store, 3, 8, "", quiet)
    with_run = poc_runner.add_control(dataclasses.replace(poc, runs=tuple(runs)))
    assert with_run.control is not None
    assert len(with_run.control.measurement.losses) == 4, "half the steps"
    assert with_run.control.measurement.losses == plain.measurement.losses[:4]
    assert set(with_run.control.measurement.surrogates) == {"log error"}
    assert [r.kind for r in store.records(poc.poc_id)] == ["control"]
    judged = next(poc_runner._verdicts(*proof_of_concept._judged_runs(with_run.runs), runs, with_run.control))
    assert (judged.verdict.kind, judged.name) == (kind, "recommended")
    assert judged.verdict.control is not None
    assert judged.verdict.control.noticed is (kind is VerdictKind.EQUIVALENT)


# -- what readers see -----------------------------------------------------------------------------------


def poc_with(control: ControlResult) -> Poc:
    poc = full_poc()
    verdicts = tuple(
        dataclasses.replace(v, verdict=with_control(v.verdict, control)) if v.name == "recommended" else v
        for v in poc.verdicts
    )
    return dataclasses.replace(poc, verdicts=verdicts)


NOTICED = judge_study(STUDY)
MISSED = judge_study(dataclasses.replace(STUDY, control=(endpoint(-1.0, 0.5),)))


def terminal(poc: Poc, lang: str) -> str:
    out = io.StringIO()
    print_poc(poc, console=Console(file=out, width=400), lang=lang)
    return out.getvalue()


def test_the_terminal_says_what_the_test_would_have_noticed() -> None:
    noticed, missed = terminal(poc_with(NOTICED), "en"), terminal(poc_with(MISSED), "en")
    assert (
        "This test would have noticed a degraded training: half the training was judged different" in noticed
    )
    assert "not sensitive" not in noticed
    assert "This test would not have noticed half the training" in missed
    assert "not sensitive" in missed
    assert "equivalent" not in missed.split("not sensitive")[0].splitlines()[-1]


def test_the_japanese_terminal_and_pages_in_both_languages_say_so_too(tmp_path: Path) -> None:
    assert "この検定では劣化を検出できません" in terminal(poc_with(MISSED), "ja")
    assert "感度不足" in terminal(poc_with(MISSED), "ja")
    for lang, text in (("en", "not sensitive"), ("ja", "感度不足")):
        path = write_html(poc_with(MISSED), tmp_path / f"{lang}.html", lang=lang)
        assert text in path.read_text(encoding="utf-8")


def record(poc: Poc) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(exchange.text(exchange.of_poc(poc)))
    return found


def test_a_record_holds_the_control_and_an_older_one_is_read_as_before() -> None:
    old, new = record(full_poc()), record(poc_with(MISSED))
    assert not {"control", "surrogates"} & set(old["verdict"]), "the text of an older record stays the same"
    assert (new["verdict"]["kind"], new["verdict"]["control"]["noticed"]) == ("not_sensitive", False)
    assert (
        exchange.text(exchange.parse_record(json.dumps(new), what="it"))
        == json.dumps(new, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    )


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"kind": "equivalent"}, "the scores give not_sensitive"),
        ({"control": None}, "does not say that the control was missed"),
    ],
)
def test_a_record_whose_verdict_contradicts_its_control_is_refused(
    change: Mapping[str, Any], fault: str
) -> None:
    claim = record(poc_with(MISSED))
    claim["verdict"] |= change
    with pytest.raises(UserError, match=fault):
        exchange.parse_record(json.dumps(claim), what="it")
    claim = record(poc_with(MISSED))
    claim["verdict"]["kind"], claim["verdict"]["control"]["noticed"] = "equivalent", True
    with pytest.raises(UserError, match="noticed is True"):
        exchange.parse_record(json.dumps(claim), what="it")


def test_a_verdict_that_is_not_sensitive_fails_the_gate_of_accuracy() -> None:
    shared = exchange.of_poc(poc_with(MISSED))
    gates = rollout_gates.evaluate(shared, rollout_gates.Gates())
    assert [(g.name, g.found) for g in gates if not g.holds] == [("accuracy: verdict", "not_sensitive")]


def test_a_stored_verdict_of_an_older_version_is_read() -> None:
    stored = serialization.to_plain(INSIDE)
    del stored["surrogates"], stored["control"]
    read = serialization.loads(Verdict, json.dumps(stored), what="it")
    assert (read.kind, read.control, read.surrogates) == (VerdictKind.EQUIVALENT, None, ())
