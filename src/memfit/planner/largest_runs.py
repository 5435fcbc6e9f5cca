"""The largest value of a size that runs under a cap, by short runs: what traces leave open, runs decide.

Traces give a safe value and an expected one; what lies between may run out of memory. `find_boundary` runs
values until one that runs out of memory is next to one that does not, and repeats both.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from memfit.planner.largest import LargestValue, MeasuredLargest, MeasuredSize, TracedSize
from memfit.types.result import Measurement, OutcomeKind

MOST_RUNS = 16
MEASURED_STEPS = 3
_ALTERNATES = 2  # runs after which every second one is in the middle
_LOWER = 0.9  # of the smallest value that ran out of memory, if none has run
_CONFIRMED = 3  # runs of the largest value that runs, and of the next one
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
    ``prediction.step``.

    ``run`` trains one value under the cap. The first is the largest safe value of ``prediction``, or the
    smallest that the job takes. If it runs and the values of ``prediction`` end for another reason than
    memory, no other is run, and there is none that runs out of memory. Near the cap it can be chance whether
    a value runs: both are therefore run three times. The largest has run each time, the next one has run out
    of memory each time, and it is at most 0.1 % larger, or one step, unless values between the two did
    either. After ``most_runs``, or after a run that fails for another reason, the answer is as far as it got.
    """
    first = prediction.safe or prediction.safe_next
    assert first is not None
    done: list[MeasuredSize] = []
    runs: dict[int, MeasuredSize] = {}  # of each value one: if it ran out of memory once, that one
    value: int | None = first.value
    while value is not None and len(done) < most_runs:
        size = run(value)
        done.append(size)
        if value not in runs or size.outcome is not OutcomeKind.OK:
            runs[value] = size
        if size.outcome not in (OutcomeKind.OK, OutcomeKind.OOM):
            break
        if prediction.limit != "memory" and all(r.outcome is OutcomeKind.OK for r in done):
            break
        value = _next_value(runs, prediction)
        if value is None:
            value = _unconfirmed_value(done, runs, prediction)
    return MeasuredLargest(
        steps=MEASURED_STEPS,
        ran=runs.get(_bounds(runs)[0]),
        died=_always_died(done, runs),
        runs=tuple(sorted(done, key=lambda size: size.value)),
    )


def _unconfirmed_value(
    done: Sequence[MeasuredSize], runs: Mapping[int, MeasuredSize], prediction: LargestValue
) -> int | None:
    """Return a value that must be run once more: the largest that ran, until it has run three times; then the
    smallest of those above all that ran, until it has run out of memory three times. If there is none, it is
    as far above all that ran as the next value is, twice as far for each further value that did either. None
    if none must be run, or if no value ran out of memory."""
    low, high = _bounds(runs)
    counts = Counter(size.value for size in done)
    if high is None:
        return None
    if 0 < counts[low] < _CONFIRMED:
        return low
    died = _always_died(done, runs)
    if died is not None:
        return died.value if counts[died.value] < _CONFIRMED else None
    ran = max(_values_that_ran(done), default=0)
    did_either = sum(runs[v].outcome is OutcomeKind.OOM for v in _values_that_ran(done) if v > low)
    value = ran + (_above(ran, prediction.step) - ran) * 2 ** max(0, did_either - 1)
    refused = min((t.value for t in prediction.traced if t.problem and t.value >= high), default=None)
    return value if refused is None or value < refused else None


def _values_that_ran(done: Sequence[MeasuredSize]) -> set[int]:
    return {size.value for size in done if size.outcome is OutcomeKind.OK}


def _always_died(done: Sequence[MeasuredSize], runs: Mapping[int, MeasuredSize]) -> MeasuredSize | None:
    """Return a run of the smallest value that ran out of memory each time and is larger than all that ran at
    least once. None if there is none."""
    ran = max(_values_that_ran(done), default=0)
    dead = [v for v, size in runs.items() if size.outcome is OutcomeKind.OOM and v > ran]
    return runs[min(dead)] if dead else None


def _bounds(runs: Mapping[int, MeasuredSize]) -> tuple[int, int | None]:
    """Return (the largest value that ran, 0 for none; the smallest above it that ran out of memory)."""
    low = max((v for v, r in runs.items() if r.outcome is OutcomeKind.OK), default=0)
    high = min((v for v, r in runs.items() if r.outcome is OutcomeKind.OOM and v > low), default=None)
    return low, high


def _above(value: int, step: int) -> int:
    """Return the value that counts as the next one to ``value``."""
    return value + max(step, int(_RESOLUTION * value) // step * step)


def _next_value(runs: Mapping[int, MeasuredSize], prediction: LargestValue) -> int | None:
    """Return the next value to run: where memory, as measured at the largest value that ran, is predicted to
    reach the cap; after three runs, every second time the middle between the largest that ran and the next
    that did not. If none ran, it is 0.9 times the smallest that ran out of memory. None if the values next to
    each other were run, or the job refuses all others."""
    step = prediction.step
    low, high = _bounds(runs)
    least = _above(low, step) - low
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
