"""Recurrent networks, scans, tied weights, custom autograd functions, compiled blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from architectures.common import job, next_token, words
from memfit.types.job import Job


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, 64)
        self.body = kind(64, 128, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(128, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x))[0])


def lstm() -> Job:
    return job("lstm", lambda: Recurrent(nn.LSTM), words(8, 64, 512), next_token, rows=8)


def gru() -> Job:
    return job("gru", lambda: Recurrent(nn.GRU), words(8, 64, 512), next_token, rows=8)


class Packed(Recurrent):
    """Sequences of different lengths, without their padding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = (x != 0).sum(1)
        packed = pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.body(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.head(out)


def packed() -> Job:
    def batch(g: torch.Generator) -> torch.Tensor:
        lengths = torch.randint(8, 65, (16, 1), generator=g)
        lengths[0] = 64
        return torch.randint(1, 512, (16, 65), generator=g) * (torch.arange(65) <= lengths)

    return job("lstm-packed", lambda: Packed(nn.LSTM), batch, next_token, rows=16)


class Scan(nn.Module):
    """A selective state space, one step a token (Gu and Dao 2023, without the fused kernel)."""

    def __init__(self, width: int = 64, state: int = 8) -> None:
        super().__init__()
        self.norm, self.enter = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.conv = nn.Conv1d(width, width, 4, padding=3, groups=width)
        self.select = nn.Linear(width, 2 * state + width)
        self.log_a = nn.Parameter(torch.zeros(width, state))
        self.skip, self.leave = nn.Parameter(torch.ones(width)), nn.Linear(width, width)
        self.state = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u, gate = self.enter(self.norm(x)).chunk(2, -1)
        u = functional.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        b, c, step = self.select(u).split([self.state, self.state, u.shape[-1]], -1)
        step = functional.softplus(step)
        decay = torch.exp(-step[..., None] * self.log_a.exp())
        fed = (step * u)[..., None] * b[:, :, None]
        h, out = torch.zeros_like(fed[:, 0]), []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + fed[:, t]
            out.append((h * c[:, t, None]).sum(-1))
        return x + self.leave((torch.stack(out, 1) + self.skip * u) * functional.silu(gate))


class Stack(nn.Module):
    """Tokens, blocks, logits; ``tied``: one table for both ends."""

    def __init__(
        self, block: Callable[[], nn.Module], *, depth: int, width: int, vocabulary: int, tied: bool
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([block() for _ in range(depth)])
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def mamba() -> Job:
    return job(
        "mamba-scan",
        lambda: Stack(Scan, depth=2, width=64, vocabulary=256, tied=False),
        words(4, 48, 256),
        next_token,
        rows=4,
        blocks="blocks",
    )


class Feed(nn.Module):
    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), act, nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def tied() -> Job:
    return job(
        "tied-embedding",
        lambda: Stack(lambda: Feed(128, nn.GELU()), depth=3, width=128, vocabulary=4096, tied=True),
        words(4, 96, 4096),
        next_token,
        rows=4,
        blocks="blocks",
        head="head",
    )


class _Swish(torch.autograd.Function):
    """Keeps its input only, and computes the sigmoid again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s * (1 + x * (1 - s)))


class Swish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Swish.apply(x)


def custom() -> Job:
    return job(
        "custom-function",
        lambda: Stack(lambda: Feed(128, Swish()), depth=4, width=128, vocabulary=512, tied=False),
        words(8, 128, 512),
        next_token,
        rows=8,
        blocks="blocks",
        head="head",
    )


def compiled() -> Job:
    """Autograd as AOTAutograd lays it out: one forward and one backward graph, kept tensors chosen by it."""

    def model() -> nn.Module:
        inner = Stack(lambda: Feed(128, nn.GELU()), depth=3, width=128, vocabulary=512, tied=False)
        inner.compile(backend="aot_eager")
        return inner

    return job(
        "compiled-aot-eager", model, words(8, 128, 512), next_token, rows=8, blocks="blocks", head="head"
    )
