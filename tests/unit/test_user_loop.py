"""memfit.apply: the techniques of a plan in a loop of the user, by the code that the worker runs."""

from __future__ import annotations

import copy
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import child_ranks
import pytest
import torch
from torch import nn
from torch.nn import functional

import memfit
from memfit import user_loop
from memfit.inputs import plan_of
from memfit.jobs.training_step import TrainingStep
from memfit.techniques.rank_mesh import make_world
from memfit.techniques.registry import effect_of, technique
from memfit.types.conformance import NotConforming
from memfit.types.errors import UserError
from memfit.types.job import Job, OptimizerChoice
from memfit.types.plan import EffectClass, Plan

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
    "optimizer": {"optimizer": {"path": "torch.optim:Muon", "others": "adamw"}},
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
    assert fit.conformance is not None
    assert not fit.conformance.differences
    assert losses[0] != losses[-1]  # it trains


def test_the_example_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "apply.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(compile(example, "apply.md", "exec"), {})
    assert "as planned (ranks, parameters, optimizer: parameters, gradient-accum" in capsys.readouterr().out


# -- groups, learning rates, schedulers -----------------------------------------------------------


def two_groups(model: nn.Module) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 3e-4}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.9))


def test_a_plan_that_keeps_the_optimizer_returns_the_users_own() -> None:
    model = make_model()
    optimizer = two_groups(model)
    assert memfit.apply("activation-checkpointing", model, optimizer).optimizer is optimizer


@pytest.mark.parametrize(
    "techniques",
    [
        {"adamw-single": {}},
        {"bf16-parameters": {}},
        {"optimizer-in-backward": {}},
        {"optimizer-in-backward": {}, "bf16-parameters": {}},
        {"adamw-4bit": {}},
        {"sgd": {}},
    ],
)
def test_another_optimizer_has_the_groups_of_the_users(techniques: dict[str, dict[str, Any]]) -> None:
    if "adamw-4bit" in techniques:
        pytest.importorskip("torchao", reason="not installed: torchao")
    model = make_model()
    fit = memfit.apply(techniques, model, two_groups(model))
    factor = 100 if "sgd" in techniques else 1
    settings = [(g["lr"], g["weight_decay"]) for g in fit.optimizer.param_groups]
    assert settings == [(pytest.approx(1e-3 * factor), 0.1), (pytest.approx(3e-4 * factor), 0.0)]
    dims = [{p.dim() for p in g["params"]} for g in fit.optimizer.param_groups]
    assert dims == [{2}, {1}]
    assert "betas" not in fit.optimizer.param_groups[0] or fit.optimizer.param_groups[0]["betas"] == (
        0.8,
        0.9,
    )


@pytest.mark.parametrize("name", ["plain", "optimizer-in-backward", "bf16-parameters", "adamw-single"])
def test_a_scheduler_of_the_fit_sets_the_learning_rate_of_each_step(name: str) -> None:
    """With a rate of 0 after the first step, later steps change nothing."""
    model = make_model()
    fit = memfit.apply(PLANS[name], model, two_groups(model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(fit.optimizer, lambda step: 1.0 if step < 1 else 0.0)
    states = []
    for index in range(3):
        states.append(fit.model.head.weight.detach().clone())
        for part in fit.split(make_batch(index)):
            fit.backward(loss_of(fit.model, part))
        fit.step()
        scheduler.step()
    states.append(fit.model.head.weight.detach().clone())
    assert not torch.equal(states[0], states[1])
    assert torch.equal(states[1], states[2])
    assert torch.equal(states[2], states[3])


@pytest.mark.parametrize("name", ["plain", "optimizer-in-backward", "bf16-parameters", "adamw-single"])
def test_a_loop_continues_from_the_states_of_model_and_optimizer(name: str) -> None:
    def fit() -> memfit.Fit:
        model = make_model()
        return memfit.apply(PLANS[name], model, two_groups(model))

    first, second = fit(), fit()
    run_loop(first, 2)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    assert run_loop(first, 2) == run_loop(second, 2)


def test_clipping_is_that_of_the_worker_and_the_norm_that_before_it() -> None:
    plan = plan_of(PLANS["gradient-accumulation"])
    model = make_model()
    fit = memfit.apply(plan, model, torch.optim.AdamW(model.parameters(), weight_decay=0.0), clip=0.1)
    expected = run_job(plan, OptimizerChoice(), clip=0.1)
    assert run_loop(fit) == pytest.approx(expected, rel=1e-6)
    for part in fit.split(make_batch(5)):
        fit.backward(loss_of(fit.model, part))
    assert float(fit.step()) > 0.1


def test_gradients_of_another_backward_pass_are_not_added_to_those_of_the_step() -> None:
    critic, generator = make_model(), make_model()
    fit = memfit.apply({}, critic, torch.optim.SGD(critic.parameters()))
    part = next(iter(fit.split(make_batch(0))))
    fit.discard()
    loss_of(critic, part).backward()  # as that of a generator through its critic
    with pytest.raises(UserError, match="gradients before the first micro-batch"):
        run_loop(fit, 1)
    fit.optimizer.zero_grad()
    run_loop(fit, 1)
    fit = memfit.apply({"optimizer-in-backward": {}}, generator, torch.optim.SGD(generator.parameters()))
    with pytest.raises(UserError, match="another backward pass than"):
        loss_of(generator, part).backward()
    run_loop(fit, 1)
    fit.close()
    loss_of(generator, part).backward()


def test_a_copy_of_the_model_runs_with_its_own_weights() -> None:
    model = make_model()
    fit = memfit.apply({"activation-checkpointing": {}}, model, torch.optim.SGD(model.parameters(), lr=1.0))
    average = copy.deepcopy(fit.model).eval()  # as an average of the weights is made

    def loss(module: torch.nn.Module) -> float:
        return float(loss_of(module, make_batch(0)).detach())

    before = loss(average)
    run_loop(fit, 2)
    assert loss(average) == loss(copy.deepcopy(average)) == before != loss(model.eval())


def test_an_infinite_norm_clips_nothing() -> None:
    model = make_model()
    fit = memfit.apply(
        {"optimizer-in-backward": {}}, model, torch.optim.SGD(model.parameters()), clip=float("inf")
    )
    run_loop(fit, 2)


@pytest.mark.parametrize("samples", [3, 1])
def test_a_first_batch_of_fewer_samples_than_micro_batches_conforms(samples: int) -> None:
    fit = memfit.apply({"gradient-accumulation": {"micro_batches": 4}}, make_model())
    batch = {name: tensor[:samples] for name, tensor in make_batch(0).items()}
    parts_count = 0
    for part in fit.split(batch):
        fit.backward(loss_of(fit.model, part))
        parts_count += 1
    fit.step()
    assert parts_count == samples
    assert fit.conformance is not None
    assert ("gradient-accumulation" in fit.conformance.checked) is (samples > 1)
    assert not any("gradient-accumulation" in text for text in fit.conformance.unseen)


def test_micro_batches_are_weighted_by_their_loss_terms() -> None:
    model, batch = make_model(), make_batch(0)
    batch["y"][:2, 4:] = -100

    def count_labels(part: Batch) -> int:
        return int((part["y"] != -100).sum())

    loss_of(model, batch).backward()
    expected = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))  # type: ignore[union-attr]
    model.zero_grad()
    fit = memfit.apply(PLANS["gradient-accumulation"], model, "adamw", loss_terms=count_labels)
    for part in fit.split(batch):
        fit.backward(loss_of(fit.model, part))
    assert float(fit.step()) == pytest.approx(float(expected), rel=1e-5)


def test_ignored_labels_of_unequal_number_and_batch_norm_are_warned_of_in_micro_batches() -> None:
    batch = make_batch(0)
    batch["y"][:2, 4:] = -100
    fit = memfit.apply(PLANS["gradient-accumulation"], make_model(), "adamw")
    with pytest.warns(UserWarning, match="give loss_terms="):
        next(fit.split(batch))
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8))
    fit = memfit.apply(PLANS["gradient-accumulation"], model, "adamw")
    with pytest.warns(UserWarning, match="1 and 1 other layers take statistics of each micro-batch"):
        next(fit.split(torch.randn(8, 8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = memfit.apply({}, nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), "adamw")
        next(fit.split(torch.randn(8, 8)))


def test_the_last_batch_of_a_loader_may_be_smaller_than_the_micro_batches() -> None:
    fit = memfit.apply(PLANS["gradient-accumulation"], make_model())
    run_loop(fit, 1)
    assert [part["x"].shape[0] for part in parts_of(fit, make_batch(0, samples=3))] == [1, 1, 1]
    assert [part["x"].shape[0] for part in parts_of(fit, make_batch(0, samples=6))] == [2, 2, 1, 1]


def parts_of(fit: memfit.Fit, batch: Batch) -> list[Batch]:
    parts = []
    for part in fit.split(batch):
        fit.backward(loss_of(fit.model, part))
        parts.append(part)
    fit.step()
    return parts


def test_evaluation_changes_no_mode_and_keeps_no_graph() -> None:
    model = make_model()
    model.blocks[1].eval()
    fit = memfit.apply("bf16-autocast", model)
    model.blocks[1].eval()
    with fit.evaluation() as evaluated:
        out = evaluated(make_batch(0)["x"])
        assert not any(m.training for m in model.modules())
    assert not out.requires_grad
    assert out.dtype is torch.bfloat16
    assert [m.training for m in model.blocks] == [True, False, True]


# -- refusals -------------------------------------------------------------------------------------


def test_a_step_that_does_not_follow_the_plan_does_not_conform() -> None:
    """The loop leaves fit.forward out, so that nothing is autocast."""
    model = make_model()
    fit = memfit.apply("bf16-autocast", model)
    for part in fit.split(make_batch(0)):
        fit.backward(loss_of(fit.model, part))
    with pytest.raises(NotConforming, match="autocast"):
        fit.step()


def test_blocks_of_a_single_layer_are_not_said_to_be_checked() -> None:
    """Recomputation calls their forward without any hook."""
    layers = nn.Sequential(nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)]), nn.Flatten(0))
    fit = memfit.apply("activation-checkpointing", layers)
    for x in fit.split(torch.randn(4, 8)):
        with fit.forward():
            loss = fit.model(x).mean()
        fit.backward(loss)
    fit.step()
    assert fit.conformance is not None
    assert "activation-checkpointing" not in fit.conformance.checked
    assert any("second run" in text for text in fit.conformance.unseen)


def test_without_conform_the_first_step_is_not_compared() -> None:
    model = make_model()
    fit = memfit.apply("bf16-autocast", model, conform=False)
    for part in fit.split(make_batch(0)):
        fit.backward(loss_of(fit.model, part))
    fit.step()
    assert fit.conformance is None


def test_backward_in_the_users_own_way_is_refused() -> None:
    fit = memfit.apply("fp16-autocast", make_model())
    with pytest.raises(UserError, match=r"call fit\.backward"):  # noqa: PT012
        for part in fit.split(make_batch(0)):
            loss_of(fit.model, part).backward()
    with pytest.raises(UserError, match=r"before all micro-batches"):
        fit.step()


def test_an_unfinished_step_is_refused_until_it_is_discarded() -> None:
    model = make_model()
    fit = memfit.apply(PLANS["gradient-accumulation"], model)
    for part in fit.split(make_batch(0)):
        fit.backward(loss_of(fit.model, part))
        break
    with pytest.raises(UserError, match="before all micro-batches"):
        fit.step()
    with pytest.raises(UserError, match=r"fit\.discard"):
        next(fit.split(make_batch(1)))
    fit.discard()
    assert all(p.grad is None for p in model.parameters())
    run_loop(fit, 1)


def wrong_calls() -> dict[str, tuple[Any, str]]:
    def with_scheduler(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(model.parameters())
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return optimizer

    return {
        "pipeline": (
            lambda m: memfit.apply({"ranks": 1, "techniques": {"pipeline": {}}}, m),
            "pipeline|ranks",
        ),
        "ranks": (lambda m: memfit.apply({"ranks": 2, "techniques": {"ddp": {}}}, m), "torchrun"),
        "twice": (lambda m: (memfit.apply({}, m), memfit.apply({}, m)), "already"),
        "no model": (lambda m: memfit.apply({}, "model"), "argument model is a str"),
        "wrapped": (lambda m: memfit.apply({}, nn.DataParallel(m)), "wrapped"),
        "argument": (lambda m: memfit.apply({}, m, block="blocks"), "no argument 'block'.*blocks"),
        "optimizer": (lambda m: memfit.apply({}, m, 3), "argument optimizer"),
        "other model's": (
            lambda m: memfit.apply({}, m, torch.optim.SGD(make_model().parameters())),
            "no parameter",
        ),
        "scheduled": (lambda m: memfit.apply("adamw-single", m, with_scheduler(m)), "scheduler"),
        "left out": (
            lambda m: memfit.apply("adamw-single", m, torch.optim.AdamW(m.blocks.parameters())),
            "leaves out trainable parameters",
        ),
        "betas": (
            lambda m: memfit.apply("adamw-single", m, torch.optim.SGD(m.parameters(), lr=0.1)),
            "betas",
        ),
        "rate of the plan": (
            lambda m: memfit.apply(
                {"techniques": {"optimizer": {"path": "torch.optim:Adamax", "arguments": "lr=0.1"}}}, m
            ),
            "the plan sets lr",
        ),
        "groups": (lambda m: memfit.apply("zero", m, two_groups(m)), "one parameter group"),
        "no example": (lambda m: memfit.apply("chunking", m), "batch=batch"),
        "device": (lambda m: memfit.apply({}, m, device="foo"), "device is 'foo', which torch cannot use"),
        "lazy": (lambda m: memfit.apply({}, nn.LazyLinear(4)), "has a lazy module"),
        "loss terms": (
            lambda m: memfit.apply({}, m, loss_terms=cast(Any, 5)),
            "argument loss_terms is a int",
        ),
    }


@pytest.mark.parametrize("name", wrong_calls())
def test_a_call_that_cannot_be_right_is_refused_in_one_line(name: str) -> None:
    call, message = wrong_calls()[name]
    with pytest.raises(UserError, match=message) as error:
        call(make_model())
    assert "\n" not in str(error.value)


# -- two ranks ------------------------------------------------------------------------------------


def test_an_example_of_one_rank_stands_for_the_batch_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunking looks at a part of the job's batch, for one rank and micro-batch."""
    jobs: list[Job] = []

    def step(job: Job, *_: Any, **__: Any) -> None:
        jobs.append(job)
        raise UserError("no step")

    monkeypatch.setattr(user_loop, "TrainingStep", step)
    monkeypatch.setattr(user_loop, "world_size", lambda: 2)
    monkeypatch.setattr(user_loop, "make_world", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(UserError, match="no step"):
        memfit.apply({"ddp": {}, "chunking": {}}, make_model(), batch=torch.zeros(3, 5))
    assert (jobs[0].batch_size, jobs[0].make_batch(0, 0).shape) == (6, (6, 5))


RANKED: dict[str, dict[str, dict[str, Any]]] = {
    "ddp": {"ddp": {}},
    "ddp, accumulated": {"ddp": {"sync": "last"}, "gradient-accumulation": {"micro_batches": 2}},
    "fsdp2": {"fsdp2": {}},
    "fsdp2, recomputed": {"fsdp2": {"precision": "bf16"}, "activation-checkpointing": {}},
    "zero": {"zero": {"stage": 3}},
    "sharded-ddp": {"sharded-ddp": {}},
    "tensor-parallel": {"tensor-parallel": {"degree": 2}},
    "context-parallel": {"context-parallel": {"degree": 2}},
}


def rank_losses(techniques: dict[str, dict[str, Any]], rank: int) -> dict[str, Any]:
    """Losses of a loop under fit and of the worker's step, each on this rank's part of the same batches."""
    plan = plan_of({"ranks": 2, "techniques": techniques})
    model = make_model()
    fit = memfit.apply(
        plan,
        model,
        two_groups(model) if "fsdp2" in techniques else "adamw",
        batch=make_batch(0),
        loss=loss_of,
    )
    if "fsdp2" in techniques:
        assert [g["weight_decay"] for g in fit.optimizer.param_groups] == [0.1, 0.0]
        for group in fit.optimizer.param_groups:
            group.update(weight_decay=0.0, lr=1e-3, betas=(0.9, 0.999))
    is_data_parallel = not {"tensor-parallel", "context-parallel"} & set(techniques)
    losses = []
    for index in range(STEPS):
        batch = make_batch(index)
        whole = index != 1 or not is_data_parallel
        own = batch if whole else {k: v[4 * rank : 4 * rank + 4] for k, v in batch.items()}
        parts = []
        for part in fit.split(own, whole=whole):
            with fit.forward():
                loss = loss_of(fit.model, part)
            fit.backward(loss)
            parts.append(loss.detach().float())
        fit.step()
        losses.append(float(torch.stack(parts).mean()))
    fit.close()
    with pytest.raises(UserError, match="pipeline"):
        memfit.apply({"ranks": 2, "techniques": {"pipeline": {}}}, make_model())
    job = Job(name="words", build_model=make_model, make_batch=make_batch, loss=loss_of, batch_size=8)
    step = TrainingStep(job, plan, world=make_world(plan, rank=rank, device="cpu"))
    expected = []
    for index in range(STEPS):
        part, terms = step.local(make_batch(index))
        expected.append(float(step.run(part, terms_per_rank=terms)[0]))
    step.close()
    return {"losses": losses, "expected": expected, "conformance": str(fit.conformance)}


def test_two_ranks_train_as_the_worker_does(tmp_path: Path) -> None:
    answers = child_ranks.answers(__file__, tmp_path)
    for answer in answers:
        assert set(answer) == set(RANKED)
        for name, result in answer.items():
            assert result["losses"] == pytest.approx(result["expected"], rel=1e-5), name
            assert result["conformance"].startswith("as planned"), name


def run_rank(file: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    file.write_text(json.dumps({name: rank_losses(techniques, rank) for name, techniques in RANKED.items()}))
    child_ranks.leave()


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
