"""The pipeline stages of one rank: the model reduced to them, run by torch's own schedules.

Every stage runs the job's own loss. Blocks of earlier stages return zeros that take no memory. The first
block of a stage gets the tensors received from the previous stage instead of these zeros. The forward of a
stage ends where the first block of the next stage would begin.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence, Set
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping
from torch.utils import _pytree

from memfit.model.blocks import child_prefix
from memfit.techniques.base import Piece, WeightedLoss, Workbench
from memfit.techniques.parallel.block_dataflow import TensorPlaceholder, ZeroFiller, record_chain
from memfit.techniques.parallel.stage_sizes import stage_sizes
from memfit.types.device_kind import DeviceKind
from memfit.types.errors import UserError
from memfit.types.trace import Phase

SCHEDULES: dict[str, Any] = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zero-bubble": schedules.ScheduleInterleavedZeroBubble,
    "zero-bubble-v": schedules.ScheduleZBVZeroBubble,
}


class StageEnd(Exception):
    """Raised inside the model's forward to end it where a stage ends. ``carried`` holds the tensors that the
    stage passes to the next one."""

    def __init__(self, carried: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.carried = carried


class Pipeline:
    """The ``virtual`` pipeline stages of one rank. Creating it replaces parameters that only other ranks use,
    and buffers of blocks that only other ranks run, by zeros that take no memory.

    Raises UserError if the model is not a chain of blocks (`record_chain`), if a stage would get no block
    (`stage_sizes`), or if the schedule does not support the numbers of stages and micro-batches.
    """

    def __init__(
        self,
        bench: Workbench,
        *,
        schedule: str,
        virtual: int,
        micro_batches: int,
        first_fewer: int = 0,
        last_fewer: int = 0,
    ) -> None:
        mesh = bench.world.sub("pipeline")
        assert mesh is not None, "a pipeline of one stage"
        self.bench, self.micro_batches, self.group = bench, micro_batches, mesh.get_group()
        ranks = self.group.size()
        count = ranks * virtual
        parts = bench.world.layout.data * bench.micro_batches * micro_batches
        self.chain = record_chain(bench, parts)
        ends = [0, *itertools.accumulate(stage_sizes(len(self.chain.blocks), count, first_fewer, last_fewer))]
        self.bounds = list(itertools.pairwise(ends))
        self.rank_of = generate_stage_to_rank_mapping(
            ranks, count, style="v" if schedule == "zero-bubble-v" else "loop"
        )
        rank = bench.world.index("pipeline")
        self.stages = [s for s in range(count) if self.rank_of[s] == rank]
        self.device = torch.device(bench.torch_device)
        self.zeros = ZeroFiller(self.device)
        self.now = -1  # the running stage
        self.received: tuple[torch.Tensor, ...] = ()
        self.ended = False
        self._mark: Callable[[Phase], None] = lambda phase: None
        self._pieces: Sequence[Piece] = ()
        self._weighted: WeightedLoss | None = None
        self._last, self._backwards_left = True, dict[int, int]()  # backwards left of each stage
        self.ending: Set[object] = frozenset()  # modules whose next backward is their last of the step
        needs_input_grad = [self._needs_input_grad(s) for s in range(count)]  # before parameters are dropped
        self._shared = self._find_shared()
        self._cut()
        blocks = {s: self.chain.blocks[slice(*self.bounds[s])] for s in self.stages}
        self._inside = {
            s: frozenset(m for b in stage_blocks for m in b.modules()) for s, stage_blocks in blocks.items()
        }
        self._schedule = self._make_schedule(schedule, needs_input_grad)

    # -- reducing the model ---------------------------------------------------------------------------

    def _positions(self, stage: int) -> set[int]:
        first, end = self.bounds[stage]
        prefix = {-1} if stage == 0 else set[int]()
        return {*range(first, end), *prefix, *({end} if stage == len(self.bounds) - 1 else ())}

    def _needs_input_grad(self, stage: int) -> bool:
        """Return whether the input of the stage needs a gradient: whether a parameter is trained that is used
        before the stage's first block."""
        first = self.bounds[stage][0]
        return any(
            p.requires_grad and min(self.chain.uses[n]) < first
            for n, p in self.bench.model.named_parameters()
        )

    def _find_shared(self) -> dict[str, Any]:
        """Return parameter name -> process group of the ranks that use it, for each trained parameter that
        this rank and other pipeline ranks use. The gradient norm must count such a parameter once, so all of
        these ranks but the first add its name to the workbench's ``counted_elsewhere``."""
        groups_by_name, groups = dict[str, Any](), dict[tuple[int, ...], Any]()
        global_ranks = dist.get_process_group_ranks(self.group)
        for name, param in self.bench.model.named_parameters():
            holders = sorted(
                {self.rank_of[s] for s in self.rank_of if self.chain.uses[name] & self._positions(s)}
            )
            rank = self.rank_of[self.stages[0]]
            if len(holders) < 2 or rank not in holders or not param.requires_grad:
                continue
            ranks = tuple(global_ranks[h] for h in holders)
            if ranks not in groups and len(ranks) == len(global_ranks):
                groups[ranks] = self.group
            elif ranks not in groups:
                is_real = dist.get_backend() != "fake"
                groups[ranks] = dist.new_group(list(ranks), use_local_synchronization=is_real)
            groups_by_name[name] = groups[ranks]
            if rank != holders[0]:
                self.bench.counted_elsewhere.add(name)
        return groups_by_name

    def _cut(self) -> None:
        model, chain = self.bench.model, self.chain
        own_positions = set[int]().union(*(self._positions(s) for s in self.stages))
        dropped_names = {n for n, positions in chain.uses.items() if not positions & own_positions}
        for name, module in model.named_modules(remove_duplicate=False):
            for key in [k for k in module._parameters if f"{child_prefix(name)}{k}" in dropped_names]:
                _drop(module, key, module._parameters, self.device)
        for index, block in enumerate(chain.blocks):
            block._compiled_call_impl = self._route(index, block)
            if index not in own_positions:
                for module in block.modules():
                    for key in list(module._buffers):
                        _drop(module, key, module._buffers, self.device)
        for name, returns in chain.before.items():
            module = model.get_submodule(name)
            module._compiled_call_impl = self._route_early(module, returns)
        model.forward = self._until_end(model.forward)

    def _route(self, index: int, block: torch.nn.Module) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.now < 0:
                return block._call_impl(*args, **kwargs)
            first, end = self.bounds[self.now]
            if index < first:
                return self.zeros.fill(self.chain.returns[index])
            carried = self.chain.carried[index]
            leaves, spec = _pytree.tree_flatten((args, kwargs))
            if index >= end:
                raise StageEnd(tuple(leaves[at].contiguous() for at in carried))
            if index == first and index > 0:
                for at, tensor in zip(carried, self.received, strict=True):
                    leaves[at] = tensor
                args, kwargs = _pytree.tree_unflatten(leaves, spec)
            del leaves
            return block._call_impl(*args, **kwargs)

        return call

    def _route_early(self, module: torch.nn.Module, returns: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.now > 0:
                return self.zeros.fill(returns)
            return module._call_impl(*args, **kwargs)

        return call

    def _until_end(self, inner: Callable[..., Any]) -> Any:
        """Return a forward method of the model that calls ``inner``. If a stage ends inside ``inner``
        (`StageEnd`), it sets ``ended`` and returns what the stage passes to the next one, so that wrappers
        around the model, such as DDP, get an output."""

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            try:
                return inner(*args, **kwargs)
            except StageEnd as end:
                self.ended = True
                return end.carried

        return forward

    # -- running --------------------------------------------------------------------------------------

    def _make_schedule(self, name: str, needs_input_grad: list[bool]) -> Any:
        stages = [self._make_stage(s, needs_input_grad) for s in self.stages]
        single = issubclass(SCHEDULES[name], schedules.PipelineScheduleSingle)
        try:
            return SCHEDULES[name](
                stages[0] if single else stages,
                self.micro_batches,
                loss_fn=lambda loss, target: loss,
                scale_grads=False,
            )
        except ValueError as reason_from_torch:
            raise UserError(
                f"pipeline schedule {name!r} does not support this plan's numbers of stages and "
                f"micro-batches: {reason_from_torch}",
                hint="choose another schedule, or other values of virtual or micro_batches",
            ) from reason_from_torch

    def _make_stage(self, stage: int, needs_input_grad: list[bool]) -> _Stage:
        def like(at: int) -> tuple[torch.Tensor, ...]:
            """Return tensors on the meta device, which have no values, with the shapes and dtypes of those
            that enter stage ``at``: none for the first stage, and for a later one those that its first block
            gets from the block before. If ``at`` is the number of stages, return the loss, a float32
            scalar."""
            if at == 0:
                return ()
            loss = at == len(self.bounds)
            carried = (
                [TensorPlaceholder((), torch.float32)]
                if loss
                else self.chain.carried[self.bounds[at][0]].values()
            )
            needs_grad = loss or needs_input_grad[at]
            return tuple(
                torch.empty(h.shape, dtype=h.dtype, device="meta", requires_grad=needs_grad) for h in carried
            )

        part = _Part(self, stage)
        pipeline_stage = _Stage(
            part,
            stage,
            len(self.bounds),
            self.device,
            input_args=like(stage),
            output_args=like(stage + 1),
            group=self.group,
        )
        pipeline_stage.stage_index_to_group_rank = self.rank_of
        return pipeline_stage

    def run(
        self,
        pieces: Sequence[Piece],
        weighted: WeightedLoss,
        mark: Callable[[Phase], None],
        *,
        last: bool,
    ) -> torch.Tensor:
        """Run forward and backward of all pieces. Return the sum of their weighted losses, a float32 scalar
        that is the same on every rank of the pipeline.

        ``weighted(model, micro-batch, share)`` returns the loss of a piece times its share. ``mark`` is
        called with the phase, forward or backward, whenever one begins. ``last`` says whether the optimizer's
        step comes after this call; if so, the gradients of parameters that several pipeline ranks use are
        summed over these ranks.
        """
        self._pieces, self._weighted, self._mark, self._last = pieces, weighted, mark, last
        self._backwards_left = dict.fromkeys(self.stages, len(pieces))
        losses: list[torch.Tensor] = []
        mark(Phase.FORWARD)  # the first time, receive buffers are made
        for stage in getattr(self._schedule, "_stages", None) or [self._schedule._stage]:
            stage.has_backward = True
            stage.clear_runtime_states()
        try:
            with _works_as_on(self.bench.device):
                self._schedule._step_microbatches(
                    kwarg_mbs=[{"index": i} for i in range(len(pieces))],
                    target_mbs=[None] * len(pieces),
                    losses=losses,
                    return_outputs=False,
                )
        except RuntimeError as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise
        finally:
            self.now, self._pieces = -1, ()
        for name, group in self._shared.items() if last else ():
            grad: Any = self.bench.model.get_parameter(name).grad
            dist.all_reduce(grad.to_local() if hasattr(grad, "to_local") else grad, group=group)
        total = torch.stack(losses).detach().float().sum() if losses else torch.zeros((), device=self.device)
        if hasattr(total, "full_tensor"):  # the loss is over a sharded vocabulary
            total = total.full_tensor()
        dist.all_reduce(total, group=self.group)
        return total

    def forward(self, stage: int, received: tuple[torch.Tensor, ...], index: int) -> Any:
        assert self._weighted is not None
        part, share = self._pieces[index]
        self.now, self.received, self.ended = stage, received, False
        if self.bench.ddp is not None:
            self.bench.ddp.require_backward_grad_sync = False  # `before_backward` turns it on
        try:
            return self._weighted(_Whole(self), part, share)
        except StageEnd as end:
            return end.carried
        except UserError as error:  # a guarded loss turns every exception into a UserError
            if not isinstance(error.__cause__, StageEnd):
                raise
            return error.__cause__.carried
        finally:
            self.received, self.ended = (), False

    def before_forward(self) -> None:
        self._mark(Phase.FORWARD)

    def before_backward(self, stage: int, *, counts: bool) -> None:
        self._mark(Phase.BACKWARD)
        self._backwards_left[stage] -= counts
        is_last_backward = counts and self._last and not self._backwards_left[stage]
        self.ending = self._inside[stage] if is_last_backward else frozenset()
        final = counts and not any(self._backwards_left.values())
        ddp = self.bench.ddp
        if ddp is not None:
            ddp.require_backward_grad_sync = True
        for callback in self.bench.before_micro_batch:
            callback(final and self._last)
        if ddp is not None and final and ddp.require_backward_grad_sync:
            ddp.reducer.prepare_for_backward([])


class _Whole:
    """What the job's loss gets as its model. A call runs the rank's model. If the stage ends inside its
    forward, the call raises StageEnd, which ends the loss, too. Attributes are those of the model."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bench = self._pipeline.bench
        call = bench.call or bench.model
        out = call(*args, **kwargs)
        if self._pipeline.ended:
            raise StageEnd(out)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline.bench.model, name)


class _Part(torch.nn.Module):
    """The module that torch's stage calls to run one micro-batch: ``index`` is its number, and ``received``
    holds the tensors from the stage before. The rank's model is its submodule, so that the stage has the
    model's parameters."""

    def __init__(self, pipeline: Pipeline, stage: int) -> None:
        super().__init__()
        self.model, self.stage = pipeline.bench.model, stage
        self.pipeline = pipeline

    def forward(self, *received: torch.Tensor, index: int) -> Any:
        return self.pipeline.forward(self.stage, received, index)


class _Stage(PipelineStage):
    """Torch's stage, which in addition calls `Pipeline.before_forward` and `Pipeline.before_backward` before
    it runs forward and backward of a micro-batch. It does not ask other ranks for shapes, because these are
    known."""

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        self._pipeline.before_forward()
        return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        self._pipeline.before_backward(self.stage_index, counts=True)
        return super().backward_one_chunk(*args, **kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        self._pipeline.before_backward(self.stage_index, counts=False)
        return super().backward_weight_one_chunk(*args, **kwargs)

    def _warmup_forward_vote(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.ones(1)  # shapes are known on every rank, so other stages are not asked

    def _warmup_backward_result(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.ones(1)

    @property
    def _pipeline(self) -> Pipeline:
        return cast(_Part, self.submod).pipeline


def _works_as_on(device: DeviceKind) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which torch's fake process group keeps sent and received tensors alive as the
    process group of ``device`` does. On CPUs, the work object of a transfer refers to its tensors, as gloo's
    does. Otherwise nothing is changed: NCCL's work object releases them when it has been waited for."""
    if dist.get_backend() != "fake" or not device.is_host:
        return contextlib.nullcontext()
    original = schedules._batch_p2p

    def batch(ops: list[dist.P2POp], desc: str | None = None) -> list[Any]:
        return [_Work(work, [op.tensor for op in ops]) for work in original(ops, desc)]

    return mock.patch.object(schedules, "_batch_p2p", batch)


class _Work:
    def __init__(self, inner: dist.Work, tensors: list[torch.Tensor]) -> None:
        self.inner, self.tensors = inner, tensors

    def wait(self) -> None:
        self.inner.wait()


def _drop(module: torch.nn.Module, key: str, tensors: dict[str, Any], device: torch.device) -> None:
    """Remove ``key`` from ``tensors``, the dict of the module's parameters or buffers. Set the attribute
    ``key`` to zeros of that shape and dtype on ``device`` that take no memory, or to None if it was None."""
    tensor = tensors.pop(key)
    if tensor is not None:
        zero = torch.zeros((), dtype=tensor.dtype, device=device)
        object.__setattr__(module, key, zero.expand(tensor.shape))
    else:
        object.__setattr__(module, key, None)
