"""Build whole traces of deep models and long pipelines from traces of shallow and short ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from memfit.model.blocks import attribute_period, child_prefix, find_blocks
from memfit.techniques import fp32_modules
from memfit.trace import tracer
from memfit.trace.short_pipeline import PipelineRank, shorten_pipeline
from memfit.trace.trace_pool import run_parallel
from memfit.trace.truncated_model import CONTAINERS
from memfit.trace.unroll import Blocks, Mismatch, renumber_blocks, unroll
from memfit.types.deadline import Deadline
from memfit.types.device_kind import HOST, device_kind
from memfit.types.errors import UserError
from memfit.types.gc_pause import pause_gc
from memfit.types.job import Job
from memfit.types.plan import Plan
from memfit.types.trace import Trace

_TRIES = 3  # each is one period deeper
# Number of parameters, or of tensors of parameters, above which two processes are faster than one
_LARGE, _MANY_TENSORS = 500_000_000, 1_000


def deep_trace(job: Job, plan: Plan, *, rank: int = 0, **options: Any) -> Trace:
    """Return the trace of one rank of a plan, made as `traces_of` describes. ``options`` are those of
    `deep_traces`. Raises what `traces_of` raises."""
    return deep_traces(job, plan, [rank], **options)[0]


def deep_traces(
    job: Job, plan: Plan, ranks: Sequence[int], *, deadline: Deadline | None = None, **options: Any
) -> list[Trace]:
    """Return the traces of several ranks of one plan, in the order of ``ranks``. Those of models with many
    equal blocks are built from traces with few blocks, as `traces_of` describes. ``options`` are those of
    `trace` except ``rank``. ``deadline``: as in `traces_of`. Raises what `traces_of` raises."""
    return traces_of(job, [(plan, rank) for rank in ranks], deadline=deadline, **options)


@pause_gc()
def traces_of(
    job: Job, requests: Sequence[tuple[Plan, int]], *, deadline: Deadline | None = None, **options: Any
) -> list[Trace]:
    """Return a `trace` for each (plan, rank) pair, in their order, at the cost of a few blocks for models
    with many equal blocks. ``options`` are those of `trace` except ``rank``. Raises what `trace` raises, and
    TimeUp if ``deadline`` passes before traces of a large model are finished; None: there is no deadline.

    The model is traced twice with few blocks, and the events of a middle block are repeated up to the full
    depth (`unroll`), or those of several adjacent blocks if the plan or attributes of the blocks repeat with
    such a period. That the shallower trace, unrolled to the depth of the deeper one, equals that one
    proves that this is valid. Where it is not valid or not less work, as for models without equal blocks, or
    where the model does not run with fewer blocks, the model is traced whole.

    For a pipeline (GPipe, 1F1B, or interleaved with as many micro-batches as stages), a rank is traced in a
    shorter pipeline with few micro-batches, and the memory that a micro-batch keeps is repeated for each
    micro-batch in flight. Ranks and plans with the same shorter trace share it.
    """
    model = tracer.fake_model(job)
    blocks = find_repeated_blocks(model, job)
    cpu = device_kind(options.get("device", HOST)).is_host
    deep_ranks = [
        _Deep.of(job, plan, rank, *blocks) if blocks and _repeats(plan, cpu=cpu) else None
        for plan, rank in requests
    ]
    calls: dict[Any, Callable[[], Trace]] = {}
    for (plan, rank), deep_rank in zip(requests, deep_ranks, strict=True):
        if deep_rank is None:
            calls["whole", plan, rank] = partial(tracer.trace, job, plan, rank=rank, **options)
        else:
            calls |= {
                deep_rank.key(d): partial(_or_none, deep_rank.pipe.trace, d, **options)
                for d in deep_rank.depths()[:2]
            }
    sizes = [p.numel() for p in model.parameters()]
    large = sum(sizes) >= _LARGE or len(sizes) >= _MANY_TENSORS
    del model
    results = (
        run_parallel(list(calls.values()), deadline=deadline)
        if large
        else [call() for call in calls.values()]
    )
    traces = dict(zip(calls, results, strict=True))
    rank_traces = []
    for (plan, rank), deep_rank in zip(requests, deep_ranks, strict=True):
        if deep_rank is None:
            rank_traces.append(traces["whole", plan, rank])
        elif all(traces[deep_rank.key(d)] is not None for d in deep_rank.depths()[:2]):
            rank_traces.append(deep_rank.unrolled(traces, options))
        else:
            rank_traces.append(tracer.trace(job, plan, rank=rank, **options))
    return rank_traces


def _or_none(run: Callable[..., Trace], *args: Any, **options: Any) -> Trace | None:
    """Return ``run(*args, **options)``, a trace, or None if it raises an Exception, as where a model uses the
    outputs of certain blocks by number and has fewer blocks here. The whole trace, which the caller then
    makes, raises errors that have another cause."""
    try:
        return run(*args, **options)
    except Exception:  # noqa: BLE001  any error of the user's model; the whole trace then shows it
        return None


def _repeats(plan: Plan, *, cpu: bool) -> bool:
    """Return whether traces under ``plan`` may be built from traces with fewer blocks. False under
    optimal-checkpointing, which recomputes different operators in each block, and for a pipeline on a CPU
    (``cpu``), where each rank builds the whole model, and the peak may be there."""
    return "optimal-checkpointing" not in plan and not (cpu and plan.get("pipeline"))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Deep:
    """One rank of a model whose repeated blocks need not all be traced. ``pipe`` is the rank and its shorter
    pipeline. ``first_depth`` is the number of blocks (per stage of a pipeline) of the first shallow trace."""

    pipe: PipelineRank
    blocks: Blocks  # the rank's blocks
    first_depth: int
    # Set if all of the rank's blocks are traced, because two shallow traces would have more of them: maps
    # their indices in the short pipeline to those in the whole one.
    numbers: dict[int, int] | None = None

    @staticmethod
    def of(job: Job, plan: Plan, rank: int, path: str, count: int, model_period: int) -> _Deep | None:
        pipe = shorten_pipeline(job, plan, rank, count)
        if pipe is None or not (indices := pipe.own_blocks(count)):
            return None  # the whole trace refuses a stage without blocks
        period = math.lcm(_period(plan), model_period)
        first_depth = _first_depth(plan, period)
        first_depth += (len(indices) - first_depth) % period
        rank_blocks = Blocks(path=path, first=indices[0], count=len(indices), period=period)
        deep = _Deep(pipe=pipe, blocks=rank_blocks, first_depth=first_depth)
        if pipe.stages > 1 and (pipe.virtual > 1 or len(indices) <= 2 * first_depth + period):
            numbers = dict(zip(pipe.short_blocks(pipe.depth(count)), indices, strict=True))
            are_aligned = all((short_index - index) % period == 0 for short_index, index in numbers.items())
            deep = dataclasses.replace(deep, numbers=numbers, first_depth=pipe.depth(count))
            has_fewer_blocks = len(indices) * pipe.short_stages <= count
            is_worth = pipe.short_micros < pipe.micros and has_fewer_blocks and are_aligned
        else:
            bucketed = any(map(plan.get, ("ddp", "zero", "sharded-ddp")))  # buckets span blocks
            is_aligned = (pipe.short_stage * first_depth - indices[0]) % period == 0
            is_worth = not bucketed and is_aligned and deep._is_worth(first_depth)
        return deep if is_worth else None

    def depths(self) -> range:
        """Return the numbers of blocks (per stage of a pipeline) of the shallow traces that may be made: at
        most four, each one period deeper than the one before. Each trace is unrolled to the next one and
        compared with it, until two are equal. If all of the rank's blocks are traced (``numbers``), there is
        only one."""
        period = self.blocks.period
        if self.numbers:
            return range(self.first_depth, self.first_depth + 1)
        return range(self.first_depth, self.first_depth + (_TRIES + 1) * period, period)

    def key(self, depth: int) -> Any:
        return self.pipe.short_plan, self.pipe.short_rank, self.pipe.short_job.batch_size, depth

    def unrolled(self, kept: dict[Any, Trace], options: dict[str, Any]) -> Trace:
        pipe, rank_blocks = self.pipe, self.blocks
        if self.numbers:
            try:
                return pipe.fill_in(
                    renumber_blocks(kept[self.key(self.first_depth)], rank_blocks.path, self.numbers)
                )
            except Mismatch:
                return tracer.trace(pipe.job, pipe.plan, rank=pipe.rank, **options)
        for depth, deeper in pairwise(self.depths()):
            if not self._is_worth(depth):
                break
            for blocks in (depth, deeper):
                if self.key(blocks) not in kept:
                    trace = _or_none(pipe.trace, blocks, **options)
                    if trace is None:
                        return tracer.trace(pipe.job, pipe.plan, rank=pipe.rank, **options)
                    kept[self.key(blocks)] = trace
            short_blocks = dataclasses.replace(rank_blocks, first=pipe.short_stage * depth, count=depth)
            shallow_trace, deeper_trace = kept[self.key(depth)], kept[self.key(deeper)]
            try:
                return pipe.fill_in(unroll(shallow_trace, deeper_trace, short_blocks, rank_blocks))
            except Mismatch:
                continue
        return tracer.trace(pipe.job, pipe.plan, rank=pipe.rank, **options)

    def _is_worth(self, depth: int) -> bool:
        """Return whether two shallow traces, of ``depth`` blocks and of one period more, run fewer blocks
        over all micro-batches than a whole one."""
        shallow = (2 * depth + self.blocks.period) * self.pipe.short_micros
        return shallow < self.blocks.count * self.pipe.micros


def find_repeated_blocks(model: torch.nn.Module, job: Job) -> tuple[str, int, int] | None:
    """Return (path of the module that contains the model's blocks, their number, their `attribute_period`) if
    all blocks have parameters of the same names and shapes, keep the same inner modules in float32
    (`Job.islands`), and lie in a ModuleList or Sequential. Return None otherwise, and if no blocks are
    found."""
    try:
        path, blocks = find_blocks(model, job.blocks)
    except UserError:
        return None
    if not are_alike(model, path, blocks, job) or not isinstance(model.get_submodule(path), CONTAINERS):
        return None
    return path, len(blocks), attribute_period(blocks)


def are_alike(
    model: torch.nn.Module, path: str, blocks: Sequence[torch.nn.Module], job: Job, *, first: int = 0
) -> bool:
    """Return whether the blocks at ``path``, from the index ``first`` on, have parameters of the same names
    and shapes and keep the same inner modules in float32 (`Job.islands`)."""
    fp32_names, prefix = fp32_modules.find(model, job.islands), child_prefix(path)
    return len({_shape(b, f"{prefix}{i}", fp32_names) for i, b in enumerate(blocks) if i >= first}) == 1


def _shape(block: torch.nn.Module, path: str, fp32_names: Iterable[str]) -> tuple[Any, ...]:
    inner_names = tuple(sorted(n.removeprefix(path) for n in fp32_names if f"{n}.".startswith(f"{path}.")))
    return tuple((name, p.shape) for name, p in block.named_parameters()), inner_names


def _period(plan: Plan) -> int:
    recompute = plan.get("activation-checkpointing")
    return int(recompute.settings["every"]) if recompute else 1


def _first_depth(plan: Plan, period: int) -> int:
    """Return the number of blocks of the first shallow trace, for ``period`` adjacent blocks that repeat: 3
    periods, because the first and the last may differ from those in between. Prefetching by FSDP2 makes more
    blocks differ: 4, 8 and 10 periods for a prefetch of 1, 2 and more. Tensor parallelism under FSDP2 adds
    one period."""
    fsdp2, tensor_parallel = plan.get("fsdp2"), plan.get("tensor-parallel")
    prefetch = int(fsdp2.settings["prefetch"]) if fsdp2 else 0
    return ((3, 4, 8, 10)[min(prefetch, 3)] + bool(fsdp2 and tensor_parallel)) * period
