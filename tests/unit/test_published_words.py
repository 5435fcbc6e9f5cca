"""Other sources' wordings: cards, sharding, precision, recomputation and offload as people write them."""

from __future__ import annotations

import pytest
from published import words
from published.cards import card
from published.models import job_of
from published.names import public
from published.predict import plan_of, predict
from published.quantities import amount, unit, whole
from published.rows import COLUMNS, Setup, setup_of
from published.step_time import predicted

from memfit.trace.tracer import fake_model, trace


def _setup(**given: str) -> Setup:
    sizes = {
        "layers": "8",
        "hidden": "256",
        "heads": "4",
        "kv_heads": "2",
        "ffn": "512",
        "vocab": "1024",
        "seq_len": "256",
        "micro_batch": "2",
        "precision": "bf16",
        "n_gpus": "1",
        "model": "Llama",
        "gpu": "A100",
        "gpu_mem_gb": "80",
    }
    basic = {"id": "x-1", "scope": "train_step", "quality": "A", "method": "pretrain"}
    return setup_of({**dict.fromkeys(COLUMNS, ""), **basic, **sizes, **given})


@pytest.mark.parametrize(
    ("name", "memory_gb", "known"),
    [
        ("DGX A100", 80, "A100-80GB-SXM"),
        ("A100(40G)", 0, "A100-40GB-SXM"),
        ("A100", 40, "A100-40GB-SXM"),
        ("H100 x 1", 80, "H100-SXM"),
        ("8xH100 80GB HBM3", 0, "H100-SXM"),
        ("NVIDIA A100-PCIE-40GB", 0, "A100-40GB-PCIe"),
        ("RTX Pro 6000", 96, "RTX-PRO-6000"),
        ("V100 32G (DGX-1)", 32, "V100-32GB-SXM2"),
        ("4x3090", 24, "RTX-3090"),
        ("NVIDIA L40S", 48, "L40S"),
        ("L4", 24, "L4"),
        ("A800", 80, "A100-80GB-SXM"),
        ("RTX 3090 Ti", 24, ""),
        ("Titan RTX", 24, ""),
        ("not stated", 0, ""),
        ("", 80, ""),
    ],
)
def test_a_card_is_known_by_what_it_is_called(name: str, memory_gb: float, known: str) -> None:
    found = card(name, memory_gb)
    assert (found.name if found else "") == known


@pytest.mark.parametrize(
    ("text", "sharding"),
    [
        ("zero_stage: 1", "zero1"),
        ("ZeRO stage 3", "zero3"),
        ("zero_stage=2", "zero2"),
        ("zero2(dp8)", "zero2"),
        ("stage 2", "zero2"),
        ("DeepSpeed stage 3", "zero3"),
        ("--use-distributed-optimizer", "zero1"),
        ("HSDP", "fsdp2"),
        ("FULL_SHARD", "fsdp1"),
        ("--ddp-backend fully_sharded", "fsdp1"),
        ("fully_shard (FSDP2)", "fsdp2"),
        ("FSDP NO_SHARD", "ddp"),
        ("SHARD_GRAD_OP", "fsdp1"),
        ("DistributedDataParallel", "ddp"),
        ("ZeRO-0", "ddp"),
        ("", "ddp"),
    ],
)
def test_sharding_is_read_from_flags_and_names(text: str, sharding: str) -> None:
    assert words.sharding(text, 8, (2025, 1)) == sharding
    assert words.sharding("FSDP", 8, (2023, 6)) == "fsdp1"
    assert words.reshards(text) is (text not in ("zero2(dp8)", "SHARD_GRAD_OP", "zero_stage=2"))


@pytest.mark.parametrize(
    ("text", "recompute"),
    [
        ("gradient checkpointing (use_reentrant=False)", "full"),
        ("gradient_checkpointing true", "full"),
        ("--checkpoint-activations", "full"),
        ("w/ Gradient checkpointing", "full"),
        ("yes", "full"),
        ("gradient_checkpointing ✘", ""),
        ("use_gc false", ""),
        ("No AC", ""),
        ("n", ""),
        ("", ""),
        ("off", ""),
        ("selective (every 2nd layer)", "every-2"),
        ("50% of layers", "every-2"),
        ("SAC 1/3", "every-3"),
        ("selective (op)", "operators"),
        ("--recompute-granularity selective", "attention"),
        ("--recompute-granularity full --recompute-num-layers 1", "full"),
        ("full (flags not captured)", "full"),
        ("checkpointing not stated", ""),
    ],
)
def test_recomputation_is_read_from_flags_and_words(text: str, recompute: str) -> None:
    assert words.recompute(text) == recompute


@pytest.mark.parametrize(
    ("text", "code", "dtypes"),
    [
        ("dtype bfloat16, use_amp false", "hf", ("bfloat16", "bfloat16")),
        ("bfloat16 autocast", "hf", ("float32", "bfloat16")),
        ("16-mixed", "hf", ("float32", "float16")),
        ("bf16-mixed", "hf", ("float32", "bfloat16")),
        ("torch.bfloat16", "hf", ("bfloat16", "bfloat16")),
        ("TF32", "hf", ("float32", "float32")),
        ("mixed precision (AMP FP16)", "hf", ("float32", "float16")),
        ("float16", "hf", ("float16", "float16")),
        ("BF16 (torch_dtype bfloat16, mixed_precision bf16)", "hf", ("bfloat16", "bfloat16")),
    ],
)
def test_bfloat16_is_no_float16_and_a_switch_that_is_off_is_off(
    text: str, code: str, dtypes: tuple[str, str]
) -> None:
    assert words.dtypes(text, code, "") == dtypes


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4,096", 4096),
        ("4k", 4096),
        ("max 2048", 2048),
        ("TP=4", 4),
        ("2 per GPU", 2),
        ("up to 8192", 8192),
        ("1024 sequences (4.19M tokens)", 1024),
        ("1.5", 0),
        ("variable length", 0),
        ("N_seq 128", 0),
    ],
)
def test_whole_numbers_are_read_after_words_at_most(text: str, number: int) -> None:
    assert whole(text) == number


def test_sizes_degrees_and_batches_are_read_where_they_are_written() -> None:
    measured = _setup(mem_value="~45.2 GiB", mem_metric="GPU memory (rocm-smi)", gpu_mem_gb="80 GB").measured
    assert measured is not None
    assert (measured.size_bytes, measured.sure, measured.kind) == (45.2 * 2**30, True, "device")
    assert unit("GiB per GPU", "") == (2**30, True)
    assert unit("", "45") is None
    assert amount("5,762") == 5762
    assert amount("3.2k") == 3200
    cut = _setup(zero_fsdp="zero1(dp2)+tp2+pp4", n_gpus="2x8", global_batch="4M tokens", seq_len="4k")
    assert (cut.ranks["dp"], cut.ranks["tp"], cut.ranks["pp"]) == (2, 2, 4)
    assert cut.micro_batches == round(4e6 / 4096) // 4


@pytest.mark.parametrize(
    ("model", "layers", "hidden"),
    [
        ("GPT-2 (124M)", 12, 768),
        ("GPT3 175B", 96, 12288),
        ("gpt2-xl", 48, 1600),
        ("7B Llama 2", 32, 4096),
        ("deit_base_patch16_224", 12, 768),
        ("ESM-2 650M", 33, 1280),
        ("Code Llama 34B", 48, 8192),
        ("Llama-2-like 13B", 40, 5120),
        ("baichuan2-7b-chat", 32, 4096),
    ],
)
def test_models_are_known_by_the_names_people_use(model: str, layers: int, hidden: int) -> None:
    found = public(model)
    assert found is not None
    assert found[:2] == (layers, hidden)
    assert public("GPT-2 13B") is None  # another size than the family's first
    assert public("phi-2.5") is None


def test_hugging_face_attends_and_loses_as_its_version_does() -> None:
    def peak(**more: str) -> int:
        given = {"layers": "2", "seq_len": "2048", "vocab": "32000", "software": "transformers 4.44"}
        return predict(_setup(**{**given, "kv_heads": "4", **more})).allocated_bytes

    flash = peak(attn_impl="flash-attn 2")
    assert peak(attn_impl="eager") > flash
    assert peak(attn_impl="", software="mid-2023") > flash
    assert peak(attn_impl="sdpa", kv_heads="1") > peak(attn_impl="flash-attn 2", kv_heads="1")
    assert peak(attn_impl="eager", compile="true") > 0  # compilers know the one kernel of float16 only
    newest = peak(attn_impl="flash-attn 2", software="transformers==4.49.0")
    assert newest < peak(attn_impl="flash-attn 2", software="transformers 4.46")
    assert newest == peak(attn_impl="flash-attn 2", software="June 2025")


def test_masked_language_models_have_a_head_over_the_vocabulary() -> None:
    def count(**more: str) -> int:
        found = fake_model(job_of(_setup(model="BERT-large", kv_heads="", **more)))
        return sum(p.numel() for p in found.parameters())

    assert count(method="MLM pre-training") > count(method="sequence classification")


def test_tf32_products_are_quicker_than_float32s() -> None:
    steps = [predicted(_setup(precision=p, seq_len="2048", hidden="2048")).step_s for p in ("TF32", "fp32")]
    assert steps[0] < steps[1]


def test_engines_layers_in_a_trainer_of_torchs_are_no_megatron() -> None:
    assert _setup(group="te-llama", software="transformers, accelerate").code == "hf"
    assert _setup(group="te-llama", software="Transformer Engine").code == "megatron"


def test_a_whole_alphafold_is_the_built_in_jobs_network() -> None:
    given = {
        "layers": "2",
        "method": "initial_training",
        "act_ckpt": "blocks_per_ckpt 1",
        "precision": "bf16",
    }
    setup = _setup(model="AlphaFold 2 (OpenFold)", extra_arch="crop 32 residues, 4 MSA, 8 extra MSA", **given)
    job = job_of(setup)
    assert (setup.code, setup.parameters, setup.compute) == ("fold", "float32", "bfloat16")
    assert job.make_batch(0, 0)["msa"].shape[1:3] == (4, 32)
    assert "structure" in job.islands
    assert _setup(model="AlphaFold2 Evoformer stack", **given).code == "evoformer"


def test_switches_and_offload() -> None:
    assert words.yes("true")
    assert words.yes("torch.compile (inductor)")
    assert not words.yes("not stated (likely n)")
    assert not words.yes("False")
    assert (words.tied("true"), words.tied("untied"), words.tied("")) == (True, False, None)
    assert words.offload("--cpu-offload", "", "fsdp1") == {"parameters", "optimizer", "gradients"}
    assert words.offload("CPU offload True", "", "zero2") == {"optimizer", "gradients"}
    assert not words.offload("none", "", "fsdp1")
    assert words.optimizer("FusedLAMB") == "adamw"
    assert words.optimizer("galore_adamw8bit_per_layer") == "galore"


def test_an_offloading_optimizer_has_its_states_and_gradients_elsewhere() -> None:
    def peak(**more: str) -> int:
        return predict(_setup(layers="2", seq_len="16", **more)).allocated_bytes

    states = peak(offload="optimizer states", optimizer="CPUOffloadOptimizer")
    assert peak(offload="optimizer states + gradients", optimizer="CPUOffload") < states < peak()
    assert peak(offload="optimizer", optimizer="no offload") == peak()
    alone = _setup(zero_fsdp="ZeRO-2", offload="optimizer+gradients (ZeRO-Offload)", precision="fp16 mixed")
    assert (alone.parameters, alone.compute) == ("float16", "float16")


@pytest.mark.parametrize("software", ["transformers", "torchtune"])
def test_float32_adapters_under_fsdp_multiply_in_half_precision(software: str) -> None:
    wording = {"method": "LoRA", "precision": "bf16 weights, adapters fp32", "seq_len": "16"}
    setup = _setup(**wording, zero_fsdp="FSDP", n_gpus="8", source=software)
    traced = trace(job_of(setup), plan_of(setup), device="cuda", steps=1)
    assert {o.dtype for o in traced.ops if o.op == "aten.mm.default"} == {"bfloat16"}
    assert plan_of(_setup(**wording, zero_fsdp="ZeRO-3", n_gpus="8")).get("bf16-autocast") is None


def test_hybrid_sharding_is_within_hosts() -> None:
    setup = _setup(zero_fsdp="HSDP", n_gpus="32", precision="bf16 mixed")
    shared = plan_of(setup).get("fsdp2")
    assert shared is not None
    assert shared.settings["replicas"] == 4
    assert words.replicas("HSDP", 8) == words.replicas("FSDP", 32) == 1


def test_selective_without_more_is_of_operators_outside_megatron() -> None:
    assert _setup(act_ckpt="Selective AC").recompute == "operators"
    assert _setup(act_ckpt="selective", software="Megatron-LM").recompute == "attention"


def test_adapters_are_read_from_configuration_keys() -> None:
    lora = "lora_rank 64, dropout 0.1; DEFAULT (W_pack)"
    found = _setup(method="LoRA", lora=lora, precision="dtype bfloat16, autocast_adapter_dtype true").lora
    assert found is not None
    assert (found.rank, found.dropout, found.adapter_dtype) == (64, 0.1, "float32")
    assert found.targets == {"q", "k", "v"}


def test_fsdp_shares_a_four_bit_base_and_ddp_does_not() -> None:
    def peak(**more: str) -> int:
        given = {"method": "QLoRA", "hidden": "1024", "ffn": "4096", "seq_len": "16", "act_ckpt": "full"}
        return predict(_setup(**given, **more)).allocated_bytes

    alone, shared = peak(), peak(n_gpus="4", zero_fsdp="FSDP full_shard")
    assert shared < 0.7 * alone
    assert peak(n_gpus="4", zero_fsdp="DDP") == pytest.approx(alone, rel=0.05)


def test_a_pipeline_of_another_code_base_is_cut_as_megatrons() -> None:
    whole = predict(_setup(global_batch="8")).allocated_bytes
    cut = predict(_setup(global_batch="8", pp="2", tp="2", n_gpus="4", zero_fsdp="zero_stage: 1"))
    assert cut.allocated_bytes < whole
    assert predicted(_setup(global_batch="8", pp="2", tp="2", n_gpus="4", zero_fsdp="zero1")).step_s > 0


def test_plain_layers_keep_the_sequence_that_they_gathered() -> None:
    given = {"tp": "4", "n_gpus": "8", "zero_fsdp": "zero_stage: 1", "sp": "yes", "seq_len": "4096"}
    own = predict(_setup(**given, software="Megatron-LM")).allocated_bytes
    assert predict(_setup(**given)).allocated_bytes > 1.1 * own


def test_one_chunk_of_an_interleaved_schedule_has_the_head() -> None:
    given = {"software": "Megatron-LM", "vocab": "200000", "pp": "2", "n_gpus": "2", "global_batch": "32"}
    whole, parts = predict(_setup(**given)), predict(_setup(**given, vp="4"))
    assert parts.allocated_bytes < 1.2 * whole.allocated_bytes  # not four times the logits


def test_megatron_keeps_dropped_elements_and_shares_a_tied_embedding() -> None:
    given = {"software": "Megatron-LM", "model": "GPT", "kv_heads": "4"}
    plain = predict(_setup(**given)).allocated_bytes
    assert predict(_setup(**given, extra_arch="dropout 0.1")).allocated_bytes > plain
    assert predict(_setup(**given, tied_emb="untied")).allocated_bytes > plain


def test_blocks_are_recomputed_where_the_row_says_nothing_and_would_not_fit() -> None:
    fits = {"layers": "64", "seq_len": "4096", "micro_batch": "4", "gpu_mem_gb": "4"}
    assert predict(_setup(**fits)).allocated_bytes < 4 * 2**30
    assert fake_model(job_of(_setup(**fits))) is not None
