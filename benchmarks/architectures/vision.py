"""Networks for pictures: mixers, self-supervision, detection."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from architectures.common import job, pictures
from architectures.sequences import Feed
from memfit.types.job import Job


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
