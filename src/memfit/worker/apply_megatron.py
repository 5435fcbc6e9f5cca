"""The training step on megatron-core: its GPTModel, its tensor parallelism, its gradient buffers.

As in Megatron-LM's trainer, the model is always inside its DistributedDataParallel: gradients are summed into
one buffer that lives as long as the model. On CPU two things are told another truth: where new buffers lie,
which Megatron asks `torch.cuda.current_device`, and the state of the CUDA generator, which is not used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from memfit.engines.megatron import ENGINE
from memfit.jobs.step import TrainingStep
from memfit.techniques.base import OptimizerLike
from memfit.types.plan import Plan
from memfit.worker.megatron_gpt import MegatronGpt, copy_weights, read, transformer_config


class Step(TrainingStep):
    carried = ENGINE.carries - {"gradient-accumulation"}
    folder: Path

    def _prepare(self) -> OptimizerLike:
        bench, plan = self.bench, self.plan
        place = bench.world.layout
        around = contextlib.ExitStack()
        bench.closers.append(around.close)
        around.enter_context(_on_cpu())
        traced = isinstance(next(self.model.parameters()), FakeTensor)
        around.enter_context(_parallel_state(place.tensor, traced=traced))
        if traced:
            around.enter_context(_uncoalesced())
        shape = read(self.model)
        config = transformer_config(shape, **_parallel(plan))
        inner = MegatronGpt(shape, config)
        copy_weights(cast(Any, self.model), inner, rank=bench.world.index("tensor"), degree=place.tensor)
        self.model = bench.model = inner
        self.wrapped = _wrapped(inner, config, plan)
        bench.call = self.wrapped
        for param in bench.trainable():
            bench.on_kept(cast(Any, param).main_grad, "gradient")
        self.syncing: Any = None
        bench.before_micro_batch.append(self._sync_last)
        return bench.make_optimizer(bench.trainable())

    def _sync_last(self, last: bool) -> None:
        if self.syncing is not None:
            self.syncing.__exit__(None, None, None)
        self.syncing = None if last else self.wrapped.no_sync()
        if self.syncing is not None:
            self.syncing.__enter__()

    def _update(self) -> torch.Tensor:
        self._reduced()
        norm = super()._update()
        self.wrapped.zero_grad_buffer()
        return norm

    def _forgo(self) -> torch.Tensor:
        self._reduced()
        norm = super()._forgo()
        self.wrapped.zero_grad_buffer()
        return norm

    def _reduced(self) -> None:
        """Gradients reduced by Megatron, and given to the parameters, where torch's optimizers look."""
        from megatron.core.distributed import finalize_model_grads

        finalize_model_grads([self.wrapped])
        for param in self.bench.trainable():
            param.grad = cast(Any, param).main_grad

    def _grad_norm(self) -> torch.Tensor:
        """Slices of tensor-parallel ranks are summed, what all of them hold counts once."""
        cut, whole = torch.zeros(()), torch.zeros(())
        for param in self.bench.trainable():
            square = torch.linalg.vector_norm(cast(torch.Tensor, param.grad)).float().square()
            if getattr(param, "tensor_model_parallel", False):
                cut = cut + square
            else:
                whole = whole + square
        tensor = self.bench.world.sub("tensor")
        if tensor is not None:
            torch.distributed.all_reduce(cut, group=tensor.get_group())
        return (cut + whole).sqrt()


def _parallel(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if (used := plan.get("tensor-parallel")) is not None:
        found["tensor_model_parallel_size"] = int(used.settings["degree"])
        found["sequence_parallel"] = bool(used.settings["sequence"])
    if plan.get("activation-checkpointing") is not None:
        found |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return found


def _wrapped(model: MegatronGpt, config: Any, plan: Plan) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    used = plan.get("ddp")
    bucket = int(used.settings["bucket_mib"]) * 2**20 // 4 if used is not None else None
    return DistributedDataParallel(
        config,
        DistributedDataParallelConfig(overlap_grad_reduce=used is not None, bucket_size=bucket),
        model,
    )


@contextlib.contextmanager
def _parallel_state(tensor: int, *, traced: bool) -> Iterator[None]:
    """Megatron's process groups, beside torch's own; on one rank a process group is made for them."""
    dist: Any = torch.distributed
    from megatron.core import parallel_state

    with _disable_current_modes():
        alone = not dist.is_initialized()
        if alone and traced:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
        elif alone:
            dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor, create_gloo_process_groups=False
        )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if alone:
            dist.destroy_process_group()


def _uncoalesced() -> Any:
    """Fake tensors know no coalesced collective. Of one bucket, and there is no more, it is the plain one."""
    from megatron.core.distributed import param_and_grad_buffer

    @contextlib.contextmanager
    def at_once(group: Any, async_ops: bool = False) -> Iterator[Any]:
        yield SimpleNamespace(wait=lambda: None)

    return mock.patch.object(param_and_grad_buffer, "_coalescing_manager", at_once)


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    from megatron.core.tensor_parallel import random

    state = torch.zeros(0, dtype=torch.uint8)
    tracker = random.get_cuda_rng_tracker()
    tracker.states_ = {"model-parallel-rng": state}
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        mock.patch.object(random, "_get_cuda_rng_state", lambda *args, **kwargs: state),
        mock.patch.object(random, "_set_cuda_rng_state", lambda *args, **kwargs: None),
    ):
        yield
