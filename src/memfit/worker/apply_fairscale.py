"""The training step as FairScale makes it: the optimizer in OSS, the model in ShardedDataParallel."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, cast

import torch

from memfit.engines.fairscale import CONFIG, ENGINE
from memfit.jobs.step import TrainingStep
from memfit.techniques.base import OptimizerLike


class Step(TrainingStep):
    carried = ENGINE.carries - {"gradient-accumulation"}
    folder: Path

    def _prepare(self) -> OptimizerLike:
        from fairscale.nn.data_parallel import ShardedDataParallel
        from fairscale.optim.oss import OSS

        bench = self.bench
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        mesh = bench.world.sub("shard")
        group = mesh.get_group() if mesh is not None else torch.distributed.group.WORLD
        make = bench.make_optimizer
        optimizer = OSS(
            bench.trainable(),
            optim=lambda groups: make([p for g in groups for p in g["params"]]),
            group=group,
        )
        settings = json.loads((self.folder / CONFIG).read_text())
        self.wrapped = ShardedDataParallel(self.model, optimizer, process_group=group, **settings)
        bench.call = self.wrapped
        bench.before_micro_batch.append(self._sync_last)
        self._syncing = contextlib.ExitStack()
        bench.closers.append(self._let_go)
        return cast(OptimizerLike, optimizer)

    def _sync_last(self, last: bool) -> None:
        """Reducing twice would average what was averaged already."""
        self._syncing.close()
        if not last:
            self._syncing.enter_context(self.wrapped.no_sync())

    def _update(self) -> torch.Tensor:
        norm = self._grad_norm()
        self.optimizer.step()
        self.wrapped.zero_grad(set_to_none=True)
        return norm

    def _grad_norm(self) -> torch.Tensor:
        """Of the gradients that this rank owns: the others are gone or half summed."""
        sharded: Any = self.optimizer
        own = [p for p, rank in sharded._param_to_rank.items() if rank == sharded.rank]
        norms = [torch.linalg.vector_norm(p.grad).float() for p in own if p.grad is not None]
        total = torch.stack(norms or [torch.zeros(())]).square().sum()  # a rank may own nothing
        torch.distributed.all_reduce(total, group=sharded.group)
        return total.sqrt()

    def _let_go(self) -> None:
        for hook in self.wrapped._grad_hooks:
            hook.remove()
        self.wrapped._grad_accs, self.wrapped._manual_reduce = [], []
