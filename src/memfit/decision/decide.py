"""``decide``: turn a PoC and the user's figures into one decision."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from memfit import catalog
from memfit.decision import money, monte_carlo, rollout_gates
from memfit.decision.alternatives import Asking, asked
from memfit.decision.assumptions import Told, told
from memfit.decision.case import DecisionCase, term
from memfit.decision.risks import risks
from memfit.decision.stages import stages
from memfit.types.decision import Decision, Sheet, Swing, Term, Way
from memfit.types.errors import UserError
from memfit.types.plan import Plan
from memfit.types.result import Offer, Poc
from memfit.verify.aggregate import ok_runs, step_s


def decide(
    poc: Poc,
    case: DecisionCase,
    *,
    more: Sequence[Offer] = (),
    name: str = "",
    named: Mapping[str, str] | None = None,
    limits: rollout_gates.Gates | None = None,
) -> Decision:
    """Make the decision.

    `more`: predictions made after the PoC, which take precedence over its own. `named`: machines of the
    stages. `limits`: of the gate. Raises UserError.
    """
    size = more[-1].size if more else poc.offers[0].size if poc.offers else ""
    # ways to do the same work
    last = {(o.machine, o.plain): o for o in (*poc.offers, *more) if o.size == size}
    offers = list(last.values())
    known = told(case, place=_place(poc.place), offers=offers, seen=_step_errors(poc))
    counted = poc.effort.attended_minutes
    own = case.effort.setup_hours
    plan_hours = own.value if own is not None else None if counted is None else counted / 60
    labour = case.money.labour_per_hour is not None
    asking = Asking(
        case=case,
        offers=offers,
        steps_per_run=known.steps_per_run,
        plan_hours=plan_hours,
        labour_known=labour,
        trained=poc.search.recommended.estimate.plan if poc.search.recommended else Plan(),
    )
    ways = asking.ways()
    sheets = tuple(money.sheet(way, known.terms) for way in ways)
    if own is not None:
        hours = term("setup_hours", own, "hours")
    else:
        hours = Term(
            name="setup_hours", value=plan_hours, unit="hours", mark="measured", source="counted in the PoC"
        )
    made = _weighed(known, ways, sheets, (*known.numbers, hours), case=case, name=name, size=size)
    held = limits or rollout_gates.Gates()
    made = dataclasses.replace(
        made, stages=stages(poc, made, offers, named or {}, held), own_limits=held != rollout_gates.Gates()
    )
    return dataclasses.replace(made, risks=risks(poc, made))


def _step_errors(poc: Poc) -> Mapping[bool, float]:
    """Return measured over predicted step time of plain training and of the recommended plan, if both are
    known.
    """
    found = {}
    for role, plain in (("baseline", True), ("recommended", False)):
        runs = ok_runs(r for r in poc.runs if r.spec.role == role)
        measured, guess = step_s(runs), next((r.predicted_step_s for r in runs), None)
        if measured and guess:
            found[plain] = measured / guess
    return found


def _place(name: str) -> str:
    """Return the PoC's place, or the world if it was defined by a machine file."""
    try:
        return catalog.place(name or "world").name
    except UserError:
        return "world"


def _own(ways: Sequence[Way], sheets: Sequence[Sheet], among: Sequence[int]) -> int | None:
    """Return the user's cheapest offer, or one of unknown cost, so that the user's own offer is always
    shown.
    """
    unknown = [i for i in among if sheets[i].present_cost is None]
    best = money.cheapest(ways, sheets, among)
    return best if best is not None or not unknown else unknown[0]


def _why_none(sheets: Sequence[Sheet]) -> str:
    if len(sheets) == 1:
        return "no_offers"
    return "none_priced" if any(s.enough and s.present_cost is None for s in sheets) else "none_does_it"


def _weighed(
    known: Told,
    ways: Sequence[Way],
    sheets: Sequence[Sheet],
    numbers: Sequence[Term],
    *,
    case: DecisionCase,
    name: str,
    size: str,
) -> Decision:
    """Determine the best way, the reference it is compared with, and how certain the comparison is."""
    had = [i for i, w in enumerate(ways) if w.kind == "existing"]
    paid = {kind: [i for i, w in enumerate(ways) if w.kind == kind] for kind in ("purchase", "cloud")}
    offered = {kind: [i for i in found if not ways[i].of_catalog] for kind, found in paid.items()}
    best = money.cheapest(ways, sheets, range(len(ways)))
    reference = money.cheapest(ways, sheets, [i for found in paid.values() for i in found if ways[i].plain])
    open_slots = [
        *zip(("existing", "existing_plain"), had, strict=False),
        *((f"own_{kind}", _own(ways, sheets, found)) for kind, found in offered.items()),
        *((kind, money.cheapest(ways, sheets, found)) for kind, found in paid.items()),
        ("nothing", 0),
        ("reference", reference),
    ]
    slots = tuple((slot, index) for slot, index in open_slots if index is not None)
    listed = tuple(dict.fromkeys(index for _, index in slots))
    saved = interval = odds = years = None
    kind, swings = "", tuple[Swing, ...]()
    if best is not None and reference is not None:
        pair = ways[best], ways[reference]
        saved = money.saved_percent(sheets[best], sheets[reference])
        kind, years = money.payback(sheets[best], sheets[reference], known.terms.life_years)
        spread = monte_carlo.interval(*pair, known.terms, numbers)
        interval, odds = spread if spread is not None else (None, None)
        swings = monte_carlo.tornado(*pair, known.terms, numbers)
    return Decision(
        currency=known.currency.code,
        symbol=known.currency.symbol,
        decimals=known.currency.decimals,
        place=known.place,
        case=name,
        size=size,
        steps_per_run=known.steps_per_run,
        terms=known.terms,
        told=tuple(numbers),
        ways=tuple(ways),
        sheets=tuple(sheets),
        shown=listed,
        slots=slots,
        best=best,
        reference=reference,
        tight=money.cheapest(ways, sheets, [i for i, w in enumerate(ways) if not w.plain]),
        saved_percent=saved,
        saved_interval_percent=interval,
        chance_percent=odds,
        payback_years=years,
        payback=kind,
        swings=swings,
        asked=asked([ways[i] for i in listed], case),
        why_none="" if best is not None else _why_none(sheets),
    )
