"""MoLFormer (Ross et al. 2022, Nature Machine Intelligence 4:1256): an encoder of SMILES with rotary
positions and linear attention that predicts one property of the molecule.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch import nn
from torch.nn import functional

TYPICAL_TOKENS: Final = 16  # scale of the sum at initialization; nothing else depends on it


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MolformerSize:
    """Size of a MoLFormer.

    ``layers``: number of blocks. ``width``: channels of a token. ``heads``: attention heads. ``features``:
    number of random features of the attention's kernel per head. ``feed``: width of the hidden layer of the
    feed-forward part. ``length``: tokens to which a molecule is padded. ``vocabulary``: number of different
    tokens. ``batch_size``: molecules of a step. ``masked``: whether it has, in addition to the output of the
    property, a head that predicts masked tokens, as in pre-training.
    """

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
    layers=12,
    width=768,
    heads=12,
    features=32,
    feed=768,
    length=202,
    vocabulary=2362,
    batch_size=1200,
    masked=True,
)


def rotary(length: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of rotary positions (Su et al. 2021, arXiv 2104.09864), each (length, width)
    in float32. Channels i and i + width / 2 have the same angle, position x 10000**(-2 i / width)."""
    rates = 10_000 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(length, device=device)[:, None] * rates
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Return ``x`` (..., length, width) with each position's channels i and i + width / 2 rotated by its
    angle. ``cosine`` and ``sine``: as `rotary` returns them."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine.to(x.dtype) + torch.cat([-second, first], dim=-1) * sine.to(x.dtype)


class LinearAttention(nn.Module):
    """Non-causal attention whose weights are products of positive random features of query and key, instead
    of a softmax.

    No tensor of length x length is made (Katharopoulos et al. 2020, Choromanski et al. 2021). The random
    directions of the features are drawn once, at construction, and are not learned.
    """

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.directions: torch.Tensor
        self.register_buffer("directions", torch.randn(width, features))

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """Return the attended values. They and the inputs have the shape ``(batch, heads, length, width)``;
        ``valid`` (batch, length) is False at padding.
        """
        query_features = functional.relu(query @ self.directions) + 1e-3
        key_features = (functional.relu(key @ self.directions) + 1e-3) * valid[:, None, :, None]
        weight = query_features @ key_features.sum(2)[..., None]
        return query_features @ (key_features.transpose(2, 3) @ value) / weight


class MolformerBlock(nn.Module):
    """Attention, then a feed-forward part, each with a layer norm before it and a residual.

    The published model has the norms after the sums, which gives the same parameters but does not train
    without warm-up.
    """

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
        """Input ``x`` and output have the shape (batch, length, width). ``valid`` (batch, length) is False at
        padding. ``cosine`` and ``sine``: as `rotary` returns them."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.query_key_value(self.norm_attention(x)).chunk(3, dim=-1)
        )
        query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
        x = x + self.mix(self.attention(query, key, value, valid).transpose(1, 2).flatten(2))
        return x + self.narrow(functional.gelu(self.widen(self.norm_feed(x))))  # type: ignore[no-any-return]


class Readout(nn.Module):
    """Computes the property of a molecule: the sum of a linear function of each token, divided by 16, the
    length of a typical molecule. A sum is used because octanol-water partition is nearly a sum over atoms;
    the paper uses the mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.value = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Return values ``(batch,)`` for ``x`` (batch, length, width). ``valid`` (batch, length) is False at
        padding."""
        shares: torch.Tensor = self.value(self.norm(x))[..., 0] * valid
        return shares.sum(1) / TYPICAL_TOKENS


class Molformer(nn.Module):
    """Maps tokens to one number per molecule and, if the size is ``masked``, to logits of the token at each
    position."""

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
        """Return (value (batch,), logits (batch, length, vocabulary), or None unless the size is masked).

        ``tokens`` and ``valid`` have shape (batch, length); ``valid`` is False at padding.
        """
        cosine, sine = rotary(tokens.shape[1], self.head_width, tokens.device)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, valid, cosine, sine)
        return self.readout(x, valid), self.head(self.token(x)) if self.masked else None
