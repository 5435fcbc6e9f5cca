"""Hugging Face Accelerate: DDP, FSDP2 and DeepSpeed's ZeRO through its Accelerator, configured by its YAML.

Field names are those of accelerate/commands/config/config_args.py and accelerate/utils/dataclasses.py (1.15).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memfit.engines import deepspeed
from memfit.engines.base import APPLIED_BY_MEMFIT, Engine
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan

CONFIG = "accelerate.yaml"


def _reasons(plan: Plan) -> Iterator[str]:
    if "zero" in plan:
        yield from deepspeed.ENGINE.reasons(plan)
    if (use := plan.get("fsdp2")) is None:
        return
    for dtype in ("bf16", "fp16"):
        if f"{dtype}-autocast" in plan:
            yield (
                f"{dtype}-autocast: with FSDP2, Accelerate's {dtype} setting casts parameters, not operators"
            )
    knobs = use.settings
    if int(knobs["replicas"]) > 1:
        yield "fsdp2: Accelerate's YAML has no setting for replicas (HSDP)"
    if knobs["units"] != "blocks":
        yield f"fsdp2: units {knobs['units']!r} cannot be expressed in Accelerate's YAML"
    if int(knobs["prefetch"]) > 1:
        yield "fsdp2: Accelerate has no setting for prefetch, the number of groups ahead"
    if knobs["reshard"] not in {True, False}:
        yield f"fsdp2: reshard {knobs['reshard']!r} is not supported: Accelerate reshards all groups or none"


def _files(spec: RunSpec) -> dict[str, str]:
    import yaml

    deepspeed_files = deepspeed.ENGINE.files(spec) if "zero" in spec.plan else {}
    return {CONFIG: yaml.safe_dump(config(spec.plan), sort_keys=False), **deepspeed_files}


def config(plan: Plan) -> dict[str, Any]:
    """Return the content of the YAML file that `accelerate launch --config_file` reads, for one machine.
    `mixed_precision` ("bf16", "fp16" or "no") is the dtype of gathered parameters under FSDP2, and that of
    autocast otherwise. With ZeRO it is left out, and the content names DeepSpeed's own file."""
    mixed_precision = "bf16" if plan.get("bf16-autocast") else "fp16" if plan.get("fp16-autocast") else "no"
    content: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "MULTI_GPU" if plan.ranks > 1 else "NO",
        "downcast_bf16": "no",
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": mixed_precision,
        "num_machines": 1,
        "num_processes": plan.ranks,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
    }
    if (use := plan.get("fsdp2")) is not None:
        knobs = use.settings
        content["distributed_type"] = "FSDP"
        content["mixed_precision"] = "bf16" if knobs["precision"] == "bf16" else "no"
        content["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": bool(knobs["reshard"]),
            "fsdp_offload_params": bool(knobs["offload"]),
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_activation_checkpointing": False,
        }
    if "zero" in plan:  # settings in DeepSpeed's own file must not be repeated here
        content["distributed_type"] = "DEEPSPEED"
        content["deepspeed_config"] = {"deepspeed_config_file": deepspeed.CONFIG, "zero3_init_flag": False}
        del content["mixed_precision"]
    return content


ENGINE = Engine(
    name="accelerate",
    saves=True,
    summary="Hugging Face Accelerate: DDP, FSDP2 and DeepSpeed's ZeRO through its Accelerator",
    distribution="accelerate",
    tested=("1.15", "1.16"),
    install="pip install 'memfit[accelerate]'",
    carries=frozenset({"ddp", "fsdp2", "zero", "bf16-autocast", "fp16-autocast", "gradient-accumulation"}),
    applied_by_memfit=APPLIED_BY_MEMFIT | {"adamw-4bit", "bf16-parameters"},
    applied_by_files=frozenset({"ddp", "fsdp2", "zero", "bf16-autocast", "fp16-autocast"}),
    reasons=_reasons,
    # On a CPU, an Accelerator set to fp16 silently trains in float32.
    asks_cuda=lambda plan: ("fp16-autocast",) if "fp16-autocast" in plan else (),
    no_scalars=lambda plan: "zero" in plan,
    own_trace=True,
    files=_files,
)
