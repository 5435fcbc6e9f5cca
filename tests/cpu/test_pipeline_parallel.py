"""Pipelines run for real over gloo against one process and against their traces; laws of what is in flight.

The file is also the program that each rank runs.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from child_ranks import leave, run_children
from scratch_memory import probed
from torch import nn
from torch.nn import functional

from memfit.cost.memory import memory_profile
from memfit.jobs.builtin.gpt import Gpt, GptSize
from memfit.jobs.training_step import TrainingStep
from memfit.runtime.counting_allocator import CountingAllocator, available
from memfit.runtime.gloo import gloo_first
from memfit.techniques.registry import make_use
from memfit.trace.trace_extrapolation import traces_of
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.plan import Plan
from memfit.types.trace import Category, Phase
from memfit.worker.train import join_world

SIZE = GptSize(layers=4, width=64, heads=4, length=32, vocabulary=256, batch_size=8)
PHASES = (Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER)
WORST_RATIO, ROUNDING = 0.005, 1e-5


def _tied() -> nn.Module:
    model = Gpt(SIZE)
    model.head.weight = model.embed.weight
    return model


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _esm() -> nn.Module:
    from transformers import EsmConfig, EsmForMaskedLM

    return EsmForMaskedLM(
        EsmConfig(
            vocab_size=33,
            mask_token_id=32,
            pad_token_id=1,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            position_embedding_type="rotary",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _tokens(step: int, seed: int) -> torch.Tensor:
    return torch.randint(4, 31, (8, 33), generator=torch.Generator().manual_seed(1000 * seed + step))


def _next_token(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    out = model(tokens[:, :-1])
    logits = out if isinstance(out, torch.Tensor) else out.logits
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _job(name: str, build: Any) -> Job:
    return Job(name=name, build_model=build, make_batch=_tokens, loss=_next_token, batch_size=8)


JOBS = {
    j.name: j
    for j in (
        _job("gpt", lambda: Gpt(SIZE)),
        _job("tied", _tied),
        _job("llama", _llama),
        _job("esm", _esm),
    )
}


def _plan(ranks: int, schedule: str = "1f1b", virtual: int = 1, micro_batches: int = 4, **more: Any) -> Plan:
    uses = {k.replace("_", "-"): v for k, v in more.items()}
    stages = more.pop("stages", ranks if not {"ddp", "fsdp2"} & set(more) else 2)
    knobs = {"stages": stages, "schedule": schedule, "virtual": virtual, "micro_batches": micro_batches}
    uses.pop("stages", None)
    return Plan(ranks=ranks, uses=(make_use("pipeline", knobs), *(make_use(k, v) for k, v in uses.items())))


def _uneven(plan: Plan, first: int = 0, last: int = 0) -> Plan:
    use = plan.get("pipeline")
    assert use is not None
    return plan.with_use(make_use("pipeline", use.settings | {"first_fewer": first, "last_fewer": last}))


TWO = (
    ("gpt", _plan(2, "gpipe")),
    ("gpt", _plan(2)),
    ("gpt", _plan(2, "interleaved", 2)),
    ("gpt", _plan(2, "zero-bubble")),
    ("tied", _plan(2, "zero-bubble-v", 2)),
    ("tied", _plan(2, activation_checkpointing={})),
    ("gpt", _plan(2, micro_batches=2, gradient_accumulation={"micro_batches": 2})),
    ("llama", _plan(2)),
    ("esm", _plan(2, "interleaved", 2)),
    ("tied", _uneven(_plan(2, activation_checkpointing={}), last=2)),
    ("gpt", _uneven(_plan(2), first=1, last=1)),
    ("gpt", _uneven(_plan(2, "gpipe"), first=2)),
)
FOUR = (
    ("gpt", _plan(4, ddp={})),
    ("tied", _plan(4, fsdp2={"sync": "last", "reshard": False})),
    ("gpt", _plan(4, "interleaved", 2, fsdp2={"sync": "last", "reshard": False})),
    ("gpt", _plan(4, "interleaved", 2, fsdp2={"sync": "last"})),
)

# -- what a rank does ---------------------------------------------------------------------------------


def _measure(job: Job, plan: Plan, world: Any, counter: CountingAllocator | None) -> dict[str, Any]:
    """Losses and gradient norms of two steps, and each phase's highest live bytes."""
    gc.collect()
    peaks, now, base = dict[str, int](), ["setup"], counter.live_bytes() if counter else 0

    def turn(phase: str) -> None:
        if counter is not None:
            peaks[now[0]] = max(peaks.get(now[0], 0), counter.peak_bytes() - base)
            counter.reset_peak()
        now[0] = phase

    turn("setup")
    torch.manual_seed(0)
    told = []
    with gloo_first(patient=True) as ask:
        step = TrainingStep(job, plan, world=world)
        ask()
        for index in range(2):
            part, terms = step.local(job.make_batch(index, 0))
            loss, norm = step.run(part, lambda phase: turn(str(phase)), terms_per_rank=terms)
            told.append((float(loss), float(norm)))
            turn("between")
            del part
        step.close()
    return {"told": told, "peaks": peaks}


def _rank(cases: tuple[tuple[str, Plan], ...], target: Path) -> None:
    torch.set_num_threads(1)
    counter = None
    if available() is None:
        counter = CountingAllocator()
        counter.install()
    with join_world(cases[0][1]):
        from memfit.techniques.rank_mesh import make_world

        rank = torch.distributed.get_rank()
        found = [
            _measure(JOBS[name], plan, make_world(plan, rank=rank, device="cpu"), counter)
            for name, plan in cases
        ]
    target.write_text(json.dumps(found))


def _run(ranks: int, folder: Path) -> list[list[dict[str, Any]]]:
    """What each rank found in each case."""
    run_children(__file__, [[str(ranks), folder / str(rank)] for rank in range(ranks)])
    return [json.loads((folder / str(rank)).read_text()) for rank in range(ranks)]


# -- against one process, and against the trace ---------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return _run(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return _run(4, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def counter() -> CountingAllocator:
    if available() is not None:
        pytest.skip(f"no counting allocator: {available()}")
    counting = CountingAllocator()
    counting.install()
    return counting


def _id(case: Any) -> str:
    return f"{case[0]}-{case[1].label}"


@functools.cache
def _alone(name: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of one process's steps."""
    return _measure(JOBS[name], Plan(), None, None)["told"]


def _trains_as_one_process(case: tuple[str, Plan], found: list[dict[str, Any]]) -> None:
    alone = _alone(case[0])
    ranks = [f["told"] for f in found]
    for step, (loss, norm) in enumerate(alone):
        mean = sum(told[step][0] for told in ranks) / len(ranks)
        assert mean == pytest.approx(loss, rel=ROUNDING)
        assert [told[step][1] for told in ranks] == pytest.approx([norm] * len(ranks), rel=ROUNDING)


def _peaks_as_predicted(case: tuple[str, Plan], found: list[dict[str, Any]], counter: Any) -> None:
    for rank, measured in enumerate(found):
        traced = trace(JOBS[case[0]], case[1], rank=rank)
        predicted = memory_profile(traced, probed(traced, counter)).phase_peak_bytes
        for phase in PHASES:
            assert predicted[phase] == pytest.approx(measured["peaks"][phase], rel=WORST_RATIO), (rank, phase)


@pytest.mark.parametrize("index", range(len(TWO)), ids=[_id(c) for c in TWO])
def test_two_ranks_train_as_one_process(index: int, two: list[list[dict[str, Any]]]) -> None:
    _trains_as_one_process(TWO[index], [rank[index] for rank in two])


@pytest.mark.parametrize("index", range(len(FOUR)), ids=[_id(c) for c in FOUR])
def test_four_ranks_train_as_one_process(index: int, four: list[list[dict[str, Any]]]) -> None:
    _trains_as_one_process(FOUR[index], [rank[index] for rank in four])


@pytest.mark.parametrize("index", range(len(TWO)), ids=[_id(c) for c in TWO])
def test_predicted_peaks_of_every_rank_and_phase_are_the_measured_ones(
    index: int, two: list[list[dict[str, Any]]], counter: CountingAllocator
) -> None:
    _peaks_as_predicted(TWO[index], [rank[index] for rank in two], counter)


def test_predicted_peaks_of_a_pipeline_with_data_parallelism_are_the_measured_ones(
    four: list[list[dict[str, Any]]], counter: CountingAllocator
) -> None:
    _peaks_as_predicted(FOUR[0], [rank[0] for rank in four], counter)


# -- laws -----------------------------------------------------------------------------------------------


def _in_flight(plan: Plan, rank: int) -> float:
    """Most micro-batches of one stage whose activations are alive at once; what goes from stage to stage,
    which the blocks themselves make, is left out."""
    traced = trace(JOBS["gpt"], plan, rank=rank, steps=1)
    inside = (a for a in traced.allocations if a.module.startswith("blocks.") and a.module.count(".") > 1)
    kept = [a for a in inside if a.category is Category.ACTIVATION]
    spans = [s for s in traced.spans if s.phase is Phase.FORWARD]
    one = next(size for s in spans if (size := sum(a.size_bytes for a in kept if s.start <= a.start < s.end)))
    changes = [(a.start, a.size_bytes) for a in kept] + [(a.end, -a.size_bytes) for a in kept]
    return max(itertools.accumulate(size for _, size in sorted(changes))) / one


@pytest.mark.parametrize("rank", range(4))
def test_1f1b_keeps_p_minus_r_micro_batches_on_stage_r(rank: int) -> None:
    """min(m, p - r) on stage r of p (Narayanan et al. 2019)."""
    assert _in_flight(_plan(4, micro_batches=8), rank) == pytest.approx(4 - rank, rel=0.01)


@pytest.mark.parametrize("rank", [0, 1])
def test_gpipe_keeps_all_micro_batches(rank: int) -> None:
    assert _in_flight(_plan(2, "gpipe"), rank) == pytest.approx(4, rel=0.01)


def test_interleaving_keeps_a_fraction_of_a_stage_more_on_the_first_rank() -> None:
    """p (1 + (p - 1) / (p v)) micro-batches, each of v stages (Narayanan et al. 2021, section 2.2)."""
    p, v = 2, 2
    assert _in_flight(_plan(p, "interleaved", v, 8), 0) / v == pytest.approx(
        p * (1 + (p - 1) / (p * v)), rel=0.01
    )


@pytest.mark.parametrize("rank", [0, 3])
def test_zero_bubble_keeps_no_more_than_the_first_stage_of_1f1b(rank: int) -> None:
    """ZB1P: the activations of 1F1B's first stage on every stage (Qi et al. 2023)."""
    assert _in_flight(_plan(4, "zero-bubble", micro_batches=8), rank) <= 4.01


# -- mistakes ---------------------------------------------------------------------------------------------


class _Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.blocks[0](x)
        return self.blocks[2](self.blocks[1](first)) + first


class _Sums(_Skip):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize(
    ("model", "plan", "word"),
    [
        (_Skip, _plan(2), "not a chain"),
        (_Sums, _plan(2), "not a chain"),
        (None, _plan(2, micro_batches=3), "pipeline cannot divide the 8 samples"),
        (None, _plan(8), "at most 4 stages"),
        (None, _uneven(_plan(2), last=4), "with first_fewer=0 and last_fewer=4"),
        (None, _plan(2, "interleaved"), "virtual=2 or more"),
        (None, _plan(4, "zero-bubble", ddp={}, stages=2), "data-parallel"),
        (None, _plan(4, "zero-bubble", 2, ddp={}, stages=2), "allowed: the schedules gpipe, 1f1b and"),
        (None, _plan(4, "interleaved", 2, ddp={}), "allowed: fsdp2"),
        (None, _plan(4, "interleaved", 2, fsdp2={"replicas": 2}), "nor with fsdp2 of 2 replicas over 2 data"),
    ],
    ids=[
        "skip",
        "sum-between",
        "uneven",
        "too-many-stages",
        "empty-stage",
        "virtual",
        "zero-bubble-ddp",
        "zero-bubble-ddp-two-stages",
        "interleaved-ddp",
        "interleaved-replicas",
    ],
)
def test_a_pipeline_that_cannot_be_cut_is_refused_with_the_reason(model: Any, plan: Plan, word: str) -> None:
    job = JOBS["gpt"]
    if model is not None:
        job = Job(
            name="x",
            build_model=model,
            make_batch=lambda step, seed: torch.ones(8, 8),
            loss=lambda m, x: m(x).sum(),
            batch_size=8,
            blocks="blocks",
        )
    with pytest.raises(UserError, match=word):
        trace(job, plan)


def test_more_stages_than_blocks_are_refused_for_a_gpu_too() -> None:
    with pytest.raises(UserError, match="at most 4 stages"):
        traces_of(JOBS["gpt"], [(_plan(8), 7)], device="cuda")


if __name__ == "__main__":
    _rank({2: TWO, 4: FOUR}[int(sys.argv[1])], Path(sys.argv[2]))
    leave()
