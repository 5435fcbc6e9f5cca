"""The rows of the decision's page: figures and sentences, no markup."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from memfit.report.quantities import Figure, Sentence, assumed, predicted
from memfit.types.decision import Decision, Stage, Way


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WayRow:
    """One column of the page. ``slot`` names the column; moving a slider may put another machine into it."""

    slot: str
    index: int
    name: Sentence
    plan: str
    plain: bool
    again: bool  # the user's own machine is the cheapest of its kind, and has its own row
    untried: tuple[str, ...]  # techniques in its plan that the PoC did not train
    best: bool
    reference: bool
    enough: bool
    at_least: bool  # working hours of people are not included
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
    """One stage of the roll-out, with its gates, intervals and money."""

    stage: Stage
    gates: tuple[tuple[Sentence, Sentence | Figure, Sentence | Figure, bool], ...]
    name: Sentence | None
    memory: tuple[Figure, Figure]
    step: tuple[Figure, Figure]
    spent: Figure
    to_spend: Figure
    most: Figure  # most that is to be spent
    stop: Figure
    back: Sentence | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PriceRow:
    """One price of a machine.

    ``what``: rent, device, server or watts. ``kind``: kind of price as its source states it; "" for watts.
    """

    name: Sentence
    what: str
    value: Figure
    kind: str
    source: str
    date: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TermRow:
    """One number that the decision rests on. ``ranged``: whether it has a range."""

    name: str
    value: Figure
    low: Figure
    high: Figure
    ranged: bool
    source: str
    date: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecisionView:
    """Everything that the decision's page shows."""

    made: Decision
    questions: Mapping[str, tuple[Sentence, ...]]
    ways: tuple[WayRow, ...]
    best: WayRow | None
    reference: WayRow | None
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


def cash(made: Decision, value: float | None, source: str = "") -> Figure:
    """Return money in the currency of the case, to its smallest coin.

    A missing value is marked assumed, not predicted.
    """
    if value is None:
        return assumed(None, f"money {made.symbol} {made.decimals}", source)
    return predicted(value, f"money {made.symbol} {made.decimals}", source)


def way_name(way: Way) -> Sentence:
    """Return the name of a way, with its machine."""
    return Sentence(key=f"way.{way.kind}", values={"machine": way.machine})
