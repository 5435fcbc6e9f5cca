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
    """Yield one reason for each technique of the recommended plan, the ``winner``, and for each other
    technique of a plan in ``known``.

    For a technique of the winner, the winner is compared with the best fitting plan of ``known`` without it;
    for another technique, with the best fitting plan that has it. Best is the lowest score by the goal. The
    kind of the reason says whether that plan is worse by more than 3 % ("without_worse", "left_out_slower")
    or not ("without_as_good", "left_out_not_needed"). Sketches that predict a better score than the winner's
    are compared only if no other plan fits (see `is_comparable`). If none of these plans fits, the reason is
    that of `none_fits`.

    ``known``: estimates by whole traces, and sketches corrected by `Scale.expected`.
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
    """Trace plans whose sketches need a little more memory than the cap, so that they may fit in truth, and
    yield their estimates.

    There is at most one plan for each technique, in the order of their names: for a technique of the winner,
    the plan of ``known`` without it that needs the least device memory; for any other technique of ``known``,
    such a plan with it. It is traced only if none of the plans without (or with) the technique fits, if it
    was not traced yet, and if 80 % of what its sketch needs is within the cap, because sketches are up to 20
    % off. Plans that cannot be traced are skipped.
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
    it is a sketch whose score by the goal is not better than the winner's. A better score of a sketch is a
    claim that no trace has verified.
    """
    return e.traced or score(e, goal) >= score(winner, goal)


def unsupported_reasons(scale: Scale) -> list[Reason]:
    """Return one reason of kind "cannot" for each way in which the model cannot be divided or small parts of
    it not be traced, and for each plan whose whole trace failed.
    """
    refusals = [r for f in scale.found.values() for r in f.refused] + list(scale.refused.values())
    return [Reason(kind="cannot", technique="", detail=text) for text in dict.fromkeys(refusals)]


def sensitivity(
    scale: Scale, winner: Estimate, known: Sequence[Estimate], ranks: int
) -> Iterator[Sensitivity]:
    """Yield what would change with more memory on each device, with twice as many devices as ``ranks``, and
    if the work of one resource of the machine took a tenth less time.

    - Memory: reported if some plan of ``known`` needs more than the cap, keeps to the other bounds, and has a
      score better than the winner's by more than 3 %. Of these, it names the plan that needs the least
      memory, and how much more than the cap it needs.
    - Devices: names the best fitting sketch for twice the devices, by the goal, or by time if the goal is
      least memory. Not reported if the goal is the fewest devices, or if no plan for so many fits.
    - Each resource of which a tenth less time would shorten the step by more than 0.5 %.
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
    """Return the NothingFits error, with a list of changes (``ways``) that would help:

    - If some known plan fits the memory: the deadline that the fastest of these would meet, if a deadline was
      set, and the budget of money that the cheapest would meet, if a budget was set.
    - If none does: the memory by which each device falls short of the plan that needs the least, if it does;
      and, of the plans that fit the device, the one that needs the least host memory, with what it needs of
      it.
    - In both cases: the least of 2, 4, 8 and 16 times ``ranks`` devices for which a sketch fits the memory
      and keeps to the bounds, if there is one.

    ``known``: the traced estimates, at least one. ``ranks``: the largest number of devices that was searched.
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
