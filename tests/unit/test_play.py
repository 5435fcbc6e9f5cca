"""Simulation of hand-made streams: overlap, waits and the bottleneck."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.cost.op_time import time_model
from memfit.cost.stream_simulator import StreamSimulator, collective_size, split
from memfit.types.machine import Calibration, Device, Fact, Link, Machine
from memfit.types.trace import OpCall, Phase, PhaseSpan, Trace


def fact(value: float) -> Fact:
    return Fact(value=value, source="a test", date="2026-01-01", kind="assumed")


def machine(*, flops: float = 100e12, bandwidth: float = 1e12, link: float = 100e9) -> Machine:
    device = Device(
        name="d",
        kind="cuda",
        memory_bytes=fact(2**36),
        bandwidth_bytes_s=fact(bandwidth),
        peak_flops={"bfloat16": fact(flops)},
        link=Link(name="l", bytes_s=fact(link)),
        efficiency_ratio={"matmul": fact(1.0), "memory": fact(1.0), "link": fact(1.0)},
        nccl_channels=fact(16),
        multiprocessor_count=fact(128),
    )
    return Machine(name="m", device=device, device_count=8, devices_per_host=8)


def call(name: str, args: list[Any], **more: Any) -> OpCall:
    fields = {
        "clock": 1,
        "op": name,
        "signature": json.dumps([name, args, {}]),
        "phase": Phase.FORWARD,
        "step": 0,
        "module": "",
        "dtype": "bfloat16",
        "flops": 0,
        "moved_bytes": 0,
        **more,
    }
    return OpCall(**fields)


def tensor(*shape: int, dtype: str = "bfloat16") -> dict[str, Any]:
    return {"t": [list(shape), [1] * len(shape), dtype]}


def work(**more: Any) -> OpCall:
    """10 ms of memory traffic."""
    return call("aten.add.Tensor", [], moved_bytes=int(1e10), **more)


def gather(megabytes: int = 1000, **more: Any) -> OpCall:
    args = [tensor(megabytes * 500_000), tensor(megabytes * 62_500)]
    return call("c10d._allgather_base_.default", args, group="0", **more)


def wait(stream: str, awaited: str, lag: int = 0) -> OpCall:
    return call("stream.wait", [], stream=stream, waits=(awaited, lag))


def player(on: Machine | None = None) -> StreamSimulator:
    on = on or machine()
    model = time_model(on.device, Calibration())
    assert model is not None
    return StreamSimulator(model=model, machine=on, members={"0": tuple(range(8))})


def test_collective_kinds_and_sizes_are_read_from_signatures() -> None:
    assert collective_size(gather(1000)) == ("all_gather", 10**9)
    whole, part = tensor(800, dtype="float32"), tensor(100, dtype="float32")
    assert collective_size(call("c10d._reduce_scatter_base_.default", [part, whole])) == (
        "reduce_scatter",
        3200,
    )
    assert collective_size(call("c10d.allreduce_.default", [[part, part]])) == ("all_reduce", 800)
    functional = "_c10d_functional."
    assert collective_size(call(functional + "all_gather_into_tensor.default", [part, 8, "0"])) == (
        "all_gather",
        3200,
    )
    assert (
        collective_size(call(functional + "reduce_scatter_tensor.default", [whole, "sum", 8, "0"]))[1] == 3200
    )
    assert (
        collective_size(call(functional + "all_to_all_single.default", [whole, [1], [1], "0"]))[0]
        == "all_to_all"
    )
    assert collective_size(call("c10d.barrier", [part])) == ("", 0)


def test_a_gather_started_early_is_hidden_behind_compute() -> None:
    alone = player().simulate([gather()]).step_s
    ahead = player().simulate([gather(stream="s"), *[work()] * 3, wait("", "s"), work()])
    assert alone < 0.02
    assert ahead.exposed_s == 0
    assert ahead.step_s == pytest.approx(
        4 * player().time_call(work()).seconds + alone * (1 / (1 - 1 / 8) - 1), rel=0.01
    )
    blocked = player().simulate([gather(stream="s"), wait("", "s"), *[work()] * 4])
    assert blocked.exposed_s == pytest.approx(alone, rel=0.01)
    assert blocked.step_s > ahead.step_s


def test_a_wait_with_a_lag_ignores_the_newest_calls() -> None:
    steps = [gather(stream="s"), gather(stream="s"), wait("", "s", 1), work()]
    assert player().simulate(steps).exposed_s == pytest.approx(player().simulate(steps[:1]).step_s, rel=0.01)


def test_concurrent_collectives_share_the_bandwidth_of_the_link() -> None:
    one, two = (
        player().simulate([gather(stream="s")]),
        player().simulate([gather(stream="s"), gather(stream="t")]),
    )
    assert two.step_s == pytest.approx(2 * one.step_s, rel=0.01)


def test_gradient_collectives_are_awaited_at_the_end_of_backward() -> None:
    reduced = gather(stream="group 0", phase=Phase.BACKWARD)
    found = player().simulate([work(phase=Phase.BACKWARD), reduced, work(phase=Phase.OPTIMIZER)])
    assert found.exposed_s == pytest.approx(player().simulate([gather()]).step_s, rel=0.01)


def test_many_tiny_kernels_wait_for_the_host() -> None:
    tiny = call("aten.add.Tensor", [], moved_bytes=8)
    found = player().simulate([tiny] * 100)
    assert found.idle_s > 0.5 * found.step_s
    assert next(iter(player().bottleneck(trace([tiny] * 100)))) == "host"


def test_a_blocking_host_adds_its_issue_time_to_every_kernel() -> None:
    steps = [work(), gather(stream="s"), work(), wait("", "s"), work()]
    waiting = dataclasses.replace(player(), blocking=True)
    items = [waiting.time_call(op) for op in steps]
    assert waiting.simulate(steps).step_s == pytest.approx(sum(i.seconds + i.issue_s for i in items))
    assert player().simulate(steps).step_s < waiting.simulate(steps).step_s


def trace(ops: list[OpCall], again: int = 0) -> Trace:
    numbered = tuple(dataclasses.replace(o, clock=i) for i, o in enumerate(ops))
    spans = (
        PhaseSpan(phase=Phase.FORWARD, step=0, start=0, end=1),
        PhaseSpan(phase=Phase.BACKWARD, step=0, start=1, end=len(ops)),
    )
    return Trace(
        device="cuda",
        steps=1,
        allocations=(),
        ops=numbered,
        spans=spans,
        parameter_count=0,
        trainable_count=0,
        repeated_micro_steps=again,
    )


def test_step_time_grows_linearly_with_repeated_micro_steps() -> None:
    found = [player().step(trace([work(), work()], again)).step_s for again in (0, 1, 7)]
    assert found[2] == pytest.approx(found[0] + 7 * (found[1] - found[0]))
    before, micro, after = split(trace([work(), work()]))
    assert (len(before), len(micro), len(after)) == (0, 2, 0)


def test_the_bottleneck_is_memory_or_link_depending_on_the_size_of_the_gather() -> None:
    assert next(iter(player().bottleneck(trace([work(), work(), gather(10)])))) == "memory"
    assert next(iter(player().bottleneck(trace([work(), gather(10_000), work()])))) == "link"


STEPS = st.lists(
    st.sampled_from(
        [work(), gather(), gather(stream="s"), gather(stream="group 0"), wait("", "s"), wait("s", "")]
    ),
    min_size=1,
    max_size=12,
)


@given(ops=STEPS, faster=st.floats(1, 10), wider=st.floats(1, 10), link=st.floats(1, 10))
def test_a_faster_machine_never_takes_longer(
    ops: list[OpCall], faster: float, wider: float, link: float
) -> None:
    fast = machine(flops=100e12 * faster, bandwidth=1e12 * wider, link=100e9 * link)
    slow = player().simulate(ops).step_s
    assert player(fast).simulate(ops).step_s <= slow * (1 + 1e-9)
    assert slow >= sum(player().time_call(o).seconds for o in ops if o.op.startswith("aten"))
