"""The third set of jobs for benchmarks/memory_truth.py: written when nothing of the tracer was left to do,
each different in kind from those before, and measured once before any change that they might ask for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from architectures import job, next_token, to_target, words
from torch import nn
from torch.nn import functional

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
            nn.Conv2d(channels // 2, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )  # fmt: skip

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


class Crops(nn.Module):
    """Large and small crops through one network, shared evenly by prototypes (SwAV, Caron et al. 2020)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1), nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.project = nn.Sequential(
            nn.Linear(2 * width, 256), nn.BatchNorm1d(256), nn.ReLU(inplace=True), nn.Linear(256, 64)
        )
        self.prototypes = nn.utils.parametrizations.weight_norm(nn.Linear(64, 300, bias=False))

    def forward(self, crops: list[torch.Tensor]) -> torch.Tensor:
        found = [self.net(torch.cat(crops[:2])), self.net(torch.cat(crops[2:]))]
        scores = self.prototypes(functional.normalize(self.project(torch.cat(found)), dim=1)).float()
        parts, total = scores.chunk(len(crops)), torch.zeros(())
        for index in range(2):
            wanted = self._assigned(parts[index].detach())
            for other, part in enumerate(parts):
                if other != index:
                    total = total - (wanted * functional.log_softmax(part / 0.1, 1)).sum(1).mean()
        return total / (2 * (len(crops) - 1))

    @torch.no_grad()
    def _assigned(self, score: torch.Tensor) -> torch.Tensor:
        q = torch.exp(score / 0.05).t()
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(1, keepdim=True) * q.shape[0]
            q /= q.sum(0, keepdim=True) * q.shape[1]
        return (q * q.shape[1]).t()


def crops() -> Job:
    sizes = (64, 64, 32, 32, 32, 32)
    return job(
        "swav",
        Crops,
        lambda g: [torch.randn(8, 3, size, size, generator=g) for size in sizes],
        lambda m, b: m(b),
        rows=8,
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


class Detector(nn.Module):
    """Convolutions, then torch's own transformer with learned queries (after Carion et al. 2020)."""

    def __init__(self, width: int = 64, queries: int = 20) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 7, 4, 3), nn.ReLU(), nn.Conv2d(32, width, 3, 2, 1), nn.ReLU()
        )
        self.place = nn.Parameter(torch.randn(144, width) / 8)
        self.queries = nn.Parameter(torch.randn(queries, width) / 8)
        self.transformer = nn.Transformer(width, 4, 2, 2, 256, dropout=0.1, batch_first=True)
        self.classes, self.boxes = nn.Linear(width, 11), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = self.net(x).flatten(2).transpose(1, 2) + self.place
        found = self.transformer(seen, self.queries.expand(len(x), -1, -1))
        return self.classes(found), self.boxes(found).sigmoid()


def detector() -> Job:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        pictures_, labels, boxes = batch
        classes, found = model(pictures_)
        with torch.no_grad():  # each object takes the query that costs least
            chance = classes.softmax(-1).gather(2, labels[:, None].expand(-1, classes.shape[1], -1))
            chosen = (torch.cdist(found.float(), boxes, p=1) - chance).argmin(1)
        matched = found.gather(1, chosen[..., None].expand(-1, -1, 4))
        wanted = torch.full(classes.shape[:2], 10).scatter(1, chosen, labels)
        return functional.cross_entropy(classes.mT, wanted) + functional.l1_loss(matched, boxes)

    return job(
        "detr",
        Detector,
        lambda g: (
            torch.randn(4, 3, 96, 96, generator=g),
            torch.randint(0, 10, (4, 6), generator=g),
            torch.rand(4, 6, 4, generator=g),
        ),
        loss,
        rows=4,
    )


class Adversaries(nn.Module):
    """A critic with a gradient penalty, and the generator it judges, in one loss (Gulrajani et al. 2017)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(64, 4 * width * 16), nn.Unflatten(1, (4 * width, 4, 4)), nn.ReLU(),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip
        self.critic = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.InstanceNorm2d(2 * width, affine=True), nn.LeakyReLU(0.2), nn.Flatten(),
            nn.Linear(2 * width * 64, 1),
        )  # fmt: skip

    def forward(self, real: torch.Tensor, noise: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        made = self.generator(noise)
        between = (share * real + (1 - share) * made.detach()).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(2, dim=1) - 1).square().mean()
        judged = self.critic(made.detach()).mean() - self.critic(real).mean() + 10 * penalty
        return judged - self.critic(made).mean()


def adversaries() -> Job:
    return job(
        "wgan-gp",
        Adversaries,
        lambda g: (
            torch.randn(16, 3, 32, 32, generator=g),
            torch.randn(16, 64, generator=g),
            torch.rand(16, 1, 1, 1, generator=g),
        ),
        lambda m, b: m(*b),
        rows=16,
    )


class Conformer(nn.Module):
    def __init__(self, width: int = 80) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(4)])
        self.feed = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)) for _ in "ab"]
        )
        self.attention = nn.MultiheadAttention(width, 4, dropout=0.1, batch_first=True)
        self.wide, self.narrow = nn.Conv1d(width, 2 * width, 1), nn.Conv1d(width, width, 1)
        self.depth, self.norm = nn.Conv1d(width, width, 15, padding=7, groups=width), nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
        x = x + 0.5 * self.feed[0](self.norms[0](x))
        h = self.norms[1](x)
        x = x + self.attention(h, h, h, key_padding_mask=padded, need_weights=False)[0]
        h = functional.glu(self.wide(self.norms[2](x).transpose(1, 2)), 1)
        x = x + self.narrow(functional.silu(self.norm(self.depth(h)))).transpose(1, 2)
        return x + 0.5 * self.feed[1](self.norms[3](x))


class Speech(nn.Module):
    """Spectrograms of several lengths to letters, aligned by the loss (CTC)."""

    def __init__(self, width: int = 80) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.inside = nn.Linear(16 * 10, width)
        self.blocks = nn.ModuleList([Conformer(width) for _ in range(2)])
        self.out = nn.Linear(width, 30)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        x = self.inside(self.down(x[:, None]).transpose(1, 2).flatten(2))
        padded = torch.arange(x.shape[1])[None] >= lengths[:, None]
        for block in self.blocks:
            x = block(x, padded)
        return self.out(x).log_softmax(-1)


def speech() -> Job:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        sound, lengths, letters, counts = batch
        found = model(sound, lengths).transpose(0, 1).float()
        return functional.ctc_loss(found, letters, lengths, counts, zero_infinity=True)

    return job(
        "conformer-ctc",
        Speech,
        lambda g: (
            torch.randn(6, 200, 40, generator=g),
            torch.tensor([50, 48, 44, 40, 38, 30]),
            torch.randint(1, 30, (6, 14), generator=g),
            torch.tensor([14, 12, 12, 10, 9, 8]),
        ),
        loss,
        rows=6,
        blocks="blocks",
    )


class Masked(nn.Module):
    """A random quarter of the patches is encoded, all are rebuilt (He et al. 2022)."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.patch, self.place = nn.Linear(192, width), nn.Parameter(torch.randn(64, width) / 10)
        layer = nn.TransformerEncoderLayer(
            width, 4, 384, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.decoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.hidden, self.out = nn.Parameter(torch.zeros(width)), nn.Linear(width, 192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = functional.unfold(x, 8, stride=8).transpose(1, 2)
        order = torch.rand(patches.shape[:2]).argsort(1)
        back = order.argsort(1)
        tokens = self.patch(patches) + self.place
        seen = tokens.gather(1, order[:, :16, None].expand(-1, -1, tokens.shape[-1]))
        encoded = self.encoder(seen)
        filled = torch.cat([encoded, self.hidden.expand(len(x), 48, -1).to(encoded.dtype)], 1)
        whole = filled.gather(1, back[..., None].expand_as(filled)) + self.place
        error = (self.out(self.decoder(whole)).float() - patches).square().mean(-1)
        hidden = (back >= 16).float()
        return (error * hidden).sum() / hidden.sum()


def masked() -> Job:
    return job(
        "masked-autoencoder",
        Masked,
        lambda g: torch.randn(16, 3, 64, 64, generator=g),
        lambda m, x: m(x),
        rows=16,
        blocks="encoder.layers",
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
            nn.Conv2d(1, width, 5, padding=2, padding_mode="circular"), nn.Tanh(),
            nn.Conv2d(width, 1, 3, padding=1, padding_mode="circular"),
        )  # fmt: skip
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


THIRD_SET: tuple[Callable[[], Job], ...] = (
    translator, glow, diffusion, clicks, selective, equivariant, crops, spectral, detector, adversaries,
    speech, masked, radiance, rollout,
)  # fmt: skip
