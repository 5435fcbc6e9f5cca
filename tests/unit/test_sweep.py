"""`memfit sweep`: trials side by side, with a budget, resumed and cancelled. The trials of most tests are
a small program in place of `memfit run`, which writes the record of a run."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest
import report_fixture

from memfit.jobs.user_job import source_digest
from memfit.planner.request import Planning, Request
from memfit.report.words import load_words
from memfit.runtime.local_machine import this_machine
from memfit.store.database import Store
from memfit.store.environment import fingerprint
from memfit.store.exchange.run_record import RUN, parse_run_record, record_of, run_record_text
from memfit.techniques.registry import make_use
from memfit.types.errors import RunError, UserError
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan
from memfit.types.result import Measurement, OutcomeKind, Run
from memfit.workflows import proof_of_concept
from memfit.workflows import sweep as sweeps
from memfit.workflows.proof_of_concept import SideBySide
from memfit.workflows.sweep import (
    SWEEPS,
    Budget,
    Placement,
    RunSettings,
    Sweep,
    SweepTrial,
    TrialState,
    make_trials,
)

PLANS = {
    "plain": Plan(),
    "split": Plan(uses=(make_use("gradient-accumulation", {"micro_batches": 2}),)),
}
JOB = JobRef(spec="char-lm", steps=1)
Command = Callable[[SweepTrial, int, RunSettings, Path], Iterator[str]]


def a_run(trial: SweepTrial, outcome: OutcomeKind = OutcomeKind.OK, **spec: object) -> Run:
    """Return the run that a trial might report."""
    return Run(
        spec=RunSpec(
            name="run", role="run", job=trial.job, plan=trial.plan, seed=trial.seed, steps=1, **spec
        ),
        predicted_peak_bytes=2,
        predicted_phase_peak_bytes={},
        predicted_step_s=0.1,
        measurement=Measurement(outcome=outcome, reason="", steps_done=1, peak_bytes=2, losses=(0.5,)),
    )


class Program:
    """The program that takes the place of `memfit run`. ``code``: what it does before it writes its
    record, of a trial by plan and seed; "" for the others."""

    def __init__(self, code: Mapping[tuple[str, int], str] | None = None, always: str = "") -> None:
        self.code, self.always = dict(code or {}), always
        self.begun: list[tuple[str, int]] = []

    def command(self, trial: SweepTrial, threads: int, settings: RunSettings, folder: Path) -> Iterator[str]:
        self.begun.append((trial.plan_name, trial.seed))
        text = run_record_text(record_of(a_run(trial), trial.trial_id))
        (folder / "text").write_text(text, encoding="utf-8")
        code = self.code.get((trial.plan_name, trial.seed), self.always)
        yield from (sys.executable, "-I", "-S", "-c")
        yield f"import os, time\n{code}\nos.rename({str(folder / 'text')!r}, {str(folder / 'record.json')!r})"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    program = Program()
    monkeypatch.setattr(sweeps, "_command", program.command)
    return program


def trials(seeds: int = 2, parallel: int = 4, **plans: Plan) -> tuple[SweepTrial, ...]:
    placement = Placement(executor="local", settings={"parallel": str(parallel)})
    return make_trials(JOB, plans or PLANS, [placement], RunSettings(), seeds=seeds)


def run(all_trials: tuple[SweepTrial, ...], store: Store, budget: Budget | None = None) -> Sweep:
    with Sweep(all_trials, RunSettings(), store) as sweep:
        sweep.run(budget or Budget(hours=1.0))
    return sweep


def states(sweep: Sweep) -> list[str]:
    return [result.state.value for result in sweep.results]


def files_left(store: Store) -> list[str]:
    return sorted(path.name for path in store.path.parent.iterdir())


def test_every_plan_is_trained_with_every_seed_and_each_run_is_stored_under_its_trial(
    tmp_path: Path, program: Program
) -> None:
    store = Store(tmp_path / "store.sqlite3")
    sweep = run(trials(), store)
    assert states(sweep) == ["done"] * 4
    assert sorted(program.begun) == [("plain", 0), ("plain", 1), ("split", 0), ("split", 1)]
    rows = store.records(kind=RUN)
    assert {row.poc_id for row in rows} == {trial.trial_id for trial in trials()}
    assert {json.loads(row.body)["spec"]["seed"] for row in rows} == {0, 1}
    assert sweep.hours > 0
    assert files_left(store) == ["store.sqlite3"]


def test_what_has_a_result_is_not_run_again_and_what_was_killed_is(tmp_path: Path, program: Program) -> None:
    store = Store(tmp_path / "store.sqlite3")
    program.code[("split", 1)] = "os.kill(os.getpid(), 9)"
    first = run(trials(), store)
    assert states(first).count("failed") == 1
    (failed,) = (result for result in first.results if result.state is TrialState.FAILED)
    assert (failed.trial.plan_name, failed.trial.seed, failed.reason) == ("split", 1, "killed by SIGKILL")
    program.code.clear()
    program.begun.clear()
    second = run(trials(), store)
    assert program.begun == [("split", 1)]
    assert states(second) == ["done"] * 4
    assert [result.before for result in second.results].count(True) == 3
    assert files_left(store) == ["store.sqlite3"]


@pytest.mark.parametrize("fact", ["torch", "memfit", "processor"])
def test_a_result_of_another_version_or_processor_is_none_of_this_trial(
    fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = trials(seeds=1, plain=Plan())[0].trial_id
    monkeypatch.setattr(sweeps, "fingerprint", lambda: {**fingerprint(), fact: "another"})
    assert trials(seeds=1, plain=Plan())[0].trial_id != before


@pytest.mark.parametrize(
    ("outcome", "spec", "is_done"),
    [
        (OutcomeKind.OK, {}, True),
        (OutcomeKind.OOM, {"cap_bytes": 2**20, "cap_scope": "run"}, True),
        (OutcomeKind.OOM, {}, False),
        (OutcomeKind.TIMEOUT, {}, False),
        (OutcomeKind.FAILED, {}, False),
    ],
)
def test_out_of_memory_is_a_result_under_the_users_cap_only(
    tmp_path: Path, outcome: OutcomeKind, spec: Mapping[str, object], is_done: bool
) -> None:
    store = Store(tmp_path / "store.sqlite3")
    (trial,) = trials(seeds=1, plain=Plan())
    store.append(trial.trial_id, RUN, a_run(trial, outcome, **spec))
    with Sweep([trial], RunSettings(), store) as sweep:
        assert (sweep.left == ()) is is_done


def test_a_used_up_budget_ends_what_runs_and_begins_no_more(tmp_path: Path, program: Program) -> None:
    store = Store(tmp_path / "store.sqlite3")
    program.always = "time.sleep(300)"
    budget = Budget(hours=2.0 / 3600)
    sweep = run(trials(seeds=3, parallel=2), store, budget)
    assert states(sweep) == ["not run"] * 6
    assert len(program.begun) == 2
    assert sweep.hours < budget.hours + 2 * 12.0 / 3600  # at most the grace of what ran; no trial of 300 s
    assert files_left(store) == ["store.sqlite3"]


def test_a_trial_for_which_the_budget_is_not_expected_to_suffice_is_not_begun(
    tmp_path: Path, program: Program
) -> None:
    store = Store(tmp_path / "store.sqlite3")
    program.always = "time.sleep(2)"
    sweep = run(trials(seeds=4, parallel=1, plain=Plan()), store, Budget(hours=3.5 / 3600))
    assert states(sweep) == ["done", "not run", "not run", "not run"]
    assert sweep.hours < 3.5 / 3600
    assert sweep.results[1].reason == "the budget does not suffice"


def test_money_is_kept_like_hours_at_the_price_of_the_executor(tmp_path: Path, program: Program) -> None:
    store = Store(tmp_path / "store.sqlite3")
    program.always = "time.sleep(2)"
    placement = Placement(executor="local", settings={"usd_per_hour": "3600"})
    each = make_trials(JOB, {"plain": Plan()}, [placement], RunSettings(), seeds=3)
    sweep = run(each, store, Budget(usd=3.5))
    assert states(sweep) == ["done", "not run", "not run"]
    assert sweep.usd == pytest.approx(sweep.hours * 3600)
    assert sweep.usd < 3.5


def test_ctrl_c_leaves_no_folder_and_keeps_what_has_ended(tmp_path: Path, program: Program) -> None:
    store = Store(tmp_path / "store.sqlite3")
    program.code[("split", 0)] = "time.sleep(300)"

    def interrupt(sweep: Sweep) -> None:
        if {"done", "running"} <= set(states(sweep)):
            raise KeyboardInterrupt

    all_trials = trials(seeds=1)
    with pytest.raises(KeyboardInterrupt), Sweep(all_trials, RunSettings(), store) as sweep:
        sweep.run(Budget(hours=1.0), interrupt)
    assert states(sweep) == ["done", "not run"]
    assert len(store.records(kind=RUN)) == 1
    assert files_left(store) == ["store.sqlite3"]


def test_the_record_that_a_killed_sweep_left_is_stored_by_the_next_one(
    tmp_path: Path, program: Program
) -> None:
    store = Store(tmp_path / "store.sqlite3")
    (trial,) = trials(seeds=1, plain=Plan())
    folder = tmp_path / SWEEPS / "killed" / trial.trial_id
    folder.mkdir(parents=True)
    owner = folder.parent / "owner"
    owner.touch()
    os.utime(owner, (0, 0))
    note = {"executor": "local", "settings": {}, "job_id": "1"}
    (folder / "job.json").write_text(json.dumps(note))
    (folder / "record.json").write_text(run_record_text(record_of(a_run(trial), trial.trial_id)))
    sweep = run((trial,), store)
    assert (states(sweep), sweep.results[0].before, program.begun) == (["done"], True, [])
    assert files_left(store) == ["store.sqlite3"]


def test_two_sweeps_at_once_run_a_common_trial_once(tmp_path: Path, program: Program) -> None:
    path = tmp_path / "store.sqlite3"
    program.always = "time.sleep(0.5)"
    sweeps_run: list[Sweep] = []
    threads = [
        threading.Thread(target=lambda: sweeps_run.append(run(trials(parallel=1), Store(path))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [states(sweep) for sweep in sweeps_run] == [["done"] * 4] * 2
    assert sorted(program.begun) == [("plain", 0), ("plain", 1), ("split", 0), ("split", 1)]
    assert sum(result.before for sweep in sweeps_run for result in sweep.results) == 4
    assert files_left(Store(path)) == ["store.sqlite3"]


def test_a_trial_that_ends_without_a_result_in_another_sweep_is_run(tmp_path: Path, program: Program) -> None:
    store = Store(tmp_path / "store.sqlite3")
    (trial,) = trials(seeds=1, plain=Plan())
    other = tmp_path / SWEEPS / "other"
    (other / trial.trial_id).mkdir(parents=True)
    seen: list[tuple[str, int]] = []

    def end_the_other(sweep: Sweep) -> None:
        seen.append((states(sweep)[0], len(program.begun)))
        shutil.rmtree(other, ignore_errors=True)

    with (other / "owner").open("w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        with Sweep([trial], RunSettings(), store) as sweep:
            sweep.run(Budget(hours=1.0), end_the_other)
    assert seen[0] == ("waiting", 0)
    assert (states(sweep), sweep.results[0].before, len(program.begun)) == (["done"], False, 1)


def test_a_run_names_the_accelerator_that_trained_it_not_the_processor() -> None:
    run = a_run(trials()[0])
    elsewhere = {"processor": "a processor", "accelerators": "none seen"}
    assert sweeps.device_of(run, elsewhere) == "a processor"
    by_card = dataclasses.replace(run.measurement, device="A card")
    assert sweeps.device_of(dataclasses.replace(run, measurement=by_card), elsewhere) == "A card"


def test_a_record_of_another_trial_is_refused(tmp_path: Path, program: Program) -> None:
    store = Store(tmp_path / "store.sqlite3")
    original = program.command

    def other(trial: SweepTrial, *rest: object) -> Iterator[str]:
        yield from original(dataclasses.replace(trial, trial_id="trial-other"), *rest)

    sweeps._command = other  # the fixture restores it
    sweep = run(trials(seeds=1, plain=Plan()), store)
    assert states(sweep) == ["failed"]
    assert sweep.results[0].reason == "the trial's record is that of another trial"
    assert store.records(kind=RUN) == ()


def test_a_run_of_a_file_that_changed_after_the_sweep_began_is_refused(
    tmp_path: Path, program: Program
) -> None:
    file = tmp_path / "job.py"
    file.write_text(
        "from memfit.jobs.registry import load\nfrom memfit.types.job import JobRef\n\n"
        "def make():\n    return load(JobRef(spec='char-lm'))\n"
    )
    placement = Placement(executor="local", settings={"parallel": "1"})
    job, store = JobRef(spec=f"{file}:make", steps=1), Store(tmp_path / "store.sqlite3")
    all_trials = make_trials(job, {"plain": Plan()}, [placement], RunSettings(), seeds=1)
    file.write_text(file.read_text() + "# changed\n")
    now = source_digest(job.spec)  # what the trial's run reads, and reports

    def reading(trial: SweepTrial, threads: int, settings: RunSettings, folder: Path) -> Iterator[str]:
        record = record_of(a_run(trial, source_digest=now), trial.trial_id)
        (folder / "text").write_text(run_record_text(record), encoding="utf-8")
        yield from (sys.executable, "-I", "-S", "-c")
        yield f"import os; os.rename({str(folder / 'text')!r}, {str(folder / 'record.json')!r})"

    sweeps._command = reading  # the fixture restores it
    sweep = run(all_trials, store)
    assert states(sweep) == ["failed"]
    assert "changed before this run of it began" in sweep.results[0].reason
    assert store.records(kind=RUN) == ()


def test_eight_that_feed_one_store_at_once_lose_nothing_and_add_nothing_twice(tmp_path: Path) -> None:
    from memfit.store.exchange.run_record import add_run

    path = tmp_path / "store.sqlite3"
    texts = [
        run_record_text(record_of(a_run(trial), trial.trial_id)) for trial in trials(seeds=5, plain=Plan())
    ]
    added: list[bool] = []

    def feed() -> None:
        store = Store(path)
        added.extend(add_run(store, parse_run_record(text, what="record")) for text in texts)

    threads = [threading.Thread(target=feed) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(added), sum(added)) == (40, 5)
    assert len(Store(path).records(kind=RUN)) == 5


def test_the_same_plan_twice_and_two_executors_of_one_kind_are_refused() -> None:
    with pytest.raises(UserError, match="a and b are the same plan"):
        trials(a=Plan(), b=Plan())
    twice = [Placement(executor="local", settings={"parallel": n}) for n in "12"]
    with pytest.raises(UserError, match="two executors are local"):
        make_trials(JOB, PLANS, twice, RunSettings(), seeds=1)


# --- the runs of a proof of concept


def poc_runner(store: Store) -> proof_of_concept._PocRunner:
    """A proof of concept whose plans are predicted, with none of its runs made."""
    planning = Mock(spec=Planning)
    planning.request = Request(job_ref=JOB, machine=this_machine("world"))
    planning.predictor = Mock(whole=lambda plan: report_fixture.estimate(plan, report_fixture.PEAKS[plan]))
    return proof_of_concept._PocRunner(
        planning=planning, store=store, seeds=1, steps=40, command="", progress=lambda *_: None
    )


def reported(made: Sequence[Run], *, lost: str = "") -> Command:
    """The command of a trial that writes the run of ``made`` with its name and cap; ``lost`` is the name
    of a run of which nothing is reported."""

    def command(trial: SweepTrial, threads: int, settings: RunSettings, folder: Path) -> Iterator[str]:
        assert trial.prepared is not None
        spec = trial.prepared.spec
        found = next(r for r in made if (r.spec.name, r.spec.cap_bytes) == (spec.name, spec.cap_bytes))
        run = dataclasses.replace(found, spec=spec)
        (folder / "text").write_text(run_record_text(record_of(run, trial.trial_id)), encoding="utf-8")
        end = "os.kill(os.getpid(), 9)" if spec.name == lost else ""
        yield from (sys.executable, "-I", "-S", "-c")
        yield f"import os\n{end}\nos.rename({str(folder / 'text')!r}, {str(folder / 'record.json')!r})"

    return command


def test_an_executor_makes_the_runs_of_a_proof_of_concept_in_their_order_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [r for r in report_fixture.runs() if r.spec.seed == 0][:4]
    begun = report_fixture.minimal_poc()
    agreed: list[int] = []

    def agree(trials: Sequence[SweepTrial]) -> Budget:
        agreed.append(len(trials))
        return Budget(hours=1.0)

    placement = Placement(executor="local", settings={"parallel": "4"})
    side_by_side = SideBySide(placement=placement, agree=agree)
    store = Store(tmp_path / "store.sqlite3")
    specs = [run.spec for run in made]
    monkeypatch.setattr(sweeps, "_command", reported(made, lost=specs[-1].name))
    first = poc_runner(store).add_runs(begun, specs, side_by_side)
    assert [run.measurement for run in first.runs[:-1]] == [run.measurement for run in made[:-1]]
    assert first.runs[-1].measurement.reason == "killed by SIGKILL"
    note = "Runs were made side by side, which may have changed their step times."
    assert note in first.notes
    assert "並行して" in load_words("ja").of(note)
    monkeypatch.setattr(sweeps, "_command", reported(made))
    second = poc_runner(store).add_runs(begun, specs, side_by_side)
    assert [run.measurement for run in second.runs] == [run.measurement for run in made]
    assert agreed == [len(made), 1]
    assert len(store.records(begun.poc_id, RUN)) == len(made) - 1 + len(made)


def test_a_proof_of_concept_whose_budget_is_used_up_says_how_far_it_got(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [r for r in report_fixture.runs() if r.spec.seed == 0][:2]
    monkeypatch.setattr(sweeps, "_command", Program(always="time.sleep(300)").command)
    side_by_side = SideBySide(
        placement=Placement(executor="local", settings={}), agree=lambda trials: Budget(hours=1.0 / 3600)
    )
    with pytest.raises(RunError, match="the budget sufficed for 0 of 2 runs; the same command"):
        poc_runner(Store(tmp_path / "s.sqlite3")).add_runs(
            report_fixture.minimal_poc(), [run.spec for run in made], side_by_side
        )


# --- the command


@pytest.mark.long
def test_a_sweep_of_real_runs_on_the_command_line(tmp_path: Path) -> None:
    """A run of one step, and one that runs out of memory under the cap."""
    from memfit.cli import main

    arguments = ["sweep", "char-lm", "plain", "--steps", "1", "--budget", "1h", "--json", "--on", "this:cpu"]
    where = ["--store", str(tmp_path / "store.sqlite3")]
    assert main([*arguments, *where]) == 0
    assert main([*arguments, *where, "--memory", "2MiB"]) == 0
    outcomes = [
        json.loads(r.body)["measurement"]["outcome"] for r in Store(tmp_path / "store.sqlite3").records()
    ]
    assert outcomes == ["ok", "oom"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store.sqlite3"]


def test_a_budget_in_dollars_that_is_entered_needs_prices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    from memfit.cli import sweep as command

    monkeypatch.setattr(command, "_need_text", lambda trials, settings: "4 trials to run")
    monkeypatch.setattr(sys, "stdin", Mock(isatty=lambda: True))
    monkeypatch.setattr(sys, "stderr", Mock(isatty=lambda: True))
    monkeypatch.setattr(typer, "prompt", lambda text, err: "20USD")
    with pytest.raises(UserError, match="the price of local is unknown"):
        command.agreed_budget(Budget(), trials(), RunSettings(), may_ask=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "3"], "--budget 3"),
        (["--budget", "1h", "--budget", "2h"], "twice as a time"),
        (["--budget", "0usd"], "--budget 0usd"),
        (["--budget", "5USD"], "the price of local is unknown"),
        (["missing.yaml", "--budget", "1h"], "cannot read missing.yaml"),
        (["--budget", "1h", "--on", "H100-SXM"], "--executor says which machine trains"),
        (["--budget", "1h", "--size", "tiny", "--sizes", "tiny"], "exclude each other"),
        (["--budget", "1h", "--sizes", "gigantic"], "gigantic"),
        (["--budget", "1h", "--sizes", ","], "names no size"),
        (["--budget", "1h", "--engine", "replay"], "trains nothing"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from memfit.cli import main

    store = tmp_path / "store.sqlite3"
    plans = ["plain"] if not words[0].endswith(".yaml") else []
    assert main(["sweep", "char-lm", *plans, *words, "--steps", "1", "--store", str(store)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / SWEEPS).exists()


def test_without_a_terminal_a_missing_budget_is_an_error_that_says_what_is_needed(
    tmp_path: Path, program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    from memfit.cli import main

    where = ["--store", str(tmp_path / "s.sqlite3"), "--executor", "local:device=H100-SXM"]
    code = main(["sweep", "char-lm", "--steps", "1", *where])
    error = capsys.readouterr().err
    assert code == 2
    assert "--budget is missing: 1 trial to run; their training steps are predicted to take" in error
    assert program.begun == []
