"""Many trials of one step through one sweep: does memory grow, does anything stay behind, is a record lost?

    python benchmarks/sweeps.py --trials 1000 [--parallel 2] [--program run|record] [--minutes M]

Program `run`: each trial is a `memfit run` of `char-lm` with one step, as for users (about 10 s of
processor time each). Program `record`: each trial writes the record of such a run without training, which
exercises all of the sweep but the training: folders, submitit's processes, locks, budget, store.

All trials differ in their seed only. At each tenth of the trials the sweep process is measured: resident
memory, open files, threads. At the end: files beside the store, temporary folders of memfit, processes
with the sweep's folder in their command line, and rows of the store. After `--minutes` the sweep is
interrupted as by Ctrl-C; the record then says how many trials were done. Each call adds a line to
records/sweeps.jsonl and writes sweeps.md."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from memfit.store import Store
from memfit.store.exchange.run_record import record_of, run_record_text
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan
from memfit.types.result import Measurement, OutcomeKind, Run
from memfit.workflows import sweep
from memfit.workflows.sweep import Budget, Placement, RunSettings, Sweep, SweepTrial, TrialState, make_trials

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "records" / "sweeps.jsonl", HERE / "sweeps.md"
COLUMNS = (
    "program",
    "trials",
    "parallel",
    "done",
    "failed",
    "stored",
    "resident MiB",
    "open files",
    "left behind",
)


def write_record(trial: SweepTrial, threads: int, settings: RunSettings, folder: Path) -> Iterator[str]:
    """The command that takes the place of `memfit run`: it writes the record of a run that was not made."""
    spec = RunSpec(name="run", role="run", job=trial.job, plan=trial.plan, seed=trial.seed, steps=1)
    measurement = Measurement(outcome=OutcomeKind.OK, reason="", steps_done=1, losses=(0.5,))
    run = Run(
        spec=spec,
        predicted_peak_bytes=None,
        predicted_phase_peak_bytes={},
        predicted_step_s=None,
        measurement=measurement,
    )
    (folder / "text").write_text(run_record_text(record_of(run, trial.trial_id)), encoding="utf-8")
    code = f"import os; os.rename({str(folder / 'text')!r}, {str(folder / 'record.json')!r})"
    yield from (sys.executable, "-I", "-S", "-c", code)


class Meter:
    """Measures this process at each tenth of the trials, and interrupts the sweep when its time is over."""

    def __init__(self, count: int, minutes: float) -> None:
        self.step, self.until_s = max(1, count // 10), time.monotonic() + minutes * 60
        self.rows: list[dict[str, Any]] = []

    def __call__(self, running: Sweep) -> None:
        done = sum(result.state is TrialState.DONE for result in running.results)
        if done >= self.step * len(self.rows):
            process = psutil.Process()
            self.rows.append(
                {
                    "done": done,
                    "resident_mib": round(process.memory_info().rss / 2**20, 1),
                    "open_files": process.num_fds(),
                    "threads": process.num_threads(),
                }
            )
        if time.monotonic() > self.until_s:
            raise KeyboardInterrupt


def measure(count: int, parallel: int, program: str, minutes: float) -> dict[str, Any]:
    """Run one sweep and return its record."""
    if program == "record":
        sweep._command = write_record
    placement = Placement(executor="local", settings={"parallel": str(parallel)})
    settings = RunSettings(on="this:cpu", threads=1)
    job = JobRef(spec="char-lm", steps=1)
    trials = make_trials(job, {"plain": Plan()}, [placement], settings, seeds=count)
    meter, begun_s = Meter(count, minutes), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sweeps-") as folder:
        store = Store(Path(folder) / "store.sqlite3")
        with contextlib.suppress(KeyboardInterrupt), Sweep(trials, settings, store) as running:
            running.run(Budget(hours=1000.0), meter)
        states = [result.state for result in running.results]
        time.sleep(3.0)
        left = [path.name for path in Path(folder).iterdir() if path.name != "store.sqlite3"]
        left += [
            str(p.pid)
            for p in psutil.process_iter(["cmdline"])
            if folder in " ".join(p.info["cmdline"] or ())
        ]
        return {
            "program": program,
            "trials": count,
            "parallel": parallel,
            "done": states.count(TrialState.DONE),
            "failed": states.count(TrialState.FAILED),
            "reasons": sorted({r.reason for r in running.results if r.state is TrialState.FAILED}),
            "stored": len({row.poc_id for row in store.records(kind="run")}),
            "left_behind": len(left),
            "device_hours": running.hours,
            "wall_s": round(time.monotonic() - begun_s),
            "tenths": meter.rows,
        }


def page(records: list[dict[str, Any]]) -> str:
    """Return the text of sweeps.md."""
    lines = [
        "# Many trials through one sweep",
        "",
        "Written by `benchmarks/sweeps.py`, whose docstring says what is measured. Each sweep is a line of",
        "[records/sweeps.jsonl](records/sweeps.jsonl). *Resident*, *open files*: of the sweep process, after",
        "a tenth of the trials and at the end. *Left behind*: files, folders and processes after the end.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|---|{'--:|' * (len(COLUMNS) - 1)}",
    ]
    for record in records:
        first, last = (record["tenths"][min(1, len(record["tenths"]) - 1)], record["tenths"][-1])
        cells = [record[name] for name in ("program", "trials", "parallel", "done", "failed", "stored")]
        cells += [f"{first[name]} to {last[name]}" for name in ("resident_mib", "open_files")]
        lines.append(f"| {' | '.join(map(str, [*cells, record['left_behind']]))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--program", choices=("run", "record"), default="run")
    parser.add_argument("--minutes", type=float, default=600.0)
    arguments = parser.parse_args()
    record = measure(arguments.trials, arguments.parallel, arguments.program, arguments.minutes)
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    PAGE.write_text(page([json.loads(line) for line in RECORDS.read_text().splitlines()]), encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
