"""Traces of one of several ranks: collectives, and models that must be supported as they are."""

from __future__ import annotations

import collections
import dataclasses
import sys
from typing import Any

import pytest
import torch
from tiny import regression, words
from torch import nn
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional

from memfit.cost.memory import memory_profile
from memfit.jobs.builtin.gpt import Gpt, GptSize
from memfit.techniques.parallel.gathered_attention import GatheredAttention, SequenceRanks
from memfit.techniques.registry import make_use
from memfit.trace.fake_process_group import optimizer_steps_only
from memfit.trace.streams import group_of
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.trace import Category, Phase


def on_two(**uses: dict[str, Any]) -> Plan:
    return Plan(ranks=2, uses=tuple(make_use(k.replace("_", "-"), v) for k, v in uses.items()))


@pytest.mark.parametrize("name", ["3", "ad56679d2c95"])
def test_a_collective_is_of_its_group_whatever_torch_calls_that(name: str) -> None:
    """Groups that ranks make without the others have a checksum as their name."""
    operators, tensor = torch.ops._c10d_functional, torch.ones(2)
    assert group_of(operators.all_reduce.default, (tensor, "sum", name)) == name
    assert group_of(operators.all_to_all_single.default, (tensor, [1, 1], [1, 1], name)) == name
    if hasattr(operators, "isend"):  # of newer versions of torch
        assert group_of(operators.isend.default, (tensor, 1, 0, name)) == ""
    assert group_of(torch.ops.aten.add.Tensor, (tensor, tensor)) == ""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("more", [{}, {"activation_checkpointing": {}, "bf16_parameters": {}}])
def test_a_primed_interleaved_pipeline_has_the_peaks_of_a_whole_first_step(
    rank: int, more: dict[str, Any]
) -> None:
    """A first step of the optimizer alone leaves phase peaks and operators as a whole first step does."""
    pipeline = {"schedule": "interleaved", "virtual": 2, "micro_batches": 4}
    plan = on_two(pipeline=pipeline, **more)
    job = words(blocks=8)
    whole = trace(job, plan, device="cuda", rank=rank)
    with optimizer_steps_only():
        primed = trace(job, plan, device="cuda", rank=rank)
    profiles = [memory_profile(t, Calibration()) for t in (whole, primed)]
    assert profiles[0].phase_peak_bytes == profiles[1].phase_peak_bytes
    ops = [
        collections.Counter((o.op, o.phase, o.module) for o in t.ops if o.step == 1) for t in (whole, primed)
    ]
    assert not ops[0] - ops[1]
    assert {op for op, *_ in ops[1] - ops[0]} <= {
        "aten.ones.default",
        "aten.zeros.default",
    }  # of a first pass
    assert len(primed.ops) < 0.8 * len(whole.ops)


@pytest.mark.parametrize(("sync", "times"), [("last", 1), ("every", 4)])
def test_pipeline_stages_reduce_once_or_per_micro_batch_as_sync_says(sync: str, times: int) -> None:
    """Once for each block of a rank's stages, or for each of four micro-batches, as torch's schedules do."""
    pipeline = {"schedule": "interleaved", "virtual": 2, "micro_batches": 4}
    uses = (make_use("pipeline", pipeline), make_use("fsdp2", {"reshard": False, "sync": sync}))
    traced = trace(words(blocks=8), Plan(ranks=4, uses=uses), device="cuda")
    made = collections.Counter(o.op for o in traced.ops if o.step == 1 and o.phase is not Phase.OPTIMIZER)
    groups = 4 + 1  # blocks, and what is beside them
    assert made["c10d._reduce_scatter_base_.default"] == groups * times
    assert groups * times <= made["c10d._allgather_base_.default"] <= groups * (2 * times - 1)


def test_collectives_inside_compiled_blocks_are_separate_operators() -> None:
    size = GptSize(layers=2, width=32, heads=2, length=16, vocabulary=64, batch_size=4)
    tokens = torch.zeros(4, 16, dtype=torch.long)
    job = Job(
        name="gpt",
        build_model=lambda: Gpt(size),
        make_batch=lambda step, seed: tokens,
        batch_size=4,
        loss=lambda model, batch: model(batch).float().logsumexp(-1).mean(),
    )
    made = []
    for uses in ({}, {"compile": {}}):
        traced = trace(job, on_two(context_parallel={"degree": 2}, **uses), device="cuda")
        made.append(sum(o.op.startswith("_c10d_functional.all_gather") for o in traced.ops))
    assert 0 < made[1] <= made[0]


def test_the_input_of_a_collective_stays_allocated_until_its_result_is_used() -> None:
    """A tensor that is waited for is a wrapper to autograd, which does not add to a wrapper in place."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        x = model(batch[0])
        gathered = collectives.all_gather_single(x.detach().exp(), 0, torch.distributed.group.WORLD)
        meanwhile = functional.mse_loss(x, batch[1]).cos()
        return meanwhile + gathered.mean()

    found = trace(dataclasses.replace(regression(), loss=loss), on_two(ddp={}))
    sent = next(a for a in found.allocations if a.op == "aten.exp.default")
    meanwhile = next(a for a in found.allocations if a.op == "aten.cos.default")
    used = next(a for a in found.allocations if a.op == "aten.mean.default")
    assert sent.end is not None
    assert meanwhile.start < sent.end < used.start


class _Changed(nn.Module):
    """Changes in place what a module with parameters has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(functional.relu_(self.inner(x)))


def test_a_trace_of_ranks_restores_the_exception_hook() -> None:
    before = sys.excepthook
    trace(regression(), on_two(ddp={}))
    assert sys.excepthook is before


def test_zero_3_supports_models_with_in_place_operators() -> None:
    found = trace(regression(_Changed), on_two(zero={"stage": 3, "reduce_bucket_elements": 1000}))
    assert found.parameter_count == 8 * 16 + 16 + 16 * 4 + 4


class _Beside(nn.Module):
    """Lists of modules beside the blocks only hold other modules and cannot be called."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.ModuleList([nn.Linear(8, 16)])
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.after = nn.ModuleDict({"out": nn.Linear(16, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before[0](x)
        for block in self.blocks:
            x = block(x)
        return self.after["out"](x)


def test_fsdp2_shards_modules_in_lists_beside_the_blocks() -> None:
    job = dataclasses.replace(regression(_Beside), blocks="blocks")
    found = trace(job, on_two(fsdp2={"units": "parts"}))
    shards = sum(
        a.size_bytes for a in found.allocations if a.category is Category.PARAMETER and a.end is None
    )
    assert shards == 256 + 64 + 3 * (512 + 64) + 128 + 64  # of half the rows each


def test_chunked_cross_entropy_needs_fsdp2_without_resharding() -> None:
    trace(words(), on_two(chunked_cross_entropy={}, fsdp2={"reshard": False}))
    with pytest.raises(UserError, match="has freed the head's weight"):
        trace(words(), on_two(chunked_cross_entropy={}, fsdp2={}))


def test_chunked_cross_entropy_needs_a_zero_that_keeps_parameters_whole() -> None:
    """Persistent parameters are no way out: in the first step they are freed, too."""
    trace(words(), on_two(chunked_cross_entropy={}, zero={"stage": 2}))
    with pytest.raises(UserError, match="use zero with stage=0, 1 or 2"):
        trace(words(), on_two(chunked_cross_entropy={}, zero={"stage": 3, "persist_elements": 10**9}))


def test_tensor_parallelism_does_not_split_the_vocabulary_of_an_island() -> None:
    job = dataclasses.replace(words(), islands=("head",))
    with pytest.raises(UserError, match=r"vocabulary of head.* leave the module out of Job\(islands"):
        trace(job, on_two(tensor_parallel={"vocabulary": "gathered"}))


def test_context_parallelism_refuses_attention_inside_a_module_of_torch() -> None:
    across = SequenceRanks(group="", rank=1, ranks=2, device="cpu", length=8)
    module, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.ones(1, 8, 4)
    with GatheredAttention(across), pytest.raises(UserError, match=r"MultiheadAttention"):
        module(x, x, x)


def test_context_parallelism_replaces_only_ranges_that_count_the_positions_of_a_part() -> None:
    across = SequenceRanks(group="", rank=1, ranks=2, device="cpu", length=4)
    with GatheredAttention(across):
        counts = torch.arange(4), torch.arange(0, 4), torch.arange(4, 4), torch.arange(1, 4)
    assert [c.tolist() for c in counts] == [[2, 3, 4, 5], [2, 3, 4, 5], [], [1, 2, 3]]


@pytest.mark.parametrize("rows", [0, 1, 5, 8, 9])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_parameter_chunks_equal_those_of_fsdp(rows: int, count: int) -> None:
    from torch.distributed.fsdp._fully_shard._fsdp_common import _chunk_with_empty

    from memfit.trace.fake_process_group import _Chunks

    tensor = torch.arange(2.0 * rows).reshape(rows, 2)
    theirs, mine = _chunk_with_empty(tensor, count, dim=0), _Chunks(tensor, count, dim=0)
    for index, part in enumerate(theirs):
        assert torch.equal(mine[index], part), index  # the shapes are equal, too
