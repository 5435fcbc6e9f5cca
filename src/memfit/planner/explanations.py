"""What an answer says beside its plan: rivals, impossible plans, gains from more hardware, plans that fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from memfit.cost.host import host_line
from memfit.planner.plan_space import complexity
from memfit.planner.selection import Objective, best, keeps, missed, none_fits, score
from memfit.techniques.registry import brief
from memfit.types.errors import NothingFits, UserError
from memfit.types.plan import Plan
from memfit.types.result import Estimate, Reason, Sensitivity

if TYPE_CHECKING:
    from memfit.planner.device_pricing import Scale

_SKETCH_ERROR = 0.2  # relative memory error of a sketch after correction by traced plans
_GAIN = 0.03  # relative change of the score that is worth reporting


def rivals(
    scale: Scale, winner: Estimate, known: Sequence[Estimate], fits: Callable[[Estimate], bool]
) -> Iterator[Reason]:
    """Yield one reason per technique that compares the winner with the best plan without it, or with it.

    For a technique of the winner, the rival is the best plan without it; for any other technique, the best
    plan with it. If none of these plans fits, the smallest one is reported. ``known`` are estimates that were
    traced, or corrected to what a trace is expected to give.
    """
    goal = scale.aim.goal

    def relative(e: Estimate) -> float:
        return score(e, goal) / score(winner, goal)

    for name, inside, others in _with_or_without(winner, known):
        rivals = [e for e in others if fits(e)]
        rivals = [e for e in rivals if credible(e, winner, goal)] or rivals
        if not rivals:
            yield none_fits(name, others, scale.needs, scale.aim.cap_bytes, inside=inside)
            continue
        rival = min(rivals, key=lambda e: (relative(e), complexity(e.plan, e.dependence)))
        worse = relative(rival) > 1 + _GAIN
        ratio = rival.step_s.value / winner.step_s.value if rival.step_s and winner.step_s else None
        change = int(winner.allocated_bytes.value - rival.allocated_bytes.value)
        kinds = ("without_worse", "without_as_good") if inside else ("left_out_slower", "left_out_not_needed")
        yield Reason(
            kind=kinds[not worse],
            technique=name,
            saved_bytes=change,
            time_ratio=ratio,
            detail=brief(rival.plan),
        )


def smallest_traced(
    scale: Scale, winner: Estimate, known: Sequence[Estimate], fits: Callable[[Estimate], bool]
) -> Iterator[Estimate]:
    """Yield the traced estimate of the smallest plan of each technique for which no plan fits.

    Only plans whose sketch exceeds the cap by no more than the error of sketches are traced.
    """
    tried = set[Plan]()
    for _, _, others in _with_or_without(winner, known):
        least = min(others, key=scale.needs, default=None)
        if least is None or least.traced or any(map(fits, others)):
            continue
        near = scale.needs(least) * (1 - _SKETCH_ERROR) <= scale.aim.cap_bytes
        if not near or least.plan in {*tried, *scale.refused}:
            continue
        tried.add(least.plan)
        if (whole := scale.traced_or_refused(least)) is not None:
            yield whole


def _with_or_without(
    winner: Estimate, known: Sequence[Estimate]
) -> Iterator[tuple[str, bool, list[Estimate]]]:
    """Yield (technique, whether the winner has it, the plans that differ from the winner in that)."""
    used = {u.technique for u in winner.plan.uses}
    for name in sorted({u.technique for e in known for u in e.plan.uses} | used):
        inside = name in used
        yield name, inside, [e for e in known if (e.plan.get(name) is None) == inside]


def credible(e: Estimate, winner: Estimate, goal: Objective) -> bool:
    """Return whether an estimate may be compared with the winner.

    A sketch that claims to beat the best traced plan is not credible, because it has not been verified.
    """
    return e.traced or score(e, goal) >= score(winner, goal)


def cannot(scale: Scale) -> list[Reason]:
    """Return why the model cannot be cut in some ways and why some finalists could not be traced."""
    found = [r for f in scale.found.values() for r in f.refused] + list(scale.refused.values())
    return [Reason(kind="cannot", technique="", detail=text) for text in dict.fromkeys(found)]


def sensitivity(
    scale: Scale, winner: Estimate, known: Sequence[Estimate], ranks: int
) -> Iterator[Sensitivity]:
    """Yield what more memory, more devices, or a faster part of the machine would change."""
    goal, cap_bytes = scale.aim.goal, scale.aim.cap_bytes

    def better(e: Estimate) -> bool:
        return score(scale.expected(e), goal) < score(winner, goal) * (1 - _GAIN)

    bigger = [e for e in known if keeps(scale.bounds, e) and scale.needs(e) > cap_bytes and better(e)]
    if bigger:
        least = min(bigger, key=lambda e: (scale.needs(e), score(e, goal)))
        more = scale.needs(least) - cap_bytes
        yield _told("memory", winner, scale.expected(least), more_bytes=more)
    if goal is not Objective.FEWEST:
        # more devices are smaller in any case, so compare by time
        by = Objective.FASTEST if goal is Objective.SMALLEST else goal
        try:
            kept = [e for e in scale.estimates(2 * ranks) if scale.fits_memory(e) and keeps(scale.bounds, e)]
            twice = best(kept, by)
        except UserError:
            twice = None
        if twice is not None:
            yield _told("devices", winner, scale.expected(twice), more_devices=2 * ranks - winner.plan.ranks)
    for resource, saved_s in scale.bottleneck(winner.plan):
        step_s = winner.step_s.value if winner.step_s else math.inf
        if saved_s > 0.005 * step_s:
            yield Sensitivity(kind=resource, time_ratio=1 - saved_s / step_s)


def _told(kind: str, winner: Estimate, other: Estimate, **more: Any) -> Sensitivity:
    def ratio(value: Callable[[Estimate], float | None]) -> float | None:
        now, then = value(winner), value(other)
        return then / now if now and then else None

    return Sensitivity(
        kind=kind,
        plan=brief(other.plan),
        **more,
        time_ratio=ratio(lambda e: e.step_s.value if e.step_s else None),
        cost_ratio=ratio(lambda e: e.usd),
        carbon_ratio=ratio(lambda e: e.co2_g),
    )


def _more_memory(scale: Scale, least: Estimate, ranks: int) -> Iterator[str]:
    if (more := scale.needs(least) - scale.aim.cap_bytes) > 0:
        yield f"{more / 2**30:.1f} GiB more on each device"
    inside = [e for e in (least, *scale.estimates(ranks)) if scale.needs(e) <= scale.aim.cap_bytes]
    if inside:
        found = min(inside, key=lambda e: (e.host_bytes.value if e.host_bytes else 0.0, complexity(e.plan)))
        yield f"{brief(found.plan)}, which {host_line(found, scale.machine)}"


def nothing(scale: Scale, known: Sequence[Estimate], ranks: int) -> NothingFits:
    """Return the NothingFits error with the smallest changes each of which alone would make a plan fit."""
    goal, cap_bytes = scale.aim.goal, scale.aim.cap_bytes
    least = min(known, key=lambda e: (scale.needs(e), complexity(e.plan, e.dependence)))
    ways = []
    fitting = [e for e in known if scale.fits_memory(e)]
    if fitting:
        quickest = min(fitting, key=lambda e: score(e, Objective.FASTEST))
        cheap = min(fitting, key=lambda e: score(e, Objective.CHEAPEST))
        if scale.bounds.deadline_s is not None and quickest.step_s:
            needed = quickest.step_s.value * scale.bounds.steps
            ways.append(f"a deadline of {needed / 3600:.2f} h, with {brief(quickest.plan)}")
        if scale.bounds.budget_usd is not None and cheap.usd is not None:
            ways.append(f"a budget of {cheap.usd * scale.bounds.steps:.2f} USD, with {brief(cheap.plan)}")
    else:
        ways += _more_memory(scale, least, ranks)
    for times in (2, 4, 8, 16):
        try:
            wider = [e for e in scale.estimates(times * ranks) if scale.fits_memory(e)]
        except UserError:
            continue
        if more := [e for e in wider if keeps(scale.bounds, e)]:
            found = min(more, key=lambda e: (score(e, goal), complexity(e.plan, e.dependence)))
            ways.append(f"{times * ranks} devices, with {brief(found.plan)}")
            break
    return NothingFits(
        cap_bytes=cap_bytes,
        least_bytes=scale.needs(least),
        plan_text=brief(least.plan),
        ways=tuple(ways),
        missed=missed(scale.bounds, fitting),
    )
