"""The alarms of a watched training: arithmetic over its steps, and where the thresholds come from."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.monitoring.alarms import (
    AlarmDetector,
    CreepTest,
    mann_kendall_z,
    slow_ranks,
    spike_factor,
    steady_growth,
    theil_sen_slope,
)
from memfit.monitoring.limits import AlarmLimits, limits_of
from memfit.monitoring.prediction import predicted_intervals
from memfit.monitoring.record import RankRecord, WatchRecord, WatchStep
from memfit.techniques.plan_file import read_plan
from memfit.types.errors import UserError
from memfit.types.result import Interval
from memfit.types.units import GIB, MIB

LEAST = 16 * MIB
sizes = st.lists(st.integers(0, 2**34), min_size=40, max_size=40)


def points(values: Sequence[float]) -> list[tuple[float, float]]:
    return [(float(i), float(v)) for i, v in enumerate(values)]


def noise(seed: int, count: int, size: float) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(0, size) for _ in range(count)]


# --- steady growth


@pytest.mark.parametrize("seed", range(20))
def test_a_leak_under_noise_of_twice_its_size_grows_steadily(seed: int) -> None:
    values = [GIB + i * MIB + n for i, n in enumerate(noise(seed, 40, 2 * MIB))]
    assert steady_growth(points(values), LEAST) == pytest.approx(MIB, rel=0.2)


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_a_jump_and_growth_that_levels_off_are_not_steady(seed: int) -> None:
    around = noise(seed, 40, MIB / 4)
    jump_at = random.Random(seed).randrange(1, 39)
    for values in (
        noise(seed, 40, 100 * MIB),
        [(i >= jump_at) * 100 * MIB + n for i, n in enumerate(around)],
        [200 * MIB * (1 - math.exp(-i / 12)) + n for i, n in enumerate(around)],
        [max(random.Random(seed + j).uniform(0, 400) for j in range(i + 1)) * MIB for i in range(40)],
    ):
        assert steady_growth(points(values), LEAST) is None


@given(sizes, st.integers(0, 2**30))
def test_a_constant_does_not_change_the_growth(values: list[int], constant: int) -> None:
    assert steady_growth(points(values), LEAST) == pytest.approx(
        steady_growth(points([v + constant for v in values]), LEAST)
    )


@given(sizes)
def test_memory_that_never_rises_does_not_grow(values: list[int]) -> None:
    assert steady_growth(points(sorted(values, reverse=True)), LEAST) is None


@given(sizes)
def test_what_grows_steadily_does_not_do_so_backwards(values: list[int]) -> None:
    rising = sorted(values)
    if steady_growth(points(rising), LEAST) is not None:
        assert steady_growth(points(rising[::-1]), LEAST) is None


@given(st.lists(st.integers(-1000, 1000), min_size=3, max_size=30))
def test_a_reversed_series_has_the_opposite_trend(values: list[int]) -> None:
    assert mann_kendall_z(values) == pytest.approx(-mann_kendall_z(values[::-1]))
    assert theil_sen_slope(points(values)) == pytest.approx(-theil_sen_slope(points(values[::-1])))


def test_steps_of_one_number_are_no_steady_growth() -> None:
    """A training may number its epochs instead of its steps."""
    values = [n * MIB for n in range(40)]
    assert steady_growth([(1.0, v) for v in values], LEAST) is None
    assert steady_growth([(float(n // 10), v) for n, v in enumerate(values)], LEAST) is not None


def test_the_trend_score_of_distinct_values_is_that_of_kendalls_tau() -> None:
    from scipy.stats import kendalltau

    values = [3, 1, 4, 15, 9, 2, 6, 5, 35, 8]
    n = len(values)
    tau = kendalltau(range(n), values).statistic
    score = tau * n * (n - 1) / 2
    expected = (score - 1) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    assert mann_kendall_z(values) == pytest.approx(expected)


def test_a_slow_leak_is_found_over_a_longer_period() -> None:
    test = CreepTest(LEAST)
    found = [(step, test.add(step, GIB + step * MIB / 16)) for step in range(1, 1001)]
    step, growth = next((s, g) for s, g in found if g is not None)
    assert growth is not None
    assert 256 < step <= 640
    assert growth[0] == pytest.approx(MIB / 16, rel=0.05)


# --- the alarms of a rank


def alarms(steps: Sequence[WatchStep], **settings: object) -> list[tuple[str, str, int]]:
    detector = AlarmDetector(AlarmLimits(), **settings)  # type: ignore[arg-type]
    return [(a.kind, a.quantity, a.step) for s in steps for a in detector.add(s)]


def steps(count: int, **values: object) -> list[WatchStep]:
    return [WatchStep(step=i, time_s=float(i), **values) for i in range(1, count + 1)]  # type: ignore[arg-type]


def changed(all_steps: list[WatchStep], step: int, **values: object) -> list[WatchStep]:
    return [dataclasses.replace(s, **values) if s.step == step else s for s in all_steps]  # type: ignore[arg-type]


def test_an_even_training_raises_no_alarm() -> None:
    even = steps(200, allocated_bytes=GIB, peak_allocated_bytes=2 * GIB, loss=1.0, grad_norm=1.0)
    assert alarms(even, total_bytes=80 * GIB) == []


@pytest.mark.parametrize("quantity", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_alarm(quantity: str, value: float) -> None:
    assert alarms(changed(steps(9, loss=1.0, grad_norm=1.0), 5, **{quantity: value})) == [
        ("non-finite", quantity, 5)
    ]


def test_an_alarm_is_repeated_later_and_later() -> None:
    steps_of_alarms = [step for _, _, step in alarms(steps(1000, loss=math.nan))]
    assert steps_of_alarms[:3] == [1, 51, 101]
    assert len(steps_of_alarms) < 20


def test_a_loss_far_above_those_before_is_a_spike() -> None:
    noisy = [WatchStep(step=i, time_s=0.0, loss=2 + n) for i, n in enumerate(noise(0, 100, 0.1), start=1)]
    assert alarms(noisy) == []
    assert alarms(changed(noisy, 60, loss=9.0)) == [("loss-spike", "loss", 60)]
    assert spike_factor([1.0, 1.0, 1.0], 1.002) == pytest.approx(2)


def test_a_peak_that_is_read_rarely_is_compared_with_as_many_readings_as_any_other() -> None:
    peaks = [400 * MIB + 10 * MIB * min(step, 90) for step in range(1, 300)]
    detector = AlarmDetector(AlarmLimits())
    for step, peak in enumerate(peaks, 1):  # short steps: one reading in each second
        values = {"peak_host_bytes": peak} if step % 30 == 0 else {}
        assert not detector.add(WatchStep(step=step, time_s=step / 30, **values))


def test_a_later_peak_far_above_those_of_the_first_steps_is_a_new_maximum() -> None:
    even = steps(100, peak_allocated_bytes=GIB)
    assert alarms(changed(even, 80, peak_allocated_bytes=GIB + 60 * MIB)) == []
    assert alarms(changed(even, 80, peak_allocated_bytes=2 * GIB)) == [
        ("maximum", "peak_allocated_bytes", 80)
    ]
    assert alarms(changed(even, 40, peak_allocated_bytes=2 * GIB)) == []


def test_memory_above_the_upper_end_of_its_prediction_is_an_alarm() -> None:
    prediction = {"allocated_bytes": Interval(value=GIB, low=GIB, high=1.1 * GIB)}
    assert alarms(steps(3, peak_allocated_bytes=int(1.1 * GIB)), prediction=prediction) == []
    assert alarms(steps(3, peak_allocated_bytes=int(1.2 * GIB)), prediction=prediction) == [
        ("above-prediction", "peak_allocated_bytes", 1)
    ]


def test_reserved_memory_far_above_the_tensors_is_fragmentation() -> None:
    assert alarms(steps(20, peak_allocated_bytes=10 * GIB, peak_reserved_bytes=12 * GIB)) == []
    assert alarms(steps(20, peak_allocated_bytes=10 * GIB, peak_reserved_bytes=14 * GIB)) == [
        ("fragmentation", "reserved_bytes", 11)
    ]


def test_an_allocator_that_had_to_free_its_cache_is_an_alarm() -> None:
    assert alarms(changed(steps(20, allocator_retries=3), 15, allocator_retries=4)) == [
        ("retries", "allocator_retries", 15)
    ]


def test_little_free_memory_is_an_alarm() -> None:
    assert alarms(steps(20, headroom_bytes=5 * GIB), total_bytes=80 * GIB) == []
    assert alarms(steps(20, headroom_bytes=3 * GIB), total_bytes=80 * GIB) == [
        ("headroom", "headroom_bytes", 11)
    ]


def test_a_creep_says_when_the_free_memory_is_used_up() -> None:
    detector = AlarmDetector(AlarmLimits())
    growing = [
        WatchStep(step=i, time_s=0.0, allocated_bytes=i * MIB, headroom_bytes=(2000 - i) * MIB)
        for i in range(1, 61)
    ]
    (alarm,) = [a for s in growing for a in detector.add(s)]
    assert (alarm.kind, alarm.quantity, alarm.value) == ("creep", "allocated_bytes", MIB)
    assert "1 MiB per step" in alarm.text
    assert f"in about {2000 - alarm.step} steps" in alarm.text


# --- ranks


def ranks(*seconds: float, quantity: str = "before_backward_s", count: int = 20) -> WatchRecord:
    return WatchRecord(
        ranks=tuple(
            RankRecord(
                path=Path("run.jsonl"),
                rank=rank,
                start=None,
                steps=tuple(steps(count, **{quantity: s})),
                alarms=(),
                end=None,
            )
            for rank, s in enumerate(seconds)
        )
    )


def test_the_rank_whose_data_and_forward_pass_take_longest_is_slow() -> None:
    assert [a.rank for a in slow_ranks(ranks(0.1, 0.1, 0.15, 0.1))] == [2]
    assert [a.rank for a in slow_ranks(ranks(0.1, 0.2))] == [1]
    assert [a.rank for a in slow_ranks(ranks(0.1, 0.2, quantity="step_s"))] == [1]


def test_ranks_are_not_slow_by_little_or_in_a_few_steps() -> None:
    assert slow_ranks(ranks(0.1, 0.11)) == ()
    assert slow_ranks(ranks(0.001, 0.002)) == ()
    assert slow_ranks(ranks(0.1, 0.2, count=9)) == ()
    assert slow_ranks(ranks(0.1)) == ()


# --- thresholds and predictions


def test_thresholds_come_from_a_file_or_a_plan(tmp_path: Path) -> None:
    toml, plan = tmp_path / "limits.toml", tmp_path / "plan.yaml"
    toml.write_text('creep_bytes = "64MiB"\nheadroom_ratio = 0.1\n')
    plan.write_text("techniques: {bf16-autocast: {}}\nwatch: {warmup_steps: 3}\n")
    assert limits_of(toml) == AlarmLimits(creep_bytes=64 * MIB, headroom_ratio=0.1)
    assert limits_of(str(plan)) == limits_of({"warmup_steps": 3}) == AlarmLimits(warmup_steps=3)
    assert read_plan(plan).label == "bf16-autocast"


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"creep": 1}, "limits: unknown threshold of alarms 'creep'.*creep_bytes"),
        ({"creep_bytes": -1}, "limits: creep_bytes is -1; allowed: a whole number of at least 0, or a size"),
        ({"warmup_steps": 1.5}, "limits: warmup_steps is 1.5; allowed: a whole number"),
        ({"headroom_ratio": True}, "limits: headroom_ratio is True; allowed: a number of at least 0"),
        ("none.toml", "cannot read none.toml"),
        ("none.yaml", "cannot read none.yaml"),
        (5, "limits is a int; allowed: a mapping of names to numbers, a TOML file"),
    ],
)
def test_wrong_thresholds_are_refused(limits: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        limits_of(limits)  # type: ignore[arg-type]


def test_a_plan_without_thresholds_is_refused_as_a_file_of_them(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("techniques: {}\n")
    with pytest.raises(
        UserError,
        match="has no thresholds for alarms; allowed: a mapping of names to numbers under",
    ):
        limits_of(path)


def test_a_prediction_is_read_from_numbers_intervals_and_the_output_of_commands(tmp_path: Path) -> None:
    path = tmp_path / "prediction.json"
    path.write_text('{"workload": {}, "estimate": {"allocated_bytes": {"value": 2, "low": 1, "high": 3}}}')
    assert predicted_intervals(path) == {"allocated_bytes": Interval(value=2, low=1, high=3)}
    assert predicted_intervals({"host_bytes": 5}) == {"host_bytes": Interval(value=5, low=5, high=5)}
    assert predicted_intervals(None) == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"allocated_bytes": "much"},
        {"allocated_bytes": {"value": 2, "low": 3}},
        {"allocated_bytes": -1},
        {"host_bytes": float("inf")},
        {"host_bytes": 10**400},
        7,
        "none.json",
    ],
)
def test_a_wrong_prediction_is_refused(wrong: object) -> None:
    with pytest.raises(UserError):
        predicted_intervals(wrong)
