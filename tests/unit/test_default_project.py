"""The money without a case file: a typical project, the reader's currency and place, estimated hours."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from report_fixture import full_poc

from memfit import catalog
from memfit.catalog import tables
from memfit.cli.app import main
from memfit.decision import case as cases
from memfit.decision import money
from memfit.decision.decide import decide
from memfit.decision.projects import default_case, estimated_hours, project_of
from memfit.jobs.registry import describe
from memfit.report.case import case_offers
from memfit.report.decision import decision_view
from memfit.store import Store
from memfit.types.decision import Decision
from memfit.types.result import Interval, Offer, Poc
from memfit.types.units import GIB


def folding() -> Poc:
    return dataclasses.replace(full_poc(), job_name="alphafold2", offers=case_offers("alphafold2"))


def by_default(poc: Poc, lang: str = "en") -> Decision:
    return decide(poc, default_case(poc, lang), by_default=True)


def offer(machine: str, *, plain: bool, step_s: float = 1.0) -> Offer:
    return Offer(
        machine=machine,
        size="tiny",
        plan="plain training" if plain else "checkpointing",
        plain=plain,
        fits=True,
        memory_bytes=Interval(value=GIB, low=GIB, high=GIB),
        step_s=Interval(value=step_s, low=step_s, high=step_s),
        power_w=300.0,
    )


def term(decision: Decision, name: str) -> Any:
    return next(t for t in decision.numbers if t.name == name)


def test_each_project_is_a_built_in_job_at_one_of_its_sizes_and_sourced() -> None:
    sizes = {b.name: b.sizes for b in describe()}
    for name, row in tables.table("projects.toml")["projects"].items():
        assert row["size"] in sizes[name]
        project = project_of(name, row["size"])
        assert project is not None
        assert set(project.work) == {"steps_per_run", "runs_per_year", "years"}
        assert all(fact.source and fact.date for fact in project.work.values())
    assert project_of("alphafold2", "tiny") is None, "a project is of one size"
    assert project_of("my_train.py:job", "paper") is None


def test_alphafold_has_the_samples_of_its_publication_and_cards_that_hold_fine_tuning() -> None:
    decision = by_default(folding())
    assert decision.project == "alphafold2"
    assert decision.steps_per_run == 10_000_000 + 1_500_000
    assert "Jumper" in term(decision, "steps_per_run").source
    assert decision.best is not None
    best = decision.ways[decision.best]
    assert catalog.device(best.machine).memory_bytes.value > 50 * GIB
    cost = decision.sheets[decision.best].present_cost
    assert cost is not None
    assert cost > 5_000, "a sum that moves a manager"


def phased(initial_s: float, finetune_s: float, *, machine: str, finetune_fits: bool = True) -> list[Offer]:
    """Return predictions of the recommended plan for both trainings, of 10 and 30 GiB, at 100 and 200 W."""
    made = []
    for size, step_s, gib, watts, fits in (
        ("initial", initial_s, 10, 100.0, True),
        ("finetune", finetune_s, 30, 200.0, finetune_fits),
    ):
        memory = Interval(value=gib * GIB, low=gib * GIB, high=gib * GIB)
        one = dataclasses.replace(offer(machine, plain=False, step_s=step_s), size=size, fits=fits)
        made.append(dataclasses.replace(one, memory_bytes=memory, power_w=watts))
    return made


def test_a_run_of_two_phases_takes_the_time_of_both_and_the_memory_of_the_larger() -> None:
    project = project_of("alphafold2", "initial")
    assert project is not None
    offers = phased(2.0, 8.0, machine="H100-SXM")
    (run,) = project.whole_runs(offers)
    assert run.step_s is not None
    assert run.step_s.value == pytest.approx((10 * 2 + 1.5 * 8) / 11.5)
    assert run.memory_bytes.value == 30 * GIB
    assert run.power_w == pytest.approx((20 * 100 + 12 * 200) / 32)
    ratios = project.time_ratios(offers, "H100-SXM", plain=False)
    assert ratios == pytest.approx({"initial": 20 / 32, "finetune": 12 / 32})


def test_a_card_that_a_phase_does_not_fit_is_left_out() -> None:
    project = project_of("alphafold2", "initial")
    assert project is not None
    offers = [
        *phased(2.0, 8.0, machine="H100-SXM"),
        *phased(3.0, 9.0, machine="RTX-4090", finetune_fits=False),
    ]
    assert [o.machine for o in project.whole_runs(offers)] == ["H100-SXM"]


def test_a_phase_that_was_not_predicted_on_a_machine_counts_by_its_ratio_on_others() -> None:
    project = project_of("alphafold2", "initial")
    assert project is not None
    known = phased(2.0, 8.0, machine="H100-SXM")
    large, small = (phased(3.0, 0.0, machine=name)[0] for name in ("A100-80GB-SXM", "RTX-4090"))
    runs = {o.machine: o for o in project.whole_runs([*known, large, small])}
    assert runs.keys() == {"H100-SXM", "A100-80GB-SXM"}, "the other has less than 30 GiB"
    step_s = runs["A100-80GB-SXM"].step_s
    assert step_s is not None
    assert step_s.value == pytest.approx((10 * 3 + 1.5 * 12) / 11.5)


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_the_money_names_both_trainings(lang: str) -> None:
    decision = by_default(folding(), lang)
    sentences = decision_view(folding(), decision).questions["money"]
    phases = next(s for s in sentences if s.key == "project_phases.alphafold2")
    parts = [phases.values[f"{size}_cost"].value for size in ("initial", "finetune")]
    assert decision.best is not None
    assert sum(parts) == pytest.approx(decision.sheets[decision.best].present_cost)
    assert all(part > 0 for part in parts)


def test_japanese_asks_for_yen_and_the_tariffs_of_japan() -> None:
    decision = by_default(folding(), "ja")
    assert (decision.currency, decision.place) == ("JPY", "japan")
    assert term(decision, "energy_per_kwh").value == pytest.approx(17.48)
    assert term(decision, "basic_per_kw_month").value > 0
    english = by_default(folding(), "en")
    assert (english.currency, english.place) == ("USD", "world")


def test_a_place_that_the_user_named_stays() -> None:
    decision = by_default(dataclasses.replace(folding(), place="germany"), "ja")
    assert (decision.currency, decision.place) == ("JPY", "germany")


def test_hours_of_labour_are_estimated_from_what_was_counted() -> None:
    effort = dataclasses.replace(
        full_poc().effort, commands=2, changed_lines=30, packages=4, failed_attempts=1, attended_minutes=None
    )
    figure = estimated_hours(effort)
    assert figure.value == pytest.approx(8 + 2 * 0.25 + 30 * 0.1 + 4 * 0.1 + 1)
    assert figure.bounds[0] < figure.value < figure.bounds[1]
    assert "2 commands, 30 lines, 4 packages, 1 failed" in figure.source
    counted = dataclasses.replace(folding(), effort=dataclasses.replace(effort, attended_minutes=90.0))
    hours = term(by_default(counted), "setup_hours")
    assert (hours.value, hours.mark) == (1.5, "measured"), "minutes that a person counted are not estimated"
    hours = term(by_default(dataclasses.replace(folding(), effort=effort)), "setup_hours")
    assert (hours.value, hours.mark) == (pytest.approx(figure.value), "assumed")


def test_a_case_file_is_not_mixed_with_the_project() -> None:
    decision = decide(folding(), cases.DecisionCase(), name="case.toml")
    assert (decision.project, decision.by_default) == ("", False)
    assert decision.steps_per_run == 10_000
    assert term(decision, "labour_per_hour").value is None


SAID = {"en": ("USD", "as published"), "ja": ("JPY", "論文どおり", "日本")}


@pytest.mark.parametrize("lang", SAID)
def test_the_first_screen_says_what_the_money_is_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lang: str
) -> None:
    poc, store = folding(), tmp_path / "s.sqlite3"
    for kind in ("begin", "poc"):
        Store(store).append(poc.poc_id, kind, poc)
    assert main(["decide", "--lang", lang, "--store", str(store)]) == 0
    screen = capsys.readouterr().out
    assert all(word in screen for word in SAID[lang])
    assert main(["decide", "--json", "--lang", lang, "--store", str(store)]) == 0
    assert json.loads(capsys.readouterr().out)["decision"]["project"] == "alphafold2"


@pytest.mark.parametrize("device", catalog.device_names())
def test_each_device_with_a_count_is_a_machine_of_a_case(device: str) -> None:
    poc = dataclasses.replace(full_poc(), offers=tuple(offer(device, plain=p) for p in (True, False)))
    name = f"4x{device}"
    case = cases.DecisionCase.model_validate({"existing": {"machine": name}})
    found = decide(poc, case, name="case.toml")
    way = next(w for w in found.ways if w.kind == "existing" and w.plain)
    assert (way.machine, way.parallel_count) == (name, 4)


def test_four_devices_do_four_times_the_runs_of_one() -> None:
    device = "V100-16GB-SXM2"
    poc = dataclasses.replace(full_poc(), offers=tuple(offer(device, plain=p) for p in (True, False)))
    sheets = {}
    for name in (device, f"4x{device}"):
        cloud = {"machine": name, "setup_hours": 0, "operating_hours_per_year": 0}
        case = cases.DecisionCase.model_validate({"cloud": cloud, "work": {"runs_per_year": 12}})
        found = decide(poc, case, name="case.toml")
        index = next(
            i for i, w in enumerate(found.ways) if w.kind == "cloud" and w.plain and not w.of_catalog
        )
        sheets[name] = found.sheets[index]
        assert found.ways[index].hours == pytest.approx(10_000 / 3600), "a run takes as long"
    one, four = sheets.values()
    assert four.hours_per_year == pytest.approx(one.hours_per_year / 4)
    assert four.present_cost == pytest.approx(one.present_cost)
    lonely = dataclasses.replace(found.terms, runs_per_year=1)
    assert money.sheet(found.ways[index], lonely).hours_per_year == pytest.approx(10_000 / 3600)
