"""What whole traces may show of plans that were only sketched, judged by the plans of the search that were
both sketched and traced.

`may_fit_under` rests on all of them, for statements such as "no plan fits". `BestCaseEstimates` rests on
those that are most like the plan, to choose which plans are worth a trace.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from memfit.planner.capacity import Cap
from memfit.planner.plan_kinds import kind
from memfit.planner.selection import Objective, score, within_bounds
from memfit.types.plan import Bounds, Plan
from memfit.types.result import Estimate

_SLACK_RATIO = 0.02  # of a sketch's need: how much less than all traces seen so far another one may show
_SLOPES = (0.7, 1.3)  # least and highest increase of a traced need with a sketched one
_ENOUGH = 4  # traced plans; with fewer, errors are assumed
_ASSUMED_RATIO = 0.8  # of what a sketch needs, because sketches are up to 20 % off
_TIME_OPTIMISM, _MEMORY_OPTIMISM = 0.90, 0.97  # factors on ratios for each technique that differs


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SketchErrors:
    """How far whole traces are from sketches, the estimates from traces of parts: the bytes of a device that
    a traced plan needs are at least about ``slope`` times those of its sketch, plus ``offset_bytes``; its
    step time is at least ``time_ratio`` times that of the sketch."""

    slope: float
    offset_bytes: float
    time_ratio: float

    def least_need(self, sketch_bytes: int) -> float:
        """Return the least bytes of a device that the trace of a plan may need. ``sketch_bytes``: what its
        sketch needs.
        """
        return (self.slope - _SLACK_RATIO) * sketch_bytes + self.offset_bytes

    def most_sketched(self, trace_bytes: float) -> float:
        """Return the most bytes of a device that a sketch may need if its plan, when traced, may need no more
        than ``trace_bytes``: the inverse of `least_need`.
        """
        return (trace_bytes - self.offset_bytes) / (self.slope - _SLACK_RATIO)


def sketch_errors(
    sketches: Sequence[Estimate], traced: Sequence[Estimate], needs: Callable[[Estimate], int]
) -> SketchErrors:
    """Return how far the whole traces of plans are from their sketches, the estimates from traces of parts
    (`SketchErrors`). ``needs`` returns the bytes of a device that an estimate's plan needs.

    The line of needs has the slope of the least squares, within 0.7 and 1.3, and no traced plan is below it.
    If fewer than four plans were traced, it is 80 % of what sketches need. ``time_ratio`` is the lowest ratio
    seen, at most 1.
    """
    by_plan = {e.plan: e for e in traced}
    both = [(s, by_plan[s.plan]) for s in sketches if s.plan in by_plan]
    pairs = [(needs(sketch), needs(trace)) for sketch, trace in both]
    time_ratios = [t.step_s.value / s.step_s.value for s, t in both if s.step_s and t.step_s]
    time_ratio = min([1.0, *time_ratios])
    if len(pairs) < _ENOUGH:
        return SketchErrors(slope=_ASSUMED_RATIO, offset_bytes=0.0, time_ratio=time_ratio)
    slope = 1.0
    if len({sketched for sketched, _ in pairs}) > 1:
        fitted = statistics.linear_regression(*zip(*pairs, strict=True)).slope
        slope = min(max(fitted, _SLOPES[0]), _SLOPES[1])
    offset_bytes = min(trace - slope * sketched for sketched, trace in pairs)
    return SketchErrors(slope=slope, offset_bytes=offset_bytes, time_ratio=time_ratio)


class BestCaseEstimates:
    """The best that whole traces of plans may show, by the sketches (estimates from traces of parts) and the
    traces of the traced plans that are most like each of them.

    Errors of sketches depend on the techniques: a ratio of trace to sketch is taken to hold for a plan with
    the same techniques, and to be up to 10 % lower in time and 3 % lower in memory for each technique that
    only one of the two plans has; a technique with other settings counts half. Two plans are most like the
    sketched one: the one that differs in the fewest techniques, and the one that does so of those of the same
    kind (see `kind`). The one that promises more counts.
    """

    def __init__(
        self, sketches: Sequence[Estimate], traced: Sequence[Estimate], cap: Cap, goal: Objective
    ) -> None:
        self.cap, self.goal = cap, goal
        by_plan = {e.plan: e for e in traced}
        self._ratios: list[tuple[Plan, float, float]] = []  # plan, of scores, of needs
        for sketch in sketches:
            if (trace := by_plan.get(sketch.plan)) is not None and 0 < score(sketch, goal) < math.inf:
                ratios = score(trace, goal) / score(sketch, goal), cap.needs(trace) / cap.needs(sketch)
                self._ratios.append((sketch.plan, *ratios))

    def of(self, sketch: Estimate) -> tuple[float, float]:
        """Return (the lowest score by the goal, the least bytes of a device) that the trace of the sketch's
        plan may show: those of the sketch if no plan was both sketched and traced."""
        sketched_kind = kind(sketch.plan)
        likeness = [
            (kind(plan) != sketched_kind, _distance(sketch.plan, plan), score_ratio, need_ratio)
            for plan, score_ratio, need_ratio in self._ratios
        ] or [(False, 0.0, 1.0, 1.0)]
        nearest = min(likeness), min(likeness, key=lambda entry: entry[1:])
        need_ratio = min(need * _MEMORY_OPTIMISM**distance for _, distance, _, need in nearest)
        least_bytes = self.cap.needs(sketch) * need_ratio
        if self.goal is Objective.FEWEST:  # the number of devices is known
            return score(sketch, self.goal), least_bytes
        optimism = _MEMORY_OPTIMISM if self.goal is Objective.SMALLEST else _TIME_OPTIMISM
        score_ratio = min(ratio * optimism**distance for _, distance, ratio, _ in nearest)
        return score(sketch, self.goal) * score_ratio, least_bytes


def _distance(plan: Plan, other: Plan) -> float:
    """Return how many techniques only one of the two plans has, plus half of the number of those that both
    have with other settings, plus the doublings between their numbers of ranks."""
    settings, other_settings = ({u.technique: u.knobs for u in p.uses} for p in (plan, other))
    alone = settings.keys() ^ other_settings.keys()
    changed = [n for n in settings.keys() & other_settings.keys() if settings[n] != other_settings[n]]
    return len(alone) + len(changed) / 2 + abs(math.log2(plan.ranks / other.ranks))


def may_fit_under(
    cap: Cap, bounds: Bounds, sketches: Sequence[Estimate], traced: Sequence[Estimate]
) -> Callable[[Estimate], bool]:
    """Return a function that tells whether the plan of a sketch (an estimate from traces of parts) may fit
    device and host and keep to deadline and budget when it is traced whole, by the errors of the sketches of
    the ``traced`` plans."""
    errors = sketch_errors(sketches, traced, cap.needs)

    def may_fit(sketch: Estimate) -> bool:
        return (
            errors.least_need(cap.needs(sketch)) <= cap.bytes
            and cap.host(sketch)
            and within_bounds(bounds, _faster(sketch, errors.time_ratio))
        )

    return may_fit


def _faster(sketch: Estimate, ratio: float) -> Estimate:
    """Return the sketch with its step time, except the high end, and its money multiplied by ``ratio``, at
    most 1."""
    step = sketch.step_s
    return dataclasses.replace(
        sketch,
        step_s=dataclasses.replace(step, value=step.value * ratio, low=step.low * ratio) if step else None,
        usd=sketch.usd * ratio if sketch.usd is not None else None,
    )
