"""memfit.apply: the techniques of a plan in a loop of the user, by the code that the worker runs."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import memfit
from memfit.inputs import plan_of
from memfit.jobs.training_step import TrainingStep
from memfit.runtime.counting_allocator import CountingAllocator, available
from memfit.techniques.registry import effect_of, technique
from memfit.types.conformance import NotConforming
from memfit.types.errors import UserError
from memfit.types.job import Job, OptimizerChoice
from memfit.types.plan import EffectClass, Plan, use

STEPS = 3
Batch = dict[str, torch.Tensor]


class Words(nn.Module):
    """A small causal language model with blocks that techniques find."""

    def __init__(self, width: int = 64, vocabulary: int = 512) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(
                    nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
                )
                for _ in range(3)
            ]
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


def make_model() -> Words:
    torch.manual_seed(0)
    return Words()


def make_batch(step: int, seed: int = 0, *, samples: int = 8) -> Batch:
    tokens = torch.randint(0, 512, (samples, 33), generator=torch.Generator().manual_seed(step))
    return {"x": tokens[:, :-1].contiguous(), "y": tokens[:, 1:].contiguous()}


def loss_of(model: Any, batch: Batch) -> torch.Tensor:
    return functional.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


def run_job(plan: Plan, choice: OptimizerChoice, *, clip: float | None = None) -> list[float]:
    """The losses of the worker's own step."""
    job = Job(
        name="words",
        build_model=make_model,
        make_batch=make_batch,
        loss=loss_of,
        batch_size=8,
        optimizer=choice,
        clip=clip,
    )
    step = TrainingStep(job, plan)
    losses = [float(step.run(make_batch(i))[0]) for i in range(STEPS)]
    step.close()
    return losses


def run_loop(fit: memfit.Fit, steps: int = STEPS) -> list[float]:
    """The losses of a user's loop; of several micro-batches the mean."""
    losses = []
    for index in range(steps):
        parts = []
        for part in fit.split(make_batch(index)):
            with fit.forward():
                loss = loss_of(fit.model, part)
            fit.backward(loss)
            parts.append(loss.detach().float())
            del loss
        fit.step()
        losses.append(float(torch.stack(parts).mean()))
    return losses


PLANS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "activation-checkpointing": {"activation-checkpointing": {"every": 1}},
    "every second block": {"activation-checkpointing": {"every": 2}},
    "selective-checkpointing": {"selective-checkpointing": {"keep": "matmul"}},
    "bf16-autocast": {"bf16-autocast": {}},
    "fp16-autocast": {"fp16-autocast": {}},
    "bf16-parameters": {"bf16-parameters": {}},
    "gradient-accumulation": {"gradient-accumulation": {"micro_batches": 4}},
    "chunked-cross-entropy": {"chunked-cross-entropy": {"chunks": 4}},
    "activation-offload": {"activation-offload": {"to": "disk", "minimum_kib": 4}},
    "optimizer-in-backward": {"optimizer-in-backward": {}},
    "adamw-single": {"adamw-single": {}},
    "adamw-fused": {"adamw-fused": {}},
    "adafactor": {"adafactor": {}},
    "sgd": {"sgd": {}},
    "adamw-8bit": {"adamw-8bit": {}},
    "lora": {"lora": {"rank": 4}},
    "zero": {"zero": {"stage": 2}},
    "several": {
        "activation-checkpointing": {"every": 1},
        "bf16-parameters": {},
        "gradient-accumulation": {"micro_batches": 2},
    },
}


@pytest.mark.parametrize("name", PLANS)
def test_a_loop_under_fit_trains_as_the_worker_does(name: str) -> None:
    plan = plan_of(PLANS[name])
    for used in plan.uses:
        if missing := technique(used.technique).lacks(used.settings):
            pytest.skip(f"not installed: {missing}")
    model = make_model()
    fit = memfit.apply(plan, model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0))
    losses, expected = run_loop(fit), run_job(plan, OptimizerChoice())
    fit.close()
    if effect_of(plan) is EffectClass.E0:
        assert losses == expected
    assert losses == pytest.approx(expected, rel=1e-6)
    assert fit.conformance is not None and not fit.conformance.differences
    assert losses[0] != losses[-1]  # it trains
