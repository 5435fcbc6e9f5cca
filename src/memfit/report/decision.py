"""Present a Decision as the rows and sentences of the page: figures with their marks, no markup."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Final

from memfit.report.decision_answers import engine_fact, gains, gate_words, phrases, questions
from memfit.report.decision_phrases import way_back
from memfit.report.decision_prices import price_rows
from memfit.report.decision_rows import (
    AlternativeRow,
    DecisionView,
    RiskRow,
    StageRow,
    TermRow,
    money_figure,
    way_name,
)
from memfit.report.provenance import POC, SAVING, stage_anchor, term_anchor, verdict_anchor, way_anchor
from memfit.report.quantities import (
    Figure,
    Mark,
    Sentence,
    SentenceValues,
    assumed,
    measured,
    predicted,
    sourced,
)
from memfit.report.sliders import sliders
from memfit.types.decision import Alternative, Decision, Risk, Stage, Term
from memfit.types.result import Interval, Poc
from memfit.verify.aggregate import energy_saved

MONEY: Final = (  # costs of an option, named as in CostSheet, in the order of the table
    "setup",
    "purchase",
    "initial",
    "electricity_per_year",
    "rental_per_year",
    "people_per_year",
    "support_per_year",
    "running_per_year",
    "residual",
    "present_cost",
    "cost_per_run",
    "net_present_value",
)


def decision_view(poc: Poc, decision: Decision) -> DecisionView:
    """Convert a decision to the rows and sentences of the decision's page."""
    ways = tuple(_way(decision, slot, index) for slot, index in decision.slots)
    best = next((w for w in ways if w.best and not w.again), None)
    reference = next((w for w in ways if w.reference), None)
    interval, unpriced = decision.saved_interval_percent, decision.without_a_price_percent
    energy = energy_saved(poc.runs)
    view = DecisionView(
        decision=decision,
        questions={},
        ways=ways,
        best=best,
        reference=reference,
        saved=_percent(decision.saved_percent),
        saved_low=_percent(interval.low if interval else None),
        saved_high=_percent(interval.high if interval else None),
        chance=predicted(decision.chance_percent, "percent", SAVING),
        payback=_payback(decision),
        swings=tuple((s.name, _percent(s.low_percent), _percent(s.high_percent)) for s in decision.swings),
        risks=tuple(map(partial(_risk, decision), decision.risks)),
        stages=tuple(_stage(decision, stage) for stage in decision.stages),
        gains=(),
        phrases=(),
        terms=tuple(_term(decision, term) for term in decision.numbers),
        prices=tuple(price_rows(decision)),
        without_a_price=None if unpriced is None else (_percent(unpriced.low), _percent(unpriced.high)),
        energy_saved=energy and (sourced(_energy_saved(*energy), POC), energy[1]),
        sliders=sliders(decision),
    )
    stages = (
        dataclasses.replace(row, back=way_back(view, row)) if row.stage.back else row for row in view.stages
    )
    view = dataclasses.replace(view, stages=tuple(stages))
    return dataclasses.replace(
        view,
        questions=questions(poc, view),
        gains=tuple(gains(poc, view)),
        phrases=tuple(phrases(poc, view)),
    )


def _energy_saved(percent: float, boundary: str) -> Figure:
    """Return ``percent``, the energy saved in percent of plain training's, as a figure.

    It is marked as predicted if ``boundary`` (what the energy includes) contains "model", else as measured.
    """
    return predicted(percent, "saving") if "model" in boundary else measured(percent, "saving")


def _percent(value: float | None) -> Figure:
    return predicted(value, "saving", SAVING)


def _risk(decision: Decision, risk: Risk) -> RiskRow:
    mark = Mark.PREDICTED if risk.kind == "supply" else Mark.MEASURED
    evidence = Sentence(key=risk.evidence, values=_evidence_values(risk.values, mark))
    return RiskRow(
        kind=risk.kind,
        level=risk.level,
        source=risk.source,
        loss=dataclasses.replace(money_figure(decision, risk.loss, stage_anchor("pilot")), live="most"),
        evidence=sourced(evidence, verdict_anchor("recommended") if risk.source == "#verdicts" else POC),
    )


def _way(decision: Decision, slot: str, index: int) -> AlternativeRow:
    way, sheet = decision.ways[index], decision.sheets[index]
    reference_sheet = (
        None if decision.reference is None or way.kind == "nothing" else decision.sheets[decision.reference]
    )
    saved = None if reference_sheet is None else sheet.saved_percent(reference_sheet)
    mark = Mark.PREDICTED if way.predicted else Mark.ASSUMED
    row = AlternativeRow(
        slot=slot,
        index=index,
        name=way_name(way),
        plan=way.plan,
        plain=way.plain,
        again=(f"own_{slot}", index) in decision.slots,
        untried=way.untried,
        best=index == decision.best and slot != "reference",
        reference=slot == "reference",
        enough=sheet.enough,
        at_least=bool(way.unknown),
        hours=Figure(value=3600 * way.hours, unit="s", mark=mark),
        machines=predicted(sheet.machines, "count"),
        money={name: money_figure(decision, getattr(sheet, name)) for name in MONEY},
        saved=predicted(saved, "saving"),
        kwh=predicted(None if sheet.kwh_per_run is None else 3.6e6 * sheet.kwh_per_run, "j"),
        energy_saved=predicted(None if way.plain else _energy_percent(way), "saving"),
        operation=predicted(sheet.operation_g, "g"),
        embodied=assumed(sheet.embodied_g, "g"),
        sci=assumed(sheet.sci_g, "g"),
    )
    return sourced(row, way_anchor(index))


def _energy_percent(way: Alternative) -> float | None:
    """Return how much less energy a run of this option takes than a run of plain training on the same
    machine, in percent of the latter; negative if it takes more. Both are without the data centre's overhead
    (PUE). None if one of the two is unknown."""
    if not way.plain_j or way.power_w is None:
        return None
    return 100 * (1 - 3600 * way.hours * way.power_w / way.plain_j)


def _payback(decision: Decision) -> Sentence | None:
    if not decision.payback:
        return None
    years = predicted(decision.payback_years, "years", SAVING)
    key = decision.payback.replace(" ", "_")
    return Sentence(key=f"payback.{key}", values={"years": years})


def _evidence_values(values: Mapping[str, str | float | None], mark: Mark) -> SentenceValues:
    """Convert the values of a risk's evidence sentence to figures, sentences or texts.

    A number is a percentage if its name is "spare", minutes if it is "minutes", else a count; ``mark`` is its
    mark. A text named "verdict" is a key of the word catalogs. Any other text becomes a sentence if it is one
    of the catalog's known statements about an engine, and else stays as it is.
    """

    def one(name: str, value: str | float | None) -> Figure | str | Sentence:
        if isinstance(value, str):
            return Sentence(key=value) if name == "verdict" else engine_fact(value)
        unit = "percent" if name == "spare" else "min" if name == "minutes" else "count"
        return Figure(value=value, unit=unit, mark=mark)

    return {name: one(name, value) for name, value in values.items()}


def _stage(decision: Decision, stage: Stage) -> StageRow:
    row = StageRow(
        stage=stage,
        gates=tuple((*gate_words(gate), gate[3]) for gate in stage.gates),
        name=None if not stage.machine else Sentence(key="way.at", values={"machine": stage.machine}),
        memory=_ends(stage.memory_bytes, "bytes"),
        step=_ends(stage.step_s, "s"),
        # based on modelled energy, unless a meter was available
        spent=dataclasses.replace(money_figure(decision, stage.spent), live="spent"),
        to_spend=dataclasses.replace(money_figure(decision, stage.to_spend), live=stage.name),
        most=dataclasses.replace(money_figure(decision, stage.most), live="most"),
        stop=predicted(stage.stop_bytes, "bytes"),
        back=None,
    )
    return sourced(row, stage_anchor(stage.name))


def _ends(span: Interval | None, unit: str) -> tuple[Figure, Figure]:
    ends = (None, None) if span is None else (span.low, span.high)
    return predicted(ends[0], unit), predicted(ends[1], unit)


def _term(decision: Decision, term: Term) -> TermRow:
    def figure(value: float | None) -> Figure:
        # a kWh costs fractions of the currency unit
        unit, extra_decimals = term.unit, 2 if term.name.endswith("_per_kwh") else 0
        if unit == "money":
            unit = f"money {decision.symbol} {decision.decimals + extra_decimals}"
        return Figure(value=value, unit="rate" if term.name == "per_usd" else unit, mark=Mark(term.mark))

    ranged = term.low is not None and term.high is not None and term.low < term.high
    row = TermRow(
        name=term.name,
        value=figure(term.value),
        low=figure(term.low),
        high=figure(term.high),
        ranged=ranged,
        source=term.source,
        date=term.date,
    )
    return sourced(row, term_anchor(term.name))
