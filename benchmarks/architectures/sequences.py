"""Recurrent networks, scans, tied weights, custom autograd functions, compiled blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from architectures.common import job, next_token, to_class, words
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


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates and a sum of skips (van den Oord et al. 2016)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.enter = nn.Conv1d(1, width, 1)
        self.gates = nn.ModuleList(
            [
                nn.utils.parametrizations.weight_norm(nn.Conv1d(width, 2 * width, 2, dilation=2**i))
                for i in range(6)
            ]
        )
        self.mix = nn.ModuleList([nn.Conv1d(width, 2 * width, 1) for _ in range(6)])
        self.out = nn.Conv1d(width, 64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, skips = self.enter(x), 0
        for gate, mix in zip(self.gates, self.mix, strict=True):
            a, b = gate(functional.pad(x, (gate.dilation[0], 0))).chunk(2, 1)
            residual, skip = mix(torch.tanh(a) * torch.sigmoid(b)).chunk(2, 1)
            x, skips = x + residual, skips + skip
        return self.out(functional.relu(skips))


def wavenet() -> Job:
    return job(
        "wavenet",
        WaveNet,
        lambda g: (torch.randn(4, 1, 1024, generator=g), torch.randint(0, 64, (4, 1024), generator=g)),
        to_class,
        rows=4,
    )


class Tagger(nn.Module):
    """A two-way LSTM under a conditional random field: the forward algorithm as a loop of logsumexp."""

    def __init__(self, tags: int = 12) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(256, 32), nn.LSTM(32, 48, bidirectional=True, batch_first=True)
        self.score, self.move = nn.Linear(96, tags), nn.Parameter(torch.randn(tags, tags))

    def forward(self, words: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        emit = self.score(self.body(self.embed(words))[0])
        alpha = emit[:, 0]
        for t in range(1, words.shape[1]):
            alpha = torch.logsumexp(alpha[:, :, None] + self.move, 1) + emit[:, t]
        path = emit.gather(2, tags[..., None]).sum((1, 2)) + self.move[tags[:, :-1], tags[:, 1:]].sum(1)
        return (alpha.logsumexp(-1) - path).mean()


def crf_tagger() -> Job:
    return job(
        "bilstm-crf",
        Tagger,
        lambda g: (torch.randint(0, 256, (16, 40), generator=g), torch.randint(0, 12, (16, 40), generator=g)),
        lambda m, b: m(*b),
        rows=16,
    )


class Translator(nn.Module):
    """Two-way GRU encoder; GRU cells with additive attention decode word by word (Bahdanau et al. 2015)."""

    def __init__(self, vocabulary: int = 800, width: int = 96) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary, width)
        self.encoder = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(3 * width, width)
        self.keys, self.query = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.score, self.out = nn.Linear(width, 1), nn.Linear(3 * width, vocabulary)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        memory, last = self.encoder(self.source(source))
        keys, state, logits = self.keys(memory), last[0], []
        for word in self.target(target).unbind(1):
            weight = self.score(torch.tanh(keys + self.query(state)[:, None])).softmax(1)
            context = (weight * memory).sum(1)
            state = self.cell(torch.cat([word, context], -1), state)
            logits.append(self.out(torch.cat([state, context], -1)))
        return torch.stack(logits, 1)


def translator() -> Job:
    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        logits = model(batch[0], batch[1][:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), batch[1][:, 1:].flatten())

    return job(
        "gru-attention",
        Translator,
        lambda g: (
            torch.randint(0, 800, (16, 24), generator=g),
            torch.randint(0, 800, (16, 17), generator=g),
        ),
        loss,
        rows=16,
    )


class Selective(nn.Module):
    """A selective state space whose recurrence is a cumulative sum in logarithms (after Gu and Dao 2023)."""

    def __init__(self, width: int = 64, states: int = 8) -> None:
        super().__init__()
        self.norm, self.inside = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.conv = nn.Conv1d(2 * width, 2 * width, 4, padding=3, groups=2 * width)
        self.gates, self.step = nn.Linear(2 * width, 2 * states), nn.Linear(2 * width, 2 * width)
        self.decay = nn.Parameter(torch.linspace(-1, 0.5, states).repeat(2 * width, 1))
        self.direct, self.out = nn.Parameter(torch.ones(2 * width)), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u, gate = self.inside(self.norm(x)).chunk(2, -1)
        u = functional.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        b, c = self.gates(u).chunk(2, -1)
        step = functional.softplus(self.step(u))
        log = torch.cumsum(-step[..., None] * self.decay.exp() / 16, 1)
        fed = (step * u)[..., None] * b[:, :, None]
        state = torch.exp(log) * torch.cumsum(fed * torch.exp(-log), 1)
        y = (state * c[:, :, None]).sum(-1) + self.direct * u
        return x + self.out(y * functional.silu(gate))


class SelectiveLM(nn.Module):
    def __init__(self, vocabulary: int = 1000, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Selective(width) for _ in range(3)])
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def selective() -> Job:
    return job("selective-cumsum", SelectiveLM, words(4, 64, 1000), next_token, rows=4, head="head")


class Conformer(nn.Module):
    def __init__(self, width: int = 80) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(4)])
        self.feed = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)) for _ in "ab"]
        )
        self.attention = nn.MultiheadAttention(width, 4, dropout=0.1, batch_first=True)
        self.wide, self.narrow = nn.Conv1d(width, 2 * width, 1), nn.Conv1d(width, width, 1)
        self.depth, self.norm = nn.Conv1d(width, width, 15, padding=7, groups=width), nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
        x = x + 0.5 * self.feed[0](self.norms[0](x))
        h = self.norms[1](x)
        x = x + self.attention(h, h, h, key_padding_mask=padded, need_weights=False)[0]
        h = functional.glu(self.wide(self.norms[2](x).transpose(1, 2)), 1)
        x = x + self.narrow(functional.silu(self.norm(self.depth(h)))).transpose(1, 2)
        return x + 0.5 * self.feed[1](self.norms[3](x))


class Speech(nn.Module):
    """Spectrograms of several lengths to letters, aligned by the loss (CTC)."""

    def __init__(self, width: int = 80) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.inside = nn.Linear(16 * 10, width)
        self.blocks = nn.ModuleList([Conformer(width) for _ in range(2)])
        self.out = nn.Linear(width, 30)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        x = self.inside(self.down(x[:, None]).transpose(1, 2).flatten(2))
        padded = torch.arange(x.shape[1])[None] >= lengths[:, None]
        for block in self.blocks:
            x = block(x, padded)
        return self.out(x).log_softmax(-1)


def speech() -> Job:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        sound, lengths, letters, counts = batch
        found = model(sound, lengths).transpose(0, 1).float()
        return functional.ctc_loss(found, letters, lengths, counts, zero_infinity=True)

    return job(
        "conformer-ctc",
        Speech,
        lambda g: (
            torch.randn(6, 200, 40, generator=g),
            torch.tensor([50, 48, 44, 40, 38, 30]),
            torch.randint(1, 30, (6, 14), generator=g),
            torch.tensor([14, 12, 12, 10, 9, 8]),
        ),
        loss,
        rows=6,
        blocks="blocks",
    )
