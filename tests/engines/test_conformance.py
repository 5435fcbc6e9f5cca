"""What the conformance check reports where a technique of the plan is switched off on two ranks.

The file is also the program that each rank runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import child_ranks
import pytest
import torch

from memfit.api import conform
from memfit.engines.registry import render
from memfit.jobs.builtin import alphafold2
from memfit.jobs.builtin.gpt import Gpt, GptSize
from memfit.jobs.training_step import TrainingStep
from memfit.runtime.ranks import run_ranks
from memfit.techniques.rank_mesh import make_world
from memfit.techniques.registry import make_use
from memfit.types.conformance import NotConforming
from memfit.types.job import Job, JobRef
from memfit.types.launch import LaunchConfig, RunSpec
from memfit.types.plan import Plan
from memfit.types.result import OutcomeKind
from memfit.worker.train import join_world, step_maker

pytestmark = pytest.mark.usefixtures("forked_workers")
SIZE = GptSize(layers=2, width=64, heads=4, length=32, vocabulary=128, batch_size=4)


def _batch(step: int, seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(4, 31, (4, 33), generator=torch.Generator().manual_seed(1000 * seed + step))
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def _loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten()
    )


JOB = Job(name="gpt", build_model=lambda: Gpt(SIZE), make_batch=_batch, loss=_loss, batch_size=4)


class _Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.each = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(4)])

    def forward(self, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.each):
            out = out + expert(tokens) * (weights * (chosen == number)).sum(1, keepdim=True)
        return out


class _Mixture(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(128, 16), torch.nn.Linear(16, 128)
        self.routers = torch.nn.ModuleList([torch.nn.Linear(16, 4) for _ in range(2)])
        self.experts = torch.nn.ModuleList([_Experts() for _ in range(2)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for router, experts in zip(self.routers, self.experts, strict=True):
            flat = x.flatten(0, 1)
            weights, chosen = router(flat).softmax(-1).topk(2)
            x = x + experts(flat, chosen, weights).view_as(x)
        return self.head(x)  # type: ignore[no-any-return]


JOBS = {
    "experts": Job(
        name="mixture",
        build_model=_Mixture,
        make_batch=_batch,
        loss=_loss,
        batch_size=4,
        experts="experts.?",
    ),
    "axial": alphafold2.make(batch=2, length=23),
}


def _plan(ranks: int = 2, **uses: dict[str, Any]) -> Plan:
    return Plan(ranks=ranks, uses=tuple(make_use(k.replace("_", "-"), v) for k, v in uses.items()))


def _off(technique: str) -> Callable[[], Any]:
    """The technique is in the plan but is not applied."""
    return lambda: mock.patch.object(TrainingStep, "carried", frozenset({technique}))


@contextlib.contextmanager
def _no_sync() -> Iterator[None]:
    from torch.nn.parallel import DistributedDataParallel

    inner = DistributedDataParallel.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.no_sync():
            return inner(self, *args, **kwargs)

    with mock.patch.object(DistributedDataParallel, "forward", forward):
        yield


def _not_averaged() -> Any:
    return mock.patch(
        "memfit.techniques.parallel.sample_parallel_collectives.average_gradients",
        return_value=lambda last: None,
    )


def _full_precision() -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return mock.patch(
        "memfit.techniques.parallel.data_parallel._precision", return_value=MixedPrecisionPolicy()
    )


def _other(technique: str, **settings: Any) -> Callable[[], Any]:
    """The technique is applied with other settings than the plan's."""
    from memfit.techniques.registry import TECHNIQUES

    inner = TECHNIQUES[technique].apply
    other = dataclasses.replace(
        TECHNIQUES[technique], apply=lambda bench, planned: inner(bench, {**planned, **settings})
    )
    return lambda: mock.patch.dict("memfit.techniques.registry.TECHNIQUES", {technique: other})


def _left(shape: tuple[int, ...] | None) -> Callable[[], Any]:
    """The pipeline runs, and parameters of ``shape`` (None: all) stay with every stage."""
    from memfit.techniques.parallel import pipeline_stages

    drop = pipeline_stages._drop

    def kept(module: Any, key: str, held: dict[str, Any], device: torch.device) -> None:
        if shape is not None and held[key].shape != shape:
            drop(module, key, held, device)

    return lambda: mock.patch.object(pipeline_stages, "_drop", kept)


FAST = {"reduce_bucket_elements": 100_000, "persist_elements": 1}
# The plan, how it is undone, and what the message must name.
NATIVE: dict[str, tuple[Plan, Callable[[], Any], str]] = {
    "ddp": (_plan(ddp={}), _off("ddp"), "ddp: replicas"),
    "ddp, never in sync": (_plan(ddp={}), _no_sync, "ddp: replicas"),
    "context, not averaged": (_plan(context_parallel={}), _not_averaged, "context-parallel: replicas"),
    "fsdp2": (_plan(fsdp2={}), _off("fsdp2"), "fsdp2: parameters"),
    "fsdp2, precision": (_plan(fsdp2={"precision": "bf16"}), _full_precision, "fsdp2: precision"),
    "zero 3": (_plan(zero={"stage": 3, **FAST}), _other("zero", stage=2), "zero stage 3: parameters"),
    "zero 2": (_plan(zero={"stage": 2, **FAST}), _off("zero"), "zero stage 2: optimizer state"),
    "tensor-parallel": (_plan(tensor_parallel={}), _off("tensor-parallel"), "tensor-parallel"),
    "checkpointing": (
        _plan(ddp={}, activation_checkpointing={}),
        _off("activation-checkpointing"),
        "activation-checkpointing",
    ),
    "autocast": (_plan(ddp={}, bf16_autocast={}), _off("bf16-autocast"), "bf16-autocast"),
    "autocast, fsdp2": (
        _plan(fsdp2={}, lora={}, bf16_autocast={}),
        _off("bf16-autocast"),
        "bf16-autocast: planned torch",
    ),
    "bf16": (_plan(ddp={}, bf16_parameters={}), _off("bf16-parameters"), "bf16-parameters"),
    "accumulation": (
        _plan(ddp={}, gradient_accumulation={"micro_batches": 2}),
        _off("gradient-accumulation"),
        "gradient-accumulation",
    ),
    "context": (_plan(context_parallel={}), _off("context-parallel"), "context-parallel: parts of a sample"),
    "axial": (_plan(axial_parallel={}), _off("axial-parallel"), "axial-parallel: parts of a sample"),
    "experts": (
        _plan(expert_parallel={}, ddp={}),
        _off("expert-parallel"),
        "expert-parallel: planned experts distributed",
    ),
    "pipeline": (_plan(pipeline={}), _off("pipeline"), "pipeline: blocks"),
    "pipeline, blocks left": (_plan(pipeline={}), _left(None), "pipeline: blocks"),
    "pipeline, embedding left": (
        _plan(pipeline={}),
        _left((SIZE.vocabulary, SIZE.width)),
        "pipeline: parameters: planned only",
    ),
    "pipeline, micro-batches": (
        _plan(pipeline={"micro_batches": 4}),
        _other("pipeline", micro_batches=2),
        "pipeline: micro-batches: planned 4 micro-batches, found 2",
    ),
    "pipeline, compiled": (_plan(pipeline={}, compile={}), _off("compile"), "compile: planned blocks"),
    "fsdp2, compiled": (
        _plan(fsdp2={}, compile={}),
        _off("compile"),
        "compile: planned blocks 0, 1 compiled",
    ),
    "fsdp2, offload": (
        _plan(fsdp2={"offload": True}),
        _other("fsdp2", offload=False),
        "fsdp2: offload: planned optimizer, parameters in host memory, found none",
    ),
    "fsdp2, offload unasked": (
        _plan(fsdp2={}),
        _other("fsdp2", offload=True),
        "found optimizer, parameters",
    ),
    "zero 2, offload": (
        _plan(zero={"stage": 2, "offload": "optimizer", **FAST}),
        _other("zero", offload="none"),
        "zero: offload: planned optimizer in host memory, found none",
    ),
    "zero 3, offload": (
        _plan(zero={"stage": 3, "offload": "parameters", **FAST}),
        _other("zero", offload="optimizer"),
        "zero: offload: planned optimizer, parameters in host memory, found optimizer",
    ),
}


DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
# Of DeepSpeed: the plan, what is left out of its configuration, and what must be named.
OFFLOADED: dict[str, tuple[Plan, str, str]] = {
    "zero 2": (
        _plan(zero={"stage": 2, "offload": "optimizer", **FAST}),
        "offload_optimizer",
        "found none",
    ),
    "zero 3": (
        _plan(zero={"stage": 3, "offload": "parameters", **FAST}),
        "offload_param",
        "found optimizer",
    ),
}


def _told(name: str, plan: Plan, rank: int) -> str:
    job = JOBS.get(name, JOB)
    torch.manual_seed(0)
    whole = sum(p.numel() for p in job.build_model().parameters())
    step = TrainingStep(job, plan, world=make_world(plan, rank=rank, device="cpu"))
    return child_ranks.told(step, whole)


def _rank(target: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    quick = functools.partial(torch.compile, backend="aot_eager")  # without the C++ compiler
    with join_world(_plan(ddp={})):
        rank = torch.distributed.get_rank()
        for name, (plan, sabotage, _) in NATIVE.items():
            with mock.patch.object(torch, "compile", quick):
                honest = _told(name, plan, rank)
                with sabotage():
                    found[name] = [honest, _told(name, plan, rank)]
        for name in OFFLOADED if DEEPSPEED else ():
            found[f"deepspeed, {name}"] = _told_by_deepspeed(name, target.with_suffix(""), rank)
    target.write_text(json.dumps(found))


def _told_by_deepspeed(name: str, folder: Path, rank: int) -> list[str]:
    """What is reported of a step with its configuration, and with what offloads left out of it."""
    plan, left_out, _ = OFFLOADED[name]
    launch, said = _launch("deepspeed", plan, batch_size=JOB.batch_size), []
    config = json.loads(launch.files["deepspeed.json"])
    os.environ.update(launch.env)
    folder.mkdir(exist_ok=True)
    for keys in ((), (left_out,)):
        for key in keys:
            del config["zero_optimization"][key]
        (folder / "deepspeed.json").write_text(json.dumps(config))
        torch.manual_seed(0)
        whole = sum(p.numel() for p in JOB.build_model().parameters())
        kind = step_maker("deepspeed", folder)
        said.append(child_ranks.told(kind(JOB, plan, world=make_world(plan, rank=rank, device="cpu")), whole))
    return said


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    """Of each rank, by case: what was reported for the correct and for the sabotaged step."""
    return child_ranks.answers(__file__, tmp_path_factory.mktemp("told"))


@pytest.mark.parametrize("name", NATIVE)
def test_a_technique_that_is_not_applied_on_two_ranks_is_reported(
    name: str, told: list[dict[str, list[str]]]
) -> None:
    for of_rank in told:
        honest, sabotaged = of_rank[name]
        assert honest.startswith("fine: as planned"), honest
        assert sabotaged.startswith("the plan was not applied"), sabotaged
        assert NATIVE[name][2] in sabotaged


# -- engines, by their own configuration ---------------------------------------------------------------

MLP = JobRef(spec=f"{Path(__file__).parents[2] / 'benchmarks' / 'rank_jobs.py'}:mlp")


def _launch(engine: str, plan: Plan, **more: Any) -> LaunchConfig:
    return render(
        RunSpec(
            name="t",
            role="t",
            job=MLP,
            plan=plan,
            engine=engine,
            seed=0,
            steps=1,
            threads=1,
            evaluate=False,
            **more,
        )
    )


def _fails(launch: LaunchConfig) -> str:
    seen = run_ranks(launch)
    assert [m.outcome for m in seen] == [OutcomeKind.FAILED] * 2, seen
    return seen[0].reason


def test_accelerate_that_does_not_shard_is_reported() -> None:
    """What `accelerate launch` does on a CPU today."""
    launch = _launch("accelerate", _plan(fsdp2={}))
    text = launch.files["accelerate.yaml"]
    plain = text[: text.index("fsdp_config")].replace("distributed_type: FSDP", "distributed_type: MULTI_GPU")
    reason = _fails(dataclasses.replace(launch, files={**launch.files, "accelerate.yaml": plain}))
    assert "the plan was not applied" in reason
    assert "fsdp2: parameters" in reason


@pytest.mark.quick_cases("deepspeed-3", "accelerate-2")
@pytest.mark.skipif(not DEEPSPEED, reason="deepspeed is not installed")
@pytest.mark.parametrize(
    ("engine", "stage"), [("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("accelerate", 2)]
)
def test_deepspeed_at_a_lower_zero_stage_is_reported(engine: str, stage: int) -> None:
    launch = _launch(engine, _plan(zero={"stage": stage, "reduce_bucket_elements": 1_000_000}))
    config = json.loads(launch.files["deepspeed.json"])
    config["zero_optimization"]["stage"] = stage - 1
    files = {**launch.files, "deepspeed.json": json.dumps(config)}
    assert f"zero stage {stage}" in _fails(dataclasses.replace(launch, files=files))


@pytest.mark.skipif(not DEEPSPEED, reason="deepspeed is not installed")
@pytest.mark.parametrize("name", OFFLOADED)
def test_deepspeed_that_keeps_states_on_the_device_is_reported(
    name: str, told: list[dict[str, list[str]]]
) -> None:
    for of_rank in told:
        honest, sabotaged = of_rank[f"deepspeed, {name}"]
        assert honest.startswith("fine: as planned"), honest
        assert "zero: offload: planned" in sabotaged
        assert OFFLOADED[name][2] in sabotaged


def test_accelerate_that_keeps_shards_on_the_device_is_reported() -> None:
    """Only the wrong step runs, as offload in Accelerate needs pinned memory and so an accelerator."""
    launch = _launch("accelerate", _plan(fsdp2={"offload": True}))
    text = launch.files["accelerate.yaml"]
    assert "fsdp_offload_params: true" in text
    other = text.replace("fsdp_offload_params: true", "fsdp_offload_params: false")
    reason = _fails(dataclasses.replace(launch, files={**launch.files, "accelerate.yaml": other}))
    assert "fsdp2: offload: planned optimizer, parameters in host memory, found none" in reason


# -- a loop of a user's own ----------------------------------------------------------------------------


def test_conform_reports_differences_of_a_users_own_training_loop() -> None:
    torch.manual_seed(0)
    # blocks that are a single layer are seen once only, whether they are recomputed or not
    blocks = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in range(3)]
    model = torch.nn.Sequential(*blocks)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    found = conform(model, optimizer, {}, step=step)
    assert not found.differences
    with pytest.raises(
        NotConforming, match=r"activation-checkpointing: planned blocks 0, 1, 2 .* found none"
    ):
        conform(model, optimizer, {"activation-checkpointing": {}}, step=step)
    with pytest.raises(NotConforming, match=r"sgd: planned 4 bytes of state per element, found 8\.00"):
        conform(model, optimizer, {"sgd": {}}, step=step)
    seen = conform(model, optimizer, {"techniques": {"chunking": {}}, "ranks": 1}, step=step)
    assert seen.unseen == ("chunking: not checked",)
    idle = conform(model, optimizer, {"activation-offload": {}})
    assert "activation-offload: no training step was observed" in idle.unseen
    with pytest.raises(NotConforming, match="ranks: planned 2, found 1"):
        conform(model, optimizer, {"ddp": {}}, step=step, ranks=2)


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
    child_ranks.leave()
