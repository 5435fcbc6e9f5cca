"""The answer in three sentences: does plain training fit, does the recommended plan fit, are the results
equivalent.

Each sentence reports a measurement if there is one, else a prediction, else that neither is known.
"""

from __future__ import annotations

from memfit.report.provenance import MARGIN, POC, group_anchor, prediction_anchor, verdict_anchor
from memfit.report.quantities import (
    Figure,
    Mark,
    Sentence,
    assumed,
    difference_unit,
    measured,
    predicted,
    sourced,
)
from memfit.report.sensitivity import control_sentence, endpoint_values
from memfit.types.result import NamedVerdict, Poc, Run
from memfit.verify.aggregate import ok_runs, peak_bytes


def answer(poc: Poc) -> tuple[Sentence, ...]:
    """Return three or four sentences: (1) whether plain training fits the PoC's memory cap, as measured, or
    as predicted if it did not run under the cap; (2) the recommended plan with its measured peak memory, or
    the predicted one if it did not run, or how its run ended if none completed, or that no plan fits; (3)
    whether its results are equivalent to those of plain training and a repeated run gives the same results,
    or that this was not measured; (4) if this is known, whether the test would have noticed a degraded
    training."""
    sentences = (_plain(poc), _recommended(poc), _science(poc), _sensitivity(poc))
    return tuple(sentence for sentence in sentences if sentence is not None)


def _plain(poc: Poc) -> Sentence:
    cap = assumed(poc.cap_bytes, "bytes", POC)
    capped = [r for r in _runs(poc, "baseline") if r.spec.cap_bytes is not None]
    need = peak_bytes(_runs(poc, "baseline"))
    anchor = group_anchor("baseline", poc.search.baseline.estimate.plan)
    need_figure = measured(need, "bytes", anchor) if need else _predicted_peak(poc)
    if not capped:
        key = "answer.plain.predicted_fits" if poc.search.baseline.fits else "answer.plain.predicted_oom"
        return Sentence(key=key, values={"cap": cap, "peak": _predicted_peak(poc)})
    outcome = capped[0].measurement.outcome
    values: dict[str, Figure | str | Sentence] = {"cap": cap, "peak": need_figure}
    return Sentence(key=f"answer.plain.{outcome}", values=values)


def _predicted_peak(poc: Poc) -> Figure:
    estimate = poc.search.baseline.estimate
    need = poc.search.baseline.needed_bytes or estimate.allocated_bytes.value
    return predicted(need, "bytes", prediction_anchor(estimate.plan))


def _runs(poc: Poc, role: str) -> list[Run]:
    return [run for run in poc.runs if run.spec.role == role]


def _recommended(poc: Poc) -> Sentence:
    best = poc.search.recommended
    if best is None:
        smallest = poc.search.smallest.estimate
        need = poc.search.smallest.needed_bytes or smallest.allocated_bytes.value
        least = predicted(need, "bytes", prediction_anchor(smallest.plan))
        cap = assumed(poc.cap_bytes, "bytes", POC)
        return Sentence(key="answer.plan.none", values={"cap": cap, "least": least})
    plan = best.estimate.plan.label
    runs = _runs(poc, "recommended")
    peak = peak_bytes(runs)
    if peak is not None:
        return sourced(_measured_plan(poc, plan, peak), group_anchor("recommended", runs[0].spec.plan))
    if runs:
        outcome = Sentence(key=f"outcome.{runs[-1].measurement.outcome}")
        return Sentence(key="answer.plan.broke", values={"plan": plan, "outcome": outcome})
    predicted_peak = predicted(
        best.estimate.allocated_bytes.value, "bytes", prediction_anchor(best.estimate.plan)
    )
    return Sentence(key="answer.plan.predicted", values={"plan": plan, "peak": predicted_peak})


def _measured_plan(poc: Poc, plan: str, peak: int) -> Sentence:
    plain_peak = peak_bytes(_runs(poc, "baseline"))
    capped = any(r.spec.cap_bytes is not None for r in ok_runs(_runs(poc, "recommended")))
    values: dict[str, Figure | str | Sentence] = {"plan": plan, "peak": measured(peak, "bytes")}
    if plain_peak is None or poc.step_time_ratio is None:
        return Sentence(key="answer.plan.measured_alone", values=values)
    values["share"] = measured(100 * peak / plain_peak, "percent")
    values["ratio"] = measured(poc.step_time_ratio, "ratio")
    return Sentence(key="answer.plan.measured" if capped else "answer.plan.measured_uncapped", values=values)


def _science(poc: Poc) -> Sentence:
    reproducibility = _reproducible(poc)
    named_verdict = next((n for n in poc.verdicts if n.name == "recommended"), None)
    if named_verdict is None:
        return Sentence(key="answer.science.missing", values={"reproducible": reproducibility})
    verdict = named_verdict.verdict
    if verdict.difference is None or verdict.margin is None:
        is_bitwise = verdict.cause is not None and verdict.cause.kind == "equal_bits"
        kind = "equal_bits" if is_bitwise else verdict.kind
        return Sentence(key=f"answer.science.{kind}", values={"reproducible": reproducibility})
    values = {**_endpoint_figures(named_verdict, poc), "reproducible": reproducibility}
    sentence = Sentence(key=f"answer.science.{verdict.kind}_interval", values=values)
    return sourced(sentence, verdict_anchor(named_verdict.name))


def _sensitivity(poc: Poc) -> Sentence | None:
    verdict = next((n.verdict for n in poc.verdicts if n.name == "recommended"), None)
    sentence = control_sentence(verdict) if verdict is not None else None
    return sentence and sourced(sentence, verdict_anchor("recommended"))


def _endpoint_figures(named_verdict: NamedVerdict, poc: Poc) -> dict[str, Figure | str | Sentence]:
    """Return the figures of the endpoint that decided the verdict: a surrogate that its cause names, else the
    metric."""
    verdict, unit = named_verdict.verdict, poc.metric_unit
    cause = verdict.cause
    if cause is not None and cause.kind.startswith("surrogate_"):
        decisive = next(s for s in verdict.surrogates if s.name == cause.detail)
        return {**endpoint_values(decisive), "pairs": measured(verdict.pairs, "count")}

    def bound(value: float | None) -> Figure:
        return Figure(value=value, unit=difference_unit(unit), mark=Mark.MEASURED, signed=True)

    return {
        "metric": verdict.metric,
        "difference": bound(verdict.difference),
        "low": bound(verdict.low),
        "high": bound(verdict.high),
        "margin": assumed(verdict.margin, difference_unit(unit), MARGIN if poc.metric_margin_source else ""),
        "pairs": measured(verdict.pairs, "count"),
    }


def _reproducible(poc: Poc) -> Sentence:
    reproducibility = poc.reproducibility
    if reproducibility.reproducible is None:
        return Sentence(key="answer.reproducible.missing")
    if reproducibility.reproducible and reproducibility.steps is not None:
        steps = measured(reproducibility.steps, "count", POC)
        return Sentence(key="answer.reproducible.yes_steps", values={"steps": steps})
    if reproducibility.reproducible:
        return Sentence(key="answer.reproducible.yes")
    if reproducibility.first_differing_step is None:
        return Sentence(key="answer.reproducible.no")
    step = measured(reproducibility.first_differing_step, "count", POC)
    return Sentence(key="answer.reproducible.no_step", values={"step": step})
