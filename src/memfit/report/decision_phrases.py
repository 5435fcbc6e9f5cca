"""Sentences for a meeting: what the best option costs, as the page's answer says it, with its caveats; the
stages and the main risks. A loss is called a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from memfit.report.decision_rows import DecisionView, StageRow, way_name
from memfit.report.provenance import machine_anchor, way_anchor
from memfit.report.quantities import MANY, Figure, Sentence, assumed, predicted
from memfit.types.result import Poc

Filled = Mapping[str, Figure | str | Sentence]


def headline(view: DecisionView) -> str:
    """Return the end of the key of the answer on money, which the page and the phrases share.

    Without a best option: the reason why there is none (``why_none`` of the decision). Else the first that
    applies: "no_reference" (no reference, or the saving is unknown), "is_reference" (the best option is the
    reference), "does_not_pay" (the best option is plain training), "saves" or "loses" (it costs less than the
    reference, or not).
    """
    if view.best is None:
        return view.decision.why_none
    if view.reference is None or view.saved.value is None:
        return "no_reference"
    if view.reference.index == view.best.index:
        return "is_reference"
    if view.best.plain:
        return "does_not_pay"
    return "saves" if view.saved.value > 0 else "loses"


def costs_more(view: DecisionView, index: int) -> Sentence | None:
    """Return by how much the option at ``index`` of the decision costs more than the best one: in percent, or
    as a multiple if it costs over three times as much. None if one of the two costs is unknown, if there is
    no best option, or if its cost is not above 0."""
    sheets, best = view.decision.sheets, view.decision.best
    cost, best_cost = sheets[index].present_cost, sheets[best].present_cost if best is not None else None
    if cost is None or not best_cost or best_cost <= 0:
        return None
    return _more(cost / best_cost, way_anchor(index))


def _more(ratio: float, source: str) -> Sentence:
    if 100 * (1 - ratio) < MANY:
        return Sentence(key="phrase.by_times", values={"times": predicted(ratio, "times", source)})
    return Sentence(
        key="phrase.by_percent", values={"change": predicted(100 * (ratio - 1), "percent", source)}
    )


def cost_phrase(poc: Poc, view: DecisionView, stopped: Filled | None) -> Sentence:
    """Return one sentence on what the best option costs compared with the reference, followed by its
    caveats. Without a reference or a known saving, it says that the cost is not known, with the caveats;
    without a best option, it says only that.

    ``stopped``: the first failed gate as placeholders (see `stages_phrase`), or None.
    """
    sentence = _claim(view)
    if view.best is None:
        return sentence
    key = "phrase.but"
    for caveat in _caveats(poc, view, stopped):
        sentence = Sentence(key=key, values={"claim": sentence, "caveat": caveat})
        key = "phrase.also"
    return sentence


def _claim(view: DecisionView) -> Sentence:
    key, best, reference = headline(view), view.best, view.reference
    if best is None or reference is None or view.saved.value is None:
        return Sentence(key="phrase.no_cost")
    if key in ("is_reference", "does_not_pay"):
        recommended = view.decision.recommended
        extra_cost = None if recommended is None else costs_more(view, recommended)
        if recommended is None or extra_cost is None:
            return Sentence(key="phrase.same", values={"way": best.name})
        placeholders = {
            "way": best.name,
            "tight": way_name(view.decision.ways[recommended]),
            "more": extra_cost,
        }
        return Sentence(key="phrase.does_not_pay", values=placeholders)
    values: Filled = {
        "way": best.name,
        "reference": reference.name,
        "low": view.saved_low,
        "high": view.saved_high,
        "change": dataclasses.replace(view.saved, unit="percent"),
        "more": _more(1 - view.saved.value / 100, view.saved.source),
    }
    return Sentence(key="phrase.less" if key == "saves" else "phrase.more", values=values)


def _caveats(poc: Poc, view: DecisionView, failed_gate: Filled | None) -> Iterator[Sentence]:
    """Yield, each only if it applies, the caveats of the answer on money, in this order: that the best
    option's plan may not fit; that its results are not shown to be equivalent; which of its techniques were
    not trained in the PoC; that a gate failed; that working hours are missing in its cost.

    If the best option is plain training, only the first and the last are possible.
    """
    best = view.best
    assert best is not None, "there are no caveats without a best option"
    way = view.decision.ways[best.index]
    if way.fit_percent < 100:
        yield dataclasses.replace(fit_phrase(view, best.index), key="phrase.caveat_likely")
    if not best.plain:
        kind = next((n.verdict.kind.value for n in poc.verdicts if n.name == "recommended"), None)
        if kind != "equivalent":
            verdict = Sentence(key=f"verdict.{kind}" if kind else "decide.risk.unjudged")
            yield Sentence(key="phrase.caveat_science", values={"verdict": verdict})
        if best.untried:
            yield Sentence(key="phrase.caveat_untried", values={"names": ", ".join(best.untried)})
        if failed_gate is not None:
            yield Sentence(key="phrase.caveat_stopped", values=failed_gate)
    if best.at_least:
        yield Sentence(key="phrase.caveat_hours")


def fit_phrase(view: DecisionView, index: int) -> Sentence:
    """Return the sentence on how probable it is that the plan of the option at ``index`` fits its machine,
    with the upper end of its predicted memory and the memory there is. It is for options whose upper end is
    more than that memory."""
    way, source = view.decision.ways[index], way_anchor(index)
    high = None if way.memory_bytes is None else way.memory_bytes.high
    values: Filled = {
        "machine": way.machine,
        "chance": predicted(way.fit_percent, "chance", source),
        "high": predicted(high, "bytes", source),
        "usable": assumed(way.usable_bytes, "bytes", machine_anchor(way.machine)),
    }
    return Sentence(key="decide.fits.likely", values=values)


def stages_phrase(view: DecisionView, stopped: Filled | None) -> Sentence:
    """Return one sentence on the stages: the gate that stopped them if ``stopped`` is given; else, if there
    are fewer than three stages or the pilot has no machine, that the pilot is not priced yet; else what the
    pilot and the full stage would cost.

    ``stopped``: the first failed gate of the PoC as the placeholders "gate", "found" and "limit", or None.
    """
    if stopped is not None:
        return Sentence(key="phrase.staged_stopped", values=stopped)
    if len(view.stages) < 3 or not view.stages[1].stage.machine:
        return Sentence(key="phrase.staged_unknown")
    pilot, full = view.stages[1], view.stages[2]
    return Sentence(key="phrase.staged", values={"pilot": pilot_cost_phrase(pilot), "full": full.to_spend})


def pilot_cost_phrase(pilot: StageRow) -> Sentence:
    """Return the most that the pilot can cost, as part of a sentence: "... at most", "... at most without
    labour" if working hours or their price are missing, or "not known yet"."""
    key = "unknown" if pilot.most.value is None else "without_labour" if pilot.stage.unpaid else "known"
    return Sentence(key=f"stake.{key}", values={"loss": pilot.most})


def way_back(view: DecisionView, row: StageRow) -> Sentence:
    """Return what to go back to if the stage ``row`` fails: plain training on the same machine, plain
    training on another machine (named if it is an option of the decision), or what is done today."""
    way_index = row.stage.back_way
    values = {} if way_index is None else {"way": way_name(view.decision.ways[way_index])}
    return Sentence(key=f"back.{row.stage.back}", values=values)


def evaluated_risks(poc: Poc, view: DecisionView) -> Iterator[Sentence]:
    """Yield one sentence on the risks "load" (operating load) and "reproducibility": the evidence on both,
    and which of the two were evaluated. Yield nothing unless the decision has both risks.

    Operating load counts as evaluated if the attended minutes are known, reproducibility if a run was
    repeated.
    """
    evidence = {r.kind: r.evidence for r in view.risks}
    if not {"load", "reproducibility"} <= evidence.keys():
        return
    load_counted = poc.effort.attended_minutes is not None
    reproducibility_tested = poc.reproducibility.reproducible is not None
    key = (
        "risks"
        if load_counted and reproducibility_tested
        else "risks_load"
        if reproducibility_tested
        else "risks_again"
        if load_counted
        else "risks_open"
    )
    yield Sentence(
        key=f"phrase.{key}", values={"load": evidence["load"], "reproducibility": evidence["reproducibility"]}
    )
