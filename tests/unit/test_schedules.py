"""Pipeline schedules: played exactly, and as formulas."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.cost.schedules import KINDS, closed_s, simulate

RANKS, MICROS = st.integers(1, 8), st.integers(1, 24)
SECONDS = st.floats(0.01, 10)


@given(kind=st.sampled_from(["gpipe", "1f1b"]), ranks=RANKS, micros=MICROS, forward=SECONDS, backward=SECONDS)
def test_law_equal_stages_take_what_the_formula_says(
    kind: str, ranks: int, micros: int, forward: float, backward: float
) -> None:
    played = simulate(kind, [forward] * ranks, [backward] * ranks, micros)
    assert played.step_s == pytest.approx(closed_s(kind, forward, backward, micros, ranks))


@given(ranks=st.integers(2, 6), rounds=st.integers(1, 5), virtual=st.integers(1, 4))
def test_law_interleaved_takes_what_its_formula_says(ranks: int, rounds: int, virtual: int) -> None:
    stages, micros = ranks * virtual, ranks * rounds
    played = simulate("interleaved", [1.0] * stages, [2.0] * stages, micros, virtual=virtual)
    assert played.step_s == pytest.approx(
        closed_s("interleaved", 1.0 * virtual, 2.0 * virtual, micros, ranks, virtual=virtual)
    )


@given(ranks=st.integers(2, 8), micros=st.integers(8, 24))
def test_law_zero_bubble_takes_what_its_formula_says(ranks: int, micros: int) -> None:
    played = simulate("zero-bubble", [1.0] * ranks, [2.0] * ranks, micros, weight_s=[1.0] * ranks)
    assert played.step_s == pytest.approx(closed_s("zero-bubble", 1.0, 2.0, micros, ranks, weight_s=1.0))
    plain = simulate("1f1b", [1.0] * ranks, [2.0] * ranks, micros)
    assert played.step_s <= plain.step_s


@given(ranks=st.integers(2, 6), rounds=st.integers(1, 4), send=st.floats(0, 0.2))
def test_law_every_round_trip_of_1f1b_waits_for_its_sends(ranks: int, rounds: int, send: float) -> None:
    micros = ranks * rounds
    played = simulate("1f1b", [1.0] * ranks, [2.0] * ranks, micros, send_s=send)
    assert played.step_s == pytest.approx(closed_s("1f1b", 1.0, 2.0, micros, ranks, send_s=send))


@given(
    kind=st.sampled_from(KINDS),
    micros=MICROS,
    virtual=st.integers(1, 3),
    send=st.floats(0, 1),
    stages=st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=6),
)
def test_law_no_step_is_shorter_than_the_busiest_rank(
    kind: str, micros: int, virtual: int, send: float, stages: list[tuple[float, float]]
) -> None:
    virtual = virtual if kind == "interleaved" else 1
    forward = [f for f, _ in stages] * virtual
    backward = [b for _, b in stages] * virtual
    weight = [b / 2 for b in backward]
    played = simulate(kind, forward, backward, micros, weight_s=weight, send_s=send, virtual=virtual)
    assert played.step_s >= max(played.busy_s) * (1 - 1e-9)
    assert -1e-9 <= played.bubble_ratio < 1
    slower = simulate(kind, forward, backward, micros, weight_s=weight, send_s=send + 0.5, virtual=virtual)
    assert slower.step_s >= played.step_s * (1 - 1e-9)


def test_an_uneven_stage_holds_up_the_others() -> None:
    even = simulate("1f1b", [1.0] * 4, [2.0] * 4, 32)
    uneven = simulate("1f1b", [1.0, 1.0, 1.5, 0.5], [2.0, 2.0, 3.0, 1.0], 32)
    assert uneven.step_s > 1.3 * even.step_s


def test_more_chunks_make_smaller_bubbles() -> None:
    bubbles = [
        simulate("interleaved", [1.0 / v] * (8 * v), [2.0 / v] * (8 * v), 16, virtual=v).bubble_ratio
        for v in (1, 2, 4)
    ]
    assert bubbles == pytest.approx([7 / 23, 3.5 / 19.5, 1.75 / 17.75])


def test_formulas_take_arrays() -> None:
    micros = numpy.array([4.0, 8.0])
    assert closed_s("1f1b", 1.0, 2.0, micros, 4) == pytest.approx([21.0, 33.0])
