"""A technique is left out for a reason based on a priced plan: the best plan with it, or the smallest."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import words

from memfit.planner import capacity, search, single_device
from memfit.planner.capacity import needed_bytes
from memfit.planner.explanations import explain_techniques, smallest_traced
from memfit.planner.recompute_budget import Cap
from memfit.planner.request import Request
from memfit.planner.selection import Objective, Prices, decide
from memfit.planner.shortlist import counterfactuals
from memfit.report.choices import search_view
from memfit.report.quantities import sentence_text
from memfit.report.words import load_words
from memfit.techniques.registry import short_label
from memfit.types.job import JobRef
from memfit.types.machine import Device, Fact, Machine
from memfit.types.plan import Accuracy, Plan, use
from memfit.types.result import Estimate, Interval, Reason

PLAIN = Plan()
MIXED, CHECKPOINTED = use("bf16-autocast"), use("activation-checkpointing")
HALVES, THIRDS = (use("gradient-accumulation", micro_batches=n) for n in (2, 3))
LOW_BIT = use("adamw-8bit")


def plan(*uses: Any) -> Plan:
    return Plan(uses=uses)


def priced(of: Plan, peak: float, step_s: float, *, traced: bool = True) -> Estimate:
    return Estimate(
        plan=of,
        allocated_bytes=Interval(value=peak, low=peak, high=peak),
        phase_peak_bytes={},
        at_peak_bytes={},
        by_module_bytes={},
        step_s=Interval(value=step_s, low=step_s, high=step_s),
        flops_per_step=0,
        traced=traced,
    )


# Sketches of all plans. The one of half batches in bf16 is too small: its trace needs 45.
SKETCHES = [
    priced(PLAIN, 100, 1.0, traced=False),
    priced(plan(CHECKPOINTED), 30, 1.3, traced=False),
    priced(plan(MIXED), 60, 0.8, traced=False),
    priced(plan(MIXED, HALVES), 39, 0.9, traced=False),
    priced(plan(MIXED, THIRDS, LOW_BIT), 35, 1.2, traced=False),
    priced(plan(LOW_BIT), 80, 1.0, traced=False),
]
TRACED = [
    priced(PLAIN, 100, 1.0),
    priced(plan(CHECKPOINTED), 30, 1.3),
    priced(plan(MIXED), 60, 0.8),
    priced(plan(MIXED, HALVES), 45, 0.9),
]
CAP = Cap(bytes=40, needs=lambda e: int(e.allocated_bytes.value), refuses=lambda of: ())


def reasons(traced: Sequence[Estimate]) -> dict[str, Reason]:
    found = decide(
        traced,
        goal=Objective.FASTEST,
        cap_bytes=40,
        considered=len(SKETCHES),
        fits=CAP.has,
        left_out=(),
        price=Prices(lambda of: next(e for e in (*traced, *SKETCHES) if e.plan == of), sketches=SKETCHES),
    )
    assert found.recommended is not None
    return {r.technique: r for r in found.recommended.reasons if r.kind != "saves"}


def test_the_best_plan_with_a_technique_that_may_fit_is_traced_before_it_is_left_out() -> None:
    rival = plan(MIXED, THIRDS, LOW_BIT)
    assert counterfactuals(SKETCHES, TRACED, TRACED[1], cap=CAP, goal=Objective.FASTEST) == [rival]
    found = reasons([*TRACED, priced(rival, 38, 1.4)])
    for name in ("bf16-autocast", "adamw-8bit", "gradient-accumulation"):
        assert (found[name].kind, found[name].detail) == ("left_out_slower", rival.label)
        assert found[name].time_ratio == pytest.approx(1.4 / 1.3)


def test_nothing_more_is_traced_once_the_best_plan_with_each_technique_was() -> None:
    traced = [*TRACED, priced(plan(MIXED, THIRDS, LOW_BIT), 38, 1.4)]
    assert counterfactuals(SKETCHES, traced, traced[1], cap=CAP, goal=Objective.FASTEST) == []


def test_where_no_plan_with_a_technique_fits_the_smallest_is_traced_and_named() -> None:
    tight = Cap(bytes=32, needs=CAP.needs, refuses=CAP.refuses)
    wanted = counterfactuals(SKETCHES, TRACED, TRACED[1], cap=tight, goal=Objective.FASTEST)
    assert wanted == [plan(MIXED, THIRDS, LOW_BIT)]
    found = reasons([*TRACED, priced(wanted[0], 41, 1.4)])
    assert found["adamw-8bit"] == Reason(
        kind="left_out_too_large",
        technique="adamw-8bit",
        plan_count=2,
        least_bytes=41,
        detail=wanted[0].label,
    )


def test_a_technique_with_a_sketch_that_may_fit_is_not_reported_as_too_large() -> None:
    assert "adamw-8bit" not in reasons(TRACED)


@pytest.mark.parametrize(
    ("lang", "said"),
    [
        (
            "en",
            "no priced plan with it fits (2 priced); the smallest needs 41 B",
        ),
        (
            "ja",
            "見積もった 2 件のプランは、いずれも上限に収まりません。最小でも 41 B が必要です",
        ),
    ],
)
def test_the_reason_with_the_priced_plans_is_printed_in_both_languages(lang: str, said: str) -> None:
    found = decide(
        [*TRACED, priced(plan(MIXED, THIRDS, LOW_BIT), 41, 1.4)],
        goal=Objective.FASTEST,
        cap_bytes=40,
        considered=6,
        fits=CAP.has,
        left_out=(),
        price=Prices(lambda of: next(e for e in TRACED if e.plan == of), sketches=SKETCHES),
    )
    view = search_view(found).recommended
    assert view is not None
    texts = [sentence_text(reason, load_words(lang)) for reason in view.reasons]
    assert [t for t in texts if "adamw-8bit" in t and said in t]


# --- many devices


class Scale:
    """The parts of a search that reasons use; ``whole`` are the traces of its sketches."""

    def __init__(self, cap_bytes: int, whole: Sequence[Estimate] = ()) -> None:
        self.aim = SimpleNamespace(goal=Objective.FASTEST, cap_bytes=cap_bytes)
        self.whole, self.refused = {e.plan: e for e in whole}, dict[Plan, str]()

    def needs(self, e: Estimate) -> int:
        return int(e.allocated_bytes.value)

    def fits(self, e: Estimate) -> bool:
        return self.needs(e) <= self.aim.cap_bytes

    def traced_or_refused(self, sketch: Estimate) -> Estimate | None:
        return self.whole.get(sketch.plan)


WINNER = priced(plan(CHECKPOINTED), 30, 1.3)
KNOWN = [WINNER, *SKETCHES]


def told_of(scale: Scale, known: Sequence[Estimate]) -> dict[str, Reason]:
    return {r.technique: r for r in explain_techniques(scale, WINNER, known, scale.fits)}  # type: ignore[arg-type]


def test_on_many_devices_a_technique_that_does_not_fit_is_reported_with_the_priced_plans() -> None:
    told = told_of(Scale(32), KNOWN)
    assert told["adamw-8bit"] == Reason(
        kind="left_out_too_large",
        technique="adamw-8bit",
        plan_count=2,
        least_bytes=35,
        detail=short_label(plan(MIXED, THIRDS, LOW_BIT)),
    )
    needed = told["activation-checkpointing"]
    assert (needed.kind, needed.plan_count, needed.least_bytes) == ("needed_priced", 5, 35)


def test_on_many_devices_a_sketch_slightly_above_the_cap_is_traced_before_it_is_too_large() -> None:
    found = priced(plan(MIXED, THIRDS, LOW_BIT), 31, 1.4)
    scale = Scale(32, [found])
    sure = list(smallest_traced(scale, WINNER, KNOWN, scale.fits))  # type: ignore[arg-type]
    assert sure == [found]
    assert told_of(scale, [*KNOWN[:-2], found, KNOWN[-1]])["adamw-8bit"].kind == "left_out_slower"
    tight = Scale(31 - 10, [found])  # farther above the cap than sketches err
    assert not list(smallest_traced(tight, WINNER, KNOWN[1:], tight.fits))  # type: ignore[arg-type]


def test_a_plan_that_fits_but_is_late_is_not_reported_as_too_large() -> None:
    scale = Scale(1000)
    late = {r.technique: r for r in explain_techniques(scale, WINNER, KNOWN, lambda e: e == WINNER)}  # type: ignore[arg-type]
    assert late["adamw-8bit"].kind == "left_out_late"
    assert late["activation-checkpointing"].kind == "needed_late"


# --- the search


def fact(value: float) -> Fact:
    return Fact(value=value, source="a test", date="2026-01-01", kind="assumed")


PROCESSOR = Machine(
    name="test",
    device=Device(
        name="test",
        kind="cpu",
        memory_bytes=fact(2**30),
        bandwidth_bytes_s=fact(1e9),
        peak_flops={"float32": fact(1e10), "bfloat16": fact(2e10)},
        power_w=fact(10.0),
    ),
)


def test_a_search_traces_a_plan_with_every_technique_that_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("memfit.planner.request.load", lambda ref: words(2))
    monkeypatch.setattr(single_device, "FINALISTS", 1)
    monkeypatch.setattr(capacity, "CPU_HEADROOM_BYTES", 0)
    found = search.search(
        Request(job=JobRef(spec="words"), machine=PROCESSOR, cap_bytes=950_000, accuracy=Accuracy.EXACT),
        lambda *begun: None,
    )
    best = found.result.recommended
    assert best is not None
    offered = {u.technique for traced, _ in found.pricer.traces for u in traced.uses}
    compared = ("left_out_slower", "left_out_not_needed", "left_out_uncertain", "left_out_too_large")
    told = {r.technique: r for r in best.reasons if r.kind in compared}
    assert set(told) == offered - {u.technique for u in best.estimate.plan.uses}
    traced = [found.pricer.whole(p) for p, _ in found.pricer.traces]
    for name, reason in told.items():
        fitting = [e for e in traced if e.plan.get(name) and needed_bytes(e, PROCESSOR) <= found.cap_bytes]
        assert bool(fitting) == (reason.kind != "left_out_too_large")
