"""Axial parallelism in one process: communicated bytes, sharded sizes, and searches that propose it."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from memfit.catalog import machine
from memfit.cost.op_time import time_model
from memfit.cost.stream_simulator import collective_size
from memfit.jobs.builtin.alphafold.evoformer import EvoformerBlock, Widths
from memfit.planner.block_traces import BlockTracer
from memfit.planner.evaluate import Predictor
from memfit.planner.grid_search import find
from memfit.planner.parallelism_grid import Limits
from memfit.planner.request import job_facts
from memfit.techniques.axial import Axial, Whole
from memfit.techniques.registry import TECHNIQUES, make_use
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.machine import Calibration
from memfit.types.plan import EffectClass, Plan

ROWS, N, C, RANKS = 8, 12, 16, 2
WIDTHS = Widths(
    c_m=C, c_z=C, msa_heads=2, msa_head_width=8, pair_heads=2, pair_head_width=8, triangle=C, outer=4
)


class _Block(Axial):
    def __init__(self) -> None:
        super().__init__()
        self.block = EvoformerBlock(WIDTHS)

    def forward(self, batch: Any) -> torch.Tensor:
        m, z = self.across.own(batch["m"], 1), self.across.own(batch["z"], 1)
        m, z = self.block(m, z, batch["rows"], batch["pairs"])
        m, z = self.across.whole(m, 1, ROWS), self.across.whole(z, 1, N)
        return m.square().mean() + z.square().mean()


def _job() -> Job:
    batch = {
        "m": torch.zeros(1, ROWS, N, C),
        "z": torch.zeros(1, N, N, C),
        "rows": torch.ones(1, ROWS, N),
        "pairs": torch.ones(1, N, N),
    }
    return Job(
        name="block",
        build_model=_Block,
        make_batch=lambda step, seed: batch,
        loss=lambda model, given: model(given),
        batch_size=1,
    )


def _plan(ranks: int = RANKS, **uses: Any) -> Plan:
    return Plan(ranks=ranks, uses=tuple(make_use(k.replace("_", "-"), v) for k, v in uses.items()))


def test_collectives_of_one_block_match_a_count_by_hand() -> None:
    """All-gathered: three biases and the right sides of the outer product and of the outgoing triangles, the
    latter two again in backward. The incoming triangles are reduce-scattered, and all-gathered in backward.
    The MSA goes through an all-to-all and back, as do the pairs around attention of the ending node. At the
    end of the model both are all-gathered."""
    traced = trace(_job(), _plan(axial_parallel={}, ddp={}), steps=1)
    found = collections.Counter(collective_size(o) for o in traced.ops if o.op.startswith("_c10d_functional"))
    bias, outer, pairs, rows = 2 * N * N * 4, ROWS * N * 4 * 4, N * N * C * 4, ROWS * N * C * 4
    wanted = collections.Counter(
        {
            ("all_gather", bias): 3,
            ("all_gather", outer): 2,
            ("all_gather", pairs): 2 + 1 + 1,
            ("all_gather", rows): 1,
            ("reduce_scatter", bias): 3,
            ("reduce_scatter", outer): 1,
            ("reduce_scatter", pairs): 1 + 1,
            ("all_to_all", rows // RANKS): 2 + 2,
            ("all_to_all", pairs // RANKS): 2 + 2,
        }
    )
    assert found - collections.Counter({("", 0): found["", 0]}) == wanted


def test_a_single_process_issues_no_collectives() -> None:
    x, whole = torch.randn(2, 3, 4), Whole()
    for same in (whole.own(x, 1), whole.whole(x, 1, 3), whole.turned(x, 1, 2, 3), whole.summed(x, 1)):
        assert same is x
    assert not [o for o in trace(_job(), Plan()).ops if "c10d" in o.op]


@pytest.mark.parametrize("ranks", [2, 5, 8])
def test_a_rank_holds_its_share_of_the_pair_activations(ranks: int) -> None:
    """Five and eight ranks do not divide twelve residues, so the last parts are padded."""
    traced = trace(_job(), _plan(ranks, axial_parallel={"degree": ranks}, ddp={}), steps=1, rank=ranks - 1)
    largest = max(a.requested_bytes for a in traced.allocations if a.module.endswith("pairs.transition.up"))
    assert largest == math.ceil(N / ranks) * N * 4 * C * 4


@pytest.mark.parametrize(
    "other", ["context-parallel", "tensor-parallel", "zero", "pipeline", "compile", "optimal-checkpointing"]
)
def test_axial_parallelism_refuses_incompatible_techniques(other: str) -> None:
    assert other in TECHNIQUES
    with pytest.raises(UserError, match="cannot be combined"):
        trace(_job(), _plan(4, axial_parallel={}, ddp={}, **{other: {}}))


def test_a_model_without_axial_modules_is_refused_with_the_required_base_class() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(C, C))

    job = dataclasses.replace(_job(), build_model=build, loss=lambda model, given: model(given["m"]).mean())
    with pytest.raises(UserError, match=r"derive from memfit\.techniques\.axial\.Axial"):
        trace(job, _plan(axial_parallel={}))


LEFT_OUT = set(TECHNIQUES) - {"axial-parallel", "fsdp2", "activation-checkpointing"}


class _Recycled(Axial):
    """Blocks that run twice, the second time with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(C, C)
        self.blocks = nn.ModuleList(EvoformerBlock(WIDTHS) for _ in range(3))

    def forward(self, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            z = self._through(batch, batch["z"])
        return self._through(batch, z).square().mean()

    def _through(self, batch: Any, z: torch.Tensor) -> torch.Tensor:
        m, z = self.across.own(batch["m"], 1), self.across.own(self.embed(z), 1)
        for block in self.blocks:
            m, z = block(m, z, batch["rows"], batch["pairs"])
        return self.across.whole(z, 1, N) + m.sum() * 0


@pytest.mark.quick_cases("True")
@pytest.mark.parametrize("cut", [True, False])
def test_search_cuts_one_sample_across_devices_and_its_sketches_match_full_estimates(cut: bool) -> None:
    job = dataclasses.replace(_job(), build_model=_Recycled, blocks="blocks")
    on = machine("4xA100-80GB" if cut else "A100-80GB")
    model = time_model(on.device, Calibration())
    assert model is not None
    limits = Limits(
        ranks=on.device_count,
        per_host=4,
        batch=1,
        blocks=3,
        device="cuda",
        context=(1, 4),
        pipeline=False,
        without=frozenset(LEFT_OUT),
        effect=EffectClass.E1,
    )
    found = find(BlockTracer(job, "cuda"), on, model, limits, (2.0**40, 2.0**50))
    predictor = Predictor(job=job, machine=on, job_facts=job_facts(job, "cuda", on.device_count))
    assert found.sketches
    for sketch in found.sketches[:2]:
        used = sketch.plan.get("axial-parallel")
        assert used == (make_use("axial-parallel", {"degree": 4}) if cut else None)
        whole = predictor.whole(sketch.plan)
        assert sketch.allocated_bytes == pytest.approx(whole.allocated_bytes.value, rel=0.15)
        assert whole.step_s is not None
