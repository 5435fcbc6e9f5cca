"""Item 9: the same question gets the same answer, and an answer inside the error of the timings is none."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import words

from memfit.cli import main
from memfit.cli.progress import Bars
from memfit.cost.estimate import interval_around
from memfit.cost.op_time import signatures_to_time
from memfit.planner import capacity, search, single_device, trials
from memfit.planner.operator_timer import OperatorTimer
from memfit.planner.request import Planning, Request
from memfit.planner.search import SearchInterrupted
from memfit.planner.selection import TIMED, Objective, best, timed_band
from memfit.report.terminal import print_search
from memfit.store.calibration import CalibrationCache, select_operators
from memfit.trace import trace_pool
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.machine import Calibration, Device, Fact, Machine
from memfit.types.plan import Accuracy, Plan, Use, use
from memfit.types.result import Estimate, Measurement, OutcomeKind, Timings
from memfit.types.trace import OpCall, Phase

MIB = 2**20
ACCUMULATED = use("gradient-accumulation", micro_batches=2)
CHECKPOINTED = use("activation-checkpointing", every=1)
EIGHT_BIT, MIXED = use("adamw-8bit"), use("bf16-autocast")


def estimated(seconds: float, *uses: Use, mib: float = 10.0) -> Estimate:
    return Estimate(
        plan=Plan(uses=uses),
        allocated_bytes=interval_around(mib * MIB, 0.01),
        phase_peak_bytes={},
        at_peak_bytes={},
        by_module_bytes={},
        step_s=interval_around(seconds, 0.25),
        flops_per_step=1,
    )


# --- ranking


def test_noise_within_the_error_of_the_timings_changes_no_recommendation() -> None:
    truth = [
        estimated(1.00, MIXED, CHECKPOINTED, EIGHT_BIT),
        estimated(1.01, MIXED, ACCUMULATED, EIGHT_BIT),
        estimated(1.03, MIXED, ACCUMULATED),
        estimated(1.02, MIXED, CHECKPOINTED),
        estimated(1.45, CHECKPOINTED),
        estimated(1.5, ACCUMULATED),
    ]
    draw, answers = random.Random(0), set()
    for _ in range(200):
        noisy = [
            dataclasses.replace(e, step_s=interval_around(e.step_s.value * draw.uniform(0.97, 1.03), 0.25))
            for e in truth
            if e.step_s
        ]
        found = best(noisy, Objective.FASTEST, TIMED)
        assert found is not None
        answers.add(found.plan.label)
    assert answers == {"bf16-autocast + gradient-accumulation(micro_batches=2)"}


def test_the_line_of_a_tie_is_drawn_where_plans_are_furthest_apart() -> None:
    for simple_s in (1.06, 1.08, 1.10):  # the next is far away: no limit between 7 and 14 % cuts these off
        close = [estimated(1.0, MIXED), estimated(simple_s, ACCUMULATED), estimated(1.3)]
        found = best(close, Objective.FASTEST, TIMED)
        assert found is not None
        assert found.plan == Plan(uses=(ACCUMULATED,))
    slower = best([estimated(1.0, MIXED), estimated(1.2)], Objective.FASTEST, TIMED)
    assert slower is not None
    assert slower.plan == Plan(uses=(MIXED,))


def test_a_gain_of_four_percent_is_not_worth_a_technique_that_is_not_needed() -> None:
    needless = [estimated(1.0, MIXED), estimated(0.96, MIXED, EIGHT_BIT), estimated(2.0)]
    found = best(needless, Objective.FASTEST, TIMED)
    assert found is not None
    assert found.plan == Plan(uses=(MIXED,))
    only = best([e for e in needless if e.plan.get("adamw-8bit")], Objective.FASTEST, TIMED)  # it alone fits
    assert only is not None
    assert only.plan.get("adamw-8bit")


def test_the_noisier_the_timings_the_more_counts_as_equal() -> None:
    close = [estimated(1.0, MIXED, EIGHT_BIT), estimated(1.25, CHECKPOINTED)]
    answers = [best(close, Objective.FASTEST, timed_band(spread)) for spread in (0.0, 0.05, 0.5)]
    assert [len(e.plan.uses) for e in answers if e] == [2, 2, 1]
    far = [estimated(1.0, MIXED, EIGHT_BIT), estimated(1.6, CHECKPOINTED)]
    assert [len(e.plan.uses) for e in [best(far, Objective.FASTEST, timed_band(9.0))] if e] == [2]


def test_memory_is_no_timing_and_keeps_its_narrow_tie() -> None:
    found = best([estimated(1.0, mib=10), estimated(1.0, CHECKPOINTED, mib=9.2)], Objective.SMALLEST, TIMED)
    assert found is not None
    assert found.plan.get("activation-checkpointing")


def test_of_plans_with_the_same_techniques_the_settings_decide_and_not_the_noise() -> None:
    more = use("gradient-accumulation", micro_batches=4)
    for fewer_s, more_s in ((1.0, 1.01), (1.01, 1.0)):
        found = best([estimated(more_s, more), estimated(fewer_s, ACCUMULATED)], Objective.FASTEST, TIMED)
        assert found is not None
        assert found.plan == Plan(uses=(ACCUMULATED,))


# --- timings are taken once


def calls(count: int, flops: int = 10**9) -> list[tuple[OpCall, int]]:
    return [
        (
            OpCall(
                clock=i,
                op="aten.mm.default",
                signature=f"op {i:03}",
                phase=Phase.FORWARD,
                step=0,
                module="",
                dtype="float32",
                flops=flops * (1 + i % 3),
                moved_bytes=8,
            ),
            1,
        )
        for i in range(count)
    ]


def test_which_operators_are_timed_depends_on_the_plans_and_not_on_the_clock() -> None:
    ops = calls(40)
    chosen = signatures_to_time(ops, (), timing_s=1.0)
    assert 5 <= len(chosen) < 40
    assert chosen == signatures_to_time(list(reversed(ops)), (), timing_s=1.0)
    assert not set(chosen[:3]) & set(signatures_to_time(ops, chosen[:3], timing_s=1.0))


def timed(seconds: float, *names: str, failed: Sequence[str] = ()) -> Calibration:
    return Calibration(
        flops_s={"float32": 1e11},
        bandwidth_bytes_s=1e10,
        op_s=dict.fromkeys(names, seconds),
        op_peak_bytes=dict.fromkeys(names, 64),
        op_spread_ratio=dict.fromkeys(names, 0.1),
        not_timed=tuple(failed),
        load_count=7.0,
    )


def test_what_is_stored_is_never_overwritten_until_it_is_forgotten(tmp_path: Path) -> None:
    cache = CalibrationCache(1, tmp_path / "new" / "calibration.sqlite3")
    assert cache.read() == Calibration()
    stored = cache.add(timed(1.0, "a", failed=("x",)))
    again = cache.add(timed(2.0, "a", "b"))
    assert (stored.op_s, stored.not_timed, stored.load_count) == ({"a": 1.0}, ("x",), 7.0)
    assert again.op_s == {"a": 1.0, "b": 2.0}
    assert cache.read() == again
    assert CalibrationCache(2, cache.path).read().op_s == {}  # another number of threads
    assert select_operators(again, {"b"}).op_s == {"b": 2.0}
    cache.forget()
    assert cache.read() == Calibration()


def test_where_nothing_can_be_stored_the_fresh_timings_are_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = CalibrationCache(1, tmp_path / "file" / "calibration.sqlite3")
    assert cache.add(timed(1.0, "a")).op_s == {"a": 1.0}
    assert cache.read() == Calibration()


def fact(value: float) -> Fact:
    return Fact(value=value, source="a test", date="2026-01-01", kind="assumed")


HERE = Machine(
    name="this machine",
    device=Device(name="this machine", kind="cpu", memory_bytes=fact(2**30), power_w=fact(10.0)),
    is_here=True,
)


class Probes:
    """Timings that are different each time they are taken."""

    def __init__(self) -> None:
        self.draw, self.asked = random.Random(1), list[list[str]]()

    def __call__(self, signatures: list[str], timing_s: float, rates: bool) -> Calibration:
        self.asked.append(signatures)
        times = {s: self.draw.uniform(1e-5, 3e-5) for s in signatures}
        return dataclasses.replace(timed(0.0), op_s=times, op_peak_bytes=dict.fromkeys(times, 0))


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> Probes:
    found = Probes()
    monkeypatch.setattr(OperatorTimer, "measure", found)
    monkeypatch.setattr("memfit.planner.request.load", lambda ref: words(2))
    monkeypatch.setattr(single_device, "FINALISTS", 3)
    monkeypatch.setattr(capacity, "CPU_HEADROOM_BYTES", 0)  # larger than the whole job here
    return found


def question(**changes: Any) -> Request:
    asked = Request(
        job_ref=JobRef(spec="words"), machine=HERE, cap_bytes=1_000_000, accuracy=Accuracy.EXACT, threads=1
    )
    return dataclasses.replace(asked, **changes)


def quiet(stage: str, done: int, total: int, detail: str) -> None:
    pass


def test_the_same_question_is_answered_by_the_same_timings_and_those_of_others_change_nothing(
    probes: Probes,
) -> None:
    first = search.search(question(), quiet)
    taken = len(probes.asked)
    CalibrationCache(1).add(timed(9.0, "of another question"))
    second = search.search(question(), quiet)
    assert len(probes.asked) == taken > 0, "nothing is timed again"
    assert second.result == first.result
    assert second.predictor.calibration.op_s == first.predictor.calibration.op_s
    with pytest.raises(KeyboardInterrupt):
        search.search(question(recalibrate=True), interrupted_at("price"))
    assert probes.asked[taken] == probes.asked[0], "all of it is timed again"


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planning]:
    """One search, for the tests that begin where it ends."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("searched") / "calibration.sqlite3"
        patch.setattr("memfit.store.calibration.default_path", lambda: path)
        patch.setattr(OperatorTimer, "measure", Probes())
        patch.setattr("memfit.planner.request.load", lambda ref: words(2))
        patch.setattr(single_device, "FINALISTS", 3)
        patch.setattr(capacity, "CPU_HEADROOM_BYTES", 0)
        yield search.search(question(), quiet)


def test_a_plan_fits_only_if_the_host_holds_what_it_keeps_there(searched: Planning) -> None:
    fitting = next(e for e in searched.estimates if searched.meets_limits(e))
    assert not searched.meets_limits(dataclasses.replace(fitting, host_bytes=interval_around(1e12, 0.0)))


# --- Ctrl-C


def interrupted_at(stage: str) -> Callable[[str, int, int, str], None]:
    def progress(name: str, done: int, total: int, detail: str) -> None:
        if name == stage and done >= (total - 1 if name == "price" else 1):
            raise KeyboardInterrupt

    return progress


@pytest.mark.usefixtures("probes")
@pytest.mark.parametrize("stage", ["price", "finalists"])
def test_an_interrupted_search_has_the_best_plan_so_far(stage: str) -> None:
    with pytest.raises(SearchInterrupted) as stop:
        search.search(question(), interrupted_at(stage))
    found = stop.value.result
    assert found.unfinished
    assert found.recommended is not None
    assert found.recommended.fits
    assert not found.recommended.reasons  # nothing was estimated for them


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_ctrl_c_shows_it_and_ends_as_shells_expect(
    searched: Planning,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
) -> None:
    def search(*asked: object, **more: object) -> Planning:
        raise SearchInterrupted(dataclasses.replace(searched.result, unfinished=True))

    monkeypatch.setattr("memfit.workflows.plan.find_plan", search)
    assert main(["plan", "protein-ss", *more]) == 130
    out, err = capsys.readouterr()
    assert "interrupted: the search was not finished" in err
    assert ('"unfinished": true' if more else "This is the best plan so far") in out
    assert not more or out.count("\n}") == 1  # one JSON object


# --- progress


def note(seen: list[tuple[int, int]], done: int, index: int) -> None:
    seen.append((done, index))


def test_progress_counts_what_is_done_and_not_what_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
    for may_fork in (False, hasattr(os, "fork")):
        monkeypatch.setattr(trace_pool, "_may_fork", lambda may=may_fork: may)
        seen: list[tuple[int, int]] = []
        results: dict[int, int] = {}
        trace_pool.run_parallel([partial(int, n) for n in range(5)], partial(note, seen), results)
        counts = [done for done, _ in seen]
        assert (counts[0], counts[-1]) == (0, 5)
        assert counts == sorted(counts)
        assert results == {n: n for n in range(5)}


def test_two_jobs_that_begin_together_are_one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    with Bars("en") as bars:
        ended: list[str] = []
        monkeypatch.setattr(bars._display, "end", lambda stage, well: ended.append(stage.count))
        for done, detail in ((0, "one"), (0, "two"), (1, "two"), (2, "two")):
            bars("search", done, 2, detail)
        assert ended == [""]  # loading alone
        bars("search", 0, 2, "again")
        assert ended == ["", "2/2"]


# --- noise is said


def test_noisy_timings_are_said_and_quiet_ones_are_not(searched: Planning) -> None:
    result = searched.result
    for load, noisy in ((7.0, True), (0.2, False)):
        known = Timings(spread_ratio=0.02, load_count=load, waited_ratio=0.0, processor_count=2)
        console = Console(file=io.StringIO(), width=200)
        print_search(dataclasses.replace(result, timings=known), console=console, lang="en")
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("Timings are noisy here (load 7.0" in text) is noisy
    assert result.timings is not None
    assert result.timings.load_count == 7.0  # as it was when they were taken


# --- rivals in turn


def run_with(
    searched: Planning, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Plan, int], float | None]
) -> tuple[Planning, list[Plan]]:
    """`trials.measured` where a run of a plan takes these seconds a step; None: it runs out of memory."""
    ran: list[Plan] = []

    def few_steps(asked: Planning, plan: Plan, steps: int, **rest: Any) -> Measurement:
        ran.append(plan)
        step_s = seconds(plan, ran.count(plan))
        if step_s is None:
            return Measurement(outcome=OutcomeKind.OOM, reason="over the cap")
        return Measurement(outcome=OutcomeKind.OK, step_s=(9.0, 9.0, *[step_s] * 3), peak_bytes=1)

    monkeypatch.setattr(trials, "few_steps", few_steps)
    found = dataclasses.replace(searched, predictor=copy.copy(searched.predictor))
    return trials.choose_by_trials(found, quiet, measure_s=60.0), ran


def test_the_rival_that_is_quickest_when_run_is_recommended(
    searched: Planning, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, ran = run_with(
        searched,
        monkeypatch,
        lambda plan, turn: 1.0 if plan.get("activation-offload") else 2.0 + len(plan.uses),
    )
    assert found.result.recommended is not None
    chosen = found.result.recommended.estimate.plan
    assert chosen.get("activation-offload")
    assert 2 <= len(set(ran)) <= trials.FIRST + trials.CLIMBS * trials.NEIGHBOURS
    assert 3 <= ran.count(chosen) <= 4 + trials.CLIMBS, "the plans that decide run in three rounds or more"
    assert {t.plan for t in found.result.trials} == set(ran)
    known = found.predictor.calibration
    assert known.corrected_count == len(set(ran))
    step = found.result.recommended.estimate.step_s
    assert step is not None
    assert step.value == pytest.approx(1.0, rel=0.5)  # predicted as tens of microseconds before


def test_a_set_of_techniques_predicted_close_is_tried_with_its_fewest_micro_batches(
    searched: Planning,
) -> None:
    four = use("gradient-accumulation", micro_batches=4)
    sketches = [
        estimated(1.0),
        estimated(1.05, CHECKPOINTED),
        estimated(1.1, EIGHT_BIT),
        estimated(1.15, CHECKPOINTED, EIGHT_BIT),
        estimated(1.2, EIGHT_BIT, four),
        estimated(1.4, EIGHT_BIT, ACCUMULATED),
        estimated(9.0, ACCUMULATED),
    ]
    planning = dataclasses.replace(
        searched, sketches=sketches, estimates=(), meets_limits=lambda estimate: True
    )
    plans = trials._shortlist(planning)
    assert Plan(uses=(EIGHT_BIT, four)) in plans
    assert Plan(uses=(EIGHT_BIT, ACCUMULATED)) in plans
    assert Plan(uses=(ACCUMULATED,)) not in plans, "no prediction is that wrong"


def test_a_plan_whose_first_round_was_disturbed_is_recommended_all_the_same(
    searched: Planning, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(plan: Plan, turn: int) -> float:
        if plan == quickest:
            return 1.4 if turn == 1 else 0.8
        return 1.0

    quickest = Plan()
    _, ran = run_with(searched, monkeypatch, lambda plan, turn: 1.0)
    quickest = ran[1]
    found, _ = run_with(searched, monkeypatch, seconds)
    assert found.result.recommended is not None
    assert found.result.recommended.estimate.plan == quickest


def test_a_plan_predicted_fast_runs_again_though_its_only_run_was_slower_than_those_of_many(
    searched: Planning,
) -> None:
    rivals = [
        Plan(uses=(use("gradient-accumulation", micro_batches=n),)) for n in range(2, trials.SECOND + 3)
    ]
    disturbed, slow = Plan(), Plan(uses=(EIGHT_BIT,))
    of_trials = trials._Trials(searched, quiet, measure_s=1.0)
    of_trials.predicted = {disturbed: 0.9, slow: 1.4, **dict.fromkeys(rivals, 1.0)}
    of_trials.times = {disturbed: [1.5], slow: [1.5], **{plan: [1.0] for plan in rivals}}
    of_trials.rounds = {plan: [1] for plan in of_trials.times}
    again = of_trials.contenders(trials.SECOND, 1.6)
    assert again[0] == disturbed
    assert slow not in again
    of_trials.times[disturbed], of_trials.rounds[disturbed] = [1.5, 1.5], [1, 2]
    assert disturbed not in of_trials.contenders(trials.SECOND, 1.6), "two runs agree that it is slow"


def test_of_plans_that_run_as_quickly_the_simplest_is_taken_whatever_the_noise(
    searched: Planning, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = set()
    for seed in range(3):
        draw = random.Random(seed)
        found, _ = run_with(searched, monkeypatch, lambda plan, turn, draw=draw: draw.uniform(1.0, 1.01))
        assert found.result.recommended is not None
        answers.add(found.result.recommended.estimate.plan.label)
    assert len(answers) == 1


def test_a_round_in_which_all_plans_are_slower_changes_no_recommendation(
    searched: Planning, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(plan: Plan, turn: int, slowdown: float) -> float:
        step_s = 1.0 if plan.get("activation-offload") else 1.25 - 0.05 * (not plan.uses)
        return step_s * (1.0 if turn == 1 else slowdown)

    chosen = set()
    for slowdown in (1.0, 1.5):
        found, _ = run_with(searched, monkeypatch, functools.partial(seconds, slowdown=slowdown))
        assert found.result.recommended is not None
        chosen.add(found.result.recommended.estimate.plan)
    assert len(chosen) == 1
    assert chosen.pop().get("activation-offload")


def test_times_are_compared_as_in_the_fastest_round() -> None:
    one, other, late = Plan(), Plan(uses=(CHECKPOINTED,)), Plan(uses=(EIGHT_BIT,))
    times = {one: [2.0, 3.0], other: [4.0, 6.6], late: [3.3]}
    comparable = trials.comparable_times(times, {one: [1, 2], other: [1, 2], late: [2]})
    assert comparable[one] == pytest.approx([2.0, 2.0], rel=0.06)
    assert comparable[other] == pytest.approx([4.0, 4.3], rel=0.06)
    assert comparable[late] == pytest.approx([2.1], rel=0.06)


def test_rounds_that_differ_much_make_more_plans_equal() -> None:
    quiet_rounds = [[1.0, 1.004, 1.2], [1.1, 1.106], [1.3]]
    noisy_rounds = [[1.0, 1.15, 1.2], [1.1, 1.32], [1.3]]
    assert trials.measured_band(quiet_rounds).high < 0.05
    assert trials.measured_band(noisy_rounds).low == pytest.approx(0.015 + 0.175)
    assert trials.measured_band([[1.0]]).low == 0.015


def test_a_plan_that_runs_out_of_memory_is_named_and_not_recommended(
    searched: Planning, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = run_with(
        searched, monkeypatch, lambda plan, turn: None if plan.get("activation-offload") else 1.0
    )
    assert found.result.recommended is not None
    assert not found.result.recommended.estimate.plan.get("activation-offload")
    reasons = {t.reason for t in found.result.trials if not t.step_s}
    assert reasons == {"over the cap"}


def test_when_the_time_is_over_no_run_begins_but_the_first_two(
    searched: Planning, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Plan] = []

    def few_steps(asked: Planning, plan: Plan, steps: int, **rest: Any) -> Measurement:
        ran.append(plan)
        return Measurement(outcome=OutcomeKind.OK, step_s=(1.0,))

    monkeypatch.setattr(trials, "few_steps", few_steps)
    trials.choose_by_trials(
        dataclasses.replace(searched, predictor=copy.copy(searched.predictor)), quiet, measure_s=0.0
    )
    assert len(ran) == 2


def test_measuring_for_a_goal_that_is_not_about_time_is_refused(searched: Planning) -> None:
    smallest = dataclasses.replace(searched, request=question(goal=Objective.SMALLEST))
    with pytest.raises(UserError, match="the goal smallest is not calculated from step time"):
        trials.choose_by_trials(smallest, quiet, measure_s=1.0)


def test_measure_is_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "protein-ss", "--on", "H100-SXM", "--measure"]) == 2
    assert "--measure runs plans on this machine" in capsys.readouterr().err
