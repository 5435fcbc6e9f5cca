"""The largest value of a size that runs under a cap, by short runs: what traces leave open, runs decide.

Traces give a safe value and an expected one; what lies between may run out of memory. `find_boundary` runs
values until one that runs out of memory is next to one that does not. What a process holds differs from run
to run, so the largest value must run with less memory than the cap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from memfit.planner.largest import LargestValue, MeasuredLargest, MeasuredSize, TracedSize
from memfit.types.result import Measurement, OutcomeKind

MOST_RUNS = 16
MEASURED_STEPS = 3
_ALTERNATES = 2  # runs after which every second one is in the middle
_LOWER = 0.9  # of the smallest value that ran out of memory, if none has run
_CONFIRMED = 2  # runs of the largest value that runs, and of the next one
_RESOLUTION = 0.001  # of a value: a smaller step is lost in what processes hold more or less
_RESERVE_BYTES, _RESERVE_RATIO = 2**19, 1 / 400  # of a run and of its cap: what processes hold more or less


def measured_size(value: int, cap_bytes: int, measurement: Measurement) -> MeasuredSize:
    """Return the outcome and the memory of a run at ``value`` under ``cap_bytes``, from its measurement."""
    return MeasuredSize(
        value=value,
        cap_bytes=cap_bytes,
        outcome=measurement.outcome,
        reason=measurement.reason,
        tensor_bytes=measurement.peak_bytes,
        process_bytes=measurement.process_peak_bytes,
        limit=measurement.limit_kind,
    )


def reduced_cap(cap_bytes: int) -> int:
    """Return the bytes under which the largest value must run so that it surely runs under ``cap_bytes``:
    0.5 MiB less, or 0.25 % of the cap if that is more; at least half of the cap. This is more than processes
    of the same training were seen to differ (benchmarks/largest.md)."""
    reserve = max(_RESERVE_BYTES, int(cap_bytes * _RESERVE_RATIO))
    return max(cap_bytes - reserve, cap_bytes // 2)


def find_boundary(
    run: Callable[[int, int], MeasuredSize], prediction: LargestValue, *, most_runs: int = MOST_RUNS
) -> MeasuredLargest:
    """Return the largest value that runs and the next one that runs out of memory, among the multiples of
    ``prediction.step``.

    ``run`` trains a value under a cap in bytes. The first value is the largest safe one of ``prediction``, or
    the smallest that the job takes. The largest value is sought under `reduced_cap`, until it has run twice
    there and the next one, a step or 0.1 % larger, has run out of memory. From that on, values are run under
    the cap itself, until one has run out of memory twice. Those between the two are too near the cap to tell.

    If the first value runs and the values of ``prediction`` end for another reason than memory, no other is
    run, and there is none that runs out of memory. After ``most_runs``, or after a run that fails for another
    reason, the answer is as far as it got.
    """
    first = prediction.safe or prediction.safe_next
    assert first is not None
    reduced, cap = reduced_cap(prediction.cap_bytes), prediction.cap_bytes
    done: list[MeasuredSize] = []
    next_run: tuple[int, int] | None = (first.value, reduced)
    while next_run is not None and len(done) < most_runs:
        size = run(*next_run)
        done.append(size)
        if size.outcome not in (OutcomeKind.OK, OutcomeKind.OOM):
            break
        if prediction.limit != "memory" and all(r.outcome is OutcomeKind.OK for r in done):
            break
        largest = _value_to_run([r for r in done if r.cap_bytes == reduced], prediction, reduced)
        following = None if largest else _next_to_run(done, prediction)
        next_run = (largest, reduced) if largest else (following, cap) if following else None
    worst = _worst_runs(r for r in done if r.cap_bytes == reduced)
    return MeasuredLargest(
        steps=MEASURED_STEPS,
        ran=worst.get(_bounds(worst)[0]),
        died=_always_died(done, cap),
        runs=tuple(sorted(done, key=lambda size: size.value)),
    )


def _worst_runs(runs: Iterable[MeasuredSize]) -> dict[int, MeasuredSize]:
    """Return, by value, one of its runs: one that did not end well if there is one."""
    worst: dict[int, MeasuredSize] = {}
    for size in runs:
        if size.value not in worst or size.outcome is not OutcomeKind.OK:
            worst[size.value] = size
    return worst


def _value_to_run(done: Sequence[MeasuredSize], prediction: LargestValue, cap_bytes: int) -> int | None:
    """Return the value that must be run next under ``cap_bytes``, under which ``done`` ran, to find the
    largest that does: a new one, or the largest that ran once more. None if it is known."""
    worst = _worst_runs(done)
    value = _next_value(worst, prediction, cap_bytes)
    if value is not None:
        return value
    low, _ = _bounds(worst)
    count = sum(size.value == low for size in done)
    return low if 0 < count < _CONFIRMED else None


def _next_to_run(done: Sequence[MeasuredSize], prediction: LargestValue) -> int | None:
    """Return the value that must be run next under the cap to find the smallest that runs out of memory: at
    first the smallest that did so under less, then the same again, or one above all that ran: by a step after
    the first two of them, then by twice as many after each. None if it is known, or if the job refuses it."""
    cap = prediction.cap_bytes
    _, high = _bounds(_worst_runs(size for size in done if size.cap_bytes != cap))
    if high is None:
        return None
    died = _always_died(done, cap)
    if died is not None:
        count = sum(size.value == died.value and size.cap_bytes == cap for size in done)
        return died.value if count < _CONFIRMED else None
    ran = {size.value for size in done if size.cap_bytes == cap and size.outcome is OutcomeKind.OK}
    step = _above(high, prediction.step) - high
    value = max(ran) + step * 2 ** max(0, len(ran) - 2) if ran else high
    refused = min((t.value for t in prediction.traced if t.problem and t.value >= high), default=None)
    return value if refused is None or value < refused else None


def _always_died(done: Sequence[MeasuredSize], cap_bytes: int) -> MeasuredSize | None:
    """Return a run of the smallest value that ran out of memory under ``cap_bytes`` each time and is larger
    than all that ran. None if there is none."""
    ran = max((size.value for size in done if size.outcome is OutcomeKind.OK), default=0)
    dead = [size for size in done if size.cap_bytes == cap_bytes and size.outcome is OutcomeKind.OOM]
    return min((size for size in dead if size.value > ran), key=lambda size: size.value, default=None)


def _bounds(runs: Mapping[int, MeasuredSize]) -> tuple[int, int | None]:
    """Return (the largest value that ran, 0 for none; the smallest above it that ran out of memory)."""
    low = max((v for v, r in runs.items() if r.outcome is OutcomeKind.OK), default=0)
    high = min((v for v, r in runs.items() if r.outcome is OutcomeKind.OOM and v > low), default=None)
    return low, high


def _above(value: int, step: int) -> int:
    """Return the value that counts as the next one to ``value``."""
    return value + max(step, int(_RESOLUTION * value) // step * step)


def _next_value(runs: Mapping[int, MeasuredSize], prediction: LargestValue, cap_bytes: int) -> int | None:
    """Return the next value to run: where memory, as measured at the largest value that ran, is predicted to
    reach ``cap_bytes``; after three runs, every second time the middle between the largest that ran and the
    next that did not. If none ran, it is 0.9 times the smallest that ran out of memory. None if the values
    next to each other were run, or the job refuses all others."""
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
    while target < most and _expected_bytes_at(points, target) * ratio <= cap_bytes:
        target += max(step, (most - target) // 2 // step * step)
    while target > low + step and _expected_bytes_at(points, target) * ratio > cap_bytes:
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


def with_boundary(run: Callable[[int, int], MeasuredSize], prediction: LargestValue) -> LargestValue:
    """Return ``prediction`` with its ``measured``: the largest value that runs and the next one that runs out
    of memory, as `find_boundary` finds them."""
    return dataclasses.replace(prediction, measured=find_boundary(run, prediction))
