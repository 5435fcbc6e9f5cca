"""Pipelines whose first and last stage have fewer blocks: their division, and prices against traces."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memfit.catalog import machine
from memfit.cost.op_time import time_model
from memfit.planner.block_traces import BlockTracer
from memfit.planner.evaluate import Predictor
from memfit.planner.grid_search import Sketch, _GridPredictor, _with_ends, sketch_fields
from memfit.planner.parallelism_grid import Limits, _best_fewer, grids, rank_blocks
from memfit.planner.request import job_facts
from memfit.techniques.parallel.stage_sizes import stage_sizes
from memfit.techniques.registry import make_use
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.machine import Calibration

WIDTH, LENGTH, VOCAB, BLOCKS, ROWS = 2048, 2048, 65536, 8, 8
ON = machine("4xH100-SXM")


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class _HeavyHead(nn.Module):
    """The head takes as long as several blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([_Block() for _ in range(BLOCKS)])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


@functools.cache
def job() -> Job:
    return Job(
        name="heavy head",
        build_model=_HeavyHead,
        make_batch=lambda step, seed: {
            name: torch.zeros(ROWS, LENGTH, dtype=torch.int64) for name in ("x", "y")
        },
        loss=lambda model, b: nn.functional.cross_entropy(model(b["x"]).flatten(0, 1), b["y"].flatten()),
        batch_size=ROWS,
        tokens_per_batch=ROWS * LENGTH,
    )


@functools.cache
def _grid_predictor() -> tuple[_GridPredictor, Limits]:
    model = time_model(ON.device, Calibration())
    assert model is not None
    traced = BlockTracer(job(), "cuda")
    few = frozenset({"compile", "zero", "fsdp2", "activation-offload", "adamw-single"})
    limits = Limits(ranks=4, per_host=4, batch=ROWS, blocks=BLOCKS, device="cuda", without=few)
    limits = _with_ends(traced, model, limits, "bf16")
    return _GridPredictor(traced, ON, model, limits), limits


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 4), st.integers(0, 4))
def test_law_all_blocks_are_on_a_stage_and_the_ends_have_fewer(
    blocks: int, stages: int, first: int, last: int
) -> None:
    try:
        sizes = stage_sizes(blocks, stages, first, last)
    except UserError:
        assert (blocks + first + last) // stages <= first + last
        return
    assert sum(sizes) == blocks
    assert min(sizes) >= 1
    sizes[0] += first
    sizes[-1] += last
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_a_rank_has_the_blocks_of_all_its_stages() -> None:
    assert rank_blocks(10, 4, 1, "1f1b", (0, 0)) == (3, 3, 2, 2)
    assert rank_blocks(10, 4, 1, "1f1b", (1, 1)) == (2, 3, 3, 2)
    assert rank_blocks(10, 2, 2, "interleaved", (0, 2)) == (6, 4)
    assert rank_blocks(10, 2, 2, "zero-bubble-v", (0, 0)) == (5, 5)


def test_ends_have_fewer_blocks_only_where_the_busiest_rank_gains() -> None:
    assert _best_fewer(32, 4, 1, "1f1b", (0.0, 0.0)) == (0, 0)
    assert _best_fewer(32, 4, 1, "1f1b", (0.0, 2.4)) == (0, 2)  # 9, 9, 8, 6 and the head, not 8, 8, 8, 8
    assert _best_fewer(80, 8, 1, "1f1b", (0.0, 1.2)) == (0, 0)  # a gain of 2 %
    assert _best_fewer(4, 4, 1, "1f1b", (0.0, 2.0)) == (0, 0)  # each stage needs a block


def _sketch(fewer: tuple[int, int], stages: int, schedule: str) -> Sketch:
    found, limits = _grid_predictor()
    state = (make_use("bf16-autocast", {}),)
    for grid in grids(dataclasses.replace(limits, ranks=stages)):
        at = grid.layout
        if (at.fewer, at.stages, at.schedule) == (fewer, stages, schedule) and state in grid.states:
            micro = next(i for i, (_, count) in enumerate(grid.micro) if count == ROWS)
            part = dataclasses.replace(grid, states=(state,), inside=((),), ends=((),), away=((),))
            predictions = found.predict(part, "autocast")
            assert predictions is not None
            return Sketch(part, *sketch_fields(part, predictions, micro))
    raise AssertionError((fewer, stages, schedule))


def test_stages_around_a_heavy_head_are_uneven_in_the_search() -> None:
    _, limits = _grid_predictor()
    assert limits.ends[1] > 2
    pipelines = {(g.layout.stages, g.layout.fewer) for g in grids(limits) if g.layout.schedule == "1f1b"}
    assert {(2, (0, 0)), (4, (0, 0))} < pipelines
    assert any(fewer[1] > 0 for _, fewer in pipelines)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("stages", [2, 4])
def test_law_the_price_of_uneven_stages_is_that_of_a_whole_trace(stages: int, schedule: str) -> None:
    _, limits = _grid_predictor()
    fewer = _best_fewer(BLOCKS, stages, 1, schedule, limits.ends)
    assert fewer != (0, 0)
    times = []
    for sizes in ((0, 0), fewer):
        sketch = _sketch(sizes, stages, schedule)
        on = dataclasses.replace(ON, device_count=stages)
        whole = Predictor(job=job(), machine=on, job_facts=job_facts(job(), "cuda", stages)).whole(
            sketch.plan
        )
        assert whole.step_s is not None
        assert sketch.allocated_bytes == pytest.approx(whole.allocated_bytes.value, rel=0.15)
        assert sketch.step_s == pytest.approx(whole.step_s.value, rel=0.15)
        times.append((sketch.step_s, whole.step_s.value))
    assert all(uneven < even for even, uneven in zip(*times, strict=True))
