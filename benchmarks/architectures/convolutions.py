"""Residual and U-shaped networks, and volumes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from architectures.common import job, pictures, to_class, to_target
from memfit.types.job import Job


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norm1(self.first(x)), inplace=True)
        return functional.relu(self.norm2(self.second(y)) + x, inplace=True)


def resnet() -> Job:
    def model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 32, 7, 2, 3, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
            nn.Sequential(*(Residual(32) for _ in range(4))),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 100),
        )

    return job("resnet", model, pictures(16, 96, 100), to_class, rows=16, blocks="4")


class UNet(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()

        def double(a: int, b: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1),
                nn.GroupNorm(4, b),
                nn.SiLU(),
                nn.Conv2d(b, b, 3, padding=1),
                nn.GroupNorm(4, b),
                nn.SiLU(),
            )

        self.down = nn.ModuleList([double(1, width), double(width, 2 * width)])
        self.middle = double(2 * width, 4 * width)
        self.raise_ = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)]
        )
        self.up = nn.ModuleList([double(4 * width, 2 * width), double(2 * width, width)])
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = functional.max_pool2d(x, 2)
        x = self.middle(x)
        for raised, block in zip(self.raise_, self.up, strict=True):
            x = block(torch.cat([raised(x), kept.pop()], 1))
        return self.out(x)


def unet() -> Job:
    return job(
        "unet",
        UNet,
        lambda g: (torch.randn(4, 1, 64, 64, generator=g), torch.randn(4, 1, 64, 64, generator=g)),
        to_target,
        rows=4,
        blocks="up",
    )


def conv3d() -> Job:
    def model() -> nn.Module:
        return nn.Sequential(
            nn.Conv3d(1, 16, 3, padding=1),
            nn.BatchNorm3d(16),
            nn.ReLU(),
            nn.MaxPool3d(2),
            nn.Conv3d(16, 32, 3, padding=1),
            nn.BatchNorm3d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )

    return job(
        "conv3d",
        model,
        lambda g: (torch.randn(4, 1, 24, 24, 24, generator=g), torch.randint(0, 10, (4,), generator=g)),
        to_class,
        rows=4,
    )


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
