"""The decision in sentences: the answers to four questions, and phrases for a meeting."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Final

from memfit import catalog
from memfit.engines import replay
from memfit.engines.registry import ENGINES, engine
from memfit.report.answer import answer
from memfit.report.decision_phrases import (
    cost_phrase,
    costs_more,
    evaluated_risks,
    fit_phrase,
    headline,
    pilot_cost_phrase,
    stages_phrase,
    way_back,
)
from memfit.report.decision_rows import AlternativeRow, DecisionView, money_figure, way_name
from memfit.report.provenance import GATES, POC, SAVING, reach_anchor, stage_anchor, term_anchor, way_anchor
from memfit.report.quantities import (
    Figure,
    Sentence,
    SentenceValues,
    assumed,
    measured,
    number_text,
    predicted,
    sourced,
)
from memfit.types.result import Poc

# These sentences change the meaning of the short answer on money, so a small screen must not fold them.
DECISIVE: Final = (
    "decide.money.with_saving",
    "decide.money.with_saving_more",
    "decide.money.mostly_setup",
    "decide.money.project",
    "decide.money.by_default",
)
_NOTED_PROJECTS: Final = ("alphafold2",)  # of which project_note says what their money leaves out


def questions(poc: Poc, view: DecisionView) -> Mapping[str, tuple[Sentence, ...]]:
    """Return the answers to a budget owner's four questions, each as sentences of which the first is the
    short answer.

    The keys, in this order: "fits" (can our machine do it), "money" (does it pay), "risk" (what can go wrong)
    and "next" (what to do).
    """
    return {
        "fits": _fits(poc, view),
        "money": _money(view),
        "risk": _risk(poc, view),
        "next": _next(view),
    }


def _fits(poc: Poc, view: DecisionView) -> tuple[Sentence, ...]:
    """Return whether the user's existing machine can train the job at its full size, then the PoC's answers
    at the size that it ran: whether plain training and the recommended plan fit.

    If the user named no existing machine: the PoC's answer on the recommended plan, that on plain training,
    and that the question about the user's own machine is open until it is named.
    """
    poc_sentences = answer(poc)[:2]
    existing_ways = [w for w in view.ways if w.slot.startswith("existing")]
    if not existing_ways:  # the recommended plan's result answers the question, plain training's does not
        return (*reversed(poc_sentences), Sentence(key="decide.fits.unnamed"))
    machine = view.decision.ways[existing_ways[0].index].machine
    sufficient_ways = [w for w in existing_ways if w.enough]
    certain_ways = [w for w in sufficient_ways if view.decision.ways[w.index].fit_percent == 100]
    way = (certain_ways or sufficient_ways or existing_ways)[0]
    plain = [w.plain for w in certain_ways or sufficient_ways]
    key = "none" if not plain else "both" if len(plain) == 2 else "plain" if plain[0] else "recommended"
    if key == "recommended" and len(existing_ways) == 2:
        key = "with"  # plain training may fit, or it fits and is too slow
    values: SentenceValues = {
        "machine": machine,
        "hours": way.hours,
        "plan": way.plan,
        "needed": way.machines,
    }
    poc_sentence = Sentence(key="decide.fits.here", values={"answer": poc_sentences[0]})
    main_sentence = Sentence(key=f"decide.fits.{key}", values=values)
    if plain and not certain_ways:
        main_sentence = fit_phrase(view, way.index)
        return (
            main_sentence,
            Sentence(key="decide.fits.likely_with", values=values),
            poc_sentence,
            *poc_sentences[1:],
        )
    return (main_sentence, poc_sentence, *poc_sentences[1:])


def _money(view: DecisionView) -> tuple[Sentence, ...]:
    if view.best is None:
        return (Sentence(key=f"decide.money.{view.decision.why_none}"),)
    best, years = view.best, view.decision.terms.years
    period = {"years": assumed(years, "count", term_anchor("years"))}
    values: dict[str, Figure | str | Sentence] = {
        "way": best.name,
        "cost": best.money["present_cost"],
        "period": Sentence(key="period.one" if years == 1 else "period.many", values=period),
        "initial": best.money["initial"],
        "running": best.money["running_per_year"],
        "saved": view.saved,
        "low": view.saved_low,
        "high": view.saved_high,
    }
    key = headline(view)
    if view.reference is not None:
        values["reference"] = view.reference.name
    sentences = [Sentence(key=f"decide.money.{key}", values=values), *_basis(view)]
    # refers to the way named in the first sentence
    sentences.insert(1, Sentence(key="decide.money.first", values=values))
    sentences += _with_saving(view) if best.plain else []
    if best.untried:
        sentences.append(Sentence(key="decide.money.untried", values={"names": ", ".join(best.untried)}))
    sentences += [
        Sentence(key="decide.money.unpriced", values={"way": w.name})
        for w in view.ways
        if w.money["present_cost"].value is None and w.slot != "nothing"
    ][:1]
    sentences += [fit_phrase(view, i) for i in _doubtful(view)]
    if best.at_least:
        sentences.append(_unknown(view, best))
    return tuple(sentences)


def _basis(view: DecisionView) -> list[Sentence]:
    """Return what the money is for, its currency and place, and, for a typical project, what each of its
    phases costs and what it leaves out. Empty if there is a case file."""
    decision = view.decision
    if not decision.by_default:
        return []
    values: dict[str, Figure | str | Sentence] = {
        "currency": decision.currency,
        "place": Sentence(key=f"place.{decision.place}"),
    }
    if not decision.project:
        return [Sentence(key="decide.money.by_default", values=values)]
    values["project"] = Sentence(key=f"project.{decision.project}")
    sentences = [Sentence(key="decide.money.project", values=values)]
    if view.best is not None and view.best.index < len(decision.phase_time_ratio):
        ratios = decision.phase_time_ratio[view.best.index]
        sentences += [_phases(view, view.best, ratios)] if ratios else []
    if decision.project in _NOTED_PROJECTS:
        sentences.append(Sentence(key=f"project_note.{decision.project}"))
    return sentences


def _phases(view: DecisionView, best: AlternativeRow, ratios: Mapping[str, float]) -> Sentence:
    """Return what each phase of the project costs with the best option, and how long it takes."""
    decision = view.decision
    sheet, hours = decision.sheets[best.index], decision.ways[best.index].hours
    anchor = way_anchor(best.index)
    values: dict[str, Figure | str | Sentence] = {"cost": best.money["present_cost"]}
    for size, ratio in ratios.items():
        cost = None if sheet.present_cost is None else sheet.present_cost * ratio
        values[f"{size}_cost"] = money_figure(decision, cost, anchor)
        values[f"{size}_hours"] = predicted(hours * ratio, "hours", anchor)
    return Sentence(key=f"project_phases.{decision.project}", values=values)


def _doubtful(view: DecisionView) -> list[int]:
    """Return the indices of the best option and of the reference in ``view.decision.ways``, of each only if
    it is less than 100 % probable that its plan fits its machine.

    The user's existing machine is left out, because the answer "fits" already says this about it.
    """
    indices = dict.fromkeys(row.index for row in (view.best, view.reference) if row is not None)
    ways = view.decision.ways
    return [i for i in indices if ways[i].fit_percent < 100 and ways[i].kind != "existing"]


def gains(poc: Poc, view: DecisionView) -> Iterator[Sentence]:
    """Yield, each only if it applies, the sentences below the table of options, in this order: which option
    whose working hours are all known is the cheapest, if hours of the best option are missing; that the PoC
    was run at the size of the decision; how long a run takes with the best option and with the reference; up
    to which size a machine can train with a memory-saving plan and with plain training.

    Yield nothing if there is no best option.
    """
    if view.best is None:
        return
    if view.best.at_least:
        yield from _rank(view, view.best)
    if view.decision.size == poc.job_size:
        yield Sentence(key="decide.money.same_size", values={"size": poc.job_size})
    if view.reference is not None and view.reference.index != view.best.index:
        values: SentenceValues = {"hours": view.best.hours, "other": view.reference.hours}
        yield Sentence(key="decide.money.gain_time", values=values)
    machine = view.decision.ways[view.best.index].machine
    extended_reaches = [
        r for r in poc.reach if r.recommended and (r.plain is None or r.recommended > r.plain)
    ]
    machine_reaches = [r for r in extended_reaches if r.machine == machine] or extended_reaches
    for reach in machine_reaches[:1]:
        unit = "parameters" if reach.quantity == "parameters" else "count"
        source = reach_anchor(poc.reach.index(reach))
        placeholders: SentenceValues = {
            "machine": reach.machine,
            "what": Sentence(key=f"quantity.{reach.quantity}"),
            "most": predicted(reach.recommended, unit, source),
            "plain": predicted(reach.plain, unit, source),
        }
        key = "gain_reach" if reach.plain is not None else "gain_reach_new"
        yield Sentence(key=f"decide.money.{key}", values=placeholders)


def _unknown(view: DecisionView, best: AlternativeRow) -> Sentence:
    """Return the sentence that the best option's cost is a lower bound, because working hours are missing in
    it. If the best option is cheaper than the reference, the sentence also says by how much: so much may its
    missing hours cost, beyond those of the reference, until both cost the same."""
    decision, reference = view.decision, view.reference
    sheets = (decision.sheets[reference.index if reference else best.index], decision.sheets[best.index])
    allowance = (sheets[0].present_cost or 0.0) - (sheets[1].present_cost or 0.0)
    if allowance <= 0:
        return Sentence(key="decide.money.at_least")
    return Sentence(
        key="decide.money.at_least_up_to", values={"spare": money_figure(decision, allowance, SAVING)}
    )


def _with_saving(view: DecisionView) -> list[Sentence]:
    """Return what the cheapest option with a memory-saving plan saves against the reference; if known, by how
    much it is more expensive than the best option; and, if setting up the plan is most of its cost, what that
    is. Empty if there is no such option or no reference.

    It is for a best option that is plain training.
    """
    decision, reference = view.decision, view.reference
    index = decision.recommended
    if index is None or reference is None:
        return []
    share = decision.sheets[index].saved_percent(decision.sheets[reference.index])
    saved = predicted(share, "saving", way_anchor(index))
    values: dict[str, Figure | str | Sentence] = {"way": way_name(decision.ways[index]), "saved": saved}
    if (extra_cost := costs_more(view, index)) is None:
        return [Sentence(key="decide.money.with_saving", values=values)]
    sentences = [Sentence(key="decide.money.with_saving_more", values=values | {"more": extra_cost})]
    sheet = decision.sheets[index]
    if sheet.setup > (sheet.present_cost or 0.0) / 2:
        setup = money_figure(decision, sheet.setup, way_anchor(index))
        sentences.append(Sentence(key="decide.money.mostly_setup", values={"setup": setup}))
    return sentences


def _rank(view: DecisionView, best: AlternativeRow) -> list[Sentence]:
    """Return, as a list of one sentence, which option is the cheapest of those that can do all runs and whose
    working hours are all known, and up to which cost of the missing hours of ``best`` the latter is still
    cheaper. Empty if there is no such option."""
    decision = view.decision
    costs = {w.index: decision.sheets[w.index].present_cost for w in view.ways if w.enough and not w.at_least}
    complete_costs = {i: c for i, c in costs.items() if c is not None and decision.ways[i].kind != "nothing"}
    if not complete_costs:
        return []
    index = min(complete_costs, key=lambda i: complete_costs[i])
    rival = next(w for w in view.ways if w.index == index)
    extra_cost = complete_costs[index] - (decision.sheets[best.index].present_cost or 0.0)
    gap = money_figure(decision, extra_cost, way_anchor(index))
    return [Sentence(key="decide.money.rank", values={"other": rival.name, "gap": gap})]


_ORDER: Final = {"high": 0, "unknown": 1, "some": 2, "low": 3}


def _risk(poc: Poc, view: DecisionView) -> tuple[Sentence, ...]:
    science = answer(poc)[2]
    if not view.risks:
        return (science,)
    worst = min(view.risks, key=lambda r: _ORDER[r.level])
    kinds = [n.verdict.kind.value for n in poc.verdicts if n.name == "recommended"]
    values: dict[str, Figure | str | Sentence] = {
        "name": Sentence(key=f"risk.{worst.kind}"),
        "evidence": worst.evidence,
        "verdict": Sentence(key=f"verdict.{kinds[0]}" if kinds else "decide.risk.unjudged"),
        "stake": Sentence(key="stake.unknown"),
    }
    evidence_key = "decide.risk.low" if worst.level == "low" else "decide.risk.worst"
    keys = ["decide.risk.short", evidence_key]
    for row in (row for row in view.stages if row.stage.name == "pilot"):
        values |= {"stake": pilot_cost_phrase(row), "back": way_back(view, row)}
        keys.append("decide.risk.way_out")
    short, *rest = (Sentence(key=key, values=values) for key in keys)
    return (short, science, *rest)


def _next(view: DecisionView) -> tuple[Sentence, ...]:
    if len(view.stages) < 2:
        return (Sentence(key="decide.next.unfinished"),)
    pilot = view.stages[1]
    if (failed_gate := _failed_gate(view)) is not None:
        limit_notes = [Sentence(key="stages.own_limits")] if view.decision.own_limits else []
        return (Sentence(key="decide.next.stopped", values=failed_gate), *limit_notes)
    if not pilot.stage.machine:
        return (Sentence(key="decide.next.predict"),)
    part = view.decision.pilot_ratio
    placeholders: SentenceValues = {
        "machine": pilot.stage.machine,
        "cost": pilot.to_spend,
        "memory": pilot.stop,
        "share": assumed(100 * part, "percent", stage_anchor("pilot")),
    }
    has_memory_limit = pilot.stop.value is not None
    return (
        Sentence(key="decide.next.pilot" if part == 1 else "decide.next.pilot_part", values=placeholders),
        Sentence(
            key="decide.next.stop" if has_memory_limit else "decide.next.stop_unpriced", values=placeholders
        ),
    )


def _failed_gate(view: DecisionView) -> SentenceValues | None:
    """Return the first failed gate of the stage "poc" as placeholders of a sentence: "gate" (its name),
    "found" and "limit". None if no gate failed or there are no stages."""
    failed_gates = [g for g in view.stages[0].stage.gates if not g[3]] if view.stages else []
    if not failed_gates:
        return None
    gate, result, limit = sourced(gate_words(failed_gates[0]), stage_anchor("poc"))
    return {"gate": gate, "found": result, "limit": limit}


def gate_words(gate: tuple[str, str, str, bool]) -> tuple[Sentence, Sentence | Figure, Sentence | Figure]:
    """Return (name, what was found, what is required) of ``gate`` as sentences and figures, which can be
    shown in any language.

    ``gate``: (name, found, limit, whether it holds), all but the last as texts. If the gate fails and found
    would be shown with the same digits as its limit, found gets more digits.
    """
    name, result, limit, holds = gate
    result_value, limit_value = _gate_value(result, name), _gate_value(limit, name)
    if isinstance(result_value, Figure) and isinstance(limit_value, Sentence) and not holds:
        limit_figure = limit_value.values.get("value")
        if isinstance(limit_figure, Figure) and _same_text(result_value, limit_figure):
            # with enough digits to show the difference
            result_value = dataclasses.replace(result_value, unit="rate")
    return Sentence(key=f"gate.{name}"), result_value, limit_value


def _same_text(first: Figure, second: Figure) -> bool:
    texts = [number_text(f.value, f.unit) for f in (first, second) if f.value is not None]
    return len(texts) == 2 and texts[0] == texts[1]


_KINDS: Final = ("equivalent", "different", "undecided", "not_sensitive")


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
    limit_text = text.removeprefix("at most ")
    unit, scale = _GATE_UNITS.get(name, ("count", 1.0))
    if limit_text == text:
        return measured(scale * float(text), unit, POC)
    limit = assumed(scale * float(limit_text), unit, GATES)
    return Sentence(key="gate_value.at_most", values={"value": limit})


_GATE_UNITS: Final[Mapping[str, tuple[str, float]]] = {
    "memory: prediction error": ("percent", 100.0),
    "time: step by plain's": ("ratio", 1.0),
    "energy: run by plain's": ("ratio", 1.0),
    "effort: attended minutes": ("min", 1.0),
}


# -- phrases for a meeting -------------------------------------------------------------------------------


_FACTS: Final = (
    "comes with torch",
    "released regularly",
    "no release for over a year",
    "dormant: no release since 2022",
)


def engine_fact(text: str) -> Sentence | str:
    """Return ``text``, a statement of memfit's catalog about an engine (a library that trains), such as
    "released regularly", as a `Sentence`, which reports show in their language. One that has no translation
    is returned unchanged."""
    return Sentence(key=f"engine_fact.{text}") if text in _FACTS else text


def phrases(poc: Poc, view: DecisionView) -> Iterator[Sentence]:
    """Yield the phrases for a meeting, in this order: what the best option costs; what the next stages cost;
    the main risks, if they are known; and one for each engine except "replay": that it trained the
    recommended plan in the PoC, that it does not support this plan and why, or that it could train it, each
    with its release, the torch version it needs, its licence and its upkeep."""
    failed_gate = _failed_gate(view)
    yield cost_phrase(poc, view, failed_gate)
    yield stages_phrase(view, failed_gate)
    yield from evaluated_risks(poc, view)
    plan = poc.search.recommended.estimate.plan if poc.search.recommended else None
    used_engine = next((r.spec.engine for r in poc.runs if r.spec.role == "recommended"), "")
    for name in (e for e in ENGINES if e != replay.ENGINE.name):
        facts = catalog.engine_facts(name)
        statements: dict[str, Figure | str | Sentence] = {
            k: engine_fact(facts[k][0]) if k in facts else "?"
            for k in ("release", "torch", "licence", "status")
        }
        gaps = engine(name).refusals(plan) if plan is not None else ()
        key = "phrase.used" if name == used_engine else "phrase.gap" if gaps else "phrase.candidate"
        statements["gap"] = gaps[0] if gaps else ""
        yield Sentence(key=key, values={"engine": name, **statements})
