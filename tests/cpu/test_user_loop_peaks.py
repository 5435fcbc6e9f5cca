"""Peaks of a user's loop under memfit.apply against memfit.estimate; the truth is the counting allocator."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import memfit
from memfit.inputs import plan_of
from memfit.runtime.counting_allocator import CountingAllocator, available
from memfit.techniques.registry import technique

pytestmark = pytest.mark.skipif(available() is not None, reason=f"no counting allocator: {available()}")

WORST_RATIO = 0.005
STEPS = 2


class Tokens(nn.Module):
    """Blocks with many activations and a vocabulary that is wider than they are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1024, 128)
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128))
                for _ in range(4)
            ]
        )
        self.head = nn.Linear(128, 1024)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


def make_batch() -> dict[str, torch.Tensor]:
    return {"x": torch.randint(0, 1024, (16, 128)), "y": torch.randint(0, 1024, (16, 128))}


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


@pytest.fixture(scope="module")
def counter() -> CountingAllocator:
    counting = CountingAllocator()
    counting.install()
    return counting


def peak_of_loop(plan: Any, counter: CountingAllocator, *, conform: bool) -> int:
    gc.collect()
    base = counter.live_bytes()
    counter.reset_peak()
    model = Tokens()
    optimizer = torch.optim.AdamW(model.parameters())
    fit = memfit.apply(plan, model, optimizer, batch=make_batch, loss=loss_of, conform=conform)
    for _ in range(STEPS):
        for part in fit.split(make_batch()):
            with fit.forward():
                loss = loss_of(fit.model, part)
            fit.backward(loss)
        fit.step()
        del part, loss
    fit.close()
    return counter.peak_bytes() - base


PLANS: list[dict[str, dict[str, Any]]] = [
    {},
    {"activation-checkpointing": {"every": 1}},
    {"selective-checkpointing": {"keep": "matmul"}},
    {"bf16-autocast": {}},
    {"fp16-autocast": {}},
    {"bf16-parameters": {"rounding": "master"}},
    {"gradient-accumulation": {"micro_batches": 4}},
    {"chunked-cross-entropy": {"chunks": 4}},
    {"activation-offload": {"to": "disk", "minimum_kib": 4}},
    {"optimizer-in-backward": {}},
    {"adafactor": {}},
    {"adamw-8bit": {}},
    {"lora": {"rank": 4}},
    {"zero": {"stage": 2}},
    {
        "bf16-autocast": {},
        "activation-checkpointing": {"every": 1},
        "gradient-accumulation": {"micro_batches": 2},
    },
]


@pytest.mark.quick_cases(
    "plain", "bf16*", "gradient-accumulation", "activation-*", "optimizer-in-backward", "lora", "zero"
)
@pytest.mark.parametrize("techniques", PLANS, ids=lambda techniques: "+".join(techniques) or "plain")
def test_the_peak_of_a_loop_under_fit_is_the_estimate(
    techniques: dict[str, dict[str, Any]], counter: CountingAllocator
) -> None:
    plan = plan_of(techniques)
    for used in plan.uses:
        if missing := technique(used.technique).lacks(used.settings):
            pytest.skip(f"not installed: {missing}")
    predicted = memfit.estimate(
        Tokens, make_batch, loss_of, torch.optim.AdamW, plan=plan, machine="this:cpu"
    ).allocated_bytes.value
    peak_of_loop(plan, counter, conform=True)  # kernels and their caches exist then
    truth = peak_of_loop(plan, counter, conform=False)
    watched = peak_of_loop(plan, counter, conform=True)
    assert truth == pytest.approx(predicted, rel=WORST_RATIO)
    assert watched == pytest.approx(predicted, rel=WORST_RATIO)
