"""The rows of the decision's page: figures and sentences, no markup."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from memfit.report.quantities import Figure, Sentence, assumed, predicted
from memfit.types.decision import Alternative, Decision, Stage


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AlternativeRow:
    """One option as a column of the page's table. ``slot`` names the column; moving a slider may put another
    option into it. ``index``: of the option in the decision; ``money``: costs named as in CostSheet."""

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
    """One risk with its evidence and the possible loss."""

    kind: str
    level: str
    evidence: Sentence
    source: str
    loss: Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageRow:
    """One stage of the roll-out. ``gates``: (name, what was found, limit, whether it holds); ``memory`` and
    ``step``: (low, high) of the prediction; ``back``: what to go back to, None for the PoC."""

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
    """One price of a machine, or its watts.

    ``what``: rent, device or server (from the catalog), own_rent or own_price (the user's offers), or watts.
    ``kind``: kind of a catalog price as its source states it; "" for the others.
    """

    name: Sentence
    what: str
    value: Figure
    kind: str
    source: str
    date: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TermRow:
    """One number that the decision rests on. ``ranged``: whether it has a range from ``low`` to ``high``."""

    name: str
    value: Figure
    low: Figure
    high: Figure
    ranged: bool
    source: str
    date: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecisionView:
    """Everything that the decision's page shows. ``saved`` to ``chance``: saving of the best option over the
    reference, its interval, and the probability of any saving. ``swings``: (term, saving at the low end of
    its range, at the high end). ``energy_saved``: (percent saved in the PoC's runs, energy boundary)."""

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
    sliders: Mapping[str, Mapping[str, float]]


def money_figure(decision: Decision, value: float | None, source: str = "") -> Figure:
    """Return money in the decision's currency, to its smallest coin.

    It counts as predicted; a missing value is marked assumed, so that it reads "not known".
    """
    if value is None:
        return assumed(None, f"money {decision.symbol} {decision.decimals}", source)
    return predicted(value, f"money {decision.symbol} {decision.decimals}", source)


def way_name(way: Alternative) -> Sentence:
    """Return the name of an option: its kind and machine."""
    return Sentence(key=f"way.{way.kind}", values={"machine": way.machine})
