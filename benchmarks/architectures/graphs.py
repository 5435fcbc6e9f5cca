"""Sets, graphs and molecules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from architectures.common import job, to_class
from architectures.sequences import Feed
from memfit.types.job import Job


class DeepSets(nn.Module):
    """Sets of different sizes in one flat tensor: segment means and maxima (Zaheer et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(8, 128), nn.ELU(), nn.Linear(128, 128), nn.ELU())
        self.whole = nn.Sequential(nn.Linear(256, 64), nn.ELU(), nn.Linear(64, 1))

    def forward(self, x: torch.Tensor, owner: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        h, sets = self.each(x), counts.shape[0]
        mean = torch.zeros(sets, 128).scatter_reduce(
            0, owner[:, None].expand_as(h), h, "mean", include_self=False
        )
        most = torch.full((sets, 128), -1e9).scatter_reduce(0, owner[:, None].expand_as(h), h, "amax")
        return self.whole(torch.cat([mean, most], -1))


def deep_sets() -> Job:
    def batch(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        counts = torch.arange(64) % 32 + 16
        owner = torch.arange(64).repeat_interleave(counts)
        return torch.randn(len(owner), 8, generator=g), owner, counts, torch.randn(64, 1, generator=g)

    return job("deep-sets", DeepSets, batch, lambda m, b: functional.smooth_l1_loss(m(*b[:3]), b[3]), rows=64)


class SchNet(nn.Module):
    """Continuous-filter convolutions over unique pairs within a cut-off, found in the step (Schuett 2017)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.kinds = nn.Embedding(10, width)
        self.filters = nn.ModuleList(
            [nn.Sequential(nn.Linear(20, width), nn.Softplus(), nn.Linear(width, width)) for _ in range(2)]
        )
        self.mix = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.out = nn.Linear(width, 1)

    def forward(self, kinds: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        upper = torch.triu(torch.ones(len(kinds), len(kinds), dtype=torch.bool), 1)
        first, second = ((torch.cdist(place, place) < 2.5) & upper).nonzero(as_tuple=True)
        distance = (place[first] - place[second]).norm(dim=-1)
        basis = torch.exp(-10 * (distance[:, None] - torch.linspace(0, 3, 20)).square())
        h = self.kinds(kinds)
        for filters, mix in zip(self.filters, self.mix, strict=True):
            weight = filters(basis)
            sent = torch.zeros_like(h).index_add(0, second, h[first] * weight)
            h = h + mix(functional.softplus(sent.index_add(0, first, h[second] * weight)))
        return self.out(h).sum()


def schnet() -> Job:
    return job(
        "schnet",
        SchNet,
        lambda g: (
            torch.randint(0, 10, (256,), generator=g),
            6 * torch.rand(256, 3, generator=g),
            torch.randn(()),
        ),
        lambda m, b: (m(b[0], b[1]) - b[2]).square(),
        rows=256,
    )


class GraphAttention(nn.Module):
    """Attention over edges, softmax by target through scatter (a graph transformer's layer)."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm, self.feed = nn.BatchNorm1d(width), Feed(width, nn.ReLU())

    def forward(self, h: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        source, target = edges
        q, k, v = self.qkv(h).view(len(h), 3, self.heads, -1).unbind(1)
        score = ((q[target] * k[source]).sum(-1) / q.shape[-1] ** 0.5).float().exp()
        total = torch.zeros(len(h), self.heads).index_add_(0, target, score)
        weight = (score / (total[target] + 1e-9)).to(v.dtype)
        mixed = torch.zeros_like(v).index_add_(0, target, weight[..., None] * v[source])
        return self.feed(self.norm(h + self.out(mixed.flatten(1)).to(h.dtype)))


class GraphTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.layers = nn.Linear(16, 64), nn.ModuleList([GraphAttention() for _ in range(3)])
        self.out = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        for layer in self.layers:
            h = layer(h, edges)
        return self.out(h)


def graph_transformer() -> Job:
    def loss(model: nn.Module, b: Any) -> torch.Tensor:
        logits = model(b[0], b[1])
        return functional.cross_entropy(logits[b[2]].float(), b[3][b[2]])  # labelled nodes only

    return job(
        "graph-transformer",
        GraphTransformer,
        lambda g: (
            torch.randn(512, 16, generator=g),
            torch.randint(0, 512, (2, 4096), generator=g),
            torch.rand(512, generator=g) < 0.5,
            torch.randint(0, 4, (512,), generator=g),
        ),
        loss,
        rows=512,
    )


class Induced(nn.Module):
    """Induced set attention: a few learned points between two attentions (Lee et al. 2019)."""

    def __init__(self, width: int = 64, points: int = 16) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(1, points, width))
        self.inward, self.outward = (nn.MultiheadAttention(width, 4, 0.1, batch_first=True) for _ in range(2))
        self.feed = Feed(width, nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        points = self.points.repeat(x.shape[0], 1, 1)
        inner = points + self.inward(points, x, x)[0]  # with the weights averaged, as its default is
        return self.feed(x + self.outward(x, inner, inner)[0])


class SetTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.blocks = nn.Linear(3, 64), nn.ModuleList([Induced() for _ in range(2)])
        self.out = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x.max(1).values)


def set_transformer() -> Job:
    return job(
        "set-transformer",
        SetTransformer,
        lambda g: (torch.randn(8, 512, 3, generator=g), torch.randint(0, 10, (8,), generator=g)),
        to_class,
        rows=8,
        blocks="blocks",
    )


class Equivariant(nn.Module):
    """Scalars and vectors on atoms, messages along a fixed list of edges (after Schütt et al. 2021)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.kinds = nn.Embedding(5, width)
        self.filters = nn.ModuleList([nn.Linear(16, 3 * width) for _ in range(2)])
        self.sent = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 3 * width)) for _ in range(2)]
        )
        self.mixed = nn.ModuleList([nn.Linear(width, 2 * width, bias=False) for _ in range(2)])
        self.gates = nn.ModuleList([nn.Linear(2 * width, 3 * width) for _ in range(2)])
        self.out = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, kinds: torch.Tensor, place: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        source, target = edges
        apart = place[source] - place[target]
        distance = torch.linalg.vector_norm(apart, dim=-1, keepdim=True) + 1e-3
        basis, direction = torch.sinc(distance * torch.arange(1, 17) / 4), apart / distance
        s, v = self.kinds(kinds), torch.zeros(len(kinds), self.kinds.embedding_dim, 3)
        for filters, sent, mixed, gates in zip(self.filters, self.sent, self.mixed, self.gates, strict=True):
            a, b, c = (sent(s)[source] * filters(basis)).chunk(3, -1)
            s = s + torch.zeros_like(s).index_add(0, target, a)
            moved = b[..., None] * v[source] + c[..., None] * direction[:, None]
            v = v + torch.zeros_like(v).index_add(0, target, moved)
            left, right = torch.einsum("oi,nix->nox", mixed.weight, v).chunk(2, 1)
            a, b, c = gates(torch.cat([s, right.square().sum(-1)], -1)).chunk(3, -1)
            s, v = s + a + b * (left * right).sum(-1), v + c[..., None] * left
        return self.out(s).sum()


def equivariant() -> Job:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        kinds, place, edges, energy, force = batch
        place = place.detach().requires_grad_()
        found = model(kinds, place, edges)
        (slope,) = torch.autograd.grad(found, place, create_graph=True)
        return (found - energy).square() + functional.l1_loss(-slope, force)

    return job(
        "equivariant-forces",
        Equivariant,
        lambda g: (
            torch.randint(0, 5, (96,), generator=g),
            torch.randn(96, 3, generator=g),
            torch.randint(0, 96, (2, 1200), generator=g),
            torch.randn((), generator=g),
            torch.randn(96, 3, generator=g),
        ),
        loss,
        rows=96,
    )
