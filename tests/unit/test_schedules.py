"""Pipeline schedules: exact simulation compared with closed forms."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.cost.schedules import KINDS, simulate

RANKS, MICROS = st.integers(1, 8), st.integers(1, 24)
SECONDS = st.floats(0.01, 10)


def closed_s(
    kind: str,
    forward_s: Any,
    backward_s: Any,
    micro_batches: Any,
    ranks: Any,
    *,
    weight_s: Any = 0.0,
    send_s: Any = 0.0,
    virtual: Any = 1,
) -> Any:
    """Return the seconds of a pipeline step, without the optimizer, by the formulas for equal stages (Huang
    et al. 2019, GPipe; Narayanan et al. 2021, 1F1B and interleaved; Qi et al. 2023, ZB-H1). All arguments but
    ``kind`` may be numbers or numpy arrays. ``kind``: the schedule, "gpipe", "1f1b",
    "interleaved" or "zero-bubble"; any other fails an assertion.

    ``forward_s`` and ``backward_s``: seconds of one micro-batch through all stages of one rank. ``weight_s``:
    the part of ``backward_s`` that no other work waits for; used for "zero-bubble" only. ``virtual``: number
    of stages per rank; used for "interleaved" only. ``send_s``: seconds to send from one stage to the next.

    The formula is exact for "gpipe", and for "1f1b" if the number of micro-batches is a multiple of
    ``ranks``. For the other two it counts the sends of the first and the last micro-batch only.
    """
    micro_batch_s, other_ranks = forward_s + backward_s, ranks - 1
    if kind == "gpipe":
        return (micro_batches + other_ranks) * micro_batch_s + 2 * other_ranks * send_s
    if kind == "1f1b":
        round_trips = other_ranks * micro_batches / ranks + (ranks - 2) * (ranks > 1)
        return (micro_batches + other_ranks) * micro_batch_s + 2 * round_trips * send_s
    if kind == "interleaved":
        return (micro_batches + other_ranks / virtual) * micro_batch_s + 2 * other_ranks * send_s
    assert kind == "zero-bubble", kind
    return (
        micro_batches * micro_batch_s
        + other_ranks * (micro_batch_s - 2 * weight_s)
        + 2 * other_ranks * send_s
    )


@given(kind=st.sampled_from(["gpipe", "1f1b"]), ranks=RANKS, micros=MICROS, forward=SECONDS, backward=SECONDS)
def test_law_simulated_gpipe_and_1f1b_match_the_closed_form(
    kind: str, ranks: int, micros: int, forward: float, backward: float
) -> None:
    played = simulate(kind, [forward] * ranks, [backward] * ranks, micros)
    assert played.step_s == pytest.approx(closed_s(kind, forward, backward, micros, ranks))


@given(ranks=st.integers(2, 6), rounds=st.integers(1, 5), virtual=st.integers(1, 4))
def test_law_simulated_interleaved_matches_the_closed_form(ranks: int, rounds: int, virtual: int) -> None:
    stages, micros = ranks * virtual, ranks * rounds
    played = simulate("interleaved", [1.0] * stages, [2.0] * stages, micros, virtual=virtual)
    assert played.step_s == pytest.approx(
        closed_s("interleaved", 1.0 * virtual, 2.0 * virtual, micros, ranks, virtual=virtual)
    )


@given(ranks=st.integers(2, 8), micros=st.integers(8, 24))
def test_law_simulated_zero_bubble_matches_the_closed_form_and_is_not_slower_than_1f1b(
    ranks: int, micros: int
) -> None:
    played = simulate("zero-bubble", [1.0] * ranks, [2.0] * ranks, micros, weight_s=[1.0] * ranks)
    assert played.step_s == pytest.approx(closed_s("zero-bubble", 1.0, 2.0, micros, ranks, weight_s=1.0))
    plain = simulate("1f1b", [1.0] * ranks, [2.0] * ranks, micros)
    assert played.step_s <= plain.step_s


@given(ranks=st.integers(2, 6), rounds=st.integers(1, 4), send=st.floats(0, 0.2))
def test_law_simulated_1f1b_with_send_times_matches_the_closed_form(
    ranks: int, rounds: int, send: float
) -> None:
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


def test_an_uneven_stage_slows_down_the_whole_pipeline() -> None:
    even = simulate("1f1b", [1.0] * 4, [2.0] * 4, 32)
    uneven = simulate("1f1b", [1.0, 1.0, 1.5, 0.5], [2.0, 2.0, 3.0, 1.0], 32)
    assert uneven.step_s > 1.3 * even.step_s


def test_more_chunks_make_smaller_bubbles() -> None:
    bubbles = [
        simulate("interleaved", [1.0 / v] * (8 * v), [2.0 / v] * (8 * v), 16, virtual=v).bubble_ratio
        for v in (1, 2, 4)
    ]
    assert bubbles == pytest.approx([7 / 23, 3.5 / 19.5, 1.75 / 17.75])


def test_closed_forms_accept_arrays() -> None:
    micros = numpy.array([4.0, 8.0])
    assert closed_s("1f1b", 1.0, 2.0, micros, 4) == pytest.approx([21.0, 33.0])
