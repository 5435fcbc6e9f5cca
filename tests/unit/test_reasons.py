"""A technique is left out for a reason based on an estimated plan: the best plan with it, or the smallest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_machine import processor
from tiny import words

from memfit.planner import capacity, search, single_device
from memfit.planner.capacity import Cap, needed_bytes
from memfit.planner.multi_device_explanations import (
    explain_techniques,
    trace_before_nothing_fits,
    trace_for_reasons,
)
from memfit.planner.reasons import ReasonInputs
from memfit.planner.request import Planning, Request
from memfit.planner.search import build_result
from memfit.planner.selection import Objective, within_bounds
from memfit.planner.shortlist import counterfactuals, trace_until_one_fits
from memfit.planner.sketch_errors import BestCaseEstimates, may_fit_under, sketch_errors
from memfit.planner.technique_groups import best_of_groups
from memfit.report.choices import search_view
from memfit.report.quantities import sentence_text
from memfit.report.words import load_words
from memfit.techniques.registry import short_label
from memfit.types.job import JobRef
from memfit.types.plan import Accuracy, Bounds, Plan, use
from memfit.types.result import Estimate, Interval, Reason, ReasonKind

PLAIN = Plan()
MIXED, CHECKPOINTED = use("bf16-autocast"), use("activation-checkpointing")
HALVES, THIRDS = (use("gradient-accumulation", micro_batches=n) for n in (2, 3))
LOW_BIT = use("adamw-8bit")


def plan(*uses: Any) -> Plan:
    return Plan(uses=uses)


def estimated(of: Plan, peak: float, step_s: float, *, traced: bool = True) -> Estimate:
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
    estimated(PLAIN, 100, 1.0, traced=False),
    estimated(plan(CHECKPOINTED), 30, 1.3, traced=False),
    estimated(plan(MIXED), 60, 0.8, traced=False),
    estimated(plan(MIXED, HALVES), 39, 0.9, traced=False),
    estimated(plan(MIXED, THIRDS, LOW_BIT), 35, 1.2, traced=False),
    estimated(plan(LOW_BIT), 80, 1.0, traced=False),
]
TRACED = [
    estimated(PLAIN, 100, 1.0),
    estimated(plan(CHECKPOINTED), 30, 1.3),
    estimated(plan(MIXED), 60, 0.8),
    estimated(plan(MIXED, HALVES), 45, 0.9),
]
CAP = Cap(bytes=40, needs=lambda e: int(e.allocated_bytes.value), refuses=lambda of: ())


def reasons(traced: Sequence[Estimate]) -> dict[str, Reason]:
    found = build_result(
        traced,
        goal=Objective.FASTEST,
        cap_bytes=40,
        considered=len(SKETCHES),
        meets_limits=CAP.holds,
        left_out=(),
        inputs=ReasonInputs(
            lambda of: next(e for e in (*traced, *SKETCHES) if e.plan == of),
            sketches=SKETCHES,
        ),
    )
    assert found.recommended is not None
    return {r.technique: r for r in found.recommended.reasons if r.kind != "saves"}


def test_the_best_plan_with_a_technique_that_may_fit_is_traced_before_it_is_left_out() -> None:
    rival = plan(MIXED, THIRDS, LOW_BIT)
    assert counterfactuals(SKETCHES, TRACED, TRACED[1], cap=CAP, goal=Objective.FASTEST) == [rival]
    found = reasons([*TRACED, estimated(rival, 38, 1.4)])
    for name in ("bf16-autocast", "adamw-8bit", "gradient-accumulation"):
        assert (found[name].kind, found[name].detail) == ("left_out_slower", rival.label)
        assert found[name].time_ratio == pytest.approx(1.4 / 1.3)


def test_nothing_more_is_traced_once_the_best_plan_with_each_technique_was() -> None:
    traced = [*TRACED, estimated(plan(MIXED, THIRDS, LOW_BIT), 38, 1.4)]
    assert counterfactuals(SKETCHES, traced, traced[1], cap=CAP, goal=Objective.FASTEST) == []


def test_where_no_plan_with_a_technique_fits_the_smallest_is_traced_and_named() -> None:
    tight = Cap(bytes=32, needs=CAP.needs, refuses=CAP.refuses)
    wanted = counterfactuals(SKETCHES, TRACED, TRACED[1], cap=tight, goal=Objective.FASTEST)
    assert wanted == [plan(MIXED, THIRDS, LOW_BIT)]
    found = reasons([*TRACED, estimated(wanted[0], 41, 1.4)])
    assert found["adamw-8bit"] == Reason(
        kind=ReasonKind.LEFT_OUT_TOO_LARGE,
        technique="adamw-8bit",
        plan_count=2,
        least_bytes=41,
        detail=wanted[0].label,
    )


def test_a_technique_with_a_sketch_that_may_fit_is_called_not_looked_at() -> None:
    assert reasons(TRACED)["adamw-8bit"] == Reason(
        kind=ReasonKind.LEFT_OUT_NOT_LOOKED_AT, technique="adamw-8bit", plan_count=1
    )


def test_a_technique_is_not_called_slower_while_a_plan_with_it_that_may_be_better_is_not_traced() -> None:
    small = plan(MIXED, THIRDS, CHECKPOINTED)  # traced, because it needs the least memory
    traced = [*TRACED[:3], estimated(small, 20, 1.9)]
    assert reasons(traced)["gradient-accumulation"] == Reason(
        kind=ReasonKind.LEFT_OUT_NOT_LOOKED_AT, technique="gradient-accumulation", plan_count=2
    )
    # of half batches in bf16, and of thirds with 8-bit states, which the sketches call better than the winner
    wanted = counterfactuals(SKETCHES, traced, traced[1], cap=CAP, goal=Objective.FASTEST, compares=False)
    assert wanted == [plan(MIXED, THIRDS, LOW_BIT), plan(MIXED, HALVES)]
    thirds = estimated(plan(MIXED, THIRDS, LOW_BIT), 38, 1.4)
    compared = [*traced, TRACED[3], thirds]
    assert reasons(compared)["gradient-accumulation"].kind == "left_out_slower"
    assert not counterfactuals(SKETCHES, compared, traced[1], cap=CAP, goal=Objective.FASTEST, compares=False)


def test_a_worse_plan_that_was_not_traced_changes_no_comparison() -> None:
    rival, worse = estimated(plan(LOW_BIT), 38, 1.6), estimated(plan(LOW_BIT, HALVES), 37, 1.5, traced=False)
    found = build_result(
        [TRACED[1], TRACED[0], rival],
        goal=Objective.FASTEST,
        cap_bytes=40,
        considered=4,
        meets_limits=CAP.holds,
        left_out=(),
        inputs=ReasonInputs(lambda of: TRACED[0], sketches=[SKETCHES[1], worse]),
    ).recommended
    assert found is not None
    assert [r.kind for r in found.reasons if r.technique == "adamw-8bit"] == ["left_out_slower"]


def test_traced_plans_that_do_not_fit_are_no_proof_for_others_that_may() -> None:
    assert reasons(TRACED)["bf16-autocast"].kind == "left_out_not_looked_at"


@pytest.mark.parametrize(
    ("lang", "said"),
    [
        (
            "en",
            "no plan with it fits (2 estimated), not even ",
        ),
        (
            "ja",
            "見積もった 2 件のプランは、いずれも上限に収まりません。小さなプラン（",
        ),
    ],
)
def test_the_reason_with_the_estimated_plans_is_printed_in_both_languages(lang: str, said: str) -> None:
    found = build_result(
        [*TRACED, estimated(plan(MIXED, THIRDS, LOW_BIT), 41, 1.4)],
        goal=Objective.FASTEST,
        cap_bytes=40,
        considered=6,
        meets_limits=CAP.holds,
        left_out=(),
        inputs=ReasonInputs(lambda of: next(e for e in TRACED if e.plan == of), sketches=SKETCHES),
    )
    view = search_view(found).recommended
    assert view is not None
    texts = [sentence_text(reason, load_words(lang)) for reason in view.reasons]
    assert [t for t in texts if "adamw-8bit" in t and said in t]


def test_before_nothing_is_said_to_fit_the_plans_that_may_are_traced() -> None:
    traces = {e.plan: e for e in (*TRACED, estimated(plan(MIXED, THIRDS, LOW_BIT), 31, 1.4))}
    looked = list[list[Plan]]()
    chosen = [PLAIN, plan(MIXED), plan(MIXED, HALVES)]
    added = trace_until_one_fits(
        traces.__getitem__, looked.append, SKETCHES, chosen, cap=replace(CAP, bytes=32), bounds=Bounds()
    )
    assert added == [plan(CHECKPOINTED), plan(MIXED, THIRDS, LOW_BIT)]
    assert looked == [added]
    assert not trace_until_one_fits(
        traces.__getitem__, looked.append, SKETCHES, [*traces], cap=CAP, bounds=Bounds()
    )


# --- many devices


class FakePredictor:
    """The parts of a search that reasons use; ``whole`` are the traces of its sketches."""

    def __init__(self, cap_bytes: int, whole: Sequence[Estimate] = (), bounds: Bounds | None = None) -> None:
        cap = Cap(bytes=cap_bytes, needs=self.needs, refuses=lambda of: ())
        self.request = SimpleNamespace(goal=Objective.FASTEST, cap=cap)
        self.whole, self.refused, self.bounds = (
            {e.plan: e for e in whole},
            dict[Plan, str](),
            bounds or Bounds(),
        )
        self.pairs: list[tuple[Estimate, Estimate]] = []
        self.traced = SimpleNamespace(blocks=80)

    def needs(self, e: Estimate) -> int:
        return int(e.allocated_bytes.value)

    def meets_limits(self, e: Estimate) -> bool:
        return self.request.cap.holds(e) and within_bounds(self.bounds, e)

    def expected(self, e: Estimate) -> Estimate:
        return e

    def trace_or_refuse(self, sketch: Estimate) -> Estimate | None:
        trace = self.whole.get(sketch.plan)
        if trace is None:
            self.refused[sketch.plan] = "it could not be traced"
        else:
            self.pairs.append((sketch, trace))
        return trace


WINNER = estimated(plan(CHECKPOINTED), 30, 1.3)
OTHERS = [e for e in SKETCHES if e.plan != WINNER.plan]
KNOWN = [WINNER, *OTHERS]


def told_of(many: FakePredictor, known: Sequence[Estimate], *, by_traces: bool = False) -> dict[str, Reason]:
    told = explain_techniques(many, WINNER, known, many.meets_limits, by_traces=by_traces)  # type: ignore[arg-type]
    return {r.technique: r for r in told}


def traced_of(many: FakePredictor, known: Sequence[Estimate], *, quick: bool = True) -> list[Estimate]:
    return list(trace_for_reasons(many, WINNER, known, many.meets_limits, quick=quick))  # type: ignore[arg-type]


def test_on_many_devices_a_technique_that_does_not_fit_is_reported_with_the_estimated_plans() -> None:
    told = told_of(FakePredictor(27), KNOWN)
    assert told["adamw-8bit"] == Reason(
        kind=ReasonKind.LEFT_OUT_TOO_LARGE,
        technique="adamw-8bit",
        plan_count=2,
        least_bytes=35,
        detail=short_label(plan(MIXED, THIRDS, LOW_BIT)),
    )
    needed = told["activation-checkpointing"]
    assert (needed.kind, needed.plan_count, needed.least_bytes) == ("needed_priced", 5, 35)


def test_on_many_devices_a_sketch_slightly_above_the_cap_is_traced_before_it_is_too_large() -> None:
    trace = estimated(plan(MIXED, THIRDS, LOW_BIT), 31, 1.4)
    many = FakePredictor(32, [trace])
    assert traced_of(many, KNOWN, quick=False) == [trace]
    known = [trace if e.plan == trace.plan else e for e in KNOWN]
    assert told_of(many, known)["adamw-8bit"].kind == "left_out_slower"
    tight = FakePredictor(21, [trace])  # farther above the cap than sketches err
    assert not traced_of(tight, KNOWN, quick=False)


def test_on_many_devices_a_sketch_that_may_fit_and_was_not_traced_is_called_not_looked_at() -> None:
    told = told_of(FakePredictor(32), KNOWN)
    assert told["adamw-8bit"] == Reason(
        kind=ReasonKind.LEFT_OUT_NOT_LOOKED_AT, technique="adamw-8bit", plan_count=1
    )
    needed = told["activation-checkpointing"]
    assert (needed.kind, needed.plan_count) == ("needed_not_looked_at", 2)


def test_where_traces_are_quick_a_technique_is_left_out_only_by_traces() -> None:
    trace = estimated(plan(MIXED, HALVES), 44, 0.9)
    many = FakePredictor(40, [trace, estimated(plan(MIXED, THIRDS, LOW_BIT), 38, 1.4)])
    traced = traced_of(many, KNOWN)  # the best sketch does not fit; the smallest does
    assert {e.plan for e in traced} >= {trace.plan, plan(MIXED, THIRDS, LOW_BIT)}
    known = {e.plan: e for e in (*KNOWN, *traced)}
    told = told_of(many, [*known.values()], by_traces=True)
    assert told["bf16-autocast"].detail == short_label(plan(MIXED, THIRDS, LOW_BIT))
    assert told_of(FakePredictor(40), KNOWN, by_traces=True)["bf16-autocast"].kind == "left_out_not_looked_at"


def test_on_many_devices_plans_that_may_fit_are_traced_before_nothing_fits() -> None:
    larger, smaller = estimated(plan(CHECKPOINTED), 33, 1.3), estimated(plan(MIXED, THIRDS, LOW_BIT), 31, 1.4)
    many = FakePredictor(32, [larger, smaller])
    found = list(trace_before_nothing_fits(many, SKETCHES, many.meets_limits))  # type: ignore[arg-type]
    assert found == [larger, smaller]
    many = FakePredictor(20, [larger, smaller])  # farther below all sketches than these err
    assert not list(trace_before_nothing_fits(many, SKETCHES, many.meets_limits))  # type: ignore[arg-type]


def test_plans_that_could_not_be_traced_are_no_reason() -> None:
    many = FakePredictor(40)
    assert not traced_of(many, KNOWN)
    assert plan(MIXED, THIRDS, LOW_BIT) in many.refused  # which the answer reports by themselves
    assert "adamw-8bit" not in told_of(many, KNOWN)


def test_a_plan_that_fits_but_is_late_is_not_reported_as_too_large() -> None:
    bounds = Bounds(deadline_s=0.5, steps=1)
    late = told_of(FakePredictor(1000, bounds=bounds), KNOWN)
    assert late["adamw-8bit"].kind == "left_out_late"
    assert late["activation-checkpointing"].kind == "needed_late"


# --- errors of sketches


@given(
    st.lists(st.tuples(st.integers(1, 10**9), st.floats(0.5, 4.0)), min_size=4, max_size=12),
    st.integers(0, 10**9),
)
def test_no_plan_that_was_traced_needs_less_than_its_sketch_allows(
    pairs: list[tuple[int, float]], offset_bytes: int
) -> None:
    plans = [plan(use("gradient-accumulation", micro_batches=n + 2)) for n in range(len(pairs))]
    sketches = [estimated(of, peak, 1.0, traced=False) for of, (peak, _) in zip(plans, pairs, strict=True)]
    traces = [
        estimated(of, peak * ratio + offset_bytes, 1.0)
        for of, (peak, ratio) in zip(plans, pairs, strict=True)
    ]
    errors = sketch_errors(sketches, traces, CAP.needs)
    for sketch, trace in zip(sketches, traces, strict=True):
        assert errors.least_need(CAP.needs(sketch)) <= CAP.needs(trace)


def test_a_constant_part_that_sketches_do_not_know_is_learned_from_traces() -> None:
    plans = [plan(use("gradient-accumulation", micro_batches=n)) for n in (2, 3, 4, 5, 6)]
    sketches = [estimated(of, 10 * n, 1.0, traced=False) for n, of in enumerate(plans, 1)]
    traces = [estimated(of, 10 * n + 400, 1.0) for n, of in enumerate(plans[:4], 1)]
    errors = sketch_errors(sketches, traces, CAP.needs)
    assert 440 < errors.least_need(50) <= 450
    cap = Cap(bytes=430, needs=CAP.needs, refuses=CAP.refuses)
    assert not may_fit_under(cap, Bounds(), sketches, traces)(sketches[-1])
    assert may_fit_under(cap, Bounds(), sketches, traces[:3])(sketches[-1])  # too few traces to know


# --- the search


PROCESSOR = processor(float32=1e10, bfloat16=2e10)


def test_a_search_traces_a_plan_with_every_technique_that_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("memfit.planner.request.load", lambda ref: words(2))
    monkeypatch.setattr(single_device, "FINALISTS", 1)
    monkeypatch.setattr(capacity, "CPU_HEADROOM_BYTES", 0)
    found = search.search(
        Request(job_ref=JobRef(spec="words"), machine=PROCESSOR, cap_bytes=950_000, accuracy=Accuracy.EXACT),
        lambda *begun: None,
    )
    best = found.result.recommended
    assert best is not None
    offered = {u.technique for traced, _ in found.predictor.traces for u in traced.uses}
    compared = ("left_out_slower", "left_out_not_needed", "left_out_uncertain", "left_out_too_large")
    told = {r.technique: r for r in best.reasons if r.kind in compared}
    assert set(told) == offered - {u.technique for u in best.estimate.plan.uses}
    traced = [found.predictor.whole(p) for p, _ in found.predictor.traces]
    for name, reason in told.items():
        fitting = [e for e in traced if e.plan.get(name) and needed_bytes(e, PROCESSOR) <= found.cap_bytes]
        assert bool(fitting) == (reason.kind != "left_out_too_large")


# --- the groups that a proof of concept compares


def planned(traced: Sequence[Estimate], whole: Sequence[Estimate], *, ranks: int = 1) -> Planning:
    """A finished search of 40 bytes; ``whole`` are the traces of its sketches."""
    by_plan = {e.plan: e for e in (*traced, *whole)}
    result = SimpleNamespace(recommended=SimpleNamespace(estimate=TRACED[1]), trials=())
    return SimpleNamespace(  # type: ignore[return-value]
        request=SimpleNamespace(
            ranks=ranks, goal=Objective.FASTEST, machine=PROCESSOR, engine="native", bounds=Bounds()
        ),
        job=SimpleNamespace(steps=1),
        predictor=SimpleNamespace(
            whole=by_plan.__getitem__, job_facts=SimpleNamespace(half_precision="bfloat16")
        ),
        cap_bytes=needed_bytes(estimated(PLAIN, 40, 1.0), PROCESSOR),
        result=result,
        estimates=traced,
        sketches=SKETCHES,
        meets_limits=CAP.holds,
    )


def test_a_proof_of_concept_compares_the_best_traced_plan_of_each_group() -> None:
    rival = estimated(plan(MIXED, THIRDS, LOW_BIT), 38, 1.4)
    best = dict(best_of_groups(planned([*TRACED, rival], [])))
    assert best == {"mixed precision": rival.plan, "checkpointing": plan(CHECKPOINTED)}


def test_a_group_of_which_no_traced_plan_fits_is_traced_until_one_does() -> None:
    rival = estimated(plan(MIXED, THIRDS, LOW_BIT), 38, 1.4)
    best = dict(best_of_groups(planned(TRACED, [rival])))
    assert best["mixed precision"] == rival.plan
    too_large = estimated(rival.plan, 41, 1.4)
    assert "mixed precision" not in dict(best_of_groups(planned(TRACED, [too_large])))


def test_sharding_is_compared_on_several_ranks_only() -> None:
    sharded = estimated(Plan(uses=(use("fsdp2"),), ranks=2), 30, 1.0)
    traced = [*TRACED, estimated(plan(MIXED, THIRDS, LOW_BIT), 38, 1.4), sharded]
    assert dict(best_of_groups(planned(traced, [], ranks=2)))["sharding"] == sharded.plan
    assert "sharding" not in dict(best_of_groups(planned(traced, [])))


def test_on_many_devices_a_traced_plan_is_no_reason_while_one_that_may_be_better_is_not_traced() -> None:
    slow = estimated(plan(MIXED, THIRDS, LOW_BIT), 38, 1.4)
    better = estimated(plan(MIXED, HALVES), 39, 0.9)
    known = [slow if e.plan == slow.plan else e for e in KNOWN]
    told = told_of(FakePredictor(40), known, by_traces=True)
    assert told["bf16-autocast"].kind == "left_out_not_looked_at"  # not slower
    assert told["activation-checkpointing"].kind == "needed_not_looked_at"
    assert traced_of(FakePredictor(40, [better]), known) == [better]
    compared = [better if e.plan == better.plan else e for e in known]
    assert not traced_of(FakePredictor(40, [better]), compared)


def test_errors_of_sketches_are_taken_from_plans_that_divide_the_states_in_the_same_way() -> None:
    sharded, other = use("fsdp2"), use("fsdp2", offload=True)
    sketches = [
        estimated(Plan(uses=uses, ranks=2), 40, 1.0, traced=False)
        for uses in ((sharded, CHECKPOINTED), (other,), (sharded,))
    ]
    traces = [estimated(sketches[0].plan, 40, 1.1), estimated(sketches[1].plan, 60, 2.0)]
    best_case = BestCaseEstimates(sketches, traces, CAP, Objective.FASTEST).of(sketches[2])
    assert best_case == pytest.approx((1.1 * 0.9, 40 * 0.97))


def test_a_plan_may_be_as_good_as_one_that_only_divides_the_states_in_another_way() -> None:
    uses = (use("fsdp2"), MIXED), (use("fsdp2", offload=True),), (use("fsdp2"),)
    sketches = [estimated(Plan(uses=u, ranks=2), 40, 1.0, traced=False) for u in uses]
    traces = [estimated(sketches[0].plan, 42, 2.2), estimated(sketches[1].plan, 44, 1.2)]
    best_case = BestCaseEstimates(sketches, traces, CAP, Objective.FASTEST).of(sketches[2])
    assert best_case == pytest.approx((1.2 * 0.9**0.5, 42 * 0.97))  # not 2.2, the ratio of mixed precision
