"""The closed loop: measured runs correct the predicted step times of other plans."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_fixture import BF16, BOTH, CHECKPOINTED, PLAIN, RECOMMENDED, full_poc
from rich.console import Console

from memfit import catalog
from memfit.cli.app import main
from memfit.cost.step_time_calibration import LEAST_SPREAD, correct_calibration, factor
from memfit.planner.request import Request
from memfit.report import terminal
from memfit.runtime import local_machine
from memfit.store import Store
from memfit.store.environment import fingerprint
from memfit.techniques.registry import TECHNIQUES
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.machine import Calibration
from memfit.types.plan import Plan, use
from memfit.types.result import Trial
from memfit.workflows import proof_of_concept

OFFLOADED = Plan(uses=(use("activation-offload"),))
ALL = (PLAIN, CHECKPOINTED, BF16, BOTH, RECOMMENDED)


def test_without_runs_the_calibration_is_unchanged() -> None:
    assert correct_calibration(Calibration(), [], source="x") == Calibration()
    assert factor(Calibration(), BOTH) == 1.0


@given(ratio=st.floats(0.2, 5))
def test_runs_that_are_all_off_by_one_ratio_correct_every_plan_by_that_ratio(ratio: float) -> None:
    found = correct_calibration(Calibration(), [(plan, ratio) for plan in ALL], source="x")
    assert [factor(found, plan) for plan in (*ALL, OFFLOADED)] == pytest.approx(6 * [ratio])
    assert found.step_spread_ratio == LEAST_SPREAD
    assert found.corrected_count == len(ALL)


@given(base=st.floats(0.5, 2), slow=st.floats(1.05, 2))
def test_a_technique_that_is_always_slower_gets_a_factor_above_one(base: float, slow: float) -> None:
    """The ridge penalty shrinks the factor towards one, but it stays above one and lowers the error."""
    seen = [(plan, base * (slow if plan.get("activation-checkpointing") else 1.0)) for plan in ALL]
    found = correct_calibration(Calibration(), seen, source="x")
    assert 1 < found.technique_ratio["activation-checkpointing"] < slow * 1.001
    errors = [abs(factor(found, plan) / ratio - 1) for plan, ratio in seen]
    flat = correct_calibration(Calibration(), [(PLAIN, r) for _, r in seen], source="x")
    assert sum(errors) < sum(abs(factor(flat, plan) / ratio - 1) for plan, ratio in seen)


def test_runs_of_two_plans_give_no_spread_for_the_interval() -> None:
    assert (
        correct_calibration(Calibration(), [(PLAIN, 1.1), (BF16, 1.2)], source="x").step_spread_ratio is None
    )


def test_a_run_that_the_others_do_not_predict_widens_the_interval() -> None:
    seen = [(PLAIN, 1.0), (CHECKPOINTED, 1.0), (BF16, 1.0), (OFFLOADED, 2.0)]
    found = correct_calibration(Calibration(), seen, source="x")
    assert found.step_spread_ratio == pytest.approx(0.5)  # the others predict half of its time


def stored(folder: Path, **changes: str) -> Store:
    poc = dataclasses.replace(full_poc(), environment={**fingerprint(), **changes})
    store = Store(folder / "s")
    for kind in ("begin", "poc"):
        store.append(poc.poc_id, kind, poc)
    return store


def asked(spec: str) -> Request:
    return Request(job_ref=JobRef(spec=spec), machine=local_machine.this_machine("world", "cpu"))


def test_a_proof_of_concept_corrects_only_its_own_job_in_its_own_environment(tmp_path: Path) -> None:
    store, poc = stored(tmp_path), full_poc()
    spec = poc.runs[0].spec.job.spec
    found = proof_of_concept.correct_step_times(asked(spec), store, None).correction
    assert found.corrected_by == poc.poc_id
    assert found.corrected_count >= 3
    with pytest.raises(UserError, match="another job or machine"):
        proof_of_concept.correct_step_times(asked("weather"), store, None)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"different environment: torch 1\.0"):
        proof_of_concept.correct_step_times(asked(spec), stored(tmp_path / "other", torch="1.0"), None)
    gpu = dataclasses.replace(catalog.machine("H100-SXM"), is_here=True)
    on_gpu = dataclasses.replace(asked(spec), machine=gpu)
    with pytest.raises(UserError, match=r"different environment: device cpu then, cuda now"):
        proof_of_concept.correct_step_times(on_gpu, store, None)


def test_a_proof_of_concept_corrects_by_as_much_as_its_trials_did(tmp_path: Path) -> None:
    poc = full_poc()
    plans = dict.fromkeys(r.spec.plan for r in poc.runs)
    trials = tuple(Trial(plan=p, predicted_s=1.0, step_s=(3.0, 2.0)) for p in plans)
    poc = dataclasses.replace(poc, search=dataclasses.replace(poc.search, trials=trials))
    store = Store(tmp_path / "s")
    for kind in ("begin", "poc"):
        store.append(poc.poc_id, kind, dataclasses.replace(poc, environment=fingerprint()))
    (tmp_path / "plain").mkdir()
    request = asked(poc.runs[0].spec.job.spec)
    stores = (stored(tmp_path / "plain"), store)
    corrections = [proof_of_concept.correct_step_times(request, s, None).correction for s in stores]
    without_trials, with_trials = (factor(c, poc.runs[0].spec.plan) for c in corrections)
    assert with_trials == pytest.approx(2 * without_trials, rel=0.05)


def test_a_corrected_plan_uses_the_measured_spread_and_is_refused_for_another_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("from tiny import words\njob = words()\n")
    store, poc = Store(tmp_path / "s"), full_poc()
    runs = tuple(
        dataclasses.replace(r, spec=dataclasses.replace(r.spec, job=JobRef(spec=f"{mine}:job")))
        for r in poc.runs
    )
    poc = dataclasses.replace(poc, runs=runs, environment=dict(fingerprint()))
    for kind in ("begin", "poc"):
        store.append(poc.poc_id, kind, poc)
    arguments = ["plan", f"{mine}:job", "--store", str(store.path), "--corrected-by", "last"]
    arguments += ["--memory", "64MiB", "--on", "this:cpu"]
    # The plan that is looked at is the plain one: a short search will do.
    arguments += [a for t in TECHNIQUES if t != "activation-checkpointing" for a in ("--without", t)]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    step = told["baseline"]["estimate"]["step_s"]
    spread = told["correction"]["step_spread_ratio"]
    assert step["high"] / step["value"] == pytest.approx(1 + spread)
    assert main([*arguments, "--on", "H100-SXM"]) == 2
    assert "another job or machine" in capsys.readouterr().err


def test_the_terminal_reports_the_correction() -> None:
    out = io.StringIO()
    found = correct_calibration(Calibration(), [(plan, 1.25) for plan in ALL], source="some-poc")
    console = Console(file=out, width=300)
    terminal.print_search(full_poc().search, console=console, lang="en", correction=found)
    assert "Step times are corrected with 5 plans that PoC some-poc measured here (1.25×" in out.getvalue()
    assert "±5.00 %" in out.getvalue()
