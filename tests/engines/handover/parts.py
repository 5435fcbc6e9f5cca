"""What the job and the scripts of `test_handover.py` train; the job imports it inside functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WIDTH, BATCH, CLIP = 32, 8, 0.05


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, WIDTH)
        self.recomputes = False
        self._no_split_modules = ["Block"]  # of transformers' models, for Accelerate's FSDP

    def gradient_checkpointing_enable(self) -> None:
        self.recomputes = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch.utils.checkpoint import checkpoint

        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)
        return self.head(x)  # type: ignore[no-any-return]


def batch(step: int, seed: int, *, size: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return torch.randn(size, WIDTH, generator=generator), torch.randn(size, WIDTH, generator=generator)


def loss(model: Any, given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(model(given[0]), given[1])
