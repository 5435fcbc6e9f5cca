"""MoLFormer (Ross et al. 2022, Nature Machine Intelligence 4:1256): an encoder of SMILES with rotary
positions and linear attention, read out as one property of the molecule."""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch import nn
from torch.nn import functional

TYPICAL_TOKENS: Final = 16  # scale of the sum at the start; nothing else depends on it


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MolformerSize:
    """``length`` in tokens, ``batch_size`` in molecules. ``features`` of the attention's kernel per head.
    ``masked``: a head that restores masked tokens, as in pre-training, beside the property."""

    layers: int
    width: int
    heads: int
    features: int
    feed: int
    length: int
    vocabulary: int
    batch_size: int
    masked: bool = False


# github.com/IBM/molformer, training/run_pubchem_light.sh: 1,200 molecules on each of its GPUs.
XL: Final = MolformerSize(
    layers=12, width=768, heads=12, features=32, feed=768, length=202, vocabulary=2362, batch_size=1200,
    masked=True,
)  # fmt: skip


def rotary(length: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine ``(length, width)`` of rotary positions (Su et al. 2021, arXiv 2104.09864), float32."""
    rates = 10_000 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(length, device=device)[:, None] * rates
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def turned(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """``x`` (..., length, width) turned by its position."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine.to(x.dtype) + torch.cat([-second, first], dim=-1) * sine.to(x.dtype)


class LinearAttention(nn.Module):
    """Attention whose kernel is a product of positive random features (Katharopoulos et al. 2020,
    Choromanski et al. 2021), so that nothing of length x length is made. The features are drawn once."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.directions: torch.Tensor
        self.register_buffer("directions", torch.randn(width, features))

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """``(batch, heads, length, width)`` each; ``valid`` (batch, length) is False at padding."""
        asked = functional.relu(query @ self.directions) + 1e-3
        held = (functional.relu(key @ self.directions) + 1e-3) * valid[:, None, :, None]
        weight = asked @ held.sum(2)[..., None]
        return asked @ (held.transpose(2, 3) @ value) / weight


class MolformerBlock(nn.Module):
    """Attention and feed-forward of the normalised input, each added to it: published with the norms behind
    the sums, which has the same parameters and does not train without warm-up."""

    def __init__(self, size: MolformerSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.query_key_value = nn.Linear(size.width, 3 * size.width)
        self.attention = LinearAttention(size.width // size.heads, size.features)
        self.mix = nn.Linear(size.width, size.width)
        self.norm_attention = nn.LayerNorm(size.width)
        self.widen = nn.Linear(size.width, size.feed)
        self.narrow = nn.Linear(size.feed, size.width)
        self.norm_feed = nn.LayerNorm(size.width)

    def forward(
        self, x: torch.Tensor, valid: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> torch.Tensor:
        """``x`` (batch, length, width) in and out."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.query_key_value(self.norm_attention(x)).chunk(3, dim=-1)
        )
        query, key = turned(query, cosine, sine), turned(key, cosine, sine)
        x = x + self.mix(self.attention(query, key, value, valid).transpose(1, 2).flatten(2))
        return x + self.narrow(functional.gelu(self.widen(self.norm_feed(x))))  # type: ignore[no-any-return]


class Readout(nn.Module):
    """The property as a sum of what tokens add to it, as partition is nearly one over atoms; the paper takes
    the mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.value = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Values ``(batch,)`` of ``(batch, length, width)``."""
        shares: torch.Tensor = self.value(self.norm(x))[..., 0] * valid
        return shares.sum(1) / TYPICAL_TOKENS


class Molformer(nn.Module):
    """Tokens to one number a molecule, and to logits of every token where the size says ``masked``."""

    def __init__(self, size: MolformerSize) -> None:
        super().__init__()
        self.head_width, self.masked = size.width // size.heads, size.masked
        self.embed = nn.Embedding(size.vocabulary, size.width)
        self.blocks = nn.ModuleList([MolformerBlock(size) for _ in range(size.layers)])
        self.readout = Readout(size.width)
        if size.masked:
            self.token = nn.Sequential(nn.Linear(size.width, size.width), nn.GELU(), nn.LayerNorm(size.width))
            self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(value (batch,), logits (batch, length, vocabulary) or None); ``valid`` is False at padding."""
        cosine, sine = rotary(tokens.shape[1], self.head_width, tokens.device)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, valid, cosine, sine)
        return self.readout(x, valid), self.head(self.token(x)) if self.masked else None
