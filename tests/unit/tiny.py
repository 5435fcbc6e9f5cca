"""Jobs of a few kilobytes, shared by the tests of trace, search, step and worker, and a metric."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.nn import functional

from memfit.types.job import Job, Metric

VOCABULARY, WIDTH, LENGTH, BATCH = 512, 16, 12, 8
PADDING = -100

Q3 = Metric(
    name="Q3",
    unit="%",
    higher_is_better=True,
    margin=2.0,
    margin_source="test",
    naive=38.0,
    naive_name="coil",
)


class Block(nn.Module):
    """With dropout, so that recomputation must restore the random state."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.inner(x))


class Words(nn.Module):
    """A language model without attention: embedding, blocks, head over the vocabulary."""

    def __init__(self, blocks: int = 3, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.head = nn.Linear(WIDTH, VOCABULARY)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def words_batch(step: int, seed: int) -> dict[str, torch.Tensor]:
    """Row i has i padded labels, so that rows weigh differently."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels[torch.arange(LENGTH) >= LENGTH - torch.arange(BATCH)[:, None]] = PADDING
    return {"tokens": tokens, "labels": labels}


def words_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(batch["tokens"])
    return functional.cross_entropy(logits.view(-1, VOCABULARY), batch["labels"].view(-1))


def words_terms(batch: dict[str, torch.Tensor]) -> int:
    return int((batch["labels"] != PADDING).sum())


def words(blocks: int = 3, *, tied: bool = False) -> Job:
    return Job(
        name="words",
        build_model=lambda: Words(blocks, tied=tied),
        make_batch=words_batch,
        loss=words_loss,
        loss_terms=words_terms,
        batch_size=BATCH,
        blocks="blocks",
        head="head",
    )


def even_words() -> Job:
    """Like `words`, with equally many labels in all rows."""

    def make_batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        batch = words_batch(step, seed)
        return {**batch, "labels": batch["tokens"]}

    return dataclasses.replace(words(), make_batch=make_batch)


def regression(model: type[nn.Module] | None = None) -> Job:
    """8 -> 16 -> 4 with a batch of 32: every size can be worked out by hand."""
    return Job(
        name="regression",
        build_model=model or (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))),
        make_batch=lambda step, seed: (torch.ones(32, 8), torch.zeros(32, 4)),
        loss=lambda net, batch: functional.mse_loss(net(batch[0]), batch[1]),
        batch_size=32,
    )
