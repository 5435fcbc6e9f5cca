"""Convert a PoC that was measured here to the record that can be shared with others."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from memfit.store.exchange.anonymous import anonymous_poc, anonymous_text
from memfit.store.exchange.record import FORMAT, VERSION, Shared, agrees_with_medians, validate_record
from memfit.types.errors import UserError
from memfit.types.result import Choice, EndpointDifference, OutcomeKind, Poc, Run, Verdict
from memfit.verify.aggregate import ok_runs, peak_bytes, step_s

_COPIED_FIELDS = (
    "poc_id",
    "created",
    "command",
    "place",
    "cap_bytes",
    "cap_reason",
    "metric",
    "metric_unit",
    "metric_naive",
)
_HARDWARE_FACTS = ("processor", "cores", "ram_bytes", "accelerators")


def of_poc(poc: Poc) -> Shared:
    """Return the record of ``poc``, made anonymous (`anonymous_poc`). Raises UserError if the PoC is not
    finished or recommends no plan, because nothing could be compared with such a record, and if its numbers
    contradict each other (see `faults` in exchange/record.py)."""
    recommended = poc.search.recommended
    if not poc.finished or recommended is None:
        raise UserError(
            f"no record can be made of PoC {poc.poc_id}: it "
            f"{'recommends no plan' if poc.finished else 'was not finished'}",
            allowed="a finished PoC that recommends a plan",
        )
    verdict = next((v.verdict for v in poc.verdicts if v.name == "recommended"), None)
    poc = anonymous_poc(poc)
    environment = dict(poc.environment)
    fields = {name: getattr(poc, name) for name in _COPIED_FIELDS}
    plain_side, recommended_side = (_side(poc.runs, c) for c in (poc.search.baseline, recommended))
    ratio, notes = _step_time_ratio(poc, plain_side, recommended_side)
    return validate_record(
        fields
        | {
            "format": FORMAT,
            "version": VERSION,
            "model": {"job": poc.job_name, "size": poc.job_size, "parameters": poc.parameter_count},
            "data": {
                "source": poc.data_source,
                "batch_size": max(1, poc.runs[0].spec.batch_size),
                "steps_per_run": poc.steps_per_run,
            },
            "hardware": {"machine": poc.machine}
            | {n: environment.pop(n) for n in _HARDWARE_FACTS if n in environment},
            "software": environment | {"threads": str(poc.runs[0].spec.threads)},
            "baseline": plain_side,
            "recommended": recommended_side,
            "step_time_ratio": ratio,
            "verdict": verdict and _judgement(verdict),
            "reproducible": poc.reproducibility.reproducible,
            "effort": dataclasses.asdict(poc.effort),
            "notes": [anonymous_text(note) for note in (*poc.notes, *notes)],
        },
        what=f"the record of PoC {poc.poc_id}",
    )


def _step_time_ratio(
    poc: Poc, plain: Mapping[str, Any], recommended: Mapping[str, Any]
) -> tuple[float | None, tuple[str, ...]]:
    """Return (the PoC's ratio of step times, recommended plan by plain training, or None; notes for the
    record).

    It is None without a note if it or the step time of a plan is unknown, and if both plans are the same, as
    their timings then differ only by noise. It is None with one note if it is not within a factor of 1.6 of
    the ratio of "step_s" in ``recommended`` and ``plain``, the plans' median step times."""
    ratio, plain_s, recommended_s = poc.step_time_ratio, plain["step_s"], recommended["step_s"]
    if ratio is None or plain_s is None or recommended_s is None or plain["plan"] == recommended["plan"]:
        return None, ()
    if agrees_with_medians(ratio, plain_s, recommended_s):
        return ratio, ()
    note = (
        f"Step times varied too much between runs: the median ratio of the pairs is {ratio:.3g}, "
        f"but the ratio of the median step times is {recommended_s / plain_s:.3g}."
    )
    return None, (note,)


def _judgement(verdict: Verdict) -> Mapping[str, Any]:
    names = ("test", "margin", "difference", "low", "high", "pairs")
    fields = {name: getattr(verdict, name) for name in names}
    control = verdict.control
    return fields | {
        "kind": verdict.kind.value,
        "effect": verdict.effect.label,
        "surrogates": [_endpoint(s) for s in verdict.surrogates],
        "control": control
        and {
            "control": control.control,
            "noticed": control.noticed,
            "source": control.source,
            "pairs": control.pairs,
            "endpoints": [_endpoint(e) for e in control.endpoints],
            "date": control.date,
        },
    }


def _endpoint(result: EndpointDifference) -> Mapping[str, Any]:
    names = ("name", "unit", "margin", "difference", "low", "high")
    return {name: getattr(result, name) for name in names}


def _outcome_under_cap(capped_runs: Sequence[Run]) -> str:
    """Return "ok" if all ``capped_runs``, the runs under the memory cap, succeeded; otherwise the outcome of
    the first that did not, such as "oom"; "" if there are no runs."""
    outcomes = [r.measurement.outcome for r in capped_runs]
    failures = (outcome for outcome in outcomes if outcome is not OutcomeKind.OK)
    return next(failures, OutcomeKind.OK).value if outcomes else ""


def _side(runs: Sequence[Run], choice: Choice) -> Mapping[str, Any]:
    plan = choice.estimate.plan
    plan_runs = [r for r in runs if r.spec.plan == plan]
    completed, capped_runs = ok_runs(plan_runs), [r for r in plan_runs if r.spec.cap_bytes is not None]
    first_run = (completed or plan_runs)[0]
    joules = [r.measurement.energy_j for r in completed if r.measurement.energy_j]
    boundary = first_run.measurement.energy_boundary or "not told"
    # The runs on which the verdict is based.
    judged_runs = [r for r in completed if r.spec.cap_bytes is None or r.spec.name == "recommended"]
    seed_scores = ((r.spec.seed, r.measurement.metric) for r in judged_runs)
    scores = {str(seed): score for seed, score in seed_scores if score is not None and math.isfinite(score)}
    return {
        "plan": plan.to_dict(),
        "ranks": plan.ranks,
        "engine": first_run.spec.engine,
        "effect": choice.effect.label,
        "under_cap": _outcome_under_cap(capped_runs),
        "predicted_peak_bytes": first_run.predicted_peak_bytes,
        "measured_peak_bytes": peak_bytes(plan_runs),
        "peak_source": first_run.measurement.peak_source,
        "predicted_step_s": first_run.predicted_step_s,
        "step_s": step_s(plan_runs),
        "energy": {"joules": statistics.mean(joules), "boundary": boundary} if joules else None,
        "metric_by_seed": scores,
    }
