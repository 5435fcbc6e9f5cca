"""Convert results to the plain data that ``--json`` prints. The names of keys are stable."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from memfit.types import serialization
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.result import NOT_INCLUDED, Choice, Estimate, Poc, Recovery, Run, SearchResult
from memfit.verify.aggregate import median_step_s

View = Mapping[str, Any]


def plan_view(plan: Plan) -> View:
    """Return "plan" (technique -> settings) and "label" (the plan in one line). The number of processes is in
    "label" only."""
    return {"plan": plan.to_dict(), "label": plan.label}


def estimate_view(estimate: Estimate) -> View:
    """Return the estimate's fields by name, of which "plan" is technique -> settings, and in addition
    "label", the plan in one line, and "not_included", a list of what predicted memory leaves out, such as
    "metrics"."""
    additional = {**plan_view(estimate.plan), "not_included": list(NOT_INCLUDED)}
    return serialization.to_plain(estimate) | additional  # type: ignore[no-any-return]


def choice_view(choice: Choice) -> View:
    """Return a plan that a search found: "plan" and "label" as in `plan_view`, its "effect" class ("E0" to
    "E3"), whether it "fits", the "needed_bytes" of one device (null if unknown), its "estimate" by field, and
    the "reasons" why techniques are in it or were left out."""
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
    """Return the fields of a search's result by name. "recommended" is null if nothing fits. "smallest" is
    always the plan with the lowest peak memory. "timings" is null unless the search was for this machine.
    "extent" says how far the search got and how much better than the best traced plan another one could be
    ("gain_ratio"; null if there is no bound, and "gain_unknown" then says why); it is null if the search was
    interrupted. "correction" says how measured runs corrected the predicted step times; it is null if
    ``correction`` is None or made from no run."""
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
        "extent": {**serialization.to_plain(result.extent), "left_count": result.extent.left_count}
        if result.extent
        else None,
    }


def correction_view(calibration: Calibration) -> View:
    """Return how the measured step times of a proof of concept correct predicted ones: its ID ("poc_id"), how
    many of its plans were measured ("plans"), the factor on every predicted step time ("step_ratio"), a
    further factor for each of some techniques ("technique_ratio"), and the error that remains, as a ratio
    ("step_spread_ratio"; null if too few plans were measured)."""
    return {
        "poc_id": calibration.corrected_by,
        "plans": calibration.corrected_count,
        "step_ratio": calibration.step_ratio,
        "technique_ratio": dict(calibration.technique_ratio),
        "step_spread_ratio": calibration.step_spread_ratio,
    }


def run_view(run: Run) -> View:
    """Return a run's plan and settings, its outcome, its predicted and measured peak memory and step time
    (`median_step_s`), and what else was measured, such as losses and energy. What is not known is
    null or empty."""
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
        "device": measurement.device,
        "reserved_peak_bytes": measurement.reserved_peak_bytes,
        "allocator_retries": measurement.allocator_retries,
        "predicted_phase_peak_bytes": dict(run.predicted_phase_peak_bytes),
        "phase_peak_bytes": dict(measurement.phase_peak_bytes),
        "predicted_step_s": run.predicted_step_s,
        "step_s": median_step_s(measurement),
        "losses": list(measurement.losses),
        "grad_norms": list(measurement.grad_norms),
        "metric": measurement.metric,
        "limit_kind": measurement.limit_kind,
        "overhead_ratio": measurement.overhead_ratio,
        "raised_cap_bytes": measurement.cap_bytes,
        "save_copy_bytes": measurement.save_copy_bytes,
        "predicted_save_copy_bytes": spec.save_copy_bytes,
        "resident": None if measurement.resident is None else serialization.to_plain(measurement.resident),
        "batch_s": statistics.median(measurement.batch_s) if measurement.batch_s else None,
        "alarms": list(run.alarms),
        "energy_j": measurement.energy_j,
        "energy_boundary": measurement.energy_boundary,
        "wall_s": measurement.wall_s,
        "ranks": None if measurement.ranks is None else serialization.to_plain(measurement.ranks),
        "restarts": [serialization.to_plain(restart) for restart in measurement.restarts],
        "recoveries": [_recovery_view(recovery) for recovery in run.recoveries],
        "recovery_stop": run.recovery_stop,
    }


def _recovery_view(recovery: Recovery) -> View:
    """Return the recovery's fields by name. "failed_plan" and "plan" are technique -> settings,
    "failed_label" and "label" the same plans in one line. "effect" is the effect class, "E0" to "E3"."""
    return {
        **serialization.to_plain(recovery),
        **plan_view(recovery.plan),
        "failed_plan": recovery.failed_plan.to_dict(),
        "failed_label": recovery.failed_plan.label,
        "effect": recovery.effect.label,
    }


def poc_view(poc: Poc) -> View:
    """Return a proof of concept, also an unfinished one ("finished" is then false). "verdict" says of the
    recommended plan "equivalent", "different", "undecided" or "not_sensitive", or is null before it is
    judged; "verdicts" has the whole verdict of each plan that was judged, by its name. "report" is the path
    of the HTML report."""
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
