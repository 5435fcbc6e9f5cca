"""Memory and time estimates from hand-made traces."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from memfit import catalog
from memfit.cost.estimate import estimate, modelled_boundary
from memfit.cost.memory import levels, memory_profile, step_ops, timeline
from memfit.cost.op_time import (
    ASSUMED_EFFICIENCY_RATIO,
    ASSUMED_OVERHEAD_S,
    TimeModel,
    step_basis,
    time_model,
)
from memfit.cost.step_time import host_bytes_s, simulate_step
from memfit.report.terminal import print_estimate
from memfit.types.machine import Calibration, Device, Fact, Host, Machine
from memfit.types.plan import Plan
from memfit.types.trace import Allocation, Category, OpCall, Phase, PhaseSpan, Trace

ACTIVATION, TEMPORARY, STATE = Category.ACTIVATION, Category.TEMPORARY, Category.OPTIMIZER_STATE


def held(start: int, end: int | None, size: int, category: Category = ACTIVATION, **more: Any) -> Allocation:
    fields = {"phase": Phase.FORWARD, "step": 0, "module": "", "op": f"op{start}", **more}
    return Allocation(start=start, end=end, size_bytes=size, category=category, **fields)


def op(clock: int, *, phase: Phase = Phase.FORWARD, **more: Any) -> OpCall:
    fields = {
        "op": "aten.mm.default",
        "signature": f"s{clock}",
        "step": 0,
        "module": "",
        "dtype": "float32",
        "flops": 0,
        "moved_bytes": 0,
        **more,
    }
    return OpCall(clock=clock, phase=phase, **fields)


def spans(*ends: int, step: int = 0) -> tuple[PhaseSpan, ...]:
    """Setup, forward, backward, optimizer, ending at these clocks."""
    starts = (0, *ends)
    return tuple(
        PhaseSpan(phase=phase, step=step, start=start, end=end)
        for phase, start, end in zip(Phase, starts, ends, strict=False)
    )


def made(*allocations: Allocation, **more: Any) -> Trace:
    fields = {"ops": (), "spans": spans(10, 20, 30, 40), "steps": 1, **more}
    return Trace(device="cpu", allocations=allocations, parameter_count=0, trainable_count=0, **fields)


SMALL = made(
    held(1, None, 100, Category.PARAMETER, phase=Phase.SETUP, module="a"),
    held(11, 25, 40, module="a"),
    held(12, 14, 30, TEMPORARY, module="b"),
    held(21, 24, 50, TEMPORARY, module="b"),
    held(31, None, 60, STATE, phase=Phase.OPTIMIZER),
    ops=(op(20, signature="known"), op(32, phase=Phase.OPTIMIZER, signature="unknown")),
)


# --- memory


def test_live_bytes_change_at_each_allocation_and_free() -> None:
    clock, live = levels(SMALL)
    assert clock.tolist() == [1, 11, 12, 14, 21, 24, 25, 31]
    assert live.tolist() == [100, 140, 170, 140, 190, 140, 100, 160]


def test_the_peak_is_split_by_category_and_module() -> None:
    profile = memory_profile(SMALL, Calibration())
    assert profile.peak_bytes == 190
    assert (profile.peak_phase, profile.peak_op) == ("backward", "op21")
    assert profile.at_peak_bytes == {"parameter": 100, "activation": 40, "temporary": 50}
    assert profile.by_module_bytes == {"a": 140, "b": 50}
    assert profile.phase_peak_bytes == {"setup": 100, "forward": 170, "backward": 190, "optimizer": 160}
    assert not profile.workspace_probed


def test_a_phase_without_allocations_peaks_at_the_bytes_already_live() -> None:
    quiet = made(held(1, None, 100), held(15, None, 7), spans=spans(10, 20, 30, 40))
    assert memory_profile(quiet, Calibration()).phase_peak_bytes == {
        "setup": 100,
        "forward": 107,
        "backward": 107,
        "optimizer": 107,
    }


def test_workspace_of_kernels_that_make_the_next_batch_is_not_counted() -> None:
    between = PhaseSpan(phase=Phase.SETUP, step=1, start=40, end=50)
    twice = made(
        *SMALL.allocations, spans=(*spans(10, 20, 30, 40), between), ops=(op(42, phase=Phase.SETUP),), steps=2
    )
    assert memory_profile(twice, Calibration(op_peak_bytes={"s42": 10**6})) == memory_profile(
        dataclasses.replace(twice, ops=()), Calibration()
    )


def test_scratch_memory_inside_a_kernel_is_added_where_the_kernel_runs() -> None:
    # at clock 20 there are 140 B; the kernel takes 60 at its own peak
    profile = memory_profile(SMALL, Calibration(op_peak_bytes={"known": 60, "elsewhere": 10**9}))
    assert profile.peak_bytes == 200
    assert profile.workspace_probed
    assert profile.peak_op == "aten.mm.default"
    assert profile.at_peak_bytes == {"parameter": 100, "activation": 40, "workspace": 60}
    assert profile.phase_peak_bytes["forward"] == 200


def test_a_probe_that_finds_only_the_outputs_leaves_the_peak_operator_unchanged() -> None:
    plain = memory_profile(SMALL, Calibration())
    assert memory_profile(SMALL, Calibration(op_peak_bytes={"known": 50})).peak_op == plain.peak_op


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=60), points=st.integers(1, 20))
def test_thinning_a_timeline_keeps_its_peak(sizes: list[int], points: int) -> None:
    lives = [held(11 + 2 * i, 12 + 2 * i, size) for i, size in enumerate(sizes)]
    found = made(*lives, spans=spans(10, 200, 201, 202))
    thinned = timeline(found, points)
    assert max(thinned) == max(sizes)
    assert len(thinned) <= max(points, 3 * 2)  # at least two points a phase


def test_the_timeline_covers_only_the_last_step() -> None:
    second = tuple(
        dataclasses.replace(s, step=1, start=s.start + 40, end=s.end + 40) for s in SMALL.spans[1:]
    )
    later = (held(55, 56, 1, step=1), held(95, None, 10**6, step=1))
    found = dataclasses.replace(
        SMALL, steps=2, spans=SMALL.spans + second, allocations=SMALL.allocations + later
    )
    forward, rest = timeline(found, 100)[:33], timeline(found, 100)[33:]
    assert set(forward) == {160, 161}
    assert rest == (160,) * 66  # 33 points for each phase, whatever happens in it


def test_micro_steps_that_were_not_traced_are_repeated_in_the_timeline() -> None:
    phases = (Phase.FORWARD, Phase.BACKWARD, Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER)
    found = made(
        held(5, None, 100),
        held(12, 18, 1),
        held(32, 38, 2),
        held(42, 48, 3),
        held(52, 58, 9),
        spans=tuple(
            PhaseSpan(phase=p, step=0, start=10 * (i + 1), end=10 * (i + 2)) for i, p in enumerate(phases)
        ),
        repeated_micro_steps=2,
    )
    per_phase = 10
    seen = timeline(found, 9 * per_phase)
    peaks = [max(seen[i : i + per_phase]) - 100 for i in range(0, len(seen), per_phase)]
    assert peaks == [1, 0, 2, 3, 2, 3, 2, 3, 9]


# --- operators of a step


def test_micro_steps_that_were_not_traced_repeat_the_operators_of_the_last_traced_one() -> None:
    first, last = Phase.FORWARD, Phase.BACKWARD
    twice = (
        PhaseSpan(phase=Phase.SETUP, step=0, start=0, end=1),
        *(
            PhaseSpan(phase=p, step=0, start=s, end=s + 10)
            for p, s in ((first, 1), (last, 11), (first, 21), (last, 31), (Phase.OPTIMIZER, 41))
        ),
    )
    ops = (
        op(0, phase=Phase.SETUP),
        op(2),
        op(12, phase=last),
        op(22),
        op(32, phase=last),
        op(42, phase=Phase.OPTIMIZER),
    )
    found = made(ops=ops, spans=twice, repeated_micro_steps=5)
    assert [(o.clock, times) for o, times in step_ops(found)] == [(2, 1), (12, 1), (22, 6), (32, 6), (42, 1)]


# --- time

GIGA = 1e9


def fact(value: float) -> Fact:
    return Fact(value=value, source="a test", date="2026-01-01", kind="assumed")


def device(flops: float | None = 100 * GIGA, bandwidth: float | None = 10 * GIGA) -> Device:
    return Device(
        name="test",
        kind="cuda",
        memory_bytes=fact(2**30),
        bandwidth_bytes_s=fact(bandwidth) if bandwidth else None,
        peak_flops={"float32": fact(flops)} if flops else {},
    )


CALIBRATED = Calibration(flops_s={"float32": 100 * GIGA}, bandwidth_bytes_s=10 * GIGA, overhead_s=1e-6)


def model(calibration: Calibration = CALIBRATED, *seen: OpCall) -> TimeModel:
    found = time_model(device(), calibration, seen)
    assert found is not None
    return found


def test_without_bandwidth_or_flops_there_is_no_time_model() -> None:
    assert time_model(device(bandwidth=None), Calibration()) is None
    assert time_model(device(flops=None), Calibration()) is None


def test_an_operator_takes_the_longer_of_arithmetic_and_memory() -> None:
    compute, memory = op(1, flops=int(GIGA), moved_bytes=1000), op(2, flops=1000, moved_bytes=int(GIGA))
    assert model().op_s(compute) == pytest.approx(0.01 + 1e-6)
    assert model().op_s(memory) == pytest.approx(0.1 + 1e-6)


def test_catalog_rates_are_taken_at_an_assumed_efficiency() -> None:
    found = time_model(dataclasses.replace(device(), kind="cpu"), Calibration())
    assert found is not None
    expected = 0.01 / ASSUMED_EFFICIENCY_RATIO + ASSUMED_OVERHEAD_S
    assert found.op_s(op(1, flops=int(GIGA))) == pytest.approx(expected)


def test_a_dtype_without_a_rate_uses_that_of_float32_or_else_only_its_bytes() -> None:
    assert model().roofline_s(op(1, flops=int(GIGA), dtype="bfloat16")) == pytest.approx(0.01)
    halves = dataclasses.replace(model(), flops_s={"bfloat16": GIGA})
    assert halves.roofline_s(op(1, flops=int(GIGA), moved_bytes=10)) == pytest.approx(1e-9)


def test_a_measured_operator_time_overrides_the_roofline() -> None:
    calibration = dataclasses.replace(CALIBRATED, op_s={"s1": 0.5})
    assert model(calibration).op_s(op(1, flops=int(GIGA))) == pytest.approx(0.5 + 1e-6)


def test_efficiency_between_measurements_is_interpolated_over_the_logarithm_of_work() -> None:
    """1e-4 s ideal took 4e-4 (25 %), 1e-2 s ideal took 2e-2 (50 %): 1e-3 s runs at 37.5 %."""
    small, large = op(1, flops=10**7), op(2, flops=10**9)
    calibration = dataclasses.replace(CALIBRATED, op_s={"s1": 4e-4, "s2": 2e-2})
    found = model(calibration, small, large)
    assert found.op_s(op(3, flops=10**8)) == pytest.approx(1e-3 / 0.375 + 1e-6)
    # outside the measured range: as at its nearer end
    assert found.op_s(op(3, flops=10**6)) == pytest.approx(1e-5 / 0.25 + 1e-6)
    assert found.op_s(op(3, flops=10**10)) == pytest.approx(0.1 / 0.5 + 1e-6)
    # another dtype uses float32's curve, another operator has none, and no work takes only the overhead
    assert found.op_s(op(3, flops=10**8, dtype="bfloat16")) == pytest.approx(1e-3 / 0.375 + 1e-6)
    assert found.op_s(op(3, flops=10**8, op="aten.bmm.default")) == pytest.approx(1e-3 + 1e-6)
    assert found.op_s(op(3)) == 1e-6


def test_calls_with_little_work_tell_what_a_call_takes_and_nothing_of_the_speed_at_more_work() -> None:
    """Calls with 1e-9 s and 1e-8 s of ideal work take 2e-5 s and 4e-5 s: their calls take 3e-5 s."""
    tiny, small, large = op(1, flops=100), op(2, flops=1000), op(3, flops=10**9)
    found = model(dataclasses.replace(CALIBRATED, op_s={"s1": 2e-5, "s2": 4e-5}), tiny, small)
    assert found.op_s(large) == pytest.approx(1e-2, rel=0.01)
    assert found.op_s(op(4, flops=200)) == pytest.approx(3e-5 + 1e-6, rel=1e-3)
    assert found.op_s(op(4, op="aten.bmm.default", flops=200)) == pytest.approx(3e-5 + 1e-6, rel=1e-3)
    # the time of the call is not part of the efficiency: 1e-4 s of ideal work took 2e-4 + 3e-5 s
    timed = dataclasses.replace(CALIBRATED, op_s={"s1": 2e-5, "s2": 4e-5, "s5": 2.3e-4})
    found = model(timed, tiny, small, op(5, flops=10**7))
    assert found.op_s(large) == pytest.approx(2e-2 + 3e-5 + 1e-6, rel=1e-3)


WORK = st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 10**10)), min_size=1, max_size=5)


@given(work=WORK, faster=st.floats(1, 100), wider=st.floats(1, 100))
def test_higher_device_rates_never_increase_the_predicted_time(
    work: list[tuple[int, int]], faster: float, wider: float
) -> None:
    ops = [(op(i, flops=f, moved_bytes=b), 2) for i, (f, b) in enumerate(work)]
    slow = time_model(device(), Calibration())
    fast = time_model(device(100 * GIGA * faster, 10 * GIGA * wider), Calibration())
    assert slow is not None
    assert fast is not None
    assert fast.total_s(ops) <= slow.total_s(ops) * (1 + 1e-12)


# --- estimates


def machine(kind: str = "cuda", power_w: float | None = 100.0) -> Machine:
    return Machine(
        name="test",
        device=dataclasses.replace(device(), kind=kind, power_w=fact(power_w) if power_w else None),
    )


def test_step_time_is_the_sum_of_operator_times_and_energy_is_power_times_time() -> None:
    traced = dataclasses.replace(
        SMALL, ops=(op(12, flops=10**9), op(35, phase=Phase.OPTIMIZER, moved_bytes=10**9))
    )
    found = estimate(traced, Plan(), machine=machine(), calibration=CALIBRATED, model=model())
    assert found.step_s is not None
    assert found.step_s.value == pytest.approx(0.01 + 0.1 + 2e-6)
    assert found.energy_j == pytest.approx(100.0 * found.step_s.value)
    assert found.flops_per_step == 10**9
    # 190 bytes in three blocks of 512
    assert (found.allocated_bytes.value, found.peak_phase, found.traced) == (1536, "backward", True)
    assert found.usd is None


def test_without_a_time_model_step_time_and_energy_are_unknown() -> None:
    found = estimate(SMALL, Plan(), machine=machine(), calibration=Calibration(), model=None)
    assert (found.step_s, found.energy_j) == (None, None)


def test_a_calibrated_estimate_has_a_narrower_interval() -> None:
    def width(calibration: Calibration) -> float:
        traced = dataclasses.replace(SMALL, ops=(op(12, flops=10**9),))
        found = estimate(traced, Plan(), machine=machine(), calibration=calibration, model=model(calibration))
        assert found.step_s is not None
        return (found.step_s.high - found.step_s.low) / found.step_s.value

    assert width(CALIBRATED) < width(Calibration())


def test_a_step_time_says_what_it_rests_on() -> None:
    gpu = catalog.device("H100-SXM")
    bandwidth = gpu.bandwidth_bytes_s
    assert bandwidth is not None
    assumed = dataclasses.replace(gpu, bandwidth_bytes_s=dataclasses.replace(bandwidth, kind="assumed"))
    assert step_basis(gpu, CALIBRATED) == "timed"
    assert step_basis(gpu, Calibration()) == "published"
    assert step_basis(assumed, Calibration()) == "assumed"
    traced = dataclasses.replace(SMALL, ops=(op(12, flops=10**9),))
    timed = estimate(traced, Plan(), machine=machine(), calibration=CALIBRATED, model=model())
    assert timed.step_basis == "timed"
    unknown = estimate(SMALL, Plan(), machine=machine(), calibration=Calibration(), model=None)
    assert unknown.step_basis == ""
    for lang, text in (("en", "(operators timed here)"), ("ja", "（このマシンで演算を計測）")):
        console = Console(record=True, width=200, file=io.StringIO())
        print_estimate(timed, console=console, lang=lang)
        assert console.export_text().count(text) == 1


def test_the_interval_of_a_step_is_one_of_rates_and_longer_upwards() -> None:
    traced = dataclasses.replace(SMALL, ops=(op(12, flops=10**9),))
    found = estimate(traced, Plan(), machine=machine(), calibration=CALIBRATED, model=model()).step_s
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(found.value / 1.25), pytest.approx(found.value / 0.75))
    measured = dataclasses.replace(CALIBRATED, step_spread_ratio=0.1)
    spread = estimate(traced, Plan(), machine=machine(), calibration=measured, model=model(measured)).step_s
    assert spread is not None
    assert spread.high / spread.value == pytest.approx(1.1)


@given(value=st.floats(0, 1e15), ratio=st.floats(0, 1))
def test_an_interval_contains_its_value(value: float, ratio: float) -> None:
    from memfit.cost.estimate import interval_around

    found = interval_around(value, ratio)
    assert 0 <= found.low <= found.value <= found.high
    assert math.isfinite(found.high)


def test_offload_time_covers_the_writes_and_reads_of_every_micro_step() -> None:
    slow_disk = model(dataclasses.replace(CALIBRATED, disk_bytes_s=1e6))

    def seconds(traced: Trace) -> float:
        found = simulate_step([traced], Plan(), machine(), slow_disk)
        assert found is not None
        return found.step_s

    once = made(offloaded_bytes=10**6, restored_bytes=10**6)
    assert seconds(once) == pytest.approx(2.0)
    assert seconds(dataclasses.replace(once, restored_bytes=3 * 10**6)) == pytest.approx(4.0)  # read thrice
    assert seconds(dataclasses.replace(once, repeated_micro_steps=3)) == pytest.approx(8.0)  # 1 of 4 traced
    assert seconds(made()) == 0


def test_the_devices_of_a_host_share_its_transfer_bandwidth() -> None:
    host = Host(name="h", device_bytes_s=fact(20e9), shared_bytes_s=fact(80e9))
    alone = dataclasses.replace(machine(), host=host)
    assert host_bytes_s(alone, model(Calibration())) == 20e9
    assert host_bytes_s(dataclasses.replace(alone, device_count=8), model(Calibration())) == 10e9


def test_the_energy_boundary_names_what_the_energy_covers() -> None:
    assert modelled_boundary(machine("cpu")).startswith("package")
    assert modelled_boundary(machine("cuda")) == "board (modelled: power x time)"
    hosted = dataclasses.replace(machine("cuda"), host=Host(name="box", power_w=fact(200.0)))
    assert modelled_boundary(hosted) == "board and host (modelled: power x time)"
    silent = dataclasses.replace(machine("cuda"), host=Host(name="box"))
    assert modelled_boundary(silent) == modelled_boundary(machine("cuda"))
