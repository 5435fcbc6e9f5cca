"""What the model itself does is not held against a plan; what the run does differently is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memfit.jobs.training_step import TrainingStep
from memfit.techniques.registry import make_use
from memfit.types.conformance import NotConforming
from memfit.types.job import Job, JobRef
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan
from memfit.worker import train

WIDTH = 32


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(self.norm(x))

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class _Recomputing(_Block):
    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().inner, x, use_reentrant=False)


class _Narrow(_Block):
    def inner(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().inner(x).float()


class _Wide(_Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def _net(*kinds: type[_Block]) -> nn.Sequential:
    return nn.Sequential(*(kind() for kind in kinds))


def _half_frozen() -> nn.Sequential:
    model = _net(*[_Block] * 4)
    for block in model[:2]:
        block.requires_grad_(False)
    return model


def _job(build: Callable[[], nn.Module]) -> Job:
    def batch(step: int, seed: int) -> torch.Tensor:
        return torch.randn(8, 4, WIDTH, generator=torch.Generator().manual_seed(step))

    def loss(model: Any, given: torch.Tensor) -> torch.Tensor:
        return model(given.to(next(model.parameters()).dtype)).float().square().mean()

    return Job(name="own", build_model=build, make_batch=batch, loss=loss, batch_size=8)


def _plan(**uses: Any) -> Plan:
    return Plan(uses=tuple(make_use(n.replace("_", "-"), s) for n, s in uses.items()))


def _conform(build: Callable[[], nn.Module], planned: Plan, done: Plan | None = None) -> None:
    job = _job(build)
    step = TrainingStep(job, done or planned)
    spec = RunSpec(name="x", role="run", job=JobRef(spec="x"), plan=planned, seed=0, steps=1)
    train._conform(step, step.local(job.make_batch(0, 0)), job, spec, train._elements_and_dtypes(build()))


PLAIN, RECOMPUTED, NARROW = Plan(), _plan(activation_checkpointing={}), _plan(bf16_autocast={})


@pytest.mark.parametrize(
    ("build", "plan"),
    [
        (lambda: _net(*[_Recomputing] * 3), PLAIN),
        (lambda: _net(*[_Recomputing] * 3), _plan(activation_checkpointing={"every": 2})),
        (lambda: _net(*[_Narrow] * 3), PLAIN),
        (lambda: _net(*[_Block] * 3).bfloat16(), PLAIN),
        (_half_frozen, RECOMPUTED),
        (lambda: _net(_Block, _Block, _Wide), NARROW),
        (lambda: _net(_Block, _Wide, _Wide), NARROW),
    ],
    ids=[
        "recomputes",
        "recomputes every block",
        "narrows",
        "is narrow",
        "half frozen",
        "one wide",
        "two wide",
    ],
)
def test_behaviour_of_the_model_itself_does_not_fail_a_run(
    build: Callable[[], nn.Module], plan: Plan
) -> None:
    _conform(build, plan)


@pytest.mark.parametrize(
    ("planned", "done", "feature"),
    [
        (PLAIN, RECOMPUTED, "activation-checkpointing"),
        (_plan(activation_checkpointing={"every": 2}), RECOMPUTED, "activation-checkpointing"),
        (PLAIN, NARROW, "bf16-autocast"),
        (NARROW, PLAIN, "bf16-autocast"),
        (PLAIN, _plan(bf16_parameters={}), "parameter dtype"),
        (_plan(gradient_accumulation={"micro_batches": 4}), PLAIN, "gradient-accumulation"),
    ],
)
def test_a_run_that_differs_from_its_plan_is_reported(planned: Plan, done: Plan, feature: str) -> None:
    with pytest.raises(NotConforming, match=feature):
        _conform(lambda: _net(*[_Block] * 4), planned, done)


def test_recomputing_only_part_of_a_block_is_reported() -> None:
    """For example its attention or half of its layers: most of the memory stays in use."""

    class Half(_Block):
        def inner(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(checkpoint(self.up, x, use_reentrant=False).relu())

    with pytest.raises(NotConforming, match="activation-checkpointing"):
        _conform(lambda: _net(*[Half] * 4), RECOMPUTED, PLAIN)
