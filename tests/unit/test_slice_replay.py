"""A trace of chunked modules runs a few of their equal slices; memory and work are those of all slices."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from test_chunking import WIDTHS
from torch import nn

from memfit.catalog.machine_spec import machine as parse_machine
from memfit.cost.allocator import events_of, run
from memfit.cost.memory import memory_profile, step_ops
from memfit.cost.op_time import time_model
from memfit.cost.stream_simulator import StreamSimulator
from memfit.jobs.builtin.alphafold.evoformer import EvoformerBlock
from memfit.store import trace_columns
from memfit.techniques.base import run_slices
from memfit.trace import tracer
from memfit.trace.tracer import trace
from memfit.types.job import Job
from memfit.types.machine import Calibration
from memfit.types.plan import Plan, use
from memfit.types.trace import Trace

LENGTH = 16
PLANS = (
    Plan(uses=(use("chunking", mib=0, parts=16),)),
    Plan(uses=(use("chunking", mib=0, parts=16), use("activation-checkpointing", every=1))),
    Plan(uses=(use("chunking", mib=0, parts=16), use("bf16-autocast"))),
    Plan(uses=(use("chunking", mib=0, parts=16), use("bf16-parameters", rounding="master"))),
    Plan(uses=(use("chunking", mib=0, parts=16), use("gradient-accumulation", micro_batches=2))),
    Plan(uses=(use("chunking", mib=0, parts=16), use("optimizer-in-backward"))),
)


class Blocks(nn.Module):
    """Two Evoformer blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EvoformerBlock(WIDTHS) for _ in range(2))

    def forward(self, part: dict[str, torch.Tensor]) -> torch.Tensor:
        m, z = part["m"], part["z"]
        for block in self.blocks:
            m, z = block(m, z, part["rows"], part["pairs"])
        return m.square().mean() + z.square().mean()


def evoformer(samples: int = 2) -> Job:
    """The last three residues are padding: slices of the masks differ in their values, which are known."""

    def batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        real = torch.ones(samples, LENGTH)
        real[:, -3:] = 0
        return {
            "m": torch.zeros(samples, 4, LENGTH, WIDTHS.c_m),
            "z": torch.zeros(samples, LENGTH, LENGTH, WIDTHS.c_z),
            "rows": real[:, None].expand(samples, 4, LENGTH).contiguous(),
            "pairs": real[:, :, None] * real[:, None],
        }

    return Job(
        name="evoformer",
        build_model=Blocks,
        make_batch=batch,
        loss=lambda model, part: model(part),
        batch_size=samples,
    )


class Rowwise(nn.Module):
    """Attention-like work on rows that ``inner`` changes from call to call."""

    def __init__(self, inner: Callable[[Rowwise, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.inner, self.calls = nn.Linear(8, 8), inner, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        wide = self.layer(x)[..., None].expand(*x.shape, 64).exp()
        return self.inner(self, wide).sum(-1)


def rowwise(inner: Callable[[Rowwise, torch.Tensor], torch.Tensor]) -> Job:
    return Job(
        name="rowwise",
        build_model=lambda: nn.Sequential(Rowwise(inner)),
        make_batch=lambda step, seed: {"x": torch.randn(1, 32, 8)},
        loss=lambda model, part: model(part["x"]).square().mean(),
        batch_size=1,
    )


def both(job: Job, plan: Plan, device: str) -> tuple[Trace, Trace]:
    """Return (trace as it is, trace with all slices)."""
    short = trace(job, plan, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracer, "SliceReplay", lambda recorder: run_slices)
        return short, trace(job, plan, device=device)


@functools.cache
def evoformer_traces(samples: int, plan: Plan, device: str) -> tuple[Trace, Trace]:
    return both(evoformer(samples), plan, device)


def work(of: Trace) -> Counter[tuple[str, str, str]]:
    counts = Counter[tuple[str, str, str]]()
    for op, times in step_ops(of):
        counts[op.signature, op.phase, op.module] += times
    return counts


def largest(of: Trace) -> tuple[object, ...]:
    profile = memory_profile(of, Calibration())
    return profile.peak_bytes, profile.phase_peak_bytes, profile.at_peak_bytes, profile.by_module_bytes


@pytest.mark.quick_cases("*gradient-accumulation*", "*activation-checkpointing*", "*optimizer-in-backward*")
@pytest.mark.parametrize(("plan", "device"), [*zip(PLANS, ["cpu", "cuda"] * 3, strict=True)], ids=str)
def test_peaks_and_work_are_those_of_all_slices(plan: Plan, device: str) -> None:
    short, whole = evoformer_traces(4 if plan.get("gradient-accumulation") else 2, plan, device)
    assert any(op.times > 1 for op in short.ops)
    assert largest(short) == largest(whole)
    assert work(short) == work(whole)


def test_reserved_memory_is_near_that_of_all_slices() -> None:
    short, whole = (
        run(events_of(t.allocations)).reserved_peak_bytes for t in evoformer_traces(2, PLANS[1], "cuda")
    )
    assert short == pytest.approx(whole, rel=0.02)


def test_a_step_takes_as_long_as_with_all_slices() -> None:
    short, whole = evoformer_traces(2, PLANS[1], "cuda")
    machine = parse_machine("A100-80GB-SXM")
    model = time_model(machine.device, Calibration())
    assert model is not None
    for blocking in (False, True):
        simulator = StreamSimulator(model=model, machine=machine, members={}, blocking=blocking)
        one, other = simulator.step(short), simulator.step(whole)
        assert one.step_s == pytest.approx(other.step_s, rel=1e-6)
        assert one.busy_s == pytest.approx(other.busy_s)
        assert one.idle_s == pytest.approx(other.idle_s, rel=1e-3)


def test_slices_that_grow_are_all_run() -> None:
    def growing(module: Rowwise, wide: torch.Tensor) -> torch.Tensor:
        return wide + torch.zeros(module.calls, 1, 1, 1).sum()

    short, whole = both(rowwise(growing), PLANS[0], "cpu")
    assert largest(short) == largest(whole)
    assert work(short) == work(whole)


def test_slices_that_differ_only_in_the_middle_of_backward_are_all_run() -> None:
    class Growing(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            Growing.calls += 1
            return gradient + torch.zeros(Growing.calls).sum()

    def grows(module: Rowwise, wide: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = Growing.apply(wide)  # type: ignore[no-untyped-call]
        return result

    Growing.calls = 0
    short = trace(rowwise(grows), PLANS[0])
    assert all(op.times == 1 for op in short.ops)


def test_slices_whose_values_are_asked_for_are_all_run() -> None:
    def asks(module: Rowwise, wide: torch.Tensor) -> torch.Tensor:
        return wide.exp() if torch.isfinite(wide.detach()).all() else wide

    assert all(op.times == 1 for op in trace(rowwise(asks), PLANS[0]).ops)


def test_slices_whose_inputs_need_no_gradients_are_counted_in_backward() -> None:
    short, whole = both(rowwise(lambda module, wide: wide.sin()), PLANS[0], "cpu")
    assert any(op.times > 1 for op in short.ops)
    assert any(a.pieces > 1 for a in short.allocations)
    assert largest(short) == largest(whole)
    assert work(short) == work(whole)


def test_repeated_calls_and_pieces_are_kept_on_disk() -> None:
    short = trace(rowwise(lambda module, wide: wide.sin()), PLANS[0])
    assert trace_columns.from_bytes(trace_columns.to_bytes(short)) == short


def test_pieces_reach_the_allocator_one_by_one() -> None:
    short = trace(rowwise(lambda module, wide: wide.sin()), PLANS[0])
    several = next(a for a in short.allocations if a.pieces > 1)
    events = events_of([several])
    sizes = [size for _, size, _ in events if size > 0]
    assert sizes == [several.size_bytes // several.pieces] * several.pieces
    single = dataclasses.replace(several, pieces=1)
    assert len(events_of([single])) < len(events)
