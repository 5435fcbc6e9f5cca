"""Expert parallelism in the search for many devices: its plans, and its prices compared with whole traces."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch

from memfit.catalog import machine
from memfit.cost.op_time import time_model
from memfit.cost.stream_simulator import collective_size
from memfit.planner.block_traces import BlockTracer
from memfit.planner.capacity import Cap, needed_bytes
from memfit.planner.evaluate import Predictor
from memfit.planner.grid_search import Sketch, _divisible_limits, _GridPredictor, _make_tasks, sketch_fields
from memfit.planner.multi_device import search_many_devices
from memfit.planner.multi_device_predictor import MultiDeviceRequest
from memfit.planner.parallelism_grid import Grid, Limits, grids
from memfit.planner.request import job_facts
from memfit.planner.selection import Objective
from memfit.techniques.rank_mesh import layout
from memfit.techniques.registry import conflict, effect_of, make_use
from memfit.trace.tracer import trace
from memfit.types.job import Job
from memfit.types.machine import Calibration
from memfit.types.plan import Accuracy, Bounds, EffectClass, Plan
from memfit.types.trace import Trace

ROWS, LENGTH, WIDTH, LAYERS, EXPERTS = 8, 4096, 2048, 4, 4
ON = machine("2xH100-SXM")
FEW = ("compile", "zero", "context-parallel", "tensor-parallel", "pipeline", "adamw-single", "adamw-8bit")


def _mixtral(layers: int) -> torch.nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=4096,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            num_local_experts=EXPERTS,
            use_cache=False,
        )
    )


def _batch(step: int, seed: int) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(ROWS, LENGTH, dtype=torch.int64) for name in ("input_ids", "labels")}


@functools.cache
def job() -> Job:
    return Job(
        name="mixture",
        build_model=functools.partial(_mixtral, LAYERS),
        make_batch=_batch,
        loss=lambda model, batch: model(**batch).loss,
        batch_size=ROWS,
        tokens_per_batch=ROWS * LENGTH,
    )


@functools.cache
def traced() -> BlockTracer:
    return BlockTracer(job(), "cuda")


def limits(**changes: Any) -> Limits:
    base = Limits(
        ranks=2, per_host=2, batch=ROWS, blocks=LAYERS, device="cuda", experts=EXPERTS, without=frozenset(FEW)
    )
    return dataclasses.replace(base, **changes)


def predictor() -> Predictor:
    return Predictor(job=job(), machine=ON, job_facts=job_facts(job(), "cuda", 2))


def _uses(**uses: Any) -> tuple[Any, ...]:
    return tuple(make_use(name.replace("_", "-"), knobs) for name, knobs in uses.items())


def _expert_grids(wanted: Limits) -> list[Grid]:
    return [g for g in grids(wanted) if g.layout.experts > 1]


def test_experts_are_distributed_over_all_ranks_that_divide_their_number() -> None:
    for grid in _expert_grids(limits()):
        for index in itertools.product(*map(range, grid.shape)):
            plan = grid.plan(index)
            assert conflict(plan) is None, plan.label
            assert layout(plan).data == plan.ranks == 2
            assert plan.get("expert-parallel") == make_use("expert-parallel", {"degree": 2, "dropless": True})
            data = plan.get("fsdp2")
            assert data is None or not data.settings["offload"]
    assert _expert_grids(limits(effect=EffectClass.E1))
    assert not _expert_grids(limits(ranks=8))
    assert not _expert_grids(limits(experts=0))
    assert not _expert_grids(limits(without=frozenset({"expert-parallel"})))


def test_only_experts_that_drop_tokens_change_the_training() -> None:
    for dropless, effect in ((True, EffectClass.E1), (False, EffectClass.E3)):
        use = make_use("expert-parallel", {"dropless": dropless})
        assert effect_of(Plan(ranks=2, uses=(use, make_use("ddp", {})))) is effect


def test_a_number_of_ranks_that_does_not_divide_the_experts_is_not_modelled() -> None:
    wanted, refusals = _divisible_limits(traced(), machine("8xH100-SXM"), limits(ranks=8))
    assert wanted.expert_degree == 1
    assert any("4 experts cannot be shared equally by 8 ranks" in r for r in refusals)


PLANS = {
    "ddp": (_uses(), _uses(ddp={"sync": "every"}, bf16_autocast={})),
    "recomputed": (_uses(activation_checkpointing={}), _uses(ddp={"sync": "every"}, bf16_autocast={})),
    "sharded": (_uses(), _uses(fsdp2={"reshard": False}, bf16_parameters={"rounding": "stochastic"})),
    "master weights": (_uses(activation_checkpointing={}), _uses(fsdp2={}, bf16_parameters={})),
    "stochastic": (
        _uses(selective_checkpointing={"keep": "matmul"}),
        _uses(ddp={"sync": "every"}, bf16_parameters={"rounding": "stochastic"}),
    ),
}


@functools.cache
def _grid_predictor() -> tuple[_GridPredictor, list[Any]]:
    model = time_model(ON.device, Calibration())
    assert model is not None
    found = _GridPredictor(traced(), ON, model, limits())
    todo = [t for t in _make_tasks(ON, limits()) if t[0].layout.experts > 1]
    traced().trace(*found.needed(todo))
    return found, todo


def _sketch(inside: tuple[Any, ...], state: tuple[Any, ...], micro: int) -> Sketch:
    found, todo = _grid_predictor()
    for grid, compute, states in todo:
        if state in states:
            part = dataclasses.replace(grid, states=(state,), inside=(inside,), away=((),))
            predictions = found.predict(part, compute)
            assert predictions is not None
            return Sketch(part, *sketch_fields(part, predictions, micro))
    raise AssertionError(state)


@pytest.mark.parametrize("micro", [0, 1], ids=["one micro-batch", "two micro-batches"])
@pytest.mark.parametrize("name", PLANS)
def test_law_the_price_of_distributed_experts_is_that_of_a_whole_trace(name: str, micro: int) -> None:
    sketch = _sketch(*PLANS[name], micro)
    whole = predictor().whole(sketch.plan)
    assert whole.step_s is not None
    assert sketch.allocated_bytes == pytest.approx(whole.allocated_bytes.value, rel=0.12)
    assert sketch.step_s == pytest.approx(whole.step_s.value, rel=0.12)
    assert any("experts of the busiest rank get 1.25 times an even share" in a for a in whole.assumptions)


def _whole(percent: int) -> Trace:
    use = make_use("expert-parallel", {"degree": 2, "dropless": True, "capacity_percent": percent})
    return trace(job(), Plan(ranks=2, uses=(use, *_uses(ddp={}))), device="cuda", steps=1, update=False)


def test_busier_experts_take_more_memory_and_longer_exchanges() -> None:
    def exchanged(of: Trace) -> list[int]:
        sizes = [collective_size(op) for op in of.ops]
        return [size[1] for size in sizes if size[0] == "all_to_all"]

    even, busy = _whole(100), _whole(200)
    choices = ROWS // 2 * LENGTH * 2
    tokens = [size for size in exchanged(even) if size > 64]
    assert set(tokens) == {choices * WIDTH * 4}
    assert {b / e for b, e in zip(exchanged(busy), exchanged(even), strict=True)} == {1.0, 2.0}
    assert [b / e for b, e in zip(exchanged(busy), exchanged(even), strict=True)].count(2.0) == len(tokens)


@pytest.mark.long
def test_a_search_says_what_distributed_experts_would_change() -> None:
    request = MultiDeviceRequest(
        goal=Objective.FASTEST,
        accuracy=Accuracy.ROUNDING,
        cap=Cap(bytes=40 * 2**30, needs=lambda e: needed_bytes(e, ON), refuses=lambda plan: ()),
        bounds=Bounds(without=(*FEW, "selective-checkpointing", "activation-offload", "bf16-autocast")),
        progress=lambda *a: None,
    )
    found = search_many_devices(predictor(), 2, request)
    assert found.recommended is not None
    assert found.recommended.fits
    assert "expert-parallel" in {r.technique for r in found.recommended.reasons}
    loads = [r.detail for r in found.recommended.reasons if r.kind == "expert_load"]
    assert loads == ["1.25"] * ("expert-parallel" in found.recommended.estimate.plan)
