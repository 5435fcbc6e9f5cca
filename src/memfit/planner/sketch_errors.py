"""What whole traces may show of plans that were only sketched, judged by the plans of the search that were
both sketched and traced.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

from memfit.planner.recompute_budget import Cap
from memfit.planner.selection import within_bounds
from memfit.types.plan import Bounds
from memfit.types.result import Estimate

_SLACK_RATIO = 0.02  # of a sketch's need: how much less than all traces seen so far another one may show
_SLOPES = (0.7, 1.3)  # least and highest increase of a traced need with a sketched one
_ENOUGH = 4  # traced plans; with fewer, errors are assumed
_ASSUMED_RATIO = 0.8  # of what a sketch needs, because sketches are up to 20 % off


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SketchErrors:
    """How far whole traces are from sketches: the bytes of a device that a traced plan needs are at least
    about ``slope`` times those of its sketch, plus ``offset_bytes``; its step time is at least ``time_ratio``
    times that of the sketch.
    """

    slope: float
    offset_bytes: float
    time_ratio: float

    def least_need(self, sketch_bytes: int) -> float:
        """Return the least bytes of a device that the trace of a plan may need. ``sketch_bytes``: what its
        sketch needs.
        """
        return (self.slope - _SLACK_RATIO) * sketch_bytes + self.offset_bytes


def sketch_errors(
    sketches: Sequence[Estimate], traced: Sequence[Estimate], needs: Callable[[Estimate], int]
) -> SketchErrors:
    """Compare the traced plans with their sketches. ``needs`` returns the bytes of a device that an
    estimate's plan needs.

    The line of needs has the slope of the least squares, within 0.7 and 1.3, and no traced plan is below it.
    If fewer than four plans were traced, it is 80 % of what sketches need.
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


def may_fit(
    sketches: Sequence[Estimate], traced: Sequence[Estimate], cap: Cap, bounds: Bounds
) -> Callable[[Estimate], bool]:
    """Return a function that tells whether the plan of a sketch may fit device and host and keep to deadline
    and budget when it is traced whole, by the errors of the sketches of the ``traced`` plans.
    """
    errors = sketch_errors(sketches, traced, cap.needs)

    def may(sketch: Estimate) -> bool:
        return (
            errors.least_need(cap.needs(sketch)) <= cap.bytes
            and cap.host(sketch)
            and within_bounds(bounds, _faster(sketch, errors.time_ratio))
        )

    return may


def _faster(sketch: Estimate, ratio: float) -> Estimate:
    """Return the sketch with step time and money multiplied by ``ratio``."""
    step = sketch.step_s
    return dataclasses.replace(
        sketch,
        step_s=dataclasses.replace(step, value=step.value * ratio, low=step.low * ratio) if step else None,
        usd=sketch.usd * ratio if sketch.usd is not None else None,
    )
