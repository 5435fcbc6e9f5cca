"""What the conformance check reports where ranks do not exchange what the plan says: gradients that are not
averaged over all ranks, parts of sums that are not summed, parameters gathered or kept otherwise.

The file is also the program that each rank runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
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
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel as Ddp

from memfit.api import conform
from memfit.conformance.fingerprints import fingerprint
from memfit.engines.deepspeed.step import import_deepspeed
from memfit.jobs.builtin.gpt import Gpt, GptSize
from memfit.techniques.rank_mesh import make_world
from memfit.techniques.registry import TECHNIQUES, make_use
from memfit.techniques.zero import zero_stage12
from memfit.types.conformance import NotConforming
from memfit.types.job import Job
from memfit.types.plan import Plan
from memfit.worker.train import join_world, step_maker

FAST = {"reduce_bucket_elements": 20_000, "persist_elements": 1}
MEAN = "mean of gradients"
SIZE = GptSize(layers=2, width=32, heads=4, length=16, vocabulary=64, batch_size=4)


def _batch(step: int, seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(seed + step))
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def _job_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


JOB = Job(name="gpt", build_model=lambda: Gpt(SIZE), make_batch=_batch, loss=_job_loss, batch_size=4)


def _plan(ranks: int = 2, **uses: dict[str, Any]) -> Plan:
    return Plan(ranks=ranks, uses=tuple(make_use(k.replace("_", "-"), v) for k, v in uses.items()))


class _Done:
    def wait(self) -> None: ...

    def is_completed(self) -> bool:
        return True


def _never_in_sync() -> Any:
    """DDP never synchronises, not even in a pipeline, whose stages decide it."""
    never = property(lambda self: False, lambda self, value: None)
    return mock.patch.object(Ddp, "require_backward_grad_sync", never, create=True)


def _no_scatter() -> Any:
    """FSDP2 keeps the shard of this rank's own gradients."""

    def own(**given: Any) -> Any:
        output = given["output"]
        output.copy_(given["input"].view(-1, output.numel())[dist.get_rank(given["group"])])
        return _Done()

    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    return mock.patch.object(dist, name, own)


def _no_replicas() -> Any:
    """HSDP without its second reduction, among replicas."""
    return mock.patch.object(dist, "all_reduce", return_value=_Done())


def _no_owners() -> Any:
    return mock.patch("memfit.techniques.zero.sharded_ddp.ShardedDdp._send", return_value=_Done())


def _not_together() -> Any:
    return mock.patch(
        "memfit.techniques.parallel.sample_parallel_collectives.average_gradients",
        return_value=lambda last: None,
    )


def _alone() -> Any:
    return mock.patch.object(zero_stage12, "all_reduce", return_value=None)


def _own_part(self: Any, grads: list[torch.Tensor], sizes: list[int]) -> torch.Tensor:
    """ZeRO 3's shard of this rank's own gradients."""
    first = dist.get_rank(self.group)
    padded = [functional.pad(g, (0, n * self.ranks - g.numel())) for g, n in zip(grads, sizes, strict=True)]
    return torch.cat([g.view(self.ranks, -1)[first] for g in padded])


def _own_shards() -> Any:
    from memfit.techniques.zero.zero_stage3 import ZeroThree

    return mock.patch.object(ZeroThree, "_reduce_scatter", _own_part)


def _other(technique: str, **settings: Any) -> Callable[[], Any]:
    """The technique is applied with other settings than the plan's."""
    kept = TECHNIQUES[technique]
    other = dataclasses.replace(kept, apply=lambda bench, given: kept.apply(bench, {**given, **settings}))
    return lambda: mock.patch.dict(TECHNIQUES, {technique: other})


def _at_once() -> Any:
    """FSDP2 wraps the model and none of its blocks."""
    from memfit.techniques.parallel import data_parallel

    return mock.patch.object(data_parallel, "_groups", lambda bench, *_: [(bench.model, True)])


def _parts_of_sums() -> Any:
    from torch.distributed.tensor.parallel import RowwiseParallel

    def local(output_layouts: Any, use_local_output: Any, mod: Any, outputs: Any, mesh: Any) -> Any:
        return outputs.to_local()

    return mock.patch.object(RowwiseParallel, "_prepare_output_fn", staticmethod(local))


def _megatrons_parts_of_sums() -> Any:
    return mock.patch("megatron.core.tensor_parallel.mappings._reduce", lambda given, group: given)


REDUCED = f"{MEAN}: planned the mean of"
SUMS = "tensor-parallel: sums over ranks: planned the same output"
# By case: the plan, how it is undone, what must be named, and the engine.
NATIVE: dict[str, tuple[Plan, Callable[[], Any]]] = {
    "ddp": (_plan(ddp={}), _never_in_sync),
    "ddp, accumulated": (_plan(ddp={}, gradient_accumulation={"micro_batches": 2}), _never_in_sync),
    "zero 0": (_plan(zero={"stage": 0, **FAST}), _alone),
    "zero 1": (_plan(zero={"stage": 1, **FAST}), _alone),
    "zero 2": (_plan(zero={"stage": 2, **FAST}), _alone),
    "zero 2, host": (_plan(zero={"stage": 2, "offload": "optimizer", **FAST}), _alone),
    "zero 2, bf16": (_plan(zero={"stage": 2, "precision": "bf16", **FAST}), _alone),
    "zero 3": (_plan(zero={"stage": 3, **FAST}), _own_shards),
    "zero 1, accumulated": (
        _plan(zero={"stage": 1, **FAST}, gradient_accumulation={"micro_batches": 2}),
        _alone,
    ),
    "zero 3, accumulated": (
        _plan(zero={"stage": 3, **FAST}, gradient_accumulation={"micro_batches": 2}),
        _own_shards,
    ),
    "fsdp2": (_plan(fsdp2={}), _no_scatter),
    "fsdp2, accumulated": (_plan(fsdp2={}, gradient_accumulation={"micro_batches": 2}), _no_scatter),
    "fsdp2, kept, accumulated": (
        _plan(fsdp2={"reshard": False}, gradient_accumulation={"micro_batches": 2}),
        _no_scatter,
    ),
    "fsdp2, bf16": (_plan(fsdp2={"precision": "bf16"}), _no_scatter),
    "sharded-ddp": (_plan(sharded_ddp={}), _no_owners),
    "context": (_plan(context_parallel={}), _not_together),
    "hsdp": (_plan(4, fsdp2={"replicas": 2}), _no_replicas),
    "fsdp2 x tensor": (_plan(4, fsdp2={}, tensor_parallel={}), _no_scatter),
    "fsdp2 x sequence": (_plan(4, fsdp2={}, tensor_parallel={"sequence": True}), _no_scatter),
    "pipeline x ddp": (_plan(4, ddp={}, pipeline={"micro_batches": 2}), _never_in_sync),
}


OTHERS: dict[str, tuple[Plan, Callable[[], Any], str]] = {
    "reshard": (
        _plan(fsdp2={}),
        _other("fsdp2", reshard=False),
        "fsdp2: reshard: planned gathered blocks freed",
    ),
    "kept": (
        _plan(fsdp2={"reshard": False}),
        _other("fsdp2", reshard=True),
        "fsdp2: reshard: planned gathered blocks kept",
    ),
    "units": (
        _plan(fsdp2={}),
        _at_once,
        "fsdp2: units: planned each block is gathered separately, found blocks 0, 1",
    ),
    "tensor": (_plan(tensor_parallel={}), _parts_of_sums, SUMS),
    "megatron": (_plan(tensor_parallel={}), _megatrons_parts_of_sums, SUMS),
}


def _told(plan: Plan, engine: str = "native") -> str:
    torch.manual_seed(0)
    whole = sum(p.numel() for p in JOB.build_model().parameters())
    step = step_maker(engine, None)(JOB, plan, world=make_world(plan, rank=dist.get_rank(), device="cpu"))
    return child_ranks.told(step, whole)


# -- loops of users' own ------------------------------------------------------------------------------------


class _Net(nn.Module):
    """One layer is frozen, one unused, and the head is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)) for _ in range(3))
        self.unused = nn.Linear(32, 32)
        self.blocks[1].requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + functional.gelu(block(x))
        return self.head(x)  # type: ignore[no-any-return]


def _tokens(number: int = 0) -> torch.Tensor:
    seed = 10 * number + dist.get_rank()
    return torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(seed))


def _loss(model: Any, number: int = 0) -> torch.Tensor:
    tokens = _tokens(number)
    return functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


Loop = tuple[Any, Any, Callable[[], object]]


def _plain(model: Any, optimizer: Any = None, after: Callable[[], object] = lambda: None) -> Loop:
    optimizer = optimizer or torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        _loss(model).backward()
        after()
        optimizer.step()

    return model, optimizer, step


def _ddp(**settings: Any) -> Any:
    return Ddp(_Net(), **{"find_unused_parameters": True, **settings})


def _clipped_by_value() -> Loop:
    model = _ddp()
    return _plain(model, after=lambda: nn.utils.clip_grad_value_(model.parameters(), 1e-4))


def _clipped_by_norm() -> Loop:
    model = _ddp()
    return _plain(model, after=lambda: nn.utils.clip_grad_norm_(model.parameters(), 1e-2))


def _no_learning_rate() -> Loop:
    """A warm-up whose first step has the learning rate 0."""
    model = _ddp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    return _plain(model, optimizer)


def _hooked(kind: str) -> Loop:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    net = _Net()
    net.unused.requires_grad_(False)
    model = Ddp(net)
    if kind == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    else:
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        state.start_powerSGD_iter = 0
    return _plain(model)


def _accumulated() -> Loop:
    model = _ddp()
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        with model.no_sync():
            (_loss(model, 0) / 2).backward()
        (_loss(model, 1) / 2).backward()
        optimizer.step()

    return model, optimizer, step


def _twice() -> Loop:
    """Sharpness-aware minimisation: the second pass starts without gradients."""
    model = _ddp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        _loss(model).backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.add_(p.grad, alpha=0.5)
        optimizer.zero_grad()
        _loss(model).backward()
        optimizer.step()

    return model, optimizer, step


def _sharded(**settings: Any) -> Loop:
    from torch.distributed.fsdp import fully_shard

    model = _Net()
    model.unused.requires_grad_(False)
    for block in model.blocks:
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    return _plain(model)


def _sharded_late() -> Loop:
    """Two micro-batches whose gradients are reduced once."""
    model, optimizer, _ = _sharded()

    def step() -> None:
        model.set_requires_gradient_sync(False)
        _loss(model, 0).backward()
        model.set_requires_gradient_sync(True)
        _loss(model, 1).backward()
        optimizer.step()

    return model, optimizer, step


def _scaled() -> Loop:
    model = _ddp()
    optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu")

    def step() -> None:
        scaler.scale(_loss(model)).backward()
        scaler.step(optimizer)
        scaler.update()

    return model, optimizer, step


def _deepspeed(stage: int, dtype: str = "") -> Loop:
    deepspeed = import_deepspeed("cpu")
    model, config = (
        _Net(),
        {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 0.01,
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": 3000,
                "stage3_param_persistence_threshold": 1,
            },
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            **({dtype: {"enabled": True}} if dtype else {}),
        },
    )
    engine, optimizer, *_ = deepspeed.initialize(model=model, config=config)

    def step() -> None:
        engine.backward(_loss(engine))
        engine.step()

    return engine.module, optimizer, step


def _fairscale() -> Loop:
    from fairscale.nn.data_parallel import ShardedDataParallel
    from fairscale.optim import OSS

    net = _Net()
    net.unused.requires_grad_(False)
    optimizer = OSS(net.parameters(), optim=torch.optim.AdamW, lr=1e-3)
    model = ShardedDataParallel(net, optimizer)

    def step() -> None:
        _loss(model).backward()
        optimizer.step()

    return model, optimizer, step


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Reductions of torch.distributed leave this rank's own values."""

    def own(output: torch.Tensor, whole: torch.Tensor) -> Any:
        output.copy_(whole.view(-1)[dist.get_rank() * output.numel() :][: output.numel()].view_as(output))
        return _Done()

    with contextlib.ExitStack() as stack:
        for name in ("all_reduce", "reduce"):
            stack.enter_context(mock.patch.object(dist, name, return_value=_Done()))
        for name in ("reduce_scatter_tensor", "reduce_scatter_single", "_reduce_scatter_base"):
            if hasattr(dist, name):
                fsdp = lambda **given: own(given["output"], given["input"])  # noqa: E731
                stack.enter_context(mock.patch.object(dist, name, fsdp))
        if (deepspeed := sys.modules.get("deepspeed.runtime.comm.coalesced_collectives")) is not None:
            scatter = lambda whole, output, *_, **__: own(output, whole)  # noqa: E731
            stack.enter_context(mock.patch.object(deepspeed, "_torch_reduce_scatter_fn", scatter))
        yield


def _over_all() -> str:
    """HSDP is planned, and the model sharded over all ranks, without replicas."""
    model, optimizer, step = _sharded()
    try:
        plan = {"ranks": 4, "techniques": {"fsdp2": {"replicas": 2}}}
        return f"fine: {conform(model, optimizer, plan, step=step)}"
    except NotConforming as error:
        return str(error)


# The plan and the loop; all of these loops are correct and train as planned.
LOOPS: dict[str, tuple[dict[str, Any], Callable[[], Loop]]] = {
    "ddp": ({"ddp": {}}, lambda: _plain(_ddp())),
    "static": ({"ddp": {}}, lambda: _plain(_ddp(static_graph=True))),
    "views": ({"ddp": {}}, lambda: _plain(_ddp(gradient_as_bucket_view=True))),
    "clip value": ({"ddp": {}}, _clipped_by_value),
    "clip norm": ({"ddp": {}}, _clipped_by_norm),
    "rate 0": ({"ddp": {}}, _no_learning_rate),
    "fp16 hook": ({"ddp": {}}, lambda: _hooked("fp16")),
    "PowerSGD": ({"ddp": {}}, lambda: _hooked("power")),
    "accumulated": ({"ddp": {}, "gradient-accumulation": {"micro_batches": 2}}, _accumulated),
    "sharpness": ({"ddp": {}}, _twice),
    "scaled": ({"ddp": {}}, _scaled),
    "fsdp2": ({"fsdp2": {}}, _sharded),
    "fsdp2 late": ({"fsdp2": {}, "gradient-accumulation": {"micro_batches": 2}}, _sharded_late),
    "deepspeed 1": ({"zero": {"stage": 1, **FAST}}, lambda: _deepspeed(1)),
    "deepspeed 2": ({"zero": {"stage": 2, **FAST}}, lambda: _deepspeed(2)),
    "deepspeed 3": ({"zero": {"stage": 3, **FAST}}, lambda: _deepspeed(3)),
    "deepspeed 2 bf16": ({"zero": {"stage": 2, "precision": "bf16", **FAST}}, lambda: _deepspeed(2, "bf16")),
    "fairscale": ({"sharded-ddp": {}}, _fairscale),
}


REDUCED_BY_PYTHON = (
    "fsdp2",
    "fsdp2 late",
    "deepspeed 1",
    "deepspeed 2",
    "deepspeed 3",
    "deepspeed 2 bf16",
    "fairscale",
)


def _by_hand(name: str) -> str:
    torch.manual_seed(0)
    plan, make = LOOPS[name]
    model, optimizer, step = make()
    try:
        return f"fine: {conform(model, optimizer, {'ranks': 2, 'techniques': plan}, step=step)}"
    except NotConforming as error:
        return str(error)


def _rank(target: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    ranks = int(os.environ["WORLD_SIZE"])
    with join_world(_plan(ranks, ddp={})):
        for name, (plan, sabotage, *_) in (NATIVE | OTHERS).items():
            engine = name.split(",")[0] if name.startswith("megatron") else "native"
            if plan.ranks == ranks and _installed(engine):
                honest = _told(plan, engine)
                with sabotage():
                    found[name] = (honest, _told(plan, engine))
        if ranks == 4:
            found["over all"] = ("", _over_all())
        for name in LOOPS if ranks == 2 else ():
            if _installed(name):
                found[f"loop: {name}"] = (_by_hand(name), "")
                if name in REDUCED_BY_PYTHON:
                    with _silent():
                        found[f"loop: {name}"] = (found[f"loop: {name}"][0], _by_hand(name))
    target.write_text(json.dumps(found))


def _installed(name: str) -> bool:
    library = name.split(maxsplit=1)[0]
    return (
        library not in {"deepspeed", "fairscale", "megatron"} or importlib.util.find_spec(library) is not None
    )


Told = dict[str, tuple[str, str]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[Told]:
    """By case: what was reported for the correct and the sabotaged step, of each of 2 ranks, then of 4."""
    folder = tmp_path_factory.mktemp("told")
    return [told for ranks in (2, 4) for told in child_ranks.answers(__file__, folder, ranks=ranks)]


def _of(told: list[Told], name: str) -> list[tuple[str, str]]:
    return [of_rank[name] for of_rank in told if name in of_rank]


@pytest.mark.parametrize("name", NATIVE)
def test_gradients_that_are_not_averaged_are_reported(name: str, told: list[Told]) -> None:
    for honest, sabotaged in _of(told, name):
        assert honest.startswith("fine: as planned"), honest
        assert MEAN in honest.split("not checked")[0], honest
        assert REDUCED in sabotaged, sabotaged
    assert len(_of(told, name)) == NATIVE[name][0].ranks


@pytest.mark.parametrize("name", OTHERS)
def test_other_missing_exchanges_between_ranks_are_reported(name: str, told: list[Told]) -> None:
    plan, _, named = OTHERS[name]
    if name.startswith("megatron") and not _installed("megatron"):
        pytest.skip("megatron-core is not installed")
    for honest, sabotaged in _of(told, name):
        assert honest.startswith("fine: as planned"), honest
        assert named.split(": planned")[0] in honest.split("not checked")[0], honest
        assert named in sabotaged, sabotaged
    assert len(_of(told, name)) == plan.ranks


@pytest.mark.parametrize("name", LOOPS)
def test_gradient_averaging_is_checked_in_users_own_loops(name: str, told: list[Told]) -> None:
    if not _installed(name):
        pytest.skip(f"{name.split(maxsplit=1)[0]} is not installed")
    for honest, sabotaged in _of(told, f"loop: {name}"):
        assert honest.startswith("fine: as planned"), honest
        told_here, _, unseen = honest.partition("not checked")
        assert MEAN in (unseen if name == "PowerSGD" else told_here), honest
        if name in REDUCED_BY_PYTHON:
            assert f"{MEAN}: planned the mean of 2 ranks'" in sabotaged, sabotaged


def test_hsdp_sharded_over_all_ranks_without_replicas_is_reported(told: list[Told]) -> None:
    assert len(_of(told, "over all")) == 4
    for _, said in _of(told, "over all"):
        assert "fsdp2: parameters: replicas: planned" in said, said


def test_gradient_fingerprints_of_shards_add_up_to_that_of_the_whole() -> None:
    """Also for pieces that begin in the middle of a row, and for rows longer than what is copied at once."""
    torch.manual_seed(0)
    whole = torch.randn(7, 5, 3)
    for cuts in ([0, 105], [0, 50, 105], [0, 1, 16, 44, 45, 104, 105]):
        parts = [fingerprint(whole.flatten()[a:b], a, 15) for a, b in itertools.pairwise(cuts)]
        torch.testing.assert_close(sum(parts), fingerprint(whole), rtol=1e-6, atol=1e-6)
    with mock.patch("memfit.conformance.fingerprints._AT_ONCE", 8):
        torch.testing.assert_close(fingerprint(whole), sum(parts), rtol=1e-6, atol=1e-6)
    changed = whole.clone()
    changed[3, 2, 1] += 1
    assert float((fingerprint(changed) - fingerprint(whole)).abs().min()) > 1e-3


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
    child_ranks.leave()
