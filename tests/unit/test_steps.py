"""Step time of plans of several ranks, from traces of their kinds of ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import words

from memfit.catalog.machine_spec import machine
from memfit.cost.op_time import time_model
from memfit.cost.step_time import micro_steps, simulate_step
from memfit.techniques.rank_mesh import layout
from memfit.techniques.registry import make_use as use
from memfit.trace.tracer import trace
from memfit.types.machine import Calibration, Fact, Link, Machine
from memfit.types.plan import Plan, Use
from memfit.types.trace import Trace

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")


def traces(plan: Plan, device: str = "cuda") -> list[Trace]:
    job = words(blocks=4)
    return [trace(job, plan, rank=r, device=device) for r in layout(plan).distinct_ranks()]


def seconds(plan: Plan, found: list[Trace], on: Machine) -> float:
    model = time_model(on.device, Calibration())
    assert model is not None
    step = simulate_step(found, plan, on, model)
    assert step is not None
    return step.step_s


def slower_link(on: Machine, times: float) -> Machine:
    assert on.device.link is not None
    bytes_s = Fact(value=on.device.link.bytes_s.value / times, source="a test", date="2026-01-01")
    link = Link(name="slow", bytes_s=bytes_s)
    return dataclasses.replace(on, device=dataclasses.replace(on.device, link=link))


def pipeline(**settings: Any) -> Use:
    return use("pipeline", {"stages": 4, "micro_batches": 4, **settings})


PLANS = (
    (use("ddp", {}),),
    (use("fsdp2", {"precision": "bf16"}),),
    (use("zero", {"stage": 1}),),
    (use("zero", {"stage": 3}),),
    (pipeline(schedule="gpipe"),),
    (pipeline(schedule="1f1b"),),
    (pipeline(stages=2, schedule="interleaved", virtual=2), use("fsdp2", {})),
    (pipeline(schedule="zero-bubble"),),
    (pipeline(stages=2, schedule="zero-bubble-v", virtual=2),),
)


@pytest.mark.parametrize("uses", PLANS, ids=lambda uses: "+".join(f"{u.technique}" for u in uses))
def test_plans_of_several_ranks_have_a_step_time_that_grows_on_a_slower_link(uses: tuple[Use, ...]) -> None:
    ranks = 2 if uses[0].settings.get("schedule") == "zero-bubble-v" else 4
    plan = Plan(ranks=ranks, uses=uses)
    found, eight = traces(plan), machine("8xH100-SXM")
    quick, slow = seconds(plan, found, eight), seconds(plan, found, slower_link(eight, 1e6))
    assert 0 < quick < slow


SHARDED = Plan(ranks=4, uses=(use("fsdp2", {}),))
PIPED = Plan(ranks=4, uses=(pipeline(schedule="1f1b"),))


@pytest.fixture(scope="module")
def kept() -> dict[Plan, list[Trace]]:
    return {plan: traces(plan) for plan in (SHARDED, PIPED)}


@given(data=st.data(), slow=st.floats(1, 1e6), more=st.floats(1, 1e3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
def test_law_a_deadline_met_on_a_slower_link_is_met_on_a_faster_one(
    kept: dict[Plan, list[Trace]], data: st.DataObject, slow: float, more: float
) -> None:
    plan = data.draw(st.sampled_from([SHARDED, PIPED]))
    eight = machine("8xH100-SXM")
    faster = seconds(plan, kept[plan], slower_link(eight, slow))
    assert faster <= seconds(plan, kept[plan], slower_link(eight, slow * more)) * (1 + 1e-9)


@given(quicker=st.floats(1, 100), wider=st.floats(1, 100))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
def test_law_more_flops_and_bandwidth_never_make_a_plan_slower(
    kept: dict[Plan, list[Trace]], quicker: float, wider: float
) -> None:
    eight = machine("8xH100-SXM")
    device = eight.device
    assert device.bandwidth_bytes_s is not None
    fast = dataclasses.replace(
        device,
        peak_flops={k: dataclasses.replace(f, value=f.value * quicker) for k, f in device.peak_flops.items()},
        bandwidth_bytes_s=dataclasses.replace(
            device.bandwidth_bytes_s, value=device.bandwidth_bytes_s.value * wider
        ),
    )
    for plan, found in kept.items():
        quick = seconds(plan, found, dataclasses.replace(eight, device=fast))
        assert quick <= seconds(plan, found, eight) * (1 + 1e-9)


def test_a_pipeline_bubble_makes_a_step_longer_than_its_busiest_rank() -> None:
    """The bubble is as long as three of the four micro-batches; the busiest rank also steps and reduces."""
    plan = Plan(ranks=4, uses=(pipeline(schedule="1f1b"),))
    found, on = traces(plan), machine("8xH100-SXM")
    assert micro_steps(found[0]) == 4
    model = time_model(on.device, Calibration())
    assert model is not None
    alone = [simulate_step([t], Plan(), on, model) for t in found]
    busiest = max(one.step_s for one in alone if one is not None)
    assert seconds(plan, found, on) > 1.2 * busiest


def test_collectives_across_hosts_use_the_network() -> None:
    plan = Plan(ranks=4, uses=(use("ddp", {}),))
    found = traces(plan)
    apart = machine("4x1xH100-SXM@IB-NDR")
    assert apart.network is not None
    slow = Link(name="slow", bytes_s=dataclasses.replace(apart.network.bytes_s, value=1e5))
    inside, outside = machine("4xH100-SXM"), dataclasses.replace(apart, network=slow)
    assert seconds(plan, found, inside) < seconds(plan, found, outside)
    assert seconds(plan, found, slower_link(outside, 1e6)) == seconds(plan, found, outside)


def test_ranks_on_a_cpu_have_no_step_time() -> None:
    plan = Plan(ranks=2, uses=(use("ddp", {}),))
    on = machine("8xH100-SXM")
    cpu = dataclasses.replace(on, device=dataclasses.replace(on.device, kind="cpu"))
    model = time_model(cpu.device, Calibration())
    assert model is not None
    assert simulate_step(traces(plan, "cpu"), plan, cpu, model) is None
