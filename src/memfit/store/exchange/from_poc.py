"""Convert a PoC that was measured here to a shared record."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from memfit.store.exchange.record import FORMAT, VERSION, Shared, agrees_with_medians, checked
from memfit.types.errors import UserError
from memfit.types.result import Choice, OutcomeKind, Poc, Run, Verdict
from memfit.verify.aggregate import ok_runs, peak_bytes, step_s

_AS_IT_IS = (
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
_OF_HARDWARE = ("processor", "cores", "ram_bytes", "accelerators")


def of_poc(poc: Poc) -> Shared:
    """Return the record of ``poc``. Raises UserError if the PoC is not finished: nothing can be compared with
    half a record."""
    recommended = poc.search.recommended
    if not poc.finished or recommended is None:
        raise UserError(f"PoC {poc.poc_id} was interrupted", hint="only a finished one has a record")
    judged = next((v.verdict for v in poc.verdicts if v.name == "recommended"), None)
    seen = dict(poc.environment)
    told = {name: getattr(poc, name) for name in _AS_IT_IS}
    plain, chosen = (_side(poc.runs, c) for c in (poc.search.baseline, recommended))
    ratio, notes = _step_time_ratio(poc, plain, chosen)
    return checked(
        told
        | {
            "format": FORMAT,
            "version": VERSION,
            "model": {"job": poc.job_name, "size": poc.job_size, "parameters": poc.parameter_count},
            "data": {
                "source": poc.data_source,
                "batch_size": max(1, poc.runs[0].spec.batch_size),
                "steps_per_run": poc.steps_per_run,
            },
            "hardware": {"machine": poc.machine} | {n: seen.pop(n) for n in _OF_HARDWARE if n in seen},
            "software": seen | {"threads": str(poc.runs[0].spec.threads)},
            "baseline": plain,
            "recommended": chosen,
            "step_time_ratio": ratio,
            "verdict": judged and _judgement(judged),
            "reproducible": poc.reproducibility.reproducible,
            "effort": dataclasses.asdict(poc.effort),
            "notes": [*poc.notes, *notes],
        },
        what=f"the record of PoC {poc.poc_id}",
    )


def _step_time_ratio(
    poc: Poc, plain: Mapping[str, Any], chosen: Mapping[str, Any]
) -> tuple[float | None, tuple[str, ...]]:
    """Return the PoC's ratio of step times, and a note if the ratio is left out for noise. The ratio is None
    if a run did not finish, or if both plans are plain training: the timings of one plan differ only by
    noise."""
    ratio, plain_s, chosen_s = poc.step_time_ratio, plain["step_s"], chosen["step_s"]
    if ratio is None or plain_s is None or chosen_s is None or plain["plan"] == chosen["plan"]:
        return None, ()
    if agrees_with_medians(ratio, plain_s, chosen_s):
        return ratio, ()
    told = (
        f"Step times varied too much between runs: the median ratio of the pairs is {ratio:.3g}, "
        f"the ratio of the median step times {chosen_s / plain_s:.3g}."
    )
    return None, (told,)


def _judgement(found: Verdict) -> Mapping[str, Any]:
    names = ("test", "margin", "difference", "low", "high", "pairs")
    told = {name: getattr(found, name) for name in names}
    return told | {"kind": found.kind.value, "effect": found.effect.label}


def _worst(capped: Sequence[Run]) -> str:
    """Return "ok" only if every run under the cap succeeded, otherwise the first other outcome; "" if there
    was none."""
    outcomes = [r.measurement.outcome for r in capped]
    bad = (outcome for outcome in outcomes if outcome is not OutcomeKind.OK)
    return next(bad, OutcomeKind.OK).value if outcomes else ""


def _side(runs: Sequence[Run], choice: Choice) -> Mapping[str, Any]:
    plan = choice.estimate.plan
    own = [r for r in runs if r.spec.plan == plan]
    done, capped = ok_runs(own), [r for r in own if r.spec.cap_bytes is not None]
    first = (done or own)[0]
    joules = [r.measurement.energy_j for r in done if r.measurement.energy_j]
    boundary = first.measurement.energy_boundary or "not told"
    # The runs on which the verdict is based.
    judged = [r for r in done if r.spec.cap_bytes is None or r.spec.name == "recommended"]
    told = ((r.spec.seed, r.measurement.metric) for r in judged)
    scores = {str(seed): score for seed, score in told if score is not None and math.isfinite(score)}
    return {
        "plan": plan.to_dict(),
        "ranks": plan.ranks,
        "engine": first.spec.engine,
        "effect": choice.effect.label,
        "under_cap": _worst(capped),
        "predicted_peak_bytes": first.predicted_peak_bytes,
        "measured_peak_bytes": peak_bytes(own),
        "peak_source": first.measurement.peak_source,
        "predicted_step_s": first.predicted_step_s,
        "step_s": step_s(own),
        "energy": {"joules": statistics.mean(joules), "boundary": boundary} if joules else None,
        "metric_by_seed": scores,
    }
