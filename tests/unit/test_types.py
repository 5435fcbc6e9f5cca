"""Sizes and times as people write them, dataclasses as JSON, and the child's command line."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.engines import native
from memfit.types import serialization
from memfit.types.downsample import thin_phases
from memfit.types.errors import NothingFits, UserError, suggest
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.machine import Fact
from memfit.types.parsing import parse_bytes
from memfit.types.plan import Plan, use
from memfit.types.result import Interval, Measurement, OutcomeKind
from memfit.types.units import GIB, MIB, format_bytes, format_seconds

# --- units


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("80 GB", 80 * 10**9),
        ("512m", 512 * 2**20),
        ("1.5k", 1536),
        ("25769803776", 24 * 2**30),
        ("7 B", 7),
        (" 2 tib ", 2**41),
        ("0.5TB", 5 * 10**11),
    ],
)
def test_sizes_are_parsed_in_common_notations(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "0", "0.5B", "1 GiX", "1e9", "1,5 GiB", "GiB"])
def test_an_invalid_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="for example 24GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["24", "80.5", "1048575"])
def test_a_size_of_a_few_bytes_is_refused_with_a_suggestion(text: str) -> None:
    with pytest.raises(UserError, match=f"did you mean {text}GiB"):
        parse_bytes(text)


@given(st.integers(1, 2**50))
def test_law_a_formatted_size_parses_back_within_a_thousandth(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=1e-3)


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_law_a_negative_size_is_formatted_as_the_positive_one_with_a_minus(one: int, other: int) -> None:
    assert format_bytes(-one - 1) == "-" + format_bytes(one + 1)
    assert format_bytes(one + other) == format_bytes(float(one + other))


def test_sizes_and_times_have_the_unit_that_fits() -> None:
    sizes = [format_bytes(n) for n in (0, 1023, 1024, 1.5 * MIB, 24 * GIB, 2**41)]
    assert sizes == ["0 B", "1023 B", "1 KiB", "1.5 MiB", "24 GiB", "2 TiB"]
    times = [format_seconds(s) for s in (0.0123, 0.9, 4.56, 119, 120, 7200, 11520, 5.1 * 86400, -3.2)]
    assert times == ["12.3 ms", "900 ms", "4.56 s", "119 s", "2 min", "2 h", "3.2 h", "5.1 d", "-3.2 s"]


def test_a_suggestion_is_the_most_similar_name_or_empty() -> None:
    names = ("protein-ss", "protein-lm", "char-lm")
    assert suggest("protien-ss", names) == "did you mean 'protein-ss'?"
    assert suggest("weather", names) == ""


# --- series


@given(
    stretches=st.lists(st.lists(st.integers(0, 10**12), max_size=50), min_size=1, max_size=6),
    points=st.integers(1, 60),
)
def test_law_thinning_gives_each_phase_equal_points_and_keeps_its_peak(
    stretches: list[list[int]], points: int
) -> None:
    each = max(2, points // len(stretches))
    thinned, full = thin_phases(stretches, points), [s for s in stretches if s]
    assert len(thinned) == each * len(full)
    for index, stretch in enumerate(full):
        assert max(thinned[index * each : (index + 1) * each]) == max(stretch)


# --- serialization

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


@given(losses=st.lists(NUMBERS, max_size=5), reason=st.text(max_size=20), peak=st.none() | st.integers(0))
def test_law_a_measurement_survives_serialization(losses: list[float], reason: str, peak: int | None) -> None:
    sent = Measurement(outcome=OutcomeKind.OK, losses=tuple(losses), reason=reason, peak_bytes=peak)
    text = serialization.dumps(sent)
    got = serialization.loads(Measurement, text)
    assert [repr(x) for x in got.losses] == [repr(x) for x in losses]  # nan is not equal to itself
    assert dataclasses.replace(got, losses=()) == dataclasses.replace(sent, losses=())
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_nested_records_enums_and_special_floats_survive_serialization() -> None:
    plan = Plan(
        uses=(use("gradient-accumulation", micro_batches=4), use("bf16-parameters", rounding="master"))
    )
    spec = RunSpec(name="x", role="run", job=JobRef(spec="a.py:job", steps=3), plan=plan, seed=1, steps=2)
    assert serialization.loads(RunSpec, serialization.dumps(spec)) == spec
    assert serialization.loads(Interval, '{"value": "inf", "low": 0, "high": "inf"}').value == math.inf
    assert json.loads(serialization.dumps({"nested": [math.nan, -math.inf, 1]})) == {
        "nested": ["nan", "-inf", 1]
    }


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"outcome": "ok", "losses": [1, "x"]}', "losses.1"),
        ('{"outcome": "fine"}', "outcome"),
        ("{}", "outcome"),
        ("not json", "the whole text"),
    ],
)
def test_an_invalid_record_is_refused_with_its_field(text: str, place: str) -> None:
    with pytest.raises(UserError, match=f"record 7 is invalid at {place}"):
        serialization.loads(Measurement, text, what="record 7")


def test_the_nothing_fits_error_names_the_smallest_plan_and_its_need() -> None:
    error = NothingFits(cap_bytes=MIB, least_bytes=3 * GIB, plan_text="bf16-autocast")
    assert str(error) == (
        "no allowed plan fits 1 MiB (1048576 B); the smallest plan needs 3 GiB (3221225472 B): bf16-autocast"
    )
    assert error.exit_code == 3


# --- the child's command line

SPEC = RunSpec(
    name="x",
    role="run",
    job=JobRef(spec="protein-ss"),
    plan=Plan(uses=(use("bf16-autocast"),)),
    seed=3,
    steps=2,
    threads=2,
    cap_bytes=MIB,
)


def test_the_child_reads_the_specification_it_was_given() -> None:
    config = native.render(SPEC)
    assert serialization.loads(RunSpec, config.files["run.json"]) == SPEC == config.spec
    assert config.argv == (sys.executable, "-m", "memfit.worker", "run", "{dir}/run.json")
    assert (config.env["PYTHONSAFEPATH"], config.env["OMP_NUM_THREADS"]) == ("1", "2")
    assert "OMP_NUM_THREADS" not in native.render(dataclasses.replace(SPEC, threads=0)).env


def test_a_process_that_measures_operators_has_the_threads_and_device_of_its_specification() -> None:
    config = native.render_calibration(SPEC)
    assert json.loads(config.files["settings.json"]) == {"threads": 2, "device": "cpu"}
    assert config.argv[3:] == ("calibrate", "{dir}/settings.json")


def test_a_fact_without_a_range_is_bounded_by_its_value() -> None:
    assert Fact(value=2.0, source="s", date="2026", high=3.0).bounds == (2.0, 3.0)
    assert Fact(value=2.0, source="s", date="2026", low=0.0).bounds == (0.0, 2.0)


def test_intervals_are_added_end_to_end() -> None:
    both = Interval(value=2, low=1, high=4).scaled(2) + Interval.exactly(1)
    assert both == Interval(value=5, low=3, high=9)
