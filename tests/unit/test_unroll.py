"""Unrolled traces are the traces of the whole model, event for event."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from memfit.catalog.machine_spec import machine
from memfit.cost.memory import memory_profile, step_ops
from memfit.planner.evaluate import Predictor
from memfit.planner.request import job_facts
from memfit.techniques.rank_mesh import layout
from memfit.techniques.registry import make_use
from memfit.trace.trace_extrapolation import deep_trace, deep_traces
from memfit.trace.tracer import trace
from memfit.trace.truncated_model import with_blocks
from memfit.trace.unroll import Blocks, Mismatch, normalize_clocks, unroll
from memfit.types.job import Job
from memfit.types.machine import Calibration
from memfit.types.plan import KnobValue, Plan, Use, use
from memfit.types.trace import OpCall, Trace

DEPTH = 20


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Deep(nn.Module):
    def __init__(self, *, depth: int = DEPTH, uneven: bool = False, collect: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.blocks = nn.ModuleList(Block(16) for _ in range(depth))
        self.uneven, self.collect = uneven, collect

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, kept = self.embed(tokens), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.uneven and i == 4:
                x = torch.cat([x, x], 1)
            if self.collect:
                kept.append(x)
        return self.head(torch.stack(kept).mean(0) if self.collect else x) * 1.0  # not a view, for FSDP2


def job(**model: Any) -> Job:
    return Job(
        name="deep",
        build_model=lambda: Deep(**model),
        batch_size=4,
        make_batch=lambda step, seed: torch.zeros(4, 8, dtype=torch.long),
        loss=lambda model, batch: model(batch).square().mean(),
    )


COMPILED, KEPT = use("compile", scope="blocks"), use("selective-checkpointing", keep="matmul")
RECOMPUTED = (use("activation-checkpointing", every=1),)


def fsdp2(*uses: Use, **knobs: object) -> Plan:
    settings = {
        "reshard": True,
        "precision": "bf16",
        "prefetch": 1,
        "replicas": 1,
        "offload": False,
        "sync": "every",
    }
    return Plan(ranks=2, uses=(*uses, use("fsdp2", **{**settings, **knobs})))  # type: ignore[arg-type]


GATHERED, GATHERED_ONCE = (fsdp2(reshard=False, precision="as-is", sync=s).uses[0] for s in ("every", "last"))
HALVED = use("bf16-parameters", rounding="master")
PLANS = [
    Plan(),
    Plan(uses=(use("activation-checkpointing", every=1),)),
    Plan(uses=(use("activation-checkpointing", every=2), use("bf16-autocast"))),
    Plan(uses=(use("gradient-accumulation", micro_batches=4), use("bf16-parameters", rounding="master"))),
    Plan(uses=(use("sgd"), use("selective-checkpointing", keep="matmul"))),
    Plan(uses=(use("optimizer-in-backward"),)),
    fsdp2(),
    fsdp2(reshard=False, precision="as-is"),
    fsdp2(use("gradient-accumulation", micro_batches=2)),
    Plan(uses=(COMPILED, *RECOMPUTED)),
    Plan(uses=(COMPILED, use("bf16-autocast"), use("selective-checkpointing", keep="attention"))),
    fsdp2(COMPILED),
    fsdp2(COMPILED, *RECOMPUTED),
    fsdp2(COMPILED, use("bf16-parameters", rounding="stochastic"), KEPT),
    fsdp2(COMPILED, use("bf16-parameters", rounding="master"), use("gradient-accumulation", micro_batches=2)),
]


def same(one: Trace, other: Trace) -> bool:
    """Consecutive frees may change their order: a cache is emptied in the order of a hash table."""

    def births(t: Trace) -> list[tuple[int, int, str, str]]:
        return [(a.start, a.size_bytes, a.op, a.module) for a in t.allocations]

    peaks = [memory_profile(t, Calibration()).phase_peak_bytes for t in (one, other)]
    return births(one) == births(other) and peaks[0] == peaks[1] and one.spans == other.spans


def worked(op: OpCall) -> tuple[object, ...]:
    """All but the signature: for a list of all parameters it has the shapes of the shallow trace."""
    return tuple(getattr(op, field.name) for field in dataclasses.fields(op) if field.name != "signature")


@pytest.mark.quick_cases("*-cuda", "[!f]*-cpu", "fsdp2*gradient-accumulation*-cpu")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.label)
def test_a_deep_trace_equals_the_trace_of_the_whole_model(
    plan: Plan, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth = 10 if plan.get("compile") else DEPTH
    whole = normalize_clocks(trace(with_blocks(job(), depth), plan, device=device))
    depths = _watched_depths(monkeypatch)
    deep = deep_trace(job(depth=depth), plan, device=device)
    assert None not in depths, "it fell back to tracing the whole model"
    assert same(deep, whole)
    assert deep.parameter_count == whole.parameter_count
    assert deep.host_peak_bytes == whole.host_peak_bytes
    for one, other in zip(deep.ops, whole.ops, strict=True):
        assert worked(one) == worked(other)


def _watched_depths(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Return a list to which every later trace for a deep one adds its number of blocks, None if whole."""
    depths: list[int | None] = []

    def watched(job: Job, plan: Plan, **options: object) -> Trace:
        depths.append(getattr(job.build_model, "count", None))
        return trace(job, plan, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("memfit.trace.trace_extrapolation.tracer.trace", watched)
    return depths


def test_on_a_cpu_a_deep_trace_of_a_stage_has_the_peaks_of_a_whole_trace() -> None:
    plan = Plan(
        ranks=4,
        uses=(make_use("pipeline", {"stages": 4, "micro_batches": 4, "schedule": "gpipe", "virtual": 1}),),
    )
    deep, whole = deep_trace(job(depth=8), plan), trace(job(depth=8), plan)
    peaks = [memory_profile(t, Calibration()).phase_peak_bytes for t in (deep, whole)]
    assert peaks[0] == peaks[1]


def test_sizes_that_grow_with_depth_are_extrapolated_linearly() -> None:
    whole = trace(with_blocks(job(collect=True), DEPTH), Plan())
    few, more = (trace(with_blocks(job(collect=True), n), Plan()) for n in (4, 5))
    given, wanted = (Blocks(path="blocks", first=0, count=n) for n in (4, DEPTH))
    deep = unroll(few, more, given, wanted)
    stacked = [
        [a.size_bytes for a in t.allocations if "stack" in a.op or "cat" in a.op] for t in (deep, whole)
    ]
    assert stacked[0] == stacked[1]
    assert max(stacked[0]) == DEPTH * 4 * 8 * 16 * 4


class Skips(Deep):
    """Adds the outputs of certain blocks by number, as UNETR does."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        outputs = [self.embed(tokens)]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return self.head(outputs[6] + outputs[12] + outputs[-1]) * 1.0


def test_a_model_that_needs_all_its_blocks_is_traced_and_priced_whole() -> None:
    skips = dataclasses.replace(job(), build_model=Skips)
    assert same(normalize_clocks(deep_trace(skips, Plan())), normalize_clocks(trace(skips, Plan())))
    predictor = Predictor(job=skips, machine=machine("L4", "world"), job_facts=job_facts(skips, "cuda"))
    assert predictor.repeats
    assert predictor.sketch(Plan()).allocated_bytes.value > 0
    assert not predictor.repeats, "the next sketch is made from the whole model at once"


class Alternating(Block):
    """Every other block runs twice."""

    def __init__(self, number: int) -> None:
        super().__init__(16)
        self.is_doubled = number % 2 == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(x) if self.is_doubled else x)


class EveryEighth(Block):
    """Every eighth block runs twice, which the first ones do not show."""

    def __init__(self, number: int) -> None:
        super().__init__(16)
        self.number = number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(x) if self.number % 8 == 7 else x)


class Numbered(Deep):
    def __init__(self, kind: Callable[[int], Block]) -> None:
        super().__init__(depth=0)
        self.blocks = nn.ModuleList(kind(i) for i in range(DEPTH))


@pytest.mark.parametrize(("kind", "is_unrolled"), [(Alternating, True), (EveryEighth, False)])
def test_a_deep_trace_of_blocks_that_differ_in_what_they_do_equals_the_trace_of_the_whole_model(
    kind: Callable[[int], Block], is_unrolled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered = dataclasses.replace(job(), build_model=lambda: Numbered(kind))
    whole = normalize_clocks(trace(with_blocks(numbered, DEPTH) if is_unrolled else numbered, Plan()))
    depths = _watched_depths(monkeypatch)
    assert same(normalize_clocks(deep_trace(numbered, Plan())), whole)
    assert (None not in depths) is is_unrolled


def _bare(depth: int) -> Job:
    """A model whose container of blocks is the model itself."""
    return Job(
        name="bare",
        build_model=lambda: nn.Sequential(*(Block(16) for _ in range(depth))),
        batch_size=4,
        make_batch=lambda step, seed: torch.zeros(4, 8, 16),
        loss=lambda model, batch: model(batch).square().mean(),
    )


@pytest.mark.parametrize("plan", [Plan(), PLANS[2], fsdp2()], ids=lambda p: p.label)
def test_a_deep_trace_of_a_bare_sequential_equals_the_trace_of_the_whole_model(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = normalize_clocks(trace(with_blocks(_bare(DEPTH), DEPTH), plan))
    depths = _watched_depths(monkeypatch)
    assert same(deep_trace(_bare(DEPTH), plan), whole)
    assert None not in depths


def test_a_stage_of_a_bare_sequential_has_the_modules_and_peaks_of_a_whole_trace() -> None:
    plan = Plan(
        ranks=4,
        uses=(make_use("pipeline", {"stages": 4, "micro_batches": 4, "schedule": "gpipe", "virtual": 1}),),
    )
    for rank, deep in enumerate(deep_traces(_bare(34), plan, range(4), device="cuda")):
        whole = trace(_bare(34), plan, rank=rank, device="cuda")
        assert len(deep.ops) < len(whole.ops)
        peaks = [memory_profile(t, Calibration()).phase_peak_bytes for t in (deep, whole)]
        assert peaks[0] == peaks[1], rank
        assert {a.module for a in deep.allocations} == {a.module for a in whole.allocations}


def test_a_model_whose_blocks_do_not_repeat_is_traced_whole() -> None:
    uneven = job(uneven=True)
    few, more = (trace(with_blocks(uneven, n), Plan()) for n in (4, 5))
    with pytest.raises(Mismatch):
        unroll(few, more, *(Blocks(path="blocks", first=0, count=n) for n in (4, DEPTH)))
    one_by_one = dataclasses.replace(uneven, build_model=lambda: nn.Linear(3, 3), blocks=None)
    batch = dataclasses.replace(one_by_one, make_batch=lambda step, seed: torch.zeros(4, 3))
    assert same(*(normalize_clocks(t) for t in (deep_trace(batch, Plan()), trace(batch, Plan()))))


@pytest.mark.quick_cases(
    "gpipe-34-*", "1f1b-18-*", "gpipe-6-*", "interleaved-10-*", "interleaved-19-*", "1f1b-4-*"
)
@pytest.mark.parametrize(
    ("schedule", "depth", "used"),
    [
        ("gpipe", 34, RECOMPUTED),  # 9 blocks on a stage: unrolled
        ("1f1b", 34, ()),
        ("gpipe", 6, ()),  # 2 or 1 on a stage: all are traced, for few micro-batches
        ("1f1b", 18, RECOMPUTED),
        ("1f1b", 4, ()),
        ("1f1b", 34, (GATHERED_ONCE, HALVED)),
        ("1f1b", 18, (GATHERED, HALVED)),
        ("gpipe", 18, (GATHERED_ONCE, HALVED)),
        ("interleaved", 10, ()),  # a block in each chunk
        ("interleaved", 22, (GATHERED, HALVED)),  # some have three, some two
        ("interleaved", 19, (GATHERED_ONCE, HALVED, *RECOMPUTED)),  # the last has one
        ("interleaved", 20, (fsdp2().uses[0], KEPT)),
    ],
)
def test_a_stage_traced_in_a_shorter_pipeline_has_the_same_peaks_and_flops(
    schedule: str, depth: int, used: tuple[Use, ...]
) -> None:
    stages, micros, virtual = (5, 5, 2) if schedule == "interleaved" else (4, 6, 1)
    settings: dict[str, KnobValue] = {
        "stages": stages,
        "micro_batches": micros,
        "schedule": schedule,
        "virtual": virtual,
    }
    copies = 1 + any(u.technique == "fsdp2" for u in used)
    plan = Plan(ranks=stages * copies, uses=(*used, make_use("pipeline", settings)))
    rows = micros * copies
    many = dataclasses.replace(
        job(depth=depth),
        batch_size=rows,
        make_batch=lambda step, seed: torch.zeros(rows, 4, dtype=torch.int32),  # 512 bytes, however few
    )
    ranks = layout(plan).distinct_ranks()
    for rank, deep in zip(ranks, deep_traces(many, plan, ranks, device="cuda"), strict=True):
        whole = trace(many, plan, rank=rank, device="cuda")
        assert len(deep.ops) < len(whole.ops), "it fell back to tracing the whole pipeline"
        peaks = [memory_profile(t, Calibration()).phase_peak_bytes for t in (deep, whole)]
        assert peaks[0] == peaks[1], rank
        assert {a.module for a in deep.allocations} == {a.module for a in whole.allocations}
        flops = [sum(op.flops * n for op, n in step_ops(t)) for t in (deep, whole)]
        assert flops[0] == flops[1], rank
