"""DeepSpeed: ZeRO stages 0 to 3 through `deepspeed.initialize`, configured by its JSON.

Keys are those of deepspeed/runtime/config.py and deepspeed/runtime/zero/config.py (0.19). All keys that
affect memory are written, even where they equal DeepSpeed's default. `activation_checkpointing` is not
written: DeepSpeed's engine parses the section but does not use it. It affects only models that call
`deepspeed.checkpointing` themselves. memfit recomputes blocks with torch's checkpoint, with any engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from memfit.engines.base import APPLIED_BY_MEMFIT, Engine
from memfit.techniques.registry import make_use
from memfit.techniques.zero import BUFFER_COUNT
from memfit.types.device_kind import HOST
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan, Use

CONFIG = "deepspeed.json"
NVME_PATH = "/local_nvme"  # the folder in DeepSpeed's documentation


def as_zero(plan: Plan) -> Plan:
    """Return the plan with zero of stage 0 in place of ddp; a plan without ddp is returned unchanged. Stage 0
    is DeepSpeed's DDP: it averages gradients over ranks after backward, in pieces of its own size. The
    settings of ddp are therefore dropped."""
    if "ddp" not in plan:
        return plan
    return plan.without("ddp").with_use(make_use("zero", {"stage": 0}))


def _reasons(plan: Plan) -> Iterator[str]:
    if plan.ranks > 1 and "ddp" not in plan and "zero" not in plan:
        yield "several ranks: DeepSpeed requires zero or ddp"
    accumulates = "gradient-accumulation" in plan
    if accumulates and (ddp := plan.get("ddp")) is not None and ddp.settings["sync"] != "last":
        yield "ddp: sync must be 'last', because DeepSpeed reduces gradients once per step"
    if (zero := plan.get("zero")) is not None:
        knobs = zero.settings
        if int(knobs["stage"]) == 0 and (knobs["precision"] != "fp32" or knobs["offload"] != "none"):
            yield "zero: stage 0 requires precision 'fp32' and offload 'none'"
        if int(knobs["stage"]) == 3 and "chunked-cross-entropy" in plan:
            yield "chunked-cross-entropy: ZeRO stage 3 has freed the head's weight when the loss runs"


def config(spec: RunSpec) -> dict[str, Any]:
    """Return the content of the JSON file that `deepspeed --deepspeed_config` reads. It does not describe the
    optimizer, which the program that trains creates. DDP, and a plan of one rank without zero, are written as
    ZeRO stage 0. If ``spec.batch_size`` is 0, which means unknown, micro-batches have 1 sample."""
    zero = as_zero(spec.plan).get("zero")
    micro_batches = spec.plan.micro_batches
    is_bf16 = zero is not None and zero.settings["precision"] == "bf16"
    return {
        "train_micro_batch_size_per_gpu": max(1, spec.batch_size // (spec.plan.ranks * micro_batches)),
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": spec.clip or 0.0,  # DeepSpeed's default of 1.0 would differ from the prediction
        "bf16": {"enabled": is_bf16},
        "data_types": {"grad_accum_dtype": "bf16" if is_bf16 else "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(zero) if zero is not None else {"stage": 0},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _zero(use: Use) -> dict[str, Any]:
    knobs = use.settings
    stage = int(knobs["stage"])
    section: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": int(knobs["reduce_bucket_elements"]),
        "allgather_bucket_size": 500_000_000,
        "overlap_comm": bool(knobs["overlap"]),
        "round_robin_gradients": False,
        "offload_optimizer": _to_host(knobs["offload"] != "none"),
    }
    if stage == 3:
        section |= {
            "offload_param": _to_host(knobs["offload"] == "parameters"),
            "stage3_prefetch_bucket_size": int(knobs["prefetch_elements"]),
            "stage3_param_persistence_threshold": int(knobs["persist_elements"]),
            "stage3_max_live_parameters": int(knobs["live_elements"]),
            "stage3_max_reuse_distance": int(knobs["live_elements"]),
            "memory_efficient_linear": bool(knobs["memory_efficient_linear"]),
        }
    if knobs["nvme"] != "none":
        section |= {"offload_optimizer": _to_storage(), "sub_group_size": int(knobs["sub_group_elements"])}
    return section


def _to_host(enabled: bool) -> dict[str, Any]:
    return {"device": HOST, "pin_memory": True} if enabled else {"device": "none"}


def _to_storage() -> dict[str, Any]:
    return {
        "device": "nvme",
        "nvme_path": NVME_PATH,
        "pin_memory": True,
        "buffer_count": BUFFER_COUNT,
        "pipeline_read": False,
        "pipeline_write": False,
        "fast_init": False,
    }


ENGINE = Engine(
    name="deepspeed",
    saves=True,
    summary="DeepSpeed: ZeRO 0 to 3, states and parameters in host memory, states on NVMe",
    distribution="deepspeed",
    tested=("0.19", "0.20"),
    install="pip install 'memfit[deepspeed]'",
    carries=frozenset({"ddp", "zero", "gradient-accumulation"}),
    applied_by_memfit=APPLIED_BY_MEMFIT,
    applied_by_files=frozenset({"ddp", "zero", "gradient-accumulation", "clipping"}),
    reasons=_reasons,
    no_scalars=lambda plan: True,  # parameters are sent as bytes; torch cannot view a scalar as bytes
    predicted=as_zero,
    files=lambda spec: {CONFIG: json.dumps(config(spec), indent=2) + "\n"},
    env={"DS_ACCELERATOR": "{device}", "LOCAL_RANK": "0"},  # LOCAL_RANK is needed even with one rank
)
