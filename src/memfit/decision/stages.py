"""The stages PoC, pilot and full: what each has cost or will cost, and the gate between PoC and pilot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from memfit.cost.money import J_PER_KWH
from memfit.decision import monte_carlo, rollout_gates
from memfit.decision.alternatives import usable_bytes
from memfit.decision.money import HOURS_PER_YEAR, run_hours, sheet
from memfit.store import exchange
from memfit.types.decision import OWN, PRICE_FACTORS, Alternative, Amount, Decision, Stage, Terms
from memfit.types.errors import UserError
from memfit.types.result import Offer, Poc


def stages(
    poc: Poc,
    decision: Decision,
    offers: Sequence[Offer],
    named: Mapping[str, str],
    limits: rollout_gates.Gates,
) -> tuple[Stage, ...]:
    """Return the stages "poc" (proof of concept), "pilot" and "full". The gates, which must hold before the
    pilot, are part of the first.

    `named`: "pilot" or "full" -> machine chosen by the user; the stage has the option on it that
    `_cheapest_on` returns, or none. If no machine was chosen, the pilot has the option that `pilot` returns,
    and "full" the decision's best one. `offers`: predictions for machines; a stage has memory, step time and
    engine of the one for its machine. `limits`: those of the gates. Returns no stages for a PoC that makes no
    valid record, for example because it did not finish: without a record no gate holds.
    """
    try:
        record = exchange.of_poc(poc)
    except UserError:
        return ()
    gates = rollout_gates.evaluate(record, limits)
    energy_j, hours = _energy_j(poc, decision.terms), (poc.effort.attended_minutes or 0.0) / 60
    poc_stage = Stage(
        name="poc",
        state="done",
        machine=poc.machine,
        plan=poc.search.recommended.estimate.plan.label if poc.search.recommended else "",
        engine=record.recommended.engine,
        spent=None if energy_j is None else running_cost(energy_j, hours, decision.terms),
        to_spend=0.0,
        unpaid=() if poc.effort.attended_minutes == 0 else _unpaid_poc(poc, decision),
        gates=tuple(gate.words for gate in gates),
        energy_j=energy_j,
        hours=hours,
    )
    state = "next" if all(gate.holds for gate in gates) else "stopped"
    pilot_way = _cheapest_on(decision, named.get("pilot")) or (
        pilot(decision) if "pilot" not in named else None
    )
    full_way = _cheapest_on(decision, named.get("full"))
    if full_way is None and "full" not in named and decision.best is not None:
        full_way = decision.ways[decision.best]
    pilot_stage = _stage("pilot", state, named.get("pilot", ""), pilot_way, offers, decision)
    full_stage = _stage("full", "later", named.get("full", ""), full_way, offers, decision)
    pilot_stage = dataclasses.replace(
        pilot_stage,
        to_spend=pilot_cost(decision, pilot_way),
        most=pilot_most(decision, pilot_way),
        ends=_expensive_ends(decision),
    )
    return (
        poc_stage,
        pilot_stage,
        dataclasses.replace(full_stage, to_spend=cost_after_pilot(decision, full_way, pilot_way)),
    )


def _unpaid_poc(poc: Poc, decision: Decision) -> tuple[str, ...]:
    if poc.effort.attended_minutes is None:
        return ("poc.attended_minutes",)
    has_price = any(t.name == "labour_per_hour" and t.value is not None for t in decision.numbers)
    return () if has_price else ("money.labour_per_hour",)


def cost_after_pilot(
    decision: Decision, whole: Alternative | None, trial: Alternative | None
) -> float | None:
    """Return the present cost of the option ``whole`` of the full stage, less what a pilot with the option
    ``trial`` has already paid. None if there is no ``whole`` or its cost is unknown.

    The pilot pays the working hours to adopt the plan, and those to set up the machine if both options have
    the same machine and kind (existing, purchase or cloud). If there is no ``trial`` or its cost is unknown,
    nothing is subtracted.
    """
    cost = None if whole is None else decision.sheets[decision.ways.index(whole)].present_cost
    if cost is None or whole is None or trial is None or pilot_cost(decision, trial) is None:
        return cost
    same_machine = (trial.kind, trial.machine) == (whole.kind, whole.machine)
    paid_hours = min(trial.plan_hours, whole.plan_hours)
    paid_hours += whole.setup_hours - whole.plan_hours if same_machine else 0.0
    return cost - paid_hours * decision.terms.labour_per_hour


def _cheapest_on(decision: Decision, machine: str | None) -> Alternative | None:
    """Return the cheapest option of known cost on this machine; an existing one is preferred to a rented one,
    and that to one to be bought, whatever they cost. None if there is none.
    """
    order = ("existing", "cloud", "purchase")
    matches = [(w, s) for w, s in zip(decision.ways, decision.sheets, strict=True) if w.machine == machine]
    candidates = [
        (order.index(w.kind), s.present_cost, w)
        for w, s in matches
        if w.kind in order and s.present_cost is not None
    ]
    return min(candidates, key=lambda entry: entry[:2])[2] if candidates else None


def _stage(
    name: str, state: str, machine: str, way: Alternative | None, offers: Sequence[Offer], decision: Decision
) -> Stage:
    """Return a stage without its costs.

    ``way``: its option, or None if there is none, for example because the machine has no price. Only then is
    ``machine`` used; the predictions for it are shown all the same.
    """
    machine = way.machine if way is not None else machine
    fitting_offers = [o for o in offers if o.machine == machine and o.fits]
    matching_offers = [o for o in fitting_offers if way is None or o.plain is way.plain]
    offer = min(matching_offers, key=lambda o: o.plain, default=None)
    back, back_way = _fallback(decision, machine, way is not None and way.plain)
    usable = usable_bytes(machine)
    return Stage(
        name=name,
        state=state,
        machine=machine,
        plan=way.plan if way is not None else offer.plan if offer is not None else "",
        engine=offer.engine if offer else "",
        memory_bytes=offer.memory_bytes if offer else None,
        step_s=offer.step_s if offer else None,
        unpaid=tuple(n for n in way.unknown if not n.endswith("power_w")) if way is not None else (),
        stop_bytes=min(offer.memory_bytes.high, usable or math.inf) if offer else None,
        back=back,
        back_way=back_way,
        way=None if way is None else decision.ways.index(way),
    )


def _fallback(decision: Decision, machine: str, plain: bool) -> tuple[str, int | None]:
    """Return (what to go back to if a stage on ``machine`` fails, index of that option or None).

    ``plain``: whether the stage itself is plain training. The first that applies:

    - ("stay", None), what is done today, if ``plain``
    - ("plain", index): plain training on the same machine, if it surely fits there and does all the work
    - ("reference", index): the cheapest plain training on a machine that is bought or rented, if that is
      another machine
    - ("stay", None)
    """
    plain_here = [
        i
        for i, w in enumerate(decision.ways)
        if w.machine == machine and w.plain and decision.sheets[i].enough
    ]
    certain = [i for i in plain_here if decision.ways[i].fit_percent == 100]
    if certain and not plain:
        return "plain", certain[0]
    elsewhere = decision.reference is not None and decision.ways[decision.reference].machine != machine
    return ("reference", decision.reference) if elsewhere and not plain else ("stay", None)


def pilot(decision: Decision) -> Alternative | None:
    """Return the option of the pilot: one run before anything is bought, on an existing or rented machine.
    None if there is none.

    It is the best option if that is not a purchase. Otherwise it is a rental with the same kind of plan
    (plain or recommended) as the best option: on the best option's machine if the decision has such a rental,
    else on any machine. Of several, it is the one with the lowest rent for one run.
    """
    if decision.best is None:
        return None
    best = decision.ways[decision.best]
    if best.kind != "purchase":
        return best
    rentals = [w for w in decision.ways if w.kind == "cloud" and w.plain is best.plain]
    same_machine = [w for w in rentals if w.machine == best.machine]
    one_run = dataclasses.replace(decision.terms, runs_per_year=1, years=1)
    return min(same_machine or rentals, key=lambda w: sheet(w, one_run).rental_per_year, default=None)


def pilot_cost(decision: Decision, way: Alternative | None) -> float | None:
    """Return the cost of a pilot with the option ``way``: setup and one run, or that share of one which the
    decision's project has for its pilot. Monthly charges are paid for each month begun.

    None if there is no option, if it is a purchase, or if the cost of electricity is unknown.
    """
    return (
        None
        if way is None or way.kind == "purchase"
        else _one_run(_in_pilot(way, decision), decision.terms)[0]
    )


def pilot_most(decision: Decision, way: Alternative | None) -> float | None:
    """Return the highest cost of a pilot with the option ``way``: setup and one run with every number at the
    most expensive end of its range, plus people's hours of operating the machine in each month begun.

    None if there is no option, if it is a purchase, or if the cost of electricity is unknown.
    """
    if way is None or way.kind == "purchase":
        return None
    ends = _expensive_ends(decision)
    user_values = {t.name: t.value for t in decision.numbers if t.name in OWN and t.value is not None}
    expensive_terms = monte_carlo.replace_numbers(
        decision.terms, {n: end for n, end in ends.items() if n not in OWN}
    )
    trial = _in_pilot(way, decision)
    expensive_option = monte_carlo.with_draw(trial, ends, user_values, decision.terms, way.price_high_ratio)
    cost, people = _one_run(expensive_option, expensive_terms)
    return None if cost is None else cost + people


def _in_pilot(way: Alternative, decision: Decision) -> Alternative:
    return dataclasses.replace(way, hours=way.hours * decision.pilot_ratio)


def _expensive_ends(decision: Decision) -> dict[str, float]:
    """Return {name of a number: most expensive end of its range}: the low end of utilisation_ratio, the high
    end of all others. Numbers without a range are left out, and so are the factors on prices, because the
    pilot's machine has a spread between sellers of its own.
    """
    spans = monte_carlo.ranges_of(decision.numbers).items()
    return {
        name: span.low if name == "utilisation_ratio" else span.high
        for name, span in spans
        if name not in PRICE_FACTORS
    }


def _one_run(way: Alternative, base_terms: Terms) -> tuple[float | None, float]:
    """Return (cost of setup, electricity and rental; cost of operating hours) of one run. Charges per month
    and the operating hours per year are counted for each month begun. Return (None, 0) if the cost of
    electricity is unknown.
    """
    year_share = max(1, math.ceil(12 * run_hours(way, base_terms) / HOURS_PER_YEAR)) / 12
    basic = base_terms.basic_per_kw_month
    terms = dataclasses.replace(
        base_terms,
        runs_per_year=1,
        years=1,
        basic_per_kw_month=Amount(usd=basic.usd * year_share, own=basic.own * year_share),
    )
    costs = sheet(dataclasses.replace(way, storage_per_month=way.storage_per_month * year_share), terms)
    if costs.electricity_per_year is None:
        return None, 0.0
    return (
        costs.setup + costs.electricity_per_year + costs.rental_per_year,
        costs.people_per_year * year_share,
    )


def running_cost(energy_j: float, hours: float, terms: Terms) -> float:
    """Return the cost of ``energy_j`` joules of electricity with tax, plus that of ``hours`` working hours of
    people. If the price of a working hour is unknown, these cost nothing.
    """
    per_kwh = terms.energy_per_kwh.at(terms.per_usd) + terms.levy_per_kwh.at(terms.per_usd)
    return energy_j / J_PER_KWH * per_kwh * (1 + terms.tax_ratio) + hours * terms.labour_per_hour


def _energy_j(poc: Poc, terms: Terms) -> float | None:
    """Return the joules that the PoC's runs drew from the grid, including the overhead of the site (PUE).

    For a run whose energy was not measured, it is the power of plain training as predicted, times the
    duration of the run. None if there is such a run, but no predicted power.
    """
    estimate = poc.search.baseline.estimate
    power_w = estimate.energy_j / estimate.step_s.value if estimate.energy_j and estimate.step_s else None
    joules = 0.0
    for run in (*poc.runs, *([poc.control] if poc.control else [])):
        measured_j = run.measurement.energy_j
        if measured_j is None and power_w is None:
            return None
        joules += measured_j if measured_j is not None else (power_w or 0.0) * run.measurement.wall_s
    return joules * terms.pue_ratio
