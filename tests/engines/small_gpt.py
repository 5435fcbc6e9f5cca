"""A job for engines whose environment has no pytest."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from memfit.jobs.builtin.gpt import Gpt, GptSize
from memfit.types.job import Job

SIZE = GptSize(layers=2, width=96, heads=4, length=48, vocabulary=320, batch_size=4)


def _batch(step: int, seed: int) -> dict[str, torch.Tensor]:
    shape = (SIZE.batch_size, SIZE.length + 1)
    tokens = torch.randint(0, SIZE.vocabulary, shape, generator=torch.Generator().manual_seed(step))
    return {"tokens": tokens[:, :-1].contiguous(), "next": tokens[:, 1:].contiguous()}


def _loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["next"].flatten())


gpt = Job(
    name="gpt",
    build_model=lambda: Gpt(SIZE),
    make_batch=_batch,
    loss=_loss,
    batch_size=4,
    loss_terms=lambda part: int(part["next"].numel()),
)
