"""Sentences on the endpoints beside the metric, and on whether the test would have noticed a loss."""

from __future__ import annotations

from memfit.report.quantities import Figure, Mark, Sentence, assumed, difference_unit, measured
from memfit.types.result import ControlResult, EndpointDifference, Verdict, VerdictKind


def surrogate_sentences(verdict: Verdict) -> tuple[Sentence, ...]:
    """Return a sentence on each surrogate: its difference, interval, margin and result."""
    return tuple(
        Sentence(
            key="sensitivity.surrogate",
            values={**endpoint_values(s), "kind": Sentence(key=f"verdict.{s.kind}")},
        )
        for s in verdict.surrogates
    )


def control_sentence(verdict: Verdict) -> Sentence | None:
    """Return the sentence on whether the test would have noticed the job's negative control, or why that is
    not known. None if the verdict has no control.

    Of several endpoints, the sentence names the one with the largest difference relative to its margin, among
    those in which the control was judged different, if there are any."""
    control = verdict.control
    if control is None:
        return None
    name = Sentence(key=f"control.{control.control}")
    if not control.endpoints:
        return Sentence(key="sensitivity.unknown", values={"control": name, "problem": control.problem})
    result = "noticed" if control.noticed else "missed"
    return Sentence(
        key=f"sensitivity.{result}_{control.source}",
        values={
            **endpoint_values(_decisive(control)),
            "control": name,
            "pairs": measured(control.pairs, "count"),
            "date": control.date,
        },
    )


def _decisive(control: ControlResult) -> EndpointDifference:
    def rank(result: EndpointDifference) -> tuple[bool, float]:
        return result.kind is VerdictKind.DIFFERENT, abs(result.difference) / result.margin

    return max(control.endpoints, key=rank)


def endpoint_values(result: EndpointDifference) -> dict[str, Figure | str | Sentence]:
    """Return the placeholders metric, difference, low, high and margin of a sentence on one endpoint."""
    unit = difference_unit(result.unit)
    bounds = {"difference": result.difference, "low": result.low, "high": result.high}
    figures = {n: Figure(value=v, unit=unit, mark=Mark.MEASURED, signed=True) for n, v in bounds.items()}
    return {"metric": result.name, "margin": assumed(result.margin, unit), **figures}
