"""Only one of several identical blocks is examined, with the result of running every block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import words
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memfit.jobs.builtin.gpt import Gpt, GptSize
from memfit.model import linear_roles
from memfit.model.blocks import attribute_period, equal_blocks, find_stacks
from memfit.techniques import compiled_regions
from memfit.techniques.parallel import block_dataflow
from memfit.techniques.recompute.checkpointing import recompute
from memfit.techniques.registry import make_use
from memfit.trace.operators import make_fake
from memfit.trace.tracer import trace
from memfit.types.job import Job
from memfit.types.plan import Plan

SIZE = GptSize(layers=6, width=64, heads=8, length=16, vocabulary=64, batch_size=4)


class Block(nn.Module):
    def __init__(self, index: int, **more: Any) -> None:
        super().__init__()
        self.index, self.up = index, nn.Linear(16, 16)
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(x)


def test_identical_blocks_are_represented_by_their_second_occurrence() -> None:
    assert equal_blocks([Block(i) for i in range(5)]) == [0, 1, 1, 1, 1]
    assert equal_blocks([Block(i, window=50 + i % 2) for i in range(6)]) == [0, 1, 2, 3, 2, 3]
    assert equal_blocks([Block(i, sizes=[9, 9]) for i in range(4)]) == [0, 1, 1, 1]
    assert equal_blocks([Block(i, scale=float(i > 2)) for i in range(5)]) == [0, 1, 1, 3, 4]


class Sparse(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.index % 4 else x


class Routed(Block):
    kinds = ("local", "local", "global")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.kinds[self.index % 3] == "local" else x


class Looked(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = self.kinds[self.index]
        return super().forward(x) if kind == "local" else x


class Aliased(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = self.index
        return super().forward(x) if index else x


class Cached(Block):
    """Uses its number only to find its place in a cache, as decoders do."""

    def forward(self, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
        if cache is not None:
            if self.index is None:
                raise ValueError(f"block {self.index} needs a number")
            x = cache.update(x, self.index) + cache.layers[self.index].keys
        return super().forward(x)


def test_blocks_that_compute_with_their_number_represent_themselves() -> None:
    for kind in (Sparse, Routed, Looked, Aliased):
        assert equal_blocks([kind(i) for i in range(5)]) == [0, 1, 2, 3, 4], kind
    assert equal_blocks([Cached(i) for i in range(5)]) == [0, 1, 1, 1, 1]
    assert equal_blocks([Block(i, sizes=[9, i]) for i in range(4)]) == [0, 1, 2, 3]


def test_an_attribute_that_equals_the_number_of_one_block_only_does_not_set_it_apart() -> None:
    assert equal_blocks([Block(i, heads=3) for i in range(5)]) == [0, 1, 1, 1, 1]


def test_the_period_of_attributes_is_that_of_numbers_bools_and_strings() -> None:
    assert attribute_period([Block(i, other=object()) for i in range(6)]) == 1
    assert attribute_period([Block(i, window=50 + i % 2) for i in range(7)]) == 2
    assert attribute_period([Block(i, is_global=i % 3 == 2, name="x") for i in range(6)]) == 3
    assert attribute_period([Block(i, rate=0.1 * i) for i in range(6)]) == 6
    assert attribute_period([Sparse(i) for i in range(6)]) == 6


def test_blocks_that_differ_represent_themselves() -> None:
    blocks = [Block(i) for i in range(5)]
    blocks[2].up = nn.Linear(16, 16, bias=False)
    blocks[4].register_forward_hook(lambda *given: None)
    assert equal_blocks(blocks) == [0, 1, 2, 1, 4]
    shared = [Block(i) for i in range(3)]
    shared[2].up.weight = shared[0].up.weight
    assert equal_blocks(shared) == [0, 1, 2]
    apart = [Block(i, forward=functools.partial(Block.forward, object())) for i in range(3)]
    assert equal_blocks(apart) == [0, 1, 2]


def test_blocks_with_equally_wrapped_forwards_are_identical() -> None:
    blocks = [Block(i) for i in range(4)]
    for block in blocks:
        recompute(block)
    recompute(blocks[3], determinism_check="none")
    assert equal_blocks(blocks) == [0, 1, 1, 3]


def _unlike(blocks: Any) -> list[int]:
    return list(range(len(blocks)))


@pytest.mark.parametrize(
    "more", [{}, {"tensor-parallel": {"sequence": True}}, {"selective-checkpointing": {}}]
)
def test_a_pipeline_chain_equals_the_one_from_running_every_block(
    more: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = 4 if "tensor-parallel" in more else 2
    plan = Plan(ranks=ranks, uses=(make_use("pipeline", {}), *(make_use(k, v) for k, v in more.items())))
    seen: list[block_dataflow.Chain] = []
    inner = block_dataflow.record_chain
    record = lambda bench, parts: seen.append(inner(bench, parts)) or seen[-1]  # noqa: E731
    monkeypatch.setattr("memfit.techniques.parallel.pipeline_stages.record_chain", record)
    job = words(blocks=6)
    traces = [trace(job, plan, device="cuda")]
    monkeypatch.setattr(block_dataflow, "equal_blocks", _unlike)
    monkeypatch.setattr(linear_roles, "equal_blocks", _unlike)
    monkeypatch.setattr("memfit.techniques.parallel.tensor_parallel._SEEN", {})
    traces.append(trace(job, plan, device="cuda"))
    one, other = seen
    assert (one.uses, one.carried, one.returns, one.before) == (
        other.uses,
        other.carried,
        other.returns,
        other.before,
    )
    births = [[(a.op, a.module, a.size_bytes) for a in t.allocations if a.step] for t in traces]
    assert births[0] == births[1]
    assert [o.signature for o in traces[0].ops] == [o.signature for o in traces[1].ops]


def _bare(count: int = 4) -> Job:
    """A model whose container of blocks is the model itself. Each block has a layer that it does not run."""
    return Job(
        name="bare",
        build_model=lambda: nn.Sequential(*(Block(i, spare=nn.Linear(16, 16)) for i in range(count))),
        make_batch=lambda step, seed: torch.zeros(8, 16),
        loss=lambda model, batch: model(batch).square().mean(),
        batch_size=8,
    )


def test_parameters_of_a_bare_sequential_belong_to_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[block_dataflow.Chain] = []
    inner = block_dataflow.record_chain
    record = lambda bench, parts: seen.append(inner(bench, parts)) or seen[-1]  # noqa: E731
    monkeypatch.setattr("memfit.techniques.parallel.pipeline_stages.record_chain", record)
    trace(_bare(), Plan(ranks=2, uses=(make_use("pipeline", {}),)), device="cuda")
    parts = [f"{layer}.{name}" for layer in ("up", "spare") for name in ("weight", "bias")]
    assert seen[0].uses == {f"{i}.{part}": {i} for i in range(4) for part in parts}


def test_each_block_of_a_bare_sequential_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    class Recorded(compiled_regions.Region):
        def __init__(self, module: nn.Module, *rest: Any) -> None:
            compiled.append(module)
            super().__init__(module, *rest)

    monkeypatch.setattr(compiled_regions, "Region", Recorded)
    trace(_bare(), Plan(uses=(make_use("compile", {"scope": "parts"}),)))
    assert len(compiled) == len(set(compiled)) == 4


def test_a_container_inside_a_block_of_a_bare_sequential_is_no_stack_of_its_own() -> None:
    def block() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)))

    model = nn.Sequential(block(), block())
    assert list(find_stacks(model).values()) == [list(model.children())]


def _plain(block: Block, x: torch.Tensor) -> torch.Tensor:
    return x + block.up(x)


def _storing(block: Block, x: torch.Tensor) -> torch.Tensor:
    block.last = x  # another block may read it, which breaks the chain
    return _plain(block, x)


def _in_place(block: Block, x: torch.Tensor) -> torch.Tensor:
    return x.add_(block.up(x))


@pytest.mark.parametrize(
    ("work", "runs"), [(_plain, [0, 1]), (_storing, [0, 1, 2, 3, 4]), (_in_place, [0, 1, 2, 3, 4])]
)
def test_blocks_with_side_effects_are_all_run(
    work: Callable[[Block, torch.Tensor], torch.Tensor], runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def forward(self: Block, x: torch.Tensor) -> torch.Tensor:
        ran.append(self.index)
        return work(self, x)

    monkeypatch.setattr(Block, "forward", forward)
    fake = FakeTensorMode()
    with fake:
        blocks = [Block(i) for i in range(5)]
        named = [(f"blocks.{i}.{n}", p) for i, b in enumerate(blocks) for n, p in b.named_parameters()]
        names = {key: name for name, p in named for key in block_dataflow._storages(p)}
        recorder = block_dataflow._Recorder(names, "blocks", blocks)
        x: Any = torch.zeros(2, 16)
        with torch.no_grad(), recorder:
            for index, block in enumerate(blocks):
                x = recorder._around(index, block)(x)
    assert ran == runs


def test_linear_roles_equal_those_from_running_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Gpt(SIZE)
    names = [f"blocks.{i}" for i in range(SIZE.layers)]
    tokens = torch.zeros(2, 8, dtype=torch.long)

    class Given:
        make_batch = staticmethod(lambda step, seed: tokens)
        loss = staticmethod(lambda model, batch: model(batch).sum())

    one = linear_roles.observe(Given, model, names, {})
    monkeypatch.setattr(linear_roles, "equal_blocks", _unlike)
    other = linear_roles.observe(Given, model, names, {})
    assert one.inside == other.inside
    told = [
        {
            n: (f.role, f.output_dims, f.parts, f.reaches_rows, flow.gather_at(n))
            for n, f in flow.linears.items()
        }
        for flow in (one, other)
    ]
    assert told[0] == told[1]
    assert set(one.views) <= set(other.views)


def test_a_block_with_its_own_roles_represents_itself() -> None:
    model = Gpt(SIZE)
    names = [f"blocks.{i}" for i in range(SIZE.layers)]
    roles = {f"{name}.up": linear_roles.COLWISE for name in names} | {"blocks.4.up": ""}
    found = [linear_roles._twins(model, names, roles), linear_roles._twins(model, names, {})]
    assert found == [[0, 1, 1, 1, 4, 1], [0, 1, 1, 1, 1, 1]]


def test_a_faked_tensor_equals_torchs_own_fake_tensor() -> None:
    mode = FakeTensorMode()
    for _ in range(2):
        meta = torch.empty(3, 4, device="meta", dtype=torch.bfloat16)
        mine, own = make_fake(mode, meta, torch.device("cpu")), FakeTensor(mode, meta, torch.device("cpu"))
        assert vars(mine) == vars(own)
        assert torch._C._dispatch_keys(mine) == torch._C._dispatch_keys(own)
        assert (mine.shape, mine.dtype, mine.device) == (own.shape, own.dtype, own.device)
