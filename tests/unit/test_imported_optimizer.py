"""Optimizers by import path: which are refused and how, and what the others get of the job and the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import regression, words
from torch import nn

from memfit.jobs.training_step import TrainingStep
from memfit.planner.plan_space import usable
from memfit.techniques.base import JobFacts
from memfit.techniques.imported_optimizer import (
    SeparateOptimizers,
    needs_names,
    optimizer_class,
    parse_arguments,
)
from memfit.techniques.registry import excluded_techniques, make_use
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job, OptimizerChoice
from memfit.types.plan import Accuracy, Plan
from memfit.types.trace import Phase


def step_with(job: Job | None = None, **settings: Any) -> TrainingStep:
    torch.manual_seed(0)
    return TrainingStep(job or words(), Plan(uses=(make_use("optimizer", settings),)))


def losses(step: TrainingStep, steps: int = 3) -> list[float]:
    values = [float(step.run(step.job.make_batch(i, 0))[0]) for i in range(steps)]
    step.close()
    return values


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("torch.optim.Muon", "is not an import path; allowed: PACKAGE.MODULE:CLASS"),
        (
            "no_such_package_at_all:Lion",
            "install the package that provides the module no_such_package_at_all",
        ),
        ("torch.optim.nowhere:Lion", "cannot be imported: No module named 'torch.optim.nowhere'"),
        (
            "torch.optim:Muonn",
            "does not exist; allowed: the optimizers in torch.optim: ASGD.*did you mean 'Muon'",
        ),
        ("torch.optim:Optimizer", "is not a subclass of torch.optim.Optimizer"),
        ("torch.nn:Linear", "is not a subclass.*the optimizers in torch.nn: none"),
    ],
)
def test_a_path_that_names_no_optimizer_is_refused_with_what_there_is(path: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        optimizer_class(path)


@pytest.mark.parametrize("text", ["0.1", "lr", "lr=", "lr=f(1)", "**{}", "lr=x", "lr=1, lr=2)"])
def test_arguments_that_are_not_named_literals_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="NAME=VALUE, NAME=VALUE with Python literals"):
        parse_arguments(text, "it")


@pytest.mark.parametrize("text", ["lr=1, lr=2", "a=1)(b=2", "a=1).b(c=2", "x={[]:1}", "a=1, **{'b': 2}"])
def test_a_name_given_twice_or_another_call_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^it is "):
        parse_arguments(text, "it")


def test_arguments_are_python_literals() -> None:
    assert parse_arguments("", "it") == {}
    assert parse_arguments("lr=1e-3, betas=(0.9, 0.95), name='std', flag=True", "it") == {
        "lr": 1e-3,
        "betas": (0.9, 0.95),
        "name": "std",
        "flag": True,
    }


def test_an_argument_that_the_class_does_not_have_is_refused_before_anything_runs() -> None:
    with pytest.raises(UserError, match=r"no argument 'momentumm'.*did you mean 'momentum'"):
        step_with(path="torch.optim:Muon", arguments="momentumm=0.9")


def test_learning_rate_and_weight_decay_are_the_jobs_unless_the_arguments_set_them() -> None:
    def job(**arguments: Any) -> Job:
        choice = OptimizerChoice(
            name="torch.optim:NAdam", learning_rate=0.5, weight_decay=0.25, arguments=arguments
        )
        return Job(
            name="one",
            build_model=lambda: nn.Linear(4, 4),
            make_batch=lambda step, seed: torch.ones(2, 4),
            loss=lambda model, batch: model(batch).mean(),
            batch_size=2,
            optimizer=choice,
        )

    own: Any = TrainingStep(job(), Plan()).optimizer
    assert (own.param_groups[0]["lr"], own.param_groups[0]["weight_decay"]) == (0.5, 0.25)
    other: Any = TrainingStep(job(lr=0.125), Plan()).optimizer
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (0.125, 0.25)


def test_a_job_takes_the_path_alone_and_trains_as_torch_does() -> None:
    job = regression()
    by_path = Job(
        **{f: getattr(job, f) for f in ("name", "build_model", "make_batch", "loss", "batch_size")},
        optimizer="torch.optim:RMSprop",  # type: ignore[arg-type]
    )
    assert by_path.optimizer == OptimizerChoice(name="torch.optim:RMSprop")
    torch.manual_seed(0)
    step = TrainingStep(by_path, Plan())
    torch.manual_seed(0)
    model = job.build_model()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    for i in range(3):
        step.run(job.make_batch(i, 0))
        optimizer.zero_grad()
        job.loss(model, job.make_batch(i, 0)).backward()
        optimizer.step()
    for ours, theirs in zip(step.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_muon_without_others_is_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"Muon only supports 2D parameters.*others=adamw"):
        step_with(path="torch.optim:Muon")


def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    step = step_with(path="torch.optim:Muon", others="adamw", arguments="lr=0.02")
    assert isinstance(step.optimizer, SeparateOptimizers)
    muon: Any = step.optimizer.optimizers["matrices"]
    adamw: Any = step.optimizer.optimizers["others"]
    names = {id(p): name for name, p in step.model.named_parameters()}
    by_muon = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert by_muon == {f"blocks.{i}.inner.{j}.weight" for i in range(3) for j in (1, 3)}
    assert {names[id(p)] for p in adamw.param_groups[0]["params"]} == set(names.values()) - by_muon
    assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (0.02, 1e-3)
    values = losses(step, 6)
    assert values[-1] < values[0]


def test_settings_of_the_group_of_matrices_reach_only_these() -> None:
    step: Any = step_with(path="torch.optim:RAdam", matrices="lr=0.5")
    rest, matrices = step.optimizer.param_groups
    assert (rest["lr"], matrices["lr"]) == (1e-3, 0.5)
    assert all(p.dim() == 2 for p in matrices["params"])
    assert len(matrices["params"]) == 6


class Named(torch.optim.SGD):
    """Takes names, as Adam-mini does, and says what it got."""

    def __init__(self, named_parameters: Any, lr: float = 0.1) -> None:
        pairs = list(named_parameters)
        self.names = [name for name, _ in pairs]
        print("verbose")
        super().__init__([p for _, p in pairs], lr=lr)


class NeedsGraph(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("call backward with create_graph=True\nand more")


class NoMemory(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


HERE = __name__


def test_a_class_that_takes_named_parameters_gets_the_models_names(capsys: Any) -> None:
    step: Any = step_with(path=f"{HERE}:Named")
    assert step.optimizer.names == [name for name, _ in step.model.named_parameters()]
    assert capsys.readouterr().out == ""  # the standard output of a command is its answer


def test_names_of_copies_of_parameters_are_not_made_up() -> None:
    job = words()
    fields = {f: getattr(job, f) for f in ("name", "build_model", "make_batch", "loss", "batch_size")}
    named = Job(**fields, optimizer=OptimizerChoice(name=f"{HERE}:Named"))
    with pytest.raises(UserError, match="needs the names of the model's parameters"):
        TrainingStep(named, Plan(uses=(make_use("bf16-parameters", {}),)))


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(UserError, match="the optimizer LBFGS needs a closure"):
        step_with(path="torch.optim:LBFGS")


def test_an_error_of_the_optimizers_step_is_one_line_but_a_lack_of_memory_is_an_outcome() -> None:
    with pytest.raises(UserError, match=r"NeedsGraph raised RuntimeError: call .* create_graph=True$"):
        losses(step_with(path=f"{HERE}:NeedsGraph"))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        losses(step_with(path=f"{HERE}:NoMemory"))


@pytest.mark.parametrize("name", ["fsdp2", "zero", "bf16-parameters"])
def test_plans_that_shard_or_copy_parameters_refuse_it(name: str) -> None:
    uses = (make_use("optimizer", {}), make_use(name, {}))
    with pytest.raises(UserError, match="cannot be combined"):
        TrainingStep(words(), Plan(uses=uses, ranks=1 if name == "bf16-parameters" else 2))


def test_updates_in_backward_train_the_same() -> None:
    settings = {"path": "torch.optim:Muon", "others": "adamw"}
    uses = (make_use("optimizer", settings), make_use("optimizer-in-backward", {}))
    torch.manual_seed(0)
    inside = losses(TrainingStep(words(), Plan(uses=uses)))
    assert inside == losses(step_with(**settings))


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        (OptimizerChoice(name="torch.optim:Muon", others="adamw"), True),
        (OptimizerChoice(name="torch.optim:Adamax"), False),
        (OptimizerChoice(), False),
    ],
)
def test_a_search_tries_no_copies_of_parameters_for_an_optimizer_that_needs_their_names(
    choice: OptimizerChoice, named: bool
) -> None:
    assert needs_names(choice) is named
    facts = JobFacts(
        batch_size=4, block_count=2, vocabulary=0, device_kind="cpu", needs_parameter_names=named
    )
    copies = {"bf16-parameters", "fsdp2", "zero", "sharded-ddp", "tensor-parallel"}
    assert excluded_techniques(facts) == (copies if named else set())
    assert ("bf16-parameters" in {t.name for t in usable(facts, Accuracy.ROUNDING)[0]}) is not named


def update_operators(**settings: Any) -> set[str]:
    """The names of the operators of the traced update, without namespace and overload."""
    traced = trace(words(), Plan(uses=(make_use("optimizer", settings),)))
    return {part for op in traced.ops if op.phase is Phase.OPTIMIZER for part in op.op.split(".")}


def test_an_update_that_changes_with_its_step_is_traced_as_late_in_the_training() -> None:
    assert "sqrt" in update_operators(path="torch.optim:RAdam")
    assert "sub" not in update_operators(path="torch.optim:ASGD")
    assert "sub" in update_operators(path="torch.optim:ASGD", arguments="t0=1000")  # it averages


def test_an_update_in_backward_is_traced_as_late_too_and_its_own_values_are_no_assumptions() -> None:
    uses = (make_use("optimizer", {"path": "torch.optim:RAdam"}), make_use("optimizer-in-backward", {}))
    traced = trace(words(), Plan(uses=uses))
    assert any("sqrt" in op.op.split(".") for op in traced.ops)
    assert not any(".item()" in sentence for sentence in traced.assumptions)
