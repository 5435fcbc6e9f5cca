"""The first screen of the report: one sentence, three numbers, one picture and the next step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from memfit.report.answer import answer
from memfit.report.decision_phrases import headline
from memfit.report.decision_rows import DecisionView
from memfit.report.provenance import POC, prediction_anchor
from memfit.report.quantities import Figure, Sentence, assumed, predicted
from memfit.types.result import Poc


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SummaryNumber:
    """One of the numbers of the first screen, at most three. ``name``: what it is. ``note``: what it is
    compared with. ``live``: name by which the page's script finds it when a slider moves, or ""."""

    name: Sentence
    figure: Figure
    note: Sentence
    live: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SummaryBar:
    """One bar of the picture: the memory there is ("have"), or the peak of plain training ("plain") or of the
    recommended plan ("plan")."""

    kind: str
    figure: Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the first screen says. ``plan``: label of the recommended plan, "" if there is none or if it is
    plain training. ``next_step``: what to do next."""

    sentence: Sentence
    plan: str
    numbers: tuple[SummaryNumber, ...]
    bars: tuple[SummaryBar, ...]
    basis: Sentence | None  # what the money is for, if no case file says it
    next_step: Sentence


def summary(poc: Poc, decision: DecisionView | None) -> Summary:
    """Return the first screen of the report on ``poc``. Measurements are preferred to predictions.

    Its numbers, each only if it is known: the recommended plan's peak in % of plain training's; its step time
    over plain training's; and money if there is a decision with a best option, else the difference of the
    metric.
    """
    plain, plan, science = answer(poc)[:3]
    best = poc.search.recommended
    is_plain = best is not None and not best.estimate.plan.uses
    values = _values(poc, plain, plan)
    key = _memory_key(plain, plan, is_plain=is_plain)
    memory = Sentence(key=f"summary.memory.{key}", values=values)
    alone = key in ("none", "broke", "plain")
    sentence = (
        Sentence(key="summary.alone", values={"memory": memory})
        if alone
        else Sentence(key="summary.both", values={"memory": memory, "accuracy": _accuracy(science)})
    )
    return Summary(
        sentence=sentence,
        plan="" if best is None or is_plain else best.estimate.plan.label,
        numbers=tuple(_numbers(poc, plan, science, decision, values)),
        bars=tuple(_bars(values)),
        basis=_basis(decision) if decision is not None else None,
        next_step=decision.questions["next"][0] if decision else Sentence(key="summary.next"),
    )


def _basis(decision: DecisionView) -> Sentence | None:
    keys = ("decide.money.project", "decide.money.by_default")
    return next((s for s in decision.questions["money"] if s.key in keys), None)


def _values(poc: Poc, plain: Sentence, plan: Sentence) -> dict[str, Figure | str | Sentence]:
    """Return the figures of the first screen: "cap", "peak" (of plain training) and, as far as they are
    known, "plan_peak", "least" (need of the smallest plan) and "outcome" (how the plan's run ended)."""
    best = poc.search.recommended
    values = {"cap": assumed(poc.cap_bytes, "bytes", POC), "peak": plain.values["peak"]}
    if "peak" in plan.values:
        values["plan_peak"] = plan.values["peak"]
    elif best is not None:
        peak = best.estimate.allocated_bytes.value
        values["plan_peak"] = predicted(peak, "bytes", prediction_anchor(best.estimate.plan))
    return values | {name: plan.values[name] for name in ("least", "outcome") if name in plan.values}


def _memory_key(plain: Sentence, plan: Sentence, *, is_plain: bool) -> str:
    plain_end, plan_end = (sentence.key.rpartition(".")[2] for sentence in (plain, plan))
    if plan_end in ("none", "broke"):
        return plan_end
    if is_plain:
        return "plain"
    prefix = "fits" if plain_end in ("ok", "predicted_fits") else "saves"
    prefix = "open" if plain_end in ("timeout", "interrupted", "failed") else prefix
    return f"{prefix}_predicted" if plan_end == "predicted" else prefix


def _accuracy(science: Sentence) -> Sentence:
    """Return ``science``, the sentence on the test of the results, in the form that ends another sentence."""
    key = science.key.rpartition(".")[2]
    metric = science.values.get("metric", "")
    return Sentence(key=f"summary.accuracy.{key}", values={"metric": metric})


def _numbers(
    poc: Poc,
    plan: Sentence,
    science: Sentence,
    decision: DecisionView | None,
    values: dict[str, Figure | str | Sentence],
) -> Iterator[SummaryNumber]:
    best = poc.search.recommended
    plain_estimate = poc.search.baseline.estimate
    share, ratio = plan.values.get("share"), plan.values.get("ratio")
    if best is not None and not isinstance(share, Figure):
        source = prediction_anchor(best.estimate.plan)
        part = best.estimate.allocated_bytes.value / plain_estimate.allocated_bytes.value
        share = predicted(100 * part, "percent", source)
        times = (best.estimate.step_s, plain_estimate.step_s)
        known = times[0] is not None and times[1] is not None and times[1].value
        quotient = times[0].value / times[1].value if known and times[0] and times[1] else None
        ratio = predicted(quotient, "ratio", source)
    if isinstance(share, Figure):
        yield SummaryNumber(
            name=Sentence(key="summary.peak"),
            figure=share,
            note=Sentence(key="summary.peak_note", values=values),
        )
    if isinstance(ratio, Figure):
        yield SummaryNumber(
            name=Sentence(key="summary.time"), figure=ratio, note=Sentence(key="summary.time_note")
        )
    money = _money(decision) if decision is not None else None
    if money is not None:
        yield money
    elif isinstance(difference := science.values.get("difference"), Figure):
        yield SummaryNumber(
            name=Sentence(key="summary.metric", values={"metric": science.values["metric"]}),
            figure=difference,
            note=Sentence(key="summary.metric_note", values={"margin": science.values["margin"]}),
        )


def _money(decision: DecisionView) -> SummaryNumber | None:
    best, reference = decision.best, decision.reference
    if best is None:
        return None
    if reference is not None and headline(decision) in ("saves", "loses"):
        values: dict[str, Figure | str | Sentence] = {"way": best.name, "reference": reference.name}
        values |= {"low": decision.saved_low, "high": decision.saved_high}
        note = Sentence(key="summary.saved_note", values=values)
        return SummaryNumber(
            name=Sentence(key="summary.saved"), figure=decision.saved, note=note, live="saved"
        )
    return SummaryNumber(
        name=Sentence(key="summary.cost"),
        figure=best.money["present_cost"],
        note=Sentence(
            key="summary.cost_note_plain" if best.plain else "summary.cost_note", values={"way": best.name}
        ),
        live="present",
    )


def _bars(values: dict[str, Figure | str | Sentence]) -> Iterator[SummaryBar]:
    for kind, name in (("have", "cap"), ("plain", "peak"), ("plan", "plan_peak")):
        figure = values.get(name)
        if isinstance(figure, Figure) and figure.value is not None:
            yield SummaryBar(kind=kind, figure=figure)
