"""Predicted against measured memory on several ranks, on every rank and in every phase.

    python benchmarks/memory_truth_ranks.py [--only WORD]    measure, record, write the page
    python benchmarks/memory_truth_ranks.py --page           the page from the records only

Every rank is a process of its own, joined over gloo; the counting allocator in it is the truth. A thread
of gloo may hold a finished collective's tensors until it is scheduled again, so each row runs six times
and the lowest peak of each phase counts; the record keeps all. Every
number in the page comes from benchmarks/records/memory_truth_ranks.jsonl, of each row the last record.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import datetime
import difflib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from memfit.cost.memory import memory_profile
from memfit.jobs.registry import load
from memfit.jobs.step import TrainingStep
from memfit.measure.allocator import CountingAllocator
from memfit.measure.probe import probe
from memfit.run.ranks import free_port, rank_env
from memfit.store.environment import fingerprint
from memfit.techniques.registry import make_use
from memfit.techniques.world import Layout, World, make_world
from memfit.trace.tracer import trace
from memfit.types.job import Job, JobRef
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.trace import Phase, Trace
from memfit.types.units import format_bytes
from memfit.worker.train import joined

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "records" / "memory_truth_ranks.jsonl", HERE / "memory_truth_ranks.md"
PHASES = tuple(str(p) for p in Phase)
STEPS, RUNS, LIMIT_S = 3, 6, 120.0
WHOLE = 64  # micro-batches: play them all
SCALAR_BYTES = 64  # operators make 0-dim tensors of Python numbers and free them at once; no trace sees them


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``rounding``: how far the loss may be from one process's. ``sequence``: compare the whole log too."""

    job: str
    plan: Plan
    rounding: float = 1e-5
    sequence: bool = False

    @property
    def name(self) -> str:
        return f"{self.job}: {self.plan.label}"

    @property
    def ref(self) -> JobRef:
        return JobRef(spec=f"{HERE / 'rank_jobs.py'}:{self.job}")


def row(job: str, ranks: int, *, rounding: float = 1e-5, sequence: bool = False, **uses: Any) -> Row:
    """``ddp={"bucket_mib": 1}`` uses that technique; underscores stand for hyphens."""
    plan = Plan(uses=tuple(make_use(k.replace("_", "-"), v) for k, v in uses.items()), ranks=ranks)
    return Row(job=job, plan=plan, rounding=rounding, sequence=sequence)


FOUR = {"micro_batches": 4}
BF16 = {"precision": "bf16"}
EVERY_TOKEN = {"capacity_percent": 400}  # none is dropped, so the loss is that of one process
BUCKET = {"reduce_bucket_elements": 1_000_000}
ROWS = (
    row("gpt", 2, ddp={}),
    row("gpt", 2, ddp={"bucket_view": False}),
    row("gpt_wide", 2, ddp={"bucket_mib": 1}),
    row("gpt_wide", 2, ddp={"bucket_mib": 1, "bucket_view": False}),
    row("gpt_wide", 2, ddp={"bucket_mib": 100}),
    row("convnet", 2, ddp={}, rounding=float("inf")),  # each rank normalises by its own batch statistics
    row("gpt_tied", 2, ddp={}),
    row("mlp", 4, ddp={}, sequence=True),
    row("mlp", 2, ddp={"bucket_mib": 1, "bucket_view": False}, sequence=True),
    row("gpt", 2, ddp={}, gradient_accumulation=FOUR),
    row("gpt", 2, ddp={"sync": "last"}, gradient_accumulation=FOUR),
    row("gpt", 2, ddp={"sync": "last", "bucket_view": False}, gradient_accumulation=FOUR),
    row("gpt", 2, ddp={}, activation_checkpointing={}),
    row("gpt", 2, fsdp2={}),
    row("gpt_wide", 2, fsdp2={}),
    row("gpt_wide", 2, fsdp2={"reshard": False}),
    row("gpt_wide", 2, fsdp2=BF16, rounding=2e-2),
    row("gpt_wide", 2, fsdp2={"prefetch": 2}),
    row("gpt_wide", 2, fsdp2={"offload": True}),
    row("gpt", 2, fsdp2={}, activation_checkpointing={}),
    row("gpt", 2, fsdp2=BF16, activation_checkpointing={}, rounding=2e-2),
    row("gpt_wide", 2, fsdp2={}, gradient_accumulation=FOUR),
    row("gpt_wide", 2, fsdp2={"sync": "last"}, gradient_accumulation=FOUR),
    row("gpt_tied", 2, fsdp2={}),
    row("mlp", 2, fsdp2={}, sequence=True),
    row("mlp", 2, fsdp2={}, gradient_accumulation=FOUR, sequence=True),
    row("mlp_odd", 3, fsdp2={}),
    row("mlp", 4, fsdp2={"reshard": False}, sequence=True),
    row("mlp", 4, fsdp2={"replicas": 2}, sequence=True),
    row("gpt_wide", 4, fsdp2={"replicas": 2}),
    row("gpt", 4, fsdp2={"replicas": 2, **BF16}, rounding=2e-2),
    row("mlp", 2, zero={"stage": 1, **BUCKET}, sequence=True),
    row("mlp", 2, zero={"stage": 2, **BUCKET}, sequence=True),
    row("mlp", 2, zero={"stage": 3, **BUCKET}, sequence=True),
    row("gpt", 2, zero={"stage": 1, **BUCKET}, gradient_accumulation=FOUR),
    row("gpt", 2, zero={"stage": 2, "overlap": True, **BUCKET}, gradient_accumulation=FOUR),
    row("gpt_wide", 2, zero={"stage": 2, **BUCKET, **BF16}, rounding=2e-2),
    row("gpt_wide", 2, zero={"stage": 2, "offload": "optimizer", **BUCKET}),
    row("gpt_wide", 2, zero={"stage": 3, **BUCKET, **BF16}, rounding=2e-2),
    row("gpt_wide", 2, zero={"stage": 3, "live_elements": 1_000_000, "prefetch_elements": 500_000, **BUCKET}),
    row("gpt", 2, zero={"stage": 3, **BUCKET}, activation_checkpointing={}, gradient_accumulation=FOUR),
    row("mlp_odd", 3, zero={"stage": 3, **BUCKET}),
    row("gpt_tied", 4, zero={"stage": 2, **BUCKET}),
    row("gpt", 2, tensor_parallel={}),
    row("gpt_wide", 2, tensor_parallel={"sequence": True}),
    row("gpt_wide", 2, tensor_parallel={"vocabulary": "parallel-loss"}),
    row("gpt_wide", 4, tensor_parallel={}, fsdp2={}),
    row("moe", 2, expert_parallel=EVERY_TOKEN, ddp={}),
    row("moe", 2, expert_parallel=EVERY_TOKEN, fsdp2={}),
    row("gpt", 2, context_parallel={}),
    row("gpt", 4, context_parallel={}, fsdp2={}),
    row("gpt", 2, pipeline={"schedule": "gpipe"}),
    row("gpt", 2, pipeline={}),
    row("gpt", 2, pipeline={"schedule": "interleaved", "virtual": 2}),
    row("gpt", 4, pipeline={"micro_batches": 2}, ddp={}),
    row("gpt", 2, pipeline={"schedule": "zero-bubble"}),
    row("gpt_tied", 2, pipeline={"schedule": "zero-bubble-v", "virtual": 2}),
    row("gpt_tied", 4, pipeline={"stages": 4}),
    row("gpt", 2, pipeline={}, activation_checkpointing={}),
    row("gpt", 2, pipeline={}, bf16_autocast={}, rounding=2e-2),
    row("gpt", 2, pipeline={"micro_batches": 2}, gradient_accumulation={"micro_batches": 2}),
    row("gpt", 4, pipeline={}, ddp={}),
    row("gpt", 4, pipeline={}, fsdp2={}),
    row("gpt", 4, pipeline={"schedule": "interleaved", "virtual": 2}, fsdp2={"sync": "last"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("RANKS", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [r for r in ROWS if options.only in r.name]
    if options.child:
        ranks, path = options.child
        _child([r for r in rows if r.plan.ranks == int(ranks)], Path(path))
        return
    if not options.page:
        truth = Truth()
        for ranks in sorted({r.plan.ranks for r in rows}):
            truth.measure([r for r in rows if r.plan.ranks == ranks], options.only)
    PAGE.write_text(page(_last_records()), encoding="utf-8")


class Truth:
    """Measures rows and records them; what rows share is found once."""

    def __init__(self) -> None:
        self.counter = CountingAllocator()
        self.counter.install()
        self.probes: dict[str, int | None] = {}
        self.losses: dict[str, list[float]] = {}

    def measure(self, rows: list[Row], only: str) -> None:
        for one, told in zip(rows, _on_ranks(rows, only), strict=True):
            record = self.record(one, told)
            with RECORDS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            print(_line(record), flush=True)

    def record(self, one: Row, told: list[dict[str, Any]]) -> dict[str, Any]:
        """``told``: what `_child` found on every rank."""
        job, ranks = load(one.ref), range(one.plan.ranks)
        traces = [trace(job, one.plan, rank=r, played=WHOLE) for r in ranks]
        profiles = [memory_profile(t, self.probed(t)) for t in traces]
        measured = [{k: min(run[k] for run in rank["runs"]) for k in rank["runs"][0]} for rank in told]
        losses = [statistics.fmean(step) for step in zip(*(rank["losses"] for rank in told), strict=True)]
        if one.job not in self.losses:
            self.losses[one.job] = _once(job, Plan(), World(layout=Layout()), self.counter)[1]
        ratio = max(abs(a / b - 1) for a, b in zip(losses, self.losses[one.job], strict=True))
        top = max(ranks, key=lambda r: measured[r]["peak"])
        op = _op_at(traces[top], profiles[top].peak_clock)
        return {
            "name": one.name,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "environment": dict(fingerprint()),
            "predicted": [{**p.phase_peak_bytes, "peak": p.peak_bytes} for p in profiles],
            "measured": measured,
            "runs": [rank["runs"] for rank in told],
            "peak_phase": profiles[top].peak_phase,
            "peak_op": op,
            "in_collective": op.startswith(("c10d", "_c10d_functional")),
            "loss_ratio": ratio,
            "losses_equal": ratio <= one.rounding,
            "sequence": _compared(traces, [rank["logs"] for rank in told]) if one.sequence else None,
        }

    def probed(self, traced: Trace) -> Calibration:
        """Scratch memory inside kernels, one operator at a time; collectives cannot be run alone."""
        signatures = {op.signature for op in traced.ops if "c10d" not in op.op}
        for signature in signatures - self.probes.keys():
            found = probe(signature, self.counter)
            self.probes[signature] = None if found is None else found[1]
        known = {s: peak for s in signatures if (peak := self.probes[s]) is not None}
        return Calibration(op_peak_bytes=known)


def _on_ranks(rows: list[Row], only: str) -> list[list[dict[str, Any]]]:
    """Of every row what `_child` found on every rank. All rows have as many ranks, which live for all."""
    ranks, port, children = rows[0].plan.ranks, free_port(), []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(ranks):
            env = {**os.environ, **rank_env(rank, ranks, port), "OMP_NUM_THREADS": "1"}
            argv = [sys.executable, __file__, "--only", only, "--child", str(ranks), f"{folder}/{rank}"]
            children.append(subprocess.Popen(argv, env=env))
        try:
            for child in children:
                assert child.wait(LIMIT_S * len(rows)) == 0, "a rank failed"
        finally:
            for child in children:
                child.kill()
        told = [map(json.loads, Path(f"{folder}/{r}").read_text().splitlines()) for r in range(ranks)]
        return [list(row) for row in zip(*told, strict=True)]


def _child(rows: list[Row], path: Path) -> None:
    """One rank: of every row a run to warm up, then those measured."""
    counter = CountingAllocator()
    counter.install()
    with joined(rows[0].plan) as first, path.open("w") as file:
        for one in rows:
            job, world = load(one.ref), make_world(one.plan, rank=first.rank, device="cpu")
            runs = [_once(job, one.plan, world, counter) for _ in range(1 + RUNS)][1:]
            logs = [_logged(job, one.plan, world, counter) for _ in range(RUNS * one.sequence)]
            told = {"runs": [r[0] for r in runs], "losses": runs[0][1], "logs": logs}
            file.write(json.dumps(told) + "\n")


def _once(
    job: Job, plan: Plan, world: World, counter: CountingAllocator
) -> tuple[dict[str, int], list[float]]:
    """(highest live bytes by phase, and "peak" over all; loss of each step) of one training run."""
    gc.collect()
    base, peaks, now, losses = counter.live_bytes(), {}, ["setup"], []

    def turn(phase: str) -> None:
        peaks[now[0]] = max(peaks.get(now[0], 0), counter.peak_bytes() - base)
        counter.reset_peak()
        now[0] = phase

    counter.reset_peak()
    torch.manual_seed(0)
    step = TrainingStep(job, plan, world=world)
    for index in range(STEPS):
        turn("between")
        part, terms = step.local(job.make_batch(index, 0))
        turn("between")
        loss, _ = step.run(part, lambda phase: turn(str(phase)), terms_per_rank=terms)
        losses.append(float(loss))
        turn("between")
        del part, loss
    step.close()
    del peaks["between"]
    return {**peaks, "peak": max(peaks.values())}, losses


def _logged(job: Job, plan: Plan, world: World, counter: CountingAllocator) -> list[int]:
    """Every allocation and free of two steps; the build is not among them."""
    gc.collect()
    step = TrainingStep(job, plan, world=world)
    part, terms = step.local(job.make_batch(0, 0))
    counter.start_log()
    for _ in range(2):
        step.run(part, terms_per_rank=terms)
    log = counter.stop_log()
    step.close()
    return [d for d in log.deltas_bytes if abs(d) > SCALAR_BYTES]


def _op_at(traced: Trace, clock: int) -> str:
    """The operator at work: the last one called."""
    index = bisect.bisect_left(traced.ops, clock, key=lambda op: op.clock) - 1
    return traced.ops[max(index, 0)].op


# -- the whole sequence of allocations and frees ------------------------------------------------------


def _compared(traces: list[Trace], logs: list[list[list[int]]]) -> dict[str, int]:
    """Over all ranks: events in the allocator's logs, and how many of them or of ours the other lacks, in
    the run of each rank where that is least."""
    different = sum(
        min(_differences(_events(t), g) for g in log) for t, log in zip(traces, logs, strict=True)
    )
    return {"events": sum(len(log[0]) for log in logs), "different": different}


def _events(traced: Trace) -> list[int]:
    """Sizes in order, frees negative, from the first forward on."""
    begin = next(s.start for s in traced.spans if s.phase is Phase.FORWARD)
    born = [(a.start, a.size_bytes) for a in traced.allocations if a.start >= begin]
    died = [(a.end, -a.size_bytes) for a in traced.allocations if a.end is not None and a.end >= begin]
    return [size for _, size in sorted(born + died) if abs(size) > SCALAR_BYTES]


def _differences(ours: list[int], theirs: list[int]) -> int:
    """Events to take out or put in to make one sequence of the other."""
    blocks = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    return len(ours) + len(theirs) - 2 * sum(b.size for b in blocks)


# -- the page -----------------------------------------------------------------------------------------


def _last_records() -> list[dict[str, Any]]:
    """Of each row that is still in the table, the last record."""
    by_name = {r["name"]: r for r in map(json.loads, RECORDS.read_text().splitlines())}
    return [by_name[r.name] for r in ROWS if r.name in by_name]


def errors(record: dict[str, Any]) -> dict[tuple[int, str], float]:
    """(rank, phase or "peak") -> predicted / measured - 1."""
    return {
        (rank, phase): predicted[phase] / measured[phase] - 1
        for rank, (predicted, measured) in enumerate(
            zip(record["predicted"], record["measured"], strict=True)
        )
        for phase in (*PHASES, "peak")
        if measured.get(phase)
    }


def _line(record: dict[str, Any]) -> str:
    found = errors(record)
    worst = {p: max((e for (_, q), e in found.items() if q == p), key=abs) for p in (*PHASES, "peak")}
    peak = max(m["peak"] for m in record["measured"])
    sequence = record["sequence"] or {}
    return (
        f"| {record['name']} | {format_bytes(peak)} | "
        + " | ".join(f"{100 * worst[p]:+.3f} %" for p in ("peak", *PHASES))
        + f" | {record['peak_phase']}{', ' + record['peak_op'] if record['in_collective'] else ''} "
        f"| {record['loss_ratio']:.1e}{'' if record['losses_equal'] else ' **differs**'} "
        f"| {' of '.join(str(sequence[k]) for k in ('different', 'events') if sequence)} |"
    )


def page(records: list[dict[str, Any]]) -> str:
    every = [abs(e) for r in records for e in errors(r).values()]
    peaks = [abs(e) for r in records for (_, phase), e in errors(r).items() if phase == "peak"]
    environment = records[-1]["environment"]
    inside, equal = (sum(r[k] for r in records) for k in ("in_collective", "losses_equal"))
    facts: tuple[str, ...] = (
        f"{environment.get('processor')}, torch {environment.get('torch')}, gloo, a process a rank",
        f"{len(records)} configurations; each error is that of the worst rank",
        f"peaks: median {_percent(statistics.median(peaks))}, worst {_percent(max(peaks))}",
        f"phases of ranks: median {_percent(statistics.median(every))}, worst {_percent(max(every))}",
        f"{inside} peaks lie inside a collective, which is then named",
        f"{equal} of {len(records)} train with the loss of one process",
        "sequence: allocations and frees of two steps on all ranks that trace and allocator do not share",
        f"(those of {SCALAR_BYTES} B and less, scalars inside operators, are left out)",
    )
    columns = (
        "configuration|measured peak|peak|setup|forward|backward|optimizer|where|loss ratio - 1|sequence"
    )
    source = "`python benchmarks/memory_truth_ranks.py` from `benchmarks/records/memory_truth_ranks.jsonl`"
    lines = [
        "# Memory on several ranks: predicted against measured",
        f"Generated by {source}; do not edit.",
        "\n".join(f"- {fact}" for fact in facts),
        "\n".join([f"| {columns.replace('|', ' | ')} |", "|---" * 10 + "|", *map(_line, records)]),
    ]
    return "\n\n".join(lines) + "\n"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.3f} %"


if __name__ == "__main__":
    main()
