"""What code bases and versions do to memory, each seen on models of a few kilobytes."""

from __future__ import annotations

from collections import Counter

import pytest
from published.models import job_of
from published.predict import plan_of, predict
from published.rows import COLUMNS, Setup, setup_of, when
from tiny import words

from memfit.techniques.registry import make_use
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.plan import KnobValue, Plan, Use, use
from memfit.types.trace import Category, Phase, Trace

_TITAN = {
    "model": "Custom",
    "group": "torchtitan",
    "software": "torchtitan 2024-12",
    "layers": "4",
    "hidden": "64",
    "heads": "4",
    "ffn": "256",
    "vocab": "512",
    "seq_len": "32",
    "micro_batch": "2",
    "n_gpus": "2",
    "dp": "2",
    "zero_fsdp": "FSDP2",
    "precision": "bf16 mp (fp32 params)",
    "act_ckpt": "selective (op)",
    "gpu": "A100",
}
_MEGATRON = {
    **_TITAN,
    "group": "Megatron",
    "software": "Megatron-LM",
    "zero_fsdp": "",
    "n_gpus": "1",
    "dp": "1",
    "precision": "bf16",
    "act_ckpt": "none",
    "attn_impl": "flash",
    "grad_accum": "1",
}


def _setup(base: dict[str, str], **more: str) -> Setup:
    return setup_of({**dict.fromkeys(COLUMNS, ""), "id": "x", "scope": "train_step", **base, **more})


@pytest.mark.parametrize(
    ("software", "told"),
    [
        ("torch 2.9.0.dev20250815+cu128", (2025, 8)),
        ("torch 1963fc8 (2024-12-23)", (2024, 12)),
        ("nightlies Mar-Apr 2024", (2024, 4)),
        ("early 2025 (titan PR 778)", (2025, 2)),
        ("mid-2024", (2024, 6)),
        ("PyTorch 2.4.1", (2024, 7)),
        ("torch 2.7.0a0+git1", (2025, 1)),
        ("torch 1.13", None),
        ("", None),
    ],
)
def test_the_age_of_the_software_is_read(software: str, told: tuple[int, int] | None) -> None:
    assert when({"software": software, "group": "", "source": ""}) == told


def _kept_products(setup: Setup) -> Counter[str]:
    """Outputs of products that blocks still hold when the last forward ends, by block."""
    found = trace(job_of(setup), plan_of(setup), device="cuda")
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
    assert set(_kept_products(_setup(_TITAN)).values()) == {4}
    assert set(_kept_products(_setup(_TITAN, compile="y")).values()) == {3}


def test_what_stays_gathered_depends_on_the_version() -> None:
    def settings(software: str, group: str = "torchtitan") -> tuple[object, object]:
        plan = plan_of(_setup(_TITAN, software=software, group=group))
        found = plan.get("fsdp2")
        assert found is not None
        return found.settings["units"], found.settings["reshard"]

    assert settings("torchtitan 2024-12") == ("blocks", "not-last")
    assert settings("torchtitan 2025-09") == ("ends", "not-last")
    assert settings("torch 2.5", "own") == ("blocks", "blocks")
    assert settings("torch 2.9", "own") == ("blocks", True)


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
    def largest(software: str) -> int:
        setup = _setup(
            _TITAN, group="torchtune", software=software, act_ckpt="full", seq_len="64", vocab="8192"
        )
        found = trace(job_of(setup), plan_of(setup), device="cuda")
        return max(a.size_bytes for a in found.allocations if a.op == "aten._log_softmax.default")

    assert largest("mid-2024") == 8 * largest("late 2024")


def test_megatron_keeps_inputs_of_linear_layers_in_one_byte() -> None:
    def resident(**more: str) -> int:
        return predict(_setup({**_MEGATRON, **more})).resident_bytes

    whole = resident()
    assert resident(precision="FP8 hybrid") < whole
    assert resident(precision="FP8 hybrid", act_ckpt="selective: core_attn") < resident(
        precision="FP8 hybrid"
    )


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"micro_batch": ""}, "no micro_batch"),
        ({"seq_len": "long"}, "seq_len \\('long'\\)"),
        ({"layers": "twelve"}, "layers is no whole number"),
        ({"kv_heads": "3"}, "no multiple of kv_heads"),
        ({"layers": "", "model": "FooNet"}, "no layers"),
        ({"model": "flan-t5-xl"}, "flan-t5's kind"),
        ({"model": "Foo-8x7B"}, "the moe column"),
        ({"mem_value": "9", "mem_unit": "furlongs"}, "no size"),
        ({"micro_batch": "1.5"}, "micro_batch"),
        ({"micro_batch": "0"}, "micro_batch is 0"),
        ({"layers": "0"}, "layers is 0"),
    ],
)
def test_what_cannot_be_expressed_is_named(more: dict[str, str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        predict(_setup(_TITAN, **more))


def test_numbers_are_read_as_people_write_them() -> None:
    setup = _setup(
        _TITAN, seq_len="2k", micro_batch="2.0", mem_value="12,345", mem_unit="MiB", n_gpus="2x4", dp=""
    )
    assert (setup.length, setup.micro_batch, setup.ranks["dp"]) == (2048, 2, 8)
    assert setup.measured is not None
    assert setup.measured.size_bytes == 12345 * 2**20
    assert _setup(_TITAN, micro_batch="", global_batch="16", grad_accum="2").micro_batch == 4


@pytest.mark.parametrize(
    ("model", "layers", "hidden"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", 16, 2048),
        ("Qwen/Qwen-2.5-7B", 28, 3584),
        ("Qwen-7B", 32, 4096),
        ("facebook/opt-1.3b", 24, 2048),
        ("bert-large-uncased", 24, 1024),
        ("distilbert-base", 6, 768),
        ("ViT-L/16", 24, 1024),
        ("google/gemma2-9b-it", 42, 3584),
        ("EleutherAI/gpt-neox-20b", 44, 6144),
    ],
)
def test_common_models_are_known_by_name(model: str, layers: int, hidden: int) -> None:
    found = _setup(_TITAN, model=model, layers="", hidden="", heads="", ffn="", vocab="").arch
    assert found is not None
    assert (found.layers, found.hidden) == (layers, hidden)


def test_public_mixtures_have_their_experts() -> None:
    found = _setup(_TITAN, model="Mixtral-8x7B", layers="", hidden="", heads="", ffn="", vocab="").arch
    assert found is not None
    assert found.moe is not None
    assert (found.moe.experts, found.moe.top_k) == (8, 2)


def test_megatron_bridge_reduces_gradients_in_two_bytes() -> None:
    plain = predict(_setup(_MEGATRON)).allocated_bytes
    assert predict(_setup(_MEGATRON, group="Megatron-Bridge", software="")).allocated_bytes < plain
