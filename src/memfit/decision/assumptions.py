"""The numbers of the decision that do not belong to one machine: the user's if given, else the catalog's.

Each has its source and, if known, its range.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from memfit import catalog
from memfit.catalog import finance
from memfit.decision.case import CaseFigure, DecisionCase, term
from memfit.types.decision import Amount, Term, Terms
from memfit.types.errors import UserError
from memfit.types.machine import Fact
from memfit.types.result import Offer

# an exchange rate that differs from the catalog's by more than this factor is a typing error
_MOST_RATE_FACTOR: Final = 10.0
_WHOLE: Final = ("steps_per_run", "years", "life_years")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """The numbers of the decision that are common to all options.

    ``terms``: as the formulas use them. ``numbers``: the same numbers with ranges and sources, and the prices
    of machines that the user gave. ``place``: where the machines run, which determines taxes, electricity and
    carbon.
    """

    currency: finance.Currency
    place: str
    steps_per_run: int
    terms: Terms
    numbers: tuple[Term, ...]


def collect_assumptions(
    case: DecisionCase,
    *,
    place: str,
    offers: Sequence[Offer],
    step_errors: Mapping[bool, float] | None = None,
    project: Mapping[str, Fact] | None = None,
) -> Assumptions:
    """Collect the numbers of the decision: the user's where the case has them, else the catalog's.

    `place`: used if the case names no place, tariff or supplier. `offers`: predictions, for the ranges of
    step times. `project`: name -> number of a typical project, used in place of the catalog's default.
    `step_errors`: measured over predicted step time of plain training (True) and of the recommended plan
    (False) in the runs of the proof of concept. Raises UserError for a currency, place, tariff or electricity
    supplier that the catalog does not have, for a place, tariff and supplier that do not belong together, and
    for an implausible exchange rate.
    """
    currency = finance.currency(case.currency)
    case_place = _where(case, place)
    rate = _rate(case, currency)
    electricity_prices = _Electricity(case, currency, case_place, rate)
    numbers = [
        rate,
        *_work(case, project or {}),
        *_money(case, case_place),
        *electricity_prices.electricity(),
        *_factors(case, offers, step_errors or {}),
    ]
    terms_by_name = {n.name: n for n in numbers}

    def value(name: str) -> Any:
        return terms_by_name[name].value

    terms = Terms(
        runs_per_year=value("runs_per_year"),
        years=int(value("years")),
        life_years=int(value("life_years")),
        discount_ratio=value("discount_ratio"),
        utilisation_ratio=value("utilisation_ratio"),
        tax_ratio=value("tax_ratio"),
        support_ratio=value("support_ratio"),
        labour_per_hour=value("labour_per_hour") or 0.0,
        per_usd=value("per_usd"),
        energy_per_kwh=electricity_prices.amounts["energy_per_kwh"],
        levy_per_kwh=electricity_prices.amounts["levy_per_kwh"],
        basic_per_kw_month=electricity_prices.amounts["basic_per_kw_month"],
        co2_g_per_kwh=value("co2_g_per_kwh"),
        pue_ratio=value("pue_ratio"),
        desk_pue_ratio=value("desk_pue_ratio"),
        cloud_pue_ratio=value("cloud_pue_ratio"),
        value_per_run=value("value_per_run"),
        longest_run_hours=case.work.longest_run_hours,
    )
    return Assumptions(
        currency=currency,
        place=case_place,
        steps_per_run=int(value("steps_per_run")),
        terms=terms,
        numbers=tuple(numbers),
    )


def _where(case: DecisionCase, place: str) -> str:
    """Return the place that the case names, else the place of its electricity tariff, else that of its
    electricity supplier, else ``place``.

    Raises UserError if the case has several of these and their places differ, or if the catalog does not have
    one of them.
    """
    places = {
        "place": catalog.place(case.place).name if case.place else None,
        "tariff": finance.tariff(case.tariff).place if case.tariff else None,
        "supplier": finance.supplier_place(case.supplier) if case.supplier else None,
    }
    stated_places = {name: country for name, country in places.items() if country is not None}
    if len(set(stated_places.values())) > 1:
        places_text = ", ".join(
            f"{name} {getattr(case, name)!r} belongs to {country}" for name, country in stated_places.items()
        )
        raise UserError(
            f"the keys place, tariff and supplier of the case are not of one place: {places_text}",
            allowed="a place, an electricity tariff and an electricity supplier of the same place",
            hint="correct one of these keys or leave it out",
        )
    return next(iter(stated_places.values()), place)


def _rate(case: DecisionCase, currency: finance.Currency) -> Term:
    """Return how many units of the currency one US dollar costs: the user's rate, else the catalog's.

    Raises UserError if an end of the user's range is below a tenth or above ten times the catalog's rate, as
    for another currency or an inverted rate. For the US dollar, only 1 is allowed.
    """
    figure, catalog_rate = case.money.per_usd, currency.per_usd.value
    if figure is not None:
        low, high = figure.bounds
        factor = 1.0 if currency.code == "USD" else _MOST_RATE_FACTOR
        if low < catalog_rate / factor or high > catalog_rate * factor:
            raise UserError(
                f"money.per_usd is implausible: one US dollar costs {figure.value:g} {currency.code} "
                f"(range {low:g} to {high:g})",
                allowed=f"{catalog_rate / factor:g} to {catalog_rate * factor:g}, also for the low and high "
                f"of a range; the catalog's rate is {catalog_rate:g}",
                hint=f"give the number of {currency.code} that one US dollar costs, not the inverse",
            )
    return _number("per_usd", figure, currency.per_usd, "")


def _work(case: DecisionCase, project: Mapping[str, Fact]) -> Iterable[Term]:
    work = case.work
    for name, figure, unit in (
        ("steps_per_run", work.steps_per_run, "steps"),
        ("years", work.years, "years"),
        ("runs_per_year", work.runs_per_year, "runs"),
        ("utilisation_ratio", work.utilisation_ratio, ""),
    ):
        yield _number(name, figure, project.get(name) or finance.default(name), unit)
    yield _number("value_per_run", work.value_per_run, None, "money")


def _money(case: DecisionCase, place: str) -> Iterable[Term]:
    money = case.money
    no_tax = Fact(
        value=0.0,
        source="no tax rate is known for this place, or the tax is assumed to be reclaimed",
        date="",
        kind="assumed",
    )
    yield _number("labour_per_hour", money.labour_per_hour, None, "money")
    yield _number("tax_ratio", money.tax_ratio, finance.tax_ratio(place) or no_tax, "")
    yield _number("discount_ratio", money.discount_ratio, finance.default("discount_rate"), "")
    yield _number("life_years", money.life_years, finance.write_off_years(place), "years")
    yield _number("support_ratio", money.support_ratio, finance.default("support_ratio"), "")
    yield _number("pue_ratio", money.pue_ratio, catalog.place(place).pue_ratio, "")
    yield _number("desk_pue_ratio", None, finance.site_pue("desk"), "")
    yield _number("cloud_pue_ratio", None, finance.site_pue("cloud"), "")
    grid = finance.supplier_co2(case.supplier) if case.supplier else catalog.place(place).co2_g_per_kwh
    yield _number("co2_g_per_kwh", money.co2_g_per_kwh, grid, "g/kWh")


@dataclasses.dataclass
class _Electricity:
    """The three prices of electricity: per kWh, levy per kWh and basic charge per kW and month.

    Each is the user's, else that of the case's tariff. If there is neither, energy has the average price of
    the place ``where``, and the other two are zero. ``amounts``: name -> price; it is filled while
    `electricity` is iterated.
    """

    case: DecisionCase
    currency: finance.Currency
    where: str
    rate: Term

    def __post_init__(self) -> None:
        self.amounts: dict[str, Amount] = {}
        self.tariff = finance.tariff(self.case.tariff) if self.case.tariff else None

    def electricity(self) -> Iterable[Term]:
        average = _with_range(catalog.place(self.where).usd_per_kwh, finance.default("electricity_spread"))
        for name in ("energy_per_kwh", "levy_per_kwh", "basic_per_kw_month"):
            figure = getattr(self.case.money, name)
            row: Fact | None = getattr(self.tariff, name) if self.tariff else None
            if figure is not None:
                yield self._add_own_price(name, _number(name, figure, None, "money"))
            elif row is not None and self.tariff is not None:
                yield self._add_catalog_price(name, row, self.tariff.currency)
            elif name == "energy_per_kwh":
                yield self._add_catalog_price(name, average, "USD")
            else:
                self.amounts[name] = Amount()

    def _add_own_price(self, name: str, number: Term) -> Term:
        self.amounts[name] = Amount(own=number.value or 0.0)
        return number

    def _add_catalog_price(self, name: str, row: Fact, currency: str) -> Term:
        """Return the catalog price ``row``, in ``currency``, as a Term in the currency of the case, and store
        it as an Amount in ``amounts``.

        The Amount is in US dollars if the price had to be converted, else in the currency of the case.
        """
        if currency == self.currency.code:
            return self._add_own_price(name, _number(name, None, row, "money"))
        usd = row.value / finance.currency(currency).per_usd.value
        self.amounts[name] = Amount(usd=usd)
        scale = usd * (self.rate.value or 0.0) / row.value if row.value else 0.0
        number = _number(name, None, row, "money")
        low, high = ((number.low or 0.0) * scale, (number.high or 0.0) * scale)
        return dataclasses.replace(number, value=row.value * scale, low=low, high=high)


def _factors(
    case: DecisionCase, offers: Sequence[Offer], step_errors: Mapping[bool, float]
) -> Iterable[Term]:
    """Yield the uncertain factors, of value 1 and with a range: on the predicted step times of plain training
    and of the recommended plan.

    Also yield the purchase and rental price of the case, if given. ``step_errors``: measured over predicted
    step time of plain training (True) and of the recommended plan (False); it widens the range of that
    factor.
    """
    for name, price in (("purchase_price", case.purchase.price), ("rental_price", case.cloud.per_hour)):
        if price is not None:
            yield _number(name, price, None, "money")
    for name, plain in (("plain_time_factor", True), ("recommended_time_factor", False)):
        step_times = [o.step_s for o in offers if o.plain is plain and o.step_s is not None]
        low = min((s.low / s.value for s in step_times), default=1.0)
        high = max((s.high / s.value for s in step_times), default=1.0)
        source = "the interval of the predicted step times"
        if plain in step_errors:
            low, high = widen_range(low, high, step_errors[plain])
            source = f"{source}, widened by the error that the PoC's own runs showed"
        yield Term(name=name, value=1.0, unit="factor", low=low, high=high, mark="predicted", source=source)


def widen_range(low: float, high: float, ratio: float) -> tuple[float, float]:
    """Return the range ``low`` to ``high``, which contains 1, widened by an error of `ratio` (measured over
    predicted).

    All are factors, so logarithms are used: the new logarithm of an end is the root of the sum of the squares
    of its old one and of that of `ratio`, as for independent errors. A ``low`` of 0 stays.
    """
    error = math.log(ratio)
    lower = math.exp(-math.hypot(math.log(low), error)) if low > 0 else low
    return lower, math.exp(math.hypot(math.log(high), error))


def _with_range(row: Fact, spread: Fact) -> Fact:
    """Return ``row`` with a range: its own, else its value times the range of ``spread``, if that has one."""
    if row.low is not None or spread.low is None or spread.high is None:
        return row
    return dataclasses.replace(row, low=row.value * spread.low, high=row.value * spread.high)


def _number(name: str, figure: CaseFigure | int | None, row: Fact | None, unit: str) -> Term:
    if isinstance(figure, int):
        return Term(name=name, value=figure, unit=unit, low=figure, high=figure, source="your case")
    if figure is not None:
        return term(name, figure, unit)
    if row is None:
        return Term(name=name, value=None, unit=unit)
    low, high = (row.value, row.value) if name in _WHOLE else row.bounds  # whole numbers have no range
    return Term(
        name=name,
        value=row.value,
        unit=unit,
        low=low,
        high=high,
        source=row.source,
        date=row.date,
        mark="measured" if row.kind == "measured" else "assumed",
    )
