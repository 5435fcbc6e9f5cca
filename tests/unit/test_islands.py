"""Precision islands: modules that a job declares compute in float32 under every lower-precision technique."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny import words

from memfit.jobs.training_step import TrainingStep
from memfit.techniques.registry import make_use
from memfit.trace.trace_extrapolation import deep_trace
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.plan import Plan

NORMS = ("blocks.*.inner.0",)
AUTOCAST = Plan(uses=(make_use("bf16-autocast", {}),))
PARAMETERS = Plan(uses=(make_use("bf16-parameters", {"rounding": "master"}),))
RECOMPUTED = PARAMETERS.with_use(make_use("activation-checkpointing", {}))


def job(*islands: str, blocks: int = 3) -> Job:
    return dataclasses.replace(words(blocks), islands=islands)


def seen(step: TrainingStep, path: str) -> dict[str, Any]:
    """dtypes that a module is given, computes with and returns, and whether autocast is on inside."""
    found: dict[str, Any] = {}
    module = step.model.get_submodule(path)
    child = next(iter(module.children()), None)
    if child is not None:
        child.register_forward_pre_hook(
            lambda m, args: found.update(inside=args[0].dtype, autocast=torch.is_autocast_enabled("cpu"))
        )
    module.register_forward_hook(lambda m, args, out: found.update(given=args[0].dtype, made=out.dtype))
    step.run(step.job.make_batch(0, 0))
    return found


def test_under_autocast_an_island_runs_with_autocast_off_in_float32() -> None:
    found = seen(TrainingStep(job("blocks.1.inner"), AUTOCAST), "blocks.1.inner")
    wide = torch.float32
    assert found == {"inside": wide, "autocast": False, "given": wide, "made": wide}
    outside = seen(TrainingStep(job("blocks.1.inner"), AUTOCAST), "blocks.2.inner")
    assert outside["autocast"] is True
    assert outside["made"] == torch.bfloat16


def test_among_bf16_parameters_an_island_keeps_float32_parameters_and_returns_bf16() -> None:
    step = TrainingStep(job("blocks.1.inner"), PARAMETERS)
    dtypes = {n: p.dtype for n, p in step.model.named_parameters()}
    assert {d for n, d in dtypes.items() if n.startswith("blocks.1.inner")} == {torch.float32}
    assert {d for n, d in dtypes.items() if not n.startswith("blocks.1.inner")} == {torch.bfloat16}
    found = seen(step, "blocks.1.inner")
    assert found["inside"] == torch.float32
    assert found["given"] == found["made"] == torch.bfloat16


def test_an_embedding_island_returns_the_dtype_of_the_surrounding_modules() -> None:
    found = seen(TrainingStep(job("embed"), PARAMETERS), "embed")
    assert found["made"] == torch.bfloat16
    assert seen(TrainingStep(job("embed"), Plan()), "embed")["made"] == torch.float32


@pytest.mark.parametrize("plan", [AUTOCAST, PARAMETERS, RECOMPUTED])
def test_a_model_that_is_all_island_trains_bit_for_bit_like_plain_training(plan: Plan) -> None:
    plain, island = TrainingStep(job(), Plan()), TrainingStep(job("*"), plan)
    island.model.load_state_dict(plain.model.state_dict())
    for step in (plain, island):
        torch.manual_seed(0)
        step.run(step.job.make_batch(0, 0))
    for a, b in zip(plain.model.parameters(), island.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_stochastic_rounding_updates_float32_islands_too() -> None:
    step = TrainingStep(job(*NORMS), Plan(uses=(make_use("bf16-parameters", {"rounding": "stochastic"}),)))
    before = step.model.blocks[0].inner[0].weight.clone()
    step.run(step.job.make_batch(0, 0))
    assert step.model.blocks[0].inner[0].weight.dtype == torch.float32
    assert not torch.equal(before, step.model.blocks[0].inner[0].weight)


@pytest.mark.parametrize("made", [Plan(), AUTOCAST, PARAMETERS])
def test_an_island_pattern_that_matches_no_module_is_refused_with_a_suggestion(made: Plan) -> None:
    for what in (lambda: TrainingStep(job("block.*"), made), lambda: deep_trace(job("block.*"), made)):
        with pytest.raises(UserError, match=r"'block\.\*' matches no module.*did you mean 'blocks"):
            what()


def test_zero_in_bf16_cannot_keep_an_island_with_parameters() -> None:
    plan = Plan(uses=(make_use("zero", {"stage": 2, "precision": "bf16"}),))
    with pytest.raises(UserError, match=r"zero with precision bf16 has one dtype.*blocks\.0\.inner\.0"):
        TrainingStep(job(*NORMS), plan)
    TrainingStep(job("blocks.*.inner.2"), plan)  # GELU has none
    TrainingStep(job(*NORMS), Plan(uses=(make_use("zero", {"stage": 2, "precision": "fp32"}),)))


@pytest.mark.parametrize("plan", [AUTOCAST, PARAMETERS])
def test_traces_of_a_job_with_islands_allocate_more_bytes(plan: Plan) -> None:
    plain, kept = trace(job(), plan), trace(job("blocks.*.inner"), plan)
    assert sum(a.size_bytes for a in kept.allocations) > sum(a.size_bytes for a in plain.allocations)


def test_deep_trace_of_a_model_with_islands_allocates_as_much_as_the_whole_trace() -> None:
    one, all_of_them = job("blocks.9.inner", blocks=16), job("blocks.*.inner", blocks=16)
    for asked in (one, all_of_them):
        deep, whole = deep_trace(asked, AUTOCAST), trace(asked, AUTOCAST)
        assert sum(a.size_bytes for a in deep.allocations) == sum(a.size_bytes for a in whole.allocations)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("units", ["blocks", "ends"])
def test_fsdp2_traces_models_with_islands_and_all_island_allocates_as_in_float32(units: str) -> None:
    """The islands are a module inside a block, a whole block, the head, and a module without parameters."""
    plan = Plan(uses=(make_use("fsdp2", {"precision": "bf16", "units": units}),), ranks=2)
    assert trace(job("blocks.0.inner.1", "blocks.1", "head", "blocks.2.inner.2"), plan).spans
    narrow = Plan(uses=(make_use("fsdp2", {"units": units}), make_use("bf16-parameters", {})), ranks=2)
    assert trace(job("blocks.0.inner.1", "head"), narrow).spans, "groups of one dtype each"
    whole = trace(job("*"), plan)
    as_is = trace(job(), Plan(uses=(make_use("fsdp2", {"units": units}),), ranks=2))
    assert [a.size_bytes for a in whole.allocations] == [a.size_bytes for a in as_is.allocations]
