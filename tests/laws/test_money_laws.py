"""Laws of the decision's money that hold for every way, price and currency."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from report_fixture import full_poc

from memfit.catalog import finance
from memfit.decision import case as cases
from memfit.decision import money, monte_carlo
from memfit.decision.assumptions import widen_range
from memfit.decision.decide import decide
from memfit.store import Store
from memfit.types.decision import Alternative, Amount, CostSheet, Decision, Term, Terms
from memfit.types.result import Interval, Offer

few = settings(max_examples=40, phases=(Phase.explicit, Phase.generate))  # shrinking many draws takes long
ROUNDING = 1e-9  # of the largest part of a sum
PRICES = (
    "price",
    "per_hour",
    "storage_per_month",
    "energy_per_kwh",
    "levy_per_kwh",
    "basic_per_kw_month",
    "labour_per_hour",
    "tax_ratio",
    "hardware_factor",
    "rental_factor",
)


def number(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, width=32).map(float)


amounts = st.builds(Amount, usd=number(0, 1e6), own=number(0, 1e8))
small = st.builds(Amount, usd=number(0, 2), own=number(0, 300))
all_terms = st.builds(
    Terms,
    runs_per_year=number(0.5, 1e5),
    years=st.integers(1, 20),
    life_years=st.integers(1, 20),
    discount_ratio=number(0, 0.5),
    utilisation_ratio=number(0.015625, 1),
    tax_ratio=number(0, 0.5),
    support_ratio=number(0, 0.5),
    labour_per_hour=number(0, 1e5),
    per_usd=number(0.125, 2000),
    energy_per_kwh=small,
    levy_per_kwh=small,
    basic_per_kw_month=small,
    co2_g_per_kwh=number(0, 1000),
    pue_ratio=number(1, 3),
    value_per_run=st.none() | number(0, 1e6),
    hardware_factor=number(0.5, 2),
    rental_factor=number(0.5, 2),
)


@st.composite
def ways(draw: st.DrawFn, plain: bool | None = None) -> dict[str, Any]:
    """Fields of an Alternative: it is made in the test, as checking its types may draw at random."""
    kind = draw(st.sampled_from(("existing", "purchase", "cloud")))
    return {
        "kind": kind,
        "machine": "it",
        "plain": draw(st.booleans()) if plain is None else plain,
        "hours": draw(number(0.0078125, 1e4)),
        "power_w": draw(st.none() | number(1, 1e5) if kind == "cloud" else number(1, 1e5)),
        "price": draw(amounts) if kind == "purchase" else None,
        "per_hour": draw(small) if kind == "cloud" else None,
        "storage_per_month": draw(number(0, 1e5)) if kind == "cloud" else 0.0,
        "setup_hours": draw(number(0, 1000)),
        "operating_hours": draw(number(0, 1000)),
        "embodied_kg": draw(st.none() | number(0, 1e4)),
    }


def dearer(name: str, way: Alternative, terms: Terms, by: float) -> tuple[Alternative, Terms]:
    """With one price higher: `by` times what it is, and a little more than zero where it is zero."""
    side: Any = way if name in {f.name for f in dataclasses.fields(Alternative)} else terms
    now = getattr(side, name)
    if now is None:
        return way, terms
    more = Amount(usd=now.usd * by, own=now.own * by + by) if isinstance(now, Amount) else now * by + by / 100
    changed = dataclasses.replace(side, **{name: more})
    return (changed, terms) if isinstance(changed, Alternative) else (way, changed)


def largest(sheet: CostSheet, terms: Terms) -> float:
    return sheet.initial + (sheet.purchase + known(sheet.running_per_year)) * terms.years + 1


def known(figure: float | None) -> float:
    assert figure is not None
    return figure


@pytest.mark.parametrize("name", PRICES)
@given(way=ways(), terms=all_terms, by=number(1, 10))
def test_present_cost_never_falls_as_a_price_rises(
    name: str, way: dict[str, Any], terms: Terms, by: float
) -> None:
    before = money.sheet(Alternative(**way), terms)
    after = money.sheet(*dearer(name, Alternative(**way), terms, by))
    room = ROUNDING * largest(before, terms)
    for column in ("present_cost", "initial", "running_per_year", "cost_per_run"):
        assert getattr(after, column) >= getattr(before, column) - room
    if before.net_present_value is not None and after.net_present_value is not None:
        assert after.net_present_value <= before.net_present_value + room


@given(way=ways(), terms=all_terms)
def test_parts_of_the_cost_sum_to_the_whole(way: dict[str, Any], terms: Terms) -> None:
    s = money.sheet(Alternative(**way), terms)
    parts = known(s.electricity_per_year) + s.rental_per_year + s.people_per_year + s.support_per_year
    assert s.running_per_year == pytest.approx(parts, rel=1e-12)
    assert s.initial == s.setup + s.purchase
    assert known(s.cost_per_run) * terms.runs_per_year * terms.years == pytest.approx(
        s.present_cost, rel=1e-12
    )
    if s.operation_g is not None and s.embodied_g is not None:
        assert s.sci_g == s.operation_g + s.embodied_g
    assert 0 <= s.residual <= s.purchase
    assert known(s.present_cost) >= -ROUNDING * largest(s, terms), "what is left is never more than was paid"


@given(first=ways(), second=ways(), terms=all_terms)
def test_the_payback_time_holds_within_the_life_of_the_first_machines(
    first: dict[str, Any], second: dict[str, Any], terms: Terms
) -> None:
    one, other = money.sheet(Alternative(**first), terms), money.sheet(Alternative(**second), terms)
    kind, years = money.payback(one, other, terms.life_years)
    room = ROUNDING * (largest(one, terms) + largest(other, terms)) * 1e3

    def dearer_after(t: float) -> float:
        more = known(one.running_per_year) - known(other.running_per_year)
        return one.initial - other.initial + more * t

    life = terms.life_years if one.purchase or other.purchase else 1e3
    if kind == "at once":
        assert max(dearer_after(0), dearer_after(life)) <= room
    elif kind == "never":
        assert min(dearer_after(0), dearer_after(life)) >= -room
    elif kind in ("years", "until"):
        assert known(years) <= life or not (one.purchase or other.purchase)
        sign = 1 if kind == "years" else -1
        assert sign * dearer_after(0.99 * known(years)) >= -room
        assert sign * dearer_after(1.01 * known(years)) <= room
    else:
        assert years == terms.life_years
        sign = 1 if kind == "not in life" else -1
        assert sign * dearer_after(0.99 * life) >= -room


@given(way=ways(), terms=all_terms, by=number(1, 100))
def test_more_runs_never_need_fewer_machines(way: dict[str, Any], terms: Terms, by: float) -> None:
    more = dataclasses.replace(terms, runs_per_year=terms.runs_per_year * by)
    before, after = money.sheet(Alternative(**way), terms), money.sheet(Alternative(**way), more)
    assert after.machines >= before.machines >= 1
    each = money.HOURS_PER_YEAR * terms.utilisation_ratio
    assert before.machines * each >= before.hours_per_year - 1e-6 * each, "they do the work"
    assert (before.machines - 1) * each <= before.hours_per_year + 1e-6 * each, "none is idle all year"


# -- uncertainty ------------------------------------------------------------------------------------------


Pair = tuple[dict[str, Any], dict[str, Any]]
pairs = st.tuples(ways(), ways(plain=True))


@st.composite
def ranges(draw: st.DrawFn, terms: Terms) -> list[Term]:
    """Some of the terms with a range around what they are."""
    names = (
        "runs_per_year",
        "discount_ratio",
        "utilisation_ratio",
        "tax_ratio",
        "support_ratio",
        "labour_per_hour",
        "per_usd",
        "energy_per_kwh",
        "levy_per_kwh",
        "hardware_factor",
        "rental_factor",
        "plain_time_factor",
        "recommended_time_factor",
    )
    found = []
    for name in draw(st.lists(st.sampled_from(names), unique=True, max_size=5)):
        now = getattr(terms, name)
        value = float(now.at(terms.per_usd) if isinstance(now, Amount) else now)
        low, high = (
            value * draw(number(0.5, 1)),
            value * draw(number(1, 2)) + draw(st.sampled_from((0.0, 0.01))),
        )
        if name == "utilisation_ratio":
            high = min(1.0, high)
        found.append(Term(name=name, value=value, unit="", low=min(low, value), high=max(value, high)))
    return found


@few
@given(data=st.data(), pair=pairs, terms=all_terms)
def test_the_saving_interval_contains_the_point_estimate(
    data: st.DataObject, pair: Pair, terms: Terms
) -> None:
    best, reference = (Alternative(**way) for way in pair)
    told = data.draw(ranges(terms))
    point = money.sheet(best, terms).saved_percent(money.sheet(reference, terms))
    found = monte_carlo.interval(best, reference, terms, told, draws=50)
    if point is None:
        assert found is None
        return
    assert found is not None
    span, percent = found
    assert span.low <= span.value == point <= span.high <= 100
    assert 0 <= percent <= 100
    assert monte_carlo.interval(best, reference, terms, told, draws=50) == found, "the same draws every time"


@given(data=st.data(), pair=pairs, terms=all_terms)
def test_a_term_without_a_range_has_no_swing(data: st.DataObject, pair: Pair, terms: Terms) -> None:
    best, reference = (Alternative(**way) for way in pair)
    point = money.sheet(best, terms).saved_percent(money.sheet(reference, terms))
    assume(point is not None)
    for term in data.draw(ranges(terms)):
        still = dataclasses.replace(term, low=term.value, high=term.value)
        assert monte_carlo.tornado(best, reference, terms, [still]) == ()
        assert term.value is not None
        there = monte_carlo.replace_numbers(terms, {term.name: term.value})
        again = money.sheet(best, there).saved_percent(money.sheet(reference, there))
        assert again == pytest.approx(point, rel=1e-6, abs=1e-6)
        one_sided = dataclasses.replace(term, low=term.value)
        for swing in monte_carlo.tornado(best, reference, terms, [one_sided]):
            assert swing.low_percent == pytest.approx(point, rel=1e-6, abs=1e-6)


@given(pair=pairs, terms=all_terms)
def test_a_term_of_value_zero_may_have_a_range(pair: Pair, terms: Terms) -> None:
    """For example a tax of 0 to 10 % that is taken as 0."""
    best, reference = (Alternative(**way) for way in pair)
    terms = dataclasses.replace(terms, tax_ratio=0.0, levy_per_kwh=Amount())
    for name in ("tax_ratio", "levy_per_kwh"):
        term = Term(name=name, value=0.0, unit="", low=0.0, high=0.1)
        there = monte_carlo.replace_numbers(terms, {name: 0.1})
        ends = [money.sheet(best, t).saved_percent(money.sheet(reference, t)) for t in (terms, there)]
        found = monte_carlo.tornado(best, reference, terms, [term])
        if ends[0] is None or ends[1] is None:
            assert found == ()
            continue
        dust = 1e-9 * max(100, abs(ends[0]), abs(ends[1]))
        swings = [(s.low_percent, s.high_percent) for s in found]
        assert swings == ([tuple(ends)] if abs(ends[1] - ends[0]) > dust else [])


# -- errors that the proof of concept observed ------------------------------------------------------------


@few
@given(low=number(0.25, 1), high=number(1, 3), ratio=number(0.25, 4), worse=number(1, 4))
def test_an_observed_error_widens_both_ends_of_a_range(
    low: float, high: float, ratio: float, worse: float
) -> None:
    least, most = widen_range(low, high, ratio)
    assert least <= low * (1 + 1e-12)
    assert most >= high * (1 - 1e-12)
    assert least <= min(ratio, 1 / ratio) * (1 + 1e-12)
    assert most >= max(ratio, 1 / ratio) * (1 - 1e-12)
    assert widen_range(low, high, 1.0) == pytest.approx((low, high), rel=1e-12)
    assert widen_range(low, high, 1 / ratio) == pytest.approx((least, most), rel=1e-12)
    further = widen_range(low, high, ratio * worse if ratio >= 1 else ratio / worse)
    assert further[0] <= least * (1 + 1e-12)
    assert further[1] >= most * (1 - 1e-12)


def test_larger_step_time_errors_widen_the_saving_interval() -> None:
    """The point estimate stays the same."""
    case = told("USD", 1.0, (60.0, 0.2, 0.0, 0.0, 5000.0, 1.0, 0.0, 0.0), named=False)
    spans = []
    for factor in (None, 1.0, 1.5, 3.0):
        runs = [
            dataclasses.replace(
                r, predicted_step_s=None if factor is None else r.predicted_step_s * factor / 1.04
            )
            for r in POC.runs
            if r.predicted_step_s is not None
        ]
        made = decide(dataclasses.replace(POC, runs=tuple(runs)), case)
        found = made.saved_interval_percent
        assert found is not None
        spans.append((found.value, found.high - found.low))
    assert len({value for value, _ in spans}) == 1
    assert spans[0][1] == pytest.approx(spans[1][1], rel=1e-6)
    assert spans[1][1] < spans[2][1] < spans[3][1]


@given(data=st.data(), pair=pairs, terms=all_terms)
def test_monte_carlo_draws_of_a_term_do_not_depend_on_other_terms(
    data: st.DataObject, pair: Pair, terms: Terms
) -> None:
    best, reference = (Alternative(**way) for way in pair)
    told = data.draw(ranges(terms))
    found = monte_carlo.interval(best, reference, terms, told, draws=20)
    assert monte_carlo.interval(best, reference, terms, told[::-1], draws=20) == found
    idle = Term(name="value_per_run", value=2.0, unit="", low=1.0, high=3.0)
    assert monte_carlo.interval(best, reference, terms, [idle, *told], draws=20) == found


@given(way=ways(), terms=all_terms)
def test_the_cost_of_a_machine_that_is_not_rented_is_unknown_without_its_power(
    way: dict[str, Any], terms: Terms
) -> None:
    dark = Alternative(**{**way, "power_w": None})
    sheet = money.sheet(dark, terms)
    rented = dark.kind == "cloud"
    assert (sheet.present_cost is not None) is rented
    assert (money.cheapest([dark], [sheet], [0]) == 0) is rented
    other = money.sheet(Alternative(**{**way, "power_w": 100.0}), terms)
    assert sheet.initial == other.initial
    assert rented or sheet.saved_percent(other) is other.saved_percent(sheet) is None


# -- whatever the currency, the language and the place -----------------------------------------------


def offer(machine: str, plain: bool, step_s: float | None, power_w: float) -> Offer:
    span = None if step_s is None else Interval(value=step_s, low=0.9 * step_s, high=1.1 * step_s)
    return Offer(
        machine=machine,
        size="",
        plan="plain training" if plain else "checkpointing",
        plain=plain,
        fits=step_s is not None,
        memory_bytes=Interval(value=2e10, low=2e10, high=2e10),
        step_s=span,
        power_w=power_w,
    )


OFFERS = (
    offer("RTX-4090", True, None, 0.0),
    offer("RTX-4090", False, 2.5, 560.0),
    offer("RTX-A6000", True, 2.9, 450.0),
    offer("RTX-A6000", False, 3.3, 440.0),
    offer("H100-PCIe", True, 1.2, 650.0),
    offer("H100-PCIe", False, 1.5, 640.0),
)
POC = dataclasses.replace(full_poc(), offers=OFFERS)
LABOUR, ENERGY, LEVY, BASIC, PRICE, PER_HOUR, STORAGE, VALUE = range(8)
own_prices = st.tuples(
    number(1, 300),
    number(0.03125, 2),
    number(0, 0.5),
    number(0, 50),
    number(1000, 1e5),
    number(0.25, 30),
    number(0, 500),
    number(0, 1e4),
)


def told(currency: str, rate: float, own: tuple[float, ...], *, named: bool) -> cases.DecisionCase:
    """The same people, with their prices (US dollars) in another currency."""
    p = [x * rate for x in own]
    case: dict[str, Any] = {
        "currency": currency,
        "place": "japan",
        "work": {"runs_per_year": 40, "value_per_run": p[VALUE]},
        "money": {
            "per_usd": rate,  # without a range: the exchange rate is held fixed
            "labour_per_hour": {"value": p[LABOUR], "low": 0.7 * p[LABOUR], "high": 1.4 * p[LABOUR]},
            "energy_per_kwh": p[ENERGY],
            "levy_per_kwh": p[LEVY],
            "basic_per_kw_month": p[BASIC],
        },
        "effort": {"setup_hours": {"value": 12, "low": 6, "high": 30}},
        "existing": {"machine": "RTX-4090", "setup_hours": 0, "operating_hours_per_year": 20},
        "purchase": {"setup_hours": 8, "operating_hours_per_year": 20},
        "cloud": {"storage_per_month": p[STORAGE], "setup_hours": 4, "operating_hours_per_year": 30},
    }
    if named:
        case["purchase"] |= {"machine": "RTX-A6000", "price": p[PRICE]}
        case["cloud"] |= {"machine": "H100-PCIe", "per_hour": p[PER_HOUR]}
    return cases.DecisionCase.model_validate(case)


def decided(case: cases.DecisionCase) -> Decision:
    with pytest.MonkeyPatch.context() as patch:  # all draws take long
        patch.setattr(monte_carlo, "interval", functools.partial(monte_carlo.interval, draws=100))
        return decide(POC, case)


@few
@given(code=st.sampled_from(finance.currency_codes()), own=own_prices, named=st.booleans())
def test_the_decision_is_the_same_in_every_currency(code: str, own: tuple[float, ...], named: bool) -> None:
    rate = finance.currency(code).per_usd.value
    dollars, theirs = decided(told("USD", 1.0, own, named=named)), decided(told(code, rate, own, named=named))
    assert (theirs.best, theirs.reference, theirs.payback) == (
        dollars.best,
        dollars.reference,
        dollars.payback,
    )
    assert theirs.shown == dollars.shown
    assert theirs.saved_percent == pytest.approx(dollars.saved_percent, rel=1e-9, abs=1e-9)
    assert theirs.chance_percent == dollars.chance_percent
    ends = [
        d.saved_interval_percent and dataclasses.astuple(d.saved_interval_percent) for d in (theirs, dollars)
    ]
    assert ends[0] == pytest.approx(ends[1], rel=1e-9, abs=1e-9)
    assert [s.name for s in theirs.swings] == [s.name for s in dollars.swings]
    assert theirs.payback_years == pytest.approx(dollars.payback_years, rel=1e-6)
    for here, there in zip(dollars.sheets, theirs.sheets, strict=True):
        assert there.present_cost == pytest.approx(known(here.present_cost) * rate, rel=1e-9)
        assert there.kwh_per_run == here.kwh_per_run
        assert there.sci_g == here.sci_g


CASE = """\
currency = "JPY"
place = "japan"
tariff = "japan-high-voltage"
[money]
labour_per_hour = {value = 4200.5, low = 3500, high = 5000, date = "2026-03-29"}
[existing]
machine = "RTX-4090"
"""
ELSEWHERE = (
    {"TZ": "UTC", "LC_ALL": "C", "PYTHONHASHSEED": "1"},
    {"TZ": "Asia/Tokyo", "LC_ALL": "ja_JP.UTF-8", "LANG": "ja_JP.UTF-8", "PYTHONHASHSEED": "2"},
    {"TZ": "America/New_York", "LC_ALL": "de_DE.UTF-8", "LANGUAGE": "de", "PYTHONHASHSEED": "3"},
)


def test_the_decision_does_not_depend_on_locale_or_time_zone(tmp_path: Path) -> None:
    """LC_ALL counts for what is installed; a comma as decimal point would show in any case."""
    store, path = tmp_path / "s.sqlite3", tmp_path / "case.toml"
    path.write_text(CASE, encoding="utf-8")
    for kind in ("begin", "poc"):
        Store(store).append(POC.poc_id, kind, POC)
    command = [sys.executable, "-m", "memfit", "decide", "--json", "--store", str(store), "--case", str(path)]
    told_of = [
        subprocess.run(command, env=os.environ | where, capture_output=True, check=True).stdout
        for where in ELSEWHERE
    ]
    assert json.loads(told_of[0])["decision"]["saved_percent"] is not None
    assert told_of[0] == told_of[1] == told_of[2]
