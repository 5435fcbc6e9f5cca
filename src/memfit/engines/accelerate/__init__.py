"""Hugging Face Accelerate: DDP, FSDP2 and DeepSpeed's ZeRO through its Accelerator, configured by its YAML.

Field names are those of accelerate/commands/config/config_args.py and accelerate/utils/dataclasses.py (1.15).
"""

from __future__ import annotations

from typing import Any

from memfit.engines import deepspeed
from memfit.engines.base import BESIDE, Engine
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan

CONFIG = "accelerate.yaml"


def _reasons(plan: Plan) -> tuple[str, ...]:
    found = list(deepspeed.ENGINE.reasons(plan)) if plan.get("zero") is not None else []
    for half in ("bf16", "fp16"):
        if plan.get("fsdp2") is not None and plan.get(f"{half}-autocast") is not None:
            found.append(f"{half}-autocast: with FSDP2 its {half} is the dtype of gathered parameters")
    for used in plan.uses:
        knobs = used.settings
        if used.technique == "fsdp2":
            if int(knobs["replicas"]) > 1:
                found.append("fsdp2: replicas (HSDP) are not in its YAML")
            if knobs["units"] != "blocks":
                found.append(f"fsdp2: units {knobs['units']!r} cannot be named in its YAML")
            if int(knobs["prefetch"]) > 1:
                found.append("fsdp2: it has no setting of how many groups are gathered ahead")
            if knobs["reshard"] not in {True, False}:
                found.append(f"fsdp2: reshard {knobs['reshard']!r} is for all groups or none")
    return tuple(found)


def _files(spec: RunSpec) -> dict[str, str]:
    import yaml

    beside = deepspeed.ENGINE.files(spec) if spec.plan.get("zero") is not None else {}
    return {CONFIG: yaml.safe_dump(config(spec.plan), sort_keys=False), **beside}


def config(plan: Plan) -> dict[str, Any]:
    """Return the content of the file that `accelerate launch --config_file` reads. `mixed_precision` is the
    dtype of gathered parameters under FSDP2, and autocast otherwise."""
    mixed = "bf16" if plan.get("bf16-autocast") else "fp16" if plan.get("fp16-autocast") else "no"
    found: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "MULTI_GPU" if plan.ranks > 1 else "NO",
        "downcast_bf16": "no",
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": mixed,
        "num_machines": 1,
        "num_processes": plan.ranks,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
    }
    if (used := plan.get("fsdp2")) is not None:
        knobs = used.settings
        found["distributed_type"] = "FSDP"
        found["mixed_precision"] = "bf16" if knobs["precision"] == "bf16" else "no"
        found["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": bool(knobs["reshard"]),
            "fsdp_offload_params": bool(knobs["offload"]),
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_activation_checkpointing": False,
        }
    if plan.get("zero") is not None:  # settings in DeepSpeed's own file must not be repeated here
        found["distributed_type"] = "DEEPSPEED"
        found["deepspeed_config"] = {"deepspeed_config_file": deepspeed.CONFIG, "zero3_init_flag": False}
        del found["mixed_precision"]
    return found


def _asks_cuda(plan: Plan) -> tuple[str, ...]:
    """Return "fp16-autocast" if the plan uses it: on a CPU an Accelerator set to fp16 silently trains in
    float32."""
    return ("fp16-autocast",) if plan.get("fp16-autocast") is not None else ()


ENGINE = Engine(
    name="accelerate",
    summary="Hugging Face Accelerate: DDP, FSDP2 and DeepSpeed's ZeRO through its Accelerator",
    distribution="accelerate",
    tested=("1.15", "1.16"),
    install="pip install 'memfit[accelerate]'",
    carries=frozenset({"ddp", "fsdp2", "zero", "bf16-autocast", "fp16-autocast", "gradient-accumulation"}),
    beside=BESIDE | {"adamw-4bit", "bf16-parameters"},
    reasons=_reasons,
    asks_cuda=_asks_cuda,
    no_scalars=lambda plan: plan.get("zero") is not None,
    own_trace=True,
    files=_files,
)
