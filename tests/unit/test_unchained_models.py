"""Searches for several devices for models that are not a chain of at least three equal blocks that run
one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from memfit.catalog import machine
from memfit.planner.request import Request
from memfit.planner.search import search
from memfit.techniques.registry import TECHNIQUES
from memfit.types.job import JobRef
from memfit.types.plan import Bounds

_JOBS = """
import torch
from torch import nn

from memfit import Job


def make_batch(step, seed):
    return {name: torch.zeros(8, 32, dtype=torch.int64) for name in ("input_ids", "labels")}


def own_loss(model, batch):
    return model(**batch).loss


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=256, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4, decoder_start_token_id=0,
        use_cache=False,
    )
    return T5ForConditionalGeneration(config)


class Blocks(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.embed = nn.Embedding(256, 64)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(count)])
        self.head = nn.Linear(64, 256)

    def order(self):
        return self.blocks

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.order():
            x = x + block(x)
        return self.head(x)


class Backwards(Blocks):
    def order(self):
        return reversed(self.blocks)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


encoder_decoder = Job(
    name="t5", build_model=t5, make_batch=make_batch, loss=own_loss, batch_size=8, tokens_per_batch=256
)
two_blocks = Job(
    name="two", build_model=lambda: Blocks(2), make_batch=make_batch, loss=loss, batch_size=8,
    tokens_per_batch=256,
)
backwards = Job(
    name="backwards", build_model=lambda: Backwards(3), make_batch=make_batch, loss=loss, batch_size=8,
    tokens_per_batch=256,
)
"""
SEARCHED = {"ddp", "fsdp2", "activation-checkpointing"}


@pytest.mark.parametrize("name", ["encoder_decoder", "two_blocks", "backwards"])
def test_the_answer_has_what_divides_the_batch_and_says_what_is_not_modelled(
    name: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(_JOBS)
    request = Request(
        job_ref=JobRef(spec=f"{file}:{name}"),
        machine=machine("2xL4"),
        bounds=Bounds(without=tuple(sorted(set(TECHNIQUES) - SEARCHED))),
    )
    result = search(request, lambda *stage: None).result
    assert result.recommended is not None
    assert result.recommended.estimate.plan.ranks == 2
    techniques = {u.technique for c in (*result.frontier, result.baseline) for u in c.estimate.plan.uses}
    assert techniques >= {"ddp", "fsdp2"}
    not_modelled = [r.detail for r in result.recommended.reasons if r.kind == "cannot"]
    assert any("parallelism are not modelled for this model" in text for text in not_modelled)
