"""Device memory outside tensors, compared with published measurements and calculations by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit import catalog
from memfit.cost.device_overhead import (
    BLAS_WORKSPACE,
    CONNECTION_BYTES,
    device_overhead,
    exceeds_probability,
    nccl_bytes,
    with_workspaces,
)
from memfit.cost.estimate import estimate
from memfit.cost.memory_estimate import (
    UNKNOWN_FOOTPRINT,
    UNKNOWN_FOOTPRINT_HERE,
    delay_frees,
    footprint,
    sketch_footprint,
)
from memfit.planner.capacity import needed_bytes
from memfit.report.words import load_words
from memfit.types.machine import Calibration, Device, Fact, Machine
from memfit.types.plan import Plan
from memfit.types.result import Estimate, Interval
from memfit.types.trace import Allocation, Category, OpCall, Phase, PhaseSpan, Trace

MIB, GIB = 2**20, 2**30
A100 = catalog.machine("A100-80GB-SXM")


def op(
    clock: int, name: str, phase: Phase, step: int = 0, *, signature: str = "", dtype: str = "float32"
) -> OpCall:
    return OpCall(
        clock=clock,
        op=name,
        signature=signature,
        phase=phase,
        step=step,
        module="",
        dtype=dtype,
        flops=0,
        moved_bytes=0,
    )


def life(start: int, end: int | None, size: int) -> Allocation:
    return Allocation(
        start=start,
        end=end,
        size_bytes=size,
        category=Category.TEMPORARY,
        phase=Phase.FORWARD,
        step=0,
        module="",
        op="",
    )


def traced(allocations: list[Allocation], ops: list[OpCall] | None = None, offloaded: int = 0) -> Trace:
    return Trace(
        device="cuda",
        steps=1,
        allocations=tuple(allocations),
        ops=tuple(ops or ()),
        spans=(PhaseSpan(phase=Phase.FORWARD, step=0, start=0, end=10),),
        parameter_count=0,
        trainable_count=0,
        offloaded_bytes=offloaded,
    )


def exactly(value: float) -> Interval:
    return Interval(value=value, low=value, high=value)


# -- BLAS workspaces ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size_mib"), [("A100-80GB-SXM", 8.125), ("H100-SXM", 32), ("MI300X", 128)])
def test_each_thread_allocates_one_blas_workspace(name: str, size_mib: float) -> None:
    """Forward and optimizer share one; backward has its own; both stay. An H100's snapshot shows two of
    32 MiB (pytorch#144397)."""
    ops = [
        op(0, "aten.relu.default", Phase.FORWARD),
        op(2, "aten.addmm.default", Phase.FORWARD),
        op(4, "aten.mm.default", Phase.BACKWARD),
        op(6, "aten.mm.default", Phase.BACKWARD),
        op(8, "aten.bmm.default", Phase.OPTIMIZER),
    ]
    made = with_workspaces(traced([], ops), catalog.device(name), keeps=True).allocations
    assert [(a.start, a.end, a.size_bytes, a.op) for a in made] == [
        (3, None, size_mib * MIB, BLAS_WORKSPACE),
        (5, None, size_mib * MIB, BLAS_WORKSPACE),
    ]


@pytest.mark.parametrize(("name", "size_mib"), [("A100-80GB-SXM", 8.125), ("H100-SXM", 32)])
def test_from_torch_2_15_on_each_product_frees_its_blas_workspace(name: str, size_mib: float) -> None:
    """What torch 2.15's own CUDA code allocates; benchmarks/cuda_memory.py."""
    row, matrix, column, other_row = (
        f'["aten.addmm.default",[{{"t":[{bias},"float32"]}},{{"t":[[4,8],[8,1],"float32"]}},'
        f'{{"t":[{columns},"float32"]}}],{{}}]'
        for bias, columns in (
            ("[4],[1]", "[8,4],[1,8]"),
            ("[4,4],[4,1]", "[8,4],[1,8]"),
            ("[1],[1]", "[8,1],[1,8]"),
            ("[1],[1]", "[8,4],[1,8]"),
        )
    )
    ops = [
        op(2, "aten.addmm.default", Phase.FORWARD, signature=row),
        op(4, "aten.addmm.default", Phase.FORWARD, signature=matrix),
        op(6, "aten.addmm.default", Phase.FORWARD, signature=matrix, dtype="bfloat16"),
        op(8, "aten.addmm.default", Phase.FORWARD, signature=column),
        op(10, "aten.addmm.default", Phase.FORWARD, signature=other_row, dtype="bfloat16"),
        op(12, "aten.mm.default", Phase.BACKWARD, dtype="bfloat16"),
    ]
    made = with_workspaces(traced([], ops), catalog.device(name), keeps=False).allocations
    assert [(a.start, a.end, a.size_bytes / MIB) for a in made] == [
        (3, 3, 1),
        (5, 5, size_mib),
        (7, 7, 1),
        (9, 9, size_mib),
        (11, 11, size_mib),
        (13, 13, size_mib),
    ]


def test_a_matrix_product_in_place_needs_a_blas_workspace() -> None:
    products = traced([], [op(0, "aten.addmm_.default", Phase.FORWARD)])
    assert [a.op for a in with_workspaces(products, A100.device).allocations] == [BLAS_WORKSPACE]


def test_there_is_no_blas_workspace_without_matrix_products_or_on_a_cpu() -> None:
    assert (
        with_workspaces(traced([], [op(0, "aten.add.Tensor", Phase.FORWARD)]), A100.device).allocations == ()
    )
    processor = Device(name="cpu", kind="cpu", memory_bytes=Fact(value=2**34, source="", date=""))
    products = traced([], [op(0, "aten.mm.default", Phase.FORWARD)])
    assert with_workspaces(products, processor) is products


# -- NCCL and context, compared with published measurements -------------------------------------------


def test_nccl_connection_bytes_are_the_two_allocations_that_nccl_logs() -> None:
    """10,485,760 and 2,097,152 bytes (nccl#1685)."""
    assert CONNECTION_BYTES == 10_485_760 + 2_097_152


def test_predicted_bytes_of_nccl_communicators_cover_published_measurements() -> None:
    """On 4 A100: 544 MB for two ranks, 688 for more (nccl#964). On 8 H100, context and first communicator
    before an all-to-all: 1.06 GB (nccl#1685)."""
    two = nccl_bytes(A100.device, 2)
    assert two is not None
    assert two.low < 544 * MIB < two.high
    assert two.low < 688 * MIB < two.high
    assert two.value == pytest.approx(544 * MIB, rel=0.1)
    first = device_overhead(catalog.device("H100-SXM"), (("world", 8),)).total_bytes
    assert first is not None
    assert first.low < 1.06e9 < first.high


@given(st.lists(st.integers(1, 64), max_size=6))
def test_every_communicator_adds_its_bytes_and_a_single_rank_needs_none(ranks: list[int]) -> None:
    groups = [(str(i), n) for i, n in enumerate(ranks)]
    total, alone = (device_overhead(A100.device, g).total_bytes for g in (groups, ()))
    assert total is not None
    assert alone is not None
    each = sum(n.value for r in ranks if r > 1 and (n := nccl_bytes(A100.device, r)))
    assert total.value == alone.value + each


def test_every_nvidia_device_has_a_context_size_and_that_of_amd_devices_is_unknown() -> None:
    """The context grows with the multiprocessors: 40 on a T4 to 148 on a B200."""
    parts = {name: device_overhead(catalog.device(name)).parts_bytes for name in catalog.device_names()}
    assert [name for name, found in parts.items() if "context" not in found] == [
        name for name in parts if name.startswith("MI")
    ]
    assert parts["T4"]["context"] < parts["A100-80GB-SXM"]["context"] < parts["B200"]["context"]
    assert device_overhead(catalog.device("MI300X")).total_bytes is None
    for name in catalog.device_names():
        for field in dataclasses.fields(Device):
            fact = getattr(catalog.device(name), field.name)
            if isinstance(fact, Fact) and fact.low is not None and fact.high is not None:
                assert fact.low <= fact.value <= fact.high, (name, field.name)


# -- probability --------------------------------------------------------------------------------------


def test_an_interval_is_the_central_95_percent_of_the_distribution() -> None:
    even = Interval(value=10, low=8, high=12)
    assert exceeds_probability(even, 10) == pytest.approx(0.5)
    assert exceeds_probability(even, 12) == pytest.approx(0.025, abs=1e-4)
    assert exceeds_probability(even, 8) == pytest.approx(0.975, abs=1e-4)
    # The longer upper side has its share of the probability: 3 to 1.
    assert exceeds_probability(Interval(value=10, low=9, high=13), 10) == pytest.approx(0.75)
    assert exceeds_probability(exactly(10), 10) == 0.0
    assert exceeds_probability(exactly(10), 9.9) == 1.0


@given(st.floats(1, 50), st.floats(0, 20), st.floats(0, 20), st.floats(1, 100), st.floats(0, 10))
def test_more_memory_never_raises_the_probability_of_exceeding_it(
    value: float, under: float, over: float, limit: float, more: float
) -> None:
    amount = Interval(value=value, low=value - under, high=value + over)
    less, greater = (exceeds_probability(amount, x) for x in (limit, limit + more))
    assert 0 <= greater <= less + 1e-12 <= 1 + 1e-12
    assert not math.isnan(less)


# -- allocated, reserved and device memory ------------------------------------------------------------

# 30 GiB are live, 20 GiB are freed, and 25 GiB requested, which the free 20 do not hold: 75 are reserved.
STRANDED = [life(0, None, 30 * GIB), life(1, 2, 20 * GIB), life(3, None, 25 * GIB)]


def test_reserved_and_device_memory_match_a_calculation_by_hand() -> None:
    found = footprint(traced(STRANDED), exactly(55 * GIB), A100)
    assert found.reserved_bytes is not None
    assert found.device_bytes is not None
    assert found.reserved_bytes.value == 75 * GIB
    assert found.reserved_bytes.low == 55 * GIB  # other frees or settings may strand nothing
    beside = device_overhead(A100.device)
    assert beside.total_bytes is not None
    assert found.device_bytes.value == 75 * GIB + beside.total_bytes.value
    assert found.device_parts_bytes == {"reserved": 75 * GIB, **beside.parts_bytes}
    assert found.oom_probability == pytest.approx(0, abs=1e-6)  # 79 GiB are available


def test_cached_memory_that_can_be_released_does_not_raise_the_oom_probability() -> None:
    """75 GiB reserved do not fit in 60, but the cached 20 are released first, and 55 do fit."""

    def on(memory: int) -> float | None:
        room = dataclasses.replace(A100.device.memory_bytes, value=float(memory))
        machine = dataclasses.replace(A100, device=dataclasses.replace(A100.device, memory_bytes=room))
        return footprint(traced(STRANDED), exactly(55 * GIB), machine).oom_probability

    roomy, tight, small = on(60 * GIB), on(55 * GIB), on(50 * GIB)
    assert roomy is not None
    assert roomy < 0.05
    assert tight is not None
    assert tight > 0.5
    assert small is not None
    assert small > 0.999


def test_a_cpu_has_no_reserved_or_device_memory_and_no_oom_probability() -> None:
    processor = Device(name="cpu", kind="cpu", memory_bytes=Fact(value=2**34, source="", date=""))
    machine = Machine(name="cpu", device=processor)
    for found in (
        footprint(traced(STRANDED), exactly(55 * GIB), machine),
        sketch_footprint(exactly(GIB), machine, reserved_ratio=1.1),
    ):
        assert (found.reserved_bytes, found.device_bytes, found.oom_probability) == (None, None, None)


def test_the_answer_for_a_kind_with_an_unknown_footprint_says_so_and_what_is_added_for_it() -> None:
    """6 % of the tensors for the allocator, and 1 GiB for the context."""
    memory = Fact(value=64.0 * GIB, source="", date="")

    def on(kind: str, *, is_here: bool = False) -> Estimate:
        device = Device(name="x", kind=kind, memory_bytes=memory)
        machine = Machine(name="x", device=device, is_here=is_here)
        return estimate(
            traced(STRANDED), Plan(), machine=machine, calibration=Calibration(), model=None, step=None
        )

    unknown = on("xpu")
    assert (unknown.reserved_bytes, unknown.device_bytes) == (None, None)
    assert UNKNOWN_FOOTPRINT in unknown.assumptions
    assert UNKNOWN_FOOTPRINT not in (*on("cuda").assumptions, *on("cpu").assumptions)
    machine = Machine(name="x", device=Device(name="x", kind="xpu", memory_bytes=memory))
    needed = needed_bytes(unknown, machine)
    assert needed == int(unknown.allocated_bytes.value * 1.06) + GIB
    assert "6 % of the tensors" in UNKNOWN_FOOTPRINT
    assert "1 GiB" in UNKNOWN_FOOTPRINT
    here = on("xpu", is_here=True)
    assert UNKNOWN_FOOTPRINT_HERE in here.assumptions
    assert UNKNOWN_FOOTPRINT not in here.assumptions
    for text in (UNKNOWN_FOOTPRINT, UNKNOWN_FOOTPRINT_HERE):
        assert load_words("ja").of(text) != text


def test_the_process_beside_an_unknown_device_may_be_as_small_as_one_without_a_device() -> None:
    def low_bytes(kind: str) -> float:
        memory = Fact(value=64.0 * GIB, source="", date="")
        machine = Machine(name="x", device=Device(name="x", kind=kind, memory_bytes=memory))
        estimated = estimate(
            traced(STRANDED), Plan(), machine=machine, calibration=Calibration(), model=None, step=None
        )
        assert estimated.host_bytes is not None
        return estimated.host_bytes.low

    assert low_bytes("another") < 0.38 * GIB < low_bytes("cuda")


def test_an_unknown_context_size_leaves_device_memory_unknown_but_not_reserved() -> None:
    found = footprint(traced(STRANDED), exactly(55 * GIB), catalog.machine("MI300X"))
    assert found.reserved_bytes is not None
    assert (found.device_bytes, found.oom_probability) == (None, None)


@given(st.lists(st.integers(-1, 5), max_size=40), st.integers(0, 16))
def test_delayed_frees_keep_every_allocation_in_order(sizes: list[int], by: int) -> None:
    events = [(i, size, "") for i, size in enumerate(sizes)]
    moved = delay_frees(events, by)
    assert sorted(moved) == sorted(events)
    assert [e for e in moved if e[1] >= 0] == [e for e in events if e[1] >= 0]
    for before, after in ((events.index(e), moved.index(e)) for e in events if e[1] < 0):
        assert before - by <= after <= before + by  # other events may pass it; it moves by at most `by`
