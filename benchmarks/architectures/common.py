"""What the jobs of all families are made of: batches, losses, and a job of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from memfit.types.job import Bound, Job, OptimizerChoice

Loss = Callable[[nn.Module, Any], torch.Tensor]


def rng(step: int, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + step)


def job(
    name: str,
    model: Callable[[], nn.Module],
    batch: Callable[[torch.Generator], Any],
    loss: Loss,
    *,
    rows: int,
    blocks: str | None = None,
    head: str | None = None,
    bound: Bound | None = None,
) -> Job:
    return Job(
        name=name,
        build_model=model,
        make_batch=lambda step, seed: batch(rng(step, seed)),
        loss=loss,
        batch_size=rows,
        blocks=blocks,
        head=head,
        bound=bound,
        optimizer=OptimizerChoice(learning_rate=1e-4),
    )


def to_target(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.mse_loss(model(batch[0]).float(), batch[1])


def to_class(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]).float(), batch[1])


def pictures(rows: int, size: int, classes: int, channels: int = 3) -> Callable[[torch.Generator], Any]:
    return lambda g: (
        torch.randn(rows, channels, size, size, generator=g),
        torch.randint(0, classes, (rows,), generator=g),
    )


def next_token(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids[:, :-1])
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def words(rows: int, length: int, vocabulary: int) -> Callable[[torch.Generator], torch.Tensor]:
    return lambda g: torch.randint(0, vocabulary, (rows, length + 1), generator=g)
