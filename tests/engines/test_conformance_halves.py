"""What the conformance check reports for loops of users' own: techniques applied only in part or at another
time, and loops that do more than the plan says and are correct.

The file is also the program that each rank runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child_ranks
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel as Ddp

from memfit.api import conform
from memfit.techniques.registry import make_use
from memfit.types.conformance import NotConforming
from memfit.types.plan import Plan
from memfit.worker.train import join_world


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class _Net(nn.Module):
    def __init__(self, **embedding: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 32, **embedding), nn.Linear(32, 64)
        self.scale = nn.Parameter(torch.ones(1))
        self.blocks = nn.ModuleList(_Block() for _ in range(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def _loss(model: Any, number: int = 0, *, same: bool = False) -> torch.Tensor:
    seed = 10 * number + (0 if same else dist.get_rank())
    tokens = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(seed))
    return functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def _average(model: nn.Module) -> None:
    for param in model.parameters():
        if param.grad is not None:
            dist.all_reduce(param.grad)
            param.grad.div_(dist.get_world_size())


Case = tuple[Any, Any, Callable[[], object]]


def _stepping(
    model: Any, optimizer: Any = None, *, after: Callable[[], object] = lambda: None, **how: Any
) -> Case:
    optimizer = optimizer or torch.optim.AdamW(model.parameters())

    def step() -> None:
        _loss(model, **how).backward()
        after()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def _sharded(blocks: slice = slice(None), **options: Any) -> _Net:
    model = _Net()
    for block in list(model.blocks)[blocks]:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def _half_unsynced() -> Case:
    model = _sharded()
    for block in model.blocks[:2]:
        block.set_requires_gradient_sync(False, recurse=False)
    return _stepping(model)


def _lost_micro_batches() -> Case:
    model, optimizer, _ = _stepping(_sharded())

    def step() -> None:
        for number in range(2):
            model.set_requires_gradient_sync(number == 0)
            _loss(model, number).backward()
        optimizer.step()

    return model, optimizer, step


def _half_recomputed() -> Case:
    model = _Net()
    for index in (0, 1):
        model.blocks[index] = checkpoint_wrapper(model.blocks[index])
    return _stepping(Ddp(model))


def _step_each() -> Case:
    model = Ddp(_Net())
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        for number in range(4):
            _loss(model, number).backward()
            optimizer.step()
            optimizer.zero_grad()

    return model, optimizer, step


def _no_pipeline() -> Case:
    model = _Net()
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        for number in range(4):
            _loss(model, number, same=True).backward()
        optimizer.step()

    return model, optimizer, step


def _cut(blocks: int = 4, *, names: tuple[str, ...] | None = None) -> Case:
    model, mesh = _Net(), init_device_mesh("cpu", (2,), mesh_dim_names=names)
    for block in model.blocks[:blocks]:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return _stepping(model, torch.optim.AdamW(model.parameters(), foreach=False), same=True)


def _rank_zeros_own() -> Case:
    """Averaged first; then blocks get what one rank had."""
    model, own = Ddp(_Net()), dict[nn.Parameter, torch.Tensor]()
    for param in model.module.blocks.parameters():
        param.register_hook(lambda grad, param=param: own.__setitem__(param, grad.clone()))

    def replace() -> None:
        for param, grad in own.items():
            dist.broadcast(grad, 0)
            param.grad = grad

    return _stepping(model, after=replace)


def _averaged_by_hand(then: Callable[[nn.Module], object]) -> Case:
    model = _Net()

    def after() -> None:
        _average(model)
        then(model)

    return _stepping(model, after=after)


def _averaged_in_the_step() -> Case:
    model = _Net()

    class Averaging(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            _average(model)
            return super().step(closure)

    return _stepping(model, Averaging(model.parameters()))


def _ignoring() -> Case:
    model = _Net()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model, ignored_params={model.scale})

    def after() -> None:
        assert model.scale.grad is not None
        dist.all_reduce(model.scale.grad)
        model.scale.grad.div_(2)

    return _stepping(model, after=after)


def _sparse() -> Case:
    model = Ddp(_Net(sparse=True))
    return _stepping(model, torch.optim.SGD(model.parameters(), lr=0.1))


def _decayed(model: nn.Module) -> None:
    for param in model.parameters():
        if param.grad is not None:
            param.grad.add_(param.detach(), alpha=0.1)


TWO = {"gradient-accumulation": {"micro_batches": 2}}
# The plan, the loop, and what must be named; "" where the loop is correct.
CASES: dict[str, tuple[dict[str, Any], Callable[[], Case], str]] = {
    "half of the blocks unreduced": ({"fsdp2": {}}, _half_unsynced, "fsdp2: mean of gradients"),
    "one of two micro-batches": ({"fsdp2": {}, **TWO}, _lost_micro_batches, "fsdp2: mean of gradients"),
    "half sharded apart": ({"fsdp2": {}}, lambda: _stepping(_sharded(slice(2))), "fsdp2: units"),
    "half recomputed": (
        {"ddp": {}, "activation-checkpointing": {}},
        _half_recomputed,
        "activation-checkpointing: planned blocks 0, 1, 2, 3 run again in backward, found 0, 1",
    ),
    "a step each": (
        {"ddp": {}, "gradient-accumulation": {"micro_batches": 4}},
        _step_each,
        "planned 4 micro-batches, found 1",
    ),
    "no pipeline": ({"pipeline": {"micro_batches": 4}}, _no_pipeline, "every rank trains the same ones"),
    "one block whole": ({"tensor-parallel": {}}, lambda: _cut(3, names=("tp",)), "blocks 3 not sharded"),
    "nothing cut": (
        {"tensor-parallel": {}},
        lambda: _stepping(_Net(), same=True),
        "the same matrices on every rank",
    ),
    "what one rank had": ({"ddp": {}}, _rank_zeros_own, "ddp: mean of gradients"),
    "a mesh without names": ({"tensor-parallel": {}}, _cut, ""),
    "clipped by value": (
        {"ddp": {}},
        lambda: _averaged_by_hand(lambda m: nn.utils.clip_grad_value_(m.parameters(), 1e-3)),
        "",
    ),
    "decayed": ({"ddp": {}}, lambda: _averaged_by_hand(_decayed), ""),
    "averaged in the step": ({"ddp": {}}, _averaged_in_the_step, ""),
    "one parameter ignored": ({"fsdp2": {}}, _ignoring, ""),
    "sparse": ({"ddp": {}}, _sparse, ""),
}


def _told(name: str) -> str:
    torch.manual_seed(0)
    techniques, make, _ = CASES[name]
    model, optimizer, step = make()
    try:
        return f"fine: {conform(model, optimizer, {'ranks': 2, 'techniques': techniques}, step=step)}"
    except NotConforming as error:
        return str(error)


def _rank(target: Path) -> None:
    torch.set_num_threads(1)
    with join_world(Plan(ranks=2, uses=(make_use("ddp", {}),))):
        target.write_text(json.dumps({name: _told(name) for name in CASES}))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return child_ranks.answers(__file__, tmp_path_factory.mktemp("told"))


@pytest.mark.parametrize("name", CASES)
def test_partly_applied_techniques_are_reported_and_correct_loops_conform(
    name: str, told: list[dict[str, str]]
) -> None:
    named = CASES[name][2]
    for of_rank in told:
        assert of_rank[name].startswith("the plan was not applied" if named else "fine"), of_rank[name]
        assert named in of_rank[name], of_rank[name]


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
    child_ranks.leave()
