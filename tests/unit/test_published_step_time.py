"""Speeds of published rows: what a step is, whose kernels ran, and Megatron's calls."""

from __future__ import annotations

import dataclasses

import pytest
from published.layers import Calls
from published.pipelines import shape_of
from published.predict import card_of
from published.rows import Setup
from published.score import Scored, Speed, order, sweeps, times
from published.step_time import attention_of, measured_s, network_of, predicted, timed, with_kernels
from published_rows import setup as plain_setup

from memfit.types.errors import UserError


def setup(**given: str) -> Setup:
    sizes = {
        "layers": "32",
        "hidden": "4096",
        "heads": "32",
        "kv_heads": "8",
        "ffn": "14336",
        "vocab": "128256",
        "seq_len": "8192",
        "grad_accum": "4",
        "n_gpus": "8",
        "dp": "8",
        "sharding": "fsdp2",
        "parameters": "float32",
        "gpu": "H100-SXM",
        "software_date": "",
    }
    return plain_setup(**{**sizes, **given})


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
    assert measured_s(setup(tok_s_gpu="8192", padding_ratio="2.5")) == pytest.approx(3.2)


def test_a_micro_batch_that_is_not_told_is_one_that_fits() -> None:
    found = timed(setup(micro_batch="", grad_accum="", global_batch="64", seq_len="4096"))
    assert (found.micro_batch, found.micro_batches) == (4, 2)
    cut = timed(setup(code="titan", pp="4", n_gpus="32", micro_batch="8"))
    assert (cut.micro_batch, cut.micro_batches) == (2, 4)


def test_kernels_and_cards_are_those_of_the_source() -> None:
    assert [attention_of(setup(attention=a)) for a in ("cudnn", "te", "triton", "sdpa", "flash")] == [
        "cudnn",
        "cudnn",
        "triton",
        "",
        "",
    ]
    plain, limited = (setup(gpu="B200", power_limited=p) for p in "ny")
    card = card_of(plain)
    assert card is not None
    rates = [with_kernels(s, card).efficiency_ratio["matmul"].value for s in (plain, limited)]
    assert rates[1] < rates[0]
    shared = network_of(setup(interconnect="6.25"))
    assert shared is not None
    assert shared.bytes_s.value == 6.25e9
    assert network_of(setup()) is None
    for gpu, why in (("", "GPU is not stated"), ("Z100", "the catalog has no Z100")):
        with pytest.raises(UserError, match=why):
            predicted(setup(gpu=gpu))


def megatron(**given: str) -> Setup:
    own = {
        "code": "megatron",
        "engine": "megatron",
        "attention": "te",
        "sharding": "zero1",
        "grad_dtype": "float32",
    }
    return setup(**{**own, "overlap": "data", **given})


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
    assert predicted(megatron(recompute="full")).step_s > 1.2 * plain
    assert predicted(megatron(low_precision="float8", low_precision_weights="cast")).step_s < 0.9 * plain


def _scored(value: float, predicted_s: float | None, unit: str = "step_time_s") -> Scored:
    speed = Speed(unit=unit, value=value, measured_s=value, predicted_s=predicted_s)
    return Scored(id="x", source="s", quality="A", speed=speed)


def test_errors_and_orders_are_counted() -> None:
    rows = [_scored(1.0, 1.1), _scored(2.0, 1.8), _scored(3.0, 4.5), _scored(4.0, None)]
    whole = times(rows)[0]
    assert (whole.all.rows, whole.predicted.rows) == (4, 3)
    assert (whole.predicted.within_rows, whole.all.within_rows) == (
        pytest.approx(2 / 3),
        pytest.approx(2 / 4),
    )
    assert (whole.predicted.median, whole.all.median) == (pytest.approx(0.1), pytest.approx(0.3))
    assert order(sweeps(rows)).pairs == 1.0
    assert order(sweeps(rows)).pairs_with_misses == pytest.approx(3 / 6)
    assert (sweeps(rows)[0].rank, sweeps(rows)[0].pairs) == (1.0, 1.0)
    turned = [_scored(1.0, 3.0), _scored(2.0, 2.0), _scored(3.0, 1.0)]
    assert (sweeps(turned)[0].rank, sweeps(turned)[0].pairs) == (-1.0, 0.0)


def test_rows_that_a_source_tells_apart_are_no_sweep() -> None:
    rows = [_scored(1.0, 1.0), _scored(2.0, 2.0), _scored(3.0, 1.5)]
    cut = [dataclasses.replace(s, state=state) for s, state in zip(rows, ("a", "a", "b"), strict=True)]
    found = sweeps(cut)
    assert [(s.name, s.rows, s.comparable) for s in found] == [("s a", 2, True), ("s, all", 3, False)]
    assert (found[0].pairs, found[1].pairs) == (1.0, pytest.approx(2 / 3))


def test_a_rate_is_predicted_in_its_own_unit() -> None:
    speed = Speed(unit="tok_s_gpu", value=1000.0, measured_s=2.0, predicted_s=4.0)
    assert speed.predicted == 500.0
    assert speed.as_row()["step_error"] == 1.0
