"""What the answer of a search for many devices says beside its plan: how the plan compares with others, which
plans are impossible, what more hardware would bring, and what would help if no plan fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from memfit.cost.host import host_line
from memfit.planner.plan_space import complexity
from memfit.planner.selection import Objective, best, missed_bounds, none_fits, score, within_bounds
from memfit.techniques.registry import short_label
from memfit.types.errors import NothingFits, UserError
from memfit.types.plan import Plan
from memfit.types.result import Estimate, Reason, Sensitivity

if TYPE_CHECKING:
    from memfit.planner.device_pricing import Scale

_SKETCH_ERROR = 0.2  # relative memory error of a sketch after correction by traced plans
_GAIN = 0.03  # relative change of the score that is worth reporting


def explain_techniques(
    scale: Scale, winner: Estimate, known: Sequence[Estimate], fits: Callable[[Estimate], bool]
) -> Iterator[Reason]:
    """Yield one reason per technique of the recommended plan, the ``winner``, or of a ``known`` plan.

    For a technique of the winner, it compares the winner with the best fitting plan without it; for any other
    technique, with the best fitting plan with it. Sketches that claim to beat the winner are compared only if
    nothing else fits (see `is_comparable`). If none of these plans fits, the reason is that of `none_fits`.
    ``known`` are estimates that were traced, or corrected to what a trace is expected to give.
    """
    goal = scale.aim.goal

    def relative(e: Estimate) -> float:
        return score(e, goal) / score(winner, goal)

    for name, has_technique, alternatives in _with_or_without(winner, known):
        fitting_rivals = [e for e in alternatives if fits(e)]
        fitting_rivals = [e for e in fitting_rivals if is_comparable(e, winner, goal)] or fitting_rivals
        if not fitting_rivals:
            yield none_fits(name, alternatives, scale.needs, scale.aim.cap_bytes, inside=has_technique)
            continue
        rival = min(fitting_rivals, key=lambda e: (relative(e), complexity(e.plan, e.dependence)))
        is_worse = relative(rival) > 1 + _GAIN
        ratio = rival.step_s.value / winner.step_s.value if rival.step_s and winner.step_s else None
        saved_bytes = int(winner.allocated_bytes.value - rival.allocated_bytes.value)
        kinds = (
            ("without_worse", "without_as_good")
            if has_technique
            else ("left_out_slower", "left_out_not_needed")
        )
        yield Reason(
            kind=kinds[not is_worse],
            technique=name,
            saved_bytes=saved_bytes,
            time_ratio=ratio,
            detail=short_label(rival.plan),
        )


def smallest_traced(
    scale: Scale, winner: Estimate, known: Sequence[Estimate], fits: Callable[[Estimate], bool]
) -> Iterator[Estimate]:
    """Yield traced estimates of the smallest plans that do not fit by their sketches but may fit.

    These are, for each technique of the winner, the smallest plan without it, and for any other technique of
    the ``known`` plans, the smallest plan with it, if no such plan fits. They are traced only if their sketch
    exceeds the memory cap by no more than the error of sketches. Plans that cannot be traced are skipped.
    """
    traced_plans = set[Plan]()
    for _, _, alternatives in _with_or_without(winner, known):
        smallest = min(alternatives, key=scale.needs, default=None)
        if smallest is None or smallest.traced or any(map(fits, alternatives)):
            continue
        may_fit = scale.needs(smallest) * (1 - _SKETCH_ERROR) <= scale.aim.cap_bytes
        if not may_fit or smallest.plan in {*traced_plans, *scale.refused}:
            continue
        traced_plans.add(smallest.plan)
        if (traced := scale.traced_or_refused(smallest)) is not None:
            yield traced


def _with_or_without(
    winner: Estimate, estimates: Sequence[Estimate]
) -> Iterator[tuple[str, bool, list[Estimate]]]:
    """Yield (technique, whether the winner has it, the estimates of plans without it if the winner has it,
    else of plans with it), for each technique of the winner or of ``estimates``, sorted by name.
    """
    winner_techniques = {u.technique for u in winner.plan.uses}
    for name in sorted({u.technique for e in estimates for u in e.plan.uses} | winner_techniques):
        has_technique = name in winner_techniques
        yield name, has_technique, [e for e in estimates if (e.plan.get(name) is None) == has_technique]


def is_comparable(e: Estimate, winner: Estimate, goal: Objective) -> bool:
    """Return whether an estimate may be compared with the ``winner``, the best traced plan: it was traced, or
    it is a sketch that does not claim to be better by the goal, which no trace has verified.
    """
    return e.traced or score(e, goal) >= score(winner, goal)


def unsupported_reasons(scale: Scale) -> list[Reason]:
    """Return one reason for each way in which the model cannot be cut or traced, and for each plan that was
    to be traced whole and could not be.
    """
    refusals = [r for f in scale.found.values() for r in f.refused] + list(scale.refused.values())
    return [Reason(kind="cannot", technique="", detail=text) for text in dict.fromkeys(refusals)]


def sensitivity(
    scale: Scale, winner: Estimate, known: Sequence[Estimate], ranks: int
) -> Iterator[Sensitivity]:
    """Yield what would change with more memory on each device, with twice as many devices as ``ranks``, and
    if the work of a part of the machine took a tenth less time.

    More memory is the least with which a ``known`` plan fits whose score is better by more than 3 %; without
    such a plan, it is not reported. More devices are not reported if the goal is the fewest or if no plan for
    them fits; a part of the machine only if more than 0.5 % of the step would be saved.
    """
    goal, cap_bytes = scale.aim.goal, scale.aim.cap_bytes

    def better(e: Estimate) -> bool:
        return score(scale.expected(e), goal) < score(winner, goal) * (1 - _GAIN)

    larger_plans = [
        e for e in known if within_bounds(scale.bounds, e) and scale.needs(e) > cap_bytes and better(e)
    ]
    if larger_plans:
        smallest = min(larger_plans, key=lambda e: (scale.needs(e), score(e, goal)))
        extra_bytes = scale.needs(smallest) - cap_bytes
        yield _sensitivity_to("memory", winner, scale.expected(smallest), more_bytes=extra_bytes)
    if goal is not Objective.FEWEST:
        # more devices are smaller in any case, so compare by time
        objective = Objective.FASTEST if goal is Objective.SMALLEST else goal
        try:
            candidates = [
                e
                for e in scale.estimates(2 * ranks)
                if scale.fits_memory(e) and within_bounds(scale.bounds, e)
            ]
            doubled_best = best(candidates, objective)
        except UserError:
            doubled_best = None
        if doubled_best is not None:
            yield _sensitivity_to(
                "devices", winner, scale.expected(doubled_best), more_devices=2 * ranks - winner.plan.ranks
            )
    for resource, saved_s in scale.bottleneck(winner.plan):
        step_s = winner.step_s.value if winner.step_s else math.inf
        if saved_s > 0.005 * step_s:
            yield Sensitivity(kind=resource, time_ratio=1 - saved_s / step_s)


def _sensitivity_to(kind: str, winner: Estimate, changed: Estimate, **extra: Any) -> Sensitivity:
    def ratio(value: Callable[[Estimate], float | None]) -> float | None:
        winner_value, changed_value = value(winner), value(changed)
        return changed_value / winner_value if winner_value and changed_value else None

    return Sensitivity(
        kind=kind,
        plan=short_label(changed.plan),
        **extra,
        time_ratio=ratio(lambda e: e.step_s.value if e.step_s else None),
        cost_ratio=ratio(lambda e: e.usd),
        carbon_ratio=ratio(lambda e: e.co2_g),
    )


def _more_memory(scale: Scale, smallest: Estimate, ranks: int) -> Iterator[str]:
    if (extra_bytes := scale.needs(smallest) - scale.aim.cap_bytes) > 0:
        yield f"{extra_bytes / 2**30:.1f} GiB more on each device"
    fitting = [e for e in (smallest, *scale.estimates(ranks)) if scale.needs(e) <= scale.aim.cap_bytes]
    if fitting:
        preferred = min(
            fitting, key=lambda e: (e.host_bytes.value if e.host_bytes else 0.0, complexity(e.plan))
        )
        yield f"{short_label(preferred.plan)}, which {host_line(preferred, scale.machine)}"


def nothing_fits(scale: Scale, known: Sequence[Estimate], ranks: int) -> NothingFits:
    """Return the NothingFits error with changes, one of which would be enough: if a plan fits the memory, the
    deadline and the budget of money that the fastest and the cheapest plan would meet, of those that were
    set; else more memory on device or host; in both cases the least of 2, 4, 8 and 16 times the devices that
    is enough.

    ``known``: the traced estimates, at least one. ``ranks``: the number of devices that was searched.
    """
    goal, cap_bytes = scale.aim.goal, scale.aim.cap_bytes
    smallest = min(known, key=lambda e: (scale.needs(e), complexity(e.plan, e.dependence)))
    ways = []
    fitting = [e for e in known if scale.fits_memory(e)]
    if fitting:
        fastest = min(fitting, key=lambda e: score(e, Objective.FASTEST))
        cheapest = min(fitting, key=lambda e: score(e, Objective.CHEAPEST))
        if scale.bounds.deadline_s is not None and fastest.step_s:
            needed_s = fastest.step_s.value * scale.bounds.steps
            ways.append(f"a deadline of {needed_s / 3600:.2f} h, with {short_label(fastest.plan)}")
        if scale.bounds.budget_usd is not None and cheapest.usd is not None:
            ways.append(
                f"a budget of {cheapest.usd * scale.bounds.steps:.2f} USD, with {short_label(cheapest.plan)}"
            )
    else:
        ways += _more_memory(scale, smallest, ranks)
    for factor in (2, 4, 8, 16):
        try:
            candidates = [e for e in scale.estimates(factor * ranks) if scale.fits_memory(e)]
        except UserError:
            continue
        if acceptable := [e for e in candidates if within_bounds(scale.bounds, e)]:
            preferred = min(acceptable, key=lambda e: (score(e, goal), complexity(e.plan, e.dependence)))
            ways.append(f"{factor * ranks} devices, with {short_label(preferred.plan)}")
            break
    return NothingFits(
        cap_bytes=cap_bytes,
        least_bytes=scale.needs(smallest),
        plan_text=short_label(smallest.plan),
        ways=tuple(ways),
        missed=missed_bounds(scale.bounds, fitting),
    )
