"""Speeds of published rows: what a step is, whose kernels ran, and Megatron's calls."""

from __future__ import annotations

import dataclasses

import pytest
from published.layers import Calls
from published.pipelines import shape_of
from published.rows import COLUMNS, Setup, setup_of
from published.score import Scored, Speed, state_of, sweeps, times
from published.step_time import attention_of, card_of, measured_s, predicted, timed, with_kernels

from memfit.types.errors import UserError

_SPEEDS = ("tok_s_gpu", "tok_s_total", "samples_s", "step_time_s")


def row(**given: str) -> dict[str, str]:
    basic = {"id": "x-1", "scope": "train_step", "quality": "A", "gpu": "H100-80GB", "method": "pretrain"}
    return {**dict.fromkeys((*COLUMNS, *_SPEEDS), ""), **basic, **given}


def setup(**given: str) -> Setup:
    sizes = {"model": "Llama-3-8B", "seq_len": "8192", "micro_batch": "2", "grad_accum": "4", "n_gpus": "8"}
    return setup_of(row(**{**sizes, "dp": "8", "zero_fsdp": "FSDP2", "precision": "bf16 mp", **given}))


@pytest.mark.parametrize(
    ("speed", "seconds"),
    [
        ({"tok_s_gpu": "8192"}, 8.0),
        ({"tok_s_total": "65536"}, 8.0),
        ({"samples_s": "32"}, 2.0),
        ({"step_time_s": "3.5", "tok_s_gpu": "1"}, 3.5),
        ({}, None),
    ],
)
def test_every_unit_of_speed_is_a_step(speed: dict[str, str], seconds: float | None) -> None:
    assert measured_s(setup(**speed)) == seconds


def test_tokens_a_device_are_those_of_all_its_parallel_dimensions() -> None:
    assert measured_s(setup(tp="4", dp="2", tok_s_gpu="8192")) == 2.0


def test_padding_that_a_source_leaves_out_is_work_all_the_same() -> None:
    notes = "UNPADDED tokens/s/GPU (so raw hardware rate is ~2.5x higher)"
    assert measured_s(setup(tok_s_gpu="8192", notes=notes)) == pytest.approx(3.2)


def test_a_micro_batch_that_is_not_told_is_one_that_fits() -> None:
    found = timed(setup(micro_batch="", grad_accum="", global_batch="64", seq_len="4096"))
    assert (found.micro_batch, found.micro_batches) == (4, 2)
    assert timed(setup(micro_batch="", notes="yaml uses micro-batch 12")).micro_batch == 12
    cut = timed(dataclasses.replace(setup(software="torchtitan", pp="4", n_gpus="32", micro_batch="8")))
    assert (cut.micro_batch, cut.micro_batches) == (2, 4)


def test_kernels_and_cards_are_those_of_the_source() -> None:
    assert attention_of(setup(attn_impl="SDPA/cuDNN flash")) == "cudnn"
    assert attention_of(setup(attn_impl="flash-attn 2 (triton/flash)")) == "triton"
    assert attention_of(setup(attn_impl="SDPA flash")) == ""
    theirs = card_of(setup(group="torchao-float8"))
    assert theirs is not None
    assert theirs.name == "H100-96GB-HBM2e"
    export = setup(gpu="H800-80GB")
    card = card_of(export)
    assert card is not None
    assert card.link is not None
    slower = with_kernels(export, card).link
    assert slower is not None
    assert slower.bytes_s.value < card.link.bytes_s.value / 2
    with pytest.raises(UserError, match="GPU is not stated"):
        predicted(setup(gpu="not stated"))


def megatron(**given: str) -> Setup:
    return setup(software="Megatron-LM", zero_fsdp="distributed optimizer (ZeRO-1)", **given)


def test_a_layers_backward_is_two_products_for_each() -> None:
    told = megatron(tp="2", dp="4", sp="y")
    assert told.arch is not None
    calls = Calls(arch=told.arch, shape=shape_of(told, told.arch))
    forward, backward = (
        sum(c.flops for c in calls.layer(backward=b) if '"mm"' in c.signature) for b in (False, True)
    )
    assert backward == 2 * forward
    dense = 4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336
    assert forward == 2 * 8192 * 2 * dense // 2


def test_pipelines_wait_and_more_micro_batches_wait_less() -> None:
    few, many = (predicted(timed(megatron(pp="4", dp="2", grad_accum=n))).step_s for n in ("4", "32"))
    assert few / 4 > 1.3 * many / 32


def test_recomputation_takes_longer_and_float8_less() -> None:
    plain = predicted(megatron()).step_s
    assert predicted(megatron(act_ckpt="full")).step_s > 1.2 * plain
    assert predicted(megatron(precision="FP8 (TE) + bf16")).step_s < 0.9 * plain


def _scored(value: float, predicted_s: float | None, unit: str = "step_time_s") -> Scored:
    speed = Speed(unit=unit, value=value, measured_s=value, predicted_s=predicted_s)
    return Scored(id="x", source="s", quality="A", metric="", speed=speed)


def test_errors_and_orders_are_counted() -> None:
    rows = [_scored(1.0, 1.1), _scored(2.0, 1.8), _scored(3.0, 4.5), _scored(4.0, None)]
    whole = times(rows)[0]
    assert (whole.rows, whole.predicted, whole.within) == (4, 3, pytest.approx(2 / 3))
    assert whole.median == pytest.approx(0.1)
    assert (sweeps(rows)[0].rank, sweeps(rows)[0].pairs) == (1.0, 1.0)
    turned = [_scored(1.0, 3.0), _scored(2.0, 2.0), _scored(3.0, 1.0)]
    assert (sweeps(turned)[0].rank, sweeps(turned)[0].pairs) == (-1.0, 0.0)


def test_rows_that_a_source_tells_apart_are_no_sweep() -> None:
    days = {"02-21; a": "before 02-25", "02-25; b": "from 02-25", "03-01": "from 02-28", "": "before 02-25"}
    row = {"id": "r", "group": "BLOOM-prequel"}
    assert {d: state_of({**row, "notes": d}) for d in days} == days
    assert state_of({**row, "notes": "02-21; ran on a different branch"}) == "apart: r"
    assert state_of({**row, "group": "another", "notes": "02-25"}) == ""
    rows = [_scored(1.0, 1.0), _scored(2.0, 2.0), _scored(3.0, 1.5)]
    cut = [dataclasses.replace(s, state=state) for s, state in zip(rows, ("a", "a", "b"), strict=True)]
    found = sweeps(cut)
    assert [(s.name, s.rows, s.comparable) for s in found] == [("s a", 2, True), ("s, all", 3, False)]
    assert (found[0].pairs, found[1].pairs) == (1.0, pytest.approx(2 / 3))


def test_a_rate_is_predicted_in_its_own_unit() -> None:
    speed = Speed(unit="tok_s_gpu", value=1000.0, measured_s=2.0, predicted_s=4.0)
    assert speed.predicted == 500.0
    assert speed.as_row()["step_error"] == 1.0
