"""The training step of FairScale: the optimizer in OSS, the model in ShardedDataParallel, and recomputed
blocks in `checkpoint_wrapper`.

The wrapper restores only CUDA's autocast, and there only float16: a block that ran in bfloat16 would silently
be recomputed in another dtype. It also ignores a `forward` that is set on the block itself. Such blocks are
recomputed with torch's checkpoint instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from memfit.engines.base import sync_last
from memfit.engines.fairscale import CONFIG, ENGINE
from memfit.jobs.training_step import TrainingStep
from memfit.model.blocks import find_stacks
from memfit.model.tensors import tensor_leaves
from memfit.techniques.base import OptimizerLike
from memfit.techniques.rank_mesh import join_alone
from memfit.techniques.recompute.checkpointing import recompute
from memfit.techniques.zero.base import make_inner
from memfit.types.errors import UserError


class Step(TrainingStep):
    """The training step on the engine fairscale. ``folder`` is the folder of the run's configuration files,
    which must be set before a step is created."""

    carried = ENGINE.carries - {"gradient-accumulation"}
    folder: Path

    def _prepare(self) -> OptimizerLike:
        from fairscale.nn.data_parallel import ShardedDataParallel
        from fairscale.optim.oss import OSS

        bench = self.bench
        join_alone(bench.torch_device)
        for block in self._recomputed():
            self._checkpoint(block)
        mesh = bench.world.sub("shard")
        group = mesh.get_group() if mesh is not None else torch.distributed.group.WORLD
        make = bench.make_optimizer
        optimizer = OSS(
            bench.trainable(),
            optim=lambda groups: make_inner(make, [p for g in groups for p in g["params"]]),
            group=group,
        )
        settings = json.loads((self.folder / CONFIG).read_text())
        self.wrapped = ShardedDataParallel(self.model, optimizer, process_group=group, **settings)
        bench.call = self.wrapped
        bench.before_micro_batch.append(sync_last(self.wrapped.no_sync))
        bench.closers.append(self._let_go)
        return cast(OptimizerLike, optimizer)

    def _recomputed(self) -> Iterator[torch.nn.Module]:
        if (use := self.plan.get("activation-checkpointing")) is not None:
            for blocks in find_stacks(self.model, self.job.blocks, self.job.more_blocks).values():
                yield from blocks[:: int(use.settings["every"])]

    def _checkpoint(self, block: torch.nn.Module) -> None:
        from fairscale.nn.checkpoint import checkpoint_wrapper

        if "bf16-autocast" in self.plan or "forward" in vars(block):
            recompute(block)
            return
        checkpoint_wrapper(block)
        self.bench.closers.append(block.register_forward_hook(_must_be_flat).remove)

    def _weighted_loss(self, model: Any, part: Any, share: float) -> torch.Tensor:
        try:
            return super()._weighted_loss(model, part, share)
        except RuntimeError as error:
            if "not compatible with .grad()" not in str(error):
                raise
            raise UserError(
                "FairScale's checkpoint_wrapper does not support the job's loss, "
                "which itself computes gradients with torch.autograd.grad",
                hint="leave activation-checkpointing out, or train on another engine",
            ) from error

    def update(self) -> torch.Tensor:
        norm = self._grad_norm()
        self._clip(norm)
        self.optimizer.step()
        self.wrapped.zero_grad(set_to_none=True)
        return norm

    def _grad_norm(self) -> torch.Tensor:
        """Return the norm of all gradients, over all ranks. Each rank counts the gradients of the parameters
        that it owns: its gradients of other parameters are freed or only partially reduced."""
        optimizer: Any = self.optimizer
        own_params = [p for p, rank in optimizer._param_to_rank.items() if rank == optimizer.rank]
        norms = [torch.linalg.vector_norm(p.grad).float() for p in own_params if p.grad is not None]
        no_norm = torch.zeros((), device=optimizer._default_device)  # a rank may own nothing
        total = torch.stack(norms or [no_norm]).square().sum()
        torch.distributed.all_reduce(total, group=optimizer.group)
        return total.sqrt()

    def _let_go(self) -> None:
        for hook in self.wrapped._grad_hooks:
            hook.remove()
        self.wrapped._grad_accs, self.wrapped._manual_reduce = [], []


def _must_be_flat(block: torch.nn.Module, args: Any, output: Any) -> None:
    """Hook after a block's forward. Raises UserError unless ``output`` is a tensor, or a tuple or list with
    at least one tensor and no tensors nested deeper. `checkpoint_wrapper` returns deeper tensors without
    gradients, and of a mapping only the keys."""
    parts = output if isinstance(output, tuple | list) else (output,)
    nested_parts = [p for p in parts if not isinstance(p, torch.Tensor)]
    if tensor_leaves(nested_parts) or len(nested_parts) == len(parts):
        raise UserError(
            f"FairScale's checkpoint_wrapper would lose gradients of what the block {type(block).__name__} "
            "returns",
            allowed="blocks that return a tensor, or a tuple or list with at least one tensor and none "
            "nested deeper",
            hint="leave activation-checkpointing out, or train on another engine",
        )
