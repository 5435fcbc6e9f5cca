"""Small jobs for the distributed benchmark: no dropout, so that any number of ranks gives one loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from memfit.jobs.builtin import alphafold2
from memfit.types.job import Job

VOCABULARY, LENGTH, BATCH = 1024, 64, 8


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[0], x.shape[1], self.heads, -1)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, width // 32)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Experts(nn.Module):
    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(count)]
        )

    def forward(self, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Every expert on every token; what it was not chosen for counts nothing."""
        shares = [(weights * (chosen == i)).sum(-1, keepdim=True) for i in range(len(self.members))]
        return sum(
            (m(tokens) * w for m, w in zip(self.members, shares, strict=True)), torch.zeros_like(tokens)
        )


class MixtureBlock(Block):
    """Two of four experts for each token."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.router = nn.Linear(width, 4)
        self.mlp = Experts(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        tokens = self.norm2(x).flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        return x + self.mlp(tokens, chosen, weights).view_as(x)


class Gpt(nn.Module):
    def __init__(
        self, width: int, blocks: int, *, tied: bool, block: Callable[[int], nn.Module] = Block
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList([block(width) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _tokens(step: int, seed: int) -> dict[str, torch.Tensor]:
    """Shapes (batch, length); each label is the next token."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    text = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    return {"input_ids": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}


def _next_token(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


def _language_model(name: str, width: int, blocks: int, *, tied: bool = False) -> Job:
    return Job(
        name=name,
        build_model=lambda: Gpt(width, blocks, tied=tied),
        make_batch=_tokens,
        loss=_next_token,
        batch_size=BATCH,
        blocks="blocks",
        head="head",
    )


def gpt() -> Job:
    return _language_model("gpt", 128, 4)


def gpt_wide() -> Job:
    """Parameters outweigh activations: the peak lies where they are gathered and reduced."""
    return _language_model("gpt_wide", 384, 3)


def gpt_house() -> Job:
    """memfit's own GPT, which Megatron-core's model can be."""
    from memfit.jobs.builtin.gpt import Gpt as House
    from memfit.jobs.builtin.gpt import GptSize

    size = GptSize(layers=4, width=128, heads=4, length=LENGTH, vocabulary=VOCABULARY, batch_size=BATCH)
    return Job(
        name="gpt_house",
        build_model=lambda: House(size),
        make_batch=_tokens,
        loss=_next_token,
        batch_size=BATCH,
        blocks="blocks",
        head="head",
    )


class SequenceFirst(nn.Module):
    """memfit's GPT in plain torch, its sums in the order that Megatron-core has: (length, batch, width),
    query, key and value by head, every bias added apart from its product."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.source = source
        for block in source.blocks:
            for param in block.query_key_value.parameters():
                by_head = param.data.unflatten(0, (3, block.heads, -1)).transpose(0, 1)
                param.data = by_head.reshape(param.shape)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        source = self.source
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = (source.embed(tokens) + source.position(positions)).transpose(0, 1).contiguous()
        for block in source.blocks:
            x = x + _apart(block.mix, self._attend(block, block.norm_attention(x)))
            x = x + _apart(block.narrow, functional.gelu(_apart(block.widen, block.norm_feed(x))))
        return functional.linear(source.norm(x), source.head.weight).transpose(0, 1).contiguous()

    def _attend(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        mixed = _apart(block.query_key_value, x).unflatten(-1, (block.heads, -1))
        q, k, v = (part.permute(1, 2, 0, 3) for part in mixed.chunk(3, -1))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attended.permute(2, 0, 1, 3).flatten(2)


def _apart(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, linear.weight) + linear.bias


def gpt_sequence_first() -> Job:
    """`gpt_house` as Megatron-core computes it: what its losses are compared with to the bit."""
    house = gpt_house()
    return dataclasses.replace(
        house,
        name="gpt_sequence_first",
        build_model=lambda: SequenceFirst(house.build_model()),
        blocks="source.blocks",
        head="source.head",
    )


def gpt_tied() -> Job:
    return _language_model("gpt_tied", 128, 4, tied=True)


def moe() -> Job:
    return Job(
        name="moe",
        build_model=lambda: Gpt(128, 3, tied=False, block=MixtureBlock),
        make_batch=_tokens,
        loss=_next_token,
        batch_size=BATCH,
        blocks="blocks",
        head="head",
        experts="blocks.*.mlp",
    )


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(x + self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x))))))


class ConvNet(nn.Module):
    """BatchNorm has buffers, which DDP broadcasts before every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.blocks = nn.ModuleList([Residual(64) for _ in range(4)])
        self.head = nn.Linear(64, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def _images(step: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return {
        "image": torch.randn(BATCH, 3, 16, 16, generator=generator),
        "label": torch.randint(0, 100, (BATCH,), generator=generator),
    }


def convnet() -> Job:
    return Job(
        name="convnet",
        build_model=ConvNet,
        make_batch=_images,
        loss=lambda model, batch: functional.cross_entropy(model(batch["image"]), batch["label"]),
        batch_size=BATCH,
        blocks="blocks",
        head="head",
    )


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(37, width)
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
                for _ in range(3)
            ]
        )
        self.head = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def _points(step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return torch.randn(64, 37, generator=generator), torch.randn(64, 8, generator=generator)


def _regression(name: str, width: int) -> Job:
    return Job(
        name=name,
        build_model=lambda: Mlp(width),
        make_batch=_points,
        loss=lambda model, batch: functional.mse_loss(model(batch[0]), batch[1]),
        batch_size=64,
        blocks="blocks",
        head="head",
    )


def mlp() -> Job:
    """No kernel here takes scratch memory: the whole sequence of allocations can be told."""
    return _regression("mlp", 512)


def mlp_odd() -> Job:
    """Odd sizes, which no number of ranks divides: shards are padded."""
    return _regression("mlp_odd", 513)


# Written to refute predictions that were right on the jobs above.


class GroupedAttention(nn.Module):
    """Two keys and values for eight queries, turned by angles that come beside the hidden states."""

    def __init__(self, width: int, head_width: int = 16) -> None:
        super().__init__()
        self.head_width = head_width
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, 2 * head_width, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            f(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        q, k = (t * cos + t.roll(self.head_width // 2, -1) * sin for t in (q, k))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class LlamaBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = GroupedAttention(width)
        self.gate, self.up = (nn.Linear(width, 344, bias=False) for _ in range(2))
        self.down = nn.Linear(344, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Llama(Gpt):
    def __init__(self, *, frozen: int = 0) -> None:
        super().__init__(128, 4, tied=False, block=LlamaBlock)
        for part in (self.embed, *self.blocks[:frozen]) if frozen else ():
            part.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        angles = torch.outer(torch.arange(tokens.shape[1]), 10000 ** (-torch.arange(0, 16) / 16))
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return self.head(self.norm(x))


def llama() -> Job:
    return dataclasses.replace(_language_model("llama", 128, 4), build_model=Llama)


def llama_frozen() -> Job:
    return dataclasses.replace(llama(), build_model=lambda: Llama(frozen=2))


def llama_uneven() -> Job:
    """Seven sequences: ranks have batches of different sizes."""
    fewer = lambda step, seed: {k: v[:7].clone() for k, v in _tokens(step, seed).items()}  # noqa: E731
    return dataclasses.replace(llama(), make_batch=fewer, batch_size=7)


class Down(nn.Module):
    """Works in place on what layers with parameters have returned."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.short = nn.Conv2d(channels, out, 1, stride=2, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(out) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(functional.relu_(self.norm1(self.conv1(x)))))
        return functional.relu_(y + self.norm3(self.short(x)))


class Pyramid(ConvNet):
    """Odd numbers of channels, and a stem that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 5, padding=2).requires_grad_(False)
        self.blocks = nn.Sequential(Down(24, 51), Down(51, 90), Down(90, 181))
        self.head = nn.Linear(181, 100)


def pyramid() -> Job:
    return dataclasses.replace(convnet(), name="pyramid", build_model=Pyramid)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 96)
        self.recurrent = nn.LSTM(96, 128, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(256, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.recurrent(self.embed(tokens))[0])


def lstm() -> Job:
    return dataclasses.replace(gpt(), name="lstm", build_model=Tagger, blocks=None)


class Translator(nn.Module):
    """Decoder blocks look at what the encoder has read, here the same text backwards."""

    def __init__(self) -> None:
        super().__init__()
        same: dict[str, Any] = {"dropout": 0.0, "batch_first": True}
        self.embed = nn.Embedding(VOCABULARY, 128)
        self.encoder = nn.ModuleList([nn.TransformerEncoderLayer(128, 4, 256, **same) for _ in range(2)])
        self.blocks = nn.ModuleList([nn.TransformerDecoderLayer(128, 4, 256, **same) for _ in range(2)])
        self.head = nn.Linear(128, VOCABULARY)
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        read, x = self.embed(tokens.flip(1)), self.embed(tokens)
        for layer in self.encoder:
            read = layer(read)
        for block in self.blocks:
            x = block(x, read, tgt_mask=self.mask)
        return self.head(x)


def translator() -> Job:
    return dataclasses.replace(gpt(), name="translator", build_model=Translator)


@functools.cache
def folds() -> Job:
    """AlphaFold 2; every rank that shares a sample draws the dropout of the whole."""
    return alphafold2.make(batch=2, length=23)
