"""When the steps of a training are unusual: arithmetic over what was measured."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Final

from memfit.monitoring.limits import AlarmLimits
from memfit.monitoring.prediction import MEASURED_AS
from memfit.monitoring.record import Alarm, RankRecord, WatchRecord, WatchStep
from memfit.types.result import Interval
from memfit.types.units import format_bytes

_WINDOW: Final = 40  # values that are tested for creep
_BLOCK: Final = 5  # of these have one median
_THINNED: Final = 4  # values of a level become one of the next
_LEAST_Z: Final = 5.0  # of Mann and Kendall's test
_STEADY: Final = 0.25  # least increase from block to block, over the mean increase
_LASTING: Final = 0.6  # least growth in the later half over that in the earlier half
_LOSSES: Final = 50
_LEAST_LOSSES: Final = 20
_QUIET_STEPS: Final = 50  # in which an alarm is not repeated
_QUIET_RATIO: Final = 1.25  # nor before this multiple of its step
_COMPARED_STEPS: Final = 50  # of which the medians of ranks are compared
_LEAST_COMPARED: Final = 10

_CREEPING: Final = ("allocated_bytes", "heap_bytes", "host_bytes")
_NAMES: Final = {
    "allocated_bytes": "the memory of tensors",
    "heap_bytes": "the memory that the process has allocated",
    "host_bytes": "the resident memory of the process",
    "peak_allocated_bytes": "the peak of tensors",
    "peak_reserved_bytes": "the peak of reserved memory",
    "device_bytes": "the used memory of the device",
    "peak_host_bytes": "the peak of resident memory",
    "loss": "the loss",
    "grad_norm": "the norm of the gradients",
}


# -- statistics -------------------------------------------------------------------------------------------


def mann_kendall_z(values: Sequence[float]) -> float:
    """Return the standard score of Mann and Kendall's test for a trend, corrected for ties: positive if later
    values tend to be higher. Values in random order have a score of about 0 with standard deviation 1. Fewer
    than two values, and values that are all equal, have a score of 0."""
    n = len(values)
    signs = sum((b > a) - (b < a) for a, b in itertools.combinations(values, 2))
    ties: dict[float, int] = {}
    for value in values:
        ties[value] = ties.get(value, 0) + 1
    variance = n * (n - 1) * (2 * n + 5) - sum(t * (t - 1) * (2 * t + 5) for t in ties.values())
    if variance <= 0:
        return 0.0
    return (signs - (signs > 0) + (signs < 0)) / math.sqrt(variance / 18)


def theil_sen_slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the median slope of all pairs of points (x, y) with different x. There must be at least one such
    pair."""
    return statistics.median(
        (y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.combinations(points, 2) if x1 != x2
    )


def steady_growth(points: Sequence[tuple[float, float]], least_growth: float) -> float | None:
    """Return the growth per step of 40 ``points`` (step, value) if their values grow steadily, else None.
    None also if the last step is not above the first.

    Steady growth means four things. The medians of the 8 blocks of 5 points rise from each block to the next
    by at least a quarter of the mean rise, with at most one exception, which must not be the last. The later
    half grows by at least 0.6 times the growth of the earlier half. Mann and Kendall's score is at least 5.
    The slope of Theil and Sen times the number of steps is at least ``least_growth``. Single or occasional
    jumps, and growth that levels off, therefore give None."""
    values = [value for _, value in points]
    total = statistics.median(values[-_BLOCK:]) - statistics.median(values[:_BLOCK])
    span = points[-1][0] - points[0][0]
    if span <= 0 or total <= 0 or total < least_growth * (1 - 1.5 * _BLOCK / _WINDOW):
        return None
    medians = [statistics.median(values[i : i + _BLOCK]) for i in range(0, len(values), _BLOCK)]
    increases = [b - a for a, b in itertools.pairwise(medians)]
    least_increase = _STEADY * total / len(increases)
    half = len(medians) // 2
    earlier, later = medians[half - 1] - medians[0], medians[-1] - medians[half]
    if (
        increases[-1] < least_increase
        or sum(i < least_increase for i in increases) > 1
        or later < _LASTING * earlier
        or mann_kendall_z(values) < _LEAST_Z
    ):
        return None
    slope = theil_sen_slope(points)
    return slope if slope * span >= least_growth else None


class CreepTest:
    """Tests a series for steady growth, over its last 40 values, and over longer periods by medians of 4, 16,
    64, ... values. It keeps 40 values of each period."""

    def __init__(self, least_growth: float) -> None:
        self._least_growth = least_growth
        self._levels: list[deque[tuple[float, float]]] = []
        self._counts: list[int] = []

    def add(self, step: int, value: float) -> tuple[float, int] | None:
        """Add a value. Return (growth per step, number of steps over which it was seen) if the series now
        grows steadily, over the shortest period that shows it, else None. A period is tested at every fifth
        of its values."""
        growth, level, point = None, 0, (float(step), float(value))
        while True:
            if level == len(self._levels):
                self._levels.append(deque(maxlen=_WINDOW))
                self._counts.append(0)
            points = self._levels[level]
            points.append(point)
            self._counts[level] += 1
            if growth is None and len(points) == _WINDOW and self._counts[level] % _BLOCK == 0:
                slope = steady_growth(list(points), self._least_growth)
                growth = None if slope is None else (slope, int(points[-1][0] - points[0][0]))
            if self._counts[level] % _THINNED:
                return growth
            latest = [points[i] for i in range(-_THINNED, 0)]
            point = (latest[-1][0], statistics.median(v for _, v in latest))
            level += 1


def spike_factor(values: Sequence[float], value: float) -> float:
    """Return how many standard deviations ``value`` lies above the median of ``values``, at least one. The
    standard deviation is 1.4826 times their median absolute deviation, but at least a thousandth of their
    median and at least 1e-12."""
    median = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(v - median) for v in values)
    return (value - median) / max(deviation, 1e-3 * abs(median), 1e-12)


# -- one rank ---------------------------------------------------------------------------------------------


class AlarmDetector:
    """Looks at the steps of one rank, one after another. An alarm of a kind about a quantity is repeated
    after 50 steps at the earliest, and not before the number of its step has grown by a quarter.

    ``total_bytes``: memory of the device; None: unknown. ``prediction``: as in `WatchStart`; that of
    "host_bytes" must be for one rank.
    """

    def __init__(
        self,
        limits: AlarmLimits,
        *,
        rank: int = 0,
        total_bytes: int | None = None,
        prediction: Mapping[str, Interval] | None = None,
    ) -> None:
        self._limits, self._rank, self._total_bytes = limits, rank, total_bytes
        self._prediction = prediction or {}
        self._count = 0
        self._creep = {name: CreepTest(limits.creep_bytes) for name in _CREEPING}
        self._peaks: dict[str, int] = {}  # of the first readings, or at the last alarm
        self._peak_readings: Counter[str] = Counter()
        self._retries: int | None = None
        self._losses: deque[float] = deque(maxlen=_LOSSES)
        self._quiet_until: dict[tuple[str, str], float] = {}

    def add(self, step: WatchStep) -> list[Alarm]:
        """Return the alarms that ``step``, the next step, raises. The list is empty if there are none."""
        self._count += 1
        alarms = [*self.add_values(step.step, step.loss, step.grad_norm), *self._check_prediction(step)]
        if self._count > self._limits.warmup_steps:
            alarms += [
                *self._check_creep(step),
                *self._check_fragmentation(step),
                *self._check_headroom(step),
            ]
        alarms += self._check_maximum(step)
        self._retries = step.allocator_retries
        return alarms

    def add_values(self, step: int, loss: float | None, grad_norm: float | None) -> list[Alarm]:
        """Return the alarms about the loss and the norm of the gradients of a step. None: not measured."""
        alarms = []
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if value is not None and not math.isfinite(value):
                text = f"{_NAMES[name]} is {value} in step {step}"
                alarms += self._alarm("non-finite", step, name, value, 0.0, text)
        if loss is not None and math.isfinite(loss):
            if len(self._losses) >= _LEAST_LOSSES and loss > max(self._losses):
                alarms += self._check_spike(step, loss)
            self._losses.append(loss)
        return alarms

    def _check_spike(self, step: int, loss: float) -> list[Alarm]:
        factor, limit = spike_factor(self._losses, loss), self._limits.loss_spike_factor
        if factor <= limit:
            return []
        median = statistics.median(self._losses)
        text = (
            f"the loss is {loss:.4g} in step {step}; the median of the {len(self._losses)} steps before is "
            f"{median:.4g}"
        )
        return self._alarm("loss-spike", step, "loss", factor, limit, text)

    def _check_creep(self, step: WatchStep) -> list[Alarm]:
        alarms = []
        for name, test in self._creep.items():
            value = getattr(step, name)
            growth = None if value is None else test.add(step.step, value)
            if growth is not None:
                slope, steps = growth
                text = (
                    f"{_NAMES[name]} after a step grows by {format_bytes(slope)} per step, seen over {steps} "
                    f"steps{self._steps_left(step, slope)}"
                )
                limit = self._limits.creep_bytes / max(1, steps)
                alarms += self._alarm("creep", step.step, name, slope, limit, text)
        return alarms

    def _steps_left(self, step: WatchStep, slope: float) -> str:
        if step.headroom_bytes is None or slope <= 0:
            return ""
        return f"; the free memory is used up in about {step.headroom_bytes / slope:.0f} steps"

    def _check_prediction(self, step: WatchStep) -> list[Alarm]:
        alarms: list[Alarm] = []
        if not self._prediction:
            return alarms
        for predicted_name, name in MEASURED_AS.items():
            value, predicted = getattr(step, name), self._prediction.get(predicted_name)
            if value is not None and predicted is not None and value > predicted.high:
                text = (
                    f"{_NAMES[name]} is {format_bytes(value)}, above the upper end of its prediction, "
                    f"{format_bytes(predicted.high)}"
                )
                alarms += self._alarm("above-prediction", step.step, name, value, predicted.high, text)
        return alarms

    def _check_maximum(self, step: WatchStep) -> list[Alarm]:
        limits, alarms = self._limits, []
        for name in ("peak_allocated_bytes", "peak_host_bytes"):
            value = getattr(step, name)
            if value is None:
                continue
            reference = self._peaks.get(name, 0)
            limit = max(reference * (1 + limits.maximum_ratio), reference + limits.maximum_bytes)
            self._peak_readings[name] += 1
            if self._peak_readings[name] <= limits.maximum_after_steps:
                self._peaks[name] = max(reference, value)
            elif value > limit:
                self._peaks[name] = value
                text = (
                    f"{_NAMES[name]} is {format_bytes(value)} in step {step.step}; it was "
                    f"{format_bytes(reference)} before"
                )
                alarms += self._alarm("maximum", step.step, name, value, limit, text)
        return alarms

    def _check_fragmentation(self, step: WatchStep) -> list[Alarm]:
        limits, alarms = self._limits, []
        allocated, reserved = step.peak_allocated_bytes, step.peak_reserved_bytes
        if allocated and reserved and reserved - allocated > limits.fragmentation_bytes:
            ratio = reserved / allocated
            if ratio > limits.fragmentation_ratio:
                text = (
                    f"torch's allocator reserves {format_bytes(reserved)} for tensors of at most "
                    f"{format_bytes(allocated)}: its memory is fragmented"
                )
                limit = limits.fragmentation_ratio
                alarms += self._alarm("fragmentation", step.step, "reserved_bytes", ratio, limit, text)
        retries, before = step.allocator_retries, self._retries
        if retries is not None and before is not None and retries > before:
            text = f"torch's allocator found no free block and freed its cache, in step {step.step}"
            alarms += self._alarm("retries", step.step, "allocator_retries", retries, before, text)
        return alarms

    def _check_headroom(self, step: WatchStep) -> list[Alarm]:
        free, total = step.headroom_bytes, self._total_bytes
        if free is None or not total or free >= self._limits.headroom_ratio * total:
            return []
        limit = self._limits.headroom_ratio * total
        text = f"only {format_bytes(free)} of {format_bytes(total)} are free after step {step.step}"
        return self._alarm("headroom", step.step, "headroom_bytes", free, limit, text)

    def _alarm(
        self, kind: str, step: int, quantity: str, value: float, limit: float, text: str
    ) -> list[Alarm]:
        """Return a list with the alarm, or an empty one if the last alarm of this kind and quantity is too
        recent."""
        if step < self._quiet_until.get((kind, quantity), -math.inf):
            return []
        self._quiet_until[kind, quantity] = max(step + _QUIET_STEPS, step * _QUIET_RATIO)
        return [
            Alarm(
                kind=kind,
                step=step,
                rank=self._rank,
                quantity=quantity,
                value=float(value),
                limit=float(limit),
                text=text,
            )
        ]


# -- all ranks --------------------------------------------------------------------------------------------


def alarms_of(record: WatchRecord) -> tuple[Alarm, ...]:
    """Return the alarms of all ranks and those about slow ranks, sorted by step and rank."""
    alarms = [*(a for r in record.ranks for a in r.alarms), *slow_ranks(record)]
    return tuple(sorted(alarms, key=lambda a: (a.step, a.rank)))


def slow_ranks(record: WatchRecord) -> tuple[Alarm, ...]:
    """Return an alarm for each rank that makes the others wait.

    Ranks that synchronize their gradients end each step together, so the part of a step before its backward
    pass is compared; if a rank does not know it, the whole step. A rank is slow if the median of this time
    over its last 50 steps exceeds the median of the other ranks by the limits ``slow_rank_ratio`` and
    ``slow_rank_s`` of rank 0. There are no alarms for a single rank, or if a rank has measured fewer than 10
    of these steps."""
    for quantity in ("before_backward_s", "step_s"):
        medians = {r.rank: m for r in record.ranks if (m := _median(r, quantity)) is not None}
        if len(medians) == len(record.ranks) > 1:
            return tuple(a for r in record.ranks for a in _slow(r, quantity, medians, _limits(record)))
    return ()


def _limits(record: WatchRecord) -> Mapping[str, float]:
    start = record.ranks[0].start
    defaults = {"slow_rank_ratio": AlarmLimits().slow_rank_ratio, "slow_rank_s": AlarmLimits().slow_rank_s}
    return defaults | dict(start.limits if start else {})


def _slow(
    rank: RankRecord, quantity: str, medians: Mapping[int, float], limits: Mapping[str, float]
) -> list[Alarm]:
    own_s = medians[rank.rank]
    others_s = statistics.median(m for other, m in medians.items() if other != rank.rank)
    ratio, least_s = limits["slow_rank_ratio"], limits["slow_rank_s"]
    if own_s <= max(others_s * ratio, others_s + least_s):
        return []
    part = "data and forward pass" if quantity == "before_backward_s" else "steps"
    host = f" on {rank.start.host}" if rank.start else ""
    return [
        Alarm(
            kind="slow-rank",
            step=rank.steps[-1].step,
            rank=rank.rank,
            quantity=quantity,
            value=own_s / others_s if others_s else math.inf,
            limit=ratio,
            text=f"rank {rank.rank}{host} takes {own_s:.3g} s for {part}, the other ranks {others_s:.3g} s",
        )
    ]


def _median(record: RankRecord, quantity: str) -> float | None:
    values = [v for s in record.steps[-_COMPARED_STEPS:] if (v := getattr(s, quantity)) is not None]
    return statistics.median(values) if len(values) >= _LEAST_COMPARED else None
