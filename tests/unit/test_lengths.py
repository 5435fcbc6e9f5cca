"""Sequence lengths, checked against hand computation, whole traces at other shapes, and simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from memfit.cost.lengths import (
    PeakModel,
    Shape,
    SizePair,
    batchings,
    chance_all_good,
    fit,
    oom_per_epoch,
    oom_per_step,
    quantile_length,
)
from memfit.cost.memory import levels
from memfit.planner.batch_shape import with_batch_shape
from memfit.runtime.local_machine import this_machine
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.plan import Plan, use
from memfit.workflows import sequence_lengths as house

LINEAR = PeakModel(instants=np.array([[100.0, 0, 0, 0, 1, 0]]))  # 100 + b l
SQUARE = PeakModel(instants=np.array([[100.0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]))  # or b l^2


class _Attention(nn.Module):
    """Attention written out, so that the scores are b x l x l."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.inner = nn.Linear(16, 48)
        self.head = nn.Linear(16, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = self.inner(self.embed(tokens)).chunk(3, -1)
        return self.head((q @ k.mT).softmax(-1) @ v)


def attention(rows: int = 4, length: int = 48) -> Job:
    return Job(
        name="attention",
        build_model=_Attention,
        make_batch=lambda step, seed: {"tokens": torch.zeros(rows, length, dtype=torch.int64)},
        loss=lambda model, batch: functional.cross_entropy(
            model(batch["tokens"]).flatten(0, 1), batch["tokens"].flatten()
        ),
        batch_size=rows,
    )


def traced_bytes(job: Job, plan: Plan = Plan(), device: str = "cpu") -> int:  # noqa: B008 (frozen)
    return int(levels(trace(job, plan, device=device))[1].max())


PLANS = [(), (use("gradient-accumulation", micro_batches=2),), (use("bf16-autocast"),)]


@pytest.mark.quick_cases("cuda-*", "cpu-plain")
@pytest.mark.parametrize("uses", PLANS, ids=lambda uses: Plan(uses=uses).label)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_peak_model_is_within_1_percent_at_shapes_it_was_not_fitted_to(uses: Any, device: str) -> None:
    plan = Plan(uses=uses)
    model = house.peak_model(attention(), plan, 256, device)
    for rows, length in ((4, 24), (8, 100), (6, 200), (12, 384)):
        truth = traced_bytes(attention(rows, length), plan, device)
        assert model.peak_bytes(Shape(rows=rows, length=length)) == pytest.approx(truth, rel=0.01)


def test_a_step_whose_operators_depend_on_length_is_refused() -> None:
    def job(length: int) -> Job:
        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            out = model(batch["tokens"])
            return (out * out).mean() if length > 20 else out.mean()

        made = attention(2, length)
        return Job(name="x", build_model=_Attention, make_batch=made.make_batch, loss=loss, batch_size=2)

    shapes = [Shape(rows=2, length=n) for n in (16, 32)]
    traces = [trace(job(s.length), Plan()) for s in shapes]
    with pytest.raises(UserError, match="depends on the length"):
        fit(shapes, traces)
    with pytest.raises(UserError, match=r"depends on the two sizes .*--dim NAME=NUMBER"):
        fit([SizePair(first=s.length, second=1) for s in shapes], traces)


def test_at_shape_resizes_only_the_batch_and_length_dimensions() -> None:
    job = with_batch_shape(tiny.words(), 3, 40)
    batch = job.make_batch(0, 0)
    assert {k: tuple(v.shape) for k, v in batch.items()} == {"tokens": (3, 40), "labels": (3, 40)}
    masks = Job(
        name="pair",
        build_model=_Attention,
        make_batch=lambda s, e: (torch.ones(2, 5, 7), torch.ones(2, 5, 5), torch.ones(2), torch.ones(5)),
        loss=lambda m, b: b[0].sum(),
        batch_size=2,
    )
    shapes = [tuple(t.shape) for t in with_batch_shape(masks, 4, 9).make_batch(0, 0)]
    assert shapes == [(4, 9, 7), (4, 9, 9), (4,), (5,)]


def test_a_batch_without_a_length_dimension_is_refused() -> None:
    job = Job(
        name="flat",
        build_model=_Attention,
        make_batch=lambda s, e: torch.ones(4),
        loss=lambda m, b: b.sum(),
        batch_size=4,
    )
    with pytest.raises(UserError, match="no length"):
        with_batch_shape(job, 2, 8)


# --- probabilities of running out of memory


def test_out_of_memory_probabilities_match_hand_computation() -> None:
    lengths = np.array([10] * 8 + [20] * 2)
    assert oom_per_step(lengths, 1, 10) == pytest.approx(0.2)
    assert oom_per_step(lengths, 2, 10) == pytest.approx(1 - 8 * 7 / (10 * 9))
    assert oom_per_epoch(lengths, 5, 10, 20) == 1.0  # two whole batches: each sequence is in one
    assert oom_per_epoch(lengths, 4, 10, 20) == pytest.approx(1 - 2 * 1 / (10 * 9))  # both in the last two
    assert oom_per_epoch(lengths, 4, 10, 10) == 1.0  # they do not fit the last batch either
    assert oom_per_epoch(lengths, 4, 20, 20) == 0.0
    assert quantile_length(lengths, 2, 0.5) == 10  # 28 of 45 pairs are short
    assert quantile_length(lengths, 2, 0.7) == 20


@given(st.lists(st.integers(1, 9), min_size=3, max_size=12), st.integers(1, 3), st.integers(1, 9))
def test_the_oom_probability_of_an_epoch_is_at_least_that_of_its_first_step(
    values: list[int], batch: int, limit: int
) -> None:
    lengths = np.array(values)
    assert oom_per_epoch(lengths, batch, limit, limit) >= oom_per_step(lengths, batch, limit) - 1e-12


def test_out_of_memory_probabilities_match_a_simulation() -> None:
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(1, 90, 45), [95, 99]])
    epochs = [rng.permutation(lengths) for _ in range(4000)]
    steps = np.mean([e[:5].max() > 90 for e in epochs])
    whole = np.mean([max(e[i : i + 5].max() for i in range(0, 45, 5)) > 90 for e in epochs])
    assert oom_per_step(lengths, 5, 90) == pytest.approx(steps, abs=0.03)
    assert oom_per_epoch(lengths, 5, 90, 100) == pytest.approx(whole, abs=0.03)


@given(st.integers(1, 6), st.integers(0, 12))
def test_all_among_is_a_probability_and_1_where_every_item_is_good(chosen: int, good: int) -> None:
    assert chance_all_good(chosen, 12, 12) == pytest.approx(1)
    assert 0 <= chance_all_good(chosen, good, 12) <= 1


# --- ways to batch


def test_steps_padding_and_peaks_of_each_batching_match_hand_computation() -> None:
    lengths = np.array([4, 1, 1, 2, 4, 4])  # 16 tokens, 8 a step of three
    found = {b.name: b for b in batchings(lengths, 3, SQUARE, fits=lambda peak: peak < 120)}
    ordered = found["sorted"]
    assert (ordered.steps, ordered.padded_tokens) == (2, 3 * 4 + 3 * 2)
    assert ordered.wasted_ratio == pytest.approx(1 - 16 / 18)
    assert ordered.attention_wasted_ratio == pytest.approx(1 - 54 / (48 + 12))
    assert ordered.peak_bytes == 112  # 100 + 3 x 4
    assert set(ordered.worst) == {0, 4, 5}
    tokens = found["max-tokens"]
    assert (tokens.steps, tokens.padded_tokens, tokens.peak_bytes) == (3, 8 + 8 + 2, 108)
    packed = found["packed"]
    assert (packed.steps, packed.padded_tokens) == (2, 16)  # rows [4] [4] [4] [2 1 1], two a step
    assert packed.attention_wasted_ratio == pytest.approx(1 - 54 / 64)
    assert found["packed-block-diagonal"].attention_wasted_ratio == 0
    assert all(b.fits for b in found.values())


def test_block_diagonal_attention_lowers_a_quadratic_peak() -> None:
    lengths = np.array([100, *[25] * 12])
    found = {b.name: b for b in batchings(lengths, 6, SQUARE, fits=lambda peak: True)}
    assert found["packed"].peak_bytes == 2 * 100**2  # 185 tokens a step are two rows of 100
    assert found["packed-block-diagonal"].peak_bytes == 100**2 + 4 * 25**2


@given(st.lists(st.integers(1, 50), min_size=2, max_size=60), st.integers(1, 8))
def test_batchings_cover_every_token_and_sorting_pads_no_more_than_random_batches(
    values: list[int], batch: int
) -> None:
    batch = min(batch, len(values))
    lengths = np.array(values[: len(values) // batch * batch])  # whole batches: a small last one may pad less
    found = {b.name: b for b in batchings(lengths, batch, LINEAR, fits=lambda peak: True)}
    assert all(b.padded_tokens >= lengths.sum() for b in found.values())
    assert found["sorted"].padded_tokens <= found["random"].padded_tokens
    assert found["sorted"].peak_bytes == found["random"].peak_bytes
    assert found["max-tokens"].peak_bytes <= found["random"].peak_bytes


# --- files


def test_lengths_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("3\n\n5\n")
    (tmp_path / "a.fasta").write_text(">x\nMKT\n>y\nMKTAY\n")
    (tmp_path / "a.csv").write_text("name,tokens\nx,3\ny,5\n")
    (tmp_path / "longer_row.csv").write_text("tokens\n3,x\n5\n")
    np.savez(tmp_path / "a.npz", scores=np.ones(2), tokens=np.array([3, 5]))
    for name in ("a.txt", "a.fasta", "a.csv", "longer_row.csv", "a.npz"):
        assert house.read_lengths(str(tmp_path / name)).tolist() == [3, 5]
    assert house.read_lengths(str(tmp_path / "a.npz"), column="tokens").tolist() == [3, 5]


@pytest.mark.parametrize(
    ("name", "text", "column", "told"),
    [
        ("a.txt", "3\nfour\n", None, "line 2: 'four' is not a length"),
        ("a.txt", "0\n", None, "a length below 1"),
        ("a.txt", f"3\n{2**63}\n", None, r"a length of 2\*\*63 or more; allowed: .* below 2\*\*63"),
        ("a.csv", f"n\n{'9' * 5000}\n", "n", "line 2: '9{40}' is not a length"),
        ("a.csv", "name\nx\n", None, "no column whose first value is a whole number"),
        ("a.csv", "n\n1\n-2\n", "n", "line 3"),
        ("a.csv", "n\n1\n\n-2\n", "n", "line 4"),
        ("a.csv", "3\n4\n", None, "first line .* has a number .* allowed: names of the columns"),
        ("a.csv", f"n\n{'9' * 200_000}\n", "n", "cannot read .*a.csv as CSV: field larger"),
        ("a.csv", "n\n1\n", "m", "no column m; .* of this file are n;"),
        ("a.csv", "name\nx,1\n", None, "first value is a whole number; .* of this file are name;"),
        ("a.csv", "n\n1,2\n", "m", "no column m; .* of this file are n;"),
        ("a.csv", f"{'[' * 3000},b\nx,y\n", None, r"of this file are \[{40}, b;"),
        ("a.csv", ",".join("ab" * 20) + "\n", "m", "of this file are (a, b, ){10}…;"),
        ("a.csv", "n\n", "n", "contains no lengths"),
        ("a.csv", "n\n²\n", None, "no column whose first value is a whole number"),
        ("a.txt", "3\n²\n", None, "line 2: '²' is not a length"),
        ("a.npz", "not one", None, "cannot read"),
        ("none.txt", None, None, "cannot read"),
    ],
)
def test_files_without_valid_lengths_are_refused(
    name: str, text: str | None, column: str | None, told: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=told):
        house.read_lengths(str(tmp_path / name), column=column)


def test_lengths_of_an_array_beyond_64_bit_integers_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.array([3, 2**63], np.uint64))
    with pytest.raises(UserError, match=r"contains a length of 2\*\*63 or more"):
        house.read_lengths(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", np.array([3, 2**63 - 1], np.uint64))
    assert house.read_lengths(str(tmp_path / "a.npz")).tolist() == [3, 2**63 - 1]


# --- report and command


def test_a_report_agrees_with_whole_traces() -> None:
    lengths = np.array([200, *range(20, 120)])
    peak = traced_bytes(attention(4, 128))
    found = house.report(
        attention(),
        lengths,
        batch=4,
        plan=Plan(),
        machine=this_machine("world"),
        cap_bytes=3 * peak + 4 * 2**20,
    )
    assert all(abs(h.error_ratio) < 0.01 for h in found.held_out)
    assert found.curve_bytes[200] == pytest.approx(traced_bytes(attention(4, 200)), rel=0.01)
    assert found.first[0] == 0  # the one of 200
    assert found.quantile_bytes["max"] == found.curve_bytes[200]
    assert list(found.quantile_bytes.values()) == sorted(found.quantile_bytes.values())


def test_the_estimate_of_lengths_prints_text_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from memfit.cli import main

    (tmp_path / "n.txt").write_text("\n".join(map(str, range(20, 60))))
    words = ["--lengths", str(tmp_path / "n.txt"), "--batch", "4", "--max-length", "50"]
    arguments = ["estimate", "char-lm", *words]
    assert main([*arguments, "--memory", "100MiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["longest"] == 50
    assert found["fits_up_to"] == 50
    assert found["oom_per_epoch"] == 0
    assert main([*arguments, "--memory", "1MiB"]) == 0
    text = capsys.readouterr().out
    assert "at no length of the data" in text
    assert "saves most" in text


def test_lengths_of_a_job_without_lengths_are_refused_without_naming_another_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from memfit.cli import main

    (tmp_path / "n.txt").write_text("20\n")
    assert main(["estimate", "potential", "--lengths", str(tmp_path / "n.txt")]) == 2
    assert "the job potential, whose samples have no length; allowed: " in capsys.readouterr().err
