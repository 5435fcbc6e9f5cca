"""A job whose samples are longer from its third epoch on, as if the data were sorted by length."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from memfit import Job

STEPS_PER_EPOCH = 4
SAMPLES, CHANNELS = 8, 64


class Block(nn.Module):
    """A residual block without dependence between samples."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.wide = nn.Linear(CHANNELS, 4 * CHANNELS)
        self.narrow = nn.Linear(4 * CHANNELS, CHANNELS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Any) -> Any:
        return x + self.dropout(self.narrow(torch.nn.functional.gelu(self.wide(self.norm(x)))))


class Model(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(6))
        self.head = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make_batch(step: int, seed: int) -> torch.Tensor:
    """Return samples of 256 positions, or of 1024 from the third epoch on."""
    length = 1024 if step >= 2 * STEPS_PER_EPOCH else 256
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return torch.randn(SAMPLES, length, CHANNELS, generator=generator)


def loss(model: nn.Module, batch: torch.Tensor) -> Any:
    return (model(batch) - batch.roll(1, 1)).square().mean()


job = Job(
    name="growing-samples",
    build_model=Model,
    make_batch=make_batch,
    loss=loss,
    batch_size=SAMPLES,
    steps=4 * STEPS_PER_EPOCH,
    blocks="blocks",
)
job_with_dropout = dataclasses.replace(job, build_model=lambda: Model(dropout=0.1))
