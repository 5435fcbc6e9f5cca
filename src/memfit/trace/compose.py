"""Deep models from shallow traces: jobs with fewer blocks, and whole traces made of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from memfit.techniques.blocks import find_blocks
from memfit.trace import tracer
from memfit.trace.unroll import Mismatch, unroll
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.plan import Plan
from memfit.types.trace import Trace

_TRIES = 3  # one block deeper each time


def with_blocks(job: Job, count: int) -> Job:
    """The same job whose model keeps its first ``count`` blocks only."""
    return dataclasses.replace(
        job, build_model=lambda: tracer.keep_blocks(job.build_model(), job.blocks, count)
    )


def deep_trace(job: Job, plan: Plan, **options: Any) -> Trace:
    """`trace` of a model with many equal blocks at the cost of a few: two shallow traces are unrolled, and
    their own agreement is the proof that this may be done. A model that is not so is traced whole."""
    found = _repeated(job)
    if found is None:
        return tracer.trace(job, plan, **options)
    path, count = found
    period = _period(plan)
    few = _first_depth(plan, period)
    few += (count - few) % period
    kept: dict[int, Trace] = {}
    for blocks in range(few, few + _TRIES * period, period):
        if count < 2 * blocks + 2 * period:
            break  # tracing it whole is as quick
        for depth in (blocks, blocks + period):
            if depth not in kept:
                kept[depth] = tracer.trace(job, plan, blocks=depth, **options)
        try:
            return unroll(
                kept[blocks], kept[blocks + period], path=path, period=period, blocks=blocks, count=count
            )
        except Mismatch:
            continue
    return tracer.trace(job, plan, **options)


def _repeated(job: Job) -> tuple[str, int] | None:
    model = tracer.fake_model(job)
    try:
        path, blocks = find_blocks(model, job.blocks)
    except UserError:
        return None
    equal = len({_shape(b) for b in blocks}) == 1
    return (path, len(blocks)) if equal and isinstance(model.get_submodule(path), tracer.CONTAINERS) else None


def _shape(block: torch.nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, p.shape) for name, p in block.named_parameters())


def _period(plan: Plan) -> int:
    recompute = plan.get("activation-checkpointing")
    return int(recompute.settings["every"]) if recompute else 1


def _first_depth(plan: Plan, period: int) -> int:
    """The first and the last block may differ from those between; prefetching makes more of them differ."""
    sharded = plan.get("fsdp2")
    return (4 + int(sharded.settings["prefetch"]) if sharded else 3) * period
