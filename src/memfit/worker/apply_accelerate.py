"""The training step as Hugging Face Accelerate makes it: model and optimizer prepared by its Accelerator.

On CPU, Accelerate 1.15 has no branch for FSDP: `prepare` wraps in DDP or nothing, without a word. Setting the
distributed type and the plugin on its state after it was made shards in truth; this worker does so on CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from memfit.engines.accelerate import CONFIG, ENGINE
from memfit.jobs.step import TrainingStep
from memfit.techniques.base import OptimizerLike
from memfit.techniques.blocks import find_blocks
from memfit.types.errors import UserError
from memfit.types.plan import Plan


class Step(TrainingStep):
    carried = ENGINE.carries - {"gradient-accumulation"}
    folder: Path

    def _prepare(self) -> OptimizerLike:
        plan, bench = self.plan, self.bench
        self.accelerator = accelerator = _accelerator(self.folder, bench.device, plan)
        model: Any = self.model
        if plan.get("fsdp2") is not None:
            model._no_split_modules = list(_block_classes(bench))
        plain = bench.make_optimizer(bench.trainable())
        self.wrapped, optimizer = accelerator.prepare(model, plain)
        bench.call = _Forwarding(self.wrapped, accelerator.unwrap_model(self.wrapped))
        self.model = bench.call.inner
        sync = next((str(u.settings["sync"]) for u in plan.uses if "sync" in u.settings), "every")
        if sync == "last":
            bench.before_micro_batch.append(self._sync_last)
        self.syncing: Any = None
        bench.closers.append(accelerator.free_memory)
        return cast(OptimizerLike, optimizer)

    def _sync_last(self, last: bool) -> None:
        accelerator = self.accelerator
        if self.syncing is not None:
            self.syncing.__exit__(None, None, None)
        self.syncing = None if last else accelerator.no_sync(self.wrapped)
        if self.syncing is not None:
            self.syncing.__enter__()

    def _backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)


class _Forwarding:
    """Calls go through what Accelerate made, attributes to the model inside."""

    def __init__(self, wrapped: torch.nn.Module, inner: torch.nn.Module) -> None:
        self._wrapped, self.inner = wrapped, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _block_classes(bench: Any) -> Iterator[str]:
    try:
        blocks = find_blocks(bench.model, bench.job.blocks)[1]
    except UserError:
        blocks = []
    yield from sorted({type(b).__name__ for b in blocks})


def _accelerator(folder: Path, device: str, plan: Plan) -> Any:
    """An Accelerator configured by the file, by the variables that `accelerate launch` would set from it.
    Buckets of DDP are not in the file: a program hands them over."""
    from accelerate import Accelerator
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import patch_environment

    config = load_config_from_file(str(folder / CONFIG))
    _reset()
    with patch_environment(**_variables(config)):
        accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=list(_handlers(plan)))
        if device == "cpu" and config.fsdp_config:
            _shard_on_cpu(accelerator)
    return accelerator


def _handlers(plan: Plan) -> Iterator[Any]:
    from accelerate.utils import DistributedDataParallelKwargs

    if (used := plan.get("ddp")) is not None:
        yield DistributedDataParallelKwargs(
            bucket_cap_mb=int(used.settings["bucket_mib"]),
            gradient_as_bucket_view=bool(used.settings["bucket_view"]),
        )


def _variables(config: Any) -> dict[str, str]:
    """As accelerate/utils/launch.py sets them."""
    found = {"ACCELERATE_MIXED_PRECISION": str(config.mixed_precision)}
    if config.fsdp_config:
        found["ACCELERATE_USE_FSDP"] = "true"
        named = {k.upper(): v for k, v in config.fsdp_config.items()}
        found |= {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in named.items()}
    return found


def _reset() -> None:
    """Its state is one for the process, and the warm-up has its own."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def _shard_on_cpu(accelerator: Any) -> None:
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    state = accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin
