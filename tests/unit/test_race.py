"""Plans whose sketches are taken to share an error: their kinds, their distances, and which are traced."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from memfit.planner.capacity import Cap
from memfit.planner.multi_device_shortlist import FinalistTracer
from memfit.planner.plan_kinds import doublings, kind
from memfit.planner.selection import Objective
from memfit.techniques.registry import make_use
from memfit.types.deadline import Deadline
from memfit.types.plan import Plan
from memfit.types.result import Estimate, Interval

CUTS = (
    {},
    {"context-parallel": {"degree": 2}},
    {"context-parallel": {"degree": 8}},
    {"tensor-parallel": {"degree": 4}},
    {"tensor-parallel": {"degree": 4}, "context-parallel": {"degree": 2}},
    {"pipeline": {"stages": 4, "schedule": "1f1b"}},
    {"pipeline": {"stages": 4, "schedule": "interleaved", "virtual": 4}},
    {"pipeline": {"stages": 8, "schedule": "interleaved", "virtual": 2}},
)


def plan(cut: dict[str, dict[str, object]]) -> Plan:
    uses = [make_use(name, knobs) for name, knobs in ({"fsdp2": {}} | cut).items()]
    return Plan(uses=tuple(uses), ranks=64)


def test_plans_have_the_same_kind_only_if_the_model_is_cut_the_same_way() -> None:
    kinds = [kind(plan(cut))[0] for cut in CUTS]
    alike = [(a, b) for a, b in itertools.combinations(range(len(CUTS)), 2) if kinds[a] == kinds[b]]
    assert alike == [(1, 2), (6, 7)]


@pytest.mark.parametrize(("one", "other", "apart"), [(1, 2, 2.0), (6, 7, 2.0), (0, 2, 3.0), (0, 0, 0.0)])
def test_distance_between_degrees_is_the_number_of_doublings(one: int, other: int, apart: float) -> None:
    found = [kind(plan(CUTS[at]))[1] for at in (one, other)]
    assert doublings(found[0], found[1]) == doublings(found[1], found[0]) == apart


STEPS = (2, 3, 4, 6, 8)
SKETCHED, TRACED = (1.0, 1.1, 1.2, 1.3, 9.0), (1.0, 0.9, 0.8, 0.85, 0.1)  # seconds


def exactly(value: float) -> Interval:
    return Interval(value=value, low=value, high=value)


def estimate(at: int, *, traced: bool) -> Estimate:
    accumulated = make_use("gradient-accumulation", {"micro_batches": STEPS[at]})
    seconds = (TRACED if traced else SKETCHED)[at]
    return Estimate(
        plan=Plan(uses=(accumulated,)),
        allocated_bytes=exactly(1.0),
        phase_peak_bytes={},
        at_peak_bytes={},
        by_module_bytes={},
        step_s=exactly(seconds),
        flops_per_step=0,
        traced=traced,
    )


def many(blocks: int) -> Any:
    """A search that begins with the first plan; neighbours are the plans before and after one."""

    def at(e: Estimate) -> int:
        return STEPS.index(int(e.plan.uses[0].settings["micro_batches"]))

    return SimpleNamespace(
        request=SimpleNamespace(
            goal=Objective.FASTEST,
            cap=Cap(bytes=10, needs=lambda e: 1, refuses=lambda plan: ()),
            limit_s=None,
        ),
        deadline=Deadline(),
        traced=SimpleNamespace(blocks=blocks),
        progress=lambda *given: None,
        needs=lambda e: 1,
        fits_memory=lambda e: True,
        estimate=lambda e: e,
        trace_ahead=lambda plans: None,
        trace_or_refuse=lambda e: estimate(at(e), traced=True),
        sketch_of=lambda plan: next(e for i in range(5) if (e := estimate(i, traced=False)).plan == plan),
        neighbours=lambda e: [estimate(i, traced=False) for i in (at(e) - 1, at(e) + 1) if 0 <= i < 5],
    )


@pytest.mark.parametrize(("blocks", "best"), [(4, 0.8), (80, 1.0)])
def test_neighbours_of_the_best_plan_are_traced_only_for_a_small_model(blocks: int, best: float) -> None:
    """A neighbour whose sketch is far slower is not traced."""
    found = FinalistTracer(many(blocks), lambda e: True).run([estimate(0, traced=False)], Plan())
    assert min(e.step_s.value for e in found if e.step_s) == best
