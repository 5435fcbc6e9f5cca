"""HyenaDNA (Nguyen et al. 2023, arXiv 2306.15794): a causal language model of DNA. It mixes positions with a
convolution as long as the sequence, whose filter a small network generates and which is applied by FFT (Poli
et al. 2023, arXiv 2302.10866).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import torch
from torch import nn
from torch.nn import functional

BASES: Final = 4
_TIME_FEATURES: Final = 5  # time itself, two cosines and two sines of it


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HyenaSize:
    """Size of a HyenaDNA.

    ``layers``: number of blocks. ``width``: channels of a token. ``filter_width``: width of the network that
    generates the long filter. ``kmer``: each token is the last ``kmer`` bases, as in DNABERT (Ji et al.
    2021). ``vocabulary``: number of token embeddings. ``length``: tokens of a window, one per base.
    ``batch_size``: windows of a step.
    """

    layers: int
    width: int
    filter_width: int
    kmer: int
    vocabulary: int
    length: int
    batch_size: int


# hyenadna-large-1m: 6.6 M parameters, one sequence of a million bases on each of its GPUs.
LARGE_1M: Final = HyenaSize(
    layers=8, width=256, filter_width=64, kmer=1, vocabulary=16, length=1_000_000, batch_size=1
)


def causal_convolution(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Return ``x`` (batch, width, length) convolved along length with ``taps`` (width, length), one filter
    per channel: output i is the sum of taps[k] x[i - k] over k up to i. It is computed by FFT in float32 and
    returned in the dtype of ``x``."""
    length = x.shape[-1]
    spectrum = torch.fft.rfft(x.float(), n=2 * length) * torch.fft.rfft(taps.float(), n=2 * length)
    full_output: torch.Tensor = torch.fft.irfft(spectrum, n=2 * length)
    return full_output[..., :length].to(x.dtype)


class Sine(nn.Module):
    """sin(frequency * x) with a learned frequency, at first 10, for each of the ``width`` channels in x's
    last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.full((width,), 10.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.frequency * x)


class LongFilter(nn.Module):
    """Generates the filter taps of every channel as a function of time, from 0 to 1 over the sequence, by a
    small network with ``hidden`` units per layer. Taps decay exponentially with time, at a different fixed
    rate in each of the ``width`` channels."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        sine = Sine(hidden)  # one frequency per unit for all three layers, as published
        self.network = nn.Sequential(
            nn.Linear(_TIME_FEATURES, hidden),
            sine,
            nn.Linear(hidden, hidden),
            sine,
            nn.Linear(hidden, hidden),
            sine,
            nn.Linear(hidden, width, bias=False),
        )
        fastest, slowest = math.log(1e-2) / 0.3, math.log(1e-2) / 1.5
        self.rates: torch.Tensor
        self.register_buffer("rates", torch.linspace(slowest, fastest, width).abs())

    def forward(self, length: int) -> torch.Tensor:
        """Return taps (width, length) for a sequence of ``length`` tokens, at least float32 even if
        parameters are in fewer bits."""
        time = torch.linspace(0, 1, length, device=self.rates.device)[:, None]
        bands = torch.tensor([1e-4, 1.0], device=time.device) * (2 * math.pi * (length - 1) / length)
        angles = time * bands
        features = torch.cat([time, angles.cos(), -angles.sin()], dim=-1)
        taps = self.network(features.to(self.rates.dtype))
        return (taps * torch.exp(-time * self.rates)).T  # type: ignore[no-any-return]


class LongConvolution(nn.Module):
    """Convolves every channel causally with taps of its own, as long as the sequence, from a `LongFilter`,
    and adds the input times a learned factor per channel."""

    def __init__(self, size: HyenaSize) -> None:
        super().__init__()
        self.filter = LongFilter(size.width, size.filter_width)
        self.direct = nn.Parameter(torch.randn(size.width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input and output have the shape ``(batch, width, length)``."""
        return causal_convolution(x, self.filter(x.shape[-1])) + x * self.direct[:, None]


class Hyena(nn.Module):
    """The Hyena operator of order two: three projections with a short convolution each; the third is
    multiplied by the second, convolved by a `LongConvolution`, and multiplied by the first; then a linear
    layer."""

    def __init__(self, size: HyenaSize) -> None:
        super().__init__()
        self.three = nn.Linear(size.width, 3 * size.width)
        self.short = nn.Conv1d(3 * size.width, 3 * size.width, 3, padding=2, groups=3 * size.width)
        self.long = LongConvolution(size)
        self.mix = nn.Linear(size.width, size.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input and output have the shape ``(batch, length, width)``; a position sees itself and earlier
        ones.
        """
        length = x.shape[1]
        projections = self.short(self.three(x).transpose(1, 2))[..., :length]
        outer, inner, value = projections.chunk(3, dim=1)
        return self.mix((self.long(value * inner) * outer).transpose(1, 2))  # type: ignore[no-any-return]


class HyenaBlock(nn.Module):
    """The `Hyena` operator, then a feed-forward part with a hidden layer four times as wide, each with a
    layer norm before it and a residual."""

    def __init__(self, size: HyenaSize) -> None:
        super().__init__()
        self.norm_mixer = nn.LayerNorm(size.width)
        self.mixer = Hyena(size)
        self.norm_feed = nn.LayerNorm(size.width)
        self.widen = nn.Linear(size.width, 4 * size.width)
        self.narrow = nn.Linear(4 * size.width, size.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input and output have the shape ``(batch, length, width)``."""
        x = x + self.mixer(self.norm_mixer(x))
        return x + self.narrow(functional.gelu(self.widen(self.norm_feed(x))))  # type: ignore[no-any-return]


class HyenaDna(nn.Module):
    """Maps tokens to logits of the base that follows each. At first all logits are zero."""

    def __init__(self, size: HyenaSize) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocabulary, size.width)
        self.blocks = nn.ModuleList([HyenaBlock(size) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, BASES, bias=False)
        # Initialized as a table of what follows each token: the signal is too weak to be found in noise.
        nn.init.normal_(self.embed.weight, std=0.2)
        for name, parameter in self.named_parameters():
            if any(part in name for part in ("head.", "narrow.", "mix.")):
                nn.init.zeros_(parameter)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits ``(batch, length, 4)`` of the base after each of ``tokens`` (batch, length)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]
