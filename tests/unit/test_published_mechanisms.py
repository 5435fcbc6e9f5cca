"""What code bases and versions do to memory, each seen on models of a few kilobytes."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from published.models import job_of
from published.predict import plan_of, predict
from published.rows import Setup
from published.step_time import predicted
from published_rows import MEGATRON, TITAN, setup
from tiny import words

from memfit.techniques.registry import TECHNIQUES, make_use
from memfit.trace.tracer import fake_model, trace
from memfit.types.device_kind import device_kind
from memfit.types.errors import UserError
from memfit.types.plan import KnobValue, Plan, Use, use
from memfit.types.trace import Category, Phase, Trace


def _kept_products(own: Setup) -> Counter[str]:
    """Outputs of products that blocks still hold when the last forward ends, by block."""
    found = trace(job_of(own), plan_of(own), device="cuda")
    end = next(s.end for s in found.spans if s.phase is Phase.FORWARD and s.step == 1)
    return Counter(
        a.module.split(".")[1]
        for a in found.allocations
        if a.op == "aten.mm.default"
        and a.module.startswith("blocks.")
        and a.step == 1
        and a.start < end
        and (a.end is None or a.end >= end)
        and a.phase is Phase.FORWARD
    )


def test_a_compiled_block_does_not_keep_the_product_that_backward_never_reads() -> None:
    """Of q, k, v, o, gate, up, down every second is kept; down's only makes the block's own output."""
    assert set(_kept_products(setup(**TITAN)).values()) == {4}
    assert set(_kept_products(setup(**TITAN, compile="y")).values()) == {3}


def test_what_stays_gathered_depends_on_the_version() -> None:
    def settings(date: str, code: str = "titan") -> tuple[object, object]:
        found = plan_of(setup(**{**TITAN, "software_date": date, "code": code})).get("fsdp2")
        assert found is not None
        return found.settings["units"], found.settings["reshard"]

    assert settings("2024-12") == ("blocks", "not-last")
    assert settings("2025-09") == ("ends", "not-last")
    assert settings("2024-10", "hf") == ("blocks", "blocks")
    assert settings("2025-10", "hf") == settings("", "hf") == ("blocks", True)


def _gathered(found: Trace) -> int:
    """Bytes that all-gathers made and that live when the last forward ends."""
    end = next(s.end for s in found.spans if s.phase is Phase.FORWARD and s.step == 1)
    return sum(
        a.size_bytes
        for a in found.allocations
        if a.op == "aten.empty.memory_format" and a.step == 1 and a.start < end and (a.end or end) >= end
    )


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_groups_used_last_stay_gathered() -> None:
    def kept(**settings: KnobValue) -> int:
        plan = Plan(uses=(make_use("fsdp2", settings),), ranks=2)
        return _gathered(trace(words(4), plan, device="cuda"))

    everything, nothing = kept(reshard=False), kept()
    root, last = kept(reshard="blocks"), kept(reshard="not-last")
    assert nothing < root < last < everything
    assert nothing < kept(reshard="not-last", units="ends") < root  # head, but no embedding


def test_paged_moments_are_not_in_device_memory() -> None:
    def states(name: str) -> int:
        found = trace(words(), Plan(uses=(use(name),)), device="cuda")
        return sum(a.size_bytes for a in found.allocations if a.category is Category.OPTIMIZER_STATE)

    assert states("adamw-8bit") > 0
    assert states("adamw-paged") == 2 * 256 * 4  # the tables of their values


def test_a_run_on_a_device_with_managed_memory_pages_the_moments() -> None:
    bench = SimpleNamespace(device=device_kind("cuda"), job=words(), make_optimizer=None)
    TECHNIQUES["adamw-paged"].apply(cast(Any, bench), {})
    optimizer = cast(Any, bench.make_optimizer)([torch.nn.Parameter(torch.zeros(8))])
    assert type(optimizer).__name__ == "PagedAdamW8bit"
    assert optimizer.is_paged


def test_paged_moments_are_refused_where_host_and_device_share_no_memory() -> None:
    plan = Plan(uses=(use("adamw-paged"),))
    with pytest.raises(UserError, match="bitsandbytes has none for mps devices"):
        trace(words(), plan, device="mps")
    assert trace(words(), plan, device="cpu").allocations


def test_saved_tensors_wait_in_host_memory_for_a_gpu() -> None:
    def of(*uses: Use) -> Trace:
        return trace(words(), Plan(uses=uses), device="cuda")

    def kept(found: Trace) -> int:
        return sum(a.size_bytes for a in found.allocations if a.category is Category.ACTIVATION)

    away = of(use("activation-offload", to="host", minimum_kib=1))
    assert away.offloaded_bytes > 0
    assert away.host_peak_bytes >= away.offloaded_bytes
    assert kept(away) < kept(of())


def test_torchtune_makes_logits_of_an_eighth_of_the_positions_in_float32() -> None:
    def largest(date: str, loss: str = "code") -> int:
        given = {"code": "tune", "recompute": "full", "seq_len": "64", "vocab": "8192", "software_date": date}
        own = setup(**{**TITAN, **given, "loss": loss})
        found = trace(job_of(own), plan_of(own), device="cuda")
        return max(a.size_bytes for a in found.allocations if a.op == "aten._log_softmax.default")

    assert largest("2024-06") == 8 * largest("2024-11")
    assert largest("2024-11", "dense") == largest("2024-06")
    assert largest("2024-06", "chunked") == largest("2024-11")


def test_megatron_keeps_inputs_of_linear_layers_in_one_byte() -> None:
    def resident(**more: str) -> int:
        return predict(setup(**{**MEGATRON, **more})).resident_bytes

    small = {"low_precision": "float8", "low_precision_weights": "cast", "gpu": "H100-SXM"}
    assert resident(**small) < resident()
    assert resident(**small, recompute="attention") < resident(**small)


def test_megatron_counts_gradients_in_their_own_format() -> None:
    wide, narrow = (
        predict(setup(**{**MEGATRON, "grad_dtype": g})).allocated_bytes for g in ("float32", "bfloat16")
    )
    assert narrow < wide


def test_hugging_face_attends_and_loses_as_its_version_does() -> None:
    def peak(**more: str) -> int:
        given = {
            "layers": "2",
            "seq_len": "2048",
            "vocab": "32000",
            "software_date": "2024-08",
            "kv_heads": "4",
        }
        return predict(setup(**{**given, **more})).allocated_bytes

    assert peak(attention="eager") > peak()
    assert peak(attention="sdpa", kv_heads="1") > peak(kv_heads="1")
    assert peak(attention="eager", compile="y") > 0  # compilers know the one kernel of float16 only
    newest = peak(software_date="2025-06")
    assert newest < peak(software_date="2024-12")
    assert newest == peak(software_date="")
    assert peak(loss="fused-linear") < peak(loss="fast") < peak()
    assert peak(loss="chunked") == peak(loss="fused-linear")


_BERT = {"code": "bert", "kv_heads": "4", "block": "norm=layer mlp=gelu bias=y"}


def test_masked_language_models_have_a_head_over_the_vocabulary() -> None:
    masked, classes = (
        sum(p.numel() for p in fake_model(job_of(setup(**_BERT, objective=o))).parameters())
        for o in ("masked", "classification")
    )
    assert masked > classes


def test_tf32_products_are_quicker_than_float32s() -> None:
    given = {"parameters": "float32", "seq_len": "2048", "hidden": "2048", "head_dim": "512"}
    quick, slow = (predicted(setup(**given, compute=c)).step_s for c in ("tf32", "float32"))
    assert quick < slow


def test_a_whole_alphafold_is_the_built_in_jobs_network() -> None:
    own = setup(
        code="alphafold2",
        layers="2",
        fold="residues=32 sequences=4 extra=8",
        objective="structure",
        recompute="full",
        parameters="float32",
    )
    job = job_of(own)
    assert job.make_batch(0, 0)["msa"].shape[1:3] == (4, 32)
    assert "structure" in job.islands


def test_an_offloading_optimizer_has_its_states_and_gradients_elsewhere() -> None:
    def peak(offload: str = "") -> int:
        return predict(setup(layers="2", seq_len="16", offload=offload)).allocated_bytes

    assert peak("optimizer gradients") < peak("optimizer") < peak()


@pytest.mark.parametrize("code", ["hf", "tune"])
def test_float32_adapters_under_fsdp_multiply_in_half_precision(code: str) -> None:
    given = {"code": code, "lora": "rank=8 targets=q,v adapter_dtype=float32", "seq_len": "16", "n_gpus": "8"}
    own = setup(**given, sharding="fsdp1")
    traced = trace(job_of(own), plan_of(own), device="cuda", steps=1)
    assert {o.dtype for o in traced.ops if o.op == "aten.mm.default"} == {"bfloat16"}
    assert plan_of(setup(**given, sharding="zero3")).get("bf16-autocast") is None


def test_hybrid_sharding_has_replicas() -> None:
    shared = plan_of(setup(sharding="fsdp2", replicas="4", n_gpus="32", parameters="float32")).get("fsdp2")
    assert shared is not None
    assert (shared.settings["replicas"], shared.settings["precision"]) == (4, "bf16")


def test_fsdp_shares_a_four_bit_base_and_ddp_does_not() -> None:
    def peak(lora: str = "", **more: str) -> int:
        given = {"hidden": "1024", "ffn": "4096", "seq_len": "16", "recompute": "full"}
        own = setup(**given, lora=f"rank=8 targets=q,v base=nf4 double=y {lora}", **more)
        return predict(own).allocated_bytes

    alone, shared = peak(), peak("stored=y", n_gpus="4", sharding="fsdp1")
    assert shared < 0.7 * alone
    assert peak("stored=y", n_gpus="4", sharding="ddp") == pytest.approx(alone, rel=0.05)


def test_a_pipeline_of_another_code_base_is_cut_as_megatrons() -> None:
    cut = setup(global_batch="8", pp="2", tp="2", n_gpus="4", sharding="zero1", master_weights="y")
    assert predict(cut).allocated_bytes < predict(setup(global_batch="8")).allocated_bytes
    assert predicted(cut).step_s > 0


def test_plain_layers_keep_the_sequence_that_they_gathered() -> None:
    given = {"tp": "4", "n_gpus": "8", "sharding": "zero1", "sp": "y", "seq_len": "4096", "kv_heads": "4"}
    own = predict(setup(**given, code="megatron", engine="megatron", attention="te")).allocated_bytes
    assert predict(setup(**given)).allocated_bytes > 1.1 * own


_MEGATRON = {"code": "megatron", "engine": "megatron", "attention": "te", "master_weights": "y"}


def test_one_chunk_of_an_interleaved_schedule_has_the_head() -> None:
    given = {**_MEGATRON, "vocab": "200000", "pp": "2", "n_gpus": "2", "global_batch": "32"}
    whole, parts = predict(setup(**given)), predict(setup(**given, vp="4"))
    assert parts.allocated_bytes < 1.2 * whole.allocated_bytes  # not four times the logits


def test_megatron_keeps_dropped_elements_and_shares_a_tied_embedding() -> None:
    gpt = {**_MEGATRON, "kv_heads": "4", "tied": "y"}
    block = "norm=layer mlp=gelu bias=y rotary=0 learned_positions=y"
    plain = predict(setup(**gpt, block=block)).allocated_bytes
    assert predict(setup(**gpt, block=f"{block} dropout=0.1")).allocated_bytes > plain
    assert predict(setup(**{**gpt, "tied": "n"}, block=block)).allocated_bytes > plain
