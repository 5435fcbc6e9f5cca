"""Run many trials side by side: plans x seeds x sizes x kinds of devices, within a budget. What is in the
store already is not run again, and what another sweep with the same store runs is waited for."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import enum
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from memfit import catalog
from memfit.cost.money import S_PER_HOUR
from memfit.engines.registry import supporting_engine
from memfit.files.read import read_json
from memfit.files.replace import must_be_writable, write_whole
from memfit.files.temporary import remove_abandoned
from memfit.jobs.registry import load
from memfit.jobs.user_job import source_digest
from memfit.launch.executors import executor_kind, make_executor
from memfit.launch.executors.base import (
    OWNER,
    RECORD,
    Executor,
    Task,
    TaskState,
    deferring_signals,
    ignoring_ctrl_c,
)
from memfit.planner.request import Progress, Request
from memfit.runtime import local_machine
from memfit.runtime.local_machine import this_machine
from memfit.store.database import Store
from memfit.store.environment import fingerprint
from memfit.store.exchange.run_record import RUN, RunRecord, add_run, parse_run_record
from memfit.techniques.plan_file import plan_text
from memfit.types import serialization
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.machine import Machine
from memfit.types.plan import Plan
from memfit.types.result import Estimate, OutcomeKind, PreparedRun, Run
from memfit.workflows.single_run import explain

SWEEPS: Final = "sweeps"  # folder beside the store, while a sweep runs
PLAN: Final = "plan.yaml"
SPEC: Final = "spec.json"
_TRIAL: Final = "trial-"  # start of trial IDs
_YOUNG_S: Final = 5.0
_POLL_S: Final = 1.0  # between two looks at trials that another sweep runs
JOB: Final = "job.json"  # in a trial's folder: which job of which executor runs it


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where trials run: an executor's name and settings."""

    executor: str
    settings: Mapping[str, str]

    @property
    def kind(self) -> str:
        """The executor and what decides on the kind of device, such as "slurm:partition=a100"."""
        return executor_kind(self.executor, self.settings)

    def machine(self, on: str = "this") -> Machine | None:
        """Return the machine with the devices on which trials run: that of the setting "device", or for local
        trials this one, whose devices ``on`` chooses; None if it is not known. Raises UserError for a device
        that is not in the catalog."""
        if (name := self.settings.get("device")) is not None:
            return catalog.machine(name, "world")
        return this_machine("world", on.partition(":")[2]) if self.executor == "local" else None

    def usd_per_hour(self) -> float | None:
        """Return the price of one device for an hour; None if it is not known. Raises UserError as `machine`
        does."""
        if "usd_per_hour" in self.settings:
            return float(self.settings["usd_per_hour"])
        machine = self.machine()
        price = None if machine is None else machine.device.usd_per_hour
        return None if price is None else price.value


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What is the same for all trials. ``cap_bytes``: memory cap, None: none. ``timeout``, ``on``: as on the
    command line of ``memfit run``; "": its default. ``threads``: of each process; 0: the default of ``memfit
    run``."""

    engine: str = "native"
    cap_bytes: int | None = None
    threads: int = 0
    timeout: str = ""
    on: str = "this"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SweepTrial:
    """One run of one plan. ``plan_name``: what users call the plan. ``trial_id``: a digest of all that
    decides on the result: equal trials have equal ones. ``source_digest``: that of the job's file, of which
    ``trial_id`` is (`jobs.user_job.source_digest`). ``prepared``: exactly what is run, with its
    prediction; None: what ``memfit run`` makes of the job, plan and seed."""

    trial_id: str
    source_digest: str
    job: JobRef
    plan: Plan
    plan_name: str
    seed: int
    placement: Placement
    prepared: PreparedRun | None = None


class TrialState(enum.StrEnum):
    """The state of a trial. WAITING: it has not begun yet. DONE: it completed, or it ran out of memory under
    the cap that the user gave. FAILED: it ended otherwise, and the next sweep runs it again. NOT_RUN: because
    of the budget or Ctrl-C, it did not begin, or was ended without a record."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    NOT_RUN = "not run"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """The state of a trial and what is known of it. ``reason``: why it is not DONE, or the reason of its run;
    "" if there is none. ``run``: None until it has reported one. ``before``: whether its result is from
    another sweep. ``device``: the name of the GPU or processor. ``run_s``: seconds in this sweep over all
    ``starts``; a scheduler may start a trial again."""

    trial: SweepTrial
    state: TrialState
    reason: str = ""
    run: Run | None = None
    device: str = ""
    before: bool = False
    run_s: float = 0.0
    starts: int = 0

    @property
    def device_hours(self) -> float:
        return self.run_s * self.trial.plan.ranks / S_PER_HOUR


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The most that one sweep may use: device hours and US dollars; None: no limit. A device hour is one
    device (on a processor: one process) for one hour, from the start of a trial to its end."""

    hours: float | None = None
    usd: float | None = None

    def minus(self, hours: float, usd: float) -> Budget:
        """Return what is left of the budget, at least 0 of each kind, after this much was used."""
        return Budget(
            hours=None if self.hours is None else max(0.0, self.hours - hours),
            usd=None if self.usd is None else max(0.0, self.usd - usd),
        )

    def suffices(self, hours: float, usd: float) -> bool:
        return (self.hours is None or hours <= self.hours) and (self.usd is None or usd <= self.usd)


def make_trials(
    job: JobRef,
    plans: Mapping[str, Plan],
    placements: Sequence[Placement],
    settings: RunSettings,
    *,
    seeds: int,
    sizes: Sequence[str] = (),
) -> tuple[SweepTrial, ...]:
    """Return all trials: sizes (none: the job's own) x placements x seeds 0, 1, ... x plans (name -> plan).
    Raises UserError if the job cannot be loaded at a size, if the engine does not support a plan, if two
    placements are of the same kind, and if two trials are the same."""
    for plan in plans.values():
        supporting_engine(settings.engine, plan)
    kinds = [placement.kind for placement in placements]
    if (same_kind := next((kind for kind in kinds if kinds.count(kind) > 1), None)) is not None:
        raise UserError(
            f"two executors are {same_kind}, so their trials are the same",
            allowed="executors that differ in name, or in a setting that chooses the kind of device",
        )
    refs = [dataclasses.replace(job, size=size) for size in sizes] or [job]
    for ref in refs:
        load(ref)
    source = source_digest(job.spec)
    places = {placement.kind: _place_facts(placement, settings.on) for placement in placements}
    trials = tuple(
        SweepTrial(
            trial_id=_trial_id(ref, source, plan, seed, places[placement.kind], settings),
            source_digest=source,
            job=ref,
            plan=plan,
            plan_name=name,
            seed=seed,
            placement=placement,
        )
        for ref in refs
        for placement in placements
        for seed in range(seeds)
        for name, plan in plans.items()
    )
    by_id: dict[str, SweepTrial] = {}
    for trial in trials:
        if (same := by_id.setdefault(trial.trial_id, trial)) is not trial:
            raise UserError(
                f"{same.plan_name} and {trial.plan_name} are the same plan of the same job and size",
                allowed="each plan and each size once",
            )
    return trials


def prepared_trial(prepared: PreparedRun, placement: Placement) -> SweepTrial:
    """Return the trial that makes exactly the run ``prepared``, with its name, where ``placement`` says. The
    run gets the digest of the job's file as it is now."""
    source = source_digest(prepared.spec.job.spec)
    prepared = dataclasses.replace(prepared, spec=dataclasses.replace(prepared.spec, source_digest=source))
    spec = prepared.spec
    return SweepTrial(
        trial_id=_digest(
            _place_facts(placement, f"this:{spec.device}"), {"spec": serialization.to_plain(spec)}
        ),
        source_digest=source,
        job=spec.job,
        plan=spec.plan,
        plan_name=spec.name,
        seed=spec.seed,
        placement=placement,
        prepared=prepared,
    )


def _trial_id(
    job: JobRef, source: str, plan: Plan, seed: int, place: Mapping[str, str], settings: RunSettings
) -> str:
    facts = {
        "job": serialization.to_plain(job),
        "source": source,
        "plan": plan.to_dict(),
        "ranks": plan.ranks,
        "seed": seed,
        "engine": settings.engine,
        "cap_bytes": settings.cap_bytes,
        "threads": settings.threads,
        "on": settings.on,
    }
    return _digest(place, facts)


def _place_facts(placement: Placement, on: str) -> Mapping[str, str]:
    """Return what of the place decides on a result: its kind, the versions of what trains, and for local
    trials the name of the device that ``on`` chooses."""
    environment = fingerprint()
    facts = {name: environment[name] for name in ("memfit", "torch")} | {"kind": placement.kind}
    if placement.executor != "local":
        return facts
    device = this_machine("world", on.partition(":")[2]).device
    return facts | {"device": environment["processor"] if device.is_host else device.name}


def _digest(place: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    text = json.dumps({**facts, **place}, sort_keys=True)
    return f"{_TRIAL}{hashlib.sha256(text.encode()).hexdigest()[:20]}"


_Group = tuple[str, str | None, str]
"""The trials of one plan, size and place, which differ only in their seeds."""


def _group(trial: SweepTrial) -> _Group:
    return trial.plan_name, trial.job.size, trial.placement.kind


def predicted_hours(trials: Sequence[SweepTrial], settings: RunSettings, progress: Progress) -> float | None:
    """Return the predicted device hours of the training steps of all trials together. What a trial does
    before its first step is not included. None: a device is not known, or a step time cannot be predicted.
    Raises UserError if a plan cannot be predicted (`single_run.explain`)."""
    estimates: dict[_Group, Estimate] = {}
    hours = 0.0
    for trial in trials:
        if trial.prepared is not None:
            estimate, steps = trial.prepared.estimate, trial.prepared.spec.steps
        else:
            machine = trial.placement.machine(settings.on)
            if machine is None:
                return None
            if (group := _group(trial)) not in estimates:
                request = Request(
                    job_ref=trial.job, machine=machine, engine=settings.engine, threads=settings.threads
                )
                estimates[group] = explain(request, trial.plan, progress)
            estimate, steps = estimates[group], trial.job.steps or load(trial.job).steps
        if estimate.step_s is None:
            return None
        hours += estimate.step_s.value * steps * trial.plan.ranks / S_PER_HOUR
    return hours


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    trial: SweepTrial
    task: Task
    executor: Executor
    job_id: str


class Sweep:
    """Trials, and the state of each. In its ``with`` block, `run` runs those that have no result yet; at the
    end of the block, whatever ends it, no process, job or folder of the sweep is left. To enter it raises
    UserError if an executor cannot be used here, or if the store or its folder cannot be written."""

    def __init__(self, trials: Sequence[SweepTrial], settings: RunSettings, store: Store) -> None:
        self._trials, self._settings, self._store = trials, settings, store
        self._results = {
            trial.trial_id: TrialResult(trial=trial, state=TrialState.WAITING) for trial in trials
        }
        self._running: dict[str, _Running] = {}
        self._ended_hours: dict[_Group, list[float]] = {}
        self._placements = {trial.placement.kind: trial.placement for trial in trials}
        self._prices = {kind: placement.usd_per_hour() for kind, placement in self._placements.items()}
        self._executors: dict[str, Executor] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            parent = self._store.path.absolute().parent / SWEEPS
            must_be_writable(parent, "the folder of the sweep")
            stack.callback(_remove_empty, parent)
            self._folder = stack.enter_context(_owned_folder(parent))
            for kind, placement in self._placements.items():
                self._executors[kind] = self._executor(placement, self._folder)
            for folder in sorted(parent.iterdir()):
                self._adopt(folder, stack)
            self._stack = stack.pop_all()
        self._find_done(self._trials)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ignoring_ctrl_c(), self._stack:
            self._cancel(list(self._running.values()), "cancelled")
        if self._results:
            remove_abandoned()  # temporary folders of trials that were killed

    @property
    def results(self) -> tuple[TrialResult, ...]:
        """The state of each trial, in the order of the trials."""
        return tuple(self._results[trial.trial_id] for trial in self._trials)

    @property
    def left(self) -> tuple[SweepTrial, ...]:
        """The trials that have no result yet."""
        return tuple(result.trial for result in self.results if result.state is not TrialState.DONE)

    @property
    def hours(self) -> float:
        """The device hours that this sweep has used so far."""
        return sum(result.device_hours for result in self._results.values())

    @property
    def usd(self) -> float | None:
        """US dollars that `hours` cost; None: a price is unknown."""
        if None in self._prices.values():
            return None
        return sum(
            result.device_hours * (self._prices[result.trial.placement.kind] or 0.0)
            for result in self._results.values()
        )

    @property
    def is_parallel(self) -> bool:
        """Whether an executor may run several of the trials at a time."""
        return any(executor.slots != 1 for executor in self._executors.values())

    def run(self, budget: Budget, show: Callable[[Sweep], None] = lambda sweep: None) -> None:
        """Run the trials that have no result yet, and store the record of each as soon as it ends. Trials
        that another sweep with the same store runs are waited for, and run here if they end without a result.
        ``show`` is called often. When the budget is used up, running trials are ended and no more are begun.
        Raises UserError if a scheduler refuses trials, or if the store cannot be used."""
        waiting = deque(trial for trial in self.left if trial.trial_id not in self._running)
        while waiting or self._running:
            runs_elsewhere = self._submit(waiting, budget)
            show(self)
            if not self._running and not runs_elsewhere:
                break
            time.sleep(min((each.executor.poll_s for each in self._running.values()), default=_POLL_S))
            for running in list(self._running.values()):
                self._look_at(running)
            if self._is_used_up(budget):
                self._cancel(list(self._running.values()), "ended, as the budget was used up")
        for trial in self.left:
            if self._results[trial.trial_id].state is TrialState.WAITING:
                self._set(trial, state=TrialState.NOT_RUN, reason="the budget does not suffice")
        show(self)

    def _find_done(self, trials: Sequence[SweepTrial]) -> None:
        """Mark those of the trials that have a result in the store."""
        for trial in trials:
            for row in self._store.records(trial.trial_id, RUN):
                run = serialization.loads(Run, row.body, what=f"record {row.record_id}")
                if _is_result(run):
                    device = device_of(run, self._store.environment(row.environment))
                    self._set(trial, state=TrialState.DONE, run=run, device=device, before=True)

    def _submit(self, waiting: deque[SweepTrial], budget: Budget) -> bool:
        """Submit as many trials as their executors take and as the budget is expected to suffice for. Return
        whether some were not submitted only because another sweep runs them."""
        chosen: dict[str, list[SweepTrial]] = {}
        hours, usd = self._expected_use()
        runs_elsewhere = False
        for _ in range(0 if self._is_used_up(budget) else len(waiting)):
            trial = waiting.popleft()
            kind = trial.placement.kind
            more_hours = self._expected_hours(trial)
            more_usd = more_hours * (self._prices[kind] or 0.0)
            if self._has_slot(kind, len(chosen.get(kind, ()))) and budget.suffices(
                hours + more_hours, usd + more_usd
            ):
                if self._claim(trial):
                    chosen.setdefault(kind, []).append(trial)
                    hours, usd = hours + more_hours, usd + more_usd
                elif self._results[trial.trial_id].state is not TrialState.DONE:
                    runs_elsewhere = True
                    waiting.append(trial)
            else:
                waiting.append(trial)
        for kind, trials in chosen.items():
            self._start(self._executors[kind], trials)
        return runs_elsewhere

    def _claim(self, trial: SweepTrial) -> bool:
        """Make the folder of the trial and return True. Return False if another sweep runs the trial, or has
        run it; in the latter case, mark the trial as done."""
        with self._store.locked():
            folders = [f.parent for f in self._folder.parent.glob(f"*/{trial.trial_id}")]
            if any(_lives(folder) for folder in folders):
                return False
            self._find_done([trial])  # a sweep removes the folder of a trial when it has stored its result
            if self._results[trial.trial_id].state is TrialState.DONE:
                return False
            (self._folder / trial.trial_id).mkdir()
        return True

    def _has_slot(self, kind: str, chosen_count: int) -> bool:
        slots = self._executors[kind].slots
        busy = sum(each.trial.placement.kind == kind for each in self._running.values())
        return slots is None or busy + chosen_count < slots

    def _start(self, executor: Executor, trials: Sequence[SweepTrial]) -> None:
        tasks = [self._task(trial) for trial in trials]
        with deferring_signals():  # what is submitted is also noted, so that it can be cancelled
            for trial, task, job_id in zip(trials, tasks, executor.submit(tasks), strict=True):
                placement = trial.placement
                note = {"executor": placement.executor, "settings": placement.settings, "job_id": job_id}
                write_whole(task.folder / JOB, json.dumps(note).encode(), durable=False)
                self._running[trial.trial_id] = _Running(
                    trial=trial, task=task, executor=executor, job_id=job_id
                )

    def _task(self, trial: SweepTrial) -> Task:
        """Fill the folder of a trial (`_claim`), and return the task that runs it."""
        folder = self._folder / trial.trial_id
        if trial.prepared is None:
            (folder / PLAN).write_text(plan_text(trial.plan), encoding="utf-8")
        else:
            (folder / SPEC).write_text(serialization.dumps(trial.prepared), encoding="utf-8")
        return Task(
            name=trial.trial_id,
            argv=tuple(_command(trial, self._threads(trial), self._settings, folder)),
            folder=folder,
            working_folder=Path.cwd(),
            device_count=trial.plan.ranks,
        )

    def _threads(self, trial: SweepTrial) -> int:
        """Return the number of threads of each process of the trial; 0: the default of ``memfit run``.
        Without a number in the settings, trials that run side by side share the threads of this machine."""
        slots = self._executors[trial.placement.kind].slots or 1
        if self._settings.threads or slots == 1:
            return self._settings.threads
        return max(1, local_machine.threads() // (slots * trial.plan.ranks))

    def _look_at(self, running: _Running) -> None:
        status = running.executor.status(running.task, running.job_id)
        begun = status.state is not TaskState.WAITING
        self._set(
            running.trial,
            state=TrialState.RUNNING if begun else TrialState.WAITING,
            run_s=status.run_s,
            starts=status.starts,
        )
        if status.state is TaskState.ENDED:
            self._finish(running, status.reason)

    def _finish(self, running: _Running, reason: str) -> None:
        """Store the record of a trial that has ended, if it wrote one, and remove its folder."""
        trial, text = running.trial, running.executor.fetch(running.task)
        hours = self._results[trial.trial_id].device_hours
        self._ended_hours.setdefault(_group(trial), []).append(hours)
        if text is None:
            reason = reason or "it ended without a record"
            self._set(trial, state=TrialState.FAILED, reason=reason)
        else:
            try:
                record = _parse_record(trial, text)
                add_run(self._store, record)
                self._set_run(trial, record)
            except UserError as error:
                self._set(trial, state=TrialState.FAILED, reason=str(error))
        self._drop(running)

    def _set_run(self, trial: SweepTrial, record: RunRecord) -> None:
        run = record.run
        self._set(
            trial,
            state=TrialState.DONE if _is_result(run) else TrialState.FAILED,
            reason=run.measurement.reason,
            run=run,
            device=device_of(run, record.environment),
        )

    def _cancel(self, running: Sequence[_Running], reason: str) -> None:
        """End these trials. What one has written until then is kept; the others have ``reason``."""
        by_executor: dict[int, list[_Running]] = {}
        for each in running:
            by_executor.setdefault(id(each.executor), []).append(each)
        for members in by_executor.values():
            members[0].executor.cancel({each.job_id: each.task for each in members})
        for each in running:
            status = each.executor.status(each.task, each.job_id)
            self._set(each.trial, run_s=status.run_s, starts=status.starts)
            self._finish(each, "")
            if self._results[each.trial.trial_id].run is None:
                self._set(each.trial, state=TrialState.NOT_RUN, reason=reason)

    def _drop(self, running: _Running) -> None:
        del self._running[running.trial.trial_id]
        running.executor.forget(running.task, running.job_id)
        shutil.rmtree(running.task.folder, ignore_errors=True)

    def _set(self, trial: SweepTrial, **changes: Any) -> None:
        self._results[trial.trial_id] = dataclasses.replace(self._results[trial.trial_id], **changes)

    def _is_used_up(self, budget: Budget) -> bool:
        return (budget.hours is not None and self.hours >= budget.hours) or (
            budget.usd is not None and (self.usd or 0.0) >= budget.usd
        )

    def _expected_use(self) -> tuple[float, float]:
        """Return (device hours, US dollars) that this sweep has used and that its running trials are expected
        to use yet."""
        hours, usd = self.hours, self.usd or 0.0
        for each in self._running.values():
            left = max(
                0.0, self._expected_hours(each.trial) - self._results[each.trial.trial_id].device_hours
            )
            hours, usd = hours + left, usd + left * (self._prices[each.trial.placement.kind] or 0.0)
        return hours, usd

    def _expected_hours(self, trial: SweepTrial) -> float:
        """Return the device hours that a trial is expected to use: the mean of those of its plan, size and
        place that have ended in this sweep; without such, the mean of all that have; 0 if none has."""
        alike = self._ended_hours.get(_group(trial)) or [h for g in self._ended_hours.values() for h in g]
        return statistics.fmean(alike) if alike else 0.0

    def _executor(self, placement: Placement, folder: Path) -> Executor:
        own = folder / "executors" / hashlib.sha256(placement.kind.encode()).hexdigest()[:8]
        ranks = max((t.plan.ranks for t in self._trials if t.placement.kind == placement.kind), default=1)
        return make_executor(placement.executor, placement.settings, own, device_count=ranks)

    def _adopt(self, folder: Path, stack: contextlib.ExitStack) -> None:
        """Take over the folder of a sweep that was killed, if it is one: store the records that are there,
        and go on with its trials that still run and are also trials of this sweep. The folder is removed at
        the end unless other trials still run."""
        lock = _lock(folder)
        if lock is None:
            return
        stack.callback(lock.close)
        running = {note.parent for note in sorted(folder.glob(f"*/{JOB}")) if self._goes_on(note)}
        if not running:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        kept = running | {each.task.folder for each in self._running.values()}
        for ended in set(folder.glob(f"{_TRIAL}*")) - kept:  # other sweeps would wait for them
            shutil.rmtree(ended, ignore_errors=True)

    def _goes_on(self, note: Path) -> bool:
        """Take over a trial of a killed sweep. Return True only if it still runs and is no trial of this
        sweep: then its folder must stay.

        If it has ended, its record is stored, if there is one. If it still runs and is a trial of this sweep,
        it becomes one of this sweep's running trials. If its files cannot be read, or its executor cannot be
        used here, nothing happens. ``note``: file JOB in the trial's folder."""
        trial_id = note.parent.name
        task = Task(name=trial_id, argv=(), folder=note.parent, working_folder=Path.cwd())
        try:
            job = read_json(note)
            placement = Placement(executor=str(job["executor"]), settings=dict(job["settings"]))
            executor = self._executor(placement, note.parent.parent)
            if executor.survives and executor.status(task, job["job_id"]).state is not TaskState.ENDED:
                if trial_id not in self._results:
                    return True
                trial = self._results[trial_id].trial
                self._running[trial_id] = _Running(
                    trial=trial, task=task, executor=executor, job_id=job["job_id"]
                )
            elif (text := executor.fetch(task)) is not None:
                add_run(self._store, parse_run_record(text, what=trial_id))
        except (UserError, KeyError, TypeError, ValueError, ImportError):
            return False  # nothing of it can be read
        return False


def _command(trial: SweepTrial, threads: int, settings: RunSettings, folder: Path) -> Iterator[str]:
    """Yield the words of the command that runs the trial."""
    job = trial.job
    yield from (sys.executable, "-P", "-m", "memfit", "run", "--json")
    if trial.prepared is not None:
        yield from ("--spec", str(folder / SPEC))
        yield from ("--record", str(folder / RECORD), "--label", trial.trial_id)
        return
    yield from (job.spec, "--plan", str(folder / PLAN), "--seed", str(trial.seed))
    yield from ("--record", str(folder / RECORD), "--label", trial.trial_id)
    options = {name: getattr(job, name) for name in ("size", "data", "weights", "steps", "batch", "length")}
    options |= {"engine": settings.engine, "on": settings.on, "timeout": settings.timeout}
    options |= {"memory": f"{settings.cap_bytes}B" if settings.cap_bytes else None}
    options |= {"threads": threads}
    for name, value in options.items():
        if value not in (None, "", 0):
            yield from (f"--{name}", str(value))
    for name, size in job.dimensions.items():
        yield from ("--dim", f"{name}={size}")


def _is_result(run: Run) -> bool:
    """Return whether the run would end in the same way again: it completed, or it ran out of memory under the
    cap that the user gave."""
    outcome, spec = run.measurement.outcome, run.spec
    return outcome is OutcomeKind.OK or (
        outcome is OutcomeKind.OOM and spec.cap_bytes is not None and spec.cap_scope != "bound"
    )


def _parse_record(trial: SweepTrial, text: str) -> RunRecord:
    """Return the record that the trial wrote. Raises UserError if it is not of this trial, or of another
    version of the job's file than the trial."""
    record = parse_run_record(text, what="the trial's record")
    if record.label != trial.trial_id or record.run.spec.seed != trial.seed:
        raise UserError("the trial's record is that of another trial")
    if record.run.spec.source_digest != trial.source_digest:
        raise UserError(
            f"the file of {trial.job.spec} changed before this run of it began",
            hint="give the same command again, without changing the file meanwhile",
        )
    return record


def device_of(run: Run, environment: Mapping[str, str]) -> str:
    """Return the name of the device that trained ``run``: the accelerator's, or without one the processor's
    in ``environment``; "unknown" if that has none."""
    return run.measurement.device or environment.get("processor", "unknown")


# --- folders of sweeps


@contextlib.contextmanager
def _owned_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in ``parent`` whose file OWNER this process keeps locked, and remove it at the
    end."""
    name = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    folder = parent / name
    folder.mkdir(parents=True, mode=0o700)
    with (folder / OWNER).open("w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> IO[str] | None:
    """Lock the file OWNER of a sweep whose process has died and return it. Return None if the process lives,
    if another one has locked the file, and if it is so young that its process may be about to lock it."""
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        owner = stack.enter_context((folder / OWNER).open("r+"))
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(owner.fileno())
        if status.st_nlink and time.time() - status.st_mtime >= _YOUNG_S:
            stack.pop_all()
            return owner
    return None


def _lives(folder: Path) -> bool:
    """Return whether the process of the sweep with this folder lives."""
    if (lock := _lock(folder)) is not None:
        lock.close()
    return lock is None


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
