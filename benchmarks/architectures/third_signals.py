"""Of the third set: pictures, speech, volumes and scenes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from architectures.common import job, to_target
from memfit.types.job import Job


class Crops(nn.Module):
    """Large and small crops through one network, shared evenly by prototypes (SwAV, Caron et al. 2020)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
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
            nn.Linear(64, 4 * width * 16),
            nn.Unflatten(1, (4 * width, 4, 4)),
            nn.ReLU(),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1),
            nn.Tanh(),
        )
        self.critic = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.InstanceNorm2d(2 * width, affine=True),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * width * 64, 1),
        )

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
