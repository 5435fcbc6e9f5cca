"""The decision: ways to get the work done, what each costs, and what it rests on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from memfit.types.result import Interval

# A way's price, the name of the user's own offer for it, and the factor that moves the catalog's.
OFFERS: Final = (
    ("price", "purchase_price", "hardware_factor"),
    ("per_hour", "rental_price", "rental_factor"),
)
OWN: Final = ("setup_hours", *(own for _, own, _ in OFFERS))  # told numbers that are of ways, not of terms
DRAWS: Final = 4000  # of the uncertain numbers, behind the interval of what is saved


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """Money: what the catalog prices in US dollars, and what the user told in the currency of the case."""

    usd: float = 0.0
    own: float = 0.0

    def at(self, per_usd: float) -> float:
        return self.usd * per_usd + self.own


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One number that the decision rests on. ``mark``: measured, predicted or assumed; an unknown value is
    None and is asked for. ``low`` and ``high`` are equal to it where no range is known."""

    name: str
    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    mark: str = "assumed"
    source: str = ""
    date: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What all ways share; see docs/decisions/014-money.md. ``labour`` 0 where nobody told it."""

    runs_per_year: float
    years: int
    life_years: int
    discount_ratio: float
    utilisation_ratio: float
    tax_ratio: float
    support_ratio: float
    labour_per_hour: float
    per_usd: float
    energy_per_kwh: Amount
    levy_per_kwh: Amount
    basic_per_kw_month: Amount
    co2_g_per_kwh: float
    pue_ratio: float
    value_per_run: float | None = None
    longest_run_hours: float | None = None
    hardware_factor: float = 1.0
    rental_factor: float = 1.0
    plain_time_factor: float = 1.0
    recommended_time_factor: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to do the work. ``kind``: existing, purchase, cloud or nothing. Prices are of one machine with
    all its devices; ``power_w`` is of its devices and host, before PUE. ``hours``: of one run."""

    kind: str
    machine: str = ""
    plan: str = ""
    plain: bool = True
    hours: float = 0.0
    predicted: bool = True  # whether hours are memfit's, not the user's: they move with a time factor
    power_w: float | None = None
    price: Amount | None = None
    per_hour: Amount | None = None
    storage_per_month: float = 0.0
    setup_hours: float = 0.0  # the machine's and the plan's, as far as they are known
    operating_hours: float = 0.0  # a year
    most_machines: int | None = None
    embodied_kg: float | None = None  # of all devices of one machine
    plain_j: float | None = None  # of a run of plain training on it, where that is predicted, fits or not
    of_catalog: bool = True
    untried: tuple[str, ...] = ()  # techniques that can change results and that the PoC did not train
    unknown: tuple[str, ...] = ()  # names of terms that nobody told and that count as nothing
    own_power: bool = False  # the watts are the user's
    plan_hours: float = 0.0  # the part of setup_hours that is the plan's
    memory_bytes: Interval | None = None  # on a device, as predicted
    usable_bytes: float | None = None  # what the device has
    fit_percent: float = 100.0  # how probable it is that the plan fits: below 100 the upper end does not


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """What a way costs, in the currency of the case; a year where it says so, else over all years. None where
    it rests on watts that nobody knows."""

    machines: int
    hours_per_year: float
    kwh_per_run: float | None
    setup: float
    purchase: float  # the first
    initial: float
    electricity_per_year: float | None
    rental_per_year: float
    people_per_year: float
    support_per_year: float
    running_per_year: float | None
    residual: float
    present_cost: float | None
    cost_per_run: float | None
    net_present_value: float | None
    operation_g: float | None
    embodied_g: float | None
    sci_g: float | None  # per run
    enough: bool  # the machines that there are do all runs of a year

    def saved_percent(self, reference: Sheet) -> float | None:
        """Of the reference's present cost; negative is a loss."""
        mine, other = self.present_cost, reference.present_cost
        return None if mine is None or other is None or other <= 0 else 100 * (1 - mine / other)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Swing:
    """What one term alone does to the share that is saved, at both ends of its range."""

    name: str
    low_percent: float
    high_percent: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Risk:
    """``evidence`` and ``mitigation``: keys of the word catalogs with what fills them. ``level``: low, some,
    high or unknown. ``loss``: at most, if we go on to the next stage; None: not known."""

    kind: str
    level: str
    evidence: str
    values: Mapping[str, str | float | None] = dataclasses.field(default_factory=dict)
    source: str = ""
    loss: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage of the roll-out. ``state``: done, next, stopped or later."""

    name: str
    state: str
    machine: str = ""
    plan: str = ""
    engine: str = ""
    memory_bytes: Interval | None = None
    step_s: Interval | None = None
    spent: float | None = None
    to_spend: float | None = None
    gates: tuple[tuple[str, str, str, bool], ...] = ()  # name, found, limit, holds
    most: float | None = None  # to spend, every number at the end of its range that costs most
    unpaid: tuple[str, ...] = ()  # hours of people that nobody told and that are not in the money
    stop_bytes: float | None = None  # above this it ends: the prediction's upper end, or all that there is
    back: str = ""  # to what: "plain" (on the same machine), "reference" or "stay"
    back_way: int | None = None
    way: int | None = None  # whose money it is, of those to come
    ends: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of ranges, where `most` is dearest
    energy_j: float | None = None  # paid for, of the one that is done
    hours: float = 0.0  # of people, in the same


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """``ways`` and ``sheets`` go together. Indices are into them; None where there is no such way."""

    currency: str
    symbol: str
    decimals: int
    place: str
    case: str  # the user's file; "" where every number is a default
    steps_per_run: int
    size: str  # of the job that all ways train; "" where nothing was predicted
    terms: Terms
    told: tuple[Term, ...]
    ways: tuple[Way, ...]
    sheets: tuple[Sheet, ...]
    shown: tuple[int, ...]  # the ways put side by side
    slots: tuple[tuple[str, int], ...]  # where each stands on the page; a way may stand in several
    best: int | None
    reference: int | None
    tight: int | None  # the cheapest with the recommended plan
    saved_percent: float | None
    saved_interval_percent: Interval | None
    chance_percent: float | None  # of saving anything
    payback_years: float | None
    payback: str  # as money.payback names it; "" where it is not known
    swings: tuple[Swing, ...] = ()
    asked: tuple[str, ...] = ()
    risks: tuple[Risk, ...] = ()
    stages: tuple[Stage, ...] = ()
    why_none: str = ""  # why nothing could be put side by side
    own_limits: bool = False  # the gate is held against limits that the user gave
