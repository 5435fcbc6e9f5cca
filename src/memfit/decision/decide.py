"""``decide``: turn a PoC and the user's figures into one decision."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from memfit import catalog
from memfit.decision import money, monte_carlo, rollout_gates
from memfit.decision.alternatives import AlternativeInputs, missing_inputs
from memfit.decision.assumptions import Assumptions, collect_assumptions
from memfit.decision.case import DecisionCase, term
from memfit.decision.price_rows import saving_without_a_price
from memfit.decision.projects import project_of
from memfit.decision.risks import risks
from memfit.decision.stages import stages
from memfit.types.decision import Alternative, CostSheet, Decision, Swing, Term
from memfit.types.errors import UserError
from memfit.types.plan import Plan
from memfit.types.result import Interval, Offer, Poc
from memfit.verify.aggregate import ok_runs, step_s


def decide(
    poc: Poc,
    case: DecisionCase,
    *,
    more: Sequence[Offer] = (),
    name: str = "",
    named: Mapping[str, str] | None = None,
    limits: rollout_gates.Gates | None = None,
    by_default: bool = False,
) -> Decision:
    """Return the decision: the options, their costs, the saving and how certain it is, stages and risks.

    `more`: predictions made after the proof of concept (PoC); they replace the PoC's predictions for the
    same machine, kind of plan (plain or recommended) and size of the job. The size of the decision is that
    of the last in `more`, else of the PoC's first. Predictions of other sizes are used only if they are
    phases of a typical project. `name`: path of the case file; "" without one. `named`: stage ("pilot" or
    "full") -> machine that the user chose for it. `limits`: of the gate before the pilot; None: the default
    limits. `by_default`: whether `case` holds defaults and not the user's figures; the money is then for a
    typical project of the job, if the catalog has one. Raises UserError for a case that names an unknown
    currency, place, tariff or supplier, contradicts itself, has an implausible exchange rate, lacks the hours
    or price of a machine, or gives figures of a machine that it does not name.
    """
    size = more[-1].size if more else poc.offers[0].size if poc.offers else ""
    offers_by_machine = {(o.machine, o.plain, o.size): o for o in (*poc.offers, *more)}
    all_offers = list(offers_by_machine.values())
    project = project_of(poc.job_name, size) if by_default else None
    # predictions of the same work
    offers = [o for o in all_offers if o.size == size] if project is None else project.whole_runs(all_offers)
    assumptions = collect_assumptions(
        case,
        place=_place(poc.place),
        offers=offers,
        step_errors=_step_errors(poc),
        project=project.work if project is not None else None,
    )
    attended_minutes = poc.effort.attended_minutes
    setup_figure = case.effort.setup_hours
    plan_hours = (
        setup_figure.value
        if setup_figure is not None
        else None
        if attended_minutes is None
        else attended_minutes / 60
    )
    labour_known = case.money.labour_per_hour is not None
    inputs = AlternativeInputs(
        case=case,
        offers=offers,
        steps_per_run=assumptions.steps_per_run,
        plan_hours=plan_hours,
        labour_known=labour_known,
        trained=poc.search.recommended.estimate.plan if poc.search.recommended else Plan(),
    )
    ways = inputs.build_options()
    sheets = tuple(money.sheet(way, assumptions.terms) for way in ways)
    if setup_figure is not None:
        hours = term("setup_hours", setup_figure, "hours")
    else:
        hours = Term(
            name="setup_hours", value=plan_hours, unit="hours", mark="measured", source="counted in the PoC"
        )
    decision = _without_stages(
        assumptions, ways, sheets, (*assumptions.numbers, hours), case=case, name=name, size=size
    )
    gates = limits or rollout_gates.Gates()
    decision = dataclasses.replace(
        decision,
        own_limits=gates != rollout_gates.Gates(),
        project=project.name if project is not None else "",
        pilot_ratio=project.pilot_ratio if project is not None else 1.0,
        phase_time_ratio=tuple(project.time_ratios(all_offers, way.machine, plain=way.plain) for way in ways)
        if project is not None
        else (),
        by_default=by_default,
    )
    decision = dataclasses.replace(decision, stages=stages(poc, decision, offers, named or {}, gates))
    return dataclasses.replace(decision, risks=risks(poc, decision))


def _step_errors(poc: Poc) -> Mapping[bool, float]:
    """Return measured over predicted step time in the completed runs of the proof of concept, by whether the
    plan is plain training (True) or the recommended plan (False). A plan for which one of the times is
    unknown is absent.
    """
    errors = {}
    for role, plain in (("baseline", True), ("recommended", False)):
        runs = ok_runs(r for r in poc.runs if r.spec.role == role)
        measured, predicted = step_s(runs), next((r.predicted_step_s for r in runs), None)
        if measured and predicted:
            errors[plain] = measured / predicted
    return errors


def _place(name: str) -> str:
    """Return the catalog's name of the place; "world" if ``name`` is "" or the catalog does not have it, as
    for a place that a machine file defines.
    """
    try:
        return catalog.place(name or "world").name
    except UserError:
        return "world"


def _cheapest_or_unknown(
    ways: Sequence[Alternative], sheets: Sequence[CostSheet], indices: Sequence[int]
) -> int | None:
    """Return the index of the cheapest of the options ``indices`` that does all the work. If none of known
    cost does, return the first option of unknown cost, so that the user sees it; None if there is none.
    """
    unknown = [i for i in indices if sheets[i].present_cost is None]
    best = money.cheapest(ways, sheets, indices)
    return best if best is not None or not unknown else unknown[0]


def _why_none(sheets: Sequence[CostSheet]) -> str:
    """Return why there is no best option: "no_offers" if there is only the option to do nothing,
    "none_priced" if an option that does all the work has an unknown cost, else "none_does_it"."""
    if len(sheets) == 1:
        return "no_offers"
    return "none_priced" if any(s.enough and s.present_cost is None for s in sheets) else "none_does_it"


def _without_stages(
    assumptions: Assumptions,
    ways: Sequence[Alternative],
    sheets: Sequence[CostSheet],
    numbers: Sequence[Term],
    *,
    case: DecisionCase,
    name: str,
    size: str,
) -> Decision:
    """Return the decision without its stages and risks.

    The best option is the one with the lowest present cost of those that do all the work. The reference, with
    which it is compared, is the cheapest of these with plain training on a machine that is bought or rented.
    ``numbers``: all numbers that the decision is based on. ``name``: path of the case file. ``size``: size of
    the job.
    """
    existing = [i for i, w in enumerate(ways) if w.kind == "existing"]
    by_kind = {kind: [i for i, w in enumerate(ways) if w.kind == kind] for kind in ("purchase", "cloud")}
    user_by_kind = {kind: [i for i in indices if not ways[i].of_catalog] for kind, indices in by_kind.items()}
    best, reference = money.best_and_reference(ways, sheets)
    candidates = [
        *zip(("existing", "existing_plain"), existing, strict=False),
        *(
            (f"own_{kind}", _cheapest_or_unknown(ways, sheets, indices))
            for kind, indices in user_by_kind.items()
        ),
        *((kind, money.cheapest(ways, sheets, indices)) for kind, indices in by_kind.items()),
        ("nothing", 0),
        ("reference", reference),
    ]
    slots = tuple((slot, index) for slot, index in candidates if index is not None)
    shown_indices = tuple(dict.fromkeys(index for _, index in slots))
    saving = interval = chance = years = None
    kind, swings, without_a_price = "", tuple[Swing, ...](), None
    if best is not None and reference is not None:
        pair = ways[best], ways[reference]
        saving = sheets[best].saved_percent(sheets[reference])
        kind, years = money.payback(sheets[best], sheets[reference], assumptions.terms.life_years)
        numbers = (*numbers, *monte_carlo.price_factors(*pair))
        spread = monte_carlo.interval(*pair, assumptions.terms, numbers)
        interval, chance = spread if spread is not None else (None, None)
        without_a_price = saving_without_a_price(ways, sheets, assumptions.terms)
        interval = _hull(interval, without_a_price)
        swings = monte_carlo.tornado(*pair, assumptions.terms, numbers)
    return Decision(
        currency=assumptions.currency.code,
        symbol=assumptions.currency.symbol,
        decimals=assumptions.currency.decimals,
        place=assumptions.place,
        case=name,
        size=size,
        steps_per_run=assumptions.steps_per_run,
        terms=assumptions.terms,
        numbers=tuple(numbers),
        ways=tuple(ways),
        sheets=tuple(sheets),
        shown=shown_indices,
        slots=slots,
        best=best,
        reference=reference,
        recommended=money.cheapest(ways, sheets, [i for i, w in enumerate(ways) if not w.plain]),
        saved_percent=saving,
        saved_interval_percent=interval,
        chance_percent=chance,
        payback_years=years,
        payback=kind,
        swings=swings,
        asked=missing_inputs([ways[i] for i in shown_indices], case),
        why_none="" if best is not None else _why_none(sheets),
        without_a_price_percent=without_a_price,
    )


def _hull(interval: Interval | None, other: Interval | None) -> Interval | None:
    """Return ``interval``, widened so that it contains ``other``; ``interval`` if one of them is None."""
    if interval is None or other is None:
        return interval
    return dataclasses.replace(
        interval, low=min(interval.low, other.low), high=max(interval.high, other.high)
    )
