"""Combine measured runs: group them by plan, and find the largest peak, median step time and saved energy."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Final

from memfit.types.result import Measurement, OutcomeKind, Run

WARM_UP_STEPS: Final = 2


def median_step_s(measurement: Measurement) -> float | None:
    """Return the median step time of a run without its first two (warm-up) steps, or of all steps if there
    are no others; None without steps.
    """
    steady = measurement.step_s[WARM_UP_STEPS:] or measurement.step_s
    return statistics.median(steady) if steady else None


def by_plan(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs by role and plan, and return the groups: first the baseline, then ablations by decreasing
    peak, last the recommended plan.

    An ablation with the same plan as the baseline or the recommended plan is left out.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.spec.role, run.spec.plan.fingerprint), []).append(run)
    main_plans = {plan for role, plan in groups if role != "ablation"}
    distinct_groups = [
        g for (role, plan), g in groups.items() if role != "ablation" or plan not in main_plans
    ]
    order = {"baseline": 0, "ablation": 1, "recommended": 2}
    return sorted(distinct_groups, key=lambda g: (order.get(g[0].spec.role, 1), -(peak_bytes(g) or 0)))


def ok_runs(runs: Iterable[Run]) -> list[Run]:
    """Return the runs whose outcome is "ok"."""
    return [run for run in runs if run.measurement.outcome is OutcomeKind.OK]


def peak_bytes(runs: Iterable[Run]) -> int | None:
    """Return the largest measured peak of the completed runs; None if none of them has one."""
    return max((r.measurement.peak_bytes for r in ok_runs(runs) if r.measurement.peak_bytes), default=None)


def step_s(runs: Iterable[Run]) -> float | None:
    """Return the median of the median step times of the completed runs (see `median_step_s`); None if there
    are none.
    """
    medians = [step for run in ok_runs(runs) if (step := median_step_s(run.measurement)) is not None]
    return statistics.median(medians) if medians else None


def energy_saved(runs: Iterable[Run]) -> tuple[float, str] | None:
    """Return (percentage of plain training's energy that the recommended plan saved, the energy boundary of
    both).

    Of each, the median of its completed runs with a measured energy is used; all runs must have the same
    number of steps. A negative percentage means that saving memory cost energy. None if one of the two was
    not measured, or if not all of these runs were measured within the same boundary.
    """
    energies: dict[str, list[tuple[float, str]]] = {"baseline": [], "recommended": []}
    for run in ok_runs(runs):
        m = run.measurement
        if run.spec.role in energies and m.energy_j:
            energies[run.spec.role].append((m.energy_j, m.energy_boundary))
    boundaries = {boundary for side in energies.values() for _, boundary in side}
    if not all(energies.values()) or len(boundaries) != 1:
        return None
    plain, recommended = (statistics.median(joules for joules, _ in side) for side in energies.values())
    return 100 * (1 - recommended / plain), boundaries.pop()
