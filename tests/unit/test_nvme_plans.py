"""Optimizer state on NVMe in the search for many devices: its plans, and their prices compared with whole
traces."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import nn

from memfit.catalog import machine
from memfit.cost.host import host_holds, with_host_memory
from memfit.cost.op_time import time_model
from memfit.cost.step_time import StorageRates, storage_rates
from memfit.planner.block_traces import BlockTracer
from memfit.planner.capacity import Cap
from memfit.planner.evaluate import Predictor
from memfit.planner.grid_search import Sketch, _GridPredictor, sketch_fields
from memfit.planner.multi_device import search_many_devices
from memfit.planner.multi_device_predictor import MultiDeviceRequest
from memfit.planner.parallelism_grid import Limits, grids, zero_uses
from memfit.planner.request import job_facts
from memfit.planner.selection import Objective
from memfit.techniques.registry import make_use
from memfit.trace.trace_extrapolation import deep_trace
from memfit.types.job import Job
from memfit.types.machine import Calibration
from memfit.types.plan import Accuracy, Bounds, Plan, Use

ROWS, LENGTH, BLOCKS, VOCAB = 8, 256, 6, 2048
WIDTH, LARGE = 1536, 4096
ON = machine("2xRTX-4090")
FEW = ("compile", "context-parallel", "tensor-parallel", "pipeline", "adamw-single", "adamw-8bit", "ddp")

FEWER = (
    "bf16-parameters",
    "bf16-autocast",
    "activation-checkpointing",
    "activation-offload",
    "selective-checkpointing",
    "chunked-cross-entropy",
    "adamw-fused",
)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class _Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(BLOCKS)))
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(tokens)))  # type: ignore[no-any-return]


@functools.cache
def job(width: int = WIDTH) -> Job:
    return Job(
        name="wide",
        build_model=functools.partial(_Model, width),
        make_batch=lambda step, seed: {
            name: torch.zeros(ROWS, LENGTH, dtype=torch.int64) for name in ("x", "y")
        },
        loss=lambda model, b: nn.functional.cross_entropy(model(b["x"]).flatten(0, 1), b["y"].flatten()),
        batch_size=ROWS,
        tokens_per_batch=ROWS * LENGTH,
    )


@functools.cache
def predictor() -> Predictor:
    return Predictor(job=job(), machine=ON, job_facts=job_facts(job(), "cuda", 2))


def _limits(**changes: Any) -> Limits:
    base = Limits(
        ranks=2, per_host=2, batch=ROWS, blocks=BLOCKS, device="cuda", without=frozenset(FEW), storage=True
    )
    return dataclasses.replace(base, **changes)


def _on_nvme(plan: Plan) -> bool:
    zero = plan.get("zero")
    return zero is not None and zero.settings["nvme"] == "optimizer"


def test_a_search_has_plans_with_optimizer_state_on_nvme_only_if_the_rate_of_storage_is_known() -> None:
    for storage in (True, False):
        states = [uses for grid in grids(_limits(storage=storage)) for uses in grid.states]
        assert any(_on_nvme(Plan(uses=uses, ranks=2)) for uses in states) == storage
    model = time_model(ON.device, Calibration())
    assert model is not None
    assert ON.host is not None
    bare = dataclasses.replace(ON, host=dataclasses.replace(ON.host, storage_bytes_s=None))
    assert storage_rates(bare, model, 2) is None
    assert storage_rates(ON, model, 2) == StorageRates(read_bytes_s=3e9, write_bytes_s=1.5e9)
    copies = Calibration(flops_s={"float32": 1e13}, bandwidth_bytes_s=1e12, disk_bytes_s=25e9)  # to the host
    timed = time_model(ON.device, copies)
    assert timed is not None
    assert storage_rates(ON, timed, 2) == StorageRates(read_bytes_s=3e9, write_bytes_s=1.5e9)
    assert storage_rates(bare, timed, 2) is None
    plan = Plan(uses=(_use(("parameters", "bf16")),), ranks=2)
    untimed = dataclasses.replace(predictor(), machine=bare).whole(plan)
    assert untimed.step_s is None
    assert any("rate of the host's local storage is unknown" in a for a in untimed.assumptions)


def _use(kind: tuple[str, str]) -> Use:
    place, precision = kind
    wanted = {"offload": place, "precision": precision, "nvme": "optimizer"}
    return next(u for u in zero_uses(storage=True) if wanted.items() <= dict(u.settings).items())


KINDS = [(place, precision) for place in ("optimizer", "parameters") for precision in ("bf16", "fp32")]


@pytest.mark.parametrize("sub_group", [100_000_000, 20_000_000], ids=["at once", "in sub-groups"])
@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_law_the_price_of_state_on_nvme_is_that_of_a_whole_trace(
    kind: tuple[str, str], sub_group: int
) -> None:
    state = (make_use("zero", {**_use(kind).settings, "sub_group_elements": sub_group}),)
    sketch = _sketch(state, kind[1])
    whole = predictor().whole(sketch.plan)
    assert whole.step_s is not None
    assert sketch.allocated_bytes == pytest.approx(whole.allocated_bytes.value, rel=0.09)
    assert sketch.step_s == pytest.approx(whole.step_s.value, rel=0.03)
    # Pinned memory is rounded in whole plans only.
    host_bytes = deep_trace(predictor().job, sketch.plan, device="cuda").host_step_bytes
    assert sketch.host_bytes == pytest.approx(host_bytes, rel=0.14)
    assert whole.host_parts_bytes["offload"] / 2 >= host_bytes
    state_bytes = 16 * (BLOCKS * (8 * WIDTH**2 + 7 * WIDTH) + 2 * VOCAB * WIDTH)
    assert whole.storage_bytes == pytest.approx(state_bytes, rel=0.001)
    assert whole.storage_written_bytes == whole.storage_bytes


@functools.cache
def _grid_predictor() -> _GridPredictor:
    model = time_model(ON.device, Calibration())
    assert model is not None
    return _GridPredictor(BlockTracer(job(), "cuda"), ON, model, _limits())


def _sketch(state: tuple[Use, ...], precision: str) -> Sketch:
    grid = next(g for g in grids(_limits()) if any(u.technique == "zero" for s in g.states for u in s))
    part = dataclasses.replace(grid, states=(state,), inside=((),), ends=((),), away=((),))
    predictions = _grid_predictor().predict(part, precision)
    assert predictions is not None
    micro = next(i for i, (_, count) in enumerate(grid.micro) if count == 1)
    return Sketch(part, *sketch_fields(part, predictions, micro))


def test_a_search_puts_optimizer_state_on_nvme_where_host_memory_is_too_small() -> None:
    small = with_host_memory(ON, 24 * 2**30)  # in which FSDP2's offload does not fit with two processes
    request = MultiDeviceRequest(
        goal=Objective.FASTEST,
        accuracy=Accuracy.ROUNDING,
        cap=Cap(
            bytes=6 * 2**30,
            needs=lambda e: int(e.allocated_bytes.value),
            refuses=lambda plan: (),
            host=lambda e: host_holds(e, small),
        ),
        bounds=Bounds(without=(*FEW, *FEWER)),
        progress=lambda *_: None,
    )
    large = Predictor(job=job(LARGE), machine=small, job_facts=job_facts(job(LARGE), "cuda", 2))
    found = search_many_devices(large, 2, request).recommended
    assert found is not None
    assert found.fits
    assert _on_nvme(found.estimate.plan)
