"""What Axolotl's options mean as arguments of the Hugging Face Trainer, which Axolotl starts.

Checked against src/axolotl of axolotl-ai-cloud/axolotl at 067b021c8b87 (core/builders/base.py,
utils/config/__init__.py, utils/schemas/validation.py); read 2026-11.
"""

from __future__ import annotations

from typing import Any

from memfit.lint.parse import Options

# Axolotl's option -> argument of the Trainer with the same values.
_SAME = {
    "max_grad_norm": "max_grad_norm",
    "torch_compile": "torch_compile",
    "ddp_bucket_cap_mb": "ddp_bucket_cap_mb",
    "deepspeed": "deepspeed",
}
_FSDP1 = {"SHARD_GRAD_OP": False, "NO_SHARD": False, "FULL_SHARD": True}


def trainer_arguments(options: Options) -> Options:
    """Return the arguments of the Trainer that decide its plan, for Axolotl's ``options``, with Axolotl's
    defaults for those that are not given: micro_batch_size 1, bf16 "auto" (`uses_bf16`), and the optimizer
    adamw_torch_fused. If FSDP is used, fsdp is true, and fsdp_config has its names without the prefix
    ``fsdp_``, its version (1 unless the file gives one), and offload_params and reshard_after_forward as the
    list fsdp and FSDP1's strategies say."""
    data: dict[str, Any] = {theirs: options.raw(ours) for ours, theirs in _SAME.items()}
    data["per_device_train_batch_size"] = options.size("micro_batch_size") or 1
    data["gradient_accumulation_steps"] = accumulation_steps(options)
    data["optim"] = options.get("optimizer") or "adamw_torch_fused"
    data["fp16"] = options.on("fp16")
    data["bf16"] = uses_bf16(options)
    data["gradient_checkpointing"] = recomputes(options)
    if uses_fsdp(options):
        data["fsdp"], data["fsdp_config"] = True, fsdp_config(options)
    return Options(file=options.file, data=data)


def accumulation_steps(options: Options) -> int:
    """Return gradient_accumulation_steps or, if only batch_size is given, that divided by the micro-batch,
    rounded down and at least 1; else 1."""
    steps, batch = options.size("gradient_accumulation_steps"), options.size("batch_size")
    micro_batch = options.size("micro_batch_size") or 1
    return steps or (max(1, batch // micro_batch) if batch else 1)


def uses_bf16(options: Options) -> bool:
    """Return whether Axolotl computes in bfloat16 on a device that supports it: if bf16 is true or "full", or
    if it is "auto", the default, and none of fp16, float16 and float32 is on."""
    value = options.raw("bf16")
    if value in ("auto", None):
        return not options.on("fp16") and not options.on("float32") and not options.on("float16")
    return options.on("bf16") or value == "full"


def recomputes(options: Options) -> bool:
    """Return whether gradient_checkpointing is on; "offload" and other names of a variant count as on."""
    value = options.get("gradient_checkpointing")
    return value is not None and not options.off("gradient_checkpointing")


def uses_fsdp(options: Options) -> bool:
    return bool(options.get("fsdp")) or bool(options.section("fsdp_config"))


def fsdp_config(options: Options) -> dict[str, Any]:
    section = {str(k).removeprefix("fsdp_"): v for k, v in options.section("fsdp_config").items()}
    version = options.count("fsdp_version") or section.get("version") or 1
    words = options.texts("fsdp")
    section.setdefault("offload_params", "offload" in words)
    strategy = str(section.get("sharding_strategy") or section.get("reshard_after_forward")).upper()
    if strategy in _FSDP1:
        section["reshard_after_forward"] = _FSDP1[strategy]
    if "shard_grad_op" in words:
        section["reshard_after_forward"] = False
    return {**section, "version": version}
