"""A stage of a long pipeline traced in a short one, and the memory of the micro-batches that it lacks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils import _pytree

from memfit.jobs.step import batch_length
from memfit.techniques.world import layout
from memfit.trace import tracer
from memfit.trace.few_blocks import with_blocks
from memfit.trace.unroll import Mismatch
from memfit.types.job import Job
from memfit.types.plan import Plan, use
from memfit.types.trace import Allocation, Category, Phase, PhaseSpan, Trace


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

    def trace(self, depth: int, **options: Any) -> Trace:
        """With ``depth`` blocks on every stage."""
        job = with_blocks(self.short_job, depth * self.short_stages)
        return tracer.trace(job, self.short_plan, rank=self.short_rank, **options)

    def filled(self, trace: Trace) -> Trace:
        """With the memory of the micro-batches that were not traced."""
        beyond = self.micros - self.short_micros
        more = self._buffers(trace) * beyond
        for step in range(trace.steps if beyond else 0):
            spans = [s for s in trace.spans if s.step == step and s.phase is not Phase.SETUP]
            forwards, backwards = (
                [s for s in spans if s.phase is phase] for phase in (Phase.FORWARD, Phase.BACKWARD)
            )
            kept, left = _kept(trace, forwards[1], backwards[-1].start)
            # The second backward has gradients to add to and nothing to reduce, as all but two have.
            in_flight = [dataclasses.replace(a, end=backwards[1].end - 1) for a in kept]
            more += in_flight * self.missing + left * beyond
        return dataclasses.replace(
            trace,
            allocations=(*trace.allocations, *more),
            rank=self.rank,
            ranks=self.plan.ranks,
            repeated_micro_steps=trace.repeated_micro_steps + beyond,
        )

    def _buffers(self, trace: Trace) -> list[Allocation]:
        """What each micro-batch is received into; it stays (torch's PipelineStage makes it at the start)."""
        forward = next(s for s in trace.spans if s.phase is Phase.FORWARD)
        made = [
            a for a in trace.allocations
            if forward.start <= a.start < forward.end and a.end is None and a.category is Category.ACTIVATION
        ]  # fmt: skip
        ones = made[:: self.short_micros]
        if [a.size_bytes for a in made] != [a.size_bytes for a in ones for _ in range(self.short_micros)]:
            raise Mismatch("micro-batches receive different bytes")
        return ones


def _kept(trace: Trace, forward: PhaseSpan, last: int) -> tuple[list[Allocation], list[Allocation]]:
    """What a micro-batch's forward keeps for its backward, and what until the ``last`` one, such as its
    loss."""
    kept = [
        a for a in trace.allocations
        if forward.start <= a.start < forward.end <= (a.end or 0) and a.category is not Category.INPUT
    ]  # fmt: skip
    return [a for a in kept if (a.end or 0) < last], [a for a in kept if (a.end or 0) >= last]


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
    short_micros = min(micros, max(short_stages, 3))  # a first, a last and one between
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
    )


def _first_rows(job: Job, rows: int) -> Job:
    def make(step: int, seed: int) -> Any:
        batch = job.make_batch(step, seed)
        length = batch_length(batch)
        return _pytree.tree_map_only(
            torch.Tensor, lambda t: t[:rows] if t.dim() and t.shape[0] == length else t, batch
        )

    return dataclasses.replace(job, make_batch=make, batch_size=rows)
