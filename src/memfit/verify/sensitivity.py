"""Assay sensitivity: would the equivalence test have noticed a training that is known to be worse?

As in trials of equivalence (ICH E10, section 1.5), "equivalent" proves nothing if the test cannot tell a
degraded training from plain training. Each job names such a training beforehand, its negative control. Where
the test would not have judged it different, the verdict is "not_sensitive" in place of "equivalent".
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from importlib import resources

from memfit.types import serialization
from memfit.types.job import Job, Metric
from memfit.types.launch import RunSpec
from memfit.types.result import (
    Cause,
    ControlResult,
    EndpointDifference,
    OutcomeKind,
    PowerStudy,
    Run,
    Verdict,
    VerdictKind,
)
from memfit.verify.equivalence import Tost, interval_kind, tost

_STUDIES = "power_studies.json"


def endpoint_differences(
    baseline: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]], endpoints: Sequence[Metric]
) -> tuple[EndpointDifference, ...]:
    """Return the result of the equivalence test in each endpoint. ``baseline``, ``other``: name of each
    endpoint -> its value, for at least 3 runs each; those at one position are a pair of one seed. All values
    must be finite."""
    pairs = list(zip(baseline, other, strict=True))
    return tuple(
        endpoint_difference(tost([b[e.name] - a[e.name] for a, b in pairs], margin=e.margin), e)
        for e in endpoints
    )


def endpoint_difference(test: Tost, endpoint: Metric) -> EndpointDifference:
    """Return the result ``test`` of the equivalence test in ``endpoint``."""
    return EndpointDifference(
        name=endpoint.name,
        unit=endpoint.unit,
        margin=test.margin,
        difference=test.difference,
        low=test.low,
        high=test.high,
        kind=test.kind,
    )


def overall(kinds: Sequence[VerdictKind]) -> VerdictKind:
    """Return the verdict over several endpoints: "different" if one is, "equivalent" if all are, else
    "undecided"."""
    if VerdictKind.DIFFERENT in kinds:
        return VerdictKind.DIFFERENT
    is_equivalent = all(kind is VerdictKind.EQUIVALENT for kind in kinds)
    return VerdictKind.EQUIVALENT if is_equivalent else VerdictKind.UNDECIDED


def degrade_run(spec: RunSpec, control: str) -> RunSpec:
    """Return ``spec``, a run of plain training, changed to a run of the negative control ``control``. For
    "half-steps" it has half of the steps, at least one; any other control is applied by the worker.
    """
    steps = max(1, spec.steps // 2) if control == "half-steps" else spec.steps
    return dataclasses.replace(spec, degraded=control, steps=steps)


def scores(run: Run, endpoints: Sequence[Metric]) -> Mapping[str, float] | None:
    """Return the value of each endpoint by name: the job's metric for the first endpoint, a surrogate for
    each other one. None if the run did not complete, if a value is missing or not finite, or if there are no
    endpoints."""
    measurement = run.measurement
    if measurement.outcome is not OutcomeKind.OK or not endpoints:
        return None
    values = {endpoints[0].name: measurement.metric, **measurement.surrogates}
    finite = {e.name: v for e in endpoints if (v := values.get(e.name)) is not None and math.isfinite(v)}
    return finite if len(finite) == len(endpoints) else None


def judge_pair(baseline: Run, control: Run, endpoints: Sequence[Metric], verdict: Verdict) -> ControlResult:
    """Return how the test that gave ``verdict`` would have judged one pair of runs: plain training
    (``baseline``) and the negative control (``control``).

    In each endpoint, the difference of the two runs gets an interval as wide as that in ``verdict``, which
    must be based on the endpoints. The control counts as noticed if one of these intervals is outside the
    endpoint's margin. If `scores` returns None for one of the runs, the control counts as not noticed, and
    ``problem`` has the reason.
    """
    name = control.spec.degraded
    plain_scores, control_scores = scores(baseline, endpoints), scores(control, endpoints)
    if plain_scores is None or control_scores is None:
        measurement = control.measurement
        problem = (
            f"its run ended {measurement.outcome}: {measurement.reason}"
            if measurement.reason
            else "its run has no finite value of each endpoint"
        )
        return ControlResult(control=name, noticed=False, source="pair", pairs=1, problem=problem)
    assert verdict.low is not None and verdict.high is not None
    widths = [verdict.high - verdict.low, *(s.high - s.low for s in verdict.surrogates)]
    results = tuple(
        _with_width(control_scores[e.name] - plain_scores[e.name], width, e)
        for e, width in zip(endpoints, widths, strict=True)
    )
    return ControlResult(
        control=name, noticed=_is_noticed(results), source="pair", pairs=1, endpoints=results
    )


def _with_width(difference: float, width: float, endpoint: Metric) -> EndpointDifference:
    low, high, margin = difference - width / 2, difference + width / 2, endpoint.margin
    return EndpointDifference(
        name=endpoint.name,
        unit=endpoint.unit,
        margin=margin,
        difference=difference,
        low=low,
        high=high,
        kind=interval_kind(low, high, margin=margin),
    )


def _is_noticed(results: Sequence[EndpointDifference]) -> bool:
    return overall([result.kind for result in results]) is VerdictKind.DIFFERENT


def judge_study(study: PowerStudy) -> ControlResult:
    """Return how the negative control was judged in a stored power study."""
    return ControlResult(
        control=study.negative_control,
        noticed=_is_noticed(study.control),
        source="study",
        pairs=len(study.seeds),
        endpoints=study.control,
        date=study.date,
    )


def with_control(verdict: Verdict, control: ControlResult | None) -> Verdict:
    """Return the verdict with the result of the negative control. "equivalent" becomes "not_sensitive" if the
    control was not judged different. Without a result (``control`` is None), and if it is not based on the
    metric, the verdict is returned unchanged."""
    if control is None or not verdict.metric:
        return verdict
    if verdict.kind is not VerdictKind.EQUIVALENT or control.noticed:
        return dataclasses.replace(verdict, control=control)
    return dataclasses.replace(
        verdict,
        kind=VerdictKind.NOT_SENSITIVE,
        control=control,
        reason=f"{verdict.reason}; but the test would not have noticed {control.control}",
        cause=Cause(kind="not_sensitive"),
    )


@functools.cache
def power_studies() -> tuple[PowerStudy, ...]:
    """Return the power studies that come with memfit, made by benchmarks/sensitivity.py."""
    text = (resources.files("memfit.verify") / _STUDIES).read_text(encoding="utf-8")
    return serialization.loads(tuple[PowerStudy, ...], text, what=_STUDIES)


def power_study(job: Job, spec: RunSpec) -> PowerStudy | None:
    """Return the stored power study that holds for ``spec``, a run of plain training of ``job``; None if
    there is none.

    It holds for the same built-in job, size, steps, batch, negative control and margins, with the data,
    weights, other sizes, gradient clipping and averaged weights (EMA) that the job has by itself.
    """
    margins = {endpoint.name: endpoint.margin for endpoint in job.endpoints}
    ref = spec.job
    if ref.data or ref.weights or ref.length or ref.dimensions or ref.clip is not None or ref.ema is not None:
        return None
    key = (ref.spec, job.size, spec.steps, spec.batch_size, job.negative_control)
    for study in power_studies():
        study_key = (study.job, study.size, study.steps, study.batch_size, study.negative_control)
        study_margins = {result.name: result.margin for result in study.control}
        if study_key == key and _alike(margins, study_margins):
            return study
    return None


def _alike(margins: Mapping[str, float], others: Mapping[str, float]) -> bool:
    return margins.keys() == others.keys() and all(
        math.isclose(margin, others[name], rel_tol=1e-6) for name, margin in margins.items()
    )
