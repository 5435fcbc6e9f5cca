"""The decision: ways to get the work done, what each costs, and the numbers it is based on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from memfit.types.result import Interval

# (a way's price, the name of the user's own offer for it, the factor on the catalog's price).
OFFERS: Final = (
    ("price", "purchase_price", "hardware_factor"),
    ("per_hour", "rental_price", "rental_factor"),
)
# user-given numbers that belong to a way, not to the common terms
OWN: Final = ("setup_hours", *(own for _, own, _ in OFFERS))
DRAWS: Final = 4000  # draws of the uncertain numbers for the interval of the saving


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """Money in two parts: catalog prices in US dollars, and amounts given by the user in the currency of the
    case.
    """

    usd: float = 0.0
    own: float = 0.0

    def at(self, per_usd: float) -> float:
        """Return the amount in the currency of the case; ``per_usd`` is its price of one US dollar."""
        return self.usd * per_usd + self.own


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One number that the decision is based on.

    ``mark``: measured, predicted or assumed. An unknown value is None, and the user is asked for it. ``low``
    and ``high`` equal the value if no range is known.
    """

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
    """Numbers common to all ways; see docs/decisions/014-money.md.

    ``labour_per_hour`` is 0 if it was not given.
    """

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
    """One way to do the work.

    ``kind``: existing, purchase, cloud or nothing. Prices are for one machine with all its devices.
    ``power_w`` is for its devices and host, before PUE. ``hours``: duration of one run.
    """

    kind: str
    machine: str = ""
    plan: str = ""
    plain: bool = True
    hours: float = 0.0
    # whether the hours are predicted by memfit and scale with a time factor; False: given by the user
    predicted: bool = True
    power_w: float | None = None
    price: Amount | None = None
    per_hour: Amount | None = None
    storage_per_month: float = 0.0
    setup_hours: float = 0.0  # of the machine and the plan, as far as they are known
    operating_hours: float = 0.0  # per year
    most_machines: int | None = None
    embodied_kg: float | None = None  # of all devices of one machine
    # energy of one plain training run on it, if predicted, whether it fits or not
    plain_j: float | None = None
    of_catalog: bool = True
    untried: tuple[str, ...] = ()  # techniques that can change results and were not trained in the PoC
    unknown: tuple[str, ...] = ()  # names of terms that are missing and count as zero
    own_power: bool = False  # whether the watts were given by the user
    plan_hours: float = 0.0  # the plan's part of setup_hours
    memory_bytes: Interval | None = None  # predicted, on one device
    usable_bytes: float | None = None  # memory of the device
    # probability that the plan fits; below 100 the upper end of its memory does not fit
    fit_percent: float = 100.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """What a way costs, in the currency of the case, per year if the name says so, otherwise over all years.

    None if it depends on an unknown power draw.
    """

    machines: int
    hours_per_year: float
    kwh_per_run: float | None
    setup: float
    purchase: float  # first purchase
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
    enough: bool  # whether the available machines can do all runs of a year

    def saved_percent(self, reference: Sheet) -> float | None:
        """Return the saving in percent of the reference's present cost; negative is a loss.

        None if unknown.
        """
        cost, reference_cost = self.present_cost, reference.present_cost
        return (
            None
            if cost is None or reference_cost is None or reference_cost <= 0
            else 100 * (1 - cost / reference_cost)
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Swing:
    """Effect of one term alone on the saving in percent, at both ends of its range."""

    name: str
    low_percent: float
    high_percent: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Risk:
    """One risk of the decision.

    ``evidence`` and ``mitigation`` are keys of the word catalogs; ``values`` fills their placeholders.
    ``level``: low, some, high or unknown. ``loss``: the most that can be lost by going on to the next stage;
    None: unknown.
    """

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
    gates: tuple[tuple[str, str, str, bool], ...] = ()  # (name, found, limit, holds)
    most: float | None = None  # to spend, with every number at its most expensive end
    unpaid: tuple[str, ...] = ()  # working hours that are unknown and not included in the money
    # stop above this memory: the prediction's upper end, or all memory there is
    stop_bytes: float | None = None
    back: str = ""  # what to go back to: "plain" (on the same machine), "reference" or "stay"
    back_way: int | None = None
    way: int | None = None  # index of the way whose money it is, for stages to come
    # the ends of the ranges at which `most` is highest
    ends: Mapping[str, float] = dataclasses.field(default_factory=dict)
    energy_j: float | None = None  # energy paid for in a stage that is done
    hours: float = 0.0  # working hours of people in a stage that is done


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The decision as a whole.

    ``ways`` and ``sheets`` correspond; indices refer to them, None means there is no such way.
    """

    currency: str
    symbol: str
    decimals: int
    place: str
    case: str  # the user's file; "" if every number is a default
    steps_per_run: int
    size: str  # size of the job that all ways train; "" if nothing was predicted
    terms: Terms
    told: tuple[Term, ...]
    ways: tuple[Way, ...]
    sheets: tuple[Sheet, ...]
    shown: tuple[int, ...]  # the ways compared side by side
    slots: tuple[tuple[str, int], ...]  # (slot on the page, index of the way); a way may be in several slots
    best: int | None
    reference: int | None
    tight: int | None  # the cheapest way with the recommended plan
    saved_percent: float | None
    saved_interval_percent: Interval | None
    chance_percent: float | None  # probability of a saving
    payback_years: float | None
    payback: str  # named as in money.payback; "" if unknown
    swings: tuple[Swing, ...] = ()
    asked: tuple[str, ...] = ()
    risks: tuple[Risk, ...] = ()
    stages: tuple[Stage, ...] = ()
    why_none: str = ""  # why nothing could be compared
    own_limits: bool = False  # whether the gate uses limits given by the user
