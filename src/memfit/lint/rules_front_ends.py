"""Rules for Axolotl, LLaMA-Factory and Lightning's command line. Checked against Axolotl at 067b021c8b87
(utils/schemas/peft.py and validation.py), LLaMA-Factory at ff6d4d12eeb0 (hparams/parser.py, model/adapter.py)
and lightning 2.6.6 (pytorch/plugins/precision/fsdp.py, pytorch/strategies/deepspeed.py); read 2026-11."""

from __future__ import annotations

from memfit.lint.parse import Found, Options, Setup
from memfit.lint.to_plan_lightning import strategy

_ATTENTIONS = (
    "attn_implementation",
    "flash_attention",
    "sdp_attention",
    "flex_attention",
    "xformers_attention",
    "sage_attention",
    "eager_attention",
)


def axolotl_bits_without_adapter(a: Options, s: Setup) -> Found:
    """Report load_in_8bit and load_in_4bit that are on without an adapter."""
    keys = [k for k in ("load_in_8bit", "load_in_4bit") if a.on(k)]
    if keys and a.raw("adapter") in (None, ""):
        yield {"keys": ", ".join(keys)}


def axolotl_qlora_bits(a: Options, s: Setup) -> Found:
    """Report the adapter qlora without load_in_4bit. Files that merge an adapter into its model are
    skipped."""
    if a.raw("adapter") == "qlora" and not a.on("load_in_4bit") and not a.on("merge_lora"):
        yield {}


def axolotl_packing_attention(a: Options, s: Setup) -> Found:
    """Report sample_packing that is on if the file chooses no attention."""
    if a.on("sample_packing") and not any(a.get(k) and not a.off(k) for k in _ATTENTIONS):
        yield {}


def llamafactory_quantized_full(f: Options, s: Setup) -> Found:
    """Report quantization_bit with a finetuning_type other than lora and oft."""
    kind = f.get("finetuning_type")
    if f.count("quantization_bit") and kind is not None and str(kind).lower() not in ("lora", "oft"):
        yield {"bits": f.raw("quantization_bit"), "kind": kind}


def llamafactory_pure_bf16_zero3(f: Options, s: Setup) -> Found:
    """Report pure_bf16 with a DeepSpeed file of ZeRO stage 3."""
    if f.on("pure_bf16") and s.deepspeed is not None and s.deepspeed.count("zero_optimization.stage") == 3:
        yield {}


def lightning_fsdp_norm(t: Options, s: Setup) -> Found:
    """Report a gradient_clip_val other than 0 with the strategy FSDP, unless gradient_clip_algorithm is
    "value"."""
    norm, algorithm = t.number("trainer.gradient_clip_val"), t.get("trainer.gradient_clip_algorithm")
    if strategy(t) == "fsdp" and norm and algorithm != "value":
        yield {"norm": f"{norm:g}"}


def lightning_deepspeed_value(t: Options, s: Setup) -> Found:
    """Report clipping by value (a gradient_clip_val other than 0, gradient_clip_algorithm "value") with the
    strategy DeepSpeed."""
    value = t.number("trainer.gradient_clip_val")
    if strategy(t) == "deepspeed" and value and t.get("trainer.gradient_clip_algorithm") == "value":
        yield {"value": f"{value:g}"}


CHECKS = {
    ("axolotl",): (axolotl_bits_without_adapter, axolotl_qlora_bits, axolotl_packing_attention),
    ("llamafactory",): (llamafactory_quantized_full, llamafactory_pure_bf16_zero3),
    ("lightning",): (lightning_fsdp_norm, lightning_deepspeed_value),
}
