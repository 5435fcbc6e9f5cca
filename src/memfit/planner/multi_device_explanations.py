"""What the answer of a search for many devices says beside its plan: how the plan compares with others, which
plans are impossible, what more hardware would bring, and what would help if no plan fits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from memfit.cost.host import host_line
from memfit.planner.parallelism_grid import QUICK_BLOCKS
from memfit.planner.plan_space import effect_then_size_key
from memfit.planner.reasons import may_overturn, none_fits
from memfit.planner.selection import Objective, best, by_goal, missed_bounds, score, within_bounds
from memfit.planner.sketch_errors import may_fit_under
from memfit.techniques.registry import short_label
from memfit.types.deadline import TimeUp
from memfit.types.errors import NothingFits, UserError
from memfit.types.plan import Bounds, Plan
from memfit.types.result import Estimate, Reason, ReasonKind, Sensitivity

if TYPE_CHECKING:
    from memfit.planner.multi_device_predictor import MultiDevicePredictor

_QUICK_TRIES = 12  # most plans traced before nothing fits, if traces are quick
_TRIES, _LONG_TRIES = 3, 2  # most plans traced for the reason about one technique; if traces are long
_GAIN = 0.03  # relative change of the score that is worth reporting


def explain_techniques(
    predictor: MultiDevicePredictor,
    winner: Estimate,
    known: Sequence[Estimate],
    meets_limits: Callable[[Estimate], bool],
    *,
    by_traces: bool = False,
) -> Iterator[Reason]:
    """Yield one reason for each technique of the recommended plan, the ``winner``, and for each other
    technique of a plan in ``known``.

    For a technique of the winner, the winner is compared with the best fitting plan of ``known`` without it;
    for another technique, with the best fitting plan that has it. Best is the lowest score by the goal. If
    ``by_traces``, only traced plans are compared; else sketches (estimates from traces of parts), corrected
    by `MultiDevicePredictor.expected`, are, too, but those that predict a better score than the winner's only
    if no other plan fits (see `is_comparable`). The kind of the reason says whether the plan is worse by more
    than 3 % (WITHOUT_WORSE, LEFT_OUT_SLOWER) or not (WITHOUT_AS_GOOD, LEFT_OUT_NOT_NEEDED).

    If none of these plans fits, or a plan that was not traced may change the comparison (`_overturning`), the
    number of plans that may fit and were not traced is given (NEEDED_NOT_LOOKED_AT, LEFT_OUT_NOT_LOOKED_AT).
    If none may fit, the reason is that of `none_fits`.

    ``known``: estimates by whole traces, and sketches. Those of plans that could not be traced do not count.
    """
    goal = predictor.request.goal
    may_fit = _may_fit(predictor)
    known = [e for e in known if e.plan not in predictor.refused]

    def relative(e: Estimate) -> float:
        return score(e, goal) / score(winner, goal)

    for name, has_technique, alternatives in _with_or_without(winner, known):
        expected = [predictor.expected(e) for e in alternatives]
        rivals = [
            e
            for e, known_as in zip(expected, alternatives, strict=True)
            if meets_limits(e) and (e.traced or may_fit(known_as))
        ]
        if by_traces:
            rivals = [e for e in rivals if e.traced]
        rivals = [e for e in rivals if is_comparable(e, winner, goal)] or rivals
        untraced = [e for e in alternatives if not e.traced and may_fit(e)]
        if untraced and (not rivals or _overturning(predictor, untraced, rivals, winner, meets_limits)):
            kind = ReasonKind.NEEDED_NOT_LOOKED_AT if has_technique else ReasonKind.LEFT_OUT_NOT_LOOKED_AT
            yield Reason(kind=kind, technique=name, plan_count=len(untraced))
            continue
        if not rivals:
            yield none_fits(
                name, expected, predictor.needs, predictor.request.cap.bytes, winner_has_it=has_technique
            )
            continue
        rival = min(rivals, key=lambda e: (relative(e), effect_then_size_key(e.plan, e.dependence)))
        is_worse = relative(rival) > 1 + _GAIN
        ratio = rival.step_s.value / winner.step_s.value if rival.step_s and winner.step_s else None
        saved_bytes = int(winner.allocated_bytes.value - rival.allocated_bytes.value)
        kinds = (
            (ReasonKind.WITHOUT_WORSE, ReasonKind.WITHOUT_AS_GOOD)
            if has_technique
            else (ReasonKind.LEFT_OUT_SLOWER, ReasonKind.LEFT_OUT_NOT_NEEDED)
        )
        yield Reason(
            kind=kinds[0] if is_worse else kinds[1],
            technique=name,
            saved_bytes=saved_bytes,
            time_ratio=ratio,
            detail=short_label(rival.plan),
        )


def trace_for_reasons(
    predictor: MultiDevicePredictor,
    winner: Estimate,
    known: Sequence[Estimate],
    meets_limits: Callable[[Estimate], bool],
    *,
    quick: bool,
) -> Iterator[Estimate]:
    """Trace plans on which the reasons of `explain_techniques` rest, and yield their estimates.

    For a technique of the winner, they are plans of ``known`` without it; for any other technique of
    ``known``, plans with it; the techniques in the order of their names. At most three are traced for each,
    until one fits and no other may change how the winner compares with it (`_overturning`): the best one by
    the goal whose sketch (its estimate before) fits, then those that need the least device memory, and once
    one fits, the best of those others. Plans that cannot fit, by the errors of the sketches seen so far, are
    traced only if none was, and plans that cannot be traced are skipped.

    ``quick``: whether traces are quick. If not, nothing is traced for a technique if a sketch fits, and at
    most two plans are otherwise. Raises TimeUp if a trace would have to be made after the deadline.
    """
    traced = {e.plan: e for e in known if e.traced}
    refused = set(predictor.refused)
    for _, _, alternatives in _with_or_without(winner, known):
        for attempt in range(_TRIES if quick else _LONG_TRIES):
            estimates = [traced.get(e.plan, e) for e in alternatives if e.plan not in refused]
            fitting = [e for e in estimates if meets_limits(e)]
            if fitting and not quick:
                break
            untraced = [e for e in estimates if not e.traced]
            possible = list(filter(_may_fit(predictor), untraced))
            if rivals := [e for e in fitting if e.traced]:
                possible = fitting = _overturning(predictor, possible, rivals, winner, meets_limits)
            else:
                if quick and len(untraced) == len(estimates):
                    possible = possible or untraced  # the smallest, so that the reason rests on a trace
                fitting = [e for e in possible if meets_limits(e)] if attempt == 0 else []
            if not possible:
                break
            if fitting:
                chosen = min(
                    fitting, key=lambda e: (score(e, predictor.request.goal), effect_then_size_key(e.plan))
                )
            else:
                chosen = min(possible, key=lambda e: (predictor.needs(e), effect_then_size_key(e.plan)))
            trace = predictor.trace_or_refuse(chosen)
            if trace is None:
                refused.add(chosen.plan)
            else:
                traced[chosen.plan] = trace
                yield trace


def _overturning(
    predictor: MultiDevicePredictor,
    untraced: Sequence[Estimate],
    rivals: Sequence[Estimate],
    winner: Estimate,
    meets_limits: Callable[[Estimate], bool],
) -> list[Estimate]:
    """Return the sketches of ``untraced`` that meet the limits and may change how the winner compares with
    the best of the ``rivals`` (`may_overturn`), as far as sketches of their kind were off."""
    expected = {e.plan: predictor.expected(e) for e in untraced}
    fitting = [e for e in expected.values() if meets_limits(e)]
    overturning = may_overturn(fitting, rivals, winner, (), predictor.request.goal)
    plans = {e.plan for e in overturning}
    return [e for e in untraced if e.plan in plans]


def trace_before_nothing_fits(
    predictor: MultiDevicePredictor, known: Sequence[Estimate], meets_limits: Callable[[Estimate], bool]
) -> Iterator[Estimate]:
    """Trace plans that are known only by their sketches in ``known`` (estimates from traces of parts) and may
    fit by the errors of the sketches seen so far, those that need the least device memory first, until one
    fits, and yield their estimates: at most three, or twelve of a model of at most 12 blocks, and none after
    the deadline. Plans that cannot be traced are skipped."""
    tried = {e.plan for e in known if e.traced} | predictor.refused.keys()
    for _ in range(_QUICK_TRIES if predictor.traced.blocks <= QUICK_BLOCKS else _TRIES):
        may_fit = _may_fit(predictor)
        possible = [e for e in known if e.plan not in tried and may_fit(e)]
        if not possible:
            return
        smallest = min(possible, key=lambda e: (predictor.needs(e), effect_then_size_key(e.plan)))
        tried.add(smallest.plan)
        try:
            trace = predictor.trace_or_refuse(smallest)
        except TimeUp:
            return
        if trace is not None:
            yield trace
            if meets_limits(trace):
                return


def _may_fit(predictor: MultiDevicePredictor) -> Callable[[Estimate], bool]:
    """Return a function that tells whether the plan of a sketch may fit device and host and keep to deadline
    and budget when it is traced, by the errors of the sketches of the plans that were traced so far.
    """
    sketches, traced = [s for s, _ in predictor.pairs], [t for _, t in predictor.pairs]
    return may_fit_under(predictor.request.cap, predictor.bounds, sketches, traced)


def _with_or_without(
    winner: Estimate, estimates: Sequence[Estimate]
) -> Iterator[tuple[str, bool, list[Estimate]]]:
    """Yield (technique, whether the winner has it, the estimates of plans without it if the winner has it,
    else of plans with it), for each technique of the winner or of ``estimates``, sorted by name.
    """
    winner_techniques = winner.plan.techniques
    for name in sorted({u.technique for e in estimates for u in e.plan.uses} | winner_techniques):
        has_technique = name in winner_techniques
        yield name, has_technique, [e for e in estimates if (e.plan.get(name) is None) == has_technique]


def is_comparable(e: Estimate, winner: Estimate, goal: Objective) -> bool:
    """Return whether an estimate may be compared with the ``winner``, the best traced plan: it was traced, or
    it is a sketch (an estimate from traces of parts) whose score by the goal is not better than the winner's.
    A better score of a sketch is a claim that no trace has verified."""
    return e.traced or score(e, goal) >= score(winner, goal)


def unsupported_reasons(predictor: MultiDevicePredictor) -> list[Reason]:
    """Return one reason of kind CANNOT for each way in which the model cannot be divided, for each technique
    with which its small parts cannot be traced, and for each plan whose whole trace failed."""
    refusals = [r for f in predictor.grid_sketches.values() for r in f.refused] + list(
        predictor.refused.values()
    )
    return [Reason(kind=ReasonKind.CANNOT, technique="", detail=text) for text in dict.fromkeys(refusals)]


def load_reasons(plan: Plan) -> list[Reason]:
    """Return one reason of kind EXPERT_LOAD if the plan has dropless expert-parallel, whose predictions rest
    on an assumed load of the busiest device's experts; its detail is that load divided by an even one. Else
    return an empty list."""
    use = plan.get("expert-parallel")
    if use is None or not use.settings["dropless"]:
        return []
    load_ratio = int(use.settings["capacity_percent"]) / 100
    return [Reason(kind=ReasonKind.EXPERT_LOAD, technique="", detail=f"{load_ratio:g}")]


def sensitivity(
    predictor: MultiDevicePredictor, winner: Estimate, known: Sequence[Estimate], ranks: int
) -> Iterator[Sensitivity]:
    """Yield what would change with more memory on each device, with twice as many devices as ``ranks``, and
    if the work of one resource of the machine took a tenth less time.

    - Memory: reported if some plan of ``known`` needs more than the cap, keeps to the other bounds, and has a
      score better than the winner's by more than 3 %. Of these, it names the plan that needs the least
      memory, and how much more than the cap it needs.
    - Devices: names the best fitting sketch for twice the devices, by the goal, or by time if the goal is
      least memory. Not reported if the goal is the fewest devices, if no plan for so many fits, or if the
      search has no time left.
    - Each resource of which a tenth less time would shorten the step by more than 0.5 %.
    """
    goal, cap_bytes = predictor.request.goal, predictor.request.cap.bytes

    def better(e: Estimate) -> bool:
        return score(predictor.expected(e), goal) < score(winner, goal) * (1 - _GAIN)

    larger_plans = [
        e
        for e in known
        if within_bounds(predictor.bounds, e) and predictor.needs(e) > cap_bytes and better(e)
    ]
    if larger_plans:
        smallest = min(larger_plans, key=lambda e: (predictor.needs(e), score(e, goal)))
        extra_bytes = predictor.needs(smallest) - cap_bytes
        yield _sensitivity_to("memory", winner, predictor.expected(smallest), more_bytes=extra_bytes)
    if goal is not Objective.FEWEST and (
        2 * ranks in predictor.grid_sketches or predictor.deadline.has_time()
    ):
        # more devices are smaller in any case, so compare by time
        objective = Objective.FASTEST if goal is Objective.SMALLEST else goal
        try:
            candidates = [
                e
                for e in predictor.estimates(2 * ranks)
                if predictor.fits_memory(e) and within_bounds(predictor.bounds, e)
            ]
            doubled_best = best(candidates, objective)
        except UserError:
            doubled_best = None
        if doubled_best is not None:
            yield _sensitivity_to(
                "devices",
                winner,
                predictor.expected(doubled_best),
                more_devices=2 * ranks - winner.plan.ranks,
            )
    for resource, saved_s in predictor.bottleneck(winner.plan):
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


def _more_memory(predictor: MultiDevicePredictor, known: Sequence[Estimate], ranks: int) -> Iterator[str]:
    """Yield changes of memory, each of which alone would be enough: by how much each device falls short of
    what the smallest plan needs; and the plan that fits the device and needs the least of the host, with what
    it needs of it. Only plans that keep to the deadline and the budget count; for the first change, also only
    those for which the host has enough memory.

    ``known``: the traced estimates, none of which fits both device and host. ``ranks``: the largest number of
    devices that was searched; its sketches count for the second change.
    """
    on_host = [e for e in known if within_bounds(predictor.bounds, e) and predictor.request.cap.host(e)]
    if on_host:
        extra_bytes = min(map(predictor.needs, on_host)) - predictor.request.cap.bytes
        yield f"{_rounded_up(extra_bytes / 2**30, 1)} GiB more on each device"
    sketches: list[Estimate] = []
    with contextlib.suppress(UserError):  # there may be plans for fewer devices only
        sketches = predictor.estimates(ranks)
    on_device = [
        e
        for e in (*known, *sketches)
        if predictor.needs(e) <= predictor.request.cap.bytes and within_bounds(predictor.bounds, e)
    ]
    if on_device:
        preferred = min(
            on_device,
            key=lambda e: (e.host_bytes.value if e.host_bytes else 0.0, effect_then_size_key(e.plan)),
        )
        yield f"{short_label(preferred.plan)}, which {host_line(preferred, predictor.machine)}"


def _looser_bounds(bounds: Bounds, fitting: Sequence[Estimate]) -> Iterator[str]:
    """Yield changes of the deadline and the budget, each of which alone would be enough. For the deadline, it
    is what the fastest plan needs of those that keep to the budget; for the budget, what the cheapest plan
    needs of those that keep to the deadline. If no plan keeps to the other limit, it is what the fastest (or
    the cheapest) of all plans needs, of both. A plan whose time or cost is limited but unknown does not
    count.

    ``fitting``: plans that fit the memory.
    """
    deadline, budget = (
        dataclasses.replace(bounds, budget_usd=None),
        dataclasses.replace(bounds, deadline_s=None),
    )
    limits = (
        (bounds.deadline_s, Objective.FASTEST, budget),
        (bounds.budget_usd, Objective.CHEAPEST, deadline),
    )
    limited = [
        e
        for e in fitting
        if (bounds.deadline_s is None or e.step_s) and (bounds.budget_usd is None or e.usd is not None)
    ]
    for limit, objective, other_limit in limits:
        if limit is None or not limited:
            continue
        preferred = min(limited, key=lambda e: (not within_bounds(other_limit, e), score(e, objective)))
        changes = []
        if not within_bounds(deadline, preferred) and preferred.step_s:
            needed_s = preferred.step_s.value * bounds.steps
            changes.append(f"a deadline of {_rounded_up(needed_s / 3600, 2)} h")
        if not within_bounds(budget, preferred) and preferred.usd is not None:
            changes.append(f"a budget of {_rounded_up(preferred.usd * bounds.steps, 2)} USD")
        if changes:
            yield f"{' and '.join(changes)}, with {short_label(preferred.plan)}"


def _rounded_up(value: float, digits: int) -> str:
    """Return ``value`` with ``digits`` decimals, rounded up, so that the number is enough."""
    return f"{math.ceil(value * 10**digits) / 10**digits:.{digits}f}"


def nothing_fits(
    predictor: MultiDevicePredictor, known: Sequence[Estimate], ranks: int, *, unfinished: str = ""
) -> NothingFits:
    """Return the NothingFits error, with a list of changes (``ways``) that would help:

    - If some known plan fits the memory: the deadline and the budget of money of `_looser_bounds`.
    - If none does: the memory of `_more_memory`.
    - In both cases: the least of 2, 4, 8 and 16 times ``ranks`` devices for which a sketch fits the memory
      and keeps to the bounds, if there is one.

    ``known``: the traced estimates, at least one. ``ranks``: the largest number of devices that was searched.
    ``unfinished``: a text that says that the search was not finished, for the error's message; numbers of
    devices are then not tried. "": it was.
    """
    goal, cap_bytes = predictor.request.goal, predictor.request.cap.bytes
    smallest = min(known, key=lambda e: (predictor.needs(e), effect_then_size_key(e.plan, e.dependence)))
    fitting = [e for e in known if predictor.fits_memory(e)]
    ways = list(
        _looser_bounds(predictor.bounds, fitting) if fitting else _more_memory(predictor, known, ranks)
    )
    for factor in (2, 4, 8, 16) if not unfinished else ():
        try:
            candidates = [e for e in predictor.estimates(factor * ranks) if predictor.fits_memory(e)]
        except UserError:
            continue
        if acceptable := [e for e in candidates if within_bounds(predictor.bounds, e)]:
            preferred = min(acceptable, key=lambda e: by_goal(e, goal))
            ways.append(f"{factor * ranks} devices, with {short_label(preferred.plan)}")
            break
    return NothingFits(
        cap_bytes=cap_bytes,
        least_bytes=predictor.needs(smallest),
        plan_text=short_label(smallest.plan),
        ways=tuple(dict.fromkeys(ways)),
        missed=missed_bounds(predictor.bounds, fitting),
        host=host_line(smallest, predictor.machine) if smallest.lacks_host_memory else "",
        unfinished=unfinished,
    )
