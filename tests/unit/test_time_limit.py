"""The time limit of a search, how far it got, and the bound on what another plan could gain."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_scaling import FEW, H100, job, traced
from test_slice_replay import evoformer
from tiny import words
from torch import nn

from memfit.catalog import machine
from memfit.cli import main
from memfit.cli.progress import _Stage
from memfit.cli.views import search_view
from memfit.cost.estimate import interval_around
from memfit.planner import evaluate, job_content, multi_device_bound, multi_device_predictor, search
from memfit.planner.capacity import Cap, needed_bytes
from memfit.planner.evaluate import Predictor
from memfit.planner.multi_device import search_many_devices
from memfit.planner.multi_device_explanations import trace_before_nothing_fits
from memfit.planner.multi_device_predictor import MultiDevicePredictor, MultiDeviceRequest
from memfit.planner.request import Request, job_facts
from memfit.planner.search_bound import ENOUGH, least_ratio, untraced_plans
from memfit.planner.selection import Objective, score
from memfit.planner.single_device import _best_first
from memfit.report.terminal import print_search
from memfit.runtime.local_machine import this_machine
from memfit.techniques.registry import make_plain_plan
from memfit.trace import trace_pool
from memfit.trace.trace_pool import run_parallel
from memfit.types.deadline import Deadline, TimeUp
from memfit.types.errors import NothingFits, UserError
from memfit.types.job import Job, JobRef
from memfit.types.parsing import parse_time_limit
from memfit.types.plan import Accuracy, Bounds, Plan, use
from memfit.types.result import Estimate, SearchExtent, SearchResult


def quiet(stage: str, done: int, total: int, detail: str) -> None:
    pass


# -- the option


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30.0), ("30s", 30.0), ("2min", 120.0), (" 1.5 m", 90.0)]
)
def test_a_time_limit_is_a_time_or_a_number_of_seconds(text: str, seconds: float) -> None:
    assert parse_time_limit(text) == seconds


@pytest.mark.parametrize("text", ["0", "-3", "soon", "", "30 parsecs", "inf", "nan"])
def test_another_time_limit_is_one_clear_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "protein-ss", "--on", "RTX-4090", f"--within={text}"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1
    assert repr(text) in err
    assert "30s" in err


# -- the deadline


def _wait(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_a_deadline_ends_calls_in_forked_processes_and_keeps_the_finished_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace_pool, "_may_fork", lambda: True)  # whatever threads other tests have left
    begun, results = time.monotonic(), dict[int, float]()
    deadline = Deadline.after(1.0)
    with pytest.raises(TimeUp):
        run_parallel([lambda: _wait(0.0), lambda: _wait(60.0)], results=results, deadline=deadline)
    assert time.monotonic() - begun < 30
    assert results == {0: 0.0}
    assert deadline.hit_time_limit


def test_a_deadline_ends_a_single_call_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_pool, "_may_fork", lambda: True)
    begun = time.monotonic()
    with pytest.raises(TimeUp):
        run_parallel([lambda: _wait(60.0)], deadline=Deadline.after(0.5))
    assert time.monotonic() - begun < 30


def test_a_deadline_that_has_not_passed_changes_nothing() -> None:
    deadline = Deadline.after(600.0)
    assert run_parallel([lambda: _wait(0.0), lambda: _wait(0.01)], deadline=deadline) == [0.0, 0.01]
    assert not deadline.hit_time_limit


def test_work_without_which_there_is_no_answer_is_done_after_the_deadline() -> None:
    deadline = Deadline.after(0.0)
    with deadline.overtime():
        deadline.check()
    with pytest.raises(TimeUp):
        deadline.check()


def test_progress_estimates_the_time_left_from_the_units_that_are_done() -> None:
    stage = _Stage(name="price", title="pricing plans", done=2, total=10, detail="")
    assert stage.left_s is None  # too early to tell
    stage.begun_s -= 8.0
    assert stage.left_s == pytest.approx(32.0, rel=0.05)
    assert dataclasses.replace(stage, done=0).left_s is None
    assert dataclasses.replace(stage, total=0).left_s is None


# -- the bound


def estimated(seconds: float, number: int, *, traced: bool = False) -> Estimate:
    return Estimate(
        plan=Plan(uses=(use("gradient-accumulation", micro_batches=number + 1),)),
        allocated_bytes=interval_around(1e6, 0.01),
        phase_peak_bytes={},
        at_peak_bytes={},
        by_module_bytes={},
        step_s=interval_around(seconds, 0.25),
        flops_per_step=1,
        traced=traced,
    )


@given(
    st.lists(st.floats(0.5, 2.0), min_size=ENOUGH, max_size=12),
    st.lists(st.tuples(st.floats(0.1, 10.0), st.floats(0.0, 1.0)), min_size=1, max_size=20),
)
@settings(max_examples=60, deadline=None)
def test_law_no_plan_gains_more_than_the_bound_if_its_sketch_errs_as_assumed(
    ratios: list[float], others: list[tuple[float, float]]
) -> None:
    """Any ratio of trace to sketch from the assumed least one upwards."""
    least, best_score = least_ratio(ratios), 1.0
    sketches = [estimated(seconds, number) for number, (seconds, _) in enumerate(others)]
    untraced = untraced_plans(sketches, Objective.FASTEST, ratios, best_score)
    bound = max(0.0, 1 - untraced.lowest / best_score)
    true_scores = [seconds * (least + above) for seconds, above in others]
    assert all(1 - true / best_score <= bound + 1e-12 for true in true_scores)
    assert sum(true < best_score for true in true_scores) <= untraced.contenders
    assert least <= min(ratios)


def test_ratios_that_differ_more_give_a_weaker_bound() -> None:
    assert least_ratio([1.0, 1.0, 1.0, 1.0]) == 1.0
    assert least_ratio([1.0, 1.1, 1.1, 1.1]) < least_ratio([1.0, 1.05, 1.05, 1.05]) < 1.0


def test_too_few_traces_give_no_bound() -> None:
    untraced = untraced_plans([estimated(1.0, 1)], Objective.FASTEST, [1.0] * (ENOUGH - 1), 1.0)
    assert untraced.unknown == "few_pairs"


def test_unknown_step_times_give_no_bound() -> None:
    sketch = dataclasses.replace(estimated(1.0, 1), step_s=None)
    assert untraced_plans([sketch], Objective.FASTEST, [1.0] * ENOUGH, 1.0).unknown == "no_score"


# -- one device


@pytest.fixture
def question(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Request]:
    monkeypatch.setattr("memfit.planner.request.load", lambda ref: words(2))

    def ask(**changes: Any) -> Request:
        base = Request(job_ref=JobRef(spec="words"), machine=machine("RTX-4090"), accuracy=Accuracy.EXACT)
        return dataclasses.replace(base, **changes)

    return ask


def test_a_search_within_its_limit_answers_as_one_without_a_limit(question: Callable[..., Request]) -> None:
    limited = search.search(question(within_s=3600.0), quiet).result
    unlimited = search.search(question(), quiet).result
    assert limited.extent is not None
    assert not limited.extent.time_up
    assert dataclasses.replace(limited, extent=dataclasses.replace(limited.extent, limit_s=None)) == unlimited
    assert limited.extent.priced_count == limited.considered
    assert limited.extent.left_count == limited.considered - limited.extent.traced_count
    assert (limited.extent.gain_ratio is None) == bool(limited.extent.gain_unknown)


def test_a_search_without_time_recommends_what_it_traced_and_states_no_bound(
    question: Callable[..., Request],
) -> None:
    found = search.search(question(within_s=1e-6), quiet).result
    assert found.recommended is not None
    assert found.recommended.estimate.traced
    assert found.recommended.fits
    assert found.extent is not None
    assert found.extent.time_up
    assert 0 < found.considered < found.extent.unpriced_count  # most were not estimated
    assert found.extent.gain_ratio is None
    assert found.extent.gain_unknown == "unpriced"


def test_what_a_search_without_time_recommends_for_this_machine_is_measured_as_an_estimate_of_it_would_be(
    question: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Plan] = []
    monkeypatch.setattr(search, "calibrate", lambda *_, plans: measured.extend(plans))
    monkeypatch.setattr(search, "begin_calibration", lambda *_: None)
    here = question(within_s=1e-6, machine=this_machine("world", "cpu"), goal=Objective.SMALLEST)
    found = search.search(here, quiet).result
    assert found.recommended is not None
    assert {found.recommended.estimate.plan, Plan()} <= set(measured)


def test_a_search_that_is_cut_after_its_sketches_traces_the_best_one_that_fits(
    question: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_time(predictor: Predictor, plans: object, tell: object = None) -> None:
        predictor.deadline.end_s = 0.0
        predictor.deadline.check()

    monkeypatch.setattr(Predictor, "trace_all", no_time)
    wanted = question(within_s=3600.0, accuracy=Accuracy.ROUNDING, bounds=Bounds(micro_batch=2, without=FEW))
    found = search.search(wanted, quiet).result
    assert found.recommended is not None
    assert found.recommended.estimate.traced
    assert found.recommended.estimate.plan.get("gradient-accumulation")  # which plain training does not have
    assert found.extent is not None
    assert found.extent.time_up
    assert found.extent.traced_count == 2  # with plain training
    assert found.extent.gain_unknown == "few_pairs"


def test_parts_that_were_not_traced_side_by_side_in_time_leave_time_for_whole_plans(
    question: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_time(predictor: Predictor, plans: object, tell: object = None) -> None:
        predictor.deadline.end_s = 0.0
        predictor.deadline.check()

    def one_by_one(predictor: Predictor, plan: Plan, steps: int) -> None:
        raise AssertionError(f"{plan.label} was traced while plans were estimated")

    monkeypatch.setattr(Predictor, "test_dependence", lambda *parts: None)
    monkeypatch.setattr(Predictor, "prepare", no_time)
    monkeypatch.setattr(Predictor, "_digest_part_outcome", one_by_one)
    found = search.search(question(within_s=3600.0), quiet).result
    assert found.extent is not None
    assert found.extent.time_up
    assert found.recommended is not None


def test_a_search_without_time_for_sketches_tries_checkpointing_if_plain_training_does_not_fit(
    question: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            *(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in "12345678")
        )

    job = Job(
        name="wide",
        build_model=build,
        make_batch=lambda step, seed: torch.zeros(4, 4096, 64),
        loss=lambda model, batch: model(batch).square().mean(),
        batch_size=4,
    )
    monkeypatch.setattr("memfit.planner.request.load", lambda ref: job)
    plain = search.search(question(within_s=1e-6), quiet).result.baseline.estimate
    cap_bytes = int(needed_bytes(plain, machine("RTX-4090")) - 0.1 * plain.allocated_bytes.value)
    found = search.search(question(within_s=1e-6, cap_bytes=cap_bytes), quiet).result
    assert found.recommended is not None
    assert found.recommended.fits
    assert found.recommended.estimate.plan.label == "activation-checkpointing(every=1)"


def test_that_nothing_fits_is_not_claimed_of_plans_that_were_not_looked_at(
    question: Callable[..., Request],
) -> None:
    with pytest.raises(
        NothingFits, match=r"no plan that was looked at fits .*; the time limit of .* --within"
    ):
        search.search(question(cap_bytes=2**20, within_s=1e-6), quiet)
    with pytest.raises(NothingFits, match="no allowed plan fits") as complete:
        search.search(question(cap_bytes=2**20), quiet)
    assert "--within" not in str(complete.value)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_a_cut_search_with_a_micro_batch_traces_a_plan_that_has_it(
    micro_batch: int, question: Callable[..., Request]
) -> None:
    """It used to end with a traceback, as only plain training had been traced."""
    bounds = Bounds(micro_batch=micro_batch, without=(*FEW, "activation-checkpointing"))
    with pytest.raises(NothingFits, match=f"gradient-accumulation.*{8 // micro_batch}.*ended the search"):
        search.search(
            question(cap_bytes=2**20, within_s=1e-6, bounds=bounds, accuracy=Accuracy.ROUNDING), quiet
        )


def test_a_cut_search_for_which_another_cap_is_asked_answers_from_what_it_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMFIT_CACHE", str(tmp_path))
    # Libraries that are imported meanwhile set some, which a new process would not have.
    monkeypatch.setattr(job_content, "_variables", lambda names: {})

    def ask(**changes: Any) -> SearchResult:
        base = Request(job_ref=JobRef(spec="char-lm"), machine=machine("RTX-4090"), accuracy=Accuracy.EXACT)
        return search.search(dataclasses.replace(base, **changes), quiet).result

    without_estimates = [ask(within_s=1e-6, continues=continues) for continues in (True, False)]
    assert [result.extent and result.extent.limit_s for result in without_estimates] == [1e-6, 1e-6]

    def no_time(predictor: Predictor, plans: object, tell: object = None) -> None:
        predictor.deadline.end_s = 1e-9
        predictor.deadline.check()

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "trace_all", no_time)
        first = ask(within_s=3600.0)
    assert first.extent is not None
    assert first.extent.time_up
    other_plans = ask(within_s=1e-6, continues=False, accuracy=Accuracy.ROUNDING)
    assert other_plans.extent is not None
    assert other_plans.extent.limit_s == 1e-6
    with monkeypatch.context() as patch:
        for name in ("trace", "deep_traces", "traces_of"):
            patch.setattr(evaluate, name, lambda *a, **k: pytest.fail("something was traced"))
        again = ask(within_s=3600.0, continues=False, cap_bytes=20 * 2**30)
    assert again.recommended is not None
    assert again.recommended.estimate.traced
    assert again.extent is not None
    assert (again.extent.time_up, again.extent.limit_s) == (True, 0.0)
    assert again.extent.priced_count == first.extent.priced_count > 0
    needed = needed_bytes(first.baseline.estimate, machine("RTX-4090"))
    smaller = ask(within_s=1e-6, continues=False, cap_bytes=needed - 2**20)  # what was kept does not fit
    assert smaller.extent is not None
    assert smaller.extent.limit_s == 1e-6


def test_what_a_limit_may_leave_out_is_traced_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_pool, "_may_fork", lambda: False)
    long_job, labels = evoformer(samples=1), list[str]()
    predictor = Predictor(job=long_job, machine=machine("RTX-4090"), job_facts=job_facts(long_job, "cuda"))
    chunked, recomputed = use("chunking", mib=0, parts=16), use("activation-checkpointing", every=1)
    plans = [Plan(uses=uses) for uses in ((), (chunked,), (recomputed,), (chunked, recomputed))]
    predictor.prepare(plans, lambda done, count, label: labels.append(label))
    order = list(dict.fromkeys(labels))  # two processes would take them from both ends
    assert ["chunking" in label for label in order] == [False, True, True, False]


def test_the_best_plans_by_their_sketches_are_traced_first() -> None:
    sketches = [estimated(seconds, number) for number, seconds in enumerate((5.0, 2.0, 4.0, 1.0, 3.0))]
    sketches[2] = dataclasses.replace(sketches[2], allocated_bytes=interval_around(1e3, 0.01))
    plans = [sketch.plan for sketch in sketches]
    ordered = _best_first(plans, sketches, lambda e: e.plan != plans[3], Objective.FASTEST)
    assert ordered == [plans[1], plans[4], plans[2], plans[0], plans[3]]


# -- many devices


@pytest.fixture
def many_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., MultiDevicePredictor]:
    monkeypatch.setattr(multi_device_predictor, "BlockTracer", lambda job, device: traced())

    def make(limit_s: float | None = None, **wanted: Any) -> MultiDevicePredictor:
        asked = job(32)
        predictor = Predictor(
            job=asked, machine=H100, job_facts=job_facts(asked, "cuda", 8), deadline=Deadline.after(limit_s)
        )
        request = MultiDeviceRequest(
            goal=wanted.get("goal", Objective.FASTEST),
            accuracy=Accuracy.ROUNDING,
            cap=Cap(
                bytes=wanted.get("cap_bytes", 4 * 2**30),
                needs=lambda e: needed_bytes(e, H100),
                refuses=lambda plan: (),
            ),
            bounds=Bounds(without=FEW, micro_batch=4),
            progress=quiet,
            limit_s=limit_s,
        )
        return MultiDevicePredictor(predictor, request)

    return make


def _pairs(many: MultiDevicePredictor, ratio: float) -> None:
    """Pretend that some plans were traced, and took ``ratio`` times as long as their sketches."""
    for sketch in many.estimates(2)[::20]:
        assert sketch.step_s is not None
        trace = dataclasses.replace(
            sketch, traced=True, step_s=interval_around(sketch.step_s.value * ratio, 0.1)
        )
        many.pairs.append((sketch, trace))


@pytest.mark.parametrize("goal", [Objective.FASTEST, Objective.SMALLEST, Objective.CHEAPEST])
def test_law_the_bound_over_the_grids_is_that_over_all_their_plans(
    many_of: Callable[..., MultiDevicePredictor], goal: Objective
) -> None:
    many = many_of(goal=goal)
    _pairs(many, 1.05)
    best_score = min(score(t, goal) for _, t in many.pairs)
    untraced = multi_device_bound.untraced_in_grids(many, [2], best_score)
    ratios = multi_device_bound.least_ratios(many.pairs, goal)
    known = {t.plan for _, t in many.pairs}
    lowest, contenders = math.inf, 0
    for grid in {id(s.grid): s.grid for s in many.grid_sketches[2].picks}.values():
        predicted = many.grid_sketches[2].predict(grid)
        for index in itertools.product(*map(range, grid.shape)):
            step_s, peak = float(predicted.step_s[index]), float(predicted.allocated_bytes[index])
            family = multi_device_bound.family(grid.plan(index).uses)
            least = ratios.get(family, multi_device_bound.unseen_ratio(family, goal, deep=False))
            value = least * (peak if goal is Objective.SMALLEST else step_s)
            if goal is Objective.CHEAPEST:
                value *= score(many.pairs[0][0], goal) / many.pairs[0][0].step_s.value  # type: ignore[union-attr]
            if value < best_score and grid.plan(index) not in known:
                lowest, contenders = min(lowest, value), contenders + 1
    assert untraced.contenders == contenders
    assert untraced.lowest == pytest.approx(lowest)


def test_a_family_of_plans_of_which_none_was_traced_is_trusted_less(
    many_of: Callable[..., MultiDevicePredictor],
) -> None:
    many = many_of()
    _pairs(many, 1.0)
    ratios = multi_device_bound.least_ratios(many.pairs, Objective.FASTEST)
    unseen = multi_device_bound.unseen_ratio(("pipeline", "zero"), Objective.FASTEST, deep=True)
    assert ratios
    assert all(unseen < ratio < 1.0 for ratio in ratios.values())
    context = ("context-parallel", "fsdp2")
    assert multi_device_bound.unseen_ratio(context, Objective.FASTEST, deep=True) < unseen
    assert multi_device_bound.unseen_ratio(context, Objective.FASTEST, deep=False) < unseen
    assert multi_device_bound.unseen_ratio(context, Objective.SMALLEST, deep=True) < unseen


def test_a_search_for_many_devices_without_time_recommends_a_traced_plan(
    many_of: Callable[..., MultiDevicePredictor],
) -> None:
    many = many_of(1e-6)
    found = search_many_devices(many.plan_predictor, 2, many.request)
    assert found.recommended is not None
    assert found.recommended.estimate.traced
    assert found.extent is not None
    assert found.extent.time_up
    assert found.extent.priced_count == found.considered > 100
    assert found.extent.gain_ratio is None or found.extent.gain_ratio > 0.01


def test_no_plan_is_traced_before_nothing_fits_once_the_time_is_up(
    many_of: Callable[..., MultiDevicePredictor],
) -> None:
    many = many_of()
    known = many.estimates(2)
    too_small = int(
        0.9 * min(map(many.needs, known))
    )  # no sketch fits, but the smallest may when it is traced
    many.request = dataclasses.replace(
        many.request, cap=dataclasses.replace(many.request.cap, bytes=too_small)
    )
    many.deadline.stop()
    assert list(trace_before_nothing_fits(many, known, many.fits_memory)) == []
    assert many.deadline.hit_time_limit


def test_plain_training_of_fewer_ranks_than_devices_has_no_sketch_and_is_traced(
    many_of: Callable[..., MultiDevicePredictor],
) -> None:
    many = many_of()
    assert many.sketches(2).picks
    assert many.sketch_of_plain(make_plain_plan(1)) is None  # as for a batch of one sample


@pytest.mark.long
def test_a_search_for_many_devices_within_its_limit_is_the_same_every_time(
    many_of: Callable[..., MultiDevicePredictor],
) -> None:
    first, second = (
        search_many_devices(s.plan_predictor, 2, s.request) for s in (many_of(3600.0), many_of(3600.0))
    )
    assert first == second
    assert first.extent is not None
    assert not first.extent.time_up
    assert first.extent.gain_ratio is not None


# -- what is shown

EXTENT = SearchExtent(
    priced_count=5000,
    traced_count=9,
    limit_s=30.0,
    time_up=True,
    gain_ratio=0.004001,
    pairs=9,
    low_ratio=0.98,
    high_ratio=1.1,
    contender_count=12,
    chosen_ratio=0.02,
)


@pytest.fixture(scope="module")
def result() -> SearchResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memfit.planner.request.load", lambda ref: words(2))
        wanted = Request(job_ref=JobRef(spec="words"), machine=machine("RTX-4090"), accuracy=Accuracy.EXACT)
        return search.search(dataclasses.replace(wanted, within_s=1e-6), quiet).result


def shown(extent: SearchExtent, result: SearchResult, lang: str) -> str:
    stream = io.StringIO()
    changed = dataclasses.replace(result, extent=extent)
    print_search(changed, console=Console(file=stream, width=400), lang=lang)
    return stream.getvalue()


@pytest.mark.parametrize(("lang", "limit"), [("en", "time limit of 30 s"), ("ja", "制限時間 30")])
def test_the_answer_says_how_far_the_search_got_and_what_could_still_be_gained(
    result: SearchResult, lang: str, limit: str
) -> None:
    text = shown(EXTENT, result, lang)
    assert all(
        part in text for part in ("5,000", "4,991", "0.41 %", limit, "2.00 %")
    )  # the bound is rounded up
    unknown = shown(dataclasses.replace(EXTENT, gain_ratio=None, gain_unknown="few_pairs"), result, lang)
    assert "0.41" not in unknown


@pytest.mark.parametrize(
    ("lang", "part"), [("en", "nothing more was traced"), ("ja", "新たなトレースは行っていません")]
)
def test_an_answer_from_what_an_earlier_search_kept_says_how_to_continue(
    result: SearchResult, lang: str, part: str
) -> None:
    text = shown(dataclasses.replace(EXTENT, limit_s=0.0), result, lang)
    assert part in text
    assert "--within 60s" in text


@pytest.mark.parametrize("reason", ["unpriced", "few_pairs", "no_score", "not_searched", "goal"])
@pytest.mark.parametrize("lang", ["en", "ja"])
def test_every_reason_for_no_bound_has_words(result: SearchResult, lang: str, reason: str) -> None:
    assert shown(dataclasses.replace(EXTENT, gain_ratio=None, gain_unknown=reason), result, lang)


def test_json_has_the_extent_and_null_for_an_unknown_bound(result: SearchResult) -> None:
    view = json.loads(json.dumps(search_view(result)["extent"]))
    assert view["gain_ratio"] is None
    assert view["gain_unknown"] == "unpriced"
    assert view["time_up"] is True
    assert view["left_count"] == view["priced_count"] - view["traced_count"]


def test_a_job_that_is_not_a_time_limit_is_refused_by_its_parser() -> None:
    with pytest.raises(UserError, match="30, 30s or 2min"):
        parse_time_limit("half an hour")
