"""A parameter without dimensions: what does not support it says so before training, in the same words."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from test_scaling import request_for
from tiny import Words, words_batch, words_loss
from torch import nn

from memfit.catalog import machine
from memfit.jobs.training_step import TrainingStep
from memfit.planner.evaluate import Predictor
from memfit.planner.multi_device_predictor import MultiDevicePredictor
from memfit.planner.plan_space import usable
from memfit.planner.request import job_facts
from memfit.runtime import local_machine
from memfit.techniques.registry import make_use
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.plan import Accuracy, Plan
from memfit.worker.train import step_maker


class Scaled(Words):
    def __init__(self) -> None:
        super().__init__()
        self.many = nn.Parameter(torch.tensor(1.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.many * super().forward(tokens)


JOB = Job(
    name="scaled", build_model=Scaled, make_batch=words_batch, loss=words_loss, batch_size=8, blocks="blocks"
)
TOLD = r"does not support parameters without dimensions, but 'many' is one; .*torch\.ones\(1\)"


def _plan(name: str, ranks: int = 2, **settings: Any) -> Plan:
    return Plan(ranks=ranks, uses=(make_use(name, settings),))


def _missing(*names: str) -> bool:
    return any(importlib.util.find_spec(name) is None for name in names)


@pytest.mark.parametrize(
    ("engine", "plan", "who"),
    [
        ("native", _plan("fsdp2"), "fsdp2"),
        ("accelerate", _plan("fsdp2"), "fsdp2"),
        ("accelerate", _plan("zero"), "accelerate"),
        ("deepspeed", _plan("ddp"), "deepspeed"),
        ("deepspeed", _plan("zero", stage=3), "deepspeed"),
        ("deepspeed", Plan(), "deepspeed"),
    ],
)
def test_prediction_refuses_an_unsupported_scalar_parameter(engine: str, plan: Plan, who: str) -> None:
    if engine == "accelerate" and _missing("accelerate"):
        pytest.skip("accelerate is not installed: native's step is traced")
    predictor = Predictor(
        job=JOB,
        machine=local_machine.this_machine("world"),
        job_facts=job_facts(JOB, "cpu", 2),
        engine=engine,
    )
    with pytest.raises(UserError, match=f"^{who} {TOLD}"):
        predictor.whole(plan)


@pytest.mark.parametrize("engine", ["deepspeed", "accelerate"])
def test_a_worker_refuses_a_scalar_parameter_before_the_library_is_called(
    engine: str, tmp_path: Path
) -> None:
    if _missing("deepspeed", engine):
        pytest.skip(f"deepspeed or {engine} is not installed")
    kind: Any = step_maker(engine, tmp_path)
    try:
        with pytest.raises(UserError, match=f"^deepspeed {TOLD}"):
            kind(JOB, _plan("zero", ranks=1))
    finally:
        kind.folder = None


@pytest.mark.parametrize("plan", [_plan("zero", ranks=1, stage=3, persist_elements=1), Plan()])
def test_zero_3_and_plain_training_support_a_scalar_parameter(plan: Plan) -> None:
    torch.manual_seed(0)
    step = TrainingStep(JOB, plan)
    before = float(step.run(JOB.make_batch(0, 0))[0])
    assert float(step.run(JOB.make_batch(0, 0))[0]) < before
    assert step.model.many.numel() in {0, 1}
    step.close()


def test_fsdp2_is_not_proposed_for_a_scalar_parameter() -> None:
    proposed = {t.name for t in usable(job_facts(JOB, "cpu", 2), Accuracy.EXACT)[0]}
    assert "ddp" in proposed
    assert "fsdp2" not in proposed


def test_a_search_for_many_devices_leaves_out_fsdp2_for_a_scalar_parameter() -> None:
    on = machine("4xL4")
    many = MultiDevicePredictor(
        Predictor(job=JOB, machine=on, job_facts=job_facts(JOB, "cuda", 4)), request_for(on)
    )
    assert "fsdp2" in many.limits(4).without
