"""How much better than the best traced plan another plan for many devices could be: among all plans of the
grids, not only those that the search selected."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy

from memfit.planner.grid_search import LEVEL_RATIO, Sketch, picked
from memfit.planner.multi_device_shortlist import is_quick
from memfit.planner.parallelism_grid import CUTTING, Grid
from memfit.planner.search_bound import Facts, Rest, extent, least_ratio, score_ratios
from memfit.planner.selection import Objective, score
from memfit.planner.sketch_errors import sketch_errors
from memfit.techniques.registry import technique
from memfit.types.deadline import TimeUp
from memfit.types.plan import Plan, Use
from memfit.types.result import Estimate, SearchExtent

if TYPE_CHECKING:
    from memfit.planner.device_pricing import Scale

GOOD_GAIN = 0.01  # a bound that is good enough to stop
_MOST_TRACES = 8  # traced for a better bound
_KEPT_SHARE = 0.3  # share of the time limit that is kept for the reasons
_MARGIN = 0.005  # below the lowest ratio of a family that another of its plans may have, at the least
# Measured (docs/log.md): 0.996 to 1.10 in 24 plans of deep models, 0.66 with context parallelism.
# In small models it was 0.75.
_UNSEEN_DEEP, _UNSEEN_SMALL, _UNSEEN_CONTEXT = 0.9, 0.75, 0.5
# What is known from one plan of a family is assumed of the others up to this ratio.
_ONE_SEEN = 0.97
_MOST_BUILT = 20_000  # contenders of a grid whose plans are built, to leave out those that were traced

Family = tuple[str, ...]
"""The names of the techniques that divide the model, then that of data parallelism. The sketches of plans of
one family are composed in the same way, so that their errors are similar."""


def scale_extent(
    scale: Scale,
    sizes: Sequence[int],
    traced: Sequence[Estimate],
    chosen: Estimate | None,
    fits: Callable[[Estimate], bool],
) -> SearchExtent:
    """Return how far a search for many devices got, with the bound on what its other plans could gain.

    ``sizes``: the numbers of devices that the search was to try. ``traced``: the estimates of all plans that
    were traced. ``chosen``: the recommended one of them. ``fits`` tells whether a plan may be recommended.
    """
    goal = scale.aim.goal
    searched = [ranks for ranks in sizes if ranks in scale.found]
    unknown = "goal" if goal is Objective.FEWEST else "not_searched" * (len(scale.tried) < len(sizes))
    best_score = min((score(e, goal) for e in traced if fits(e)), default=math.inf)
    return extent(
        unique_pairs(scale),
        best_score,
        goal=goal,
        chosen=chosen,
        rest=lambda: rest_of_grids(scale, searched, best_score),
        facts=Facts(
            priced=sum(scale.found[ranks].considered for ranks in searched),
            deadline=scale.deadline,
            limit_s=scale.aim.limit_s,
            unknown=unknown,
        ),
    )


def traced_for_bound(
    scale: Scale, sizes: Sequence[int], traced: Sequence[Estimate], fits: Callable[[Estimate], bool]
) -> Iterator[Estimate]:
    """Trace the plans that could be better than the best traced one by most, until none could be by more than
    1 %, and yield their estimates; at most 8, and none in the last 30 % of the time limit. Plans that cannot
    be traced are skipped.
    """
    goal, traced = scale.aim.goal, list(traced)
    if goal is Objective.FEWEST or scale.aim.limit_s is None:
        return
    kept_s = _KEPT_SHARE * scale.aim.limit_s
    for attempt in range(_MOST_TRACES):
        best_score = min(score(e, goal) for e in traced if fits(e))
        rest = rest_of_grids(scale, [r for r in sizes if r in scale.found], best_score)
        if not isinstance(rest.first, Sketch) or rest.lowest >= best_score * (1 - GOOD_GAIN):
            return
        scale.tell("bound", attempt, _MOST_TRACES, "")
        trace = None
        try:
            with scale.deadline.earlier_by(kept_s):
                trace = scale.traced_or_refused(scale.estimate(rest.first))
        except TimeUp:
            return
        if trace is not None:
            traced.append(trace)
            yield trace


def family(uses: Sequence[Use]) -> Family:
    """Return the family of a plan with these techniques."""
    data = [u.technique for u in uses if technique(u.technique).slot == "data-parallel"]
    return (*sorted({u.technique for u in uses if u.technique in CUTTING}), *data)


def unseen_ratio(name: Family, *, deep: bool) -> float:
    """Return the least ratio of trace to sketch that plans of a family are assumed to have of which none was
    traced. ``deep``: whether the model has more than 12 blocks.
    """
    if {"context-parallel", "axial-parallel"} & {*name}:
        return _UNSEEN_CONTEXT
    return _UNSEEN_DEEP if deep else _UNSEEN_SMALL


def least_ratios(pairs: Sequence[tuple[Estimate, Estimate]], goal: Objective) -> Mapping[Family, float]:
    """Return the least ratio of trace to sketch that other plans of each family are assumed to have of which
    a plan was traced: that of `least_ratio`, but at least 0.5 % below the lowest one seen, and 3 % below the
    only one. ``pairs``: (sketch, trace).
    """
    by_family: dict[Family, list[tuple[Estimate, Estimate]]] = {}
    for pair in pairs:
        by_family.setdefault(family(pair[0].plan.uses), []).append(pair)
    ratios = {name: score_ratios(family_pairs, goal) for name, family_pairs in by_family.items()}
    return {
        name: min(least_ratio(values), min(values) - _MARGIN) if len(values) > 1 else values[0] * _ONE_SEEN
        for name, values in ratios.items()
        if values
    }


def rest_of_grids(scale: Scale, searched: Sequence[int], best_score: float) -> Rest:
    """Return the plans of all grids that were not traced, nor failed to be, and may fit.

    ``searched``: the numbers of devices that were searched. ``best_score``: the best traced one; plans that
    cannot be better than that are not told apart. Only the grids that may have a better plan are priced
    again: the selection has the fastest plan of each grid in each interval of memory, and the plan that needs
    the least.
    """
    pairs = unique_pairs(scale)
    errors = sketch_errors([s for s, _ in pairs], [t for _, t in pairs], scale.needs)
    cap_bytes = scale.allocated_cap(errors.most_sketched(scale.aim.cap_bytes))
    known = {trace.plan for _, trace in pairs} | scale.refused.keys()
    ratios = least_ratios(pairs, scale.aim.goal)
    contenders, lowest, first, deep = 0, math.inf, None, not is_quick(scale)
    for ranks in searched:
        caps, unit = (cap_bytes, scale.host_cap(ranks)), _score_per_unit(scale, ranks)
        for grid, best_value in _grids(scale.found[ranks].picks, caps, by_memory=_by_memory(scale)):
            families = [family(grid.plan((0, 0, 0, 0, i)).uses) for i in range(len(grid.states))]
            least = numpy.array([ratios.get(f, unseen_ratio(f, deep=deep)) for f in families])
            if best_value * unit * least.min() >= best_score:
                continue
            priced = scale.found[ranks].price(grid)
            scores = unit * least * (priced.allocated_bytes if _by_memory(scale) else priced.step_s)
            fitting = (priced.allocated_bytes <= caps[0]) & (priced.host_bytes <= caps[1])
            better = _unknown(grid, numpy.flatnonzero((fitting & (scores < best_score)).ravel()), known)
            contenders += int(better.size)
            if better.size and (grid_lowest := float(scores.ravel()[better].min())) < lowest:
                place = int(better[numpy.argmin(scores.ravel()[better])])
                lowest, first = grid_lowest, Sketch(grid, *picked(grid, priced, place))
    return Rest(lowest=lowest, contenders=contenders, first=first)


def unique_pairs(scale: Scale) -> list[tuple[Estimate, Estimate]]:
    """Return (sketch, trace) of each plan that was traced, once."""
    return list({trace.plan: (sketch, trace) for sketch, trace in scale.pairs}.values())


def _by_memory(scale: Scale) -> bool:
    return scale.aim.goal is Objective.SMALLEST


def _score_per_unit(scale: Scale, ranks: int) -> float:
    """Return the goal's score of a plan for ``ranks`` devices per second of its step; for the goal of least
    memory 1, because that score is the peak itself.
    """
    if _by_memory(scale):
        return 1.0
    sketch = next(s for s in scale.found[ranks].picks if s.step_s > 0)
    return score(scale.estimate(sketch), scale.aim.goal) / sketch.step_s


def _grids(
    picks: Sequence[Sketch], caps: tuple[float, float], *, by_memory: bool
) -> list[tuple[Grid, float]]:
    """Return the grids of which a plan may fit ``caps``, each with a lower bound of the seconds of a step of
    those plans or, if ``by_memory``, of the bytes of their peaks.

    A pick is the fastest of its grid in an interval of memory. It may need more than ``caps`` when another
    plan of the interval does not, so that it counts up to the length of the interval.
    """
    values: dict[int, tuple[Grid, float]] = {}
    for pick in picks:
        if pick.allocated_bytes <= caps[0] * LEVEL_RATIO:
            value = pick.allocated_bytes if by_memory else pick.step_s
            _, lowest = values.get(id(pick.grid), (pick.grid, math.inf))
            values[id(pick.grid)] = pick.grid, min(lowest, value)
    return list(values.values())


def _unknown(grid: Grid, flat_indices: Any, known: Set[Plan]) -> Any:
    """Return those of the flat indices whose plans are not ``known``. If there are very many, all of them,
    which makes the bound no better than it is.
    """
    if flat_indices.size > _MOST_BUILT:
        return flat_indices
    plans = (grid.plan([int(i) for i in numpy.unravel_index(f, grid.shape)]) for f in flat_indices)
    return flat_indices[numpy.array([plan not in known for plan in plans], dtype=bool)]
