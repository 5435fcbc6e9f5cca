"""Of the third set: translation, generation, clicks, molecules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from architectures.common import job, next_token, words
from memfit.types.job import Job


class Translator(nn.Module):
    """Two-way GRU encoder; GRU cells with additive attention decode word by word (Bahdanau et al. 2015)."""

    def __init__(self, vocabulary: int = 800, width: int = 96) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary, width)
        self.encoder = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(3 * width, width)
        self.keys, self.query = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.score, self.out = nn.Linear(width, 1), nn.Linear(3 * width, vocabulary)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        memory, last = self.encoder(self.source(source))
        keys, state, logits = self.keys(memory), last[0], []
        for word in self.target(target).unbind(1):
            weight = self.score(torch.tanh(keys + self.query(state)[:, None])).softmax(1)
            context = (weight * memory).sum(1)
            state = self.cell(torch.cat([word, context], -1), state)
            logits.append(self.out(torch.cat([state, context], -1)))
        return torch.stack(logits, 1)


def translator() -> Job:
    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        logits = model(batch[0], batch[1][:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), batch[1][:, 1:].flatten())

    return job(
        "gru-attention",
        Translator,
        lambda g: (
            torch.randint(0, 800, (16, 24), generator=g),
            torch.randint(0, 800, (16, 17), generator=g),
        ),
        loss,
        rows=16,
    )


class Coupling(nn.Module):
    """Normalise, mix channels by an invertible matrix, and shift and scale one half by the other (Kingma and
    Dhariwal 2018)."""

    def __init__(self, channels: int, width: int = 48) -> None:
        super().__init__()
        self.shift, self.scale = (nn.Parameter(torch.zeros(1, channels, 1, 1)) for _ in range(2))
        self.mix = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])
        self.net = nn.Sequential(
            nn.Conv2d(channels // 2, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )

    def forward(self, x: torch.Tensor, volume: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = x.shape[-1] * x.shape[-2]
        x = (x + self.shift) * self.scale.exp()
        x = functional.conv2d(x, self.mix[:, :, None, None])
        kept, moved = x.chunk(2, 1)
        shift, scale = self.net(kept).chunk(2, 1)
        scale = torch.sigmoid(scale + 2)
        volume = volume + pixels * (self.scale.sum() + torch.linalg.slogdet(self.mix)[1])
        return torch.cat([kept, (moved + shift) * scale], 1), volume + scale.log().flatten(1).sum(1)


class Glow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Coupling(12) for _ in range(4)] + [Coupling(24) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, volume, prior = functional.pixel_unshuffle(x, 2), torch.zeros(len(x)), torch.zeros(len(x))
        for index, block in enumerate(self.blocks):
            if index == 4:
                x, out = functional.pixel_unshuffle(x, 2).chunk(2, 1)
                prior = prior + out.square().flatten(1).sum(1)
            x, volume = block(x, volume)
        return (0.5 * (prior + x.square().flatten(1).sum(1)) - volume).mean()


def glow() -> Job:
    return job(
        "glow", Glow, lambda g: torch.rand(8, 3, 32, 32, generator=g), lambda m, x: m(x) / 3072, rows=8
    )


class Conditioned(nn.Module):
    def __init__(self, inner: int, outer: int, time: int = 64) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, padding=1))
        self.time = nn.Linear(time, 2 * outer)
        self.norm, self.second = nn.GroupNorm(8, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale, shift = self.time(functional.silu(time))[..., None, None].chunk(2, 1)
        h = self.norm(self.first(x)) * (1 + scale) + shift
        return self.second(functional.silu(h)) + self.skip(x)


class Denoiser(nn.Module):
    """A small diffusion U-Net; a copy follows its weights as a moving average."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 64))
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.down = nn.ModuleList([Conditioned(32, 32), Conditioned(32, 64)])
        self.middle, self.attention = Conditioned(64, 64), nn.MultiheadAttention(64, 4, batch_first=True)
        self.up = nn.ModuleList([Conditioned(128, 32), Conditioned(64, 32)])
        self.last = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        angle = t[:, None] * torch.exp(-torch.arange(16) / 2)
        time = self.time(torch.cat([angle.sin(), angle.cos()], -1))
        x, kept = self.first(x), []
        for block in self.down:
            x = block(x, time)
            kept.append(x)
            x = functional.avg_pool2d(x, 2)
        x = self.middle(x, time)
        tokens = x.flatten(2).transpose(1, 2)
        x = x + self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).view_as(x)
        for block in self.up:
            x = functional.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, kept.pop()], 1), time)
        return self.last(x)


class Diffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Denoiser()
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, x: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for kept, new in zip(self.average.parameters(), self.net.parameters(), strict=True):
                kept.lerp_(new, 0.001)
        level = torch.cos(t)[:, None, None, None]
        noisy = level * x + (1 - level.square()).sqrt() * noise
        return functional.mse_loss(self.net(noisy, t).float(), noise)


def diffusion() -> Job:
    return job(
        "diffusion-ema",
        Diffusion,
        lambda g: (
            torch.randn(8, 3, 32, 32, generator=g),
            torch.rand(8, generator=g),
            torch.randn(8, 3, 32, 32, generator=g),
        ),
        lambda m, b: m(*b),
        rows=8,
    )


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


class Selective(nn.Module):
    """A selective state space whose recurrence is a cumulative sum in logarithms (after Gu and Dao 2023)."""

    def __init__(self, width: int = 64, states: int = 8) -> None:
        super().__init__()
        self.norm, self.inside = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.conv = nn.Conv1d(2 * width, 2 * width, 4, padding=3, groups=2 * width)
        self.gates, self.step = nn.Linear(2 * width, 2 * states), nn.Linear(2 * width, 2 * width)
        self.decay = nn.Parameter(torch.linspace(-1, 0.5, states).repeat(2 * width, 1))
        self.direct, self.out = nn.Parameter(torch.ones(2 * width)), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u, gate = self.inside(self.norm(x)).chunk(2, -1)
        u = functional.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        b, c = self.gates(u).chunk(2, -1)
        step = functional.softplus(self.step(u))
        log = torch.cumsum(-step[..., None] * self.decay.exp() / 16, 1)
        fed = (step * u)[..., None] * b[:, :, None]
        state = torch.exp(log) * torch.cumsum(fed * torch.exp(-log), 1)
        y = (state * c[:, :, None]).sum(-1) + self.direct * u
        return x + self.out(y * functional.silu(gate))


class SelectiveLM(nn.Module):
    def __init__(self, vocabulary: int = 1000, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Selective(width) for _ in range(3)])
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def selective() -> Job:
    return job("selective-cumsum", SelectiveLM, words(4, 64, 1000), next_token, rows=4, head="head")


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
