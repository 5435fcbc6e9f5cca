"""Predictions from the user's own code: accepted inputs, objects that stay unchanged, error messages."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional

import memfit
from memfit.jobs.training_step import TrainingStep
from memfit.runtime.counting_allocator import CountingAllocator, available
from memfit.techniques.registry import make_use
from memfit.types.plan import use

X, Y = torch.randn(32, 8), torch.randint(0, 4, (32,))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def job(**changes: Any) -> memfit.Job:
    given: dict[str, Any] = {
        "name": "net",
        "build_model": net,
        "make_batch": lambda step, seed: (X, Y),
        "batch_size": 32,
        "loss": lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]),
    }
    return memfit.Job(**given | changes)


LOSSES: dict[str, Any] = {
    "of model and batch": lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]),
    "of output and batch": lambda output, batch: functional.cross_entropy(output, batch[1]),
    "of output and target": lambda logits, target: functional.cross_entropy(logits, target=target),
    "torch's function": functional.cross_entropy,
    "torch's function with arguments": functools.partial(functional.cross_entropy, reduction="mean"),
    "torch's module": nn.CrossEntropyLoss(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_form_of_loss_gives_the_same_estimate_as_the_job(loss: Any) -> None:
    assert memfit.estimate(net(), (X, Y), loss).estimate == memfit.estimate(job()).estimate


@pytest.mark.parametrize("model", [net, net()], ids=["function", "module"])
@pytest.mark.parametrize("batch", [(X, Y), [X, Y], lambda: (X, Y)], ids=["tuple", "list", "function"])
def test_model_and_batch_may_be_given_as_objects_or_functions(model: Any, batch: Any) -> None:
    found = memfit.estimate(model, batch, nn.CrossEntropyLoss())
    assert found.allocated_bytes == memfit.estimate(job()).allocated_bytes


class _Names(nn.Module):
    """Takes a mapping's values by name, and returns its own loss in one of the customary ways."""

    def __init__(self, wrap: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.wrap = net(), wrap

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.inner(x)
        return self.wrap(functional.cross_entropy(logits, labels), logits)


class _Output:
    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


@pytest.mark.parametrize(
    "wrap",
    [
        lambda loss, logits: _Output(loss),
        lambda loss, logits: {"logits": logits, "loss": loss},
        lambda loss, logits: (loss, logits),
        lambda loss, logits: (logits, loss),
    ],
    ids=["attribute", "mapping", "first", "second"],
)
def test_a_loss_returned_by_the_model_is_found(wrap: Callable[..., Any]) -> None:
    found = memfit.estimate(_Names(wrap), {"x": X, "labels": Y, "length": torch.ones(32)})
    plain = memfit.estimate(job()).by_phase
    assert found.by_phase["backward"] == pytest.approx(plain["backward"], abs=256)  # `length` is an input too


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [
        ("adamw", 2),
        ("sgd", 1),
        (torch.optim.SGD, 0),
        (lambda p: torch.optim.Adagrad(p, lr=0.1), 1),
        (memfit.OptimizerChoice(name="adam"), 2),
    ],
    ids=["adamw", "sgd", "class", "function", "choice"],
)
def test_optimizer_state_size_follows_the_given_optimizer(optimizer: Any, moments: int) -> None:
    found = memfit.estimate(net(), (X, Y), nn.CrossEntropyLoss(), optimizer)
    state = found.lifecycle.peak("save").device_bytes - 896 - 1280  # parameters and batch, by hand
    assert state // 896 == moments


def test_an_optimizer_built_for_the_model_keeps_its_settings_and_parameter_groups() -> None:
    model = net()
    moment = 512 + 64  # of the one layer it holds
    kept = 256 + 64  # the other's gradients: no optimizer sets them to None
    frozen_head = torch.optim.SGD([{"params": model[0].parameters(), "momentum": 0.9}], lr=0.1)
    found = memfit.estimate(model, (X, Y), nn.CrossEntropyLoss(), frozen_head)
    assert found.lifecycle.peak("save").device_bytes == 896 + 1280 + moment + kept


def test_estimate_leaves_the_given_model_optimizer_and_random_state_unchanged() -> None:
    model = net().double().eval()
    seen: list[Any] = []
    model.register_forward_hook(lambda module, args, out: seen.append(module is model))
    functional.cross_entropy(model(X.double()), Y).backward()
    optimizer = torch.optim.AdamW(model.parameters())
    seen.clear()
    weights, grads = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    random = torch.get_rng_state()
    batch = (X.double(), Y)
    memfit.estimate(model, batch, nn.CrossEntropyLoss(), optimizer, {"bf16-parameters": {}})
    memfit.estimate(lambda: model, batch, nn.CrossEntropyLoss(), optimizer="sgd")
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not model.training
    assert not optimizer.state
    assert not any(seen)  # the hook ran on copies only
    assert torch.equal(random, torch.get_rng_state())


def test_a_model_with_tied_weights_is_predicted_alike_as_a_module_or_a_function() -> None:
    model = tiny.Words(tied=True)
    model.table = torch.ones(1000)
    assert memfit.estimate(model, tiny.words_batch(0, 0), tiny.words_loss).allocated_bytes == (
        memfit.estimate(lambda: model, tiny.words_batch(0, 0), tiny.words_loss).allocated_bytes
    )


def test_a_model_on_the_meta_device_is_predicted_as_if_it_had_memory() -> None:
    with torch.device("meta"):
        model = net()
    assert (
        memfit.estimate(model, (X, Y), nn.CrossEntropyLoss()).by_phase["optimizer"]
        == (memfit.estimate(job()).by_phase["optimizer"])
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by torch when it loads its compiler
def test_a_compiled_module_is_predicted_as_the_module_inside() -> None:
    model = net()
    found = memfit.estimate(torch.compile(model), (X, Y), nn.CrossEntropyLoss())
    assert found.estimate == memfit.estimate(model, (X, Y), nn.CrossEntropyLoss()).estimate


PLANS: dict[str, Any] = {
    "plan": memfit.Plan(uses=(use("gradient-accumulation", micro_batches=4),)),
    "techniques": {"gradient-accumulation": {"micro_batches": 4}},
    "file's keys": {"techniques": {"gradient-accumulation": {"micro_batches": 4}}},
    "text": "gradient-accumulation: {micro_batches: 4}",
}


def test_a_hand_made_plan_gets_defaults_for_missing_settings() -> None:
    found = memfit.estimate(job(), plan=memfit.Plan(uses=(use("ddp"),), ranks=2))
    assert found.plan.get("ddp") == make_use("ddp", {})


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_form_of_plan_is_read_as_the_same_plan(plan: Any, tmp_path: Path) -> None:
    found = memfit.estimate(job(), plan=plan)
    assert found.plan == PLANS["plan"]
    (tmp_path / "plan.yaml").write_text(PLANS["text"].join(("techniques: {", "}")))
    assert memfit.estimate(job(), plan=str(tmp_path / "plan.yaml")).estimate == found.estimate


@pytest.mark.parametrize("name", ["8xH100-SXM", "A100-80", "H100-SXM"])
def test_a_prediction_on_a_catalog_machine_uses_that_machines_memory(name: str) -> None:
    found = memfit.estimate(job(), machine=name)
    assert found.fits
    assert found.cap_bytes > 70 * 2**30
    assert found.device_bytes is not None
    assert found.device_bytes.value >= found.reserved_bytes.value >= found.allocated_bytes.value


def _replaced() -> nn.Module:
    model = net()
    inner = model.forward
    model.forward = functools.partial(inner)
    return model


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": "gpt2"}, "the argument model is a str"),
    "no batch": ({"batch": None}, "contains no tensor"),
    "a loader": ({"batch": torch.utils.data.DataLoader([1])}, "next(iter(loader))"),
    "no loss": ({"loss": 3}, "the argument loss is a int"),
    "unknown optimizer": (
        {"optimizer": "adamx"},
        "or PACKAGE.MODULE:CLASS of an installed torch.optim.Optimizer, such as torch.optim:Muon; did you",
    ),
    "no optimizer": ({"optimizer": 3}, "the argument optimizer is a int"),
    "makes no optimizer": ({"optimizer": lambda params: None}, "the argument optimizer makes a NoneType"),
    "another's optimizer": ({"optimizer": torch.optim.SGD(net().parameters())}, "of the argument model"),
    "unknown technique": ({"plan": {"bf16-autocas": {}}}, "did you mean 'bf16-autocast'"),
    "broken text": ({"plan": "a: ["}, "not valid YAML"),
    "unknown machine": ({"machine": "H10"}, "unknown device"),
    "no machine": ({"machine": 8}, "the argument machine is a int"),
    "wrong shape": ({"batch": (torch.ones(3, 5), Y[:3])}, "your training step raised RuntimeError"),
    "not a module": ({"model": lambda: 3}, "returned a int"),
    "raises": ({"batch": lambda: 1 // 0}, "ZeroDivisionError"),
    "names": ({"batch": {"a": X}}, "has no parameter named like one of the batch's keys: a"),
    "numbers": ({"batch": {1: X}}, "has no parameter named like one of the batch's keys: 1"),
    "closure": ({"model": _replaced()}, "cannot be copied"),
    "job and batch": ({"model": job()}, "were given although the argument model is a Job"),
    "no memory": ({"machine": "H100-SXM", "host_memory": 0}, "not a memory size: 0"),
    "no bound": ({"bound": {"model.py:12": "many"}}, "Job(bound=...), the numbers of elements"),
}


@pytest.mark.parametrize(("given", "told"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_reported_in_one_line(given: dict[str, Any], told: str) -> None:
    with pytest.raises(memfit.UserError) as error:
        memfit.estimate(**{"model": net(), "batch": (X, Y), "loss": nn.CrossEntropyLoss()} | given)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_parts_of_a_prediction_add_up_and_it_describes_itself_as_text_and_html() -> None:
    found = memfit.estimate(job(), machine="H100-SXM")
    assert found.allocated_bytes.low <= found.allocated_bytes.value <= found.allocated_bytes.high
    assert sum(found.by_category.values()) == found.allocated_bytes.value
    assert sum(found.by_module.values()) == found.allocated_bytes.value
    assert max(found.by_phase.values()) == found.allocated_bytes.value
    assert "fits" in str(found)
    assert repr(found).startswith(
        "<memfit.Prediction net: 212 parameters, batch 32 × 8, on H100-SXM; plain: alloc"
    )
    page = found._repr_html_()
    assert page.count("<tr>") == 5  # header, allocated, reserved, device, host
    assert "light-dark(" in page
    assert "optimizer state" in found.explain()
    assert found.checkpoint_bytes["optimizer"] > found.checkpoint_bytes["model"]


def test_assumed_values_are_reported_in_the_explanation() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.inner(x)
            return 2 * out if out.sum() > 0 else out

    found = memfit.estimate(Branch(), torch.ones(2, 4), loss=lambda out, _: out.sum(), machine="H100-SXM")
    assert found.estimate.assumptions[0].startswith(".item() on torch.bool answered True at test_api.py:")
    assert f"Assumed: {found.estimate.assumptions[0]}" in found.explain()


def test_autocast_for_the_target_device_counts_on_a_machine_without_it() -> None:
    model, batch = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))), torch.randn(256, 64)

    def peak_bytes(device: str) -> float:
        def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device, dtype=torch.bfloat16):
                assert torch.is_autocast_enabled(device)
                return model(x).float().square().mean()

        predicted = memfit.estimate(model, batch, loss=loss, optimizer="sgd", machine="H100-SXM")
        return float(predicted.allocated_bytes.value)

    assert peak_bytes("cuda") == peak_bytes("cpu")


def test_html_escapes_the_name_of_the_job() -> None:
    assert "<script>" not in memfit.estimate(job(name="<script>"))._repr_html_()


def test_assert_fits_passes_or_suggests_a_technique_that_would_fit() -> None:
    wide = tiny.words(blocks=6)
    need = memfit.assert_fits(wide, "24GiB").allocated_bytes.value
    limit = int(1.05 * 0.6 * need) + 2 * 2**20
    with pytest.raises(AssertionError) as error:
        memfit.assert_fits(wide, limit)
    text = str(error.value)
    assert all(part in text for part in ("peak of", "live at the peak:", "by module:"))
    suggested = text.rpartition("would fit: ")[2].partition(" (")[0]
    assert suggested.startswith(("activation-checkpointing", "bf16-autocast"))
    with pytest.raises(AssertionError, match="more than 1 B"):
        memfit.assert_fits(net(), 1, batch=(X, Y), loss=nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bf16": True, "gradient_accumulation_steps": 2},
        {"optim": "adafactor"},
        {"gradient_checkpointing": True},
    ],
    ids=["plain", "bf16 x 2", "adafactor", "checkpointing"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_predicted_peak_of_a_trainer_is_within_one_percent_of_the_measured_peak(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    if (why := available()) is not None:
        pytest.skip(f"no counting allocator: {why}")
    pytest.importorskip("accelerate")
    from hf_trainer import make_trainer

    counter = CountingAllocator()
    counter.install()
    gc.collect()
    before = counter.live_bytes()
    trainer = make_trainer(str(tmp_path), **arguments)
    found = memfit.from_trainer(trainer)
    gc.collect()
    counter.reset_peak()
    trainer.train()
    measured = counter.peak_bytes() - before
    assert found.allocated_bytes.value == pytest.approx(measured, rel=0.01)


def test_a_trainer_without_data_is_refused_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from hf_trainer import make_trainer

    trainer = make_trainer(str(tmp_path))
    trainer.train_dataset = None
    with pytest.raises(memfit.UserError, match="the training loader of the trainer raised ValueError"):
        memfit.from_trainer(trainer)


def test_a_job_from_a_module_trains_on_real_tensors_too() -> None:
    """Outside a fake mode the job builds a real copy, so that what was predicted can be run."""
    from memfit.inputs import job_of

    model = net()
    step = TrainingStep(job_of(model, (X, Y), loss=nn.CrossEntropyLoss()), memfit.Plan())
    before = model[0].weight.clone()
    step.run((X, Y))
    assert torch.equal(before, model[0].weight)
    assert not torch.equal(before, step.model[0].weight)


@pytest.mark.parametrize(
    "plan", [{"fsdp2": {}}, "fsdp2", "fsdp2: {}", {"techniques": {"fsdp2": {}}}], ids=str
)
def test_a_distributed_plan_without_a_rank_count_uses_all_devices_of_the_machine(plan: Any) -> None:
    whole = memfit.estimate(job(), plan=plan, machine="8xH100-SXM")
    assert whole.plan.ranks == 8
    two = {"ranks": 2, "techniques": {"fsdp2": {}}}
    assert memfit.estimate(job(), plan=two, machine="8xH100-SXM").plan.ranks == 2
    assert memfit.estimate(job(), plan="sgd", machine="8xH100-SXM").plan.ranks == 1
