"""Rows of published runs are read by what they say; models have the parameters their names promise."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from published.arch import arch_of, family_of, public
from published.models import job_of
from published.predict import plan_of, predict
from published.rows import GIB, setup_of

from memfit.trace.tracer import fake_model
from memfit.types.errors import UserError

_COLUMNS = (
    "id", "group", "scope", "quality", "model", "arch_source", "params_b", "layers", "hidden", "heads",
    "kv_heads", "head_dim", "ffn", "vocab", "tied_emb", "moe", "extra_arch", "method", "lora", "gpu",
    "gpu_mem_gb", "n_gpus", "dp", "zero_fsdp", "tp", "pp", "vp", "cp", "ep", "sp", "precision", "optimizer",
    "seq_len", "micro_batch", "grad_accum", "global_batch", "act_ckpt", "compile", "attn_impl", "offload",
    "mem_value", "mem_unit", "mem_gib", "mem_metric", "mem_other", "software", "source", "notes",
)  # fmt: skip


def _row(**given: str) -> dict[str, str]:
    return {**dict.fromkeys(_COLUMNS, ""), "id": "x-1", "scope": "train_step", "quality": "A", **given}


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Llama-2-7B", 6.738), ("Llama-3-8B", 8.030), ("Mistral-7B-v0.1", 7.242), ("TinyLlama-1.1B", 1.100),
     ("Qwen2.5-7B", 7.616), ("Falcon-7B", 6.922), ("phi-2", 2.780), ("Gemma-2B", 2.506), ("gpt2-xl", 1.558)],
)  # fmt: skip
def test_named_models_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    row = _row(model=name, seq_len="1024", micro_batch="1", precision="bf16-true", method="full_ft")
    model = fake_model(job_of(setup_of(row)))
    found = sum(p.numel() for p in model.parameters()) / 1e9
    assert found == pytest.approx(billions, rel=0.005)  # heads' biases, learned positions of other lengths


def test_columns_come_before_the_public_configuration() -> None:
    arch = arch_of(_row(model="Llama-2-7B", layers="2"))
    assert arch is not None
    assert (arch.layers, arch.hidden) == (2, 4096)
    assert arch_of(_row(model="something new")) is None
    assert public("Meta-Llama-3.1-8B-Instruct") == public("llama 3.1 8b")
    assert family_of("pythia-1b")["parallel"]
    assert not family_of("Llama-3-8B")


def test_experts_are_read_from_free_text() -> None:
    arch = arch_of(_row(model="Qwen3-30B-A3B", moe="128 experts top-8, expert ffn 768"))
    assert arch is not None
    assert arch.moe is not None
    assert (arch.moe.experts, arch.moe.top_k, arch.moe.ffn) == (128, 8, 768)


@pytest.mark.parametrize(
    ("text", "sharding"),
    [("FSDP1 FULL_SHARD, BACKWARD_PRE prefetch", "fsdp1"), ("FSDP2 full shard", "fsdp2"),
     ("FSDP2 zero2", "fsdp2"), ("DeepSpeed ZeRO-2", "zero2"), ("distributed optimizer (ZeRO-1)", "zero1"),
     ("DDP", "ddp"), ("", "")],
)  # fmt: skip
def test_sharding_is_read_from_free_text(text: str, sharding: str) -> None:
    assert setup_of(_row(zero_fsdp=text, model="Llama-2-7B")).sharding == sharding


@pytest.mark.parametrize(
    ("text", "dtypes"),
    [("pure bf16 (params, grads, AdamW states)", ("bfloat16", "bfloat16")), ("fp32", ("float32", "float32")),
     ("bf16 AMP (fp32 params)", ("float32", "bfloat16")), ("fp16 AMP", ("float32", "float16"))],
)  # fmt: skip
def test_precision_is_read_from_free_text(text: str, dtypes: tuple[str, str]) -> None:
    setup = setup_of(_row(precision=text, model="Llama-2-7B"))
    assert (setup.parameters, setup.compute) == dtypes


def test_units_and_metrics() -> None:
    sure = setup_of(
        _row(model="x", mem_value="2", mem_unit="GiB", mem_gib="2", mem_metric="max_reserved")
    ).measured
    assert sure is not None
    assert (sure.sure, sure.kind, sure.size_bytes) == (True, "reserved", 2 * GIB)
    unsure = setup_of(_row(model="x", mem_value="2", mem_unit="GB(base?)", mem_metric="nvidia-smi")).measured
    assert unsure is not None
    assert (unsure.sure, unsure.kind) == (False, "device")
    assert setup_of(_row(model="x")).measured is None


def test_a_run_becomes_a_plan() -> None:
    row = _row(
        model="Llama-2-7B", method="lora", lora="r8 on query,value", seq_len="64", micro_batch="1",
        precision="bf16-true", software="litgpt 2024",
        global_batch="4", n_gpus="1", dp="1", optimizer="AdamW", act_ckpt="none",
    )  # fmt: skip
    setup = setup_of(row)
    assert setup.lora is not None
    assert (setup.lora.targets, setup.lora.rank) == ({"q", "v"}, 8)
    assert plan_of(setup).label == "gradient-accumulation(micro_batches=4)"
    assert setup_of({**row, "compile": "y", "optimizer": "fused AdamW"}).compiled


def test_pure_bf16_adamw_peaks_at_five_times_the_parameters() -> None:
    """Fact 1 of the measurements: parameters, gradients, two moments and foreach's one temporary."""
    row = _row(
        model="Llama-2-7B", layers="3", hidden="512", heads="8", kv_heads="8", head_dim="64", ffn="1536",
        vocab="8000", seq_len="8", micro_batch="1",
        precision="pure bf16", optimizer="AdamW", software="transformers 4.48",
    )  # fmt: skip
    setup = setup_of(row)
    parameters = 2 * sum(p.numel() for p in fake_model(job_of(setup)).parameters())
    found = predict(setup)
    assert found.phase == "optimizer"
    assert found.allocated_bytes == pytest.approx(5 * parameters, rel=0.02)


def test_what_a_row_leaves_out_is_named() -> None:
    with pytest.raises(UserError, match="sequence length"):
        predict(setup_of(_row(model="Llama-2-7B", micro_batch="1", precision="bf16-true")))
