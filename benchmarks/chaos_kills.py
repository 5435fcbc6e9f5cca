"""memfit's commands are killed at random instants: what stays behind, and does the next command work?

    python benchmarks/chaos_kills.py [--kills N] [--minutes M] [--side-by-side P]

The protocol was committed before the first run.

- Commands: `plan --save`, `poc`, `run --save --save-every 2`, `export`, `record --out`, all for `char-lm` at
its initial size, each in a folder of its own with its own store, cache (empty, so that everything is traced)
and folder for temporary files. A store with one finished proof of concept is made first, and copied for each
kill.
- Kills: command and signal (SIGKILL, SIGTERM, SIGHUP, SIGINT) take turns, so that all 20 pairs are equally
frequent. The instant is uniform over the shorter of 40 s and the time that the command took undisturbed
(measured once). Only memfit's own process gets the signal, not its group. Seed: the number of the kill. A
kill that finds the command ended does not count.
- A kill is survived if all of these hold:
  - `ends`: the process ends within 10 s of the signal.
  - `orphans`: 2 s after it has ended, no process with its environment lives.
  - `next`: `memfit record` on the same store then writes a valid record.
  - `temporary`: after that start, and for `export` after the same export once more, no temporary folder is
  left, neither in the folder for temporary files nor beside the outputs.
  - `whole`: the store passes SQLite's integrity check and each row of a run can be read; each checkpoint that
  is not named `.partial` has the right checksums; the plan, the record and the export are as they must be or
  absent.

Times depend on other work of the machine. A failure is counted and stays in the record.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from memfit.files.read import read_json
from memfit.jobs import checkpoints
from memfit.store import Store, exchange
from memfit.techniques.plan_file import read_plan
from memfit.types import serialization
from memfit.types.errors import UserError
from memfit.types.result import Run

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "records" / "chaos_kills.jsonl", HERE / "chaos_kills.md"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
STORE = ("--store", "store.sqlite3")
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "plan": ("plan", "char-lm", "--memory", "200MiB", "--save", "card.yaml", "--force"),
    "poc": ("poc", "char-lm", "--memory", "200MiB", "--seeds", "1", "--steps", "4", *STORE),
    "run": ("run", "char-lm", "--steps", "40", "--save", "saved", "--save-every", "2", *STORE),
    "export": ("export", "char-lm", "--to", "torchrun", "--out", "exported", "--force"),
    "record": ("record", *STORE, "--out", "record.json"),
}  # fmt: skip
CHECKS = ("ends", "orphans", "next", "temporary", "whole")
MARK, LONGEST_S = "MEMFIT_CHAOS_MARK", 40.0


def environment(folder: Path, mark: str) -> dict[str, str]:
    """The environment of a command in ``folder``; ``mark`` tells its processes from all others."""
    (folder / "tmp").mkdir(exist_ok=True)
    own = {
        "TMPDIR": str(folder / "tmp"),
        "MEMFIT_CACHE": str(folder / "cache"),
        MARK: mark,
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **own}


def start(name: str, folder: Path, mark: str) -> subprocess.Popen[bytes]:
    """Start the command. Its output goes into files of ``folder``."""
    with (folder / f"{name}.out").open("wb") as out:
        return subprocess.Popen(
            (sys.executable, "-m", "memfit", *COMMANDS[name]),
            cwd=folder,
            env=environment(folder, mark),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(name: str, folder: Path) -> tuple[int, float]:
    """(Exit code, seconds) of the command, undisturbed."""
    begun = time.monotonic()
    return start(name, folder, "undisturbed").wait(), time.monotonic() - begun


def marked(mark: str) -> list[str]:
    """The living processes with this mark in their environment, each as text."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(f"{process.pid}: {' '.join(process.cmdline())[:120]}")
    return processes


def left_behind(folder: Path) -> list[str]:
    """Temporary folders and drafts in the folder for temporary files and beside the outputs."""
    inside = [p.name for p in (folder / "tmp").iterdir() if p.name.startswith("memfit")]
    return inside + [p.name for p in folder.iterdir() if p.name.startswith(".")]


def not_whole(folder: Path) -> Iterator[str]:
    """What is neither as it must be nor absent."""
    with contextlib.closing(sqlite3.connect(folder / "store.sqlite3")) as connection:
        if (answer := connection.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
            yield f"store: {answer}"
    try:
        for row in Store(folder / "store.sqlite3").records(kind="run"):
            serialization.loads(Run, row.body, what="row")
        if (folder / "card.yaml").exists():
            read_plan(folder / "card.yaml")
        if (folder / "record.json").exists():
            exchange.read(folder / "record.json")
        if (folder / "exported").exists():
            yield from _damaged_export(folder / "exported")
    except UserError as error:
        yield str(error)[:200]
    for path in (folder / "saved").glob("step-*"):
        if path.suffix != checkpoints.PARTIAL and (problem := checkpoints.why_incomplete(path)):
            yield f"{path.name}: {problem}"


def _damaged_export(folder: Path) -> Iterator[str]:
    for name, digest in read_json(folder / "export.json")["files"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            yield f"export: {name} is not what the manifest says"


def one_kill(number: int, base: Path, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Make one kill and return its record."""
    name, sent = list(COMMANDS)[number % 5], SIGNALS[number // 5 % 4]
    instant_s = random.Random(number).uniform(0, min(LONGEST_S, seconds[name]))
    record: dict[str, Any] = {
        "kill": number,
        "command": name,
        "signal": sent.name,
        "instant_s": round(instant_s, 2),
    }
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=base.parent))
    try:
        shutil.copy(base / "store.sqlite3", folder)
        process = start(name, folder, str(number))
        time.sleep(instant_s)
        if process.poll() is not None:
            return record | {"counts": False}
        process.send_signal(sent)
        return record | {"counts": True} | _after(process, name, folder, str(number))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _after(process: subprocess.Popen[bytes], name: str, folder: Path, mark: str) -> dict[str, Any]:
    begun, problems = time.monotonic(), dict[str, Any]()
    try:
        code = process.wait(10)
    except subprocess.TimeoutExpired:
        problems["ends"], code = "it lives 10 s after the signal", None
        process.kill()
        process.wait()
    ended_s = time.monotonic() - begun
    time.sleep(2)
    if orphans := marked(mark):
        problems["orphans"] = orphans
    for each in orphans:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(each.partition(":")[0]), signal.SIGKILL)
    if (next_code := finish("record", folder)[0]) != 0:
        problems["next"] = (
            f"exit code {next_code}: {(folder / 'record.out').read_text(errors='replace')[-300:]}"
        )
    if name == "export" and (next_code := finish("export", folder)[0]) != 0:
        problems["next"] = (
            f"exit code {next_code}: {(folder / 'export.out').read_text(errors='replace')[-300:]}"
        )
    if left := left_behind(folder):
        problems["temporary"] = left
    if broken := list(not_whole(folder)):
        problems["whole"] = broken
    return {"exit_code": code, "ended_s": round(ended_s, 2), "problems": problems}


def page(records: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]) -> str:
    """The page of the results."""
    kills = [r for r in records if r["counts"]]
    survived = [r for r in kills if not r["problems"]]
    lines = [
        "# Killed commands",
        "",
        "Written by `benchmarks/chaos_kills.py`, whose docstring is the protocol. Each kill is a line of",
        "[records/chaos_kills.jsonl](records/chaos_kills.jsonl).",
        "",
        f"**{len(survived)} of {len(kills)} kills left nothing behind and nothing broken.**",
        f"{len(records) - len(kills)} more found the command ended and do not count.",
        "",
        "| command | undisturbed | kills | " + " | ".join(CHECKS) + " |",
        "|---|--:|--:|" + "--:|" * len(CHECKS),
    ]
    for name in COMMANDS:
        of_command = [r for r in kills if r["command"] == name]
        held = [str(sum(check not in r["problems"] for r in of_command)) for check in CHECKS]
        lines.append(f"| {name} | {seconds[name]:.0f} s | {len(of_command)} | {' | '.join(held)} |")
    lines += ["", "| signal | kills | survived | longest time to the end |", "|---|--:|--:|--:|"]
    for sent in SIGNALS:
        of_signal = [r for r in kills if r["signal"] == sent.name]
        fine = sum(not r["problems"] for r in of_signal)
        longest_s = max((r["ended_s"] for r in of_signal), default=0.0)
        lines.append(f"| {sent.name} | {len(of_signal)} | {fine} | {longest_s:.1f} s |")
    failures = [
        f"- kill {r['kill']}, {r['command']}, {r['signal']}: {json.dumps(r['problems'])}"
        for r in kills
        if r["problems"]
    ]
    return "\n".join([*lines, "", *(["Failures:", "", *failures, ""] if failures else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="kills that count")
    parser.add_argument("--minutes", type=float, default=60.0, help="no kill begins later")
    parser.add_argument("--side-by-side", type=int, default=1, help="commands at a time")
    options = parser.parse_args()
    # Ignored signals, as under nohup or in the background of a shell, would be inherited by the commands.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="chaos-kills-") as folder:
        base = Path(folder) / "base"
        base.mkdir()
        seconds = {}
        for name in ("poc", "plan", "run", "export", "record"):
            code, seconds[name] = finish(name, base)
            if code:
                sys.exit(f"{name} ended with {code}: {(base / f'{name}.out').read_text()[-500:]}")
            shutil.rmtree(base / "cache", ignore_errors=True)
        print({name: round(s, 1) for name, s in seconds.items()}, flush=True)
        records = measure(base, seconds, options)
    RECORDS.write_text("".join(f"{json.dumps(r)}\n" for r in records))
    PAGE.write_text(page(records, seconds) + "\n")


def measure(base: Path, seconds: Mapping[str, float], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Make the kills, with copies of the store in ``base``, and return their records."""
    records: list[dict[str, Any]] = []
    begun = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(options.side_by_side) as pool:
        number = 0
        while (
            sum(r["counts"] for r in records) < options.kills
            and time.monotonic() - begun < 60 * options.minutes
        ):
            batch = range(number, number + options.side_by_side)
            number += options.side_by_side
            for record in pool.map(lambda n: one_kill(n, base, seconds), batch):
                records.append(record)
                print(json.dumps(record), flush=True)
    return records


if __name__ == "__main__":
    main()
