"""The search: allowed techniques, the frontier of plans, the recommended plan and its reasons."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit import catalog
from memfit.planner.capacity import Cap, states_bytes
from memfit.planner.evaluate import Predictor
from memfit.planner.plan_space import effect_then_size_key, plans, usable
from memfit.planner.reasons import ReasonInputs
from memfit.planner.request import Request, half_precision_of, make_predictor
from memfit.planner.search import _negligible_state_bytes, build_result
from memfit.planner.selection import TIE_RATIO, EqualityBand, Objective, best, frontier, score
from memfit.planner.shortlist import most_promising, trace_until_none_better
from memfit.planner.sketch_errors import BestCaseEstimates
from memfit.techniques.base import JobFacts
from memfit.techniques.registry import conflict, effect_of, make_use
from memfit.types.job import JobRef
from memfit.types.plan import Accuracy, Bounds, EffectClass, Plan, use
from memfit.types.result import Estimate, Interval, Reason, ReasonKind

FACTS = JobFacts(batch_size=4, block_count=4, vocabulary=1000, device_kind="cpu")
EVERY_PLAN = [
    Plan(),
    Plan(uses=(use("activation-checkpointing", every=1),)),
    Plan(uses=(use("gradient-accumulation", micro_batches=2),)),
    Plan(uses=(use("bf16-autocast"),)),
    Plan(uses=(use("sgd"),)),
    Plan(uses=(use("bf16-autocast"), use("activation-checkpointing", every=1))),
    Plan(uses=(use("bf16-autocast"), use("gradient-accumulation", micro_batches=2))),
]
PLAIN, CHECKPOINTED, ACCUMULATED, MIXED, SGD, BOTH, MIXED_ACCUMULATED = EVERY_PLAN


def estimated(plan: Plan, peak: float, time_s: float | None = 1.0, **more: Any) -> Estimate:
    def exact(value: float) -> Interval:
        return Interval(value=value, low=value, high=value)

    return Estimate(
        plan=plan,
        allocated_bytes=exact(peak),
        phase_peak_bytes={},
        at_peak_bytes={},
        by_module_bytes={},
        step_s=None if time_s is None else exact(time_s),
        flops_per_step=0,
        **more,
    )


# --- the plans of a search


def names(accuracy: Accuracy, facts: JobFacts = FACTS) -> set[str]:
    return {t.name for t in usable(facts, accuracy)[0]}


def test_an_accuracy_goal_allows_only_its_effect_classes_and_names_the_rest() -> None:
    allowed, left_out = usable(FACTS, Accuracy.EXACT)
    assert {t.effect for t in allowed} == {EffectClass.E0}
    reasons = {r.technique: r for r in left_out}
    assert reasons["bf16-autocast"].kind == "left_out_accuracy"
    assert reasons["bf16-autocast"].detail == "exact"
    assert names(Accuracy.EXACT) < names(Accuracy.ROUNDING) < names(Accuracy.ANY)
    assert "sgd" not in names(Accuracy.ROUNDING)


def test_a_missing_package_leaves_its_techniques_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    allowed, left_out = usable(FACTS, Accuracy.ANY)
    missing = {r.technique: r.detail for r in left_out if r.kind == "left_out_unavailable"}
    assert missing == {
        "adamw-8bit": "bitsandbytes",
        "adamw-paged": "bitsandbytes",
        "adamw-4bit": "torchao",
        "lora": "peft",
        "float8-linear": "torchao",
        "qlora": "peft, bitsandbytes",
    }
    assert not missing.keys() & {t.name for t in allowed}


def test_techniques_that_do_not_apply_to_the_job_are_not_tried() -> None:
    bare = JobFacts(batch_size=1, block_count=0, vocabulary=0, device_kind="cpu")
    assert not names(Accuracy.ANY, bare) & {"gradient-accumulation", "activation-checkpointing", "lora"}


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_the_jobs_own_optimizer_is_neither_tried_nor_said_to_change_the_accuracy(name: str) -> None:
    allowed, reasons = usable(dataclasses.replace(FACTS, optimizer=name), Accuracy.ROUNDING)
    assert name not in {t.name for t in allowed} | {r.technique for r in reasons}
    _, reasons = usable(FACTS, Accuracy.ROUNDING)
    assert name in {r.technique for r in reasons}


def test_plans_are_unique_conflict_free_combinations_with_plain_first() -> None:
    found = list(plans(FACTS, usable(FACTS, Accuracy.ROUNDING)[0]))
    assert found[0] == Plan()
    assert len(set(found)) == len(found)
    assert all(conflict(p) is None for p in found)
    assert set(EVERY_PLAN) - {SGD} <= set(found)


def test_the_number_of_plans_is_the_product_of_choices_minus_clashes() -> None:
    kept = [
        t
        for t in usable(FACTS, Accuracy.ROUNDING)[0]
        if t.name in ("gradient-accumulation", "optimizer-in-backward", "activation-checkpointing")
    ]
    # accumulation (none, 2, 4) x checkpointing (none, 1, 2, 3) x in backward (no, yes), but not with 2 and 4
    assert len(list(plans(FACTS, kept))) == 3 * 4 * 2 - 2 * 4


# --- frontier

ESTIMATES = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(1, 5)),
    min_size=1,
    max_size=7,
    unique_by=lambda t: t[0],
)


def at_least_as_good(one: Estimate, other: Estimate) -> bool:
    return (
        one.allocated_bytes.value <= other.allocated_bytes.value
        and score(one, Objective.FASTEST) <= score(other, Objective.FASTEST)
        and effect_of(one.plan) <= effect_of(other.plan)
    )


@given(ESTIMATES)
def test_law_the_frontier_keeps_exactly_the_undominated_plans(drawn: list[tuple[int, int, int]]) -> None:
    estimates = [estimated(EVERY_PLAN[i], peak, time_s) for i, peak, time_s in drawn]
    kept = frontier(estimates)
    dropped = [e for e in estimates if e not in kept]
    assert kept
    for one in kept:
        assert not any(at_least_as_good(o, one) for o in kept if o is not one)
    assert all(any(at_least_as_good(o, e) for o in kept) for e in dropped)
    peaks = [e.allocated_bytes.value for e in kept]
    assert peaks == sorted(peaks)


def test_without_times_the_frontier_is_by_memory_and_effect() -> None:
    found = frontier(
        [estimated(PLAIN, 10, None), estimated(CHECKPOINTED, 5, None), estimated(MIXED, 7, None)]
    )
    assert [e.plan for e in found] == [CHECKPOINTED]


# --- best


@given(ESTIMATES, st.integers(1, 5), st.sampled_from(list(Objective)))
def test_law_a_looser_cap_is_never_worse(drawn: list[Any], cap: int, goal: Objective) -> None:
    estimates = [estimated(EVERY_PLAN[i], peak, time_s) for i, peak, time_s in drawn]

    def reached(limit: int) -> float:
        found = best([e for e in estimates if e.allocated_bytes.value <= limit], goal)
        return float("inf") if found is None else score(found, goal)

    assert reached(cap + 1) <= reached(cap) * (1 + TIE_RATIO)


def test_among_nearly_equal_plans_the_milder_and_simpler_one_wins() -> None:
    close = [estimated(BOTH, 5, 1.0), estimated(MIXED, 5, 1.01), estimated(ACCUMULATED, 5, 1.015)]
    found = best(close, Objective.FASTEST)
    assert found is not None
    assert found.plan == ACCUMULATED  # E1 before E2
    found = best(close[:2], Objective.FASTEST)
    assert found is not None
    assert found.plan == MIXED  # one technique before two
    clear = best([*close, estimated(SGD, 5, 0.5)], Objective.FASTEST)
    assert clear is not None
    assert clear.plan == SGD


def test_best_of_no_plans_is_none() -> None:
    assert best([], Objective.SMALLEST) is None


def test_each_goal_scores_its_own_figure_and_falls_back_to_time() -> None:
    one = estimated(PLAIN, 10, 2.0, usd=3.0, co2_g=4.0)
    figures = [score(one, g) for g in Objective]
    assert figures[:4] == [2.0, 10, 3.0, 4.0]
    assert score(estimated(PLAIN, 10, 9.0), Objective.FEWEST) > figures[4] > one.plan.ranks
    bare = estimated(PLAIN, 10, 2.0)
    assert [score(bare, g) for g in (Objective.CHEAPEST, Objective.GREENEST)] == [2.0, 2.0]
    untimed = estimated(PLAIN, 10, None)
    assert score(untimed, Objective.FASTEST) == float("inf")
    assert score(untimed, Objective.FEWEST) > score(estimated(PLAIN, 10, 9.0), Objective.FEWEST)
    assert all(best([untimed], goal) is untimed for goal in Objective)


def test_complexity_compares_effect_class_first() -> None:
    assert effect_then_size_key(PLAIN) == (0, 0, 0)
    assert (
        effect_then_size_key(CHECKPOINTED)
        < effect_then_size_key(ACCUMULATED)
        < effect_then_size_key(MIXED)
        < effect_then_size_key(BOTH)
    )


# --- decide

ESTIMATES = {
    PLAIN: estimated(PLAIN, 100, 1.0),
    CHECKPOINTED: estimated(CHECKPOINTED, 60, 1.3),
    ACCUMULATED: estimated(ACCUMULATED, 50, 1.1),
    MIXED: estimated(MIXED, 60, 0.8),
    SGD: estimated(SGD, 90, 0.9),
    BOTH: estimated(BOTH, 40, 1.0),
}


def decided(cap: int, goal: Objective = Objective.FASTEST, *left_out: Reason) -> Any:
    return build_result(
        list(ESTIMATES.values()),
        goal=goal,
        cap_bytes=cap,
        considered=99,
        left_out=left_out,
        meets_limits=lambda e: e.allocated_bytes.value <= cap,
        inputs=ReasonInputs(ESTIMATES.__getitem__),
    )


def test_the_recommendation_states_what_each_technique_saves() -> None:
    found = decided(45).recommended
    assert found.estimate.plan == BOTH
    assert (found.fits, found.effect) == (True, EffectClass.E2)
    saves = {r.technique: (r.saved_bytes, r.time_ratio) for r in found.reasons if r.kind == "saves"}
    # without autocast: 60 B and 1.3 s; without checkpointing: 60 B and 0.8 s
    assert saves["bf16-autocast"] == (20, pytest.approx(1.0 / 1.3))
    assert saves["activation-checkpointing"] == (20, pytest.approx(1.0 / 0.8))


def test_the_recommendation_states_why_each_other_technique_is_left_out() -> None:
    why = Reason(kind=ReasonKind.LEFT_OUT_ACCURACY, technique="lora", detail="rounding")
    found = decided(70, Objective.FASTEST, why).recommended
    assert found.estimate.plan == MIXED
    kinds = {r.technique: r for r in found.reasons if r.kind != "saves"}
    sgd = kinds["sgd"]
    assert (sgd.kind, sgd.plan_count, sgd.least_bytes) == ("left_out_too_large", 1, 90)
    assert kinds["gradient-accumulation"].kind == "left_out_slower"
    assert kinds["gradient-accumulation"].time_ratio == pytest.approx(1.1 / 0.8)
    assert kinds["gradient-accumulation"].saved_bytes == 10
    assert kinds["activation-checkpointing"].detail == BOTH.label  # the best plan that has it
    assert kinds["lora"] == why
    small = decided(1000, Objective.SMALLEST).recommended
    assert {r.kind for r in small.reasons if r.technique == "sgd"} == {"left_out_slower"}


def test_an_equally_good_plan_that_is_not_simpler_is_left_out_as_not_needed() -> None:
    same = {PLAIN: estimated(PLAIN, 50), CHECKPOINTED: estimated(CHECKPOINTED, 40)}
    found = build_result(
        list(same.values()),
        goal=Objective.FASTEST,
        cap_bytes=60,
        considered=2,
        left_out=(),
        meets_limits=lambda e: True,
        inputs=ReasonInputs(same.__getitem__),
    )
    assert found.recommended is not None
    assert found.recommended.estimate.plan == PLAIN
    assert [r.kind for r in found.recommended.reasons] == ["left_out_not_needed"]


def test_a_faster_plan_within_the_time_error_is_left_out_as_uncertain() -> None:
    quicker = {PLAIN: estimated(PLAIN, 50), CHECKPOINTED: estimated(CHECKPOINTED, 40, 0.9)}
    found = build_result(
        list(quicker.values()),
        goal=Objective.FASTEST,
        cap_bytes=60,
        considered=2,
        left_out=(),
        meets_limits=lambda e: True,
        inputs=ReasonInputs(quicker.__getitem__, band=EqualityBand(0.25, 0.5)),
    ).recommended
    assert found is not None
    assert found.estimate.plan == PLAIN
    (why,) = found.reasons
    assert (why.kind, why.time_ratio) == ("left_out_uncertain", pytest.approx(0.9))


def test_the_frontier_shows_fitting_plans_and_plain_training() -> None:
    found = decided(55)
    shown = [c.estimate.plan for c in found.frontier]
    assert shown == [BOTH, ACCUMULATED, PLAIN]
    assert [c.fits for c in found.frontier] == [True, True, False]
    assert found.baseline.estimate.plan == PLAIN
    assert (found.goal, found.cap_bytes, found.considered) == ("fastest", 55, 99)
    assert any(c is found.recommended for c in found.frontier)


def test_when_nothing_fits_the_smallest_plan_is_given_without_a_recommendation() -> None:
    found = decided(10)
    assert found.recommended is None
    assert found.smallest.estimate.plan == BOTH
    assert not found.smallest.fits


def test_without_times_a_reason_has_no_time_ratio() -> None:
    estimates = {PLAIN: estimated(PLAIN, 100, None), CHECKPOINTED: estimated(CHECKPOINTED, 40, None)}
    found = build_result(
        list(estimates.values()),
        goal=Objective.SMALLEST,
        cap_bytes=50,
        considered=2,
        left_out=(),
        meets_limits=lambda e: e.allocated_bytes.value <= 50,
        inputs=ReasonInputs(estimates.__getitem__),
    )
    assert found.recommended is not None
    assert [(r.saved_bytes, r.time_ratio) for r in found.recommended.reasons] == [(60, None)]


@pytest.mark.parametrize(("device", "mixed"), [("T4", "fp16-autocast"), ("A100-80GB-SXM", "bf16-autocast")])
def test_the_proposed_mixed_precision_is_the_half_type_of_the_device(device: str, mixed: str) -> None:
    half = half_precision_of(catalog.machine(device, "world"))
    offered, _ = usable(
        dataclasses.replace(FACTS, device_kind="cuda", half_precision=half), Accuracy.ROUNDING
    )
    assert {t.name for t in offered if t.slot == "precision"} & {"fp16-autocast", "bf16-autocast"} == {mixed}
    assert (half == "float16") == ("bf16-parameters" not in {t.name for t in offered})


def test_stochastic_rounding_conflicts_with_other_optimizers() -> None:
    """Another optimizer would be ignored: the rounding is part of an AdamW of its own."""
    rounded = use("bf16-parameters", rounding="stochastic")
    for name in ("sgd", "adafactor", "adamw-fused", "adamw-single"):
        clash = conflict(Plan(uses=(rounded, make_use(name, {}))))
        assert clash is not None
        assert name in clash
        assert conflict(Plan(uses=(use("bf16-parameters", rounding="master"), make_use(name, {})))) is None


# --- which plans are traced

UNLIMITED = Bounds()
TRUE_RATIOS = {"bf16-autocast": 3.0, "sgd": 0.5}  # of trace to sketch, for each technique of a plan


def _whole_of(sketch: Estimate) -> Estimate:
    factor = math.prod(TRUE_RATIOS.get(u.technique, 1.0) for u in sketch.plan.uses)
    assert sketch.step_s is not None
    return estimated(sketch.plan, sketch.allocated_bytes.value, sketch.step_s.value * factor, traced=True)


def _more_traced(times: dict[Plan, float], traced: list[Plan], cap_bytes: int, most: int) -> list[Plan]:
    """Return the plans that are traced in addition. Each of ``times``, those of sketches, has a peak of
    100."""
    sketches = [estimated(plan, 100, time_s, traced=False) for plan, time_s in times.items()]
    whole = {e.plan: _whole_of(e) for e in sketches}
    added = trace_until_none_better(
        lambda chosen: [whole[p] for p in chosen],
        sketches,
        [whole[p] for p in traced],
        cap=Cap(bytes=cap_bytes, needs=lambda e: int(e.allocated_bytes.value), refuses=lambda plan: ()),
        goal=Objective.FASTEST,
        bounds=UNLIMITED,
        near_ratio=0.05,
        most=most,
    )
    return [e.plan for e in added]


def test_plans_are_traced_until_no_other_may_be_better_by_the_errors_seen() -> None:
    times = {PLAIN: 10.0, CHECKPOINTED: 12.0, ACCUMULATED: 13.0, MIXED: 5.0, SGD: 11.0, BOTH: 6.0}
    added = _more_traced(times, [PLAIN, MIXED], 100, 9)
    assert SGD in added  # 5.5 s when it is traced, the best of all
    assert BOTH not in added  # 5.0 s of MIXED were 15.0: its 6.0 are hardly less than 15
    assert not set(added) & {CHECKPOINTED, ACCUMULATED}  # SGD is quicker than they may be
    assert _more_traced(times, [PLAIN, MIXED], 100, 0) == []


def test_plans_that_cannot_fit_are_not_traced_nor_any_if_none_fits() -> None:
    times = {PLAIN: 10.0, CHECKPOINTED: 10.0, SGD: 10.0}
    assert set(_more_traced(times, [PLAIN], 100, 9)) == {CHECKPOINTED, SGD}
    assert _more_traced(times, [PLAIN], 99, 9) == []


def _baseline(goal: str, batch: int) -> tuple[Request, Predictor, Estimate]:
    ref = JobRef(spec="char-lm", batch=batch)
    request = Request(job_ref=ref, machine=catalog.machine("T4"), goal=Objective(goal), cap_bytes=2**40)
    _, predictor = make_predictor(request)
    return request, predictor, predictor.whole(Plan())


@pytest.mark.parametrize(("goal", "batch"), [("fastest", 2), ("smallest", 2048)])
def test_other_optimizers_are_searched_where_the_optimizer_takes_long_or_memory_is_the_goal(
    goal: str, batch: int
) -> None:
    request, predictor, baseline = _baseline(goal, batch)
    assert _negligible_state_bytes(request, predictor, baseline, 2**40) is None


def test_other_optimizers_are_not_searched_where_states_are_small_and_the_optimizer_is_quick() -> None:
    request, predictor, baseline = _baseline("fastest", 2048)
    assert _negligible_state_bytes(request, predictor, baseline, 2**40) == states_bytes(baseline) > 0
    assert _negligible_state_bytes(request, predictor, baseline, states_bytes(baseline) * 10) is None


def test_the_least_that_a_trace_may_show_follows_the_traced_plan_most_like_it() -> None:
    sketches = [estimated(p, 100, 10.0, traced=False) for p in (PLAIN, MIXED, MIXED_ACCUMULATED, SGD)]
    traced = [estimated(PLAIN, 100, 10.0, traced=True), estimated(MIXED, 120, 30.0, traced=True)]
    cap = Cap(bytes=100, needs=lambda e: int(e.allocated_bytes.value), refuses=lambda plan: ())
    best_cases = BestCaseEstimates(sketches, traced, cap, Objective.FASTEST)
    assert best_cases.of(sketches[2]) == pytest.approx(
        (30.0 * 0.9, 120 * 0.97)
    )  # as MIXED, one technique more
    assert best_cases.of(sketches[3]) == pytest.approx((10.0 * 0.9, 100 * 0.97))  # as PLAIN
    assert [e.plan for e in most_promising(sketches[2:], best_cases, 10.0)] == [SGD]
    assert BestCaseEstimates([], [], cap, Objective.FASTEST).of(sketches[0]) == (10.0, 100)
