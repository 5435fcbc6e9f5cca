"""Evoformer, mixtures of experts, several inputs, windows and latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from architectures.common import job, next_token, pictures, to_class, words
from architectures.sequences import Feed, Stack
from memfit.types.job import Job


class Gated(nn.Module):
    """Attention with a pair bias and a gate over the last axis but one."""

    def __init__(self, width: int, heads: int, pair: int | None = None) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.gate, self.out = (
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.bias = nn.Linear(pair, heads, bias=False) if pair else None

    def forward(self, x: torch.Tensor, pair: torch.Tensor | None = None) -> torch.Tensor:
        x = self.norm(x)
        split = (*x.shape[:-1], self.heads, -1)
        q, k, v = (t.view(split).transpose(-2, -3) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if self.bias is not None and pair is not None:
            scores = scores + self.bias(pair).permute(2, 0, 1)
        mixed = (scores.softmax(-1) @ v).transpose(-2, -3).reshape(x.shape)
        return self.out(self.gate(x).sigmoid() * mixed)


class Triangle(nn.Module):
    def __init__(self, width: int, *, outgoing: bool) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(width), nn.LayerNorm(width)
        self.sides, self.gates = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.out, self.outgoing = nn.Linear(width, width), outgoing

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        z = self.norm(z)
        a, b = (self.gates(z).sigmoid() * self.sides(z)).chunk(2, -1)
        equation = "ikc,jkc->ijc" if self.outgoing else "kic,kjc->ijc"
        return self.out(self.last(torch.einsum(equation, a, b)))


class Evoformer(nn.Module):
    """MSA row and column attention, transition, outer product mean, triangle updates (Jumper et al. 2021)."""

    def __init__(self, msa: int = 32, pair: int = 32) -> None:
        super().__init__()
        self.row, self.column = Gated(msa, 4, pair), Gated(msa, 4)
        self.transition, self.pair_transition = Feed(msa, nn.ReLU()), Feed(pair, nn.ReLU())
        self.left, self.right, self.outer = nn.Linear(msa, 8), nn.Linear(msa, 8), nn.Linear(64, pair)
        self.outgoing, self.incoming = Triangle(pair, outgoing=True), Triangle(pair, outgoing=False)
        self.starting = Gated(pair, 4, pair)

    def forward(self, both: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        m, z = both
        m = m + functional.dropout(self.row(m, z), 0.15, self.training)
        m = m + self.column(m.transpose(0, 1)).transpose(0, 1)
        m = self.transition(m)
        outer = torch.einsum("sic,sjd->ijcd", self.left(m), self.right(m)).flatten(-2) / m.shape[0]
        z = z + self.outer(outer)
        z = z + self.outgoing(z)
        z = z + self.incoming(z)
        z = z + self.starting(z, z)
        return m, self.pair_transition(z)


class Folding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.msa, self.pair = nn.Linear(23, 32), nn.Embedding(65, 32)
        self.blocks = nn.ModuleList([Evoformer() for _ in range(2)])
        self.head = nn.Linear(32, 16)

    def forward(self, msa: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        both = self.msa(msa), self.pair(offsets)
        for block in self.blocks:
            both = block(both)
        return self.head(both[1])


def evoformer() -> Job:
    def batch(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        place = torch.arange(40)
        offsets = (place[:, None] - place[None]).clamp(-32, 32) + 32
        return torch.randn(16, 40, 23, generator=g), offsets, torch.randint(0, 16, (40, 40), generator=g)

    def loss(model: nn.Module, b: Any) -> torch.Tensor:
        return functional.cross_entropy(model(b[0], b[1]).flatten(0, 1).float(), b[2].flatten())

    return job("evoformer", Folding, batch, loss, rows=16, blocks="blocks")


class Mixture(nn.Module):
    """Each token goes to two of four experts. ``dense``: all experts see all tokens, weighted; else each
    expert sees the tokens routed to it, whose number depends on the data."""

    def __init__(self, width: int, *, dense: bool) -> None:
        super().__init__()
        self.norm, self.router, self.dense = nn.LayerNorm(width), nn.Linear(width, 4), dense
        self.experts = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
                for _ in range(4)
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.norm(x).flatten(0, 1)
        weight, chosen = self.router(flat).softmax(-1).topk(2, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        if self.dense:
            gates = torch.zeros(flat.shape[0], 4, dtype=weight.dtype).scatter(1, chosen, weight)
            out = sum(gates[:, i, None] * expert(flat) for i, expert in enumerate(self.experts))
            return x + out.view_as(x)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, rank = torch.where(chosen == i)
            out = out.index_add(0, token, (expert(flat[token]) * weight[token, rank, None]).to(out.dtype))
        return x + out.view_as(x)


def moe_dense() -> Job:
    return job(
        "moe-dense",
        lambda: Stack(lambda: Mixture(64, dense=True), depth=3, width=64, vocabulary=512, tied=False),
        words(8, 96, 512),
        next_token,
        rows=8,
        blocks="blocks",
    )


class Hashed(Mixture):
    """Routed by position, so that every expert gets the same number and the bound is exact."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.norm(x).flatten(0, 1)
        place = torch.arange(flat.shape[0])
        chosen = torch.stack([place % 4, (place + 1) % 4], 1)
        weight = self.router(flat).softmax(-1).gather(1, chosen)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, rank = torch.where(chosen == i)
            out = out.index_add(0, token, (expert(flat[token]) * weight[token, rank, None]).to(out.dtype))
        return x + out.view_as(x)


def moe_index() -> Job:
    return job(
        "moe-index",
        lambda: Stack(lambda: Hashed(64, dense=False), depth=3, width=64, vocabulary=512, tied=False),
        words(8, 96, 512),
        next_token,
        rows=8,
        blocks="blocks",
        bound={"nonzero": 0.25},
    )


class Several(nn.Module):
    """A picture, a sequence and a table row make one prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU()
        )
        self.sequence, self.table = nn.Embedding(64, 32), nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 32))
        self.fuse = nn.TransformerEncoderLayer(32, 4, 128, batch_first=True)
        self.out = nn.Linear(32, 5)

    def forward(self, image: torch.Tensor, tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        patches = self.picture(image).flatten(2).transpose(1, 2)
        parts = [
            patches,
            self.sequence(tokens).to(patches.dtype),
            self.table(table)[:, None].to(patches.dtype),
        ]
        return self.out(self.fuse(torch.cat(parts, 1)).mean(1))


def several() -> Job:
    def batch(g: torch.Generator) -> dict[str, torch.Tensor]:
        return {
            "image": torch.randn(8, 3, 48, 48, generator=g),
            "tokens": torch.randint(0, 64, (8, 50), generator=g),
            "table": torch.randn(8, 12, generator=g),
            "y": torch.randint(0, 5, (8,), generator=g),
        }

    def loss(model: nn.Module, b: Any) -> torch.Tensor:
        return functional.cross_entropy(model(b["image"], b["tokens"], b["table"]).float(), b["y"])

    return job("multi-input", Several, batch, loss, rows=8)


class Window(nn.Module):
    """Swin: attention in windows, shifted in every other block (Liu et al. 2021)."""

    def __init__(self, width: int, shift: int, side: int = 8) -> None:
        super().__init__()
        self.attention, self.feed, self.shift, self.side = (
            Gated(width, 4),
            Feed(width, nn.GELU()),
            shift,
            side,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, h, w, c = x.shape
        y = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        y = y.view(b, h // self.side, self.side, w // self.side, self.side, c).transpose(2, 3)
        y = self.attention(y.reshape(-1, self.side**2, c))
        y = (
            y.view(b, h // self.side, w // self.side, self.side, self.side, c)
            .transpose(2, 3)
            .reshape(x.shape)
        )
        return self.feed(x + (torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y))


class Swin(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList([Window(width, shift) for shift in (0, 4, 0, 4)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def swin() -> Job:
    return job("swin", Swin, pictures(4, 128, 10), to_class, rows=4, blocks="blocks")


class Perceiver(nn.Module):
    """Latents read a long input by cross-attention, then think; checkpointed by the model itself, the old
    reentrant way."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.latents, self.enter = nn.Parameter(torch.randn(32, width)), nn.Linear(16, width)
        self.cross = nn.MultiheadAttention(width, 4, batch_first=True)
        self.think = nn.ModuleList(
            [nn.TransformerEncoderLayer(width, 4, 256, batch_first=True) for _ in range(3)]
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        z = self.latents.expand(x.shape[0], -1, -1)
        z = z + self.cross(z, x, x, need_weights=False)[0]
        for layer in self.think:
            z = checkpoint(layer, z, use_reentrant=True)
        return self.head(z.mean(1))


def perceiver() -> Job:
    return job(
        "perceiver",
        Perceiver,
        lambda g: (torch.randn(8, 1024, 16, generator=g), torch.randint(0, 10, (8,), generator=g)),
        to_class,
        rows=8,
        blocks="think",
    )
