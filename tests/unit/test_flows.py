"""Streams, process groups and waits of traced calls, and the kernels that stand for fused operators."""

from __future__ import annotations

import types

import pytest
import torch
from tiny import words

from memfit.techniques.registry import make_use as use
from memfit.techniques.synthetic_kernel import read_bytes
from memfit.trace.tracer import trace
from memfit.types.plan import Plan, Use
from memfit.types.trace import OpCall, Phase, Trace

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")


def traced(*uses: Use, ranks: int = 1) -> Trace:
    return trace(words(blocks=3), Plan(ranks=ranks, uses=uses), device="cuda")


def calls(found: Trace, name: str) -> list[OpCall]:
    return [o for o in found.ops if o.op.startswith(name) and o.step == found.steps - 1]


def test_sharded_parameters_are_gathered_on_a_stream_that_compute_waits_for() -> None:
    found = traced(use("fsdp2", {}), ranks=4)
    gathers, scatters = calls(found, "c10d._allgather"), calls(found, "c10d._reduce_scatter")
    assert len(gathers) == 8  # three blocks and the root, in forward and in backward
    assert len(scatters) == 4
    (side,) = {g.stream for g in gathers}
    (other,) = {s.stream for s in scatters}
    assert side.startswith("stream")
    assert other not in ("", side)
    waits = [o.waits for o in found.ops if o.step == 1 and o.stream == "" and o.waits]
    assert sum(awaited == side for awaited, _ in waits) >= len(gathers)
    assert any(awaited == other for awaited, _ in waits)
    assert {len(found.members[g.group]) for g in gathers} == {4}


def test_a_gather_does_not_wait_for_the_compute_that_hides_it() -> None:
    found = traced(use("fsdp2", {}), ranks=4)
    side = calls(found, "c10d._allgather")[0].stream
    lags = [o.waits[1] for o in found.ops if o.stream == side and o.waits and o.waits[0] == ""]
    assert max(lags) > 3


def test_ddp_all_reduce_runs_in_backward_on_the_stream_of_its_group() -> None:
    (reduced,) = calls(traced(use("ddp", {}), ranks=2), "c10d.allreduce")
    assert reduced.phase is Phase.BACKWARD
    assert reduced.stream == f"group {reduced.group}"


def test_functional_collectives_are_waited_for_where_their_result_is_used() -> None:
    found = traced(use("tensor-parallel", {"degree": 2}), ranks=2)
    reduced = calls(found, "_c10d_functional.all_reduce")
    waits = calls(found, "_c10d_functional.wait_tensor")
    assert reduced
    assert {w.waits for w in waits} == {(reduced[0].stream, 0)}


def test_a_single_rank_has_one_stream_and_no_groups_or_waits() -> None:
    found = traced()
    assert {(o.stream, o.group, o.waits) for o in found.ops} == {("", "", None)}
    assert found.members == {}


def test_compiled_groups_are_single_kernels_that_move_fewer_bytes_than_eager() -> None:
    eager, compiled = traced(), traced(use("compile", {}))
    fused = calls(compiled, "memfit.kernel")
    assert fused
    assert all(o.moved_bytes > 0 for o in fused)
    between = ("aten.mm", "aten.addmm", "aten._foreach")

    def moved(found: Trace) -> int:
        kept = [o for o in found.ops if o.phase in (Phase.FORWARD, Phase.BACKWARD)]
        return sum(o.moved_bytes for o in kept if not o.op.startswith(between))

    assert moved(compiled) < moved(eager)


def test_read_bytes_of_a_distributed_tensor_count_only_this_ranks_shard() -> None:
    part = torch.zeros(4)
    assert read_bytes([types.SimpleNamespace(_local_tensor=part), part, None]) == 32


def test_moved_bytes_of_a_fused_optimizer_include_its_in_place_writes() -> None:
    """It reads parameters, gradients and two moments, and writes all of them but the gradients."""
    found = traced(use("adamw-fused", {}))
    (step,) = calls(found, "aten._fused_adamw_")
    assert step.moved_bytes >= 7 * 4 * found.parameter_count
