"""Export for Hugging Face's Trainer: TrainingArguments as JSON, for `HfArgumentParser.parse_json_file`.

The file contains only the settings that determine memory. Learning rate, epochs and the rest are the user's.
Names are those of transformers/training_args.py (5.24).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from memfit.engines.registry import engine
from memfit.export.base import Files, Handover
from memfit.techniques.rank_mesh import split_batch
from memfit.types.errors import UserError
from memfit.types.plan import Plan

ARGUMENTS = "training_args.json"

OPTIMIZERS = {
    "adamw-fused": "adamw_torch_fused",
    "adamw-8bit": "adamw_bnb_8bit",
    "adamw-paged": "paged_adamw_8bit",
    "adamw-4bit": "adamw_torch_4bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
TECHNIQUES = OPTIMIZERS.keys() | {
    "ddp",
    "fsdp2",
    "zero",
    "bf16-autocast",
    "fp16-autocast",
    "gradient-accumulation",
    "activation-checkpointing",
    "compile",
}


def files(handover: Handover) -> Files:
    """Return the files of the export, name -> text: training_args.json, deepspeed.json if the engine has it,
    and ``handover.own_files``. Raises UserError, which lists all reasons, if TrainingArguments cannot express
    the plan, or if the plan has ZeRO and the engine has no deepspeed.json. Raises UserError, too, if the
    batch cannot be split into equal parts for the data-parallel ranks and micro-batches."""
    reasons = tuple(why_not(handover.plan))
    if "zero" in handover.plan and "deepspeed.json" not in handover.engine_files:
        reasons += ("zero needs DeepSpeed: --engine deepspeed",)
    if reasons:
        raise UserError(
            f"TrainingArguments cannot express this plan: {'; '.join(reasons)}",
            hint="`memfit plan --without TECHNIQUE --save FILE.yaml` writes a plan without one of these "
            "techniques for --plan; or change their settings in the plan file",
        )
    extra_files = {
        n: t for n, t in handover.carried.items() if n in handover.own_files or n == "deepspeed.json"
    }
    return {**extra_files, ARGUMENTS: json.dumps(arguments(handover), indent=2) + "\n"}


def why_not(plan: Plan) -> Iterator[str]:
    """Yield the reasons why TrainingArguments cannot express the plan. Settings of ZeRO are not checked:
    deepspeed.json has them."""
    for use in plan.uses:
        name, knobs = use.technique, use.settings
        if name not in TECHNIQUES:
            yield f"{name} is not supported"
        elif name == "activation-checkpointing" and knobs["every"] != 1:
            yield "activation-checkpointing: it recomputes every block or none, so every must be 1"
        elif name == "compile" and knobs["scope"] != "model":
            yield "compile: the whole model is one graph, so scope must be 'model'"
        elif name == "ddp" and knobs["bucket_view"]:
            yield "ddp: gradients are separate from the Trainer's buckets, so bucket_view must be false"
    if "fsdp2" in plan:
        yield from engine("accelerate").reasons(plan)


def arguments(handover: Handover) -> dict[str, Any]:
    """Return the TrainingArguments that determine memory for the plan, name -> value. Raises UserError if the
    batch cannot be split into equal parts for the data-parallel ranks and micro-batches."""
    spec = handover.config.spec
    return training_arguments(
        handover.plan,
        batch_size=spec.batch_size,
        clip=spec.clip,
        deepspeed="deepspeed.json" in handover.engine_files,
    )


def training_arguments(
    plan: Plan, *, batch_size: int, clip: float | None = None, deepspeed: bool = False
) -> dict[str, Any]:
    """Return the TrainingArguments that determine memory for ``plan``, name -> value. ``batch_size``: samples
    of a whole step over all ranks. ``clip``: the largest gradient norm; None or 0: max_grad_norm is left to
    the Trainer's default of 1.0, or with deepspeed.json set to 0. ``deepspeed``: whether deepspeed.json is
    used. Raises UserError if the batch cannot be split into equal parts for the data-parallel ranks and
    micro-batches."""
    micro_batch_size = split_batch(plan, batch_size)
    optimizer = next((OPTIMIZERS[u.technique] for u in plan.uses if u.technique in OPTIMIZERS), "adamw_torch")
    arguments_by_name: dict[str, Any] = {
        "output_dir": "out",
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": plan.micro_batches,
        "bf16": _half(plan),
        "fp16": "fp16-autocast" in plan,
        "optim": optimizer,
        **_recomputation(plan),
        # The Trainer refuses a clipping norm that differs from DeepSpeed's file.
        **(
            {"deepspeed": "deepspeed.json", "max_grad_norm": clip or 0.0}
            if deepspeed
            else _data_parallel(plan, accumulated=plan.micro_batches > 1)
        ),
    }
    if clip:
        arguments_by_name["max_grad_norm"] = clip
    if optimizer == "sgd":
        arguments_by_name["optim_args"] = "momentum=0.9"
    if "compile" in plan:
        arguments_by_name["torch_compile"] = True
    return arguments_by_name


def _half(plan: Plan) -> bool:
    use = plan.get("fsdp2") or plan.get("zero")
    return "bf16-autocast" in plan or (use is not None and use.settings["precision"] == "bf16")


def _recomputation(plan: Plan) -> dict[str, Any]:
    if "activation-checkpointing" not in plan or "fsdp2" in plan:
        return {"gradient_checkpointing": False}
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def _data_parallel(plan: Plan, *, accumulated: bool) -> dict[str, Any]:
    arguments_by_name: dict[str, Any] = {}
    if (ddp := plan.get("ddp")) is not None:
        arguments_by_name["ddp_bucket_cap_mb"] = int(ddp.settings["bucket_mib"])
    if (fsdp := plan.get("fsdp2")) is not None:
        arguments_by_name["fsdp"] = True
        arguments_by_name["fsdp_config"] = {
            "version": 2,
            "reshard_after_forward": bool(fsdp.settings["reshard"]),
            "cpu_offload": bool(fsdp.settings["offload"]),
            "activation_checkpointing": "activation-checkpointing" in plan,
            "state_dict_type": "SHARDED_STATE_DICT",
        }
    sync = next((u.settings["sync"] for u in (ddp, fsdp) if u is not None), "last")
    if accumulated and sync == "every":
        arguments_by_name["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    return arguments_by_name
