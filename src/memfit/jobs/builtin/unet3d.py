"""A U-Net for volumes as in nnU-Net (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z).

Each stage has two convolutions with instance norm and leaky ReLU. Strided convolutions go down, transposed
ones up, and every resolution except the lowest has an output ("deep supervision").
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UNetSize:
    """Size of a U-Net.

    ``features``: channels of each stage, from full resolution down; each stage after the first halves the
    edge of the volume. ``channels``: channels of the input volume. ``classes``: number of classes of the
    output. ``patch``: edge of the input in voxels. ``batch_size``: volumes of a step.
    """

    features: tuple[int, ...]
    channels: int
    classes: int
    patch: int
    batch_size: int


class Convolution(nn.Module):
    """A convolution of 3 x 3 x 3 voxels, then instance norm and leaky ReLU. The edges of the volume are
    divided by ``stride``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm = nn.InstanceNorm3d(out_channels, affine=True)
        self.act = nn.LeakyReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.act(self.norm(self.conv(x)))
        return output


class UnetStage(nn.Module):
    """Two convolutions at one resolution. Without ``up``, the first divides the edges of the input by
    ``stride``. With ``up``, the input comes from the next lower resolution: it is enlarged twofold to
    ``out_channels`` and concatenated with ``skip``, the output of the stage at this resolution on the way
    down."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, up: bool = False) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(in_channels, out_channels, 2, stride=2) if up else None
        self.first = Convolution(2 * out_channels if up else in_channels, out_channels, stride)
        self.second = Convolution(out_channels, out_channels)

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if self.up is not None:
            assert skip is not None
            x = torch.cat([self.up(x), skip], dim=1)
        output: torch.Tensor = self.second(self.first(x))
        return output


class UNet(nn.Module):
    """The U-Net. ``stages``: in order of use, those down to the lowest resolution, then those up to full
    resolution."""

    def __init__(self, size: UNetSize) -> None:
        super().__init__()
        features = size.features
        input_channels = (size.channels, *features)
        down = [
            UnetStage(g, f, stride=1 + (i > 0))
            for i, (g, f) in enumerate(zip(input_channels, features, strict=False))
        ]
        up = [
            UnetStage(below, f, up=True) for below, f in zip(features[:0:-1], features[-2::-1], strict=True)
        ]
        self.depth = len(down)
        self.stages = nn.ModuleList([*down, *up])
        self.heads = nn.ModuleList([nn.Conv3d(f, size.classes, 1) for f in features[-2::-1]])

    def forward(self, volumes: torch.Tensor) -> list[torch.Tensor]:
        """Return a list of logits (batch, classes, x, y, z), one for each resolution except the lowest, full
        resolution last, for ``volumes`` (batch, channels, x, y, z)."""
        x = volumes.to(next(self.parameters()).dtype)
        skips = []
        for stage in self.stages[: self.depth]:
            x = stage(x)
            skips.append(x)
        logits = []
        for stage, skip, head in zip(self.stages[self.depth :], skips[-2::-1], self.heads, strict=True):
            x = stage(x, skip)
            logits.append(head(x))
        return logits
