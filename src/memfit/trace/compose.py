"""Whole traces of deep models and long pipelines, made of traces of shallow and short ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils import _pytree

from memfit.jobs.step import batch_length
from memfit.techniques.blocks import find_blocks
from memfit.techniques.world import layout
from memfit.trace import tracer
from memfit.trace.unroll import Blocks, Mismatch, unroll
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.plan import Plan, use
from memfit.types.trace import Allocation, Category, Phase, PhaseSpan, Trace

_TRIES = 3  # one block deeper each time


def deep_trace(job: Job, plan: Plan, *, rank: int = 0, **options: Any) -> Trace:
    """`trace` of a model with many equal blocks at the cost of a few: two shallow traces are unrolled, and
    their own agreement is the proof that this may be done. A model that is not so is traced whole.

    Of a pipeline (GPipe, 1F1B) the stage of ``rank`` is traced in a shorter pipeline with few
    micro-batches, and what a micro-batch keeps is there as often as micro-batches are in flight.
    """
    found = _repeated(job)
    if found is None:
        return tracer.trace(job, plan, rank=rank, **options)
    path, count = found
    line = shortened(job, plan, rank)
    if line is None:
        return tracer.trace(job, plan, rank=rank, **options)
    local = count // line.stages + (line.stage < count % line.stages)
    first = line.stage * (count // line.stages) + min(line.stage, count % line.stages)
    period = _period(plan)
    few = _first_depth(plan, period)
    few += (local - few) % period
    wanted = Blocks(path=path, first=first, count=local, period=period)
    kept: dict[int, Trace] = {}
    for blocks in range(few, few + _TRIES * period, period):
        if (2 * blocks + period) * line.short_micros >= local * line.micros:
            break  # tracing it whole is as quick
        for depth in (blocks, blocks + period):
            if depth not in kept:
                kept[depth] = line.trace(depth, **options)
        given = Blocks(path=path, first=line.short_stage * blocks, count=blocks, period=period)
        try:
            return line.filled(unroll(kept[blocks], kept[blocks + period], given, wanted))
        except Mismatch:
            continue
    return tracer.trace(job, plan, rank=rank, **options)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A stage of a pipeline, and the shorter pipeline that it is traced in. One stage: no pipeline."""

    job: Job
    plan: Plan
    rank: int
    stages: int = 1
    stage: int = 0
    short_job: Job
    short_plan: Plan
    short_rank: int
    short_stages: int = 1
    short_stage: int = 0
    micros: int = 1
    short_micros: int = 1
    missing: int = 0  # micro-batches in flight beyond those traced
    drained: int = 1  # the traced micro-batch that they end with, which is not the last

    def trace(self, depth: int, **options: Any) -> Trace:
        """With ``depth`` blocks on every stage."""
        job = tracer.with_blocks(self.short_job, depth * self.short_stages)
        return tracer.trace(job, self.short_plan, rank=self.short_rank, **options)

    def filled(self, trace: Trace) -> Trace:
        """With what the missing micro-batches keep: made with what the second one keeps, and there until
        the pipeline drains."""
        more = []
        for step in range(trace.steps if self.missing else 0):
            forwards = [s for s in trace.spans if s.step == step and s.phase is Phase.FORWARD]
            first, last = (_kept(trace, forwards[i]) for i in (1, self.drained))
            if [a.size_bytes for a in first] != [a.size_bytes for a in last]:
                raise Mismatch("micro-batches keep different bytes")
            pairs = zip(first, last, strict=True)
            more += [dataclasses.replace(a, end=b.end) for a, b in pairs] * self.missing
        return dataclasses.replace(
            trace, allocations=(*trace.allocations, *more), rank=self.rank, ranks=self.plan.ranks
        )


def _kept(trace: Trace, forward: PhaseSpan) -> list[Allocation]:
    """What a micro-batch's forward keeps for its backward."""
    return [
        a for a in trace.allocations
        if forward.start <= a.start < forward.end <= (a.end or 0) and a.category is Category.ACTIVATION
    ]  # fmt: skip


_IN_FLIGHT = {"gpipe": 3, "1f1b": 2}  # micro-batches that a shortened pipeline keeps


def shortened(job: Job, plan: Plan, rank: int) -> Line | None:
    """None where the schedule's micro-batches in flight are not those of a shorter pipeline."""
    used, place = plan.get("pipeline"), layout(plan)
    if used is None:
        return Line(job=job, plan=plan, rank=rank, short_job=job, short_plan=plan, short_rank=rank)
    stages, micros = place.pipeline, int(used.settings["micro_batches"])
    schedule = used.settings["schedule"]
    accumulated = plan.get("gradient-accumulation")
    parts = place.data * micros * (int(accumulated.settings["micro_batches"]) if accumulated else 1)
    if schedule not in _IN_FLIGHT or job.batch_size % parts:
        return None
    per_stage = plan.ranks // stages
    stage = rank // per_stage
    flying = micros if schedule == "gpipe" else min(micros, stages - stage)
    kept = min(flying, _IN_FLIGHT[schedule])
    short_stage = min(stage, 1)
    short_stages = short_stage + (kept if schedule == "1f1b" else 1 + (stage < stages - 1))
    short_stages = max(short_stages, 2)
    short_micros = min(micros, max(short_stages, kept + 2 * (schedule == "1f1b")))
    knobs = {**used.settings, "stages": short_stages, "micro_batches": short_micros}
    return Line(
        job=job,
        plan=plan,
        rank=rank,
        stages=stages,
        stage=stage,
        short_job=_first_rows(job, job.batch_size // micros * short_micros),
        short_plan=dataclasses.replace(
            plan.with_use(use("pipeline", **knobs)), ranks=per_stage * short_stages
        ),
        short_rank=short_stage * per_stage + rank % per_stage,
        short_stages=short_stages,
        short_stage=short_stage,
        micros=micros,
        short_micros=short_micros,
        missing=flying - kept,
        drained=1 if schedule == "gpipe" else 2,
    )


def _first_rows(job: Job, rows: int) -> Job:
    def make(step: int, seed: int) -> Any:
        batch = job.make_batch(step, seed)
        length = batch_length(batch)
        return _pytree.tree_map_only(
            torch.Tensor, lambda t: t[:rows] if t.dim() and t.shape[0] == length else t, batch
        )

    return dataclasses.replace(job, make_batch=make, batch_size=rows)


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
    ahead = int(sharded.settings["prefetch"]) if sharded else 0
    return (3, 4, 8, 10)[min(ahead, 3)] * period
