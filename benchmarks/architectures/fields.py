"""Graphs, molecules with forces, and fields."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from architectures.common import job, to_target
from memfit.types.job import Job

NODES, DEGREE, WIDTH = 512, 8, 64


class Messages(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * width + 1, width), nn.SiLU(), nn.Linear(width, width))
        self.update = nn.Linear(2 * width, width)

    def forward(self, h: torch.Tensor, edges: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        source, target = edges
        sent = self.message(torch.cat([h[source], h[target], distance], -1))
        gathered = torch.zeros_like(h).index_add(0, target, sent.to(h.dtype))
        return h + self.update(torch.cat([h, gathered], -1))


class Graph(nn.Module):
    """Neighbours within a radius, found anew in every step: how many there are depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.layers = nn.ModuleList([Messages() for _ in range(3)])
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        distances = torch.cdist(place, place)
        edges = (distances < 1.5).nonzero().T
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h, edges, distances[edges[0], edges[1]][:, None])
        return self.out(h)


def _ring(g: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Places on a line one apart: every node has itself and two neighbours, the ends one fewer."""
    place = torch.stack([torch.arange(NODES) * 1.0, torch.zeros(NODES)], 1)
    return torch.randn(NODES, 4, generator=g), place, torch.randn(NODES, 1, generator=g)


def gnn() -> Job:
    return job(
        "gnn-radius",
        Graph,
        _ring,
        lambda m, b: functional.mse_loss(m(b[0], b[1]).float(), b[2]),
        rows=NODES,
        bound={"nonzero": 3 * NODES - 2},
    )


class ForceField(nn.Module):
    """Energy of pairs; forces are its gradient, so training differentiates twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
        self.register_buffer("centers", torch.linspace(0.5, 5.0, 16))

    def forward(self, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        place = place.requires_grad_()
        difference = place[:, :, None] - place[:, None]
        distance = (difference.square().sum(-1) + 1e-6).sqrt()
        basis = torch.exp(-(distance[..., None] - self.centers).square())
        energy = self.net(basis).sum((1, 2, 3))
        (gradient,) = torch.autograd.grad(energy.sum(), place, create_graph=True)
        return energy, -gradient


def _energy_and_forces(model: nn.Module, batch: Any) -> torch.Tensor:
    energy, forces = model(batch[0])
    return functional.mse_loss(energy, batch[1]) + functional.mse_loss(forces, batch[2])


def force_field() -> Job:
    return job(
        "force-field",
        ForceField,
        lambda g: (
            3 * torch.randn(8, 24, 3, generator=g),
            torch.randn(8, generator=g),
            torch.randn(8, 24, 3, generator=g),
        ),
        _energy_and_forces,
        rows=8,
    )


class Spectral(nn.Module):
    def __init__(self, width: int = 24, modes: int = 8) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(width, width, modes, modes, dtype=torch.cfloat) / width)
        self.local = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft2(x)
        kept = torch.zeros_like(spectrum)
        m = self.modes
        kept[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :m, :m], self.weight)
        return functional.gelu(torch.fft.irfft2(kept, s=x.shape[-2:]) + self.local(x))


def fno() -> Job:
    def model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 24, 1), nn.Sequential(*(Spectral() for _ in range(3))), nn.Conv2d(24, 1, 1)
        )

    return job(
        "fno",
        model,
        lambda g: (torch.randn(4, 1, 64, 64, generator=g), torch.randn(4, 1, 64, 64, generator=g)),
        to_target,
        rows=4,
        blocks="1",
    )
