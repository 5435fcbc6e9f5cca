"""What the decision says in sentences: four answers, and phrases for a meeting."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Final

from memfit import catalog
from memfit.engines.registry import engine
from memfit.report.answer import answer
from memfit.report.decision_rows import DecisionView, WayRow, cash, way_name
from memfit.report.figures import MANY, Figure, Sentence, assumed, measured, number_text, predicted
from memfit.report.records import GATES, POC, SAVING, reach_anchor, term_anchor, way_anchor
from memfit.types.result import Poc

Filled = Mapping[str, Figure | str | Sentence]
ENGINES: Final = ("native", "accelerate", "deepspeed", "megatron", "colossalai", "fairscale")


def questions(poc: Poc, view: DecisionView) -> Mapping[str, tuple[Sentence, ...]]:
    """The four that a budget owner asks, in this order; the first sentence of each is the short answer."""
    return {
        "fits": _fits(poc, view),
        "money": _money(view, poc.job_size),
        "risk": _risk(poc, view),
        "next": _next(view),
    }


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
    values: Filled = {"machine": machine, "hours": hours, "plan": mine[0].plan, "needed": mine[0].machines}
    here = Sentence(key="decide.fits.here", values={"told": seen[0]})
    return (Sentence(key=f"decide.fits.{key}", values=values), here, *seen[1:])


def _money(view: DecisionView, job_size: str) -> tuple[Sentence, ...]:
    if view.best is None:
        return (Sentence(key=f"decide.money.{view.made.why_none}"),)
    best = view.best
    values: dict[str, Figure | str | Sentence] = {
        "way": best.name,
        "cost": best.money["present_cost"],
        "years": assumed(view.made.terms.years, "count", term_anchor("years")),
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
        same = view.reference.index == best.index
        key = (
            "is_reference"
            if same
            else "does_not_pay"
            if best.plain
            else "saves"
            if view.saved.value > 0
            else "loses"
        )
    told = [Sentence(key=f"decide.money.{key}", values=values)]
    told += _with_saving(view) if best.plain else []
    told.append(Sentence(key="decide.money.first", values=values))
    if best.untried:
        told.append(Sentence(key="decide.money.untried", values={"names": ", ".join(best.untried)}))
    if view.made.size == job_size:
        told.append(Sentence(key="decide.money.same_size", values={"size": job_size}))
    if best.at_least:
        told.append(_unknown(view, best))
        told += _rank(view, best)
    return tuple(told)


def gains(poc: Poc, view: DecisionView) -> Iterator[Sentence]:
    """Time of a run against the reference's, and what a machine could not train before."""
    if view.best is None:
        return
    if view.reference is not None and view.reference.index != view.best.index:
        values: Filled = {"hours": view.best.hours, "other": view.reference.hours}
        yield Sentence(key="decide.money.gain_time", values=values)
    machine = view.made.ways[view.best.index].machine
    grown = [r for r in poc.reach if r.recommended and (r.plain is None or r.recommended > r.plain)]
    own = [r for r in grown if r.machine == machine] or grown
    for reach in own[:1]:
        unit = "parameters" if reach.quantity == "parameters" else "count"
        source = reach_anchor(poc.reach.index(reach))
        told: Filled = {
            "machine": reach.machine,
            "what": Sentence(key=f"quantity.{reach.quantity}"),
            "most": predicted(reach.recommended, unit, source),
            "plain": predicted(reach.plain, unit, source),
        }
        key = "gain_reach" if reach.plain is not None else "gain_reach_new"
        yield Sentence(key=f"decide.money.{key}", values=told)


def _unknown(view: DecisionView, best: WayRow) -> Sentence:
    """Up to which labour cost the saving holds, where there is one and labour is missing in it."""
    made, reference = view.made, view.reference
    spare = 0.0
    if reference is not None:
        spare = made.sheets[reference.index].present_cost - made.sheets[best.index].present_cost
    if spare <= 0:
        return Sentence(key="decide.money.at_least")
    return Sentence(key="decide.money.at_least_up_to", values={"spare": cash(made, spare, SAVING)})


def _with_saving(view: DecisionView) -> list[Sentence]:
    """Where plain training is the answer: what the best way with the recommended plan would lose."""
    made, reference = view.made, view.reference
    tight = [i for i, w in enumerate(made.ways) if not w.plain and made.sheets[i].enough]
    if not tight or reference is None:
        return []
    index = min(tight, key=lambda i: made.sheets[i].present_cost)
    share = 100 * (1 - made.sheets[index].present_cost / made.sheets[reference.index].present_cost)
    saved = predicted(share, "saving", way_anchor(index))
    values: Filled = {"way": way_name(made.ways[index]), "saved": saved}
    return [Sentence(key="decide.money.with_saving", values=values)]


def _rank(view: DecisionView, best: WayRow) -> list[Sentence]:
    """A way whose hours are all told may be cheaper than one whose hours are missing."""
    made = view.made
    told = [w for w in view.ways if w.enough and not w.at_least and w.slot != "nothing"]
    cost = {w.index: made.sheets[w.index].present_cost for w in told}
    if not told:
        return []
    other = min(told, key=lambda w: cost[w.index])
    gap = cash(made, cost[other.index] - made.sheets[best.index].present_cost, way_anchor(other.index))
    return [Sentence(key="decide.money.rank", values={"other": other.name, "gap": gap})]


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


def gate_words(gate: tuple[str, str, str, bool]) -> tuple[Sentence, Sentence | Figure, Sentence | Figure]:
    """A gate's name, what was found and what is asked for, in the reader's language."""
    name, found, limit, holds = gate
    seen, asked = _gate_value(found, name), _gate_value(limit, name)
    if isinstance(seen, Figure) and isinstance(asked, Sentence) and not holds:
        most = asked.values.get("value")
        if isinstance(most, Figure) and _same_text(seen, most):
            seen = dataclasses.replace(seen, unit="rate")  # with the digits in which they differ
    return Sentence(key=f"gate.{name}"), seen, asked


def _same_text(one: Figure, other: Figure) -> bool:
    pair = [number_text(f.value, f.unit) for f in (one, other) if f.value is not None]
    return len(pair) == 2 and pair[0] == pair[1]


_KINDS: Final = ("equivalent", "different", "undecided")


def _gate_value(text: str, name: str) -> Sentence | Figure:
    if text in ("", "yes", "no"):
        return Sentence(key=f"gate_value.{text}" if text else "stages.not_measured")
    if text == "nothing":
        return Sentence(key="gate_value.nothing")
    kinds = text.split(" or ")
    if all(kind in _KINDS for kind in kinds):
        first, *rest = (Sentence(key=f"verdict.{kind}") for kind in kinds)
        for kind in rest:
            first = Sentence(key="gate_value.either", values={"one": first, "other": kind})
        return first
    most = text.removeprefix("at most ")
    unit, scale = _GATE_UNITS.get(name, ("count", 1.0))
    if most == text:
        return measured(scale * float(text), unit, POC)
    limit = assumed(scale * float(most), unit, GATES)
    return Sentence(key="gate_value.at_most", values={"value": limit})


_GATE_UNITS: Final[Mapping[str, tuple[str, float]]] = {
    "memory: prediction error": ("percent", 100.0),
    "time: step by plain's": ("ratio", 1.0),
    "energy: run by plain's": ("ratio", 1.0),
    "effort: attended minutes": ("min", 1.0),
}


# -- phrases for a meeting -------------------------------------------------------------------------------


_FACTS: Final = (
    "comes with torch", "released regularly", "no release for over a year",
    "dormant: no release since 2022",
)  # fmt: skip


def engine_fact(text: str) -> Sentence | str:
    """What the catalog says of an engine, in the reader's language where it is words."""
    return Sentence(key=f"engine_fact.{text}") if text in _FACTS else text


def phrases(poc: Poc, view: DecisionView) -> Iterator[Sentence]:
    best, reference = view.best, view.reference
    if best is not None and reference is not None and reference.index == best.index:
        yield Sentence(key="phrase.same", values={"way": best.name})
    elif best is not None and reference is not None and view.saved.value is not None:
        share = view.saved.value
        change = dataclasses.replace(view.saved, value=abs(share), unit="percent")
        times = dataclasses.replace(view.saved, value=1 - share / 100, unit="times")
        values: Filled = {"change": change, "times": times, "way": best.name, "reference": reference.name}
        key = "less" if share >= 0 else "more" if share >= MANY else "times"
        yield Sentence(key=f"phrase.{key}", values=values)
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
    plan = poc.search.recommended.estimate.plan if poc.search.recommended else None
    used = next((r.spec.engine for r in poc.runs if r.spec.role == "recommended"), "")
    for name in ENGINES:
        facts = catalog.engine_facts(name)
        told: dict[str, Figure | str | Sentence] = {
            k: engine_fact(facts[k][0]) if k in facts else "?"
            for k in ("release", "torch", "licence", "status")
        }
        gaps = engine(name).supports(plan) if plan is not None else ()
        key = "phrase.used" if name == used else "phrase.gap" if gaps else "phrase.candidate"
        told["gap"] = gaps[0] if gaps else ""
        yield Sentence(key=key, values={"engine": name, **told})
