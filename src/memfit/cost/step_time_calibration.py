"""The closed loop: short real runs correct the predictions for other plans on the same machine.

log(measured / predicted) of a step = a + the sum of b over the plan's techniques. The fit is least squares
with b shrunk to zero (ridge of one observation), so that a few runs say little about a technique and many
runs say much. The error of each run when predicted from the others (leave-one-out) gives the interval's new
half-width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final

from memfit.types.machine import Calibration
from memfit.types.plan import Plan

LEAST_SPREAD: Final = 0.05  # no prediction is more certain, because machines vary
_ENOUGH: Final = 3  # number of plans below which the interval is not changed
_RIDGE: Final = 1.0

Seen = Sequence[tuple[Plan, float]]  # plans with their measured over predicted seconds


def correct_calibration(calibration: Calibration, seen: Seen, *, source: str) -> Calibration:
    """Return ``calibration`` with corrections of predicted step times that are fitted to short real runs.
    They replace any that it has. It is returned unchanged if ``seen`` is empty.

    ``seen``: for each run its plan and the measured step time over the predicted one, above 0, the latter
    without corrections. The result's ``step_spread_ratio``, the new half-width of predicted intervals, is the
    largest relative error of a run when it is predicted from the others, at least 0.05; with fewer than 3
    runs it is None, so that the intervals stay as they are. ``source``: name of the runs, for
    ``corrected_by``.
    """
    if not seen:
        return calibration
    base, by_technique = _fit(seen)
    spread = None
    if len(seen) >= _ENOUGH:
        errors = []
        for index, (plan, ratio) in enumerate(seen):
            other_runs = [*seen[:index], *seen[index + 1 :]]
            errors.append(abs(_ratio_of(*_fit(other_runs), plan) / ratio - 1))
        spread = max(LEAST_SPREAD, *errors)
    return dataclasses.replace(
        calibration,
        step_ratio=base,
        technique_ratio=by_technique,
        step_spread_ratio=spread,
        corrected_by=source,
        corrected_count=len(seen),
    )


def factor(calibration: Calibration, plan: Plan) -> float:
    """Return the factor by which the plan's predicted step time is to be multiplied:
    ``calibration.step_ratio`` times the ``technique_ratio`` of each of the plan's techniques that has one. 1
    without corrections.
    """
    return _ratio_of(calibration.step_ratio, calibration.technique_ratio, plan)


def _ratio_of(base: float, by_technique: Mapping[str, float], plan: Plan) -> float:
    return math.prod((by_technique.get(use.technique, 1.0) for use in plan.uses), start=base)


def _fit(runs: Seen) -> tuple[float, dict[str, float]]:
    import numpy

    names = sorted({use.technique for plan, _ in runs for use in plan.uses})
    rows = [[1.0, *(float(name in plan) for name in names)] for plan, _ in runs]
    ridge_rows = _RIDGE * numpy.eye(len(names) + 1)[1:]  # the base is not shrunk
    matrix = numpy.vstack([numpy.array(rows), ridge_rows])
    targets = numpy.concatenate([[math.log(ratio) for _, ratio in runs], numpy.zeros(len(names))])
    ratios = numpy.exp(numpy.linalg.lstsq(matrix, targets, rcond=None)[0])
    return float(ratios[0]), {name: float(ratio) for name, ratio in zip(names, ratios[1:], strict=True)}


def merge_calibrations(old: Calibration, new: Calibration) -> Calibration:
    """Return two calibrations of this machine as one. At least one of them must have ``flops_s``.

    Figures of an operator that both have are those of ``new``, and so are the number of threads and the power
    without load. Rates are the higher and overheads the lower of both, because noise only slows. The load and
    the share of waiting are the higher of both, and ``took_s`` the sum. The corrections from real runs are
    those of ``old``.
    """
    rates = {k: max(c.flops_s.get(k, 0.0) for c in (old, new)) for k in {**old.flops_s, **new.flops_s}}
    overheads = [c.overhead_s for c in (old, new) if c.flops_s]
    return dataclasses.replace(
        old,  # keeps the corrections from runs
        threads=new.threads,
        machine="this machine",
        flops_s=rates,
        disk_bytes_s=max(old.disk_bytes_s, new.disk_bytes_s),
        disk_file_s=min(c.disk_file_s for c in (old, new) if c.flops_s),
        bandwidth_bytes_s=max(old.bandwidth_bytes_s, new.bandwidth_bytes_s),
        overhead_s=min(overheads),
        op_s={**old.op_s, **new.op_s},
        op_peak_bytes={**old.op_peak_bytes, **new.op_peak_bytes},
        op_kept_bytes={**old.op_kept_bytes, **new.op_kept_bytes},
        op_spread_ratio={**old.op_spread_ratio, **new.op_spread_ratio},
        not_timed=tuple(dict.fromkeys((*old.not_timed, *new.not_timed))),
        load_count=max(old.load_count, new.load_count),
        waited_ratio=max(old.waited_ratio, new.waited_ratio),
        idle_w=new.idle_w,
        took_s=old.took_s + new.took_s,
    )
