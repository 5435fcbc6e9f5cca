"""Predictions of clicks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from architectures.common import job
from memfit.types.job import Job


class Clicks(nn.Module):
    """Bags of categories and dense features; their vectors interact in pairs (DLRM, Naumov et al. 2019)."""

    def __init__(self, tables: int = 6, rows: int = 5000, width: int = 32) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.EmbeddingBag(rows, width, mode="sum") for _ in range(tables)])
        self.bottom = nn.Sequential(nn.Linear(13, 128), nn.ReLU(), nn.Linear(128, width), nn.ReLU())
        pairs = (tables + 1) * tables // 2
        self.top = nn.Sequential(nn.Linear(width + pairs, 256), nn.ReLU(), nn.Linear(256, 1))
        self.register_buffer("pairs", torch.tril_indices(tables + 1, tables + 1, -1))

    def forward(self, dense: torch.Tensor, words: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        low = self.bottom(dense)
        bags = [table(w, starts) for table, w in zip(self.tables, words, strict=True)]
        all_ = torch.stack([low, *bags], 1)
        product = torch.bmm(all_, all_.mT)[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([low, product], 1)).squeeze(1)


def clicks() -> Job:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.binary_cross_entropy_with_logits(model(*batch[:3]), batch[3])

    return job(
        "dlrm",
        Clicks,
        lambda g: (
            torch.randn(512, 13, generator=g),
            torch.randint(0, 5000, (6, 2048), generator=g),
            torch.arange(0, 2048, 4),
            torch.rand(512, generator=g).round(),
        ),
        loss,
        rows=512,
    )
