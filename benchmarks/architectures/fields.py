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


class Siren(nn.Module):
    """Sines all the way; trained on the gradient of its field (Sitzmann et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 96), nn.Linear(96, 96), nn.Linear(96, 96)])
        self.out = nn.Linear(96, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.sin(30 * layer(x))
        return self.out(x)


def siren() -> Job:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        place = batch[0].detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(place).sum(), place, create_graph=True)
        return (slope - batch[1]).square().sum(-1).mean()

    return job(
        "siren-gradient",
        Siren,
        lambda g: (torch.rand(2048, 2, generator=g), torch.randn(2048, 2, generator=g)),
        loss,
        rows=2048,
    )


class Spectral3d(nn.Module):
    def __init__(self, width: int = 12, modes: int = 5) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(
            torch.randn(4, width, width, modes, modes, modes, dtype=torch.cfloat) / width
        )
        self.skip = nn.Conv3d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum, m = torch.fft.rfftn(x, dim=(-3, -2, -1), norm="ortho"), self.modes
        out = torch.zeros_like(spectrum)
        corners = [(a, b) for a in (slice(m), slice(-m, None)) for b in (slice(m), slice(-m, None))]
        for weight, (a, b) in zip(self.weight, corners, strict=True):
            out[:, :, a, b, :m] = torch.einsum("bixyz,ioxyz->boxyz", spectrum[:, :, a, b, :m], weight)
        back = torch.fft.irfftn(out, s=x.shape[-3:], dim=(-3, -2, -1), norm="ortho")
        return functional.gelu(back + self.skip(x))


class Flow3d(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.lift, self.blocks = nn.Conv3d(2, width, 1), nn.Sequential(*[Spectral3d(width) for _ in range(3)])
        self.out = nn.Conv3d(width, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.blocks(self.lift(x)))


def spectral() -> Job:
    return job(
        "fno-3d",
        Flow3d,
        lambda g: (torch.randn(2, 2, 24, 24, 24, generator=g), torch.randn(2, 1, 24, 24, 24, generator=g)),
        to_target,
        rows=2,
        blocks="blocks",
    )


class Radiance(nn.Module):
    """Colours along rays, summed by what light is left (Mildenhall et al. 2020), coarse and fine."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.coarse, self.fine = (
            nn.Sequential(
                nn.Linear(39, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
            )
            for _ in range(2)
        )

    def forward(self, origin: torch.Tensor, direction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        depth = torch.linspace(2, 6, 32).expand(len(origin), 32)
        first, weight = self._rendered(self.coarse, origin, direction, depth)
        chance = torch.cumsum(weight.detach() + 1e-5, -1)
        wanted = torch.linspace(0, 0.99, 32) * chance[:, -1:]
        index = torch.searchsorted(chance, wanted.contiguous()).clamp(max=31)
        both = torch.cat([depth, depth.gather(1, index) + 0.01], -1).sort(-1).values
        return first, self._rendered(self.fine, origin, direction, both)[0]

    def _rendered(
        self, net: nn.Module, origin: torch.Tensor, direction: torch.Tensor, depth: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        place = origin[:, None] + depth[..., None] * direction[:, None]
        angle = place[..., None] * 2.0 ** torch.arange(6)
        found = net(torch.cat([place, angle.sin().flatten(-2), angle.cos().flatten(-2)], -1))
        opaque = 1 - torch.exp(-functional.relu(found[..., 3]) * 0.1)
        left = torch.cumprod(torch.cat([torch.ones(len(depth), 1), 1 - opaque + 1e-6], -1), -1)[:, :-1]
        weight = opaque * left
        return (weight[..., None] * found[..., :3].sigmoid()).sum(1), weight


def radiance() -> Job:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        first, second = model(batch[0], batch[1])
        return functional.mse_loss(first, batch[2]) + functional.mse_loss(second, batch[2])

    return job(
        "nerf",
        Radiance,
        lambda g: tuple(torch.randn(256, 3, generator=g) for _ in range(3)),
        loss,
        rows=256,
    )


class Rollout(nn.Module):
    """A field carried forward by a learned stencil, periodic at its borders; every state is compared."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 5, padding=2, padding_mode="circular"),
            nn.Tanh(),
            nn.Conv2d(width, 1, 3, padding=1, padding_mode="circular"),
        )
        self.register_buffer("stencil", torch.tensor([[[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]]))

    def forward(self, field: torch.Tensor, steps: int) -> torch.Tensor:
        states = []
        for _ in range(steps):
            around = functional.pad(field, (1, 1, 1, 1), mode="circular")
            spread = functional.conv2d(around, self.stencil)
            field = field + 0.1 * spread - 0.1 * torch.roll(field, 1, -1) * self.net(field)
            states.append(field)
        return torch.stack(states, 1)


def rollout() -> Job:
    return job(
        "pde-rollout",
        Rollout,
        lambda g: (torch.randn(4, 1, 48, 48, generator=g), torch.randn(4, 6, 1, 48, 48, generator=g)),
        lambda m, b: functional.huber_loss(m(b[0], 6), b[1]),
        rows=4,
    )
