"""Sketches of context-parallel plans, composed from traces of three blocks, against whole traces."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import nn

from memfit.catalog import machine
from memfit.cost.op_time import time_model
from memfit.planner.block_traces import BlockTracer
from memfit.planner.evaluate import Predictor
from memfit.planner.grid_search import Sketch, _GridPredictor, sketch_fields
from memfit.planner.parallelism_grid import Limits, grids
from memfit.planner.request import job_facts
from memfit.techniques.registry import make_use
from memfit.types.job import Job
from memfit.types.machine import Calibration

WIDTH, HEADS, LENGTH, VOCAB, BLOCKS, ROWS = 2048, 16, 4096, 1024, 6, 16
ON = machine("8xH100-SXM")


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.packed, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.packed(self.norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*packed, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class _Model(nn.Module):
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
        name="causal",
        build_model=_Model,
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
    few = frozenset({"compile", "zero", "activation-offload", "adamw-single", "adamw-8bit"})
    limits = Limits(
        ranks=8,
        per_host=8,
        batch=ROWS,
        blocks=BLOCKS,
        device="cuda",
        without=few,
        pipeline=False,
        tensor=(1,),
        context=(1, 2, 4, 8),
    )
    return _GridPredictor(traced, ON, model, limits), limits


def _sketch(context: int, samples: int) -> Sketch:
    """Return the sketch of the plan with FSDP2, float32 weights and this micro-batch."""
    found, limits = _grid_predictor()
    state = (make_use("fsdp2", {"precision": "bf16"}),)
    for grid in grids(limits):
        if grid.layout.context == context and grid.layout.tensor == 1 and state in grid.states:
            micro = next(i for i, (size, _) in enumerate(grid.micro) if size == samples)
            part = dataclasses.replace(grid, states=(state,), inside=((),), ends=((),), away=((),))
            predictions = found.predict(part, "bf16")
            assert predictions is not None
            return Sketch(part, *sketch_fields(part, predictions, micro))
    raise AssertionError((context, samples))


@pytest.mark.parametrize(
    ("context", "samples", "tolerance"), [(2, 4, 0.1), (4, 8, 0.1), (8, 16, 0.1), (8, 2, 0.3)]
)
def test_law_the_step_time_of_context_parallel_sketches_is_that_of_a_whole_trace(
    context: int, samples: int, tolerance: float
) -> None:
    sketch = _sketch(context, samples)
    whole = Predictor(job=job(), machine=ON, job_facts=job_facts(job(), "cuda", 8)).whole(sketch.plan)
    assert whole.step_s is not None
    assert sketch.step_s == pytest.approx(whole.step_s.value, rel=tolerance)


def test_ranks_that_share_a_sample_average_gradients_as_data_parallel_ranks_do_and_not_twice() -> None:
    found, _ = _grid_predictor()
    parts = found.composer.traced.parts(found.composer._key(context=2), lambda ops: 0.0)
    kinds = {kind for piece in (parts.before, parts.block, parts.after) for kind, _ in piece.backward_travel}
    assert kinds == {"all_gather", "reduce_scatter"}  # of keys and values, and of their gradients
