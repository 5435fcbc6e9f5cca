"""Trace a stage of a long pipeline in a shorter one, and add the memory of the micro-batches that the shorter
one lacks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils import _pytree

from memfit.model.batch_objects import batch_length
from memfit.techniques.rank_mesh import layout
from memfit.trace import tracer
from memfit.trace.truncated_model import with_blocks
from memfit.trace.unroll import Mismatch
from memfit.types.job import Job
from memfit.types.plan import Plan, use
from memfit.types.trace import Allocation, Category, Phase, PhaseSpan, Trace


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PipelineRank:
    """One rank of a pipeline, and the shorter pipeline (fewer ranks and micro-batches) in which it is traced.

    Fields that begin with ``short_`` describe the shorter pipeline, the other ones the whole. ``stages`` is
    the number of ranks along the pipeline, ``stage`` this rank's index among them. ``virtual`` is the number
    of model chunks per rank, ``micros`` the number of micro-batches. ``missing`` is, for each chunk, the
    number of micro-batches in flight that are not traced; ``fewer`` is the number of blocks that the last
    stages of the shorter pipeline lack. If the plan has no pipeline, ``stages`` is 1 and the shorter pipeline
    is the plan itself.
    """

    job: Job
    plan: Plan
    rank: int
    stages: int = 1
    stage: int = 0
    virtual: int = 1
    short_job: Job
    short_plan: Plan
    short_rank: int
    short_stages: int = 1
    short_stage: int = 0
    micros: int = 1
    short_micros: int = 1
    missing: tuple[int, ...] = (0,)
    fewer: int = 0

    def own_blocks(self, count: int) -> list[int]:
        """Return the indices of this rank's blocks, chunk by chunk, in a model of ``count`` blocks."""
        return _numbers(count, self.stages, self.stage, self.virtual)

    def short_blocks(self, depth: int) -> list[int]:
        """Return the indices of this rank's blocks, chunk by chunk, in the short pipeline, whose model has
        ``depth`` blocks per stage, minus ``fewer`` blocks in all."""
        return _numbers(self._short_count(depth), self.short_stages, self.short_stage, self.virtual)

    def depth(self, count: int) -> int:
        """Return how many blocks per stage the short pipeline must have so that this rank holds as many
        blocks in it as in the whole pipeline, for a model of ``count`` blocks: the number of chunks per rank
        times the number of blocks in this rank's largest chunk."""
        sizes = _of_rank(count, self.stages, self.stage, self.virtual)
        return max(sizes) * self.virtual

    def _short_count(self, depth: int) -> int:
        return depth * self.short_stages - self.fewer

    def trace(self, depth: int, **options: Any) -> Trace:
        """Return the trace of this rank in the short pipeline, in a model cut to ``depth`` blocks per stage,
        minus ``fewer`` blocks in all. ``options`` are those of `tracer.trace` except ``rank``. Raises what
        `tracer.trace` raises."""
        job = with_blocks(self.short_job, self._short_count(depth))
        return tracer.trace(job, self.short_plan, rank=self.short_rank, **options)

    def fill_in(self, trace: Trace) -> Trace:
        """Return ``trace``, one of the short pipeline, as that of this rank in the whole plan: with this
        rank's number, the number of ranks, and the memory and number of the micro-batches that were not
        traced. Without a pipeline, only the rank and the number of ranks are set. Raises Mismatch if
        micro-batches receive tensors of different sizes."""
        result, extra_micros = dataclasses.replace(trace, rank=self.rank, ranks=self.plan.ranks), 0
        if self.stages > 1:
            extra_micros = self.micros - self.short_micros
            micro_steps = len(_spans(trace, trace.steps - 1, Phase.BACKWARD)) // len(self.missing)
            repeated_micro_steps = (
                micro_steps // self.short_micros + trace.repeated_micro_steps
            ) * self.micros - micro_steps
        if self.stages == 1 or not repeated_micro_steps:
            return result
        extra_allocations, repeated_spans = self._buffers(trace) * extra_micros, tuple[PhaseSpan, ...]()
        for step in range(trace.steps):
            forwards, backwards = (_spans(trace, step, p) for p in (Phase.FORWARD, Phase.BACKWARD))
            if not backwards:  # the step was replaced by an optimizer step (`optimizer_steps_only`)
                continue
            # An extra span before the first forward, which in the first step makes the receive buffers.
            has_receive_span = len(forwards) > len(backwards)
            second_micros = [
                c * self.short_micros + min(1, self.short_micros - 1) for c in range(len(self.missing))
            ]
            second_forwards, second_backwards = (
                [forwards[has_receive_span + index] for index in second_micros],
                [backwards[index] for index in second_micros[::-1]],
            )
            for forward, backward, missing in zip(
                second_forwards, second_backwards, self.missing, strict=True
            ):
                short_lived, long_lived = _outliving_allocations(trace, forward, backwards[-1].start)
                # The second backward adds to existing gradients and reduces nothing, like all but the first
                # and the last.
                extra_allocations += [
                    dataclasses.replace(a, end=backward.end - 1) for a in short_lived
                ] * missing + long_lived * extra_micros
            repeated_spans = (*second_forwards, *second_backwards)
        return dataclasses.replace(
            result,
            allocations=(*trace.allocations, *extra_allocations),
            repeated_micro_steps=repeated_micro_steps,
            repeated_spans=repeated_spans,
        )

    def _buffers(self, trace: Trace) -> list[Allocation]:
        """Return the buffers into which a rank receives the tensors of one micro-batch. They stay allocated
        (torch's PipelineStage makes those of all micro-batches at the start). Raises Mismatch if
        micro-batches receive different sizes."""
        forward = next(s for s in trace.spans if s.phase is Phase.FORWARD)
        buffers = [
            a
            for a in trace.allocations
            if forward.start <= a.start < forward.end and a.end is None and a.category is Category.ACTIVATION
        ]
        micro_buffers = buffers[:: self.short_micros]
        if [a.size_bytes for a in buffers] != [
            a.size_bytes for a in micro_buffers for _ in range(self.short_micros)
        ]:
            raise Mismatch("micro-batches receive tensors of different sizes")
        return micro_buffers


def _spans(trace: Trace, step: int, phase: Phase) -> list[PhaseSpan]:
    return [s for s in trace.spans if s.step == step and s.phase is phase]


def _outliving_allocations(
    trace: Trace, forward: PhaseSpan, last_backward: int
) -> tuple[list[Allocation], list[Allocation]]:
    """Return two lists of the allocations that are made in the span ``forward`` of a micro-batch and outlive
    it: (those that are freed before the clock ``last_backward``, as by the micro-batch's backward; those that
    are freed later, such as its loss). Allocations that are never freed, and inputs, are left out."""
    allocations = [
        a
        for a in trace.allocations
        if forward.start <= a.start < forward.end <= (a.end or 0) and a.category is not Category.INPUT
    ]
    return [a for a in allocations if (a.end or 0) < last_backward], [
        a for a in allocations if (a.end or 0) >= last_backward
    ]


_IN_FLIGHT = {"gpipe": 3, "1f1b": 2}  # micro-batches in flight in a shortened pipeline
_ROUND = 3  # stages of a shortened interleaved pipeline: a first, a last and one in between


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Short:
    """Shape of the shorter pipeline. ``stages``, ``stage`` and ``micros`` are the ``short_`` fields of
    `PipelineRank`; ``missing`` and ``fewer`` are its fields of these names."""

    stages: int
    stage: int
    micros: int
    missing: tuple[int, ...]
    fewer: int = 0


def shorten_pipeline(job: Job, plan: Plan, rank: int, blocks: int) -> PipelineRank | None:
    """Return ``rank`` of ``plan`` with the shorter pipeline in which it is traced, for a model with
    ``blocks`` blocks. If the plan has no pipeline, the result's short plan is the plan itself. Return None if
    no shorter pipeline can stand for the schedule (it is none of GPipe, 1F1B and some interleaved ones), if
    the first or the last stage has fewer blocks by choice, or if the batch does not divide into equal
    micro-batches. Raises what `layout` raises."""
    pipeline, place = plan.get("pipeline"), layout(plan)
    if pipeline is None:
        return PipelineRank(job=job, plan=plan, rank=rank, short_job=job, short_plan=plan, short_rank=rank)
    if pipeline.settings.get("first_fewer") or pipeline.settings.get("last_fewer"):
        return None
    stages, micros = place.pipeline, int(pipeline.settings["micro_batches"])
    schedule = pipeline.settings["schedule"]
    parts = place.data * micros * plan.micro_batches
    ranks_per_stage = plan.ranks // stages
    stage = rank // ranks_per_stage
    if schedule == "interleaved":
        short = _interleaved_shape(stages, stage, micros, int(pipeline.settings["virtual"]), blocks)
    else:
        short = _straight(str(schedule), stages, stage, micros)
    if short is None or job.batch_size % parts:
        return None
    knobs = {**pipeline.settings, "stages": short.stages, "micro_batches": short.micros}
    return PipelineRank(
        job=job,
        plan=plan,
        rank=rank,
        stages=stages,
        stage=stage,
        virtual=int(pipeline.settings["virtual"]),
        short_job=_first_rows(job, job.batch_size // micros * short.micros),
        short_plan=dataclasses.replace(
            plan.with_use(use("pipeline", **knobs)), ranks=ranks_per_stage * short.stages
        ),
        short_rank=short.stage * ranks_per_stage + rank % ranks_per_stage,
        short_stages=short.stages,
        short_stage=short.stage,
        micros=micros,
        short_micros=short.micros,
        missing=short.missing,
        fewer=short.fewer,
    )


def _straight(schedule: str, stages: int, stage: int, micros: int) -> _Short | None:
    if schedule not in _IN_FLIGHT:
        return None
    in_flight = micros if schedule == "gpipe" else min(micros, stages - stage)
    short_in_flight = min(in_flight, _IN_FLIGHT[schedule])
    short_stage = min(stage, 1)
    short_stages = max(2, short_stage + (short_in_flight if schedule == "1f1b" else 1 + (stage < stages - 1)))
    short_micros = min(micros, max(short_stages, 3))  # a first, a last and one in between
    return _Short(
        stages=short_stages, stage=short_stage, micros=short_micros, missing=(in_flight - short_in_flight,)
    )


def _interleaved_shape(stages: int, stage: int, micros: int, virtual: int, blocks: int) -> _Short | None:
    """Return the shape of a pipeline of three stages for an interleaved schedule with as many micro-batches
    as stages, in which a rank runs all micro-batches of one chunk in a row.

    On the first two ranks all forward passes come before the first backward pass. The last rank starts a
    backward pass right after the forward pass of its last chunk (`cost.schedules`). Return None for a stage
    that is neither of the first two nor the last, for other numbers of micro-batches, for three stages or
    fewer, and if no such pipeline gives the rank the same number of blocks per chunk.
    """
    is_last = stage == stages - 1
    if micros != stages or stages <= _ROUND or not (stage < 2 or is_last):
        return None
    short_stage = _ROUND - 1 if is_last else stage
    block_counts = _of_rank(blocks, stages, stage, virtual)
    max_blocks = max(block_counts) * _ROUND * virtual
    candidates = (
        f
        for f in range(_ROUND * virtual)
        if _of_rank(max_blocks - f, _ROUND, short_stage, virtual) == block_counts
    )
    fewer = next(candidates, None)
    if fewer is None:
        return None
    missing = [stages - _ROUND] * (virtual - is_last) + [0] * is_last
    return _Short(stages=_ROUND, stage=short_stage, micros=_ROUND, missing=tuple(missing), fewer=fewer)


def _numbers(blocks: int, stages: int, stage: int, virtual: int) -> list[int]:
    """Return the indices, in the model, of the blocks of the rank at ``stage``, chunk by chunk. ``blocks`` is
    the number of the model's blocks, ``virtual`` the number of chunks per rank."""
    chunk_blocks, remainder = divmod(blocks, stages * virtual)
    sizes = zip(range(stage, stages * virtual, stages), _of_rank(blocks, stages, stage, virtual), strict=True)
    return [chunk_blocks * chunk + min(chunk, remainder) + i for chunk, size in sizes for i in range(size)]


def _of_rank(blocks: int, stages: int, stage: int, virtual: int) -> list[int]:
    """Return the number of blocks in each chunk of the rank at ``stage``. ``blocks`` is the number of the
    model's blocks, ``virtual`` the number of chunks per rank."""
    chunk_blocks, remainder = divmod(blocks, stages * virtual)
    return [chunk_blocks + (chunk < remainder) for chunk in range(stage, stages * virtual, stages)]


def _first_rows(job: Job, rows: int) -> Job:
    def make(step: int, seed: int) -> Any:
        batch = job.make_batch(step, seed)
        length = batch_length(batch)
        return _pytree.tree_map_only(
            torch.Tensor, lambda t: t[:rows] if t.dim() and t.shape[0] == length else t, batch
        )

    return dataclasses.replace(job, make_batch=make, batch_size=rows)
