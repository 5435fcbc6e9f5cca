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


def _reasons(plan: Plan) -> Iterator[str]:
    accumulates = "gradient-accumulation" in plan
    for use in plan.uses:
        name, knobs = use.technique, use.settings
        for knob, value, reason in _ONLY.get(name, ()):
            if knobs[knob] != value:
                yield f"{name}: {reason}, so {knob} must be {value!r}"
        if accumulates and knobs.get("sync") == "every":
            yield f"{name}: Megatron reduces gradients after the last micro-batch, so sync must be 'last'"
        if name == "fsdp2" and layout(plan).shard > 1:
            yield (
                "fsdp2: Megatron shards only optimizer state (zero, stage 1), "
                "so replicas must be all data-parallel ranks"
            )


# Technique -> settings for which Megatron supports one value: (setting, value, reason).
_ONLY: Mapping[str, tuple[tuple[str, object, str], ...]] = {
    "tensor-parallel": (("vocabulary", "gathered", "Megatron always shards embedding and head"),),
    "pipeline": (
        ("first_fewer", 0, "layers are divided evenly"),
        ("last_fewer", 0, "layers are divided evenly"),
    ),
    "activation-checkpointing": (("every", 1, "Megatron recomputes either all layers or none"),),
    "ddp": (("bucket_view", True, "gradients are always views of Megatron's buffer"),),
    "fsdp2": (
        ("precision", "as-is", "Megatron does not shard parameters but replicates them"),
        ("offload", False, "Megatron does not offload replicas"),
    ),
    "zero": (
        ("stage", 1, "Megatron shards only optimizer state"),
        ("offload", "none", "Megatron does not offload optimizer state"),
    ),
    "bf16-parameters": (("rounding", "master", "Megatron keeps fp32 master weights"),),
}


def _asks_cuda(plan: Plan) -> tuple[str, ...]:
    parts = {
        "zero": "Megatron's distributed optimizer",
        "bf16-parameters": "Megatron's optimizer of fp32 master weights",
        "pipeline": "Megatron's pipeline schedule",
        "context-parallel": "Megatron's context-parallel attention",
    }
    return tuple(parts[u.technique] for u in plan.uses if u.technique in parts)


def arguments(spec: RunSpec) -> dict[str, str]:
    """Return the options of Megatron-LM's trainer for the run, name without dashes -> value; the value of a
    switch is "". The options for the sizes of the model are left out if ``spec.sizes`` is empty, and those
    for the sizes of batches if ``spec.batch_size`` is 0. The seed is ``spec.seed`` + 1, because Megatron-LM
    requires one above 0."""
    mesh = layout(spec.plan)
    return {
        **spec.sizes,
        **_degrees(spec.plan, mesh, spec.sizes),
        **_data_parallel(spec.plan),
        **_batches(spec, mesh),
        "optimizer": "sgd" if "sgd" in spec.plan else "adam",
        "train-iters": str(spec.steps),
        "seed": str(spec.seed + 1),
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


def _degrees(plan: Plan, mesh: Layout, sizes: Mapping[str, str]) -> dict[str, str]:
    options = {
        "tensor-model-parallel-size": str(mesh.tensor),
        "pipeline-model-parallel-size": str(mesh.pipeline),
        "context-parallel-size": str(mesh.context),
    }
    tensor, pipeline = plan.get("tensor-parallel"), plan.get("pipeline")
    if tensor is not None and tensor.settings["sequence"] and mesh.tensor > 1:
        options["sequence-parallel"] = ""
    virtual = int(pipeline.settings["virtual"]) if pipeline is not None else 1
    if virtual > 1 and "num-layers" in sizes:
        options["num-layers-per-virtual-pipeline-stage"] = str(
            int(sizes["num-layers"]) // (mesh.pipeline * virtual)
        )
    elif virtual > 1:
        options["num-virtual-stages-per-pipeline-rank"] = str(virtual)
    if "activation-checkpointing" in plan:
        options |= {
            "recompute-granularity": "full",
            "recompute-method": "uniform",
            "recompute-num-layers": "1",
        }
    return options


def _data_parallel(plan: Plan) -> dict[str, str]:
    options: dict[str, str] = {}
    ddp, zero = plan.get("ddp"), plan.get("zero")
    if ddp is not None:
        elements = int(ddp.settings["bucket_mib"]) * 2**20 // _GRADIENT_BYTES
        options |= {"overlap-grad-reduce": "", "ddp-bucket-size": str(elements)}
    if zero is not None:
        options["use-distributed-optimizer"] = ""
        if zero.settings["overlap"]:
            bucket = str(zero.settings["reduce_bucket_elements"])
            options |= {"overlap-grad-reduce": "", "ddp-bucket-size": bucket}
    if "bf16-parameters" in plan or (zero is not None and zero.settings["precision"] == "bf16"):
        options["bf16"] = ""
    return options


def _batches(spec: RunSpec, mesh: Layout) -> dict[str, str]:
    if not spec.batch_size:
        return {}
    pipeline = spec.plan.get("pipeline")
    parts = mesh.data * spec.plan.micro_batches
    parts *= int(pipeline.settings["micro_batches"]) if pipeline is not None else 1
    micro_batch_size = spec.batch_size // parts
    return {"micro-batch-size": str(max(1, micro_batch_size)), "global-batch-size": str(spec.batch_size)}


def options_text(options: Mapping[str, object]) -> str:
    """Return the text of megatron.args: one line for each option, such as "--num-layers 12", for
    ``pretrain_gpt.py $(cat megatron.args) --data-path ...``. ``options``: name without dashes -> value, ""
    for a switch, as `parse` returns them."""
    return "".join(f"--{name} {value}".rstrip() + "\n" for name, value in options.items())


def parse(text: str) -> dict[str, str]:
    """Return the options in the text of megatron.args, as `options_text` makes it: name without dashes ->
    value as text, "" for a switch."""
    pairs = (line.removeprefix("--").partition(" ") for line in text.splitlines())
    return {name: value for name, _, value in pairs}


_CARRIES = frozenset(
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
)
ENGINE = Engine(
    name="megatron",
    summary="Megatron-core's GPTModel: tensor and sequence parallelism, gradient buffers, recomputation",
    distribution="megatron-core",
    module="megatron.core",
    tested=("0.16", "0.17"),
    install="pip install 'memfit[megatron]'",
    carries=_CARRIES,
    applied_by_memfit=frozenset({"adamw-fused", "adamw-single", "sgd"}),
    applied_by_files=_CARRIES | {"sgd", "clipping"},
    reasons=_reasons,
    asks_cuda=_asks_cuda,
    cuda_only=True,
    files=lambda spec: {CONFIG: options_text(arguments(spec))},
    env={"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    own_trace=True,
)
