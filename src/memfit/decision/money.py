"""What an option of the decision costs: exactly the formulas of docs/decisions/014-money.md.

The sliders of the report's page use the same formulas (report/decision.js).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from memfit.types.decision import Alternative, CostSheet, Terms

HOURS_PER_YEAR: Final = 8760


def sheet(way: Alternative, terms: Terms) -> CostSheet:
    """Return what an option costs in the currency of the case, and its energy and emissions.

    If ``power_w`` is unknown, what depends on it is None. The costs of a rental do not depend on it, because
    its price includes electricity. Doing nothing costs nothing and yields nothing.
    """
    does_work = way.kind != "nothing"
    hours = run_hours(way, terms)
    machine_hours = hours_per_run(way, terms)
    hours_per_year = machine_hours * terms.runs_per_year
    machines = machines_needed(hours_per_year, terms) if does_work else 0
    tax_factor = 1 + terms.tax_ratio
    meter_kw = None if way.power_w is None else way.power_w / 1000 * pue_of(way, terms)
    price = way.price.at(terms.per_usd) * terms.hardware_factor if way.price else 0.0
    purchase = price * machines * tax_factor
    rent_per_hour = way.per_hour.at(terms.per_usd) * terms.rental_factor if way.per_hour else 0.0
    setup = way.setup_hours * terms.labour_per_hour
    pays_electricity = way.kind != "cloud"  # a rental price includes electricity
    electricity = (
        _electricity(meter_kw or 0.0, hours_per_year, machines, terms) * tax_factor
        if pays_electricity
        else 0.0
    )
    cost_known = meter_kw is not None or not pays_electricity or not does_work  # an unknown cost is not zero
    rental = (hours_per_year * rent_per_hour + 12 * way.storage_per_month) * tax_factor
    people = way.operating_hours * terms.labour_per_hour
    support = terms.support_ratio * purchase
    running = electricity + rental + people + support
    purchases, residual = _purchases(purchase, terms)
    annuity_factor = annuity(terms.discount_ratio, terms.years)
    present_cost = (
        setup + purchases + running * annuity_factor - residual / (1 + terms.discount_ratio) ** terms.years
    )
    value = terms.value_per_run
    net_value = (
        None
        if value is None or not cost_known
        else value * terms.runs_per_year * annuity_factor - present_cost
    )
    operation_g = None if meter_kw is None else machine_hours * meter_kw * terms.co2_g_per_kwh
    embodied_g = _embodied(way, machine_hours, terms)
    return CostSheet(
        machines=machines,
        hours_per_year=hours_per_year,
        kwh_per_run=None if meter_kw is None else machine_hours * meter_kw,
        setup=setup,
        purchase=purchase,
        initial=setup + purchase,
        electricity_per_year=electricity if cost_known else None,
        rental_per_year=rental,
        people_per_year=people,
        support_per_year=support,
        running_per_year=running if cost_known else None,
        residual=residual,
        present_cost=present_cost if cost_known else None,
        cost_per_run=present_cost / (terms.runs_per_year * terms.years) if cost_known else None,
        net_present_value=net_value if does_work else 0.0,
        operation_g=operation_g if does_work else 0.0,
        embodied_g=embodied_g if does_work else 0.0,
        sci_g=(operation_g + embodied_g if operation_g is not None and embodied_g is not None else None)
        if does_work
        else 0.0,
        enough=(way.most_machines is None or machines <= way.most_machines)
        and (terms.longest_run_hours is None or hours <= terms.longest_run_hours),
    )


def run_hours(way: Alternative, terms: Terms) -> float:
    """Return the hours of one run. Predicted hours are multiplied by the time factor of plain training or of
    the recommended plan; hours given by the user are not.
    """
    if not way.predicted:
        return way.hours
    return way.hours * (terms.plain_time_factor if way.plain else terms.recommended_time_factor)


def hours_per_run(way: Alternative, terms: Terms) -> float:
    """Return the hours that a machine is busy for one run: the run's duration over the number of runs that
    the machine does at once, which is at most the number of runs per year.
    """
    at_once = min(way.parallel_count, max(1.0, terms.runs_per_year))
    return run_hours(way, terms) / at_once


def pue_of(way: Alternative, terms: Terms) -> float:
    """Return the PUE (electricity of the whole site over that of its computers) of the option's site: a desk,
    a cloud, or the server room. The server room's also stands in for an unknown one."""
    by_site = {"desk": terms.desk_pue_ratio, "cloud": terms.cloud_pue_ratio}
    ratio = by_site.get(way.site)
    return terms.pue_ratio if ratio is None else ratio


def machines_needed(hours_per_year: float, terms: Terms) -> int:
    """Return how many machines do ``hours_per_year`` hours of work per year if each is busy for
    ``utilisation_ratio`` of the year; at least 1.
    """
    return max(1, math.ceil(hours_per_year / (HOURS_PER_YEAR * terms.utilisation_ratio) - 1e-9))


def annuity(discount_ratio: float, years: int) -> float:
    """Return the present value of paying 1 at the end of each of ``years`` years, at ``discount_ratio``
    interest per year.
    """
    return sum((1 + discount_ratio) ** -t for t in range(1, years + 1))


def _electricity(meter_kw: float, hours: float, machines: int, terms: Terms) -> float:
    per_kwh = terms.energy_per_kwh.at(terms.per_usd) + terms.levy_per_kwh.at(terms.per_usd)
    return hours * meter_kw * per_kwh + 12 * terms.basic_per_kw_month.at(terms.per_usd) * meter_kw * machines


def _purchases(purchase: float, terms: Terms) -> tuple[float, float]:
    """Return (present value of the first purchase and of each replacement after ``life_years``; value of the
    last machines at the end of ``years``, not discounted).

    The value of machines falls linearly to zero over ``life_years``.
    """
    life, years = terms.life_years, terms.years
    purchase_count = math.ceil(years / life)
    present_value = sum(purchase * (1 + terms.discount_ratio) ** -(life * j) for j in range(purchase_count))
    return present_value, purchase * (purchase_count * life - years) / life


def _embodied(way: Alternative, hours: float, terms: Terms) -> float | None:
    """Return the grams of CO2 equivalent of manufacture that one run accounts for: those of one machine's
    devices, times the hours of the run over the hours that the machine works in ``life_years``. None if
    unknown.
    """
    if way.embodied_kg is None:
        return None
    return 1000 * way.embodied_kg * hours / (HOURS_PER_YEAR * terms.utilisation_ratio * terms.life_years)


# -- two options --------------------------------------------------------------------------------------------


def cheapest(ways: Sequence[Alternative], sheets: Sequence[CostSheet], among: Sequence[int]) -> int | None:
    """Return the index of the option with the lowest present cost among those of ``among`` that do all the
    work; the first if several have it, None if there is none.

    Options of unknown cost and doing nothing are not considered.
    """
    costs = {i: sheets[i].present_cost for i in among if sheets[i].enough and ways[i].kind != "nothing"}
    known_costs = {i: cost for i, cost in costs.items() if cost is not None}
    return min(known_costs, key=lambda i: known_costs[i], default=None)


def best_and_reference(
    ways: Sequence[Alternative], sheets: Sequence[CostSheet]
) -> tuple[int | None, int | None]:
    """Return (index of the best option, index of the reference): the cheapest that does all the work, and the
    cheapest with plain training on a machine that is bought or rented. None for one that does not exist.
    """
    reference_ways = [i for i, w in enumerate(ways) if w.plain and w.kind in ("purchase", "cloud")]
    return cheapest(ways, sheets, range(len(ways))), cheapest(ways, sheets, reference_ways)


def payback(sheet: CostSheet, reference: CostSheet, life_years: float = math.inf) -> tuple[str, float | None]:
    """Return (kind, years) of the payback of ``sheet`` against ``reference``. Compared are the costs at the
    beginning (``initial``) and per year (``running_per_year``).

    - ("at once", 0): neither cost is higher than that of ``reference``
    - ("never", None): neither is lower
    - ("years", n): more at the beginning; after n years, the lower cost per year has made up for it
    - ("until", n): less at the beginning; after n years, the higher cost per year has used that up
    - ("", None): a cost per year is unknown

    If one of the two options is a purchase, machines are bought anew after ``life_years``, so n above that is
    not stated: the result is then ("not in life", life_years) instead of "years", and ("all life",
    life_years) instead of "until".
    """
    extra_cost = sheet.initial - reference.initial
    if reference.running_per_year is None or sheet.running_per_year is None:
        return "", None
    saving_per_year = reference.running_per_year - sheet.running_per_year
    if extra_cost <= 0 <= saving_per_year:
        return "at once", 0.0
    if extra_cost >= 0 >= saving_per_year:
        return "never", None
    years, life = (
        extra_cost / saving_per_year,
        life_years if sheet.purchase or reference.purchase else math.inf,
    )
    if years > life:
        return ("not in life" if extra_cost > 0 else "all life"), life
    return ("years" if extra_cost > 0 else "until"), years
