"""The largest value of a size that runs under a cap, by short runs: what traces leave open, runs decide.

Traces give a safe value and an expected one; what lies between may run out of memory. `find_boundary` runs
values until one that runs out of memory is next to one that does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from memfit.planner.largest import LargestValue, MeasuredLargest, MeasuredSize, TracedSize
from memfit.types.result import Measurement, OutcomeKind

MOST_RUNS = 12
MEASURED_STEPS = 3
_ALTERNATES = 2  # runs after which every second one is in the middle
_LOWER = 0.9  # of the smallest value that ran out of memory, if none has run
_CONFIRMED = 3  # runs of the largest value that runs
_RESOLUTION = 0.001  # of a value: what a process holds differs by up to 0.1 % of 100 MiB from run to run


def measured_size(value: int, measurement: Measurement) -> MeasuredSize:
    """Return the outcome and the memory of a run at ``value``, from its measurement."""
    return MeasuredSize(
        value=value,
        outcome=measurement.outcome,
        reason=measurement.reason,
        tensor_bytes=measurement.peak_bytes,
        process_bytes=measurement.process_peak_bytes,
        limit=measurement.limit_kind,
    )


def find_boundary(
    run: Callable[[int], MeasuredSize], prediction: LargestValue, *, most_runs: int = MOST_RUNS
) -> MeasuredLargest:
    """Return the largest value that runs and the next one that runs out of memory, among the multiples of
    ``prediction.step``. The next one is at most 0.1 % larger, or one step.

    ``run`` trains one value under the cap. The first is the largest safe value of ``prediction``, or the
    smallest that the job takes. If it runs and the values of ``prediction`` end for another reason than
    memory, no other is run, and there is none that runs out of memory. Near the cap it can be chance whether
    a value runs: the largest is therefore run three times, and counts as one that runs out of memory if it
    does so once. After ``most_runs``, or after a run that fails for another reason, the answer is as far as
    it got.
    """
    first = prediction.safe or prediction.safe_next
    assert first is not None
    done: list[MeasuredSize] = []
    runs: dict[
        int, MeasuredSize
    ] = {}  # of each value the last one: if it ran out of memory, there is no other
    value: int | None = first.value
    while value is not None and len(done) < most_runs:
        done.append(run(value))
        runs[value] = done[-1]
        if runs[value].outcome not in (OutcomeKind.OK, OutcomeKind.OOM):
            break
        ends = prediction.limit != "memory" and all(r.outcome is OutcomeKind.OK for r in done)
        value = None if ends else _next_value(runs, prediction)
        low = _bounds(runs)[0]
        if value is None and not ends and 0 < sum(r.value == low for r in done) < _CONFIRMED:
            value = low
    low, high = _bounds(runs)
    return MeasuredLargest(
        steps=MEASURED_STEPS,
        ran=runs.get(low),
        died=None if high is None else runs[high],
        runs=tuple(sorted(done, key=lambda size: size.value)),
    )


def _bounds(runs: Mapping[int, MeasuredSize]) -> tuple[int, int | None]:
    """Return (the largest value that ran, 0 for none; the smallest above it that ran out of memory)."""
    low = max((v for v, r in runs.items() if r.outcome is OutcomeKind.OK), default=0)
    high = min((v for v, r in runs.items() if r.outcome is OutcomeKind.OOM and v > low), default=None)
    return low, high


def _next_value(runs: Mapping[int, MeasuredSize], prediction: LargestValue) -> int | None:
    """Return the next value to run: where memory, as measured at the largest value that ran, is predicted to
    reach the cap; after three runs, every second time the middle between the largest that ran and the next
    that did not. If none ran, it is 0.9 times the smallest that ran out of memory. None if the values next to
    each other were run, or the job refuses all others."""
    step = prediction.step
    low, high = _bounds(runs)
    least = max(step, int(_RESOLUTION * low) // step * step)  # by which the next value is larger
    if high is not None and high - low <= least:
        return None
    refused = min((t.value for t in prediction.traced if t.problem and t.value > low), default=None)
    if high is None and refused is not None and refused - low <= step:
        return None
    if low == 0:
        assert high is not None
        floor = max((t.value for t in prediction.traced if t.problem and t.value < high), default=0)
        if high - floor <= step:
            return None
        return max(floor + step, min(high - step, int(high * _LOWER) // step * step))
    if high is not None and len(runs) > _ALTERNATES and len(runs) % 2:
        return (low + high) // 2 // step * step
    used_bytes, points = runs[low].process_bytes, [t for t in prediction.traced if not t.problem]
    expected = _expected_bytes_at(points, low)
    ratio = used_bytes / expected if used_bytes and expected else 1.0
    target = low + step
    most = 2 * low if high is None else high - step
    most = most if refused is None else min(most, refused - step)
    while target < most and _expected_bytes_at(points, target) * ratio <= prediction.cap_bytes:
        target += max(step, (most - target) // 2 // step * step)
    while target > low + step and _expected_bytes_at(points, target) * ratio > prediction.cap_bytes:
        target -= max(step, (target - low) // 8 // step * step)
    return min(max(low + least, target), most)


def _expected_bytes_at(points: Sequence[TracedSize], value: int) -> float:
    """Return the expected bytes at ``value``, on the line through the two traced values next to it (the
    nearest two if it lies outside all); those of the only traced value if there is one."""
    if len(points) == 1:
        return points[0].expected_bytes
    index = next((i for i, p in enumerate(points) if p.value >= value), len(points) - 1)
    left, right = points[max(0, index - 1)], points[max(1, index)]
    slope = (right.expected_bytes - left.expected_bytes) / (right.value - left.value)
    return left.expected_bytes + slope * (value - left.value)


def with_boundary(run: Callable[[int], MeasuredSize], prediction: LargestValue) -> LargestValue:
    """Return ``prediction`` with its ``measured``: the largest value that runs and the next one that runs out
    of memory, as `find_boundary` finds them."""
    return dataclasses.replace(prediction, measured=find_boundary(run, prediction))
