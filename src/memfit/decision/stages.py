"""PoC, pilot, full: what each has cost or will cost, and the gate between them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from memfit import gates, shared
from memfit.cost.money import J_PER_KWH
from memfit.decision.money import HOURS_PER_YEAR, sheet
from memfit.types.decision import Amount, Decision, Stage, Way
from memfit.types.errors import UserError
from memfit.types.result import Offer, Poc


def stages(poc: Poc, made: Decision, offers: Sequence[Offer]) -> tuple[Stage, ...]:
    """Empty for a PoC that did not finish: half a record passes no gate."""
    try:
        record = shared.of_poc(poc)
    except UserError:
        return ()
    held = gates.evaluate(record, gates.Gates())
    passed = all(gate.holds for gate in held)
    first = Stage(
        name="poc",
        state="done",
        machine=poc.machine,
        plan=poc.search.recommended.estimate.plan.label if poc.search.recommended else "",
        engine=record.recommended.engine,
        spent=_spent(poc, made),
        to_spend=0.0,
        gates=tuple((g.name, _told(g.found), g.limit, g.holds) for g in held),
    )
    trial = pilot(made)
    if trial is None or made.best is None:
        return (
            first,
            Stage(name="pilot", state="next" if passed else "stopped"),
            Stage(name="full", state="later"),
        )
    best = made.ways[made.best]
    return (
        first,
        _stage("pilot", "next" if passed else "stopped", trial, offers, pilot_cost(made)),
        _stage("full", "later", best, offers, made.sheets[made.best].present_cost),
    )


def _stage(name: str, state: str, way: Way, offers: Sequence[Offer], cost: float | None) -> Stage:
    offer = next((o for o in offers if o.machine == way.machine and o.plain is way.plain), None)
    return Stage(
        name=name,
        state=state,
        machine=way.machine,
        plan=way.plan,
        engine=offer.engine if offer else "",
        memory_bytes=offer.memory_bytes if offer else None,
        step_s=offer.step_s if offer else None,
        to_spend=cost,
    )


def pilot(made: Decision) -> Way | None:
    """One run before anything is bought: on the machine that there is, or rented; the best way's machine and
    plan if that is to be had so, else the cheapest rental with its plan."""
    if made.best is None:
        return None
    best = made.ways[made.best]
    if best.kind != "purchase":
        return best
    rented = [w for w in made.ways if w.kind == "cloud" and w.plain is best.plain]
    same = [w for w in rented if w.machine == best.machine]
    one_run = dataclasses.replace(made.terms, runs_per_year=1, years=1)
    return min(same or rented, key=lambda w: sheet(w, one_run).rental_per_year, default=None)


def pilot_cost(made: Decision) -> float | None:
    """Set-up and one run, with the monthly charges of the months that it begins; None where a pilot would
    need the purchase first."""
    way = pilot(made)
    if way is None:
        return None
    part = max(1, math.ceil(12 * way.hours / HOURS_PER_YEAR)) / 12
    basic = made.terms.basic_per_kw_month
    terms = dataclasses.replace(
        made.terms, runs_per_year=1, years=1,
        basic_per_kw_month=Amount(usd=basic.usd * part, own=basic.own * part),
    )  # fmt: skip
    once = sheet(dataclasses.replace(way, storage_per_month=way.storage_per_month * part), terms)
    return once.setup + once.electricity_per_year + once.rental_per_year


def _spent(poc: Poc, made: Decision) -> float | None:
    """Electricity of the PoC's runs, and its hours of labour where they were counted and have a price."""
    terms = made.terms
    joules = [r.measurement.energy_j for r in poc.runs if r.measurement.energy_j is not None]
    per_kwh = terms.energy_per_kwh.at(terms.per_usd) + terms.levy_per_kwh.at(terms.per_usd)
    power = sum(joules) / J_PER_KWH * terms.pue_ratio * per_kwh * (1 + terms.tax_ratio)
    minutes = poc.effort.attended_minutes
    if not joules:
        return None
    return power + (minutes or 0.0) / 60 * terms.labour_per_hour


def _told(found: float | bool | str | None) -> str:
    """As `memfit scale` prints it; "" was not measured."""
    if found is None:
        return ""
    if isinstance(found, bool):
        return "yes" if found else "no"
    return f"{found:.4g}" if isinstance(found, float) else found
