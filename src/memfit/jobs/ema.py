"""An exponential moving average of a model's weights, kept in memory beside the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from memfit.techniques.base import Workbench
from memfit.types.trace import Category


class WeightAverage:
    """A moving average of this rank's parameters, and copies of its buffers, held beside the model.

    `update`, to be called after each optimizer step, sets ``average = decay * average + (1 - decay) *
    weights`` and copies the buffers. Averages of half-precision parameters are float32, so that small updates
    are not lost; others have the parameter's dtype. ``frozen``: whether parameters that are not trained have
    an average too. Under FSDP2 and ZeRO 3, each rank averages only its shards, on the device where they are
    stored.
    """

    def __init__(self, bench: Workbench, model: torch.nn.Module, decay: float, *, frozen: bool) -> None:
        self.bench, self.model, self.weight, self.frozen = bench, model, 1 - decay, frozen
        with torch.no_grad(), bench.memory_pool(bench.parameters_on):
            self.averages = [_copy(p) for p in self._weights()]
        with torch.no_grad(), bench.memory_pool(""):
            self.buffers = [b.detach().clone() for b in model.buffers()]
        for tensor in (*self.averages, *self.buffers):
            bench.on_kept(tensor, Category.EMA)

    def update(self) -> None:
        with torch.no_grad(), self.bench.memory_pool(self.bench.parameters_on):
            for average, weight in zip(self.averages, self._weights(), strict=True):
                average.lerp_(weight.to(average.dtype), self.weight)
            for copy, buffer in zip(self.buffers, self.model.buffers(), strict=True):
                copy.copy_(buffer)

    def _weights(self) -> Iterator[torch.Tensor]:
        for param in self.model.parameters():
            if param.requires_grad or self.frozen:
                yield _on_this_rank(param.detach(), getattr(param, "shard", None))


def _copy(weight: torch.Tensor) -> torch.Tensor:
    half = weight.dtype in (torch.float16, torch.bfloat16)
    return weight.float() if half else weight.clone()


def _on_this_rank(weight: torch.Tensor, shard: torch.Tensor | None) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    if shard is not None:  # ZeRO 3 releases the parameter itself
        return shard
    return weight.to_local() if isinstance(weight, DTensor) else weight
