"""How much better than the best traced plan another plan for many devices could be: among all plans of the
grids, not only those that the search selected."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy

from memfit.planner.grid_search import LEVEL_RATIO, Sketch, sketch_fields
from memfit.planner.multi_device_shortlist import is_quick
from memfit.planner.parallelism_grid import DIVIDING_TECHNIQUES, Grid
from memfit.planner.search_bound import SearchProgress, UntracedPlans, extent, least_ratio, score_ratios
from memfit.planner.selection import Objective, score
from memfit.planner.sketch_errors import sketch_errors
from memfit.techniques.registry import technique
from memfit.types.deadline import TimeUp
from memfit.types.plan import Plan, Use
from memfit.types.result import Estimate, SearchExtent

if TYPE_CHECKING:
    from memfit.planner.multi_device_predictor import MultiDevicePredictor

GOOD_GAIN = 0.01  # a bound that is good enough to stop
_MOST_TRACES = 8  # traced for a better bound
_KEPT_SHARE = 0.3  # share of the time limit that is kept for the reasons
_MARGIN = 0.005  # below the lowest ratio of a family that another of its plans may have, at the least
# Step times of deep models: at least 0.02 below the lowest ratio seen (benchmarks/sketch_ratios.md; compiled
# blocks on eight context-parallel ranks: docs/log.md). Small models: 0.75 was seen, and less with context
# parallelism, whose ranks then have little work.
_UNSEEN_DEEP, _UNSEEN_DEEP_CONTEXT, _UNSEEN_DEEP_MEMORY = 0.95, 0.83, 0.9
_UNSEEN_SMALL, _UNSEEN_CONTEXT = 0.75, 0.5
# What is known from one plan of a family is assumed of the others up to this ratio.
_ONE_SEEN = 0.97
_MOST_BUILT = 20_000  # contenders of a grid whose plans are built, to leave out those that were traced

Family = tuple[str, ...]
"""The names of the techniques that divide the model, then that of data parallelism. The sketches of plans of
one family are composed in the same way, so that their errors are similar."""


def multi_device_extent(
    predictor: MultiDevicePredictor,
    sizes: Sequence[int],
    traced: Sequence[Estimate],
    chosen: Estimate | None,
    meets_limits: Callable[[Estimate], bool],
) -> SearchExtent:
    """Return how far a search for many devices got, with the bound on what its other plans could gain.

    ``sizes``: the numbers of devices that the search was to try. ``traced``: the estimates of all plans that
    were traced. ``chosen``: the recommended one of them. ``meets_limits`` tells whether a plan may be
    recommended.
    """
    goal = predictor.request.goal
    searched = _searched(predictor, sizes)
    if goal is Objective.FEWEST:
        unknown = "goal"
    else:
        unknown = "not_searched" if len(predictor.tried) < len(sizes) else ""
    best_score = min((score(e, goal) for e in traced if meets_limits(e)), default=math.inf)
    return extent(
        unique_pairs(predictor),
        best_score,
        goal=goal,
        chosen=chosen,
        untraced=lambda: untraced_in_grids(predictor, searched, best_score),
        reached=SearchProgress(
            predicted=sum(predictor.grid_sketches[ranks].considered for ranks in searched),
            deadline=predictor.deadline,
            limit_s=predictor.request.limit_s,
            unknown=unknown,
        ),
    )


def trace_for_bound(
    predictor: MultiDevicePredictor,
    sizes: Sequence[int],
    traced: Sequence[Estimate],
    meets_limits: Callable[[Estimate], bool],
) -> Iterator[Estimate]:
    """Trace the plans that could be better than the best traced one by most, until none could be by more than
    1 %, and yield their estimates: at most 8, and none in the last 30 % of the time limit. Plans that cannot
    be traced are skipped. Nothing is traced if the search has no time limit or its goal is the fewest
    devices. ``traced`` must have a plan for which ``meets_limits`` is true."""
    goal, traced = predictor.request.goal, list(traced)
    if goal is Objective.FEWEST or predictor.request.limit_s is None:
        return
    kept_s = _KEPT_SHARE * predictor.request.limit_s
    for attempt in range(_MOST_TRACES):
        best_score = min(score(e, goal) for e in traced if meets_limits(e))
        untraced = untraced_in_grids(predictor, _searched(predictor, sizes), best_score)
        if not isinstance(untraced.first, Sketch) or untraced.lowest >= best_score * (1 - GOOD_GAIN):
            return
        predictor.progress("bound", attempt, _MOST_TRACES, "")
        trace = None
        try:
            with predictor.deadline.earlier_by(kept_s):
                trace = predictor.trace_or_refuse(predictor.estimate(untraced.first))
        except TimeUp:
            return
        if trace is not None:
            traced.append(trace)
            yield trace


def family(uses: Sequence[Use]) -> Family:
    """Return the family of a plan with these techniques: the sorted names of those that divide the model
    (tensor-, context-, axial- or expert-parallel, pipeline), then the name of the data-parallel one, if there
    is one."""
    data = [u.technique for u in uses if technique(u.technique).slot == "data-parallel"]
    return (*sorted({u.technique for u in uses if u.technique in DIVIDING_TECHNIQUES}), *data)


def unseen_ratio(name: Family, goal: Objective, *, deep: bool) -> float:
    """Return the least ratio of the score by a whole trace to that by the sketch (the estimate from traces of
    parts) that plans of the family ``name`` are assumed to have if none of them was traced.

    Where step times count, it is 0.95 if the model is ``deep`` (more than 12 blocks), 0.83 with
    context-parallel; for the goal of least memory 0.9. It is 0.75 if the model is not deep. With
    axial-parallel, and otherwise with context-parallel, it is 0.5. Measured: benchmarks/sketch_ratios.md,
    docs/log.md."""
    by_time = goal is not Objective.SMALLEST
    if "context-parallel" in name and deep and by_time:
        return _UNSEEN_DEEP_CONTEXT
    if {"context-parallel", "axial-parallel"} & {*name}:
        return _UNSEEN_CONTEXT
    if not deep:
        return _UNSEEN_SMALL
    return _UNSEEN_DEEP if by_time else _UNSEEN_DEEP_MEMORY


def least_ratios(pairs: Sequence[tuple[Estimate, Estimate]], goal: Objective) -> Mapping[Family, float]:
    """Return, for each family of which a plan was traced, the least ratio of the goal's score by a whole
    trace to that by the sketch (the estimate from traces of parts) that its other plans are assumed to have:
    that of `least_ratio`, but at least 0.005 below the lowest ratio seen; 0.97 times the ratio if only one
    was seen. ``pairs``: (sketch, trace)."""
    by_family: dict[Family, list[tuple[Estimate, Estimate]]] = {}
    for pair in pairs:
        by_family.setdefault(family(pair[0].plan.uses), []).append(pair)
    ratios = {name: score_ratios(family_pairs, goal) for name, family_pairs in by_family.items()}
    return {
        name: min(least_ratio(values), min(values) - _MARGIN) if len(values) > 1 else values[0] * _ONE_SEEN
        for name, values in ratios.items()
        if values
    }


def untraced_in_grids(
    predictor: MultiDevicePredictor, searched: Sequence[int], best_score: float
) -> UntracedPlans:
    """Return what is known of the plans of all grids that may fit and were neither traced nor failed to be
    (`UntracedPlans`).

    ``searched``: the numbers of devices that were searched. ``best_score``: that of the best traced plan.
    Only plans that may be better are counted; if there is none, the lowest score is infinite. Only the grids
    that may have a better plan are predicted again: the selection has the fastest plan of each grid in each
    interval of memory, and the plan that needs the least.
    """
    pairs = unique_pairs(predictor)
    errors = sketch_errors([s for s, _ in pairs], [t for _, t in pairs], predictor.needs)
    cap_bytes = predictor.allocated_cap(errors.most_sketched(predictor.request.cap.bytes))
    known = {trace.plan for _, trace in pairs} | predictor.refused.keys()
    ratios = least_ratios(pairs, predictor.request.goal)
    contenders, lowest, first, deep = 0, math.inf, None, not is_quick(predictor)
    for ranks in searched:
        caps, unit = (cap_bytes, predictor.host_cap(ranks)), _score_per_unit(predictor, ranks)
        for grid, best_value in _grids(
            predictor.grid_sketches[ranks].picks, caps, by_memory=_by_memory(predictor)
        ):
            families = [family(grid.plan((0, 0, 0, 0, i)).uses) for i in range(len(grid.states))]
            least = numpy.array(
                [ratios.get(f, unseen_ratio(f, predictor.request.goal, deep=deep)) for f in families]
            )
            if best_value * unit * least.min() >= best_score:
                continue
            predictions = predictor.grid_sketches[ranks].predict(grid)
            scores = (
                unit * least * (predictions.allocated_bytes if _by_memory(predictor) else predictions.step_s)
            )
            fitting = (predictions.allocated_bytes <= caps[0]) & (predictions.host_bytes <= caps[1])
            better = _without_known(grid, numpy.flatnonzero((fitting & (scores < best_score)).ravel()), known)
            contenders += int(better.size)
            if better.size and (grid_lowest := float(scores.ravel()[better].min())) < lowest:
                place = int(better[numpy.argmin(scores.ravel()[better])])
                lowest, first = grid_lowest, Sketch(grid, *sketch_fields(grid, predictions, place))
    return UntracedPlans(lowest=lowest, contenders=contenders, first=first)


def unique_pairs(predictor: MultiDevicePredictor) -> list[tuple[Estimate, Estimate]]:
    """Return (estimate by the sketch, estimate by the whole trace) of each plan that has both, once."""
    return list({trace.plan: (sketch, trace) for sketch, trace in predictor.pairs}.values())


def _searched(predictor: MultiDevicePredictor, sizes: Sequence[int]) -> list[int]:
    """Return those of the numbers of devices for which plans were predicted."""
    return [n for n in sizes if n in predictor.grid_sketches and predictor.grid_sketches[n].picks]


def _by_memory(predictor: MultiDevicePredictor) -> bool:
    return predictor.request.goal is Objective.SMALLEST


def _score_per_unit(predictor: MultiDevicePredictor, ranks: int) -> float:
    """Return the goal's score of a plan for ``ranks`` devices divided by the seconds of its step, to which it
    is proportional. For the goal of least memory return 1: that score is the peak itself."""
    if _by_memory(predictor):
        return 1.0
    sketch = next(s for s in predictor.grid_sketches[ranks].picks if s.step_s > 0)
    return score(predictor.estimate(sketch), predictor.request.goal) / sketch.step_s


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


def _without_known(grid: Grid, flat_indices: Any, known: Set[Plan]) -> Any:
    """Return those of the flat indices whose plans are not ``known``; if there are more than 20,000, all of
    them, which makes the bound no better than it is."""
    if flat_indices.size > _MOST_BUILT:
        return flat_indices
    plans = (grid.plan([int(i) for i in numpy.unravel_index(f, grid.shape)]) for f in flat_indices)
    return flat_indices[numpy.array([plan not in known for plan in plans], dtype=bool)]
