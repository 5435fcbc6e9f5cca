"""The decision on how to get training done: the options, called ways (a machine that exists, a purchase, the
cloud, nothing), what each costs, and the numbers that the costs are based on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from memfit.types.result import Interval

# (field of Alternative with a price, name of the Term with the user's own price, field of Terms with the
# factor on the catalog's price)
OFFERS: Final = (
    ("price", "purchase_price", "hardware_factor"),
    ("per_hour", "rental_price", "rental_factor"),
)
# names of terms given by the user that belong to one option, not to all
OWN: Final = ("setup_hours", *(own for _, own, _ in OFFERS))
# Factors on the catalog's price of the best option's machine and of the reference's: the spread between
# sellers. If both have the same price, only the first is used, and it moves both.
PRICE_FACTORS: Final = ("best_price_factor", "reference_price_factor")
DRAWS: Final = 4000  # draws of the uncertain numbers for the interval of the saving


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """Money in two parts: ``usd``, catalog prices in US dollars, and ``own``, amounts in the user's currency,
    which is that of the case file.
    """

    usd: float = 0.0
    own: float = 0.0

    def at(self, per_usd: float) -> float:
        """Return the sum of both parts in the user's currency. ``per_usd``: how many units of it one US
        dollar costs.
        """
        return self.usd * per_usd + self.own


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One number that the decision is based on.

    ``value`` is None if it is unknown. ``unit``: "money" (in the user's currency), "hours", "years", "steps",
    "runs", "factor" or "g/kWh"; "" for ratios and the exchange rate. ``low``, ``high``: its range; if no
    range is known, both equal the value or are None. ``mark``: "measured", "predicted" or "assumed".
    ``date``: of the source, in ISO form, or "".
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
    """Numbers common to all options; see docs/decisions/014-money.md. Money is in the user's currency.

    Costs are added up over ``years``. A machine lasts ``life_years`` and is then replaced.
    ``discount_ratio``: interest per year, by which later payments count less. ``utilisation_ratio``: share of
    a year that a machine can be busy. ``tax_ratio``: tax that cannot be reclaimed, over the price without
    tax. ``support_ratio``: cost of support per year over the purchase price. ``labour_per_hour``: price of a
    working hour of people, 0 if it was not given. ``per_usd``: how many units of the user's currency one US
    dollar costs. Prices of electricity: ``energy_per_kwh``, ``levy_per_kwh`` (a surcharge), and
    ``basic_per_kw_month`` (a charge by power). ``co2_g_per_kwh``: grams of CO2 per kWh. ``pue_ratio``:
    electricity of the whole site over that of its computers, in the user's server room;
    ``desk_pue_ratio`` and ``cloud_pue_ratio``: at a desk and in a cloud, None: as ``pue_ratio``.

    ``value_per_run``: what a finished run is worth to the user; None: unknown. ``longest_run_hours``: an
    option whose run takes longer does not count as doing the work; None: no limit. ``hardware_factor`` and
    ``rental_factor`` multiply the catalog's purchase and rental prices; ``plain_time_factor`` and
    ``recommended_time_factor`` multiply the predicted hours of plain training and of the recommended plan.
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
    desk_pue_ratio: float | None = None
    cloud_pue_ratio: float | None = None
    value_per_run: float | None = None
    longest_run_hours: float | None = None
    hardware_factor: float = 1.0
    rental_factor: float = 1.0
    plain_time_factor: float = 1.0
    recommended_time_factor: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """One option of the decision: a machine with a plan, or doing nothing.

    ``kind``: "existing", "purchase", "cloud" (to rent) or "nothing". ``plan``: the plan's label. ``plain``:
    whether it is plain training. ``price`` (to buy) and ``per_hour`` (to rent) are for one machine with all
    its devices; None if the kind has no such price. ``price_low_ratio`` and ``price_high_ratio``: the lowest
    and the highest price between sellers, over ``price`` or ``per_hour``; 1 for a price of the user.
    ``power_w``: of the machine's devices and host, without the site's overhead (PUE); None if unknown.
    ``hours``: duration of one run. ``storage_per_month``: price per month of storing the data in the cloud.
    """

    kind: str
    machine: str = ""
    plan: str = ""
    plain: bool = True
    hours: float = 0.0
    # how many runs the machine does at once, each on one of its devices, if the prediction is for one device
    parallel_count: int = 1
    # "desk" or "cloud": where the machine is, for its PUE; "": the server room, or the user's own PUE
    site: str = ""
    # catalog device whose price it has, and how many; "": the price is the user's, or it has none
    priced_device: str = ""
    device_count: int = 1
    price_low_ratio: float = 1.0
    price_high_ratio: float = 1.0
    # whether memfit predicted the hours, so that a time factor of Terms applies; False: the user gave them
    predicted: bool = True
    power_w: float | None = None
    price: Amount | None = None
    per_hour: Amount | None = None
    storage_per_month: float = 0.0
    # working hours of people to set up the machine and adopt the plan; unknown ones count as 0
    setup_hours: float = 0.0
    operating_hours: float = 0.0  # working hours of people per year
    most_machines: int | None = None  # how many of these machines there are; None: any number
    embodied_kg: float | None = None  # of all devices of one machine
    # energy of one plain training run on it; None if it is not predicted or plain training does not fit
    plain_j: float | None = None
    of_catalog: bool = True  # False: the user named the machine
    untried: tuple[str, ...] = ()  # techniques that can change results and were not trained in the PoC
    unknown: tuple[str, ...] = ()  # keys of the user's case that are missing; missing hours count as zero
    own_power: bool = False  # whether the watts were given by the user
    plan_hours: float = 0.0  # the hours within setup_hours that adopting the plan takes
    memory_bytes: Interval | None = None  # predicted, on one device
    usable_bytes: float | None = None  # memory of one device; None: unknown
    # probability that the plan fits the device; below 100 the upper end of memory_bytes does not fit
    fit_percent: float = 100.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CostSheet:
    """What one option costs, in the user's currency.

    ``setup``, ``purchase`` and their sum ``initial`` are spent at the beginning. ``running_per_year`` is the
    sum of electricity, rental, people and support per year. ``residual``: what the machines are worth at the
    end, not discounted. ``present_cost``: the discounted costs of all years of the decision, less the
    discounted residual. ``cost_per_run``: the present cost over the number of all runs.
    ``net_present_value``: the discounted value of all runs less the present cost. ``operation_g`` and
    ``embodied_g``: grams of CO2 per run from electricity and from the manufacture of the devices; ``sci_g``:
    their sum.

    A field is None if it depends on an unknown power draw. ``net_present_value`` is also None if the value of
    a run is unknown, ``embodied_g`` and ``sci_g`` if the CO2 of the devices' manufacture is.
    """

    machines: int  # number needed
    hours_per_year: float  # of all runs together
    kwh_per_run: float | None
    setup: float
    purchase: float  # of the first machines, with tax
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
    sci_g: float | None
    # whether the available machines can do all runs of a year, and a run is not longer than allowed; True for
    # doing nothing
    enough: bool

    def saved_percent(self, reference: CostSheet) -> float | None:
        """Return by how many percent the present cost is below that of ``reference``; negative if it is
        above. Return None if one of the two is unknown, or if that of ``reference`` is not positive.
        """
        cost, reference_cost = self.present_cost, reference.present_cost
        return (
            None
            if cost is None or reference_cost is None or reference_cost <= 0
            else 100 * (1 - cost / reference_cost)
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Swing:
    """What the best option saves over the reference, in percent, with the term ``name`` at the low and at the
    high end of its range, all other terms unchanged.
    """

    name: str
    low_percent: float
    high_percent: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Risk:
    """One risk of the decision.

    ``evidence``: key of a text in the word catalogs; ``values`` fills its placeholders. ``level``: "low",
    "some", "high" or "unknown". ``source``: the section of the report's page with the evidence, such as
    "#runs", or a citation; "" if there is none. ``loss``: the most that can be lost by the pilot, one run
    before anything is bought, in the user's currency; None: unknown, or not a matter of money.
    """

    kind: str
    level: str
    evidence: str
    values: Mapping[str, str | float | None] = dataclasses.field(default_factory=dict)
    source: str = ""
    loss: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage of the roll-out. ``name``: "poc" (proof of concept), "pilot" (one run before anything is
    bought) or "full". ``state``: "done", "next", "stopped" (a gate before it was not passed) or "later".
    ``spent`` and ``to_spend`` are in the user's currency, None if unknown. ``memory_bytes`` is that of one
    device.
    """

    name: str
    state: str
    machine: str = ""
    plan: str = ""
    engine: str = ""
    memory_bytes: Interval | None = None
    step_s: Interval | None = None
    spent: float | None = None
    to_spend: float | None = None
    # what must hold before the next stage: (name, what was found, limit, whether it holds)
    gates: tuple[tuple[str, str, str, bool], ...] = ()
    most: float | None = None  # like to_spend, with every number at the most expensive end of its range
    # keys of unknown working hours, or of their unknown price, that the money does not include
    unpaid: tuple[str, ...] = ()
    # stop above this memory: the prediction's upper end, or all memory of the device if that is less
    stop_bytes: float | None = None
    # what to go back to if it fails: "plain" (on the same machine), "reference" (another machine with plain
    # training) or "stay" (what is done today)
    back: str = ""
    back_way: int | None = None  # index of the option to go back to; None: "stay"
    way: int | None = None  # index of the option whose money it is, for stages to come
    # name of a term -> the end of its range at which `most` is highest
    ends: Mapping[str, float] = dataclasses.field(default_factory=dict)
    energy_j: float | None = None  # energy paid for in a stage that is done
    hours: float = 0.0  # working hours of people in a stage that is done


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The decision as a whole.

    ``ways[i]`` is an option and ``sheets[i]`` its costs. The fields ``shown``, ``slots``, ``best``,
    ``reference`` and ``recommended`` hold indices i; None: there is no such option. An option does all the
    work if its machines can do all runs of a year and no run takes longer than allowed (`CostSheet.enough`).
    ``best``: the option with the lowest present cost of those that do all the work, of which doing nothing is
    never one. ``reference``, with which it is compared: the cheapest purchase or rental with plain training
    that does all the work. ``recommended``: the cheapest option with the recommended plan that does it.
    ``currency``: the currency's code; ``symbol``, ``decimals``: how amounts are written. ``payback_years``
    and ``payback``: the years and the kind that `money.payback` returns.
    """

    currency: str
    symbol: str
    decimals: int
    place: str
    case: str  # the user's file; "" if every number is a default
    steps_per_run: int
    size: str  # size of the job that all ways train; "" if nothing was predicted
    terms: Terms
    numbers: tuple[Term, ...]  # all numbers that the decision is based on
    ways: tuple[Alternative, ...]
    sheets: tuple[CostSheet, ...]
    shown: tuple[int, ...]  # the options compared side by side
    slots: tuple[tuple[str, int], ...]  # (column on the page, index); an option may be in several columns
    best: int | None
    reference: int | None
    recommended: int | None
    saved_percent: float | None  # saving of best over reference
    saved_interval_percent: Interval | None
    chance_percent: float | None  # probability of a saving
    payback_years: float | None
    payback: str
    swings: tuple[Swing, ...] = ()  # largest first
    asked: tuple[str, ...] = ()  # keys of the user's case that a complete answer needs
    risks: tuple[Risk, ...] = ()
    stages: tuple[Stage, ...] = ()
    why_none: str = ""  # why there is no best: no_offers, none_priced or none_does_it
    own_limits: bool = False  # whether the gate uses limits given by the user
    # name of the typical project that the money is for, see projects.toml; "" with a case file or without one
    project: str = ""
    # share of a run that the pilot trains; below 1 for a project that is a single long run
    pilot_ratio: float = 1.0
    # by option: sizes that a run trains one after the other -> share of its time; empty if there is only one
    phase_time_ratio: tuple[Mapping[str, float], ...] = ()
    # whether currency, place and working hours are defaults, because there is no case file
    by_default: bool = False
    # lowest and highest saving if any one of the catalog's prices is left out; None: unknown, or none is used
    without_a_price_percent: Interval | None = None
