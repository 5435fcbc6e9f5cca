"""How `memfit.watch` holds up: leaks, honest runs, its cost, two ranks, and processes that are killed.

    python benchmarks/watch.py [leaks honest cost ranks kills]      measures all, or what is named

The protocol was committed, with the thresholds (`AlarmLimits` and the constants of monitoring/alarms.py),
before the first result. A small transformer trains on sequences of noisy lengths (log-normal, 16 to 256
tokens), with AdamW and gradient clipping; logits and loss of a step are still alive when it is recorded. Each
run is a process of its own. Memory is once that which the C library has handed out, once counted by memfit's
allocator.

This is the second version. The first tested resident memory, whose noise hid 8 of 10 leaks, and recorded too
few of the short steps, which hid 2 of 10 from the counting allocator (record "first leaks"). The thresholds
stayed; what the C library has handed out is now tested too, and the first quarter of a second of recording
does not count as cost. Seeds are new.

- leaks: 1 MiB a step is kept from step 1 or from step 101 on, seeds 10 to 14, both kinds of counting: 20
  runs. An alarm "creep" must come within 60 steps after the leak began, and none before.
- honest: seeds 200 to 219, 300 steps, both kinds of counting: 40 runs. There must be no alarm of any kind.
  On a quicker processor (2026-12-01, steps of 20 ms) 19 runs had one: the peak of host memory, read once a
  second, was compared with one reading, that of the first 50 steps. Now it is compared with 50 readings.
- cost: one run in which the watch is on and off in turn, step by step, for 4,000 pairs (1,000 until
  2026-12-01, too few: the interval was as wide as the cost). Lines of short steps are written together, in
  some pairs, so the paired differences are averaged over blocks of 20 pairs; the median of these means over
  the median step without the watch, with the 95 % interval of 2,000 bootstrap samples of blocks (until
  2026-12-01: the median of the differences). It must be below 1 %. The start of the watch is not in it. A
  first run (record "first cost") measured wall time alone, which other work on the machine made too noisy to
  decide: now the processor time of the process, too. A second (record "second cost") gave 1.3 and 1.6 %, with
  what takes longest, questions to the operating system, asked four times a second: it is asked once a second
  since. A third (record "third cost", 1.2 to 1.6 %) counted the steps without the watch in the time of which
  the watch may take half a percent, so that it recorded each of its steps at twice the price that a training
  pays. Since then the clock of the watch stands still in the other steps, and its allowance for the first
  steps is spent before the first pair: the cost is that of a training that has run for minutes.
- ranks: `memfit watch -- torchrun` with two ranks, of which one reads its data 30 ms slower: both are merged,
  and this rank is named.
- kills: 20 runs that are killed (SIGKILL) at a random instant of their first 3 s of training: each file is
  readable, without a broken line, and lacks at most the steps of the last tenth of a second and the one in
  which the process died (until 2026-12-01 the latter alone).

An alarm, a run or a file that fails is counted and stays in the record.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import memfit
from memfit.monitoring.alarms import alarms_of
from memfit.monitoring.command import run_watched
from memfit.monitoring.record import read_records
from memfit.monitoring.watch import _ALLOWANCE_S

RECORDS = Path(__file__).parent / "records" / "watch.jsonl"
PAGE = Path(__file__).with_suffix(".md")
MIB = 2**20
VOCABULARY, WIDTH, BATCH = 2048, 64, 8
PAIRS_OF_BLOCK = 20
COST_WARM_UP = 40  # steps
COUNTERS = ("C library", "counting allocator")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.block(self.embedding(tokens)))
        return out


def batch(generator: torch.Generator, length: int | None = None) -> torch.Tensor:
    noise = float(torch.randn(1, generator=generator))
    length = length or max(16, min(256, round(80 * 2.718 ** (0.6 * noise))))
    return torch.randint(VOCABULARY, (BATCH, length), generator=generator)


def train(steps: int, seed: int, on_step: Callable[[int], object], length: int | None = None) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        tokens = batch(generator, length)
        logits = model(tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(step)


# -- in processes of their own -----------------------------------------------------------------------------


def child_run(file: str, counter: str, steps: str, seed: str, leak_from: str) -> None:
    if counter == "counting allocator":
        from memfit.runtime.memory import peak_counter

        peak_counter()
    leaked: list[torch.Tensor] = []

    def leak(step: int) -> None:
        if 0 < int(leak_from) <= step:
            leaked.append(torch.ones(MIB // 4))

    with memfit.watch(file=file, on_alarm=lambda alarm: None):
        train(int(steps), int(seed), leak)


def child_cost(file: str, steps: str) -> None:
    watch = memfit.watch(file=file, on_alarm=lambda alarm: None)
    marks: list[tuple[float, float]] = []

    def alternate(step: int) -> None:
        marks.append((time.perf_counter(), time.process_time()))
        if step == COST_WARM_UP:
            watch._spent_s += _ALLOWANCE_S
        if watch._is_over:  # its clock stands still in a step without it
            off_s = marks[-1][0] - marks[-2][0]
            watch._began_s += off_s
            watch._written_s += off_s
        watch._is_over = step % 2 == 0  # the watch is on in the even steps

    with watch:
        train(2 * int(steps) + COST_WARM_UP, 0, alternate, length=128)
        watch._is_over = False
    differences = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks[COST_WARM_UP - 1 :])]
    # the first step after the warm-up is off
    print(json.dumps({"off": differences[0::2], "on": differences[1::2]}))


def child_kill(file: str) -> None:
    def say(step: int) -> None:
        print(step, flush=True)

    with memfit.watch(file=file, on_alarm=lambda alarm: None):
        train(100_000, 0, say)


def child_rank() -> None:
    torch.distributed.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(Model())
    optimizer = torch.optim.AdamW(model.parameters())
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for _ in range(60):
        if torch.distributed.get_rank() == 1:
            time.sleep(0.03)
        tokens = batch(generator, 64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    torch.distributed.destroy_process_group()


def command(*arguments: object) -> list[str]:
    return [sys.executable, __file__, "--child", *map(str, arguments)]


# -- the five measurements ---------------------------------------------------------------------------------


def watched_run(counter: str, steps: int, seed: int, leak_from: int = 0) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.jsonl"
        subprocess.run(command("run", file, counter, steps, seed, leak_from), check=True)
        record = read_records(file)
    values = [s.allocated_bytes or s.heap_bytes or 0 for s in record.ranks[0].steps]
    return {
        "counter": counter,
        "seed": seed,
        "leak_from": leak_from,
        "steps": len(values),
        "alarms": [[a.kind, a.quantity, a.step, round(a.value)] for a in alarms_of(record)],
        "spread_mib": statistics.pstdev(values[10:]) / MIB,
    }


def leaks() -> Iterator[dict[str, Any]]:
    for counter in COUNTERS:
        for leak_from in (1, 101):
            for seed in range(10, 15):
                yield watched_run(counter, leak_from + 99, seed, leak_from)


def honest() -> Iterator[dict[str, Any]]:
    for counter in COUNTERS:
        for seed in range(200, 220):
            yield watched_run(counter, 300, seed)


def cost() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.jsonl"
        done = subprocess.run(command("cost", file, 4000), check=True, capture_output=True, text=True)
        recorded_steps = len(read_records(file).ranks[0].steps) - COST_WARM_UP // 2
    answer = json.loads(done.stdout)
    for clock, name in enumerate(("wall", "processor")):
        on, off = ([step[clock] for step in answer[state]] for state in ("on", "off"))
        differences = [a - b for a, b in zip(on, off, strict=True)]
        starts = range(0, len(differences), PAIRS_OF_BLOCK)
        means = [statistics.fmean(differences[i : i + PAIRS_OF_BLOCK]) for i in starts]
        draw = random.Random(0)
        medians = sorted(statistics.median(draw.choices(means, k=len(means))) for _ in range(2000))
        step_s = statistics.median(off)
        yield {
            "clock": name,
            "pairs": len(differences),
            "recorded_steps": recorded_steps,
            "step_ms": 1e3 * step_s,
            "cost_ratio": statistics.median(means) / step_s,
            "cost_low": medians[50] / step_s,
            "cost_high": medians[-50] / step_s,
        }


def ranks() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.jsonl"
        words = ["torchrun", "--nproc-per-node", "2", __file__, "--child", "rank"]
        end = run_watched(words, file, prediction={}, limits={})
        record = read_records(file)
    yield {
        "code": end.code,
        "steps": [len(r.steps) for r in record.ranks],
        "slow_ranks": [a.rank for a in alarms_of(record) if a.kind == "slow-rank"],
    }


def kills() -> Iterator[dict[str, Any]]:
    for seed in range(20):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "run.jsonl"
            child = subprocess.Popen(command("kill", file), stdout=subprocess.PIPE, text=True)
            assert child.stdout is not None
            steps = [int(child.stdout.readline())]
            time.sleep(3 * random.Random(seed).random())
            child.send_signal(signal.SIGKILL)
            steps += [int(line) for line in child.stdout.read().splitlines() if line.strip()]
            child.wait()
            record = read_records(file).ranks[0]
        yield {
            "seed": seed,
            "steps_done": steps[-1],
            "steps_recorded": len(record.steps),
            "unreadable_lines": record.unreadable_lines,
        }


MEASUREMENTS = {"leaks": leaks, "honest": honest, "cost": cost, "ranks": ranks, "kills": kills}


# -- the page ----------------------------------------------------------------------------------------------

_TOP = """\
# The watch of a training

Generated by `python benchmarks/watch.py` from `benchmarks/records/watch.jsonl`; do not edit. The
thresholds of the alarms were fixed before the first result. Earlier measurements failed: 10 of 20 leaks were
missed, the cost was 1.2 % to 1.7 %, and on a quicker processor 19 of 40 honest runs raised an alarm of a new
maximum of host memory. The records keep them; the top of the script says what was changed since. The cost is
that of a training that has run for minutes, of whose short steps the watch records as many as half a percent
of the time allows. Two cores, shared with other work except for the cost; torch for CPU; nothing here ran on
a GPU. Spread: the deviation of the memory after a step from step 11 on, in MiB, the leak included.
"""


def page(results: dict[str, dict[str, Any]]) -> str:
    parts = {"leaks": _leaks, "honest": _honest, "cost": _cost, "ranks": _ranks, "kills": _kills}
    lines = [_TOP]
    for name, rows_of in parts.items():
        if name in results:
            lines += [f"## {name.capitalize()}", "", f"{results[name]['created'][:10]}.", ""]
            lines += [*rows_of(results[name]["rows"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _leaks(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| counted by | leak from step | steps until the alarm, seeds 10 to 14 | earlier alarms | spread |"
    yield "|---|--:|---|--:|--:|"
    for counter in COUNTERS:
        for leak_from in (1, 101):
            some = [r for r in rows if (r["counter"], r["leak_from"]) == (counter, leak_from)]
            creeps = [[a[2] - leak_from + 1 for a in r["alarms"] if a[0] == "creep"] for r in some]
            delays = ", ".join(str(min((d for d in c if d > 0), default="none")) for c in creeps)
            early = sum(a[2] < leak_from for r in some for a in r["alarms"])
            spread = statistics.median(r["spread_mib"] for r in some)
            yield f"| {counter} | {leak_from} | {delays} | {early} | {spread:.1f} |"


def _honest(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| counted by | runs | steps | alarms | spread |"
    yield "|---|--:|--:|---|--:|"
    for counter in COUNTERS:
        some = [r for r in rows if r["counter"] == counter]
        alarms = [f"{a[0]} ({a[1]}, seed {r['seed']}, step {a[2]})" for r in some for a in r["alarms"]]
        spread = statistics.median(r["spread_mib"] for r in some)
        steps = sum(r["steps"] for r in some)
        yield f"| {counter} | {len(some)} | {steps:,} | {', '.join(alarms) or 'none'} | {spread:.1f} |"


def _cost(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| time of the | pairs | recorded steps | step ms | cost of the watch | 95 % interval |"
    yield "|---|--:|--:|--:|--:|---|"
    for row in rows:
        interval = f"{row['cost_low']:+.2%} to {row['cost_high']:+.2%}"
        step = f"{row['step_ms']:.1f} | {row['cost_ratio']:+.2%}"
        recorded = row.get("recorded_steps", row["pairs"])
        yield f"| {row['clock']} clock | {row['pairs']:,} | {recorded:,} | {step} | {interval} |"


def _ranks(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        yield (
            f"Exit code {row['code']}; steps recorded by each rank: {', '.join(map(str, row['steps']))}; "
            f"slow ranks (rank 1 is): {', '.join(map(str, row['slow_ranks'])) or 'none'}."
        )


def _kills(rows: list[dict[str, Any]]) -> Iterator[str]:
    lacking = [max(0, r["steps_done"] - r["steps_recorded"]) for r in rows]
    done, broken = [r["steps_done"] for r in rows], sum(r["unreadable_lines"] for r in rows)
    yield (
        f"{len(rows)} kills after {min(done)} to {max(done)} steps: {broken} broken lines, at most "
        f"{max(lacking)} steps lacking."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*MEASUREMENTS, []])
    parser.add_argument("--child", nargs="+")
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        name, *rest = arguments.child
        {"run": child_run, "cost": child_cost, "kill": child_kill, "rank": child_rank}[name](*rest)
        return
    for name in () if arguments.page else arguments.names or MEASUREMENTS:
        rows = []
        for row in MEASUREMENTS[name]():
            print(name, json.dumps(row), flush=True)
            rows.append(row)
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        result = {
            "measurement": name,
            "created": created,
            "torch": torch.__version__,
            "load": os.getloadavg()[1],
        }
        with RECORDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result | {"rows": rows}) + "\n")
    lines = RECORDS.read_text(encoding="utf-8").splitlines()
    results = {r["measurement"]: r for r in map(json.loads, lines)}
    PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
