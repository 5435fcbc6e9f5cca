"""Which plans' sketches are taken to be off alike."""

from __future__ import annotations

import itertools

import pytest

from memfit.scaling.race import _doublings, kind
from memfit.techniques.registry import make_use
from memfit.types.plan import Plan

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


def test_only_plans_that_are_cut_the_same_way_are_alike() -> None:
    kinds = [kind(plan(cut))[0] for cut in CUTS]
    alike = [(a, b) for a, b in itertools.combinations(range(len(CUTS)), 2) if kinds[a] == kinds[b]]
    assert alike == [(1, 2), (6, 7)]


@pytest.mark.parametrize(("one", "other", "apart"), [(1, 2, 2.0), (6, 7, 2.0), (0, 2, 3.0), (0, 0, 0.0)])
def test_degrees_are_apart_by_their_doublings(one: int, other: int, apart: float) -> None:
    found = [kind(plan(CUTS[at]))[1] for at in (one, other)]
    assert _doublings(found[0], found[1]) == _doublings(found[1], found[0]) == apart
