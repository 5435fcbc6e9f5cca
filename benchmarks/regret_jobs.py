"""Jobs of twelve architectures whose sizes are in their names: ``regret_jobs.py:gpt_w192_d6_n128_b8`` has
width 192, depth 6, length (or image side, or nodes) 128 and batch 8. Drawn at random by regret_drawn.py, from
`ARCHITECTURES`, and by small_spaces.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from memfit import Job

VOCABULARY, CLASSES, EXPERTS = 2000, 10, 8
Data = dict[str, torch.Tensor]


class Attention(nn.Module):
    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = max(1, width // 32), causal
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.norm(x))
        return x + self.mlp(x)


class Experts(nn.Module):
    """Every expert on every token; one that was not chosen counts nothing."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(count)
        )

    def forward(self, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        shares = [(weights * (chosen == i)).sum(-1, keepdim=True) for i in range(len(self.members))]
        return sum(
            (m(tokens) * w for m, w in zip(self.members, shares, strict=True)), torch.zeros_like(tokens)
        )


class Mixture(Attention):
    """Attention, then two of eight experts for each token."""

    def __init__(self, width: int) -> None:
        super().__init__(width, causal=True)
        self.mlp = nn.LayerNorm(width)
        self.router, self.experts = nn.Linear(width, EXPERTS), Experts(width, EXPERTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.norm(x))
        tokens = self.mlp(x).flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        return x + self.experts(tokens, chosen, weights).view_as(x)


class Decoder(Attention):
    """Attention that also reads the encoder's hidden states."""

    def __init__(self, width: int) -> None:
        super().__init__(width, causal=True)
        self.query, self.memory = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.cross = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.norm(x))
        batch, length, width = x.shape
        query = self.query(x).view(batch, length, self.heads, -1).transpose(1, 2)
        key, value = self.memory(encoded).view(batch, -1, 2, self.heads, width // self.heads).unbind(2)
        read = functional.scaled_dot_product_attention(query, key.transpose(1, 2), value.transpose(1, 2))
        x = x + self.cross(read.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(x)


class Mixer(nn.Module):
    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(length, length), nn.GELU(), nn.Linear(length, length))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.first(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.second(x))


class Residual(nn.Module):
    """Convolutions of one or two dimensions with group normalisation."""

    def __init__(self, width: int, dimensions: int, *, dilation: int = 1) -> None:
        super().__init__()
        convolution = nn.Conv1d if dimensions == 1 else nn.Conv2d
        self.inner = nn.Sequential(
            convolution(width, width, 3, padding=dilation, dilation=dilation),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            convolution(width, width, 3, padding=1),
            nn.GroupNorm(4, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.silu(x + self.inner(x))


class MessagePassing(nn.Module):
    """Dense: every node hears from its neighbours by an adjacency matrix of the batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.message = nn.LayerNorm(width), nn.Linear(width, width)
        self.update = nn.GRUCell(width, width)

    def forward(self, x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        heard = adjacency @ functional.relu(self.message(self.norm(x)))
        return self.update(heard.flatten(0, 1), x.flatten(0, 1)).view_as(x)


class Tokens(nn.Module):
    """Embedding, blocks, head over the vocabulary."""

    def __init__(self, width: int, length: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.place = nn.Parameter(torch.zeros(length, width))
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class EncoderDecoder(nn.Module):
    """The encoder reads the tokens in reverse order, the decoder reads them as they are."""

    def __init__(self, width: int, depth: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.place = nn.Parameter(torch.zeros(length, width))
        self.encoder = nn.ModuleList(Attention(width, causal=False) for _ in range(depth))
        self.decoder = nn.ModuleList(Decoder(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        encoded, x = self.embed(tokens.flip(1)) + self.place, self.embed(tokens) + self.place
        for block in self.encoder:
            encoded = block(encoded)
        for block in self.decoder:
            x = block(x, encoded)
        return self.head(self.norm(x))


class Recurrent(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(VOCABULARY, width), nn.LSTM(width, width, depth, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embed(tokens))[0])


class Vision(nn.Module):
    """Patches, attention blocks, a classifier."""

    def __init__(self, width: int, depth: int, side: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.place = nn.Parameter(torch.zeros((side // 8) ** 2, width))
        self.blocks = nn.ModuleList(Attention(width, causal=False) for _ in range(depth))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Convolutional(nn.Module):
    def __init__(self, width: int, depth: int, dimensions: int) -> None:
        super().__init__()
        convolution = nn.Conv1d if dimensions == 1 else nn.Conv2d
        self.stem = convolution(3, width, 5, stride=2, padding=2)
        dilations = [2 ** (i % 4) if dimensions == 1 else 1 for i in range(depth)]
        self.blocks = nn.ModuleList(Residual(width, dimensions, dilation=d) for d in dilations)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(2).mean(2))


class UNet(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(min(3, depth))]
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(Residual(w, 2) for w in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(w, 2 * w, 2, 2) for w in widths)
        self.middle = Residual(2 * widths[-1], 2)
        self.grow = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in reversed(widths))
        self.up = nn.ModuleList(Residual(w, 2) for w in reversed(widths))
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, kept = self.stem(x), []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            kept.append(block(x))
            x = shrink(kept[-1])
        x = self.middle(x)
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(grow(x) + kept.pop())
        return self.head(x)


class Perceptron(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(256, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(depth)
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Graph(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(16, width)
        self.blocks = nn.ModuleList(MessagePassing(width) for _ in range(depth))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, adjacency)
        return self.head(x.mean(1))


Sizes = dict[str, int]
_MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "gpt": lambda w, d, n: Tokens(w, n, [Attention(w, causal=True) for _ in range(d)]),
    "bert": lambda w, d, n: Tokens(w, n, [Attention(w, causal=False) for _ in range(d)]),
    "mixer": lambda w, d, n: Tokens(w, n, [Mixer(w, n) for _ in range(d)]),
    "rnn": lambda w, d, n: Recurrent(w, d),
    "vit": Vision,
    "cnn": lambda w, d, n: Convolutional(w, d, 2),
    "conv1d": lambda w, d, n: Convolutional(w, d, 1),
    "unet": lambda w, d, n: UNet(w, d),
    "mlp": lambda w, d, n: Perceptron(w, d),
    "gnn": lambda w, d, n: Graph(w, d),
    "moe": lambda w, d, n: Tokens(w, n, [Mixture(w) for _ in range(d)]),
    "encdec": EncoderDecoder,
}
ARCHITECTURES = tuple(kind for kind in _MODELS if kind not in ("moe", "encdec"))


def _batch(kind: str, length: int, count: int, seed: int) -> Data:
    draw = torch.Generator().manual_seed(seed)
    if kind in ("gpt", "bert", "mixer", "rnn", "moe", "encdec"):
        tokens = torch.randint(0, VOCABULARY, (count, length + 1), generator=draw)
        return {"x": tokens[:, :-1].contiguous(), "y": tokens[:, 1:].contiguous()}
    labels = torch.randint(0, CLASSES, (count,), generator=draw)
    if kind == "gnn":
        links = torch.rand(count, length, length, generator=draw) < 0.1
        return {"x": torch.randn(count, length, 16, generator=draw), "links": links.float(), "y": labels}
    shapes = {"mlp": (256,), "conv1d": (3, length), "cnn": (3, length, length), "vit": (3, length, length)}
    image = torch.randn(count, *shapes.get(kind, (3, length, length)), generator=draw)
    if kind == "unet":
        labels = torch.randint(0, CLASSES, (count, length, length), generator=draw)
    return {"x": image, "y": labels}


def _loss(model: nn.Module, batch: Data) -> torch.Tensor:
    out = model(batch["x"], batch["links"]) if "links" in batch else model(batch["x"])
    if out.dim() == 3:  # tokens
        return functional.cross_entropy(out.flatten(0, 1), batch["y"].flatten())
    return functional.cross_entropy(out, batch["y"])


def named(kind: str, sizes: Sizes) -> str:
    return "_".join([kind, *(f"{letter}{sizes[letter]}" for letter in "wdnb")])


def __getattr__(name: str) -> Any:
    found = re.fullmatch(r"([a-z]+1?d?)_w(\d+)_d(\d+)_n(\d+)_b(\d+)", name)
    if found is None or found[1] not in _MODELS:
        raise AttributeError(name)
    kind = found[1]
    width, depth, length, count = map(int, found.groups()[1:])
    return Job(
        name=name,
        build_model=lambda: _MODELS[kind](width, depth, length),
        loss=_loss,
        batch_size=count,
        make_batch=lambda step, seed: _batch(kind, length, count, 1000 * seed + step),
        steps=100,
        experts="blocks.*.experts" if kind == "moe" else None,
    )
