"""Extras of a training loop: gradient clipping and weight averages are part of the predicted step."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import memfit
from memfit import Job
from memfit.jobs.training_step import TrainingStep
from memfit.types.errors import UserError
from memfit.types.job import OptimizerChoice
from memfit.types.plan import Plan, use

WIDTH, DEPTH = 32, 3


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.GELU()) for _ in range(DEPTH)]
    )


def make_batch(step: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(16, WIDTH, generator=generator) for name in ("x", "y")}


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


def _without_batch_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(DEPTH)])


JOB = Job(
    name="loop",
    build_model=build_model,
    make_batch=make_batch,
    loss=loss,
    batch_size=16,
    optimizer=OptimizerChoice(name="sgd", learning_rate=0.1),
)
PARAMETER_BYTES = sum(p.numel() * 4 for p in build_model().parameters())


def test_a_clipped_step_equals_clip_grad_norm_bit_for_bit() -> None:
    step = TrainingStep(dataclasses.replace(JOB, clip=0.05), Plan())
    model = build_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    for index in range(3):
        batch = make_batch(index, 0)
        _, norm = step.run(batch)
        loss(model, batch).backward()
        expected = nn.utils.clip_grad_norm_(model.parameters(), 0.05, foreach=False)
        sgd.step()
        sgd.zero_grad()
        assert norm > 0.05  # it does clip
        assert torch.equal(norm, expected)
        for ours, theirs in zip(step.model.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_the_weight_average_equals_torchs_averaged_model_bit_for_bit() -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    step = TrainingStep(dataclasses.replace(JOB, ema=0.9), Plan())
    averaged = AveragedModel(step.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.n_averaged += 1  # its first update would copy
    for index in range(3):
        step.run(make_batch(index, 0))
        averaged.update_parameters(step.model)
    assert step.average is not None
    for ours, theirs in zip(step.average.averages, averaged.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(step.average.buffers, step.model.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_half_precision_weights_are_averaged_in_float32() -> None:
    step = TrainingStep(
        dataclasses.replace(JOB, ema=True), Plan(uses=(use("bf16-parameters", rounding="master"),))
    )
    step.run(make_batch(0, 0))
    assert step.average is not None
    assert {a.dtype for a in step.average.averages} == {torch.float32}


def test_a_weight_average_is_predicted_as_one_more_copy_of_the_weights_and_named() -> None:
    plain, averaged = memfit.estimate(JOB), memfit.estimate(JOB, ema=True)
    more = averaged.allocated_bytes.value - plain.allocated_bytes.value
    assert PARAMETER_BYTES <= more < 1.1 * PARAMETER_BYTES
    assert averaged.by_category["ema"] >= PARAMETER_BYTES
    assert "EMA copy" in averaged.explain()


@pytest.mark.parametrize("plan", [{}, {"gradient-accumulation": {"micro_batches": 2}}], ids=str)
def test_the_peak_with_clipping_and_averaging_is_predicted_to_the_byte(plan: dict[str, Any]) -> None:
    """Measured by the counting allocator in this process."""
    from memfit.runtime.memory import peak_counter

    job = dataclasses.replace(JOB, build_model=_without_batch_norm, ema=True, clip=0.1)
    predicted = memfit.estimate(job, plan=plan)
    TrainingStep(job, predicted.plan).run(make_batch(0, 0))  # allocates what kernels keep permanently
    counter = peak_counter()
    base = counter.live_bytes()
    counter.reset_peak()
    step = TrainingStep(job, predicted.plan)
    for index in range(2):
        step.run(make_batch(index, 0))
    assert counter.peak_bytes() - base == predicted.allocated_bytes.value


def test_estimate_takes_ema_clip_and_workers_from_keywords_and_from_a_job() -> None:
    model, batch = build_model(), make_batch(0, 0)
    asked = memfit.estimate(model, batch, loss, ema=0.99, clip=1.0, workers=2).job
    assert (asked.ema, asked.clip, asked.workers) == (0.99, 1.0, 2)
    kept = memfit.estimate(dataclasses.replace(JOB, clip=2.0), ema=True).job
    assert (kept.ema, kept.clip) == (0.999, 2.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ema": 1.5},
        {"ema": -0.1},
        {"clip": 0.0},
        {"clip": float("nan")},
        {"clip": True},
        {"workers": -1},
    ],
    ids=str,
)
def test_a_job_refuses_wrong_values_of_ema_clip_and_workers(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))) as error:
        dataclasses.replace(JOB, **wrong)
    assert error.value.allowed


def test_clipping_is_refused_with_the_optimizer_in_backward() -> None:
    with pytest.raises(UserError, match="clip cannot be combined with optimizer-in-backward"):
        memfit.estimate(JOB, plan="optimizer-in-backward", clip=1.0)


def test_a_search_for_a_clipped_job_leaves_out_the_optimizer_in_backward() -> None:
    from memfit.planner.plan_space import usable
    from memfit.planner.request import job_facts
    from memfit.types.plan import Accuracy

    names = {
        clip: {
            t.name
            for t in usable(job_facts(dataclasses.replace(JOB, clip=clip), "cpu"), Accuracy.ROUNDING)[0]
        }
        for clip in (None, 1.0)
    }
    assert names[None] - names[1.0] == {"optimizer-in-backward"}


def test_a_search_proposes_no_other_adamw_to_a_job_with_another_optimizer() -> None:
    from memfit.planner.plan_space import usable
    from memfit.planner.request import job_facts
    from memfit.types.job import OptimizerChoice
    from memfit.types.plan import Accuracy

    def proposed(choice: OptimizerChoice) -> bool:
        facts = job_facts(dataclasses.replace(JOB, optimizer=choice), "cpu")
        return "adamw-8bit" in {t.name for t in usable(facts, Accuracy.ROUNDING)[0]}

    assert proposed(OptimizerChoice())
    assert proposed(OptimizerChoice(name="adam"))
    assert not proposed(OptimizerChoice(name="adam", weight_decay=0.1))
    assert not proposed(OptimizerChoice(name="sgd"))
    assert not proposed(OptimizerChoice(make=torch.optim.AdamW))


def test_weight_averaging_does_not_change_the_losses() -> None:
    steps = [TrainingStep(copy.copy(job), Plan()) for job in (JOB, dataclasses.replace(JOB, ema=True))]
    losses = [[float(step.run(make_batch(i, 0))[0]) for i in range(3)] for step in steps]
    assert losses[0] == losses[1]
