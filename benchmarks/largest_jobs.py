"""A job of a user's own for largest.py: message passing on random graphs, its sizes as arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from memfit import Job


class MessagePassing(nn.Module):
    """Sums a message over the edges that arrive at each node, and adds it to the node's state."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.update = nn.Linear(2 * hidden, hidden)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        source, target = edges
        messages = self.message(torch.cat([x[source], x[target]], dim=-1))
        arrived = torch.zeros_like(x).index_add(0, target, messages)
        return x + torch.nn.functional.silu(self.update(torch.cat([x, arrived], dim=-1)))


class GraphNet(nn.Module):
    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(16, hidden)
        self.blocks = nn.ModuleList(MessagePassing(hidden) for _ in range(layers))
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, edges)
        out: torch.Tensor = self.head(x)
        return out


def graph(nodes: int = 1000, edges: int = 8000, hidden: int = 64, layers: int = 3) -> Job:
    def make_batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        return {
            "x": torch.randn(nodes, 16, generator=generator),
            "edges": torch.randint(nodes, (2, edges), generator=generator),
            "y": torch.randn(nodes, 1, generator=generator),
        }

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch["x"], batch["edges"]), batch["y"])

    return Job(
        name="graph", build_model=lambda: GraphNet(hidden, layers), make_batch=make_batch, loss=loss,
        batch_size=1,
    )  # fmt: skip
