"""Laws of memory that hold for every model, sizes and plan drawn: of random networks, each worked out from
shapes alone, compared with another plan of the same network, or measured on real tensors."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import Phase as Stage
from hypothesis import strategies as st
from scratch_memory import probed
from torch import nn

from memfit.cost.allocator import replay
from memfit.cost.device_overhead import exceeds_probability
from memfit.cost.memory import levels, memory_profile
from memfit.jobs.training_step import TrainingStep
from memfit.runtime.counting_allocator import CountingAllocator, available
from memfit.techniques.registry import make_use
from memfit.trace.trace_extrapolation import deep_trace
from memfit.trace.tracer import trace
from memfit.types.job import Job, OptimizerChoice
from memfit.types.machine import Calibration
from memfit.types.plan import Plan, Use
from memfit.types.result import Interval
from memfit.types.trace import Allocation, Category, Phase, Trace, rounded
from memfit.types.units import MIB

few = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=(Stage.explicit, Stage.generate),  # a failing network is small as it is
)
many = settings(few, max_examples=60)

STATE = (Category.PARAMETER, Category.GRADIENT, Category.OPTIMIZER_STATE)
FUNCTIONS = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "gelu": nn.functional.gelu}
widths_of = st.lists(st.integers(1, 96), min_size=3, max_size=6)
rows_of = st.integers(1, 48)
kind_of = st.sampled_from(sorted(FUNCTIONS))


class Chain(nn.Module):
    """Linear layers without biases, one function between all."""

    def __init__(self, widths: list[int], kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths))
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = FUNCTIONS[self.kind](layer(x))
        return x


def chain(widths: list[int], rows: int, kind: str = "relu", dtype: torch.dtype = torch.float32) -> Job:
    return Job(
        name="chain",
        build_model=lambda: Chain(widths, kind).to(dtype),
        make_batch=lambda *_: torch.ones(rows, widths[0], dtype=dtype),
        loss=lambda model, x: model(x).sum(),
        batch_size=rows,
        blocks="layers",
        optimizer=OptimizerChoice(learning_rate=1e-3),
    )


def weights(widths: list[int]) -> list[int]:
    return [a * b for a, b in itertools.pairwise(widths)]


def traced_on(job: Job, *uses: Use, device: str = "cuda", ranks: int = 1, steps: int = 2) -> Trace:
    return trace(job, Plan(uses=uses, ranks=ranks), device=device, steps=steps)


def begin(traced: Trace, phase: Phase) -> int:
    return [s.start for s in traced.spans if s.phase is phase][-1]


def live(traced: Trace, clock: int, *kinds: Category) -> int:
    return sum(
        a.size_bytes
        for a in traced.allocations
        if a.start < clock and (a.end is None or a.end >= clock) and (not kinds or a.category in kinds)
    )


def peak(traced: Trace) -> int:
    return memory_profile(traced, Calibration()).peak_bytes


# --- from shapes alone


@few
@given(widths_of, rows_of)
def test_a_relu_chain_keeps_one_activation_per_layer(widths: list[int], rows: int) -> None:
    """A product keeps its input, ReLU its output, which is the next product's input: one tensor a layer.
    The loss, a number, is there as well."""
    traced = traced_on(chain(widths, rows), steps=1)
    expected = sum(rounded(4 * rows * w, "cuda") for w in widths[1:])
    found = live(traced, begin(traced, Phase.BACKWARD), Category.ACTIVATION)
    assert found - expected in (0, 512, 1024)


@few
@given(widths_of, rows_of)
def test_states_take_sixteen_bytes_per_parameter(widths: list[int], rows: int) -> None:
    """The step count that AdamW keeps for every tensor is in host memory."""
    traced = traced_on(chain(widths, rows))
    expected = sum(4 * rounded(4 * w, "cuda") for w in weights(widths))
    assert live(traced, begin(traced, Phase.OPTIMIZER), *STATE) == expected
    assert traced.parameter_count == sum(weights(widths))


@few
@given(widths_of, rows_of)
def test_a_step_takes_six_flops_per_weight_and_row_except_for_the_first_input(
    widths: list[int], rows: int
) -> None:
    traced = traced_on(chain(widths, rows), steps=1)
    sizes = weights(widths)
    forward = sum(o.flops for o in traced.ops if o.phase is Phase.FORWARD)
    backward = sum(o.flops for o in traced.ops if o.phase is Phase.BACKWARD)
    assert forward == 2 * rows * sum(sizes)
    assert backward == 2 * forward - 2 * rows * sizes[0]


@few
@given(widths_of, rows_of, kind_of)
def test_the_peak_lies_between_the_largest_tensor_and_the_sum_of_all(
    widths: list[int], rows: int, kind: str
) -> None:
    traced = traced_on(chain(widths, rows, kind))
    assert peak(traced) >= max(a.size_bytes for a in traced.allocations)
    assert peak(traced) >= max(live(traced, s.start) for s in traced.spans)
    assert peak(traced) <= sum(a.size_bytes for a in traced.allocations)
    _, curve = levels(traced)
    assert curve.min() > 0
    assert curve[-1] == sum(a.size_bytes for a in traced.allocations if a.end is None)


@few
@given(widths_of, rows_of)
def test_half_precision_halves_every_allocation(widths: list[int], rows: int) -> None:
    """Every allocation of forward and backward has as many elements; scalars are left out."""
    full, half = (
        Counter(
            (a.op, a.phase, a.requested_bytes // d.itemsize)
            for a in traced_on(chain(widths, rows, dtype=d)).allocations
            if a.phase in (Phase.FORWARD, Phase.BACKWARD) and a.requested_bytes > 2 * d.itemsize
        )
        for d in (torch.float32, torch.bfloat16)
    )
    assert full == half


@few
@given(st.integers(2, 24), st.integers(1, 12))
def test_a_tied_weight_is_counted_once(width: int, rows: int) -> None:
    def build() -> nn.Module:
        model = Chain([width] * 4, "tanh")
        for layer in model.layers:
            layer.weight = model.layers[0].weight
        return model

    traced = traced_on(dataclasses.replace(chain([width] * 4, rows), build_model=build))
    end = traced.spans[-1].end
    assert traced.parameter_count == width**2
    assert live(traced, end, Category.PARAMETER) == rounded(4 * width**2, "cuda")
    assert live(traced, end, Category.OPTIMIZER_STATE) == 2 * rounded(4 * width**2, "cuda")


# --- one plan beside another


@few
@given(widths_of, rows_of, st.integers(1, 48))
def test_more_rows_never_lower_the_peak(widths: list[int], rows: int, more: int) -> None:
    assert peak(traced_on(chain(widths, rows))) <= peak(traced_on(chain(widths, rows + more)))


@few
@given(widths_of, rows_of, kind_of, st.integers(1, 3))
def test_recomputation_keeps_less_and_changes_no_state(
    widths: list[int], rows: int, kind: str, every: int
) -> None:
    """Of every block that is recomputed, its input and a random state of 5,056 B are kept."""
    job = chain(widths, rows, kind)
    plain, again = traced_on(job), traced_on(job, make_use("activation-checkpointing", {"every": every}))
    for kind_ in STATE:
        at = begin(plain, Phase.OPTIMIZER), begin(again, Phase.OPTIMIZER)
        assert live(plain, at[0], kind_) == live(again, at[1], kind_)
    kept = [live(t, begin(t, Phase.BACKWARD), Category.ACTIVATION) for t in (plain, again)]
    assert kept[1] <= kept[0] + 6144 * len(widths)
    assert sum(o.flops for o in again.ops) >= sum(o.flops for o in plain.ops)


@few
@given(widths_of, st.integers(1, 6), st.sampled_from([2, 3, 4]))
def test_micro_batches_keep_the_activations_of_one_part_and_the_same_states(
    widths: list[int], rows: int, parts: int
) -> None:
    """With the batch's rows in parts, activations are those of one part; states are the same."""
    whole, part = chain(widths, rows * parts), chain(widths, rows)
    split = traced_on(whole, make_use("gradient-accumulation", {"micro_batches": parts}))
    one = traced_on(part)
    kept = [live(t, begin(t, Phase.BACKWARD), Category.ACTIVATION) for t in (split, one)]
    assert kept[0] == pytest.approx(kept[1], abs=2048)
    states = [live(t, begin(t, Phase.OPTIMIZER), *STATE) for t in (split, one)]
    assert states[0] == states[1]


@few
@given(st.lists(st.integers(1, 40), min_size=3, max_size=4), st.sampled_from([2, 4, 8]))
def test_more_shards_never_take_more_and_together_hold_every_parameter(widths: list[int], ranks: int) -> None:
    """All ranks hold at least the whole, and each at most one row of padding per tensor, and rounding."""
    found = [
        live(t, t.spans[-1].end, Category.PARAMETER)
        for n in (ranks, 2 * ranks)
        for t in [traced_on(chain(widths, 2 * n), make_use("fsdp2", {}), ranks=n, steps=1)]
    ]
    tensors, padding = len(widths) - 1, 4 * sum(widths[:-1])
    assert found[1] <= found[0]
    assert found[0] * ranks >= 4 * sum(weights(widths))
    assert found[0] <= 4 * sum(weights(widths)) / ranks + padding + 512 * tensors


@few
@given(widths_of, rows_of, kind_of)
def test_steps_after_the_first_make_the_same_allocations(widths: list[int], rows: int, kind: str) -> None:
    traced = traced_on(chain(widths, rows, kind), steps=3)
    second, third = (
        [(a.op, a.size_bytes, a.category, a.phase) for a in traced.allocations if a.step == step and a.phase]
        for step in (1, 2)
    )
    assert [a for a in second if a[3] is not Phase.SETUP] == [a for a in third if a[3] is not Phase.SETUP]


@few
@given(st.integers(7, 14), st.integers(2, 24), rows_of)
def test_an_extrapolated_deep_trace_equals_the_whole_trace(depth: int, width: int, rows: int) -> None:
    job = chain([width] * (depth + 1), rows, "gelu")
    deep, whole = (make(job, Plan(), device="cuda") for make in (deep_trace, trace))
    assert sorted((a.op, a.size_bytes) for a in deep.allocations) == sorted(
        (a.op, a.size_bytes) for a in whole.allocations
    )
    assert memory_profile(deep, Calibration()).phase_peak_bytes == (
        memory_profile(whole, Calibration()).phase_peak_bytes
    )


# --- against real tensors


@pytest.fixture(scope="module")
def counter() -> CountingAllocator:
    if (reason := available()) is not None:
        pytest.skip(reason)
    made = CountingAllocator()
    made.install()
    return made


@few
@given(
    widths=widths_of,
    rows=rows_of,
    kind=kind_of,
    use=st.sampled_from(
        [None, ("activation-checkpointing", {"every": 1}), ("sgd", {}), ("optimizer-in-backward", {})]
    ),
)
def test_predicted_peaks_of_a_random_network_are_the_measured_ones(
    counter: CountingAllocator, widths: list[int], rows: int, kind: str, use: Any
) -> None:
    """Peaks of a real step, phase by phase, within the numbers that Python hands to kernels (64 B each);
    kernels that take scratch memory are run alone beforehand."""
    plan, job = Plan(uses=(make_use(*use),) if use else ()), chain(widths, rows, kind)
    traced = trace(job, plan)
    told = memory_profile(traced, probed(traced, counter)).phase_peak_bytes
    measured = dict[str, int]()
    phase, base = "setup", counter.live_bytes()

    def turn(to: str) -> None:
        nonlocal phase
        measured[phase] = max(measured.get(phase, 0), counter.peak_bytes() - base)
        counter.reset_peak()
        phase = to

    counter.reset_peak()
    step = TrainingStep(job, plan)
    for index in range(2):
        turn("between")
        batch = job.make_batch(index, 0)
        outputs = step.run(batch, lambda to: turn(str(to)))
        turn("between")
        del batch, outputs
    step.close()
    for name in ("forward", "backward", "optimizer"):
        assert told[name] == pytest.approx(measured[name], abs=512), name


# --- the allocator and probabilities


@st.composite
def lives(draw: st.DrawFn) -> tuple[Allocation, ...]:
    sizes = draw(st.lists(st.integers(1, 40 * MIB), min_size=1, max_size=24))
    made = []
    for index, size in enumerate(sizes):
        lasts = draw(st.integers(1, 2 * len(sizes)))
        made.append(
            Allocation(
                start=2 * index,
                end=2 * (index + lasts) + 1,
                size_bytes=-(-size // 512) * 512,
                category=Category.TEMPORARY,
                phase=Phase.FORWARD,
                step=0,
                module="",
                op="",
                requested_bytes=size,
            )
        )
    return tuple(made)


def most_bytes(found: tuple[Allocation, ...]) -> int:
    edges = sorted(e for a in found for e in ((a.start, a.size_bytes), (a.end or 0, -a.size_bytes)))
    return max(itertools.accumulate(change for _, change in edges))


@many
@given(lives())
def test_reserved_memory_lies_between_live_bytes_and_one_segment_each(found: tuple[Allocation, ...]) -> None:
    """In whole segments of 2 MiB, never below what is alive, never above a segment of its own for each."""

    def alone(size: int) -> int:
        return 2 * MIB if size <= MIB else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB

    reserved = replay(found).reserved_peak_bytes
    assert reserved % (2 * MIB) == 0
    assert most_bytes(found) <= reserved <= sum(alone(a.size_bytes) for a in found)


@many
@given(lives())
def test_repeating_all_allocations_at_most_doubles_reserved_memory(found: tuple[Allocation, ...]) -> None:
    """The second round begins when all of the first is free, and reuses its segments in part."""
    end = max(a.end or 0 for a in found) + 2
    again = tuple(dataclasses.replace(a, start=a.start + end, end=(a.end or 0) + end) for a in found)
    once, twice = replay(found).reserved_peak_bytes, replay((*found, *again)).reserved_peak_bytes
    assert once <= twice <= 2 * once


@many
@given(st.floats(1e6, 1e11), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0.3, 3), st.floats(1, 2))
def test_a_larger_card_never_has_a_higher_chance_of_out_of_memory(
    value: float, below: float, above: float, at: float, more: float
) -> None:
    assume(below + above > 1e-3)
    amount = Interval(value=value, low=value * (1 - below), high=value * (1 + above))
    chances = [exceeds_probability(amount, limit) for limit in (value * at, value * at * more)]
    assert all(0 <= c <= 1 and not math.isnan(c) for c in chances)
    assert chances[1] <= chances[0] + 1e-12
