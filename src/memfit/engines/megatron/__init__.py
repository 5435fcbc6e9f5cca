"""Megatron-core for GPT-shaped jobs, configured by the arguments of Megatron-LM's trainer.

Names are those of megatron/training/arguments.py (core 0.16). The trainer needs the sizes of the model, which
`RunSpec.sizes` holds under the trainer's own names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from memfit.engines.base import Engine
from memfit.techniques.rank_mesh import Layout, layout
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan

CONFIG = "megatron.args"
_GRADIENT_BYTES = 4  # Megatron's gradient buffers are fp32


def _reasons(plan: Plan) -> tuple[str, ...]:
    return tuple(_why_not(plan))


def _why_not(plan: Plan) -> Iterator[str]:
    accumulates = plan.get("gradient-accumulation") is not None
    for used in plan.uses:
        name, knobs = used.technique, used.settings
        for knob, value, why in _ONLY.get(name, ()):
            if knobs[knob] != value:
                yield f"{name}: {why}, {knob} must be {value!r}"
        if accumulates and knobs.get("sync") == "every":
            yield f"{name}: gradients are reduced after the last micro-batch alone, sync must be 'last'"
        if name == "fsdp2" and layout(plan).shard > 1:
            yield "fsdp2: it shards optimizer state alone (zero, stage 1); replicas must be all data ranks"


# Technique -> settings for which Megatron supports one value: (setting, value, reason).
_ONLY: Mapping[str, tuple[tuple[str, object, str], ...]] = {
    "tensor-parallel": (("vocabulary", "gathered", "embedding and head are always cut"),),
    "activation-checkpointing": (("every", 1, "all layers are recomputed or none"),),
    "ddp": (("bucket_view", True, "gradients are always views of its buffer"),),
    "fsdp2": (("precision", "as-is", "replicas are what is meant"), ("offload", False, "replicas stay")),
    "zero": (("stage", 1, "it shards optimizer state alone"), ("offload", "none", "states stay")),
    "bf16-parameters": (("rounding", "master", "it keeps fp32 masters"),),
}


def _asks_cuda(plan: Plan) -> tuple[str, ...]:
    parts = {
        "zero": "its distributed optimizer",
        "bf16-parameters": "its optimizer of fp32 masters",
        "pipeline": "its pipeline schedule",
        "context-parallel": "its context-parallel attention",
    }
    return tuple(parts[u.technique] for u in plan.uses if u.technique in parts)


def arguments(spec: RunSpec) -> dict[str, str]:
    """Return the trainer's options, name -> value; the value of a switch is ""."""
    place = layout(spec.plan)
    return {
        **spec.sizes,
        **_degrees(spec.plan, place, spec.sizes),
        **_data_parallel(spec.plan, place),
        **_batches(spec, place),
        **_step(spec),
        **_ALWAYS,
        **({"clip-grad": str(spec.clip)} if spec.clip else {}),
    }


# Options that make the trainer match the job's own step where its defaults differ.
_ALWAYS: Mapping[str, str] = {
    "hidden-dropout": "0.0",
    "attention-dropout": "0.0",
    "no-bias-gelu-fusion": "",  # the fused GELU is the tanh approximation
    "make-vocab-size-divisible-by": "1",
}


def _degrees(plan: Plan, place: Layout, sizes: Mapping[str, str]) -> dict[str, str]:
    found = {
        "tensor-model-parallel-size": str(place.tensor),
        "pipeline-model-parallel-size": str(place.pipeline),
        "context-parallel-size": str(place.context),
    }
    tensor, stages = plan.get("tensor-parallel"), plan.get("pipeline")
    if tensor is not None and tensor.settings["sequence"] and place.tensor > 1:
        found["sequence-parallel"] = ""
    virtual = int(stages.settings["virtual"]) if stages is not None else 1
    if virtual > 1 and "num-layers" in sizes:
        found["num-layers-per-virtual-pipeline-stage"] = str(
            int(sizes["num-layers"]) // (place.pipeline * virtual)
        )
    elif virtual > 1:
        found["num-virtual-stages-per-pipeline-rank"] = str(virtual)
    if plan.get("activation-checkpointing") is not None:
        found |= {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": "1"}
    return found


def _data_parallel(plan: Plan, place: Layout) -> dict[str, str]:
    found: dict[str, str] = {}
    ddp, zero = plan.get("ddp"), plan.get("zero")
    if ddp is not None:
        elements = int(ddp.settings["bucket_mib"]) * 2**20 // _GRADIENT_BYTES
        found |= {"overlap-grad-reduce": "", "ddp-bucket-size": str(elements)}
    if zero is not None:
        found["use-distributed-optimizer"] = ""
        if zero.settings["overlap"]:
            bucket = str(zero.settings["reduce_bucket_elements"])
            found |= {"overlap-grad-reduce": "", "ddp-bucket-size": bucket}
    if plan.get("bf16-parameters") is not None or (zero is not None and zero.settings["precision"] == "bf16"):
        found["bf16"] = ""
    return found


def _batches(spec: RunSpec, place: Layout) -> dict[str, str]:
    if not spec.batch_size:
        return {}
    parts = [
        int(used.settings["micro_batches"])
        for name in ("gradient-accumulation", "pipeline")
        if (used := spec.plan.get(name)) is not None
    ]
    micro = spec.batch_size // place.data
    for count in parts:
        micro //= count
    return {"micro-batch-size": str(max(1, micro)), "global-batch-size": str(spec.batch_size)}


def _step(spec: RunSpec) -> dict[str, str]:
    sgd = spec.plan.get("sgd") is not None
    return {"optimizer": "sgd" if sgd else "adam", "train-iters": str(spec.steps), "seed": str(spec.seed + 1)}


def _files(spec: RunSpec) -> dict[str, str]:
    """Return a file with one option per line, for ``pretrain_gpt.py $(cat megatron.args) --data-path ...``"""
    return {CONFIG: "".join(f"--{k} {v}".rstrip() + "\n" for k, v in arguments(spec).items())}


def parse(text: str) -> dict[str, str]:
    """Parse the text of a file that `_files` has written: option -> value."""
    pairs = (line.removeprefix("--").partition(" ") for line in text.splitlines())
    return {name: value for name, _, value in pairs}


ENGINE = Engine(
    name="megatron",
    summary="Megatron-core's GPTModel: tensor and sequence parallelism, gradient buffers, recomputation",
    distribution="megatron-core",
    tested=("0.16", "0.17"),
    install="pip install 'memfit[megatron]'",
    carries=frozenset(
        {
            "ddp",
            "fsdp2",
            "zero",
            "tensor-parallel",
            "pipeline",
            "context-parallel",
            "activation-checkpointing",
            "bf16-parameters",
            "gradient-accumulation",
        }
    ),
    beside=frozenset({"adamw-fused", "adamw-single", "sgd"}),
    reasons=_reasons,
    asks_cuda=_asks_cuda,
    files=_files,
    env={"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    own_trace=True,
)
