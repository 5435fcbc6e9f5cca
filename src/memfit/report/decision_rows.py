"""The rows of the decision's page: figures and sentences, no markup."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from memfit.report.quantities import Figure, Sentence, assumed, predicted
from memfit.types.decision import Alternative, Decision, Stage


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AlternativeRow:
    """One option as a column of the page's table.

    ``slot`` names the column, for example "purchase"; when a slider of the page is moved, another option may
    take it. ``index``: of the option in ``ways`` of the decision. ``money``: name of a cost in CostSheet ->
    figure. ``saved``: saving over the reference, in percent. ``kwh``: energy of one run, in joules.
    ``operation``, ``embodied`` and ``sci``: grams of CO2 per run from electricity, from the manufacture of
    the devices, and their sum.
    """

    slot: str
    index: int
    name: Sentence
    plan: str
    plain: bool
    again: bool  # this cheapest option of its kind is the user's own offer, which has its own column
    untried: tuple[str, ...]  # techniques in its plan that the PoC did not train
    best: bool
    reference: bool
    enough: bool  # the machines can do all runs, and a run is not too long
    at_least: bool  # its costs are a lower bound, because something is unknown, such as working hours
    hours: Figure
    machines: Figure
    money: Mapping[str, Figure]
    saved: Figure
    kwh: Figure
    energy_saved: Figure  # percent of plain training's energy on the same machine
    operation: Figure
    embodied: Figure
    sci: Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RiskRow:
    """One risk. ``level``: low, some, high or unknown; ``evidence``: what it is judged by; ``source``: the
    section of the page with the evidence ("#runs"), a citation, or "" if there is none; ``loss``: the highest
    cost of the pilot, which is one run or a part of one before anything is bought; without a value if it is
    unknown or the risk is not a matter of money."""

    kind: str
    level: str
    evidence: Sentence
    source: str
    loss: Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageRow:
    """One stage of the roll-out.

    ``gates``: (name, what was found, limit, whether it holds). ``name``: sentence "on MACHINE", None if the
    stage has no machine. ``memory`` and ``step``: (low, high) of the predicted memory of one device and time
    of a step. ``spent`` and ``to_spend``: money. ``back``: what to go back to if the stage fails; None if the
    stage has none, as the PoC.
    """

    stage: Stage
    gates: tuple[tuple[Sentence, Sentence | Figure, Sentence | Figure, bool], ...]
    name: Sentence | None
    memory: tuple[Figure, Figure]
    step: tuple[Figure, Figure]
    spent: Figure
    to_spend: Figure
    most: Figure  # most that is to be spent
    stop: Figure  # memory above which to stop
    back: Sentence | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PriceRow:
    """One price of a machine, or its watts. ``name``: the option it is for.

    ``what``: "rent", "device" or "server" (prices of the catalog), "own_rent" or "own_price" (of the user's
    offers), or "watts". ``kind``, ``seller``, ``region``: of a seller's price of the catalog; "" for the
    others. ``is_used``: False for a price of another kind than decisions use, which is only shown. ``date``:
    of the source.
    """

    name: Sentence
    what: str
    value: Figure
    kind: str
    source: str
    date: str
    seller: str = ""
    region: str = ""
    is_used: bool = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TermRow:
    """One number that the decision is based on. ``ranged``: whether it has a range, so that ``low`` is below
    ``high``; otherwise these two equal the value or are unknown."""

    name: str
    value: Figure
    low: Figure
    high: Figure
    ranged: bool
    source: str
    date: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecisionView:
    """Everything that the decision's page shows.

    ``questions``, ``gains`` and ``phrases``: what the functions of these names in decision_answers return.
    ``best`` is the cheapest option, ``reference`` what it is compared with. ``saved``, ``saved_low`` and
    ``saved_high``: saving of the best over the reference in percent, and its interval; ``chance``:
    probability of any saving in percent. ``swings``: (name of a number, saving if that number is at the low
    end of its range, at the high end). ``energy_saved``: (percent of plain training's energy that the
    recommended plan saved in the PoC's runs, what that energy includes), None if not measured.
    ``without_a_price``: lowest and highest saving if any one price of the catalog is left out, None if none
    is used.
    """

    decision: Decision
    questions: Mapping[str, tuple[Sentence, ...]]
    ways: tuple[AlternativeRow, ...]
    best: AlternativeRow | None
    reference: AlternativeRow | None
    saved: Figure
    saved_low: Figure
    saved_high: Figure
    chance: Figure
    payback: Sentence | None
    swings: tuple[tuple[str, Figure, Figure], ...]
    risks: tuple[RiskRow, ...]
    stages: tuple[StageRow, ...]
    gains: tuple[Sentence, ...]
    phrases: tuple[Sentence, ...]
    terms: tuple[TermRow, ...]
    prices: tuple[PriceRow, ...]
    energy_saved: tuple[Figure, str] | None
    without_a_price: tuple[Figure, Figure] | None
    sliders: Mapping[str, Mapping[str, float]]


def money_figure(decision: Decision, value: float | None, source: str = "") -> Figure:
    """Return ``value``, money in the decision's currency, as a figure shown to the smallest coin of that
    currency. ``source``: anchor of its record.

    It is marked as predicted; a value of None is marked as assumed, so that it is shown as "not known".
    """
    if value is None:
        return assumed(None, f"money {decision.symbol} {decision.decimals}", source)
    return predicted(value, f"money {decision.symbol} {decision.decimals}", source)


def way_name(way: Alternative) -> Sentence:
    """Return the name of an option by its kind and machine: "buying MACHINE", "renting MACHINE", "the
    existing MACHINE" or "doing nothing"; if the machine does several runs at once, how many."""
    name = Sentence(key=f"way.{way.kind}", values={"machine": way.machine})
    if way.parallel_count == 1:
        return name
    return Sentence(key="way.at_once", values={"way": name, "count": str(way.parallel_count)})
