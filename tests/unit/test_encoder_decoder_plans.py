"""Encoder-decoders in the search for many devices: two chains of blocks, and their prices compared with whole
traces."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from memfit.catalog import machine
from memfit.cost.op_time import time_model
from memfit.model.blocks import find_stacks
from memfit.planner.block_traces import BlockTracer
from memfit.planner.evaluate import Predictor
from memfit.planner.grid_search import Sketch, _divisible_limits, _GridPredictor, sketch_fields
from memfit.planner.parallelism_grid import Limits, grids
from memfit.planner.request import job_facts
from memfit.techniques.registry import make_use
from memfit.trace.tracer import fake_model, trace
from memfit.types.job import Job
from memfit.types.machine import Calibration
from memfit.types.plan import Plan

ROWS, SOURCE, TARGET, WIDTH, VOCAB, ENCODERS, DECODERS = 8, 1024, 512, 1024, 8192, 6, 4
ON = machine("2xL4")
FEW = ("compile", "context-parallel", "tensor-parallel", "pipeline", "adamw-single", "adamw-8bit")


def _t5() -> torch.nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=WIDTH,
            d_kv=64,
            d_ff=4 * WIDTH,
            num_layers=ENCODERS,
            num_decoder_layers=DECODERS,
            num_heads=16,
            decoder_start_token_id=0,
            use_cache=False,
        )
    )


def _bart() -> torch.nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCAB,
            d_model=WIDTH,
            encoder_ffn_dim=4 * WIDTH,
            decoder_ffn_dim=4 * WIDTH,
            encoder_layers=ENCODERS,
            decoder_layers=DECODERS,
            encoder_attention_heads=16,
            decoder_attention_heads=16,
            use_cache=False,
        )
    )


MODELS = {"t5": _t5, "bart": _bart}


@functools.cache
def job(name: str) -> Job:
    return Job(
        name=name,
        build_model=MODELS[name],
        make_batch=lambda step, seed: {
            "input_ids": torch.zeros(ROWS, SOURCE, dtype=torch.int64),
            "labels": torch.zeros(ROWS, TARGET, dtype=torch.int64),
        },
        loss=lambda model, batch: model(**batch).loss,
        batch_size=ROWS,
        tokens_per_batch=ROWS * SOURCE,
    )


@functools.cache
def traced(name: str) -> BlockTracer:
    return BlockTracer(job(name), "cuda")


@functools.cache
def grid_predictor(name: str) -> _GridPredictor:
    model = time_model(ON.device, Calibration())
    assert model is not None
    return _GridPredictor(traced(name), ON, model, limits(name))


def limits(name: str) -> Limits:
    blocks = traced(name).blocks
    return Limits(ranks=2, per_host=2, batch=ROWS, blocks=blocks, device="cuda", without=frozenset(FEW))


def _uses(**uses: Any) -> tuple[Any, ...]:
    return tuple(make_use(name.replace("_", "-"), knobs) for name, knobs in uses.items())


@pytest.mark.parametrize("name", MODELS)
def test_encoder_and_decoder_are_two_chains(name: str) -> None:
    stacks = find_stacks(fake_model(job(name)))
    assert sorted(traced(name).chains.values()) == [DECODERS, ENCODERS]
    assert traced(name).chains == {path: len(blocks) for path, blocks in stacks.items()}
    assert not traced(name).is_single_chain
    _, refusals = _divisible_limits(traced(name), ON, limits(name))
    assert any("pipeline and context parallelism are not modelled" in text for text in refusals)


PLANS = {
    "ddp": (_uses(), _uses(ddp={"sync": "every"}, bf16_autocast={})),
    "recomputed": (_uses(activation_checkpointing={}), _uses(ddp={"sync": "every"}, bf16_autocast={})),
    "sharded": (_uses(), _uses(fsdp2={}, bf16_parameters={"rounding": "master"})),
    "both": (
        _uses(activation_checkpointing={}),
        _uses(fsdp2={"precision": "bf16"}),
    ),
    "selective": (
        _uses(selective_checkpointing={"keep": "matmul"}),
        _uses(fsdp2={"reshard": False, "precision": "bf16"}),
    ),
}


@functools.cache
def _sketch(name: str, plan: str, micro: int) -> Sketch:
    inside, state = PLANS[plan]
    for grid in grids(limits(name)):
        if state in grid.states:
            part = dataclasses.replace(grid, states=(state,), inside=(inside,), ends=((),), away=((),))
            compute = "bf16" if "bf16" in str(state) and "autocast" not in str(state) else "autocast"
            predictions = grid_predictor(name).predict(part, compute)
            assert predictions is not None
            return Sketch(part, *sketch_fields(part, predictions, micro))
    raise AssertionError(state)


CASES = [
    (name, plan, micro) for name in MODELS for plan in PLANS for micro in (0, 1)
]  # one, two micro-batches
FIRST = [("t5", "sharded", 0), ("t5", "both", 1), ("bart", "recomputed", 0), ("bart", "both", 0)]


@pytest.mark.parametrize(
    ("name", "plan", "micro"),
    [case if case in FIRST else pytest.param(*case, marks=pytest.mark.long) for case in CASES],
)
def test_law_the_price_of_an_encoder_and_a_decoder_is_that_of_a_whole_trace(
    name: str, plan: str, micro: int
) -> None:
    sketch = _sketch(name, plan, micro)
    predictor = Predictor(job=job(name), machine=ON, job_facts=job_facts(job(name), "cuda", 2))
    whole = predictor.whole(sketch.plan)
    assert whole.step_s is not None
    # Samples have few tokens here, so that autocast's copies of weights, which are counted for each sample,
    # weigh much. The gradient of T5's relative positions, which all blocks add to, is not counted.
    worst = {"ddp": 0.2, "selective": 0.2}.get(plan, 0.09)
    assert sketch.allocated_bytes == pytest.approx(whole.allocated_bytes.value, rel=worst)
    assert sketch.step_s == pytest.approx(whole.step_s.value, rel=0.11)


def test_recomputation_turns_off_the_cache_for_generation_as_transformers_does() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    assert config.use_cache
    cached = dataclasses.replace(job("t5"), build_model=lambda: T5ForConditionalGeneration(config))
    for name in ("activation-checkpointing", "selective-checkpointing"):
        found = trace(cached, Plan(uses=(make_use(name, {}),)), device="cuda", steps=1)
        assert found.ops
    assert config.use_cache


def test_compilation_turns_off_the_cache_for_generation() -> None:
    """torch.compile would compile each block by itself: each writes to another place of the cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )

    def batch(step: int, seed: int) -> torch.Tensor:
        return torch.randint(0, 64, (2, 8))

    decoder = Job(
        name="decoder",
        build_model=lambda: LlamaForCausalLM(config),
        make_batch=batch,
        batch_size=2,
        loss=lambda model, tokens: model(input_ids=tokens, labels=tokens).loss,
    )
    assert config.use_cache
    assert trace(decoder, Plan(uses=(make_use("compile", {}),)), device="cuda", steps=1).ops
    assert config.use_cache
