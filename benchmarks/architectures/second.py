"""The second set: written after the tracer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from architectures.common import job, pictures, to_class, to_target
from architectures.sequences import Feed
from memfit.types.job import Job


class NextBlock(nn.Module):
    """ConvNeXt: depthwise 7x7, LayerNorm over channels, widened GELU, layer scale (Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.wide = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.back, self.scale = nn.Linear(4 * width, width), nn.Parameter(1e-2 * torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.scale * self.back(functional.gelu(self.wide(y)))
        keep = (torch.rand(x.shape[0], 1, 1, 1) > 0.1).to(y.dtype)  # stochastic depth
        return x + y.permute(0, 3, 1, 2) * keep


def convnext() -> Job:
    def model() -> nn.Module:
        blocks = nn.Sequential(*(NextBlock(48) for _ in range(3)))
        return nn.Sequential(
            nn.Conv2d(3, 48, 4, 4), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)
        )

    return job("convnext", model, pictures(8, 96, 10), to_class, rows=8, blocks="1")


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates and a sum of skips (van den Oord et al. 2016)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.enter = nn.Conv1d(1, width, 1)
        self.gates = nn.ModuleList(
            [
                nn.utils.parametrizations.weight_norm(nn.Conv1d(width, 2 * width, 2, dilation=2**i))
                for i in range(6)
            ]
        )
        self.mix = nn.ModuleList([nn.Conv1d(width, 2 * width, 1) for _ in range(6)])
        self.out = nn.Conv1d(width, 64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, skips = self.enter(x), 0
        for gate, mix in zip(self.gates, self.mix, strict=True):
            a, b = gate(functional.pad(x, (gate.dilation[0], 0))).chunk(2, 1)
            residual, skip = mix(torch.tanh(a) * torch.sigmoid(b)).chunk(2, 1)
            x, skips = x + residual, skips + skip
        return self.out(functional.relu(skips))


def wavenet() -> Job:
    return job(
        "wavenet",
        WaveNet,
        lambda g: (torch.randn(4, 1, 1024, generator=g), torch.randint(0, 64, (4, 1024), generator=g)),
        to_class,
        rows=4,
    )


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


class Flow(nn.Module):
    """A neural ODE with fixed Runge-Kutta steps; each step is checkpointed by the model."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(
            nn.Linear(33, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 32)
        )

    def slope(self, t: float, x: torch.Tensor) -> torch.Tensor:
        return self.field(torch.cat([x, torch.full_like(x[:, :1], t)], -1))

    def step(self, x: torch.Tensor, t: float, dt: float) -> torch.Tensor:
        k1 = self.slope(t, x)
        k2 = self.slope(t + dt / 2, x + dt / 2 * k1)
        k3 = self.slope(t + dt / 2, x + dt / 2 * k2)
        return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + self.slope(t + dt, x + dt * k3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(8):
            x = checkpoint(self.step, x, i / 8, 1 / 8, use_reentrant=False)
        return x


def neural_ode() -> Job:
    return job(
        "neural-ode",
        Flow,
        lambda g: (torch.randn(1024, 32, generator=g), torch.randn(1024, 32, generator=g)),
        to_target,
        rows=1024,
    )


class Mixer(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm, self.tokens, self.channels = (
            nn.LayerNorm(width),
            Feed(tokens, nn.GELU()),
            Feed(width, nn.GELU()),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.channels(x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2))


def mlp_mixer() -> Job:
    def model() -> nn.Module:
        patches = nn.Sequential(nn.Conv2d(3, 64, 8, 8), nn.Flatten(2))
        blocks = nn.Sequential(*(Mixer(64, 64) for _ in range(4)))
        return nn.ModuleDict({"patches": patches, "blocks": blocks, "head": nn.Linear(64, 10)})

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        parts: Any = model
        hidden = parts["blocks"](parts["patches"](batch[0]).transpose(1, 2))
        return functional.cross_entropy(parts["head"](hidden.mean(1)), batch[1], label_smoothing=0.1)

    return job("mlp-mixer", model, pictures(16, 64, 10), loss, rows=16, blocks="blocks")


class Tagger(nn.Module):
    """A two-way LSTM under a conditional random field: the forward algorithm as a loop of logsumexp."""

    def __init__(self, tags: int = 12) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(256, 32), nn.LSTM(32, 48, bidirectional=True, batch_first=True)
        self.score, self.move = nn.Linear(96, tags), nn.Parameter(torch.randn(tags, tags))

    def forward(self, words: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        emit = self.score(self.body(self.embed(words))[0])
        alpha = emit[:, 0]
        for t in range(1, words.shape[1]):
            alpha = torch.logsumexp(alpha[:, :, None] + self.move, 1) + emit[:, t]
        path = emit.gather(2, tags[..., None]).sum((1, 2)) + self.move[tags[:, :-1], tags[:, 1:]].sum(1)
        return (alpha.logsumexp(-1) - path).mean()


def crf_tagger() -> Job:
    return job(
        "bilstm-crf",
        Tagger,
        lambda g: (torch.randint(0, 256, (16, 40), generator=g), torch.randint(0, 12, (16, 40), generator=g)),
        lambda m, b: m(*b),
        rows=16,
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


class Variational(nn.Module):
    """A convolutional variational autoencoder: sampled latents, upsampling, two losses."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(1, 16, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 32, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
        )
        self.latent, self.open = nn.Linear(32 * 144, 32), nn.Linear(16, 32 * 144)
        self.decode = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Conv2d(32, 16, 3, padding=1),
            nn.InstanceNorm2d(16),
            nn.PReLU(),
            nn.PixelShuffle(2),
            nn.Conv2d(4, 1, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_var = self.latent(self.encode(x)).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        return self.decode(self.open(z).view(-1, 32, 12, 12)), mean, log_var


def vae() -> Job:
    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        again, mean, log_var = model(x)
        apart = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(-1).mean()
        return functional.binary_cross_entropy_with_logits(again, x) + 1e-3 * apart

    return job("vae", Variational, lambda g: torch.rand(32, 1, 48, 48, generator=g), loss, rows=32)
