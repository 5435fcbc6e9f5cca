"""Constants that were set after rows had been seen are chosen again without each source, and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import pytest
from published import held_out, layers, pipelines, step_time
from published.held_out import BEFORE, CHOICES, USED, Setting, applied, chosen
from published_rows import setup

from memfit.catalog.load import device
from memfit.cost import kernel_model, op_time, stream_simulator
from memfit.types.trace import Phase

STRIDED = next(i for i, c in enumerate(CHOICES) if "strided" in c.name)
CARDS = ("H100-SXM", "H100-96GB-HBM2e", "B200", "A100-80GB-SXM")


def constants() -> dict[str, float]:
    issue = {f"issue {phase}": seconds for phase, seconds in op_time.ASSUMED_ISSUE_S.items()}
    steps = {f"aligned {step}": share for step, share in kernel_model._ALIGNED}
    return {
        **issue,
        **steps,
        "strided": kernel_model.STRIDED,
        "broadcast": kernel_model.BROADCAST,
        "narrow": kernel_model.NARROW,
        "row": kernel_model._ROW_START,
        "host": stream_simulator.ASSUMED_HOST_BYTES_S,
        "host of pipelines": pipelines.ASSUMED_HOST_BYTES_S,
        "float8": layers.FULL_SUM,
        "float8 of traces": step_time.FULL_SUM,
        "triton": step_time.TRITON_RATIO,
        "chain": step_time._KEPT_BESIDE,
        "low end": step_time.LOW_END,
    }


def ratios(card: str) -> dict[str, float]:
    found = step_time.with_kernels(setup(gpu=card), device(card))
    return {key: fact.value for key, fact in found.efficiency_ratio.items()}


def mechanisms() -> list[float]:
    own = setup(code="megatron", engine="megatron-deepspeed", launch_blocking="y")
    return [f(own) for f in (pipelines._sends_wait, pipelines._fork_bytes, pipelines._blocking)]


def test_the_levels_that_are_used_are_the_ones_in_code_and_catalog() -> None:
    today, cards, waits = constants(), {card: ratios(card) for card in CARDS}, mechanisms()
    with applied(USED):
        assert constants() == pytest.approx(today)
        assert mechanisms() == waits
        for card in CARDS:
            assert ratios(card) == pytest.approx(cards[card])


def test_before_any_row_was_seen_cards_ran_at_short_runs_shares_and_no_mechanism_was_there() -> None:
    today, cards = constants(), {card: ratios(card) for card in CARDS}
    with applied(BEFORE):
        assert ratios("H100-SXM")["matmul"] == pytest.approx(0.75)
        assert ratios("B200")["matmul"] == pytest.approx(0.72)
        assert ratios("H100-96GB-HBM2e")["matmul"] == pytest.approx(0.75, rel=0.02)
        assert ratios("A100-80GB-SXM") == cards["A100-80GB-SXM"]
        assert constants()["strided"] == constants()["aligned 1"] == 1
        assert op_time.ASSUMED_ISSUE_S[Phase.BACKWARD] == pytest.approx(7e-6)
        assert mechanisms() == [0, 0, 0]
    assert constants() == today
    assert {card: ratios(card) for card in CARDS} == cards


def test_constants_are_put_back_when_a_row_cannot_be_predicted() -> None:
    today = constants()
    with pytest.raises(ZeroDivisionError), applied(BEFORE):
        raise ZeroDivisionError
    assert constants() == today


FAMILIES = {"one": ["a", "b"], "two": ["c"], "three": ["d"]}
WANTED = {"a": 3, "b": 3, "c": 1, "d": 1}  # the level of strided kernels that fits each row


def errors(settings: Sequence[Setting]) -> list[Mapping[str, float]]:
    return [{row: abs(s[STRIDED] - level) for row, level in WANTED.items()} for s in settings]


def test_a_source_has_no_say_in_the_levels_that_predict_it() -> None:
    assert chosen(FAMILIES, "one", errors)[STRIDED] == 1  # what the two others want
    assert chosen({"one": ["a", "b"], "two": ["c"]}, "two", errors)[STRIDED] == 3


def test_what_no_other_source_feels_stays_as_it_stood_before() -> None:
    found = chosen(FAMILIES, "one", errors)
    assert [level for i, level in enumerate(found) if i != STRIDED] == [0] * (len(CHOICES) - 1)


def test_a_row_is_predicted_again_only_where_it_feels_a_choice() -> None:
    asked: list[tuple[str, Setting]] = []

    class Pool:
        def submit(self, _: object, row: Mapping[str, str], settings: Sequence[Setting]) -> SimpleNamespace:
            asked.extend((row["id"], s) for s in settings)
            step = [1.0 + (s[STRIDED] if row["id"] == "strided" else 0) for s in settings]
            return SimpleNamespace(result=lambda: step)

        def shutdown(self, **_: object) -> None: ...

    predictor = held_out.Predictor([{"id": "strided"}, {"id": "plain"}], pools=[Pool()])  # type: ignore[list-item]
    assert predictor.felt == {"strided": (STRIDED,), "plain": ()}
    asked.clear()
    every = [(*USED[:STRIDED], i, *USED[STRIDED + 1 :]) for i in range(4)]
    assert [found["strided"] for found in predictor.seconds(every)] == [1.0, 2.0, 3.0, 4.0]
    assert {row for row, _ in asked} <= {"strided"}
    asked.clear()
    predictor.seconds(every)
    assert not asked
