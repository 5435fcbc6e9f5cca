"""FairScale: losses of one process, memory as predicted on every rank, and gradients that stay in buckets.

The file is also the program that each rank runs.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import os
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from child_ranks import leave, run_children, told
from torch import nn
from torch.nn import functional

from memfit.cost.memory import memory_profile
from memfit.engines.fairscale import CONFIG, ENGINE, config
from memfit.engines.registry import render
from memfit.jobs.training_step import TrainingStep
from memfit.runtime.counting_allocator import CountingAllocator, available
from memfit.runtime.gloo import gloo_first
from memfit.techniques.rank_mesh import layout, make_world
from memfit.techniques.registry import make_use
from memfit.techniques.zero.sharded_ddp import assign_owners
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job, JobRef
from memfit.types.launch import RunSpec
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.worker.train import join_world, step_maker

installed = pytest.mark.skipif(
    importlib.util.find_spec("fairscale") is None, reason="fairscale is not installed"
)
STEPS, LOSS_RATIO, PEAK_RATIO = 20, 1e-5, 0.02
# Gradients are freed when their reduction is seen to be complete, which depends on the system's scheduling:
# the lowest peak of a few runs is compared.
REPEATS = 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(37, 130)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(130, 261), nn.SiLU(), nn.Linear(261, 130)) for _ in range(3)]
        )
        self.head = nn.Linear(130, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def _batch(step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return torch.randn(16, 37, generator=generator), torch.randn(16, 8, generator=generator)


JOB = Job(
    name="net",
    build_model=Net,
    make_batch=_batch,
    batch_size=16,
    blocks="blocks",
    loss=lambda model, batch: functional.mse_loss(model(batch[0]), batch[1]),
)


def _plan(ranks: int = 2, **uses: dict[str, Any]) -> Plan:
    return Plan(ranks=ranks, uses=tuple(make_use(k.replace("_", "-"), v) for k, v in uses.items()))


PLANS = {
    "each alone": _plan(sharded_ddp={"reduce_buffer_elements": 0}),
    "some in buckets": _plan(
        sharded_ddp={"reduce_buffer_elements": 50_000}, gradient_accumulation={"micro_batches": 2}
    ),
    "defaults": _plan(sharded_ddp={}, activation_checkpointing={}),
    "some in buckets, recomputed": _plan(
        sharded_ddp={"reduce_buffer_elements": 50_000},
        activation_checkpointing={"every": 2},
        gradient_accumulation={"micro_batches": 2},
    ),
}
ALONE = {"alone": _plan(1, sharded_ddp={})}


class Scale(nn.Module):
    """One parameter, so that the second of two ranks owns none."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x[:, :8]


SCALE = dataclasses.replace(JOB, build_model=Scale, blocks=None)


def _spec(plan: Plan) -> RunSpec:
    return RunSpec(
        name="x",
        role="run",
        job=JobRef(spec=f"{__file__}:JOB"),
        plan=plan,
        engine="fairscale",
        seed=0,
        steps=STEPS,
        threads=1,
        evaluate=False,
        batch_size=16,
    )


# -- the program ----------------------------------------------------------------------------------------


def _rank(folder: Path, target: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counter = CountingAllocator()
    counter.install()
    found: dict[str, Any] = {}
    with join_world(PLANS["defaults"]), gloo_first(patient=True) as settle:
        rank = torch.distributed.get_rank()
        for name, plan in PLANS.items():
            kind = step_maker("fairscale", _configured(folder / f"{name}-{rank}", plan))
            _train(kind, plan, counter, settle, rank, 1)
            losses, peaks = _train(kind, plan, counter, settle, rank, STEPS)
            for _ in range(REPEATS):
                peaks = min(peaks, _train(kind, plan, counter, settle, rank, 2)[1])
            found[name] = {"losses": losses, "peak": peaks}
        found["one parameter"] = _losses_of_one_parameter(folder / f"scale-{rank}", rank)
        found["not sharded"] = _told_of_one_owner(folder / f"one-{rank}", rank)
        found["not recomputed"] = _told_without_wrapper(folder / f"kept-{rank}", rank)
    target.write_text(json.dumps(found))


def _losses_of_one_parameter(folder: Path, rank: int) -> list[float]:
    plan, losses = PLANS["each alone"], []
    kind = step_maker("fairscale", _configured(folder, plan))
    step = kind(SCALE, plan, world=make_world(plan, rank=rank, device="cpu"))
    for index in range(STEPS):
        part, terms = step.local(SCALE.make_batch(index, 0))
        losses.append(float(step.run(part, terms_per_rank=terms)[0]))
    step.close()
    return losses


def _told_of_one_owner(folder: Path, rank: int) -> str:
    """What is reported where OSS gives all but one of the parameters to the first rank."""
    from fairscale.optim.oss import OSS

    def unshared(oss: Any) -> list[list[dict[str, Any]]]:
        parts = (slice(None, -1), slice(-1, None))
        return [[{**g, "params": g["params"][part]} for g in oss.param_groups] for part in parts]

    plan = PLANS["defaults"]
    with mock.patch.object(OSS, "partition_parameters", unshared):
        kind = step_maker("fairscale", _configured(folder, plan))
        step = kind(JOB, plan, world=make_world(plan, rank=rank, device="cpu"))
    whole = sum(p.numel() for p in JOB.build_model().parameters())
    return told(step, whole)


def _told_without_wrapper(folder: Path, rank: int) -> str:
    plan = PLANS["defaults"]
    with mock.patch("fairscale.nn.checkpoint.checkpoint_wrapper", lambda block: block):
        kind = step_maker("fairscale", _configured(folder, plan))
        step = kind(JOB, plan, world=make_world(plan, rank=rank, device="cpu"))
    return told(step, sum(p.numel() for p in JOB.build_model().parameters()))


def _configured(folder: Path, plan: Plan) -> Path:
    folder.mkdir()
    for file, text in render(_spec(plan)).files.items():
        (folder / file).write_text(text)
    return folder


def _train(
    kind: Any, plan: Plan, counter: CountingAllocator, settle: Any, rank: int, steps: int
) -> tuple[list[float], int]:
    gc.collect()
    base, losses = counter.live_bytes(), []
    counter.reset_peak()
    torch.manual_seed(0)
    step = kind(JOB, plan, world=make_world(plan, rank=rank, device="cpu"))
    settle()
    for index in range(steps):
        part, terms = step.local(JOB.make_batch(index, 0))
        losses.append(float(step.run(part, terms_per_rank=terms)[0]))
    peak = counter.peak_bytes() - base
    step.close()
    return losses, peak


# -- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if (why := available()) is not None:
        pytest.skip(f"no counting allocator: {why}")
    folder = tmp_path_factory.mktemp("ran")
    run_children(__file__, [[folder, folder / f"{rank}.json"] for rank in range(2)])
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _losses(step: TrainingStep) -> list[float]:
    return [float(step.run(JOB.make_batch(index, 0))[0]) for index in range(STEPS)]


@installed
def test_optimizer_state_that_is_not_sharded_is_reported(ran: list[dict[str, Any]]) -> None:
    for of_rank in ran:
        assert of_rank["not sharded"].startswith("the plan was not applied"), of_rank["not sharded"]
        assert "sharded-ddp: optimizer state" in of_rank["not sharded"]


@installed
def test_blocks_that_are_not_recomputed_are_reported(ran: list[dict[str, Any]]) -> None:
    for of_rank in ran:
        assert "activation-checkpointing: planned blocks 0, 1, 2 run again" in of_rank["not recomputed"]


@pytest.fixture(scope="module")
def reference() -> list[float]:
    torch.manual_seed(0)
    return _losses(TrainingStep(JOB, Plan()))


@installed
@pytest.mark.parametrize("name", PLANS)
def test_two_ranks_have_the_losses_of_one_process(
    name: str, ran: list[dict[str, Any]], reference: list[float]
) -> None:
    losses = [statistics.fmean(parts) for parts in zip(*(of[name]["losses"] for of in ran), strict=True)]
    assert losses == pytest.approx(reference, rel=LOSS_RATIO)


@installed
def test_a_rank_that_owns_no_parameter_has_the_losses_of_one_process(ran: list[dict[str, Any]]) -> None:
    losses = [statistics.fmean(parts) for parts in zip(*(of["one parameter"] for of in ran), strict=True)]
    assert losses == pytest.approx(_losses(TrainingStep(SCALE, Plan())), rel=LOSS_RATIO)


@installed
@pytest.mark.parametrize("name", PLANS)
def test_measured_memory_is_the_predicted_memory(name: str, ran: list[dict[str, Any]]) -> None:
    for rank in layout(PLANS[name]).distinct_ranks():
        profile = memory_profile(trace(JOB, PLANS[name], rank=rank), Calibration())
        assert ran[rank][name]["peak"] == pytest.approx(profile.peak_bytes, rel=PEAK_RATIO)


class Shallow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.layer(x).tanh()


class Named(Shallow):
    def forward(self, given: Any) -> Any:
        return {"x": super().forward(_tensor(given))}


class Nested(Shallow):
    def forward(self, given: Any) -> Any:
        x = super().forward(_tensor(given))
        return x, (x,)


def _tensor(given: Any) -> torch.Tensor:
    return given["x"] if isinstance(given, dict) else given[1][0] if isinstance(given, tuple) else given


class Stack(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([kind() for _ in range(2)])

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return _tensor(x)


def _stack(kind: type[nn.Module], **fields: Any) -> Job:
    given: dict[str, Any] = {"loss": lambda model, batch: model(batch).square().mean(), **fields}
    return Job(
        name="stack",
        build_model=lambda: Stack(kind),
        blocks="blocks",
        batch_size=8,
        **given,
        make_batch=lambda step, seed: torch.randn(8, 4, generator=torch.Generator().manual_seed(step)),
    )


def _force(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    batch = batch.clone().requires_grad_()
    return torch.autograd.grad(model(batch).sum(), batch, create_graph=True)[0].square().mean()


def checkpointed(folder: Path) -> dict[str, Any]:
    """Which blocks of one rank FairScale recomputes, and what is reported for those that it cannot."""
    recomputed: dict[str, dict[str, Any]] = {"activation_checkpointing": {}}
    found: dict[str, Any] = {}
    for name, job, plan in (
        ("plain", _stack(Shallow), _plan(1, **recomputed)),
        ("every 2", _stack(Shallow), _plan(1, activation_checkpointing={"every": 2})),
        ("autocast", _stack(Shallow), _plan(1, **recomputed, bf16_autocast={})),
        ("island", _stack(Shallow, islands=("blocks.1",)), _plan(1, **recomputed)),
        ("named", _stack(Named), _plan(1, **recomputed)),
        ("nested", _stack(Nested), _plan(1, **recomputed)),
        ("force", _stack(Shallow, loss=_force), _plan(1, **recomputed)),
    ):
        step = step_maker("fairscale", _configured(folder / name, plan))(job, plan)
        functions = [getattr(vars(b).get("forward"), "func", None) for b in step.model.blocks]
        carried = [getattr(f, "__module__", "").startswith("fairscale.") for f in functions]
        try:
            said = told(step, sum(p.numel() for p in step.model.parameters()))
        except UserError as error:
            said = str(error)
        found[name] = [carried, said]
    return found


def _alone(folder: Path, target: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    plan = ALONE["alone"]
    torch.manual_seed(0)
    step = step_maker("fairscale", _configured(folder / "alone", plan))(JOB, plan)
    target.write_text(json.dumps({"losses": _losses(step), **checkpointed(folder)}))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    run_children(__file__, [[folder, folder / "found.json"]])
    return json.loads((folder / "found.json").read_text())  # type: ignore[no-any-return]


@installed
def test_on_one_rank_losses_are_bitwise_equal(one: dict[str, Any], reference: list[float]) -> None:
    assert one["losses"] == reference


@installed
@pytest.mark.parametrize(
    ("name", "carried", "said"),
    [
        ("plain", [True, True], "fine: "),
        ("every 2", [True, False], "fine: "),
        ("autocast", [False, False], "fine: "),
        ("island", [True, False], "fine: "),
        ("named", [True, True], "would lose gradients of what the block Named returns"),
        ("nested", [True, True], "would lose gradients of what the block Nested returns"),
        (
            "force",
            [True, True],
            "does not support the job's loss, which itself computes gradients with torch.autograd.grad",
        ),
    ],
)
def test_fairscale_recomputes_only_the_blocks_that_it_supports(
    name: str, carried: list[bool], said: str, one: dict[str, Any]
) -> None:
    assert one[name][0] == carried
    assert said in one[name][1]


def test_the_arguments_follow_the_plan() -> None:
    plan = _plan(sharded_ddp={"reduce_buffer_elements": 77})
    assert json.loads(render(_spec(plan)).files[CONFIG]) == config(plan)
    assert config(plan)["reduce_buffer_size"] == 77


@installed
def test_fairscale_accepts_the_arguments_and_shards_as_predicted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import inspect

        from fairscale.nn.data_parallel import ShardedDataParallel
        from fairscale.optim.oss import OSS

        assert set(config(Plan())) <= set(inspect.signature(ShardedDataParallel).parameters)
        params = list(Net().parameters())
        theirs = object.__new__(OSS)
        theirs.world_size, theirs.param_groups = 3, [{"params": params}]
        theirs._partition_parameters = []
        divided = theirs.partition_parameters()
    ours = assign_owners(params, 3)
    for rank, groups in enumerate(divided):
        assert [id(p) for g in groups for p in g["params"]] == [id(p) for p in params if ours[p] == rank]


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (_plan(2, fsdp2={}), "FullyShardedDataParallel requires CUDA"),
        (_plan(2, zero={}), "zero is not supported by fairscale"),
        (_plan(2), "FairScale requires sharded-ddp"),
    ],
)
def test_an_unsupported_plan_is_refused_with_the_reason(plan: Plan, why: str) -> None:
    assert why in "; ".join(ENGINE.refusals(plan))


if __name__ == "__main__":
    (_rank if "RANK" in os.environ else _alone)(Path(sys.argv[1]), Path(sys.argv[2]))
    leave()
