"""Colossal-AI: its Booster with one of four plugins, in a separate environment.

Constructor arguments are those of colossalai/booster/plugin/*_plugin.py (0.5). Colossal-AI requires torch 2.5
or older, which conflicts with the requirements of memfit and the other engines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from memfit.engines.base import Engine
from memfit.techniques.rank_mesh import layout
from memfit.types.plan import Plan

CONFIG = "colossalai.json"
DDP, ZERO, GEMINI, HYBRID = "TorchDDPPlugin", "LowLevelZeroPlugin", "GeminiPlugin", "HybridParallelPlugin"
_MI = 1 << 20
_STYLES = {"1f1b": "1f1b", "interleaved": "interleaved"}


def plugin_of(plan: Plan) -> str:
    """Return the name of the Booster plugin that trains the plan: "HybridParallelPlugin" for tensor-parallel
    or pipeline; else, for zero, "GeminiPlugin" in stage 3 and "LowLevelZeroPlugin" in other stages; else
    "TorchDDPPlugin" for ddp. Return "" for any other plan, which needs no plugin."""
    if plan.get("tensor-parallel") or plan.get("pipeline"):
        return HYBRID
    if (zero := plan.get("zero")) is not None:
        return GEMINI if zero.settings["stage"] == 3 else ZERO
    return DDP if plan.get("ddp") else ""


def config(plan: Plan, clip: float | None = None) -> dict[str, Any]:
    """Return the content of colossalai.json: the name of the Booster ``plugin`` and its ``arguments``.
    ``clip`` is the largest norm of gradients, beyond which they are clipped; None or 0 for no limit. It is an
    argument (max_norm) of all plugins but that of DDP, which does not clip: there, and without a plugin,
    memfit's worker clips."""
    name = plugin_of(plan)
    arguments = _ARGUMENTS[name](plan) if name else {}
    if clip and name not in {"", DDP}:
        arguments["max_norm"] = clip
    return {"plugin": name, "arguments": arguments}


def _ddp(plan: Plan) -> dict[str, Any]:
    use = plan.get("ddp")
    assert use is not None
    return {
        "bucket_cap_mb": int(use.settings["bucket_mib"]),
        "gradient_as_bucket_view": bool(use.settings["bucket_view"]),
    }


def _zero_knobs(plan: Plan) -> Mapping[str, Any]:
    use = plan.get("zero")
    assert use is not None
    return use.settings


def _zero(plan: Plan) -> dict[str, Any]:
    knobs = _zero_knobs(plan)
    return {
        "stage": int(knobs["stage"]),
        "precision": str(knobs["precision"]),
        "reduce_bucket_size_in_m": int(knobs["reduce_bucket_elements"]) // _MI,
        "overlap_communication": bool(knobs["overlap"]),
        "cpu_offload": knobs["offload"] == "optimizer",
    }


def _gemini(plan: Plan) -> dict[str, Any]:
    knobs = _zero_knobs(plan)
    return {
        "placement_policy": "static",
        "shard_param_frac": 1.0,
        "offload_optim_frac": 0.0 if knobs["offload"] == "none" else 1.0,
        "offload_param_frac": 1.0 if knobs["offload"] == "parameters" else 0.0,
        "precision": str(knobs["precision"]),
        "enable_gradient_accumulation": "gradient-accumulation" in plan,
    }


def _hybrid(plan: Plan) -> dict[str, Any]:
    mesh, pipeline, tensor = layout(plan), plan.get("pipeline"), plan.get("tensor-parallel")
    arguments: dict[str, Any] = {
        "tp_size": mesh.tensor,
        "pp_size": mesh.pipeline,
        "zero_stage": 0,
        "precision": "fp32",
        "parallel_output": tensor is not None and tensor.settings["vocabulary"] == "parallel-loss",
    }
    if (zero := plan.get("zero")) is not None:
        arguments |= {"zero_stage": int(zero.settings["stage"]), "precision": str(zero.settings["precision"])}
        arguments["zero_bucket_size_in_m"] = int(zero.settings["reduce_bucket_elements"]) // _MI
    if (ddp := plan.get("ddp")) is not None:
        arguments |= {"ddp_bucket_cap_mb": int(ddp.settings["bucket_mib"])}
        arguments["gradient_as_bucket_view"] = bool(ddp.settings["bucket_view"])
    if tensor is not None and tensor.settings["sequence"]:
        arguments |= {"enable_sequence_parallelism": True, "sequence_parallelism_mode": "split_gather"}
    if pipeline is not None:
        arguments["num_microbatches"] = int(pipeline.settings["micro_batches"])
        arguments["pp_style"] = _STYLES[str(pipeline.settings["schedule"])]
        arguments["num_model_chunks"] = int(pipeline.settings["virtual"])
    return arguments


_ARGUMENTS = {DDP: _ddp, ZERO: _zero, GEMINI: _gemini, HYBRID: _hybrid}


def _reasons(plan: Plan) -> Iterator[str]:
    zero, pipeline, tensor = plan.get("zero"), plan.get("pipeline"), plan.get("tensor-parallel")
    if zero is not None:
        yield from _zero_reasons(zero.settings)
    if pipeline is not None and pipeline.settings["schedule"] not in _STYLES:
        yield f"pipeline: schedule {pipeline.settings['schedule']!r} is not one of 1f1b and interleaved"
    if pipeline is not None and (pipeline.settings["first_fewer"] or pipeline.settings["last_fewer"]):
        yield "pipeline: Colossal-AI divides layers evenly, so first_fewer and last_fewer must be 0"
    if tensor is not None and tensor.settings["vocabulary"] == "whole":
        yield "tensor-parallel: Colossal-AI always shards embedding and head: vocabulary must not be 'whole'"


def _zero_reasons(knobs: Mapping[str, Any]) -> Iterator[str]:
    stage, offload, bucket = int(knobs["stage"]), str(knobs["offload"]), int(knobs["reduce_bucket_elements"])
    if stage == 3 and knobs["precision"] != "bf16":
        yield "zero: stage 3 is Gemini, which trains in half precision, so precision must be 'bf16'"
    if stage in (1, 2) and bucket % _MI:
        yield f"zero: Colossal-AI sizes buckets in {_MI} elements: reduce_bucket_elements must be a multiple"
    if stage in (1, 2) and offload == "parameters":
        yield "zero: Colossal-AI offloads parameters only in stage 3: offload must be 'none' or 'optimizer'"
    if knobs["nvme"] != "none":
        yield "zero: Colossal-AI's offload to NVMe is not supported: nvme must be 'none'"
    if stage == 0:
        yield "zero: Colossal-AI has no stage 0; the technique ddp is its equivalent"


def _asks_cuda(plan: Plan) -> tuple[str, ...]:
    name = plugin_of(plan)
    return (f"Colossal-AI's {name}",) if name not in {"", DDP} else ()


ENGINE = Engine(
    name="colossalai",
    summary="Colossal-AI's Booster: DDP, LowLevelZero, Gemini and HybridParallel plugins",
    distribution="colossalai",
    tested=("0.5", "0.6"),
    install="memfit doctor --install colossalai",
    requirements=("colossalai>=0.5,<0.6", "torch<=2.5.1"),
    carries=frozenset({"ddp", "zero", "tensor-parallel", "pipeline", "gradient-accumulation"}),
    applied_by_memfit=frozenset(
        {
            "activation-checkpointing",
            "selective-checkpointing",
            "chunked-cross-entropy",
            "adamw-fused",
            "adamw-single",
            "adafactor",
            "sgd",
            "bf16-autocast",
            "bf16-parameters",
        }
    ),
    applied_by_files=frozenset(),
    reasons=_reasons,
    asks_cuda=_asks_cuda,
    cuda_only=True,
    files=lambda spec: {CONFIG: json.dumps(config(spec.plan, spec.clip), indent=2) + "\n"},
)
