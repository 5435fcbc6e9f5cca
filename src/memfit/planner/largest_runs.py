"""The largest value of a size that runs under a cap, by short runs: what traces leave open, runs decide.

Traces give a safe value and an expected one; what lies between may run out of memory. `find_boundary` runs
values until one that runs out of memory is next to one that does not. What a process holds differs from run
to run, so the largest value must run with less memory than the cap, and the next one run out of more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from memfit.planner.largest import LargestValue, MeasuredLargest, MeasuredSize
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


def reserve_bytes(cap_bytes: int) -> int:
    """Return by how much the cap is lowered for the largest value, and raised for the next one: 0.5 MiB, or
    0.25 % of the cap if that is more; at most half of the cap. This is more than most processes of the same
    training were seen to differ (benchmarks/largest.md)."""
    return min(max(_RESERVE_BYTES, int(cap_bytes * _RESERVE_RATIO)), cap_bytes // 2)


def find_boundary(
    run: Callable[[int, int], MeasuredSize],
    prediction: LargestValue,
    *,
    device_bytes: int | None = None,
    most_runs: int = MOST_RUNS,
) -> MeasuredLargest:
    """Return the largest value that runs and the next one that runs out of memory, among the multiples of
    ``prediction.step``.

    ``run`` trains a value under a cap in bytes; ``device_bytes``: the largest cap that can be set, None for
    any. The first value is the largest safe one of ``prediction``, or the smallest that the job takes. The
    largest value is sought under the cap less `reserve_bytes`, until it has run twice there and the next one
    (`_above`) has run out of memory. Then values are run under the cap and `reserve_bytes` more, until one
    has run out of memory twice. Those between the two are too near the cap to tell.

    If the first value runs and the values of ``prediction`` end for another reason than memory, no other is
    run, and there is none that runs out of memory. After ``most_runs``, or after a run that fails for another
    reason, the answer is as far as it got.
    """
    first = prediction.safe or prediction.safe_next
    assert first is not None
    reserve = reserve_bytes(prediction.cap_bytes)
    reduced, raised = prediction.cap_bytes - reserve, prediction.cap_bytes + reserve
    raised = raised if device_bytes is None else min(raised, device_bytes)
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
        following = None if largest else _next_to_run(done, prediction, raised)
        next_run = (largest, reduced) if largest else (following, raised) if following else None
    worst = _worst_runs(r for r in done if r.cap_bytes == reduced)
    return MeasuredLargest(
        steps=MEASURED_STEPS,
        ran=worst.get(_bounds(worst)[0]),
        died=_always_died(done, raised),
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


def _next_to_run(done: Sequence[MeasuredSize], prediction: LargestValue, cap_bytes: int) -> int | None:
    """Return the value that must be run next under ``cap_bytes`` to find the smallest that runs out of memory
    there: at first one whose memory, as measured at the largest that runs, is predicted to be more; then the
    same again, or one above all that ran, by a step after the first of them, and by twice as many after each
    other. None if it is known, or if the job refuses it."""
    low, high = _bounds(worst := _worst_runs(size for size in done if size.cap_bytes != cap_bytes))
    if high is None:
        return None
    died = _always_died(done, cap_bytes)
    if died is not None:
        count = sum(size.value == died.value and size.cap_bytes == cap_bytes for size in done)
        return died.value if count < _CONFIRMED else None
    ran = {size.value for size in done if size.cap_bytes == cap_bytes and size.outcome is OutcomeKind.OK}
    refused = min((t.value for t in prediction.traced if t.problem and t.value >= high), default=None)
    value = high
    if ran:
        value = max(ran) + (_above(high, prediction) - high) * 2 ** (len(ran) - 1)
    elif low:
        factor = _measured_ratio(worst[low], prediction)
        while _expected_bytes_at(prediction, value) * factor <= cap_bytes and value < 2 * high:
            value = _above(value, prediction)
    if refused is not None and value >= refused > high and not ran:
        value = refused - prediction.step
    return value if refused is None or value < refused else None


def _always_died(done: Sequence[MeasuredSize], cap_bytes: int) -> MeasuredSize | None:
    """Return a run of the smallest value that ran out of memory under ``cap_bytes`` each time and is larger
    than all that ran. None if there is none."""
    ran = max((size.value for size in done if size.outcome is OutcomeKind.OK), default=0)
    dead = [size for size in done if size.cap_bytes == cap_bytes and size.outcome is OutcomeKind.OOM]
    return min((size for size in dead if size.value > ran), key=lambda size: size.value, default=None)


def _bounds(runs: Mapping[int, MeasuredSize]) -> tuple[int, int | None]:
    """Return (the largest value that ran, 0 for none; the smallest above it that ran out of memory, None for
    none)."""
    low = max((v for v, r in runs.items() if r.outcome is OutcomeKind.OK), default=0)
    high = min((v for v, r in runs.items() if r.outcome is OutcomeKind.OOM and v > low), default=None)
    return low, high


def _above(value: int, prediction: LargestValue) -> int:
    """Return the value that counts as the next one to ``value``: a step larger, or 0.1 %, or as much as
    needs half of `reserve_bytes`."""
    step = prediction.step
    slope = (_expected_bytes_at(prediction, value + step) - _expected_bytes_at(prediction, value)) / step
    by_memory = reserve_bytes(prediction.cap_bytes) / 2 / slope if slope > 0 else 0.0
    return value + max(step, int(max(_RESOLUTION * value, min(by_memory, value / 10))) // step * step)


def _measured_ratio(size: MeasuredSize, prediction: LargestValue) -> float:
    """Return the measured memory of a run in terms of the expected memory; 1 if it was not measured."""
    expected = _expected_bytes_at(prediction, size.value)
    return size.process_bytes / expected if size.process_bytes and expected else 1.0


def _next_value(runs: Mapping[int, MeasuredSize], prediction: LargestValue, cap_bytes: int) -> int | None:
    """Return the next value to run: where memory, as measured at the largest value that ran, is predicted to
    reach ``cap_bytes``; after three runs, every second time the middle between the largest that ran and the
    next that did not. If none ran, it is 0.9 times the smallest that ran out of memory. None if the values
    next to each other were run, or the job refuses all others."""
    step = prediction.step
    low, high = _bounds(runs)
    least = _above(low, prediction) - low if low else step
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
    ratio = _measured_ratio(runs[low], prediction)
    target = low + step
    most = 2 * low if high is None else high - step
    most = most if refused is None else min(most, refused - step)
    while target < most and _expected_bytes_at(prediction, target) * ratio <= cap_bytes:
        target += max(step, (most - target) // 2 // step * step)
    while target > low + step and _expected_bytes_at(prediction, target) * ratio > cap_bytes:
        target -= max(step, (target - low) // 8 // step * step)
    return min(max(low + least, target), most)


def _expected_bytes_at(prediction: LargestValue, value: int) -> float:
    """Return the expected bytes at ``value``, on the line through the two traced values next to it (the
    nearest two if it lies outside all); those of the only traced value if there is one."""
    points = [t for t in prediction.traced if not t.problem]
    if len(points) == 1:
        return points[0].expected_bytes
    index = next((i for i, p in enumerate(points) if p.value >= value), len(points) - 1)
    left, right = points[max(0, index - 1)], points[max(1, index)]
    slope = (right.expected_bytes - left.expected_bytes) / (right.value - left.value)
    return left.expected_bytes + slope * (value - left.value)


def with_boundary(
    run: Callable[[int, int], MeasuredSize], prediction: LargestValue, *, device_bytes: int | None = None
) -> LargestValue:
    """Return ``prediction`` with its ``measured``: the largest value that runs and the next one that runs out
    of memory, as `find_boundary` finds them."""
    measured = find_boundary(run, prediction, device_bytes=device_bytes)
    return dataclasses.replace(prediction, measured=measured)
