"""Megatron-core: tensor and sequence parallelism with its gradient buffers, for GPT-shaped jobs."""

from __future__ import annotations

from collections.abc import Iterator

from memfit.engines.base import Engine
from memfit.types.plan import Plan


def _reasons(plan: Plan) -> tuple[str, ...]:
    return tuple(_why_not(plan))


def _why_not(plan: Plan) -> Iterator[str]:
    accumulates = plan.get("gradient-accumulation") is not None
    for used in plan.uses:
        knobs = used.settings
        if used.technique == "tensor-parallel" and knobs["vocabulary"] != "gathered":
            yield "tensor-parallel: embedding and head are always cut, vocabulary must be 'gathered'"
        if used.technique == "activation-checkpointing" and knobs["every"] != 1:
            yield "activation-checkpointing: all layers are recomputed or none, every must be 1"
        if used.technique == "ddp" and knobs["bucket_view"] is False:
            yield "ddp: gradients are always views of its buffer, bucket_view must be true"
        if used.technique == "ddp" and accumulates and knobs["sync"] == "every":
            yield "ddp: gradients are reduced after the last micro-batch alone, sync must be 'last'"


ENGINE = Engine(
    name="megatron",
    summary="Megatron-core's GPTModel: tensor and sequence parallelism, gradient buffers, recomputation",
    distribution="megatron-core",
    tested=("0.16", "0.17"),
    install="pip install 'memfit[megatron]'",
    carries=frozenset({"ddp", "tensor-parallel", "activation-checkpointing", "gradient-accumulation"}),
    beside=frozenset({"adamw-8bit", "adamw-4bit", "adamw-fused", "adamw-single", "adafactor", "sgd"}),
    reasons=_reasons,
)
