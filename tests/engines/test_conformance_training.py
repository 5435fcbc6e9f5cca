"""What the conformance check reports of trainings that do not train: the short form of
benchmarks/broken_trainings.py, whose cases it runs."""

from __future__ import annotations

import json
from pathlib import Path

import broken_trainings
import child_ranks
import pytest
import torch
from torch import nn
from training_cases import BROKEN, HONEST, Case, Net, adamw, loss_of, plain_step

from memfit.api import conform
from memfit.conformance.observation import (
    Observations,
    ObservedOptimizer,
    ObservedParameter,
    RankObservation,
    WeightFigures,
)
from memfit.conformance.training_checks import optimizer_parameters, weights
from memfit.jobs import registry
from memfit.jobs.training_step import TrainingStep
from memfit.techniques.registry import make_use
from memfit.types.job import Job, JobRef, OptimizerChoice
from memfit.types.plan import Plan

# One step cannot tell a schedule that stays at 0 from a warm-up, nor a layer whose weights are read without
# it from one that the step does not use.
NOT_CAUGHT = {"a scheduler whose factor is always 0", "weights of the feed-forward part read through .data"}
# The differences of the items of issue 29, by the part of the plan that they name.
FEATURES = {
    "the optimizer's step is never called": "update: planned weights change, found 0 of 51",
    "optimizer without the blocks": "optimizer: parameters: planned all 51",
    "the output of the first half of the blocks detached": "block gradients: planned",
    "master weights updated and not written back": "master weights: planned 51 parameters equal",
}


def _ids(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


ALONE = [case for case in BROKEN if case.ranks == 1 and case.name not in NOT_CAUGHT]


@pytest.mark.parametrize("case", ALONE, ids=_ids(ALONE))
def test_a_training_that_does_not_train_is_reported(case: Case) -> None:
    answer = broken_trainings.answer(case)
    assert answer.outcome == "refused", answer.text
    assert FEATURES.get(case.name, "") in answer.text


HONEST_ALONE = [case for case in HONEST if case.ranks == 1]


@pytest.mark.parametrize("case", HONEST_ALONE, ids=_ids(HONEST_ALONE))
def test_an_honest_training_is_not_refused(case: Case) -> None:
    answer = broken_trainings.answer(case)
    assert answer.outcome == "passed", answer.text


def test_an_optimizer_made_before_fully_shard_is_reported(tmp_path: Path) -> None:
    program, name = broken_trainings.__file__, "FSDP2: optimizer made before fully_shard"
    meet = ["--meet", tmp_path / "meet"]
    ranks = [
        child_ranks.start([program, "--rank", str(rank), *meet, name], output=str(tmp_path / str(rank)))
        for rank in range(2)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    answer = json.loads((tmp_path / "0").read_text().splitlines()[-1])["text"]
    assert "51 of its tensors are as they were before sharding" in answer
    assert "update: planned weights change, found 0 of 51" in answer


def test_what_cannot_be_told_in_one_step_is_named() -> None:
    case = next(c for c in BROKEN if c.name == "a scheduler whose factor is always 0")
    assert "not checked: update: the learning rate is 0 in this step" in broken_trainings.answer(case).text


def test_a_list_of_optimizers_is_taken_together() -> None:
    model = Net()
    optimizers = [
        adamw(model.blocks.parameters()),
        adamw([*model.embed.parameters(), *model.head.parameters()]),
    ]

    def step() -> None:
        loss_of(model).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    assert "optimizer: parameters" in conform(model, optimizers, {}, step=step, blocks="blocks").checked


def test_a_last_layer_that_starts_at_zero_lets_no_gradient_through_in_the_first_step() -> None:
    model = Net()
    nn.init.zeros_(model.head.weight)
    optimizer = adamw(model.parameters())
    result = conform(model, optimizer, {}, step=plain_step(model, optimizer), blocks="blocks")
    assert any("head.weight was 0 before the step" in text for text in result.unseen)


def test_blocks_that_are_detached_before_a_last_layer_that_starts_at_zero_are_reported() -> None:
    model = Net()
    nn.init.zeros_(model.head.weight)
    model.blocks[-1].register_forward_hook(lambda module, args, output: output.detach())
    optimizer = adamw(model.parameters())
    with pytest.raises(Exception, match="block gradients: planned gradients in all blocks, found none"):
        conform(model, optimizer, {}, step=plain_step(model, optimizer), blocks="blocks")


@pytest.mark.parametrize("name", [n for n in registry.names() if n != "alphafold2"])
def test_the_first_step_of_a_built_in_job_conforms_to_plain_training(name: str) -> None:
    torch.manual_seed(0)
    job = registry.load(JobRef(spec=name))
    step = TrainingStep(job, Plan())
    answer = child_ranks.told(step, sum(p.numel() for p in step.model.parameters()))
    assert answer.startswith("fine: ")


def test_updates_below_the_precision_of_bf16_count_if_master_weights_change() -> None:
    """Plain SGD moves most float32 copies by less than half a unit of the last place of bfloat16."""
    torch.manual_seed(0)
    step = TrainingStep(
        Job(
            name="net",
            build_model=Net,
            make_batch=lambda number, seed: torch.randint(0, 48, (4, 13)),
            loss=lambda model, tokens: nn.functional.cross_entropy(
                model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten()
            ),
            batch_size=4,
            optimizer=OptimizerChoice(name="sgd", learning_rate=1e-4),
        ),
        Plan(uses=(make_use("bf16-parameters", {}),)),
    )
    answer = child_ranks.told(step, sum(p.numel() for p in Net().parameters()))
    assert answer.startswith("fine: as planned")
    assert "master weights" in answer


def test_a_warm_up_that_is_too_slow_for_bf16_is_named() -> None:
    model = Net().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-8 * (step + 1))
    step = plain_step(model, optimizer)
    result = conform(model, optimizer, {"bf16-parameters": {}}, step=step, blocks="blocks")
    assert any("did not change, as their updates may be too small yet" in text for text in result.unseen)


def test_the_optimizer_is_checked_without_a_step() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(Exception, match="optimizer: parameters: planned all 4"):
        conform(model, torch.optim.SGD(model[0].parameters(), lr=0.1), {})


# -- the checks on observations written by hand -----------------------------------------------------------


def _parameter(name: str, elements: int = 100) -> ObservedParameter:
    return ObservedParameter(
        name=name,
        shape=(elements,),
        dtype=torch.float32,
        is_trained=True,
        elements=elements,
        whole_elements=elements,
        local_elements=elements,
        shard_bytes=4 * elements,
        shard_device="cpu",
    )


def _observed(*of_ranks: WeightFigures, names: str = "ab") -> Observations:
    ranks = tuple(RankObservation(coordinate={}, weights=figures) for figures in of_ranks)
    return Observations(rank=0, ranks=ranks, parameters=tuple(map(_parameter, names)), forwards=1)


def test_parameters_that_another_rank_updates_are_held() -> None:
    """As those of optimizers that shard their state: each rank holds a part of the parameters."""
    figures = [WeightFigures(optimizer=ObservedOptimizer(parameters=frozenset(name))) for name in "ab"]
    assert not any(f.wrong for f in optimizer_parameters(Plan(), _observed(*figures)))
    assert any(f.wrong for f in optimizer_parameters(Plan(), _observed(figures[0])))


def test_a_shard_that_changes_on_another_rank_has_changed() -> None:
    compared = frozenset("ab")
    figures = [
        WeightFigures(compared=compared, changed=frozenset(name), gradients={"a": 1.0, "b": 1.0})
        for name in "ab"
    ]
    assert [f.wrong for f in weights(Plan(), _observed(*figures))] == [False]
    assert [f.wrong for f in weights(Plan(), _observed(figures[0]))] == [True]
