"""Convert results to the plain data that ``--json`` prints. The names of keys are stable."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from memfit.types import serialization
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.result import NOT_INCLUDED, Choice, Estimate, Measurement, Poc, Run, SearchResult

View = Mapping[str, Any]


def plan_view(plan: Plan) -> View:
    """Return "plan" (technique -> settings) and "label" (the plan in one line). The number of ranks is only
    in the label."""
    return {"plan": plan.to_dict(), "label": plan.label}


def estimate_view(estimate: Estimate) -> View:
    """Return the estimate's fields by name, with its plan as technique -> settings ("plan"), the plan in one
    line ("label"), and what predictions do not include ("not_included")."""
    additional = {**plan_view(estimate.plan), "not_included": list(NOT_INCLUDED)}
    return serialization.to_plain(estimate) | additional  # type: ignore[no-any-return]


def choice_view(choice: Choice) -> View:
    """Return a plan that a search found: its techniques and label, its effect on results, whether it fits,
    the bytes that it needs, its estimate, and the reasons for and against techniques."""
    plain = serialization.to_plain(choice.estimate)
    return {
        **plan_view(choice.estimate.plan),
        "effect": choice.effect.label,
        "fits": choice.fits,
        "needed_bytes": choice.needed_bytes,
        "estimate": {name: value for name, value in plain.items() if name != "plan"},
        "reasons": serialization.to_plain(choice.reasons),
    }


def search_view(result: SearchResult, correction: Calibration | None = None) -> View:
    """Return the result of a search. "recommended" is null if nothing fits. "smallest" is always the plan
    that needs the least memory. "timings" is null for a machine of the catalog. "correction" says how
    measured runs correct predicted step times; it is null if ``correction`` is None or comes from no run."""
    corrected = correction is not None and correction.corrected_by
    return {
        "correction": correction_view(correction) if correction is not None and corrected else None,
        "recommended": choice_view(result.recommended) if result.recommended else None,
        "frontier": [choice_view(c) for c in result.frontier],
        "baseline": choice_view(result.baseline),
        "smallest": choice_view(result.smallest),
        "cap_bytes": result.cap_bytes,
        "cap_reason": result.cap_reason,
        "goal": result.goal,
        "considered": result.considered,
        "sensitivity": [serialization.to_plain(s) for s in result.sensitivity],
        "timings": {**serialization.to_plain(result.timings), "noisy": result.timings.noisy}
        if result.timings
        else None,
        "trials": [
            {**plan_view(t.plan), **{k: v for k, v in serialization.to_plain(t).items() if k != "plan"}}
            for t in result.trials
        ],
        "unfinished": result.unfinished,
    }


def correction_view(calibration: Calibration) -> View:
    """Return how the measured step times of a proof of concept correct predicted ones: its ID, the number of
    plans that were measured, the factor on every predicted step time, further factors for single techniques,
    and the spread that remains, as a ratio."""
    return {
        "poc_id": calibration.corrected_by,
        "plans": calibration.corrected_count,
        "step_ratio": calibration.step_ratio,
        "technique_ratio": dict(calibration.technique_ratio),
        "step_spread_ratio": calibration.step_spread_ratio,
    }


def step_s(measurement: Measurement) -> float | None:
    """Return the median step time in seconds without the first two steps, which warm the caches. If there are
    no more than two steps, return the median of those; None if no step was measured."""
    steady = measurement.step_s[2:] or measurement.step_s
    return statistics.median(steady) if steady else None


def run_view(run: Run) -> View:
    """Return a run's settings, its predicted and measured memory and step time, and what else was measured;
    null for what is not known."""
    spec, measurement = run.spec, run.measurement
    return {
        "name": spec.name,
        "role": spec.role,
        **plan_view(spec.plan),
        "capped": spec.cap_bytes is not None,
        "cap_bytes": spec.cap_bytes,
        "seed": spec.seed,
        "steps": spec.steps,
        "keep": serialization.to_plain(spec.keep),
        "outcome": measurement.outcome.value,
        "reason": measurement.reason,
        "predicted_peak_bytes": run.predicted_peak_bytes,
        "measured_peak_bytes": measurement.peak_bytes,
        "peak_source": measurement.peak_source,
        "predicted_phase_peak_bytes": dict(run.predicted_phase_peak_bytes),
        "phase_peak_bytes": dict(measurement.phase_peak_bytes),
        "predicted_step_s": run.predicted_step_s,
        "step_s": step_s(measurement),
        "losses": list(measurement.losses),
        "grad_norms": list(measurement.grad_norms),
        "metric": measurement.metric,
        "limit_kind": measurement.limit_kind,
        "overhead_ratio": measurement.overhead_ratio,
        "energy_j": measurement.energy_j,
        "energy_boundary": measurement.energy_boundary,
        "wall_s": measurement.wall_s,
    }


def poc_view(poc: Poc) -> View:
    """Return a proof of concept, also an unfinished one. "verdict" is the kind of the verdict on the
    recommended plan, or null before there is one; "verdicts" holds all verdicts, by name. "report" is the
    path of the HTML report."""
    verdicts = {named.name: serialization.to_plain(named.verdict) for named in poc.verdicts}
    search = search_view(poc.search)
    return {
        "workload": serialization.to_plain(poc.workload) if poc.workload is not None else None,
        "poc_id": poc.poc_id,
        "finished": poc.finished,
        "job": poc.job_name,
        "size": poc.job_size,
        "machine": poc.machine,
        "cap_bytes": poc.cap_bytes,
        "cap_reason": poc.cap_reason,
        "runs": [run_view(run) for run in poc.runs],
        "recommended": search["recommended"],
        "frontier": search["frontier"],
        "verdict": verdicts["recommended"]["kind"] if "recommended" in verdicts else None,
        "verdicts": verdicts,
        "reproducible": poc.reproducibility.reproducible,
        "reproducibility": serialization.to_plain(poc.reproducibility),
        "step_time_ratio": poc.step_time_ratio,
        "metric_name": poc.metric,
        "metric_unit": poc.metric_unit,
        "metric_naive": poc.metric_naive,
        "interactions": [
            serialization.to_plain(i) | {"interaction": i.interaction} for i in poc.interactions
        ],
        "effort": serialization.to_plain(poc.effort),
        "notes": list(poc.notes),
        "took_s": poc.took_s,
        "report": poc.report,
    }
