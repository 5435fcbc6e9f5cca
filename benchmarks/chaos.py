"""Ranks of `memfit run` that are killed and stopped at random: does the run recover, with the same losses?

    python benchmarks/chaos.py [--rounds N] [--minutes M] [--only TEXT] [--kills N] [kills hangs]
    python benchmarks/chaos.py soak [--minutes 30]

The protocol was committed before the first run. This is its second version. In the first, five kills came in
a run that allowed three restarts without a new checkpoint. On a machine with a load of 12, fewer than five
steps fitted between two kills, so that a run of FSDP2 ended by that limit, as it should ("kill, first
version" in the records). Now a run allows ten, and three kills come in it. Seeds are new.

A transformer of two blocks (benchmarks/chaos_job.py) trains
on two gloo ranks, through `workflows.single_run.run_spec`, which `memfit run` calls.

- kills: in a round, each kind of plan and engine in `KINDS` (all kinds of data parallelism, tensor and
  pipeline parallelism, and one plan for each other engine that saves) is trained for 60 steps of at least
  30 ms with a checkpoint every 5 steps. Three times, a random rank gets SIGKILL, each time one of other
  processes than before, as all are started again. Two kills come at a random instant of the 1.5 s after a
  first step: that of the run or that after the last kill. One of the three, at a random place but not the
  first, comes at a random instant of the 4 s after the new processes were started, so mostly before their
  first step. A kill that finds the run ended does not count; the counts say how many there were. Seeds: the
  round's number. A run is recovered if it completes, with as many restarts as kills, each named with the
  killed rank and SIGKILL. Its losses must be those of an undisturbed run of the same kind, which is trained
  once, bit by bit; if they are not, the largest relative difference is recorded. With `--kills 1`, a run has
  one kill, after a first step, so that a run is short; the table has the number of kills.
- hangs: in a round, DDP, FSDP2 and ZeRO 3 in turn are trained for 12 steps of 1 s with a checkpoint every 2
  steps. A random rank gets SIGSTOP at a random instant of the 3 s after the third step. The time until that
  rank alone is named must be below three times the median step before. The run ends ranks that stall for 8 s;
  it must complete with one restart.
- soak: FSDP2 trains for 30 minutes with steps of at least 100 ms, a checkpoint every 50 steps and the three
  newest kept, until SIGTERM. Five faults come in this order, each within 10 % of an interval around the
  minutes 5, 10, 15, 20 and 25: a random rank gets SIGKILL; one gets SIGSTOP (ranks that stall for 20 s are
  ended); a bit of the newest checkpoint is flipped and a rank killed; a rank is killed while it saves; memfit
  itself, which has started the ranks, is stopped for 15 s. The run must end with a complete checkpoint of
  its last step, with four restarts, and each step that is repeated must have the same loss as before, bit by
  bit (of the last 1,000 steps). Resident memory of memfit and of each rank's process is read every 2 s. It is
  flat if, in each process that lived at least 150 s, its median in the last quarter of the time after the
  first 60 s is at most 1 % above that in the first quarter. Seed: 1.

Kinds take turns within a round, so that all have equally many kills if time runs out: `--minutes` ends the
measurement before a run that would begin later. A failure is counted and stays in the record. Times depend
on other work of the machine; the load is in the record.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from memfit.jobs import checkpoints
from memfit.runtime.child_process import Event
from memfit.techniques.registry import make_use
from memfit.types.errors import MemfitError
from memfit.types.job import JobRef
from memfit.types.launch import CheckpointSettings, RunSpec
from memfit.types.plan import Plan
from memfit.types.result import Estimate, Interval, Measurement, OutcomeKind
from memfit.workflows.single_run import measure_spec, run_spec

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "records" / "chaos.jsonl", HERE / "chaos.md"
STEPS, STEP_S, EVERY, KILLS = 60, 0.03, 5, 3
HANG_STEPS, HANG_STEP_S, HANG_EVERY, HANG_LIMIT_S = 12, 1.0, 2, 8.0
AFTER_STEP_S, AFTER_START_S, HANG_AFTER_S = 1.5, 4.0, 3.0
SOAK_STEP_S, SOAK_EVERY, SOAK_STALL_S, STARTER_STOPPED_S, SOAK_SEED = 0.1, 50, 20.0, 15, 1
SAMPLE_S, SETTLE_S, LIVED_S, FLAT_RATIO, RECENT_STEPS = 2.0, 60.0, 150.0, 0.01, 1000
BUCKET = {"reduce_bucket_elements": 10_000}
# name -> engine, techniques
KINDS: Mapping[str, tuple[str, Mapping[str, Mapping[str, object]]]] = {
    "DDP": ("native", {"ddp": {}}),
    "FSDP2": ("native", {"fsdp2": {}}),
    "ZeRO 1": ("native", {"zero": {"stage": 1, **BUCKET}}),
    "ZeRO 2": ("native", {"zero": {"stage": 2, **BUCKET}}),
    "ZeRO 3": ("native", {"zero": {"stage": 3, **BUCKET}}),
    "tensor parallel": ("native", {"tensor-parallel": {"degree": 2}}),
    "pipeline": ("native", {"pipeline": {"stages": 2, "micro_batches": 2}}),
    "Accelerate, FSDP2": ("accelerate", {"fsdp2": {}}),
    "DeepSpeed, ZeRO 3": ("deepspeed", {"zero": {"stage": 3, **BUCKET}}),
    "FairScale, OSS": ("fairscale", {"sharded-ddp": {}}),
}
HANGING = ("DDP", "FSDP2", "ZeRO 3")


def spec_of(kind: str, folder: Path, *, steps: int, step_s: float, every: int) -> RunSpec:
    """Return a run of ``kind`` whose job and checkpoints are in ``folder``, which is created."""
    engine, techniques = KINDS[kind]
    folder.mkdir(parents=True)
    shutil.copy(HERE / "chaos_job.py", folder / "chaos_job.py")
    (folder / "step_s.txt").write_text(str(step_s))
    return RunSpec(
        name=kind,
        role="run",
        job=JobRef(spec=f"{folder / 'chaos_job.py'}:job"),
        plan=Plan(uses=tuple(make_use(n, k) for n, k in techniques.items()), ranks=2),
        engine=engine,
        seed=0,
        steps=steps,
        batch_size=8,
        threads=1,
        evaluate=False,
        keep=CheckpointSettings(save=str(folder / "kept"), every_steps=every, keep_last=2, restarts=10),
    )


def process_of(rank: int) -> int | None:
    """Return the number of the process of ``rank`` among this process's children; None if there is none."""
    for child in psutil.Process().children(recursive=True):
        try:
            if child.environ().get("RANK") == str(rank) and child.status() != psutil.STATUS_ZOMBIE:
                return child.pid
        except psutil.Error:
            continue
    return None


class Disturber:
    """Sends ``number`` to random ranks: one signal for each of ``waits``, that many seconds after ``begin``
    was called with the wait's cause. It knows the ranks that got one, and when."""

    def __init__(self, number: int, waits: list[tuple[str, float]], chance: random.Random) -> None:
        self._number, self._waits, self._chance = number, waits, chance
        self.hits: list[tuple[int, float]] = []
        self._threads: list[threading.Timer] = []
        self._start = self._hit_start = 0  # numbers of the start of processes: the last, and that last hit

    def begin(self, cause: str) -> None:
        self._start += cause == "start"
        if self._waits and self._waits[0][0] == cause:
            self._threads.append(threading.Timer(self._waits.pop(0)[1], self._hit))
            self._threads[-1].start()

    def _hit(self) -> None:
        if self.hits and self._hit_start == self._start:  # these processes already end
            self._waits.insert(0, ("step", self._chance.uniform(0, AFTER_STEP_S)))
            return
        rank = self._chance.randrange(2)
        if (pid := process_of(rank)) is not None:
            self._hit_start = self._start
            self.hits.append((rank, time.monotonic()))
            os.kill(pid, self._number)

    def end(self) -> None:
        for thread in self._threads:
            thread.cancel()
            thread.join()


def train(spec: RunSpec, disturber: Disturber | None = None, *, first_step: int = 0) -> dict[str, Any]:
    """Train, with the causes "start" and "step" for the disturber: processes were started again, and a rank
    has completed its first step after that (before any: step ``first_step``)."""
    named: list[tuple[list[int], float]] = []
    step_times: list[float] = []
    is_waiting = True

    def progress(stage: str, done: int, total: int, text: str) -> None:
        nonlocal is_waiting
        if done > first_step and is_waiting:
            is_waiting = False
            if disturber is not None:
                disturber.begin("step")
        if done:
            step_times.append(time.monotonic())

    def on_notice(event: Event) -> None:
        nonlocal is_waiting
        if event["event"] == "stalled":
            named.append((list(event["ranks"]), time.monotonic()))  # type: ignore[call-overload]
        else:
            is_waiting = True
            if disturber is not None:
                disturber.begin("start")

    none = Interval(value=0.0, low=0.0, high=0.0)
    estimate = Estimate(
        plan=spec.plan,
        allocated_bytes=none,
        phase_peak_bytes={},
        at_peak_bytes={},
        by_module_bytes={},
        step_s=None,
        flops_per_step=0,
        traced=False,
    )
    begun = time.monotonic()
    try:
        measured = run_spec(spec, estimate, progress, spec.name, strict=True, on_notice=on_notice).measurement
    except MemfitError as error:
        measured = Measurement(outcome=OutcomeKind.FAILED, reason=f"raised {error}")
    finally:
        if disturber is not None:
            disturber.end()
    return {
        "measured": measured,
        "took_s": time.monotonic() - begun,
        "named": named,
        "step_times": step_times,
    }


def kill_round(
    kind: str, seed: int, folder: Path, undisturbed: list[float], kills: int = KILLS
) -> dict[str, Any]:
    """Train ``kind`` with ``kills`` kills, and return the row of the record."""
    chance = random.Random(f"{kind} {seed}")
    early = chance.randrange(1, kills) if kills > 1 else -1
    waits = [
        ("start", chance.uniform(0, AFTER_START_S))
        if i == early
        else ("step", chance.uniform(0, AFTER_STEP_S))
        for i in range(kills)
    ]
    disturber = Disturber(signal.SIGKILL, waits, chance)
    spec = spec_of(kind, folder, steps=STEPS, step_s=STEP_S, every=EVERY)
    result = train(spec, disturber)
    measured: Measurement = result["measured"]
    losses = list(measured.losses)
    killed = [rank for rank, _ in disturber.hits]
    named = [r.rank for r in measured.restarts if r.reason == "killed by SIGKILL"]
    return {
        "kind": kind,
        "seed": seed,
        "kills": len(killed),
        "completed": measured.outcome is OutcomeKind.OK,
        "reason": measured.reason.replace(str(folder), "FOLDER"),
        "restarts": len(measured.restarts),
        "causes_named": named == killed,
        "recovered": measured.outcome is OutcomeKind.OK and named == killed,
        "losses_equal": losses == undisturbed,
        "largest_difference": _difference(losses, undisturbed),
        "steps_repeated": sum(r.step - r.first_step for r in measured.restarts),
        "took_s": round(result["took_s"], 1),
    }


def _difference(losses: list[float], expected: list[float]) -> float | None:
    if len(losses) != len(expected):
        return None
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


def hang_round(kind: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train ``kind`` with a rank that stops, and return the row of the record."""
    chance = random.Random(f"hang {kind} {seed}")
    disturber = Disturber(signal.SIGSTOP, [("step", chance.uniform(0, HANG_AFTER_S))], chance)
    spec = spec_of(kind, folder, steps=HANG_STEPS, step_s=HANG_STEP_S, every=HANG_EVERY)
    result = train(dataclasses.replace(spec, stall_s=HANG_LIMIT_S), disturber, first_step=2)
    measured: Measurement = result["measured"]
    rank, stopped_s = disturber.hits[0] if disturber.hits else (-1, 0.0)
    before = [t for t in result["step_times"] if t < stopped_s]
    step_s = statistics.median(b - a for a, b in pairwise(before)) if len(before) > 2 else 0.0
    named_s = next(
        (at - stopped_s for ranks, at in result["named"] if ranks == [rank] and at > stopped_s), None
    )
    return {
        "kind": kind,
        "seed": seed,
        "step_s": round(step_s, 2),
        "named_s": None if named_s is None else round(named_s, 2),
        "named_in_time": named_s is not None and named_s < 3 * step_s,
        "false_names": sum(at < stopped_s for _, at in result["named"]),
        "completed": measured.outcome is OutcomeKind.OK,
        "reason": measured.reason.replace(str(folder), "FOLDER"),
        "restarts": len(measured.restarts),
        "took_s": round(result["took_s"], 1),
    }


class Memory(threading.Thread):
    """Reads the resident memory of this process, which has started the ranks, and of each rank's process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.series: dict[str, list[tuple[float, int]]] = {}

    def run(self) -> None:
        while not self.done.wait(SAMPLE_S):
            pids = {"memfit": os.getpid()}
            pids |= {f"rank {r}, {pid}": pid for r in range(2) if (pid := process_of(r)) is not None}
            for name, pid in pids.items():
                with contextlib.suppress(psutil.Error):
                    rss_bytes = psutil.Process(pid).memory_info().rss
                    self.series.setdefault(name, []).append((time.monotonic(), rss_bytes))

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each process that lived long enough: its memory in the first and in the last
        quarter of its time after settling, in MiB, and the growth."""
        rows = []
        for name, series in self.series.items():
            begun_s = series[0][0]
            values = [rss_bytes / 2**20 for at, rss_bytes in series if at >= begun_s + SETTLE_S]
            if series[-1][0] - begun_s < LIVED_S or len(values) < 8:
                continue
            quarter = len(values) // 4
            first, last = statistics.median(values[:quarter]), statistics.median(values[-quarter:])
            rows.append(
                {
                    "process": name.partition(",")[0],
                    "lived_s": round(series[-1][0] - begun_s),
                    "first_mib": round(first, 2),
                    "last_mib": round(last, 2),
                    "growth_ratio": round(last / first - 1, 5),
                }
            )
        return rows


class Faults(threading.Thread):
    """Makes the faults of `SOAK_FAULTS` one after the other in a run that saves in ``kept``."""

    def __init__(self, minutes: float, chance: random.Random, kept: Path) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.made: list[str] = []
        self._minutes, self._chance, self._kept = minutes, chance, kept

    def run(self) -> None:
        begun_s, count = time.monotonic(), len(SOAK_FAULTS)
        for number, (name, fault) in enumerate(SOAK_FAULTS.items(), 1):
            at_s = begun_s + 60 * self._minutes * (number + self._chance.uniform(-0.1, 0.1)) / (count + 1)
            if self.done.wait(max(0.0, at_s - time.monotonic())):
                return
            fault(self)
            self.made.append(f"{name} at {(time.monotonic() - begun_s) / 60:.1f} min")

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def damage(self) -> None:
        newest = checkpoints.find(self._kept)[0]
        file = max(newest.glob("__*"), key=lambda path: path.stat().st_size)
        with file.open("r+b") as stream:
            stream.seek(self._chance.randrange(file.stat().st_size))
            byte = stream.read(1)
            stream.seek(-1, os.SEEK_CUR)
            stream.write(bytes((byte[0] ^ 1,)))
        self.kill()

    def kill_in_save(self) -> None:
        while not self.done.is_set() and not any(self._kept.glob(f"*{checkpoints.PARTIAL}")):
            time.sleep(0.001)
        self.kill()

    def stop_starter(self) -> None:
        with subprocess.Popen(("sh", "-c", f"sleep {STARTER_STOPPED_S}; kill -CONT {os.getpid()}")):
            os.kill(os.getpid(), signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        rank = self._chance.randrange(2)
        while (pid := process_of(rank)) is None and not self.done.wait(0.1):
            pass
        if pid is not None:
            os.kill(pid, number)


SOAK_FAULTS: Mapping[str, Callable[[Faults], None]] = {
    "a rank killed": Faults.kill,
    "a rank stopped": Faults.stop,
    "newest checkpoint damaged and a rank killed": Faults.damage,
    "a rank killed while it saves": Faults.kill_in_save,
    "memfit itself stopped for a while": Faults.stop_starter,
}


def soak(minutes: float, seed: int, folder: Path) -> dict[str, Any]:
    """Train for ``minutes`` with the five faults, and return the row of the record."""
    spec = spec_of("FSDP2", folder, steps=10**6, step_s=SOAK_STEP_S, every=SOAK_EVERY)
    keep = dataclasses.replace(spec.keep, keep_last=3, restarts=3)
    spec = dataclasses.replace(spec, keep=keep, stall_s=SOAK_STALL_S)
    memory, faults = Memory(), Faults(minutes, random.Random(f"soak {seed}"), folder / "kept")
    recent: dict[int, float] = {}  # losses of the last steps
    repeated = differing = 0
    tensors_bytes = set[int]()

    def listen(event: Event) -> None:
        nonlocal repeated, differing
        if event["event"] != "step":
            return
        step, loss = int(str(event["step"])), float(str(event["loss"]))
        repeated += step in recent
        differing += recent.get(step, loss) != loss
        recent[step] = loss
        if len(recent) > RECENT_STEPS:
            del recent[next(iter(recent))]
        if step % SOAK_EVERY == SOAK_EVERY // 2:
            tensors_bytes.add(int(str(event["allocated_bytes"])))

    end = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
    for thread in (memory, faults, end):
        thread.start()
    try:
        measured = measure_spec(spec, listen)
    finally:
        for done in (memory.done.set, faults.done.set, end.cancel):
            done()
    newest = checkpoints.find(folder / "kept")[1].step if measured.steps_done else 0
    rows = memory.rows()
    return {
        "kind": "FSDP2",
        "seed": seed,
        "minutes": minutes,
        "steps": measured.steps_done,
        "faults": faults.made,
        "restarts": [f"{r.reason}, in step {r.step}, from {r.first_step}" for r in measured.restarts],
        "completed": measured.outcome is OutcomeKind.INTERRUPTED and newest == measured.steps_done,
        "reason": measured.reason.replace(str(folder), "FOLDER"),
        "repeated_steps": repeated,
        "differing_losses": differing,
        "tensor_sizes_after_steps": sorted(tensors_bytes),
        "memory": rows,
        "flat": bool(rows) and all(r["growth_ratio"] <= FLAT_RATIO for r in rows),
    }


def measure(names: list[str], rounds: int, end_s: float, only: str = "", kills: int = KILLS) -> None:
    """Make ``rounds`` rounds, of kills only for kinds whose name contains ``only``, ``kills`` in a run."""
    undisturbed: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as top:
        for seed in range(10, 10 + rounds):
            if "hangs" in names and time.monotonic() < end_s:
                kind = HANGING[seed % len(HANGING)]
                keep("hang", hang_round(kind, seed, Path(top) / f"hang-{seed}"))
            for kind in [k for k in KINDS if only in k and "kills" in names]:
                if time.monotonic() >= end_s:
                    return
                if kind not in undisturbed:
                    spec = spec_of(kind, Path(top) / f"{kind}-whole", steps=STEPS, step_s=STEP_S, every=EVERY)
                    undisturbed[kind] = list(train(spec)["measured"].losses)
                folder = Path(top) / f"{kind}-{seed}"
                keep("kill", kill_round(kind, seed, folder, undisturbed[kind], kills))


def keep(measurement: str, row: dict[str, Any]) -> None:
    about = {
        "measurement": measurement,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(row), flush=True)
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(about | row) + "\n")


def page() -> str:
    """Return the page, made from the records."""
    rows = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]
    kills = [r for r in rows if r["measurement"] == "kill"]
    hangs = [r for r in rows if r["measurement"] == "hang"]
    loads = [r["load"] for r in rows]
    lines = [
        "# Ranks that are killed or stopped",
        "",
        "Generated by `python benchmarks/chaos.py` from `benchmarks/records/chaos.jsonl`; do not edit. The",
        "protocol, at the top of the script, was committed before the first run. Two gloo ranks on a",
        f"processor that other work shared: load {min(loads)} to {max(loads)} on {rows[0]['cores']} core(s);",
        f"torch {rows[0]['torch']}. Nothing here ran on a GPU.",
        "",
        "## Kills (SIGKILL to a random rank at a random instant)",
        "",
        "| plan, engine | runs | kills | recovered, each cause named | losses bitwise those undisturbed |",
        "|---|--:|--:|--:|--:|",
    ]
    for kind in KINDS:
        own = [r for r in kills if r["kind"] == kind]
        if own:
            recovered, equal = (sum(r[key] for r in own) for key in ("recovered", "losses_equal"))
            lines.append(
                f"| {kind} | {len(own)} | {sum(r['kills'] for r in own)} | {recovered} of {len(own)} | "
                f"{equal} of {len(own)} |"
            )
    total = sum(r["kills"] for r in kills)
    recovered, equal = (sum(r[key] for r in kills) for key in ("recovered", "losses_equal"))
    lines.append(f"| all | {len(kills)} | {total} | {recovered} of {len(kills)} | {equal} of {len(kills)} |")
    lines += [
        "",
        "## Hangs (SIGSTOP to a random rank)",
        "",
        "| plan | step s | named after s | within three steps | named wrongly before | recovered |",
        "|---|--:|--:|---|--:|---|",
    ]
    for r in hangs:
        ended = "yes" if r["completed"] and r["restarts"] == 1 else f"no: {r['reason'] or r['restarts']}"
        named = f"{r['named_s'] or 'never'} | {'yes' if r['named_in_time'] else 'no'} | {r['false_names']}"
        lines.append(f"| {r['kind']} | {r['step_s']} | {named} | {ended} |")
    lines += soak_lines([r for r in rows if r["measurement"] == "soak"])
    failures = [r for r in kills if not (r["recovered"] and r["losses_equal"])]
    if failures:
        lines += ["", "## What failed", ""]
        lines += [
            f"- {r['kind']}, seed {r['seed']}: {r['kills']} kills, {r['restarts']} restarts, causes named: "
            f"{r['causes_named']}, completed: {r['completed']}, largest difference of a loss: "
            f"{r['largest_difference']}. {r['reason']}"
            for r in failures
        ]
    first = [r for r in rows if r["measurement"] == "kill, first version"]
    if first:
        recovered = sum(r["recovered"] and r["losses_equal"] for r in first)
        lines += [
            "",
            "By the first version of the protocol (five kills a run, three restarts without a checkpoint),",
            f"{recovered} of {len(first)} runs recovered; the others ended by the limit of restarts:",
            ", ".join(f"{r['kind']} after {r['kills']} kills" for r in first if not r["recovered"]) + ".",
        ]
    return "\n".join([*lines, ""])


def soak_lines(soaks: list[dict[str, Any]]) -> list[str]:
    """Return the section of the soaks."""
    lines = ["", "## A long run with five faults"] if soaks else []
    if soaks:
        lines += [
            "",
            "Without a record: a first run ended at its second fault, because a checkpoint had been pruned,",
            "and a second was stopped early to mend how a damaged checkpoint is replaced (docs/log.md).",
        ]
    for r in soaks:
        ended = "ended with a checkpoint of its last step" if r["completed"] else f"**failed: {r['reason']}**"
        lines += [
            "",
            f"{r['kind']}, {r['minutes']:g} minutes, {r['steps']} steps: {ended}, after {len(r['restarts'])}",
            f"restarts. {r['repeated_steps']} steps were repeated, {r['differing_losses']} of them with",
            f"another loss. Memory is {'flat' if r['flat'] else '**not flat**'} within 1 %.",
            "",
            *(f"- Fault: {fault}." for fault in r["faults"]),
            *(f"- Restart: {restart}." for restart in r["restarts"]),
            "",
            "| process | lived s | MiB, first quarter | last quarter | growth |",
            "|---|--:|--:|--:|--:|",
        ]
        for m in r["memory"]:
            size = f"{m['first_mib']} | {m['last_mib']} | {100 * m['growth_ratio']:+.2f} %"
            lines.append(f"| {m['process']} | {m['lived_s']} | {size} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["kills", "hangs"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--kills", type=int, default=KILLS, help="in a run")
    parser.add_argument("--only", default="", help="kills only for kinds whose name contains this")
    parser.add_argument("--page", action="store_true", help="write the page from the records only")
    arguments = parser.parse_args()
    if arguments.page:
        PAGE.write_text(page(), encoding="utf-8")
        return
    if "soak" in arguments.names:
        with tempfile.TemporaryDirectory() as top:
            keep("soak", soak(arguments.minutes or 30.0, SOAK_SEED, Path(top) / "soak"))
    arguments.minutes = arguments.minutes or 600.0
    end_s = time.monotonic() + 60 * arguments.minutes
    measure(arguments.names, arguments.rounds, end_s, arguments.only, arguments.kills)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
