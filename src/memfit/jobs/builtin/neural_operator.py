"""Forecasters on gridded fields that mix positions in Fourier space: FNO (Li et al. 2021, arXiv 2010.08895)
and AFNO (Guibas et al. 2022, arXiv 2111.13587; FourCastNet, Pathak et al. 2022, arXiv 2202.11214).

`SpectralMixing` needs float32 under any plan: there is no FFT in bfloat16, and sums over a whole grid exceed
the precision of an 8-bit mantissa.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.nn import functional


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForecasterSize:
    """Size of a forecaster.

    ``layers``: number of blocks. ``width``: channels inside the network. ``channels``: number of fields.
    ``grid``: (rows, columns) of a field. ``patch``: squares of ``patch`` x ``patch`` grid points are embedded
    as one position. ``modes``: number of wavenumbers per axis and sign that an FNO keeps, each with its own
    weights; 0 selects an AFNO, whose weights are shared by all wavenumbers and divided into ``groups`` of
    channels. ``positions``: add a learned embedding of positions. ``rollout``: number of forecast steps in
    the loss. ``batch_size``: windows of a step.
    """

    layers: int
    width: int
    channels: int
    grid: tuple[int, int]
    patch: int
    rollout: int
    batch_size: int
    modes: int = 0
    groups: int = 1
    positions: bool = False


class ModeFilter(nn.Module):
    """Multiplies the channels at every kept wavenumber by a complex matrix of its own; the other wavenumbers
    become zero. The lowest ``size.modes`` are kept along columns, and along rows as many of either sign."""

    def __init__(self, size: ForecasterSize) -> None:
        super().__init__()
        self.modes, scale = size.modes, size.width**-0.5
        self.weight = nn.Parameter(scale * torch.randn(2 * size.modes, size.modes, size.width, size.width, 2))

    def forward(self, spectrum: torch.Tensor) -> torch.Tensor:
        """Input and output are complex (batch, rows, columns // 2 + 1, channels)."""
        modes, rows = self.modes, spectrum.shape[1]
        low = torch.cat([spectrum[:, :modes, :modes], spectrum[:, rows - modes :, :modes]], dim=1)
        low = torch.einsum("bxyi,xyio->bxyo", low, torch.view_as_complex(self.weight))
        high = functional.pad(low, (0, 0, 0, spectrum.shape[2] - modes))
        gap = high.new_zeros(len(high), rows - 2 * modes, *high.shape[2:])
        return torch.cat([high[:, :modes], gap, high[:, modes:]], dim=1)


class SharedFilter(nn.Module):
    """Two layers of complex block-diagonal matrices, the same for all wavenumbers, with a ReLU of real and
    imaginary parts between them and soft shrinkage after them. Input and output are complex (batch, rows,
    columns // 2 + 1, channels).
    """

    def __init__(self, size: ForecasterSize) -> None:
        super().__init__()
        self.groups, group_width = size.groups, size.width // size.groups
        self.weights = nn.ParameterList(
            [nn.Parameter(0.02 * torch.randn(size.groups, group_width, group_width, 2)) for _ in range(2)]
        )
        self.biases = nn.ParameterList(
            [nn.Parameter(0.02 * torch.randn(size.groups, group_width, 2)) for _ in range(2)]
        )

    def forward(self, spectrum: torch.Tensor) -> torch.Tensor:
        x = spectrum.unflatten(-1, (self.groups, -1))
        x = self._linear(x, 0)
        x = torch.view_as_complex(functional.relu(torch.view_as_real(x)))
        x = torch.view_as_real(self._linear(x, 1))
        return torch.view_as_complex(functional.softshrink(x, 0.01)).flatten(-2)

    def _linear(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        weight, bias = (torch.view_as_complex(p[layer]) for p in (self.weights, self.biases))
        return torch.einsum("bxygi,gio->bxygo", x, weight) + bias


class SpectralMixing(nn.Module):
    """Fourier transform over rows and columns, filter, and inverse transform of x (batch, rows, columns,
    channels), plus x itself. The filter is a `ModeFilter` if ``size.modes`` is not 0, else a `SharedFilter`.
    The input must be float32."""

    def __init__(self, size: ForecasterSize) -> None:
        super().__init__()
        self.filter = ModeFilter(size) if size.modes else SharedFilter(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
        filtered_spectrum = self.filter(spectrum)
        output: torch.Tensor = torch.fft.irfft2(filtered_spectrum, s=x.shape[1:3], dim=(1, 2), norm="ortho")
        return output + x


class OperatorBlock(nn.Module):
    """`SpectralMixing`, then a perceptron at each position with a hidden layer four times as wide, each with
    a layer norm before it and a residual."""

    def __init__(self, size: ForecasterSize) -> None:
        super().__init__()
        hidden = 4 * size.width
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        self.mixing = SpectralMixing(size)
        self.mlp_norm = nn.LayerNorm(size.width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(size.width, hidden), nn.GELU(), nn.Linear(hidden, size.width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mixing(self.norm(x))
        output: torch.Tensor = x + self.mlp(self.mlp_norm(x))
        return output


class Forecaster(nn.Module):
    """Predicts the fields of several steps, one after another: each forecast is computed from the one
    before."""

    def __init__(self, size: ForecasterSize) -> None:
        super().__init__()
        patch, rows, columns = size.patch, *(n // size.patch for n in size.grid)
        self.patch = patch
        self.embed = nn.Conv2d(size.channels, size.width, patch, stride=patch)
        positions = 0.02 * torch.randn(1, rows, columns, size.width) if size.positions else None
        self.positions = None if positions is None else nn.Parameter(positions)
        self.blocks = nn.ModuleList([OperatorBlock(size) for _ in range(size.layers)])
        self.to_fields = nn.Linear(size.width, size.channels * patch**2, bias=False)

    def forward(self, fields: torch.Tensor, steps: int) -> list[torch.Tensor]:
        """Return a list of ``steps`` forecasts, the first one step after ``fields``.

        ``fields`` and each forecast are float32 (batch, channels, rows, columns), in units of the standard
        deviation of the training data.
        """
        forecasts = []
        for _ in range(steps):
            # a step changes little, so the change is added in float32
            fields = fields + self.change(fields).float()
            forecasts.append(fields)
        return forecasts

    def change(self, fields: torch.Tensor) -> torch.Tensor:
        x = self.embed(fields.to(self.embed.weight.dtype)).permute(0, 2, 3, 1)
        if self.positions is not None:
            x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return functional.pixel_shuffle(self.to_fields(x).permute(0, 3, 1, 2), self.patch)
