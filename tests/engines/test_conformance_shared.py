"""What the conformance check reports where two ranks do not share the work as planned: the schedule of a
pipeline, the samples of data parallelism, the other rank's part of a sample, the shards of ZeRO.

The file is also the program that each rank runs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import child_ranks
import pytest
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleGPipe
from torch.nn import functional

from memfit.api import conform
from memfit.jobs.builtin.gpt import Gpt, GptSize
from memfit.jobs.training_step import TrainingStep
from memfit.techniques.rank_mesh import Layout, make_world
from memfit.techniques.registry import TECHNIQUES, make_use
from memfit.types.conformance import NotConforming
from memfit.types.job import Job
from memfit.types.plan import Plan
from memfit.worker.train import join_world

SIZE = GptSize(layers=4, width=32, heads=2, length=16, vocabulary=64, batch_size=8)
FAST = {"reduce_bucket_elements": 20_000, "persist_elements": 1}


def _batch(step: int, seed: int, count: int = 8) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 64, (count, 17), generator=torch.Generator().manual_seed(seed + step))
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def _loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


JOB = Job(name="gpt", build_model=lambda: Gpt(SIZE), make_batch=_batch, loss=_loss, batch_size=8)


def _job(**changes: Any) -> Job:
    return dataclasses.replace(JOB, **changes)


def _plan(**uses: dict[str, Any]) -> Plan:
    return Plan(ranks=2, uses=tuple(make_use(k.replace("_", "-"), v) for k, v in uses.items()))


def _pipeline(schedule: str, virtual: int = 1) -> Plan:
    return _plan(pipeline={"schedule": schedule, "virtual": virtual, "micro_batches": 4})


def _run(schedule: str, virtual: int = 1) -> Callable[[], Any]:
    """The pipeline runs by another schedule than the planned one."""
    inner = TECHNIQUES["pipeline"].apply
    changed = {"schedule": schedule, "virtual": virtual}
    other = dataclasses.replace(
        TECHNIQUES["pipeline"], apply=lambda bench, planned: inner(bench, {**planned, **changed})
    )
    return lambda: mock.patch.dict("memfit.techniques.registry.TECHNIQUES", {"pipeline": other})


def _looped() -> Any:
    """Several stages on a rank, and all forwards before the first backward."""
    from torch.distributed.pipelining import schedules

    from memfit.techniques.parallel import pipeline_stages

    return mock.patch.dict(pipeline_stages.SCHEDULES, {"interleaved": schedules.ScheduleLoopedBFS})


def _same_samples() -> Any:
    return mock.patch.object(Layout, "data_index", return_value=0)


def _own_part_only() -> Any:
    """Attention reads only this rank's part, although keys and values are gathered."""
    from memfit.techniques.parallel.gathered_attention import SequenceRanks

    inner = SequenceRanks.blocks
    return mock.patch.object(SequenceRanks, "blocks", lambda self, causal: [next(inner(self, causal))])


def _alone() -> Any:
    """Each rank keeps all parts."""
    from memfit.techniques.zero import zero_stage3
    from memfit.techniques.zero.base import Alone

    inner = zero_stage3.ZeroThree.__init__

    def init(self: Any, bench: Any, params: Any, settings: Any, make: Any, group: Any) -> None:
        inner(self, bench, params, settings, make, Alone())

    return mock.patch.object(zero_stage3.ZeroThree, "__init__", init)


ORDER, APART = "pipeline: schedule: planned", "pipeline: schedule: gradients of weights: planned"
SMALL = {"stage": 3, **FAST, "persist_elements": 2000}
# The plan, how it is undone, and what the message must name.
CASES: dict[str, tuple[Plan, Callable[[], Any], str]] = {
    "1f1b": (_pipeline("1f1b"), _run("gpipe"), f"{ORDER} 1f1b, 2, 1 micro-batches in flight"),
    "gpipe": (_pipeline("gpipe"), _run("1f1b"), f"{ORDER} gpipe, 4, 4 micro-batches in flight"),
    "interleaved": (_pipeline("interleaved", 2), _run("gpipe"), f"{ORDER} interleaved"),
    "interleaved, looped": (_pipeline("interleaved", 2), _looped, f"{ORDER} interleaved"),
    "zero-bubble": (_pipeline("zero-bubble"), _run("gpipe"), f"{ORDER} zero-bubble"),
    "zero-bubble, 1f1b": (_pipeline("zero-bubble"), _run("1f1b"), f"{APART} computed separately, later"),
    "1f1b, zero-bubble": (
        _pipeline("1f1b"),
        _run("zero-bubble"),
        f"{APART} computed with gradients of inputs",
    ),
    "zero-bubble-v": (_pipeline("zero-bubble-v", 2), _run("interleaved", 2), f"{APART} computed separately"),
    "ddp": (_plan(ddp={}), _same_samples, "ddp: samples: planned different samples on each of 2"),
    "fsdp2": (_plan(fsdp2={}), _same_samples, "fsdp2: samples: planned different samples on each of 2"),
    "zero": (_plan(zero={"stage": 2, **FAST}), _same_samples, "zero: samples: planned different samples"),
    "ddp, accumulated": (
        _plan(ddp={}, gradient_accumulation={"micro_batches": 4}),
        _same_samples,
        "ddp: samples: planned different samples",
    ),
    "context": (_plan(context_parallel={}), _own_part_only, "context-parallel: attention: planned"),
    "context, fsdp2, recomputed": (
        _plan(context_parallel={}, fsdp2={}, activation_checkpointing={}),
        _own_part_only,
        "context-parallel: attention: planned",
    ),
    "zero 3": (_plan(zero={"stage": 3, **FAST}), _alone, "zero stage 3: parameters: planned 1/2"),
    "zero 3, gradients": (_plan(zero=SMALL), _alone, "zero stage 3: gradients: planned 1/2"),
}


class _Apart(Gpt):
    """Its first block does not attend."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        first = self.blocks[0]
        first._attend = lambda x: first.query_key_value(x)[..., : SIZE.width]


def _identity() -> nn.Module:
    """Its blocks begin as the identity, so that attention has no visible effect."""
    model = Gpt(SIZE)
    for block in model.blocks:
        for last in (block.mix, block.narrow):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    return model


def _dropout() -> nn.Module:
    model = Gpt(SIZE)
    model.norm = nn.Sequential(model.norm, nn.Dropout(0.5))
    return model


def _frozen() -> nn.Module:
    model = Gpt(SIZE)
    for name, param in model.named_parameters():
        param.requires_grad_("blocks" in name or "head" in name)
    return model


def _tied() -> nn.Module:
    model = Gpt(SIZE)
    model.head.weight = model.embed.weight
    return model


def _alike(step: int, seed: int, count: int = 8) -> dict[str, torch.Tensor]:
    return {k: v[:1].expand(count, -1).contiguous() for k, v in _batch(step, seed).items()}


def _two_alike(step: int, seed: int) -> dict[str, torch.Tensor]:
    """A loader that happens to draw a sample twice."""
    return _alike(step, seed, 2)


def _same_inputs(step: int, seed: int) -> dict[str, torch.Tensor]:
    """The same coordinates, or the same question, with other targets."""
    batch = _batch(step, seed)
    return {**batch, "input_ids": batch["input_ids"][:4].repeat(2, 1)}


def _called_twice(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        model(batch["input_ids"].flip(0))
    return _loss(model, batch) + model(batch["input_ids"].flip(1)).square().mean()


JOBS = {
    "frozen": _job(build_model=_frozen),
    "tied": _job(build_model=_tied),
    "dropout": _job(build_model=_dropout),
    "apart": _job(build_model=_Apart),
    "identity": _job(build_model=_identity),
    "uneven": _job(make_batch=lambda step, seed: _batch(step, seed, 7), batch_size=7),
    "alike": _job(make_batch=_alike),
    "two alike": _job(make_batch=_two_alike, batch_size=2),
    "same inputs": _job(make_batch=_same_inputs),
    "called twice": _job(loss=_called_twice),
}
ACCUMULATED = _plan(pipeline={"micro_batches": 2}, gradient_accumulation={"micro_batches": 2})
# Correct steps: the plan, jobs in which all is observed, and jobs in which samples or attention are not.
HONEST: dict[str, tuple[Plan, tuple[str, ...], tuple[str, ...]]] = {
    "ddp": (
        _plan(ddp={}),
        ("tied", "dropout", "uneven", "called twice"),
        ("alike", "two alike", "same inputs"),
    ),
    "fsdp2": (_plan(fsdp2={}), ("frozen",), ("two alike",)),
    "zero": (_plan(zero={"stage": 1}), ("uneven",), ()),
    "zero 3": (_plan(zero=SMALL), ("frozen", "tied"), ()),
    "context": (
        _plan(context_parallel={}),
        ("frozen", "tied", "called twice", "apart", "alike"),
        ("identity",),
    ),
    "1f1b": (_pipeline("1f1b"), ("frozen", "tied"), ()),
    "interleaved": (_pipeline("interleaved", 2), ("dropout",), ()),
    "accumulated": (ACCUMULATED, ("plain",), ()),
}


def _told(job: Job, plan: Plan, rank: int) -> str:
    torch.manual_seed(0)
    whole = sum(p.numel() for p in job.build_model().parameters())
    step = TrainingStep(job, plan, world=make_world(plan, rank=rank, device="cpu"))
    return child_ranks.told(step, whole)


def _own_pipeline(rank: int, kind: Any) -> str:
    """A pipeline of torch without memfit's training step; it runs a trial pass to learn its shapes."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])
    stage = PipelineStage(model, rank, 2, torch.device("cpu"))
    pipeline = kind(stage, 4, loss_fn=functional.mse_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        pipeline.step(*([torch.randn(8, 8)] if rank == 0 else []), target=torch.randn(8, 8))
        optimizer.step()

    try:
        return f"fine: {conform(model, optimizer, _pipeline('1f1b'), step=step)}"
    except NotConforming as error:
        return str(error)


def _rank(target: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    with join_world(_plan(ddp={})):
        rank = torch.distributed.get_rank()
        if target.name.startswith("honest"):
            for name, (plan, *jobs) in HONEST.items():
                found[name] = {job: _told(JOBS.get(job, JOB), plan, rank) for some in jobs for job in some}
        for name, (plan, sabotage, _) in CASES.items() if not found else ():
            honest = _told(JOB, plan, rank)
            with sabotage():
                found[name] = {"honest": honest, "sabotaged": _told(JOB, plan, rank)}
        if target.name.startswith("undone"):
            kinds = {"honest": Schedule1F1B, "sabotaged": ScheduleGPipe}
            found["own pipeline"] = {name: _own_pipeline(rank, kind) for name, kind in kinds.items()}
    target.write_text(json.dumps(found))


Told = list[dict[str, dict[str, str]]]  # of each rank, by case: what was reported for each step


def _from_two_ranks(folder: Path, kind: str) -> Told:
    targets = [folder / f"{kind}{rank}" for rank in range(2)]
    child_ranks.run_children(__file__, [[target] for target in targets])
    return [json.loads(target.read_text()) for target in targets]


@pytest.fixture(scope="module")
def undone(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return _from_two_ranks(tmp_path_factory.mktemp("told"), "undone")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return _from_two_ranks(tmp_path_factory.mktemp("told"), "honest")


def test_the_schedule_of_a_users_own_pipeline_is_checked(undone: Told) -> None:
    for of_rank in undone:
        assert of_rank["own pipeline"]["honest"].startswith("fine: as planned"), of_rank["own pipeline"]
        assert CASES["1f1b"][2] in of_rank["own pipeline"]["sabotaged"]


@pytest.mark.parametrize("name", CASES)
def test_work_that_ranks_do_not_share_as_planned_is_reported(name: str, undone: Told) -> None:
    for of_rank in undone:
        honest, sabotaged = of_rank[name]["honest"], of_rank[name]["sabotaged"]
        assert honest.startswith("fine: as planned"), honest
        assert CASES[name][2].partition(": planned")[0] in honest.partition("; not checked")[0], honest
        assert sabotaged.startswith("the plan was not applied"), sabotaged
        assert CASES[name][2] in sabotaged


@pytest.mark.parametrize("name", HONEST)
def test_a_correct_step_conforms_and_states_what_was_not_observed(name: str, honest: Told) -> None:
    _, seen, unseen = HONEST[name]
    for of_rank in honest:
        for job in (*seen, *unseen):
            told = of_rank[name][job]
            assert told.startswith("fine: as planned"), f"{job}: {told}"
            blind = (
                "some ranks get the same inputs" in told or "no block was observed whose output mixes" in told
            )
            assert blind == (job in unseen), f"{job}: {told}"


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
    child_ranks.leave()
