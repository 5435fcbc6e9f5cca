"""ESM-2 (Lin et al. 2023, Science 379:1123), for the jobs protein-lm and protein-ss.

Parameters have the names, and operators the order, of Hugging Face's ``EsmForMaskedLM`` (transformers,
models/esm/modeling_esm.py). Its checkpoints load, results are bitwise equal and memory is equal, as
tests/unit/test_jobs_esm.py checks. The model is written here because importing that library takes longer than
predicting the model, in every process of a proof of concept, and because its forward reads the values of the
padding mask, which fake tensors do not have. Left out are the contact head, which neither job trains, and
dropout, which ESM-2 does not use.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import torch
from torch import nn
from torch.nn import functional

WINDOW: Final = 15  # residues seen by the input projection, as in PSIPRED (Jones 1999, JMB 292:195)
FEATURES: Final = 41  # one-hot residue (21) and profile (20)
VOCABULARY: Final = 33
PAD, MASK = 1, 32  # token numbers of ESM-2's alphabet
_EPS: Final = 1e-5
_INITIAL_STD: Final = 0.02
_ROTARY_BASE: Final = 10_000.0

Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each (1, length, width of a head)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EsmSize:
    """Size of an ESM-2 model. ``layers``: number of encoder layers. ``width``: channels of a token.
    ``heads``: attention heads. ``length``: tokens to which a sequence is padded or cropped. ``batch_size``:
    sequences of a step."""

    layers: int
    width: int
    heads: int
    length: int
    batch_size: int


# Published ESM-2 shapes (Lin et al. 2023, table S1), and a small one. The feed-forward part is four times as
# wide.
ESM_SIZES: Final = {
    "tiny": EsmSize(layers=4, width=128, heads=4, length=256, batch_size=16),
    "8M": EsmSize(layers=6, width=320, heads=20, length=1024, batch_size=8),
    "35M": EsmSize(layers=12, width=480, heads=20, length=1024, batch_size=8),
    "150M": EsmSize(layers=30, width=640, heads=20, length=1024, batch_size=8),
    "650M": EsmSize(layers=33, width=1280, heads=20, length=1024, batch_size=8),
    "3B": EsmSize(layers=36, width=2560, heads=40, length=1024, batch_size=8),
    "15B": EsmSize(layers=48, width=5120, heads=40, length=1024, batch_size=8),
    "paper": EsmSize(layers=33, width=1280, heads=20, length=1024, batch_size=8),
}


class SelfAttention(nn.Module):
    """Multi-head self-attention with rotary positions, without norm, output projection and residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """Return the attended values, with the shape of ``hidden`` (batch, length, width). ``mask`` (batch,
        1, 1, length) is False at padding."""
        query, key, value = (self._heads(p(hidden)) for p in (self.query, self.key, self.value))
        query = query * self.head_width**-0.5  # before the rotation, as ESM-2 was trained
        context: torch.Tensor = functional.scaled_dot_product_attention(
            _rotate(query, rotary), _rotate(key, rotary), value, attn_mask=mask, scale=1.0
        )
        return context.transpose(1, 2).flatten(2)

    def _heads(self, projection: torch.Tensor) -> torch.Tensor:
        """Reshape (batch, length, width) to (batch, heads, length, width of a head)."""
        return projection.view(*projection.shape[:-1], -1, self.head_width).transpose(1, 2)


def _rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Return ``x`` (batch, heads, length, width of a head) with rotary positions applied (Su et al. 2021,
    arXiv 2104.09864, eq. 34). Channel i of a head is rotated together with channel i + width / 2."""
    cosines, sines = (part.unsqueeze(1) for part in rotary)
    return ((x.float() * cosines) + (_rotate_half(x.float()) * sines)).to(x.dtype)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """Return the exact GELU (not the tanh approximation), computed by separate operators as Hugging Face's
    ESM-2 does. Compared with torch's GELU, the last bits differ, and more memory is needed."""
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class Residual(nn.Module):
    """A linear layer of x (..., inner) to ``width`` channels, plus ``before`` (..., width), the input of the
    residual branch."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return self.dense(x) + before  # type: ignore[no-any-return]


class EsmAttention(nn.Module):
    """Layer norm, self-attention and output projection, plus the input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self = SelfAttention(width, heads)
        self.output = Residual(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=_EPS)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        return self.output(self.self(self.LayerNorm(hidden), mask, rotary), hidden)  # type: ignore[no-any-return]


class Intermediate(nn.Module):
    """The first layer of the feed-forward part: a linear layer from ``width`` to 4 x ``width`` channels, and
    GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 4 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _gelu(self.dense(x))


class Layer(nn.Module):
    """One encoder layer: attention, then a feed-forward part, each with a layer norm before it and a
    residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = EsmAttention(width, heads)
        self.intermediate = Intermediate(width)
        self.output = Residual(4 * width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=_EPS)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        attention_output = self.attention(hidden, mask, rotary)
        return self.output(self.intermediate(self.LayerNorm(attention_output)), attention_output)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """All encoder layers in order, then a layer norm. Input and output have the shape (batch, length,
    width)."""

    def __init__(self, size: EsmSize) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(size.width, size.heads) for _ in range(size.layers))
        self.emb_layer_norm_after = nn.LayerNorm(size.width, eps=_EPS)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        for layer in self.layer:
            hidden = layer(hidden, mask, rotary)
        return self.emb_layer_norm_after(hidden)  # type: ignore[no-any-return]


class RotaryPositions(nn.Module):
    """Computes the cosines and sines of rotary positions for ``hidden`` (batch, length, width): two tensors
    (1, length, width of a head) in the dtype of ``hidden``."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        powers = torch.arange(0, head_width, 2, dtype=torch.float) / head_width
        self.register_buffer("inv_freq", 1.0 / (_ROTARY_BASE**powers))

    def forward(self, hidden: torch.Tensor) -> Rotary:
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        angles = positions[..., None].float() * self.inv_freq.to(device=hidden.device, dtype=torch.float)  # type: ignore[operator]
        doubled = torch.cat((angles, angles), dim=-1)
        return doubled.cos().to(hidden.dtype), doubled.sin().to(hidden.dtype)


class Embeddings(nn.Module):
    """Maps token numbers (batch, length) to embeddings (batch, length, width), which are zero where ``valid``
    (batch, length) is False."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, width, padding_idx=PAD)

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return self.word_embeddings(tokens) * valid.unsqueeze(-1)  # type: ignore[no-any-return]


class Esm(nn.Module):
    """The encoder of ESM-2, without a head. If ``tokens``, its inputs are token numbers (batch, length),
    which it embeds; otherwise they are embeddings (batch, length, width)."""

    def __init__(self, size: EsmSize, *, tokens: bool) -> None:
        super().__init__()
        if tokens:
            self.embeddings = Embeddings(size.width)
        self.rotary_embeddings = RotaryPositions(size.width // size.heads)
        self.encoder = Encoder(size)

    def forward(self, inputs: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Return hidden states (batch, length, width). ``valid`` (batch, length) is False at padding."""
        embedded = self.embeddings(inputs, valid) if hasattr(self, "embeddings") else inputs
        return self.encoder(embedded, valid[:, None, None, :], self.rotary_embeddings(embedded))  # type: ignore[no-any-return]


class LanguageHead(nn.Module):
    """The head that predicts masked tokens: maps hidden states (..., width) to logits (..., 33)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=_EPS)
        self.decoder = nn.Linear(width, VOCABULARY, bias=False)
        self.bias = nn.Parameter(torch.zeros(VOCABULARY))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.layer_norm(_gelu(self.dense(hidden)))) + self.bias  # type: ignore[no-any-return]


def _initialize(module: nn.Module) -> None:
    """Initialize ``module``, if it is a Linear or Embedding, as ESM-2: normal weights of standard deviation
    0.02, zero biases, zero embedding of the padding token. Other modules, and the module's children, are left
    alone."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_INITIAL_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        with torch.no_grad():
            module.weight[PAD].zero_()


class SecondaryStructure(nn.Module):
    """Predicts the secondary structure of each residue, in three states, with ESM-2's encoder. Each residue's
    input is a linear layer of the features of the 15 residues around it. The encoder's parameters ``esm.*``
    have Hugging Face's names."""

    def __init__(self, size: EsmSize) -> None:
        super().__init__()
        self.embed = nn.Linear(WINDOW * FEATURES, size.width)
        self.esm = Esm(size, tokens=False).apply(_initialize)
        self.head = nn.Linear(size.width, 3)
        nn.init.normal_(self.head.weight, std=1e-3)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Return logits ``(batch, length, 3)`` for features ``(batch, length, 41)``. ``valid`` (batch,
        length) is False at padding."""
        features = features.to(self.esm.encoder.emb_layer_norm_after.weight.dtype)
        radius = WINDOW // 2
        windows = functional.pad(features, (0, 0, radius, radius)).unfold(1, WINDOW, 1).flatten(2)
        return self.head(self.esm(self.embed(windows), valid))  # type: ignore[no-any-return]


class MaskedLanguageModel(nn.Module):
    """ESM-2's masked language model. All parameters have Hugging Face's names. The output layer and the token
    embeddings share one weight."""

    def __init__(self, size: EsmSize) -> None:
        super().__init__()
        self.esm, self.lm_head = Esm(size, tokens=True), LanguageHead(size.width)
        self.apply(_initialize)
        self.lm_head.decoder.weight = self.esm.embeddings.word_embeddings.weight

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Return logits ``(batch, length, 33)`` for token numbers ``(batch, length)``. ``valid`` (batch,
        length) is False at padding."""
        return self.lm_head(self.esm(tokens, valid))  # type: ignore[no-any-return]
