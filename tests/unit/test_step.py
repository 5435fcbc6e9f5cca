"""The one training step: micro-batches, their weights, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import regression, words, words_terms
from torch import nn
from torch.testing import assert_close

from memfit.jobs.training_step import TrainingStep
from memfit.model.batch_objects import batch_length, repeat, split
from memfit.techniques.base import Workbench
from memfit.techniques.precision import LossScale
from memfit.techniques.rank_mesh import Layout, World
from memfit.techniques.registry import technique
from memfit.types.device_kind import device_kind
from memfit.types.errors import UserError
from memfit.types.job import Job, OptimizerChoice
from memfit.types.plan import Plan, use
from memfit.types.trace import Phase


@given(length=st.integers(1, 30), parts=st.integers(1, 30))
def test_law_micro_batches_cover_the_batch_evenly(length: int, parts: int) -> None:
    batch = {"x": torch.arange(length), "pair": (torch.arange(length), "kept"), "scale": torch.tensor(2.0)}
    if parts > length:
        with pytest.raises(UserError, match=f"at most {length}"):
            split(batch, parts)
        return
    cut = split(batch, parts)
    sizes = [batch_length(part) for part in cut]
    assert len(cut) == parts
    assert max(sizes) - min(sizes) <= 1
    assert torch.cat([part["x"] for part in cut]).tolist() == list(range(length))
    assert all(part["pair"][1] == "kept" for part in cut)
    assert all(part["scale"].item() == 2.0 for part in cut)


def test_micro_batches_are_views_and_tensors_of_another_length_are_shared() -> None:
    x, table = torch.arange(6), torch.arange(4)
    first, second = split((x, table), 2)
    assert second[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert first[1] is second[1] is table


def test_a_repeated_batch_splits_into_equal_micro_batches_and_leaves_scalars_alone() -> None:
    scale, shared, rows = torch.tensor(2.0), torch.ones(5), torch.arange(6.0).view(3, 2)
    batch = {"x": rows, "more": [scale, shared]}
    repeated = repeat(batch, 4)
    assert repeated["x"].shape == (12, 2)
    assert repeated["more"][0] is scale
    assert repeated["more"][1] is shared
    assert all(torch.equal(part["x"], rows) for part in split(repeated, 4))
    assert repeat(batch, 1) is batch


def test_a_batch_without_tensors_is_refused() -> None:
    with pytest.raises(UserError, match="contains no tensor"):
        batch_length({"text": "ACDE", "scale": torch.tensor(1.0)})


def first_gradients(job: Job, plan: Plan) -> tuple[float, float, dict[str, torch.Tensor]]:
    """(loss, gradient norm, gradients): with plain SGD at rate 1 the first update is minus the gradient."""
    job = dataclasses.replace(job, optimizer=OptimizerChoice(name="sgd", learning_rate=1.0))
    torch.manual_seed(0)
    step = TrainingStep(job, plan)
    for module in step.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # parts of a batch draw other dropout masks than the whole
    before = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    loss, norm = step.run(job.make_batch(0, 0))
    return float(loss), float(norm), {n: before[n] - p.detach() for n, p in step.model.named_parameters()}


@pytest.mark.parametrize("micros", [2, 3, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch_despite_padding(micros: int) -> None:
    loss, norm, gradients = first_gradients(words(), Plan())
    plan = Plan(uses=(use("gradient-accumulation", micro_batches=micros),))
    parts_loss, parts_norm, parts = first_gradients(words(), plan)
    assert parts_loss == pytest.approx(loss, rel=1e-6)
    assert parts_norm == pytest.approx(norm, rel=1e-5)
    assert_close(parts, gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micros", [2, 4])
def test_a_micro_batch_without_loss_terms_adds_nothing(micros: int) -> None:
    def batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        x = torch.arange(32.0).reshape(8, 4).cos()
        return {"x": x, "y": x.sum(1, keepdim=True), "kept": torch.tensor([0.0] * 5 + [1.0] * 3)}

    def loss(model: nn.Module, part: dict[str, torch.Tensor]) -> torch.Tensor:  # 0 / 0 without terms
        errors = (model(part["x"]) - part["y"]).square()[:, 0]
        return (errors * part["kept"]).sum() / part["kept"].sum()

    job = Job(
        name="half labeled",
        build_model=lambda: nn.Linear(4, 1),
        make_batch=batch,
        loss=loss,
        loss_terms=lambda part: int(part["kept"].sum()),
        batch_size=8,
    )
    whole_loss, whole_norm, gradients = first_gradients(job, Plan())
    plan = Plan(uses=(use("gradient-accumulation", micro_batches=micros),))
    loss_sum, norm, parts = first_gradients(job, plan)
    assert (loss_sum, norm) == pytest.approx((whole_loss, whole_norm), rel=1e-5)
    assert_close(parts, gradients, rtol=1e-4, atol=1e-6)


def test_a_rank_without_loss_terms_adds_nothing() -> None:
    step = TrainingStep(words(), Plan())
    step.bench.world = World(rank=1, layout=Layout(replicate=2))
    batch = step.job.make_batch(0, 0)
    batch["labels"][len(batch["labels"]) // 2 :] = -100
    part, terms = step.local(batch)
    assert torch.equal(part["tokens"], split(batch, 2)[0]["tokens"])
    assert [micro_batch.share for micro_batch in step.split(part, terms)] == [0.0]


def test_a_batch_without_loss_terms_is_refused() -> None:
    step = TrainingStep(dataclasses.replace(words(), loss_terms=lambda part: 0), Plan())
    with pytest.raises(UserError, match="the batch has no loss terms"):
        step.run(step.job.make_batch(0, 0))


def test_without_the_number_of_terms_padding_would_bias_the_sum() -> None:
    """Shows that the test above can fail: rows are padded unequally."""
    plan = Plan(uses=(use("gradient-accumulation", micro_batches=2),))
    right, _, _ = first_gradients(words(), Plan())
    wrong, _, _ = first_gradients(dataclasses.replace(words(), loss_terms=None), plan)
    assert abs(wrong - right) > 1e-4 * right


def test_the_gradient_norm_is_that_of_all_parameters_together() -> None:
    for plan in (Plan(), Plan(uses=(use("optimizer-in-backward"),))):
        _, norm, gradients = first_gradients(words(), plan)
        expected = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        assert norm == pytest.approx(expected, rel=1e-4)


def test_forward_and_backward_run_once_for_each_micro_batch_played() -> None:
    seen: list[Phase] = []
    step = TrainingStep(words(), Plan(uses=(use("gradient-accumulation", micro_batches=4),)))
    step.run(step.job.make_batch(0, 0), seen.append, micro_batch_limit=2)
    micro = [Phase.FORWARD, Phase.BACKWARD]
    assert seen == [*micro, *micro, Phase.OPTIMIZER]


def test_without_update_weights_are_kept_and_gradients_freed() -> None:
    step = TrainingStep(words(), Plan())
    before = [p.detach().clone() for p in step.model.parameters()]
    step.run(step.job.make_batch(0, 0), update=False)
    assert all(torch.equal(p, b) for p, b in zip(step.model.parameters(), before, strict=True))
    assert all(p.grad is None for p in step.model.parameters())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda net, batch: net(batch[0]), r"a tensor of shape \(32, 4\)"),
        (lambda net, batch: 0.5, r"is 0\.5"),
        (lambda net, batch: batch[0].mean(), "does not depend on any trainable parameter"),
    ],
)
def test_an_invalid_loss_is_refused_with_its_value(wrong: Any, said: str) -> None:
    job = dataclasses.replace(regression(), loss=wrong)
    with pytest.raises(UserError, match=said):
        TrainingStep(job, Plan()).run(job.make_batch(0, 0))


def test_more_micro_batches_than_rows_are_refused() -> None:
    step = TrainingStep(words(), Plan(uses=(use("gradient-accumulation", micro_batches=9),)))
    with pytest.raises(UserError, match=r"9 micro-batches, or .* cannot be cut from a batch of 8 samples"):
        step.run(step.job.make_batch(0, 0))


def test_a_plan_with_conflicting_techniques_is_refused() -> None:
    clash = Plan(uses=(use("sgd"), use("adafactor")))
    with pytest.raises(UserError, match="impossible plan"):
        TrainingStep(words(), clash)


def test_the_rows_of_the_test_job_are_padded_unequally() -> None:
    assert [words_terms(part) for part in split(words().make_batch(0, 0), 8)] == [12 - i for i in range(8)]


FP16 = Plan(uses=(use("fp16-autocast"),))


def _scaled(plan: Plan = FP16) -> TrainingStep:
    torch.manual_seed(0)
    return TrainingStep(words(2), plan)


def test_a_loss_scale_does_not_change_gradients() -> None:
    plain, scaled = _scaled(Plan()), _scaled()
    assert scaled.bench.loss_scale is not None
    batch = plain.job.make_batch(0, 0)
    norms = [step.run(batch)[1].item() for step in (plain, scaled)]
    assert norms[1] == pytest.approx(norms[0], rel=5e-3)
    assert scaled.bench.loss_scale.value == 65536
    for one, other in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=3e-3)


def test_an_overflowing_step_is_skipped_and_halves_the_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "first", 2.0**40)
    step = _scaled()
    before = [p.detach().clone() for p in step.model.parameters()]
    batch = step.job.make_batch(0, 0)
    assert step.run(batch)[1].item() == 0
    assert step.bench.loss_scale is not None
    assert step.bench.loss_scale.value == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
    while step.run(batch)[1].item() == 0:
        pass
    assert not all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


def test_a_loss_scale_doubles_after_good_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "patience", 2)
    step = _scaled()
    for _ in range(4):
        step.run(step.job.make_batch(0, 0))
    assert step.bench.loss_scale is not None
    assert step.bench.loss_scale.value == 4 * 65536


def test_a_loss_that_is_not_finite_at_any_scale_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "first", 1.0)
    torch.manual_seed(0)
    job = words(2)
    broken = dataclasses.replace(job, loss=lambda model, batch: job.loss(model, batch) * float("inf"))
    norm = TrainingStep(broken, FP16).run(job.make_batch(0, 0))[1]
    assert not torch.isfinite(norm)


def test_autocast_is_that_of_the_device_even_while_the_model_is_in_host_memory() -> None:
    """As under plans that divide the model before it moves."""
    kinds: list[str] = []
    bench = Workbench(
        job=regression(),
        model=nn.Linear(2, 2),
        device=device_kind("cuda"),
        torch_device="cuda:0",
        make_optimizer=torch.optim.SGD,
    )
    technique("bf16-autocast").apply(bench, {})
    with mock.patch.object(torch, "autocast", lambda kind, dtype: kinds.append(kind)):
        bench.forward_contexts[-1]()
    assert kinds == ["cuda"]
