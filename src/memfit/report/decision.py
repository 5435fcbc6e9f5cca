"""A Decision as the rows and sentences of the page: figures with their marks, no markup."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Final

from memfit import catalog
from memfit.report.answer import answer
from memfit.report.figures import Figure, Mark, Sentence, assumed, measured, predicted
from memfit.report.pool import energy_saved
from memfit.report.sliders import sliders
from memfit.types.decision import Decision, Sheet, Stage, Term, Way
from memfit.types.result import Interval, Poc

Filled = Mapping[str, Figure | str | Sentence]
QUESTIONS: Final = ("fits", "money", "risk", "next")
ENGINES: Final = ("native", "accelerate", "deepspeed", "megatron", "colossalai", "fairscale")
MONEY: Final = (  # of a way, in the order of the table: the sheet's names
    "setup", "purchase", "initial", "electricity_per_year", "rental_per_year", "people_per_year",
    "support_per_year", "running_per_year", "residual", "present_cost", "cost_per_run",
    "net_present_value",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WayRow:
    """``slot``: which column of the page, where another machine may stand once a slider moves."""

    slot: str
    index: int
    name: Sentence
    plan: str
    plain: bool
    best: bool
    reference: bool
    enough: bool
    at_least: bool  # hours of people are missing in it
    hours: Figure
    machines: int
    money: Mapping[str, Figure]
    saved: Figure
    kwh: Figure
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
    gates: tuple[tuple[Sentence, Sentence | str, Sentence | str, bool], ...]
    name: Sentence | None
    memory: tuple[Figure, Figure]
    step: tuple[Figure, Figure]
    spent: Figure
    to_spend: Figure


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
    phrases: tuple[Sentence, ...]
    terms: tuple[TermRow, ...]
    energy_saved: tuple[Figure, str] | None
    sliders: Mapping[str, Mapping[str, float]]


def decision_view(poc: Poc, made: Decision) -> DecisionView:
    ways = tuple(_way(made, slot, index) for slot, index in _slots(made))
    best = next((w for w in ways if w.best), None)
    reference = next((w for w in ways if w.reference), None)
    spread = made.saved_interval_percent
    energy = energy_saved(poc.runs)
    view = DecisionView(
        made=made,
        questions={},
        ways=ways,
        best=best,
        reference=reference,
        saved=_percent(made.saved_percent),
        saved_low=_percent(spread.low if spread else None),
        saved_high=_percent(spread.high if spread else None),
        chance=predicted(made.chance_percent, "percent"),
        payback=_payback(made),
        swings=tuple((s.name, _percent(s.low_percent), _percent(s.high_percent)) for s in made.swings),
        risks=tuple(
            RiskRow(
                kind=r.kind, level=r.level, source=r.source, loss=cash(made, r.loss),
                evidence=Sentence(key=r.evidence, values=_filled(r.values)),
            )
            for r in made.risks
        ),
        stages=tuple(_stage(made, stage) for stage in made.stages),
        phrases=(),
        terms=tuple(_term(made, term) for term in made.told),
        energy_saved=energy and (_energy_saved(*energy), energy[1]),
        sliders=sliders(made),
    )  # fmt: skip
    asked = {"fits": _fits(poc, view), "money": _money(view), "risk": _risk(poc, view), "next": _next(view)}
    return dataclasses.replace(view, questions=asked, phrases=tuple(_phrases(poc, view)))


def cash(made: Decision, value: float | None, mark: Mark = Mark.PREDICTED) -> Figure:
    """Money of the case, to its smallest coin."""
    return Figure(value=value, unit=f"money {made.symbol} {made.decimals}", mark=mark)


def _energy_saved(percent: float, boundary: str) -> Figure:
    """A boundary that says it is modelled is no meter."""
    return predicted(percent, "percent") if "model" in boundary else measured(percent, "percent")


def _percent(value: float | None) -> Figure:
    return Figure(value=value, unit="percent", mark=Mark.PREDICTED)


def _slots(made: Decision) -> Iterator[tuple[str, int]]:
    """One column a slot; a way that is also the reference stands in both."""
    mine = iter(("existing", "existing_plain"))
    for index in made.shown:
        way = made.ways[index]
        if way.kind == "existing":
            yield next(mine), index
        elif not (index == made.reference and any(w == way.kind for w in _taken(made, index))):
            yield way.kind, index
    if made.reference is not None:
        yield "reference", made.reference


def _taken(made: Decision, index: int) -> list[str]:
    """Kinds that a way before this one already stands for."""
    return [made.ways[i].kind for i in made.shown[: made.shown.index(index)]]


def way_name(way: Way) -> Sentence:
    return Sentence(key=f"way.{way.kind}", values={"machine": way.machine})


def _way(made: Decision, slot: str, index: int) -> WayRow:
    way, sheet = made.ways[index], made.sheets[index]
    reference = None if made.reference is None else made.sheets[made.reference].present_cost
    nothing = way.kind == "nothing"
    saved = 100 * (1 - sheet.present_cost / reference) if reference and not nothing else None
    mark = Mark.PREDICTED if way.predicted else Mark.ASSUMED
    return WayRow(
        slot=slot,
        index=index,
        name=way_name(way),
        plan=way.plan,
        plain=way.plain,
        best=index == made.best and slot != "reference",
        reference=slot == "reference",
        enough=sheet.enough,
        at_least=bool(way.unknown),
        hours=Figure(value=3600 * way.hours, unit="s", mark=mark),
        machines=sheet.machines,
        money={name: cash(made, getattr(sheet, name)) for name in MONEY},
        saved=_percent(saved),
        kwh=_kwh(sheet),
        operation=predicted(sheet.operation_g, "g"),
        embodied=assumed(sheet.embodied_g, "g"),
        sci=assumed(sheet.sci_g, "g"),
    )


def _kwh(sheet: Sheet) -> Figure:
    return predicted(None if sheet.kwh_per_run is None else 3.6e6 * sheet.kwh_per_run, "j")


def _payback(made: Decision) -> Sentence | None:
    if not made.payback:
        return None
    years = predicted(made.payback_years, "years")
    key = made.payback.replace(" ", "_")
    return Sentence(key=f"payback.{key}", values={"years": years})


def _filled(values: Mapping[str, str | float | None]) -> Filled:
    """Numbers of a PoC are counted, so measured; a share of the cap is a percentage."""

    def one(name: str, value: str | float | None) -> Figure | str:
        if isinstance(value, str):
            return value
        return measured(value, "percent" if name == "spare" else "min" if name == "minutes" else "count")

    return {name: one(name, value) for name, value in values.items()}


def _stage(made: Decision, stage: Stage) -> StageRow:
    return StageRow(
        stage=stage,
        gates=tuple((*gate_words(gate), gate[3]) for gate in stage.gates),
        name=None if not stage.machine else Sentence(key="way.at", values={"machine": stage.machine}),
        memory=_ends(stage.memory_bytes, "bytes"),
        step=_ends(stage.step_s, "s"),
        spent=cash(made, stage.spent),  # from energy that is a model's unless a meter was there
        to_spend=cash(made, stage.to_spend),
    )


def _ends(span: Interval | None, unit: str) -> tuple[Figure, Figure]:
    ends = (None, None) if span is None else (span.low, span.high)
    return predicted(ends[0], unit), predicted(ends[1], unit)


def _term(made: Decision, term: Term) -> TermRow:
    def figure(value: float | None) -> Figure:
        unit, more = term.unit, 2 if term.name.endswith("_per_kwh") else 0  # a kWh costs some coins
        if unit == "money":
            unit = f"money {made.symbol} {made.decimals + more}"
        return Figure(value=value, unit="rate" if term.name == "per_usd" else unit, mark=Mark(term.mark))

    ranged = term.low is not None and term.high is not None and term.low < term.high
    return TermRow(
        name=term.name, value=figure(term.value), low=figure(term.low), high=figure(term.high), ranged=ranged,
        source=term.source, date=term.date,
    )  # fmt: skip


# -- the four questions ----------------------------------------------------------------------------------


def _fits(poc: Poc, view: DecisionView) -> tuple[Sentence, ...]:
    """The PoC's own answer, then the user's machine at full size where it was named."""
    seen = answer(poc)[:2]
    mine = [w for w in view.ways if w.slot.startswith("existing")]
    if not mine:
        return (*seen, Sentence(key="decide.fits.unnamed"))
    machine = view.made.ways[mine[0].index].machine
    kinds = {w.plain: w.enough for w in mine}
    does = [plain for plain, enough in kinds.items() if enough]
    key = "none" if not does else "both" if len(does) == 2 else "plain" if does[0] else "recommended"
    hours = mine[0].hours
    needed = Figure(value=mine[0].machines, unit="count", mark=hours.mark)
    values: Filled = {"machine": machine, "hours": hours, "plan": mine[0].plan, "needed": needed}
    return (Sentence(key=f"decide.fits.{key}", values=values), *seen)


def _money(view: DecisionView) -> tuple[Sentence, ...]:
    if view.best is None:
        return (Sentence(key=f"decide.money.{view.made.why_none}"),)
    best = view.best
    values: dict[str, Figure | str | Sentence] = {
        "way": best.name,
        "cost": best.money["present_cost"],
        "years": assumed(view.made.terms.years, "count"),
        "initial": best.money["initial"],
        "running": best.money["running_per_year"],
        "saved": view.saved,
        "low": view.saved_low,
        "high": view.saved_high,
    }
    if view.reference is None or view.saved.value is None:
        key = "no_reference"
    else:
        values["reference"] = view.reference.name
        key = "does_not_pay" if best.plain else "saves" if view.saved.value > 0 else "loses"
    told = [Sentence(key=f"decide.money.{key}", values=values)]
    told.append(Sentence(key="decide.money.first", values=values))
    if best.at_least:
        told.append(_unknown(view, best))
    return tuple(told)


def _unknown(view: DecisionView, best: WayRow) -> Sentence:
    """Up to which labour cost the saving holds, where there is one and labour is missing in it."""
    made, reference = view.made, view.reference
    spare = 0.0
    if reference is not None:
        spare = made.sheets[reference.index].present_cost - made.sheets[best.index].present_cost
    if spare <= 0:
        return Sentence(key="decide.money.at_least")
    return Sentence(key="decide.money.at_least_up_to", values={"spare": cash(made, spare)})


_ORDER: Final = {"high": 0, "unknown": 1, "some": 2, "low": 3}


def _risk(poc: Poc, view: DecisionView) -> tuple[Sentence, ...]:
    science = answer(poc)[2]
    if not view.risks:
        return (science,)
    worst = min(view.risks, key=lambda r: _ORDER[r.level])
    kinds = [n.verdict.kind.value for n in poc.verdicts if n.name == "recommended"]
    values: Filled = {
        "name": Sentence(key=f"risk.{worst.kind}"),
        "evidence": worst.evidence,
        "verdict": Sentence(key=f"verdict.{kinds[0]}" if kinds else "decide.risk.unjudged"),
        "loss": next(r.loss for r in view.risks if r.kind != "security"),
    }
    about = "decide.risk.low" if worst.level == "low" else "decide.risk.worst"
    keys = ("decide.risk.short", about, "decide.risk.way_out")
    short, one, way_out = (Sentence(key=key, values=values) for key in keys)
    return (short, science, one, way_out)


def _next(view: DecisionView) -> tuple[Sentence, ...]:
    if len(view.stages) < 2:
        return (Sentence(key="decide.next.unfinished"),)
    first, pilot = view.stages[0].stage, view.stages[1]
    failed = [g for g in first.gates if not g[3]]
    if failed:
        gate, found, limit = gate_words(failed[0])
        values: Filled = {"gate": gate, "found": found, "limit": limit}
        return (Sentence(key="decide.next.stopped", values=values),)
    if not pilot.stage.machine:
        return (Sentence(key="decide.next.predict"),)
    told: Filled = {"machine": pilot.stage.machine, "cost": pilot.to_spend, "memory": pilot.memory[1]}
    known = pilot.stage.memory_bytes is not None
    return (
        Sentence(key="decide.next.pilot", values=told),
        Sentence(key="decide.next.stop" if known else "decide.next.stop_unpriced", values=told),
    )


def gate_words(gate: tuple[str, str, str, bool]) -> tuple[Sentence, Sentence | str, Sentence | str]:
    """A gate's name, what was found and what is asked for, in the reader's language."""
    name, found, limit, _ = gate
    return Sentence(key=f"gate.{name}"), _gate_value(found), _gate_value(limit)


def _gate_value(text: str) -> Sentence | str:
    if text in ("", "yes", "no"):
        return Sentence(key=f"gate_value.{text}" if text else "stages.not_measured")
    if text in ("equivalent", "different", "undecided"):
        return Sentence(key=f"verdict.{text}")
    most = text.removeprefix("at most ")
    return text if most == text else Sentence(key="gate_value.at_most", values={"value": most})


# -- phrases for a meeting -------------------------------------------------------------------------------


def _phrases(poc: Poc, view: DecisionView) -> Iterator[Sentence]:
    best, reference = view.best, view.reference
    if best is not None and reference is not None and view.saved.value is not None:
        change = dataclasses.replace(view.saved, value=abs(view.saved.value))
        values: Filled = {"change": change, "way": best.name, "reference": reference.name}
        yield Sentence(key=f"phrase.{'less' if view.saved.value >= 0 else 'more'}", values=values)
    else:
        yield Sentence(key="phrase.no_cost")
    if len(view.stages) == 3 and view.stages[1].stage.machine:
        pilot, full = view.stages[1], view.stages[2]
        yield Sentence(key="phrase.staged", values={"pilot": pilot.to_spend, "full": full.to_spend})
    else:
        yield Sentence(key="phrase.staged_unknown")
    found = {r.kind: r.evidence for r in view.risks}
    if {"load", "reproducibility"} <= found.keys():
        yield Sentence(
            key="phrase.risks",
            values={"load": found["load"], "reproducibility": found["reproducibility"]},
        )
    used = next((r.spec.engine for r in poc.runs if r.spec.role == "recommended"), "")
    for name in ENGINES:
        facts = catalog.engine_facts(name)
        told = {k: facts[k][0] if k in facts else "?" for k in ("release", "torch", "licence", "status")}
        key = "phrase.used" if name == used else "phrase.candidate"
        yield Sentence(key=key, values={"engine": name, **told})
