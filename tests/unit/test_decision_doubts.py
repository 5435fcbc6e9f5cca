"""Mistakes that sceptical readers of a decision would find: phrases that contradict the answer, upper bounds
that can be exceeded, a way back to a plan that does not fit, a stop criterion that cannot trigger, or a
machine of unknown power that costs nothing."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import pytest
from report_fixture import RECOMMENDED, full_poc, offers

from memfit import catalog
from memfit.catalog import prices
from memfit.decision import money
from memfit.decision.case import DecisionCase, case_template, parse_case
from memfit.decision.decide import decide
from memfit.decision.rollout_gates import Gates, TimeLimits
from memfit.report.decision import decision_view
from memfit.report.decision_rows import DecisionView, way_name
from memfit.report.html import render_html
from memfit.report.quantities import figure_text, sentence_text
from memfit.report.words import LANGUAGES, load_words
from memfit.store import Store
from memfit.techniques.registry import TECHNIQUES, technique
from memfit.types import serialization
from memfit.types.decision import Decision
from memfit.types.errors import UserError
from memfit.types.result import Interval, Poc
from memfit.types.units import GIB
from memfit.workflows import proof_of_concept

WORDS = load_words("en")
PLAIN = """
[money]
labour_per_hour = 60
[effort]
setup_hours = 20
[existing]
machine = "A100-80GB-PCIe"
setup_hours = 0
operating_hours_per_year = 0
[purchase]
setup_hours = 3
operating_hours_per_year = 0
[cloud]
setup_hours = 2
operating_hours_per_year = 0
"""
CARD = "[work]\nruns_per_year = 200\n" + PLAIN.replace("A100-80GB-PCIe", "RTX-4090").replace("= 20", "= 2")


def poc(**changed: Any) -> Poc:
    return dataclasses.replace(full_poc(), **{"offers": offers(), **changed})


def seen(text: str = "", **changed: Any) -> tuple[Decision, DecisionView]:
    record = poc(**changed)
    made = decide(record, parse_case(text, "it"))
    return made, decision_view(record, made)


def phrases(view: DecisionView, lang: str = "en") -> str:
    return "\n".join(sentence_text(p, load_words(lang)) for p in view.phrases)


def card(view: DecisionView, name: str, lang: str = "en") -> str:
    return " ".join(sentence_text(s, load_words(lang)) for s in view.questions[name])


# -- the same answer everywhere ------------------------------------------------------------------------


def test_where_plain_training_is_the_answer_no_phrase_claims_a_saving() -> None:
    made, view = seen(PLAIN)
    assert made.best is not None
    assert made.ways[made.best].plain
    assert made.saved_percent is not None
    assert made.saved_percent > 0, "the machine that there is saves, memory saving does not"
    assert "does not pay" in card(view, "money")
    first = phrases(view).splitlines()[0]
    assert first.startswith("Saving memory does not pay here: the cheapest option is plain training")
    assert " less" not in first
    assert ("more" in first) != ("times as much" in first)
    dear = PLAIN.replace("setup_hours = 20", "setup_hours = 20000")
    assert "is the labour of setting up the plan, which is paid once" in card(seen(dear)[1], "money")
    assert "which is paid once" not in card(seen(PLAIN.replace("= 20", "= 0"))[1], "money")


def test_the_first_phrase_states_the_undecided_verdict_and_the_interval() -> None:
    kinds = {n.name: n for n in full_poc().verdicts}
    named = kinds["recommended"]
    kind = type(named.verdict.kind)("undecided")
    doubtful = dataclasses.replace(named, verdict=dataclasses.replace(named.verdict, kind=kind))
    _, view = seen(CARD, verdicts=(doubtful,))
    first = phrases(view).splitlines()[0]
    assert "undecided, so this is not yet a saving at equal quality" in first
    assert "90 % interval" in first


def test_phrases_say_that_the_roll_out_stops_where_a_gate_stopped_it() -> None:
    record = poc()
    made = decide(record, parse_case(CARD, "it"), limits=Gates(time=TimeLimits(step_ratio=0.01)))
    first, second, *_ = phrases(decision_view(record, made)).splitlines()
    assert "The rollout has stopped at the gate “" in first
    assert second.startswith("We stop here for now")
    _, view = seen(CARD)
    first, second, *_ = phrases(view).splitlines()
    assert "stopped" not in first
    assert second.startswith("We start small")


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("case", ["", PLAIN, CARD])
def test_phrases_and_answers_have_no_unfilled_placeholders_in_any_language(case: str, lang: str) -> None:
    _, view = seen(case)
    for text in (phrases(view, lang), *(card(view, n, lang) for n in view.questions)):
        assert "{" not in text


# -- upper bounds, the way back and stop criteria -------------------------------------------------------


def known(figure: float | None) -> float:
    assert figure is not None
    return figure


def pilot(made: Decision) -> Any:
    return next(s for s in made.stages if s.name == "pilot")


def test_upper_bound_of_the_pilot_uses_the_upper_ends_of_time_power_and_rates() -> None:
    """By hand: 10,000 steps of 1.25 s are 3.47 h; steps may take 1.3 times as long, and power and rates their
    own upper ends; 2 hours of set-up at 60 $. A desktop stands beside a desk."""
    made, view = seen(CARD)
    stage, terms = pilot(made), {t.name: t for t in made.numbers}
    kwh = 10_000 * 1.25 / 3600 * 0.5
    end = {
        n: known(terms[n].high)
        for n in ("energy_per_kwh", "desk_pue_ratio", "recommended_time_factor", "tax_ratio")
    }
    most = kwh * end["energy_per_kwh"] * end["desk_pue_ratio"] * end["recommended_time_factor"]
    assert end["recommended_time_factor"] >= 1.3
    assert stage.most == pytest.approx(2 * 60 + most * (1 + end["tax_ratio"]))
    assert stage.most > stage.to_spend
    assert stage.unpaid == ()
    assert all(r.loss == stage.most for r in made.risks if r.kind != "security")
    assert "excluding labour" not in card(view, "risk")


@pytest.mark.parametrize("missing", ["[effort]\nsetup_hours = 2\n", "[money]\nlabour_per_hour = 60\n"])
def test_upper_bound_without_labour_says_so_and_requests_the_missing_figures(missing: str) -> None:
    made, view = seen(
        CARD.replace(missing, ""), effort=dataclasses.replace(full_poc().effort, attended_minutes=None)
    )
    assert "excluding labour, whose hours or hourly rate are missing" in card(view, "risk")
    assert {"effort.setup_hours", "money.labour_per_hour"} & {*made.asked}


def test_the_way_back_is_plain_training_on_a_machine_where_it_fits() -> None:
    made, view = seen(CARD)
    back = pilot(made).back_way
    assert back is not None
    way = made.ways[back]
    assert way.plain
    assert way.machine != "RTX-4090", "plain training does not fit that"
    assert way.machine in card(view, "risk")
    made, view = seen(PLAIN)
    assert pilot(made).back == "stay", "plain training has no other way back"
    assert "checkpoints" not in card(view, "risk")
    assert "いつでも" not in card(view, "risk", "ja")


def tight(high_gib: float) -> Mapping[str, Any]:
    span = Interval(value=0.93 * high_gib * GIB, low=0.8 * high_gib * GIB, high=high_gib * GIB)
    return {"offers": tuple(dataclasses.replace(o, memory_bytes=span) for o in offers())}


@pytest.mark.parametrize("high_gib", [20.0, 23.0, 24.7])
def test_the_pilot_stops_before_the_device_is_full(high_gib: float) -> None:
    made, _ = seen(CARD, **tight(high_gib))
    stage = pilot(made)
    way = next(w for w in made.ways if w.machine == "RTX-4090" and w.kind == "existing")
    assert way.usable_bytes is not None
    if stage.machine == "RTX-4090":
        assert stage.stop_bytes <= way.usable_bytes


def test_a_machine_that_fits_only_the_expected_memory_is_likely_and_not_proposed_for_purchase() -> None:
    made, view = seen(CARD, **tight(24.7))
    here = next(w for w in made.ways if w.machine == "RTX-4090" and w.kind == "existing")
    assert here.usable_bytes is not None
    assert 0.93 * 24.7 * GIB < here.usable_bytes < 24.7 * GIB
    low, mode, high = (x * 24.7 * GIB for x in (0.8, 0.93, 1.0))
    inside = 1 - (high - here.usable_bytes) ** 2 / ((high - low) * (high - mode))
    assert here.fit_percent == pytest.approx(100 * inside)
    assert card(view, "fits").startswith("The training probably fits RTX-4090")
    assert "Yes" not in card(view, "fits")
    assert not [w for w in made.ways if w.of_catalog and w.machine == "RTX-4090"]
    made, view = seen(CARD, **tight(23.0))
    assert card(view, "fits").startswith("Yes")


# -- unknown stays unknown -----------------------------------------------------------------------------

OWN = '[existing]\nmachine = "our own"\nhours_plain = 3\nsetup_hours = 0\noperating_hours_per_year = 0\n'


@pytest.mark.parametrize("kind", ["existing", "purchase"])
def test_a_machine_of_unknown_power_has_no_cost_and_its_power_is_requested(kind: str) -> None:
    text = OWN.replace("existing", kind) + ("price = 5000\n" if kind == "purchase" else "")
    made, view = seen(text)
    index = next(i for i, w in enumerate(made.ways) if w.machine == "our own")
    assert made.sheets[index].present_cost is None
    assert made.best != index
    assert f"{kind}.power_w" in made.asked
    row = next(w for w in view.ways if w.index == index)
    assert (row.money["present_cost"].value, row.saved.value) == (None, None)
    assert "its power draw is missing" in card(view, "money")
    made, view = seen(text, offers=())
    assert made.best is None
    assert card(view, "money") == WORDS.get("decide.money.none_priced")
    made, _ = seen(text + "power_w = 300\n")
    assert made.sheets[index].present_cost is not None


# -- set-up is paid once -------------------------------------------------------------------------------


def test_set_up_is_paid_in_only_one_stage() -> None:
    made, _ = seen(CARD)
    first, full = made.stages[1], made.stages[2]
    assert made.best is not None
    best = made.ways[made.best]
    assert (first.machine, full.machine) == (best.machine, best.machine)
    assert full.to_spend == pytest.approx(
        known(made.sheets[made.best].present_cost) - made.sheets[made.best].setup
    )
    assert best.plan_hours == 2
    assert money.sheet(best, made.terms).setup == 2 * 60


# -- prices -------------------------------------------------------------------------------------------


def test_every_machine_in_the_table_shows_its_prices_and_watts_with_source_and_date() -> None:
    made, view = seen(CARD)
    for _, index in made.slots:
        way = made.ways[index]
        rows = [r for r in view.prices if r.name == way_name(way)]
        wanted = {"existing": {"watts"}, "purchase": {"device", "server", "watts"}, "cloud": {"rent"}}
        assert {r.what for r in rows} == wanted.get(way.kind, set())
        assert all(r.value.value and r.source and r.date for r in rows)
    made, view = seen(CARD.replace("[cloud]", '[cloud]\nmachine = "H100-PCIe"\nper_hour = 2\n') + "\n")
    assert "your case" in {r.source for r in view.prices if r.what == "own_rent"}
    page = render_html(poc(), lang="en", decision=made)
    assert WORDS.get("price.heading") in page


def test_every_catalog_price_has_a_known_kind() -> None:
    for name in catalog.device_names():
        for deal in ("rent", "buy"):
            assert all(price.kind in prices.KINDS for price in prices.seller_prices(name, deal))
    assert {f"price_kind.{kind}" for kind in prices.KINDS} <= WORDS.texts.keys()


# -- what was evaluated, and the libraries of the plan --------------------------------------------------


def test_operating_load_counts_as_evaluated_only_with_known_attended_minutes() -> None:
    effort = full_poc().effort
    for minutes, whole in ((None, False), (12.0, True)):
        _, view = seen(CARD, effort=dataclasses.replace(effort, attended_minutes=minutes))
        assert ("were both evaluated" in phrases(view)) is whole
        assert ("operating load only in part" in phrases(view)) is not whole
        assert "main risk" not in phrases(view)  # the register ranks them


def test_maturity_risk_lists_the_libraries_that_the_plan_needs() -> None:
    made, _ = seen(CARD)
    found = next(r for r in made.risks if r.kind == "maturity")
    names = {n for u in RECOMMENDED.uses for n in technique(u.technique).needs}
    told = str(found.values.get("libraries", ""))
    assert all(f"{n} {catalog.package_facts(n)['release'][0]}" in told for n in names)
    label = "bf16-parameters(rounding=stochastic) + adamw-8bit"
    others = tuple(o if o.plain else dataclasses.replace(o, plan=label) for o in offers())
    made, _ = seen(CARD, offers=others)
    told = str(next(r for r in made.risks if r.kind == "maturity").values["libraries"])
    assert "torchao 0.18.0" in told
    assert "bitsandbytes 0.50.2, 2026-08-27, torch >=2.4,<3, MIT" in told


def test_every_library_that_a_technique_needs_has_facts_with_source_and_date() -> None:
    for needed in {n for t in TECHNIQUES.values() for n in t.needs} | {"torchao"}:
        facts = catalog.package_facts(needed)
        assert {"release", "licence", "status"} <= facts.keys(), needed
        assert all(source and date for _, source, date in facts.values())


# -- figures and limits that are refused ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[money]\npue_ratio = 0.5", "1 to 10"),
        ("[money]\npue_ratio = 1e9", "1 to 10"),
        ("[money]\nlabour_per_hour = 1e308", "less than or equal"),
        ("[effort]\nsetup_hours = 1e308", "less than or equal"),
        ("[work]\nruns_per_year = 1e-300", "at least 1e-09"),
        ("[existing]\nmachine = 'own'\nhours_plain = 1e308", "less than or equal"),
        ("currency = 'JPY'\n[money]\nper_usd = 1e300", "less than or equal"),
        ("currency = 'JPY'\n[money]\nper_usd = 0.0065", "the catalog's rate is 154.5"),
        ("currency = 'USD'\n[money]\nper_usd = 2", "the catalog's rate is 1"),
        ("place = 'japan'\ntariff = 'germany-business'", "not of one place"),
        ("place = 'us'\nsupplier = 'tepco-ep'", "not of one place"),
        ("[purchase]\nmachine = 'own'", "unknown device: 'own'"),
        ("[existing]\nmachine = '2x8xT4'", "names no network"),
    ],
)
def test_an_impossible_figure_is_refused_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        seen(text)
    assert said in str(error.value)


def test_a_tariff_alone_determines_the_place() -> None:
    made, _ = seen("currency = 'EUR'\ntariff = 'germany-business'")
    assert made.place == "germany"


def test_the_largest_allowed_figures_give_finite_results() -> None:
    made, _ = seen(
        "[work]\nruns_per_year = 1e15\nsteps_per_run = 1000000000000\nvalue_per_run = 1e15\n"
        "[money]\nlabour_per_hour = 1e15\n[effort]\nsetup_hours = 1e15\n"
    )
    json.dumps(serialization.to_plain(made), allow_nan=False)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_template_with_every_line_uncommented_is_a_valid_case(lang: str) -> None:
    lines = [line.removeprefix("# ") for line in case_template(lang).splitlines()[3:]]
    text = (
        "\n".join(lines)
        .replace('currency = "USD"', 'currency = "JPY"')
        .replace("per_usd = 1 ", "per_usd = 150 ")
    )
    for whole in (text, "\n".join(lines)):
        made, _ = seen(whole)
        kinds = {made.ways[i].kind for _, i in made.slots}
        assert {"existing", "purchase", "cloud"} <= kinds


def figures(model: type[pydantic.BaseModel]) -> dict[str, Any]:
    """Name of each field -> an empty mapping, or that of the fields of a section."""
    return {
        name: figures(field.annotation) if isinstance(field.annotation, type(pydantic.BaseModel)) else {}
        for name, field in model.model_fields.items()
    }


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_template_lists_exactly_the_figures_that_a_case_may_have(lang: str) -> None:
    lines = [line.removeprefix("# ") for line in case_template(lang).splitlines()[3:]]
    template = tomllib.loads("\n".join(lines))
    listed: dict[str, Any] = {
        name: {key: {} for key in value} if isinstance(value, dict) else {}
        for name, value in template.items()
    }
    assert listed == figures(DecisionCase)


def test_custom_gate_limits_are_reported_and_unknown_money_is_shown_as_not_known() -> None:
    record, told = poc(), WORDS.get("stages.own_limits")
    for limits, own in ((Gates(time=TimeLimits(step_ratio=0.01)), True), (Gates(), False)):
        made = decide(record, parse_case(CARD, "it"), limits=limits)
        assert (told in render_html(record, lang="en", decision=made)) is own
        assert (told in card(decision_view(record, made), "next")) is own
    _, view = seen(CARD)
    worth = view.ways[0].money["net_present_value"]
    assert figure_text(worth, WORDS) == WORDS.get("missing.assumed") == "not known"


@pytest.mark.parametrize("given", ["true", '"5"', "[5]"])
def test_a_value_that_is_not_a_number_is_refused_with_what_is_needed(given: str) -> None:
    with pytest.raises(UserError, match="a number such as"):
        seen(f"[money]\nlabour_per_hour = {given}")


def test_gate_limits_of_an_older_version_are_refused_until_they_are_reset(tmp_path: Path) -> None:
    store, record = Store(tmp_path / "s.sqlite3"), poc()
    for kind in ("begin", "poc"):
        store.append(record.poc_id, kind, record)
    store.append(record.poc_id, proof_of_concept.GATES, {"text": "[accuracy]\nverdicts = []\n"})
    with pytest.raises(UserError, match="memfit decide --gates default resets them"):
        proof_of_concept.decide(store, poc_id=None, case=None)
    store.append(record.poc_id, proof_of_concept.GATES, {"text": ""})
    assert not proof_of_concept.decide(store, poc_id=None, case=None)[1].own_limits
