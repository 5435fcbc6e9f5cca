"""A small GPT: pre-norm blocks, learned positions, causal attention, no dropout, untied head."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.nn import functional


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GptSize:
    """Size of a GPT. ``layers``: number of blocks. ``width``: channels of a token. ``heads``: attention
    heads. ``length``: the most tokens of a sequence. ``vocabulary``: number of different tokens.
    ``batch_size``: sequences of a step."""

    layers: int
    width: int
    heads: int
    length: int
    vocabulary: int
    batch_size: int


class GptBlock(nn.Module):
    """Causal self-attention, then a feed-forward part with a hidden layer four times as wide, each with a
    layer norm before it and a residual."""

    def __init__(self, size: GptSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm_attention = nn.LayerNorm(size.width)
        self.query_key_value = nn.Linear(size.width, 3 * size.width)
        self.mix = nn.Linear(size.width, size.width)
        self.norm_feed = nn.LayerNorm(size.width)
        self.widen = nn.Linear(size.width, 4 * size.width)
        self.narrow = nn.Linear(4 * size.width, size.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input and output have the shape ``(batch, length, width)``."""
        x = x + self.mix(self._attend(self.norm_attention(x)))
        return x + self.narrow(functional.gelu(self.widen(self.norm_feed(x))))  # type: ignore[no-any-return]

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.query_key_value(x).chunk(3, dim=-1)
        )
        output = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return output.transpose(1, 2).flatten(2)


class Gpt(nn.Module):
    """A GPT, initialized as GPT-2 (Radford et al. 2019): weights normal with a standard deviation of 0.02,
    which is divided by sqrt(2 x layers) where a layer's output is added to a residual, and biases zero. The
    output layer does not share the weight of the embeddings."""

    def __init__(self, size: GptSize) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Embedding(size.length, size.width)
        self.blocks = nn.ModuleList([GptBlock(size) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        for name, param in self.named_parameters():
            if param.dim() > 1:
                residual = name.endswith(("mix.weight", "narrow.weight"))
                nn.init.normal_(param, std=0.02 / (2 * size.layers) ** 0.5 if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits ``(batch, length, vocabulary)`` of the token after each of ``tokens`` (batch,
        length).
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embed(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]
