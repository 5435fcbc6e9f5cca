"""The rows of the decision's page: figures and sentences, no markup."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from memfit.report.quantities import Figure, Sentence, assumed, predicted
from memfit.types.decision import Decision, Stage, Way


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WayRow:
    """``slot``: which column of the page, where another machine may stand once a slider moves."""

    slot: str
    index: int
    name: Sentence
    plan: str
    plain: bool
    again: bool  # the user's own machine is the cheapest of its kind, and stands in a row of its own
    untried: tuple[str, ...]  # techniques in its plan that the PoC did not train
    best: bool
    reference: bool
    enough: bool
    at_least: bool  # hours of people are missing in it
    hours: Figure
    machines: Figure
    money: Mapping[str, Figure]
    saved: Figure
    kwh: Figure
    energy_saved: Figure  # percent of plain training's on the same machine
    operation: Figure
    embodied: Figure
    sci: Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RiskRow:
    kind: str
    level: str
    evidence: Sentence
    source: str
    loss: Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageRow:
    stage: Stage
    gates: tuple[tuple[Sentence, Sentence | Figure, Sentence | Figure, bool], ...]
    name: Sentence | None
    memory: tuple[Figure, Figure]
    step: tuple[Figure, Figure]
    spent: Figure
    to_spend: Figure
    most: Figure  # of what is to be spent
    stop: Figure
    back: Sentence | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PriceRow:
    """``what``: rent, device, server or watts. ``kind``: of the price, as its source has it; "" for watts."""

    name: Sentence
    what: str
    value: Figure
    kind: str
    source: str
    date: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TermRow:
    name: str
    value: Figure
    low: Figure
    high: Figure
    ranged: bool
    source: str
    date: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecisionView:
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
    """Money of the case, to its smallest coin; what nobody told is not known rather than not predicted."""
    if value is None:
        return assumed(None, f"money {made.symbol} {made.decimals}", source)
    return predicted(value, f"money {made.symbol} {made.decimals}", source)


def way_name(way: Way) -> Sentence:
    return Sentence(key=f"way.{way.kind}", values={"machine": way.machine})
