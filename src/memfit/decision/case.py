"""The case file: the user's figures for the decision, one TOML file, read strictly.

Most numbers may stand alone or with a range. Whole numbers, the longest hours of a run, and the figures of a
machine other than its price have no range.
"""

from __future__ import annotations

import datetime
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from memfit.files.read import MOST_TOML_BYTES, parse_toml, read_text
from memfit.types import serialization
from memfit.types.decision import Term
from memfit.types.errors import UserError, suggest

_LONGEST = 20
_MOST = 1e15  # largest value of any figure, so that sums stay finite
_LEAST = 1e-9  # smallest value of a figure that must be above 0
# PUE: electricity of the whole site over that of its computers. Below 1 is impossible, above 10 is a typing
# error.
_PUE = (1.0, 10.0)


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class CaseFigure(_Strict):
    """A figure, such as ``12.5`` or ``{value = 12.5, low = 10, high = 15, source = "an offer"}``.

    Value, low and high are from 0 to 1e15. If an end of the range is not set, it is the value. The figure
    may have a date in ISO form: ``date = "2026-03-03"``. Validation fails unless low <= value <= high and
    the date is valid.
    """

    value: Annotated[float, pydantic.Field(ge=0, le=_MOST, allow_inf_nan=False)]
    low: Annotated[float, pydantic.Field(ge=0, le=_MOST, allow_inf_nan=False)] | None = None
    high: Annotated[float, pydantic.Field(ge=0, le=_MOST, allow_inf_nan=False)] | None = None
    source: str = ""
    date: str = ""

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> CaseFigure:
        low, high = self.bounds
        if not low <= self.value <= high:
            raise ValueError(
                f"low {low:g}, value {self.value:g} and high {high:g} of this figure are out of order: low "
                "must be at most the value, and high at least the value"
            )
        if self.date:
            datetime.date.fromisoformat(self.date)
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        low = self.value if self.low is None else self.low
        return low, self.value if self.high is None else self.high


def _figure(value: Any) -> Any:
    if isinstance(value, bool | str | list):
        raise ValueError(
            "this figure of the case must be a number such as 12.5, or a table such as "
            "{value = 12.5, low = 10, high = 15}"
        )
    return {"value": value} if isinstance(value, int | float) else value


CaseValue = Annotated[CaseFigure, pydantic.BeforeValidator(_figure)]
Name = Annotated[str, pydantic.Field(min_length=1, max_length=200)]
Positive = Annotated[float, pydantic.Field(ge=_LEAST, le=_MOST, allow_inf_nan=False)]  # these have no range
Bare = Annotated[float, pydantic.Field(ge=0, le=_MOST, allow_inf_nan=False)]
Whole = Annotated[int, pydantic.Field(ge=1, le=10**12)]


def _above(figure: CaseFigure) -> CaseFigure:
    if figure.bounds[0] < _LEAST:
        raise ValueError(
            f"this figure of the case, and its low if it has one, must be above 0: at least {_LEAST:g}"
        )
    return figure


def _pue(figure: CaseFigure) -> CaseFigure:
    if not _PUE[0] <= figure.bounds[0] <= figure.bounds[1] <= _PUE[1]:
        raise ValueError(
            "a PUE, the electricity of a site divided by that of its computers, must be 1 to 10, also its "
            "low and high"
        )
    return figure


def _ratio(figure: CaseFigure) -> CaseFigure:
    if figure.bounds[1] > 1:
        raise ValueError(
            "this figure of the case is a share, so it, and its high if it has one, must be at most 1; 10 % "
            "is 0.1"
        )
    return figure


Above = Annotated[CaseValue, pydantic.AfterValidator(_above)]
Pue = Annotated[CaseValue, pydantic.AfterValidator(_pue)]
Ratio = Annotated[CaseValue, pydantic.AfterValidator(_ratio)]
Share = Annotated[CaseValue, pydantic.AfterValidator(_above), pydantic.AfterValidator(_ratio)]


class TrainingWork(_Strict):
    """The section [work]: how much is trained, how long a run may take, and what a finished run is worth.

    ``steps_per_run``: optimizer steps. ``years``: how many years the training goes on, 1 to 20.
    ``utilisation_ratio``: share of a year in which a machine can be busy, above 0 and at most 1. What is
    unset is the catalog's default; without ``longest_run_hours`` a run may take any time, and without
    ``value_per_run``, in the currency of the case, its worth is unknown.
    """

    steps_per_run: Whole | None = None
    runs_per_year: Above | None = None
    years: Annotated[int, pydantic.Field(ge=1, le=_LONGEST)] | None = None
    utilisation_ratio: Share | None = None
    # an option that needs longer for a run does not count as doing the work
    longest_run_hours: Positive | None = None
    value_per_run: CaseValue | None = None  # value of a finished run to you


class Money(_Strict):
    """The section [money]: prices in the currency of the case, and other figures that all options share.

    ``labour_per_hour``: price of a working hour of people; unknown if unset. ``energy_per_kwh``,
    ``levy_per_kwh`` and ``basic_per_kw_month``: prices of electricity; if unset, those of the case's tariff;
    without a tariff, the energy has the average price of the place, and the other two are 0. All other
    figures are the catalog's if unset. ``tax_ratio``: tax on purchases, rent and electricity, as a share of
    the price without it. ``discount_ratio``: interest per year, by which later costs count less.
    ``life_years``: years after which a machine is replaced, 1 to 20. ``support_ratio``: cost of support per
    year, as a share of the purchase price. ``pue_ratio``: electricity of the site over that of its computers.
    """

    labour_per_hour: CaseValue | None = None
    energy_per_kwh: CaseValue | None = None
    levy_per_kwh: CaseValue | None = None
    basic_per_kw_month: CaseValue | None = None
    per_usd: Above | None = None  # units of the currency per US dollar
    tax_ratio: Ratio | None = None
    discount_ratio: Ratio | None = None
    life_years: Annotated[int, pydantic.Field(ge=1, le=_LONGEST)] | None = None
    support_ratio: Ratio | None = None
    pue_ratio: Pue | None = None
    co2_g_per_kwh: CaseValue | None = None


class AdoptionEffort(_Strict):
    """The section [effort]: people's working hours.

    ``setup_hours``: hours to adopt the recommended plan. If unset, they are the time that people attended to
    the proof of concept, if that was counted, else unknown.
    """

    setup_hours: CaseValue | None = None


class ExistingMachine(_Strict):
    """Figures that the sections [existing], [purchase] and [cloud] have in common: those of the machine of
    one option.

    ``machine`` is written as in --on, such as ``8xH100-SXM``. ``hours_plain``, ``hours_recommended``: hours
    of one run with plain training and with the recommended plan; predicted if unset. ``power_w``: watts of
    one machine under load; if unset, they are predicted or, without a prediction, the catalog's at full load,
    if known. ``setup_hours`` and ``operating_hours_per_year``: people's working hours; unknown if unset.
    """

    machine: Name | None = None
    hours_plain: Positive | None = None  # of one run
    hours_recommended: Positive | None = None
    power_w: Positive | None = None  # of its devices and host, under load
    setup_hours: Bare | None = None
    operating_hours_per_year: Bare | None = None


class OwnedMachine(ExistingMachine):
    """Figures of a machine that the user has or buys. ``site``: "desk" or "server-room", which determines its
    PUE unless [money] sets pue_ratio; if unset, a workstation of the catalog is at a desk and all else in a
    server room.
    """

    site: Literal["desk", "server-room"] | None = None


class Existing(OwnedMachine):
    """The section [existing] of the case file: a machine that the user already has. ``machines``: how many of
    these the user has, by default 1.

    It has no price, because it is paid for.
    """

    machines: Whole = 1


class Purchase(OwnedMachine):
    """The section [purchase]: a machine to buy.

    ``price``: of one machine with all its devices, without tax, in the currency of the case; if unset, the
    catalog's, and needed if it has none.
    """

    price: CaseValue | None = None


class Cloud(ExistingMachine):
    """The section [cloud]: a machine to rent.

    ``per_hour``: price of one machine with all its devices for one hour; if unset, the catalog's, and needed
    if it has none. ``storage_per_month``: price per month of storing the data; 0 if unset. Both prices are
    without tax, in the currency of the case.
    """

    per_hour: CaseValue | None = None
    storage_per_month: Bare | None = None


class DecisionCase(_Strict):
    """The user's figures for a decision. All are optional. Missing ones come from the catalog; those that the
    catalog does not have are unknown, and the decision lists them.

    ``currency``: code of the currency of all prices, by default "USD". ``place``: where the machines run,
    which determines the price of electricity, taxes and a machine's life; if unset, the place of the tariff,
    else that of the supplier, else that of the proof of concept, else the world. ``tariff``: the electricity
    tariff; if unset, the average price of the place counts. ``supplier``: the electricity supplier, which
    determines the CO2; if unset, the place does. These three are names of the catalog."""

    currency: Name = "USD"
    place: Name | None = None
    tariff: Name | None = None
    supplier: Name | None = None
    work: TrainingWork = TrainingWork()
    money: Money = Money()
    effort: AdoptionEffort = AdoptionEffort()
    existing: Existing = Existing()
    purchase: Purchase = Purchase()
    cloud: Cloud = Cloud()


def read(path: Path) -> DecisionCase:
    """Read a case file.

    Raises UserError if the file cannot be read or is not TOML, and if a figure or key is wrong; the error
    then has the location of the first fault and what is allowed there.
    """
    return parse_case(read_text(path, most_bytes=MOST_TOML_BYTES), str(path))


def parse_case(text: str, what: str) -> DecisionCase:
    """Parse the text of a case file; `what` names it in errors.

    Raises UserError if the text is not TOML, and if a figure or key is wrong; the error then has the location
    of the first fault and what is allowed there.
    """
    try:
        return DecisionCase.model_validate(parse_toml(text, what=what))
    except pydantic.ValidationError as error:
        details = error.errors()[0]
        if details["type"] != "extra_forbidden":
            raise serialization.to_user_error(error, what) from error
        location = [str(p) for p in details["loc"]]
        keys = _keys(location[:-1])
        raise UserError(
            f"{what} has a key that the case of `memfit decide` does not have: {'.'.join(location)}",
            allowed=f"in its place {', '.join(keys)}",
            hint=suggest(location[-1], keys),
        ) from error


def _keys(location: list[str]) -> list[str]:
    part: Any = DecisionCase()
    for name in location:
        part = getattr(part, name, None)
    return list(type(part).model_fields if isinstance(part, _Strict) else CaseFigure.model_fields)


def term(name: str, figure: CaseFigure, unit: str) -> Term:
    """Return a figure of the case with its range as a Term called ``name``. If the figure names no source,
    the Term's source is "your case".
    """
    low, high = figure.bounds
    return Term(
        name=name,
        value=figure.value,
        unit=unit,
        low=low,
        high=high,
        source=figure.source or "your case",
        date=figure.date,
    )


def case_template(lang: str) -> str:
    """Return the text of a case file in which every figure is named and commented out. ``lang``: "en" or
    "ja", the language of the comments; the currency is USD or JPY."""
    file = resources.files("memfit.decision").joinpath(f"case_template.{lang}.toml")
    return file.read_text(encoding="utf-8")
