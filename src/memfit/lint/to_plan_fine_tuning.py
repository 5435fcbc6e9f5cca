"""Convert files of Axolotl and LLaMA-Factory, which fine-tune models with the Hugging Face Trainer, to a
Plan."""

from __future__ import annotations

import dataclasses
import math

from memfit.lint import axolotl, models
from memfit.lint.draft import Draft
from memfit.lint.option_reasons import account_for
from memfit.lint.parse import Options, Setup
from memfit.lint.to_plan_hugging_face import from_deepspeed, from_hugging_face
from memfit.techniques.registry import conflict, make_use, technique

_PARALLEL_SIZES = (
    "tensor_parallel_size",
    "context_parallel_size",
    "sequence_parallel_degree",
    "dp_replicate_size",
)
_RECOMPUTATION = "activation-checkpointing"
_AUTOCASTS = ("bf16-autocast", "fp16-autocast")
_OWN_OPTIMIZERS = ("adamw-fused", "adamw-single")  # replaced by the AdamW of bf16-parameters


def from_axolotl(setup: Setup, draft: Draft) -> None:
    """Add Axolotl's options to ``draft``, as the Trainer that Axolotl starts would run them. If Axolotl
    computes in bfloat16 (`axolotl.uses_bf16`), it loads the model in bfloat16; without an adapter, FSDP and
    DeepSpeed, all parameters stay in it. The options that are not in the plan are listed as left out, with
    the reasons."""
    options = setup.axolotl
    assert options is not None
    translated = dataclasses.replace(
        setup, trainer=axolotl.trainer_arguments(options), accelerate=_parallelism(options, setup, draft)
    )
    _as_trainer(translated, draft, renamed={"optim": "optimizer"})
    draft.length = options.size("sequence_len") or 512
    bits = 4 if options.on("load_in_4bit") else 8 if options.on("load_in_8bit") else 16
    adapter = str(options.get("adapter") or "").lower()
    if adapter in ("lora", "qlora"):
        bits = 4 if adapter == "qlora" and bits == 16 else bits
        _add_lora(draft, rank=options.size("lora_r") or 8, bits=bits, option=f"adapter {adapter}")
        _make_dora(draft, options, "peft_use_dora")
    elif adapter:
        draft.leave(f"adapter {adapter}", "memfit has adapters of LoRA and QLoRA only: predicted without it")
    elif bits < 16:
        draft.leave(f"load_in_{bits}bit", "without an adapter nothing could be trained: predicted in 16 bits")
    is_sharded = axolotl.uses_fsdp(options) or setup.deepspeed is not None
    if not adapter and axolotl.uses_bf16(options) and not is_sharded:
        store_in_bf16(draft, "bf16")
    variant = options.get("gradient_checkpointing")
    if axolotl.recomputes(options) and not options.on("gradient_checkpointing"):
        draft.leave(
            f"gradient_checkpointing {variant}",
            "predicted with the checkpoints on the device, which takes more memory",
        )
    draft.model = models.of_hub(_text(options, "base_model"), options.file, draft.length)
    account_for(options, "axolotl", draft)


def _parallelism(options: Options, setup: Setup, draft: Draft) -> Options | None:
    """Return Accelerate's settings for the sizes of Axolotl's parallelism, as `to_plan_hugging_face` reads
    them together with FSDP. If no size is above 1, or without FSDP, return the set-up's own settings of
    Accelerate; without FSDP, sizes above 1 are listed as left out. If the number of processes is unknown and
    dp_shard_size is given, ``draft.ranks`` becomes the product of all sizes."""
    given_sizes = {
        "tp_size": options.size("tensor_parallel_size"),
        "cp_size": options.size("context_parallel_size") or options.size("sequence_parallel_degree"),
        "dp_replicate_size": options.size("dp_replicate_size"),
    }
    sizes = {name: size for name, size in given_sizes.items() if size and size > 1}
    if not sizes:
        return setup.accelerate
    if setup.ranks is None and (shard := options.size("dp_shard_size")):
        draft.ranks = shard * math.prod(sizes.values())
    if axolotl.uses_fsdp(options):
        return Options(file=options.file, data={"parallelism_config": sizes})
    for name in _PARALLEL_SIZES:
        if (size := options.size(name)) and size > 1:
            draft.leave(f"{name} {size}", "without FSDP, memfit does not carry it over: predicted without it")
    return setup.accelerate


def from_llamafactory(setup: Setup, draft: Draft) -> None:
    """Add the options of LLaMA-Factory to ``draft``. Those of the Trainer are in ``setup.trainer``.
    LLaMA-Factory recomputes activations unless disable_gradient_checkpointing is on, and trains parameters in
    float32 unless pure_bf16 is on. The options that are not in the plan are listed as left out, with the
    reasons."""
    options, arguments = setup.llamafactory, setup.trainer
    assert options is not None
    assert arguments is not None
    is_pure = options.on("pure_bf16")
    changes = {
        "gradient_checkpointing": not options.on("disable_gradient_checkpointing"),
        **({"bf16": True, "fp16": False} if is_pure else {}),
    }
    changed = dataclasses.replace(arguments, data={**arguments.data, **changes})
    _as_trainer(dataclasses.replace(setup, trainer=changed), draft)
    draft.length = options.size("cutoff_len") or 2048
    kind = str(options.get("finetuning_type") or "lora").lower()
    bits = options.count("quantization_bit") or 16
    if kind == "lora":
        _add_lora(draft, rank=options.size("lora_rank") or 8, bits=bits, option="finetuning_type lora")
        _make_dora(draft, options, "use_dora")
    elif kind != "full":
        draft.leave(
            f"finetuning_type {kind}", "memfit does not support it: predicted with all parameters trained"
        )
    if kind != "lora" and bits < 16:
        draft.leave(
            f"quantization_bit {bits}", "without LoRA, nothing could be trained: predicted in 16 bits"
        )
    if kind != "lora" and is_pure:
        store_in_bf16(draft, "pure_bf16")
    stage = str(options.get("stage") or "sft").lower()
    if stage not in ("sft", "pt"):
        draft.leave(
            f"stage {stage}",
            "predicted as ordinary fine-tuning: without its further models, pairs of samples and loss",
        )
    draft.model = models.of_hub(_text(options, "model_name_or_path"), options.file, draft.length)
    account_for(options, "llamafactory", draft)


def _text(options: Options, name: str) -> str | None:
    value = options.get(name)
    return str(value) if value is not None else None


def _as_trainer(setup: Setup, draft: Draft, renamed: dict[str, str] | None = None) -> None:
    """Add what the Trainer's arguments and DeepSpeed's file ask for to the draft. ``renamed``: argument of
    the Trainer -> the option of the file, for what is listed as left out; others keep their names."""
    (from_hugging_face if setup.deepspeed is None else from_deepspeed)(setup, draft)
    for index, note in enumerate(draft.left_out):
        name, space, value = note.option.partition(" ")
        if name in (renamed or {}):
            option = f"{(renamed or {})[name]}{space}{value}"
            draft.left_out[index] = dataclasses.replace(note, option=option)


def _add_lora(draft: Draft, *, rank: int, bits: int, option: str) -> None:
    """Add LoRA of ``rank`` to the draft, or QLoRA if the frozen weights have 4 ``bits``; everything outside
    the blocks is frozen. If memfit cannot add it, list ``option``, the setting that asks for it, as left out.
    Remove the recomputation of blocks under ZeRO stage 3. Frozen weights of 16 bits are predicted as
    parameters in bfloat16, with masters in float32 for the trained ones, if the plan has an autocast to
    bfloat16 or float16; frozen weights of 8 bits are predicted as of 16. An optimizer for which memfit has no
    such parameters is replaced by AdamW. What is removed, replaced or predicted otherwise is listed as left
    out."""
    name = "qlora" if bits == 4 else "lora"
    zero = draft.plan.get("zero")
    if zero is not None and zero.settings["stage"] == 3 and _RECOMPUTATION in draft.plan:
        draft.drop(_RECOMPUTATION)
        draft.leave(
            "recomputation of blocks",
            "memfit does not support it together with adapters under ZeRO stage 3: predicted without "
            "recomputation, which takes more memory",
        )
    draft.take(name, option, rank=rank, outside="frozen")
    if name not in draft.plan:
        draft.leave(option, "predicted with all parameters trained, which takes far more memory")
        return
    if bits not in (4, 16):
        draft.leave(
            f"frozen weights of {bits} bits",
            "memfit has frozen weights of 4 and 16 bits: predicted with 16, which takes more memory",
        )
    if bits != 4 and "fp16-autocast" in draft.plan:
        draft.leave("fp16", "predicted as bf16: the same number of bytes, without the loss scale")
    if bits != 4 and any(map(draft.plan.get, _AUTOCASTS)):
        _replace_autocast(draft, option, rounding="master")
    elif bits != 4 and "fsdp2" in draft.plan:
        draft.leave(
            "frozen weights of 16 bits",
            "memfit's FSDP2 keeps shards of frozen weights in float32: predicted so, which takes more memory",
        )


def _make_dora(draft: Draft, options: Options, option: str) -> None:
    """Make the draft's LoRA a DoRA if the ``option`` of the file is on. If the draft has no LoRA, as with
    weights of 4 bits, the option is listed as left out."""
    if options.on(option) and (lora := draft.plan.get("lora")) is not None:
        draft.take("lora", option, **{**lora.settings, "dora": True})
    elif options.on(option):
        draft.leave(
            option,
            "memfit has DoRA with frozen weights of 16 bits only: predicted without it, which takes less "
            "memory",
        )


def store_in_bf16(draft: Draft, option: str) -> None:
    """Replace bf16 autocast, if the plan has it, by parameters, gradients and moments in bfloat16, without
    masters in float32 (stochastic rounding). memfit has them with its own AdamW: any other optimizer that
    conflicts is replaced by it and, unless it is AdamW too, listed as left out. ``option``: the setting of
    the file that asks for it."""
    if "bf16-autocast" in draft.plan:
        for name in _OWN_OPTIMIZERS:
            draft.drop(name)
        _replace_autocast(draft, option, rounding="stochastic")


def _replace_autocast(draft: Draft, option: str, *, rounding: str) -> None:
    """Replace autocast by bf16-parameters, and an optimizer that conflicts with these by memfit's AdamW."""
    for name in _AUTOCASTS:
        draft.drop(name)
    for use in draft.plan.uses:
        conflicts = conflict(draft.plan.with_use(make_use("bf16-parameters", {"rounding": rounding})))
        if conflicts and technique(use.technique).slot == "optimizer":
            draft.drop(use.technique)
            draft.leave(
                f"optimizer {use.technique}",
                "memfit has it for parameters in float32 only: predicted with AdamW, whose moments take more "
                "memory",
            )
    draft.take("bf16-parameters", option, rounding=rounding)
