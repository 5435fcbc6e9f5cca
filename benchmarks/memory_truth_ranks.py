"""Predicted against measured memory on several ranks, on every rank and in every phase.

    python benchmarks/memory_truth_ranks.py [--only WORD]    measure, record, write the page
    python benchmarks/memory_truth_ranks.py --page           the page from the records only

Every rank is a process of its own, joined over gloo; the counting allocator in it is the truth. Each row is
trained several times, with gloo's threads first and as they come (rank_measure.py says why), and the record
keeps every repeat. Every number in the page comes from benchmarks/records/memory_truth_ranks.jsonl, of each
row the last record.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rank_measure import train
from rank_page import page
from sequences import first_difference, predicted_sequence

from memfit.cost.memory import memory_profile
from memfit.jobs.registry import load
from memfit.runtime.counting_allocator import CountingAllocator
from memfit.runtime.op_benchmark import ProbeResult, probe
from memfit.runtime.ranks import free_port, rank_env
from memfit.store.environment import fingerprint
from memfit.techniques.rank_mesh import Layout, World, make_world
from memfit.techniques.registry import make_use
from memfit.trace.fake_process_group import late_collectives
from memfit.trace.tracer import trace
from memfit.types.job import Job, JobRef
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.trace import Trace
from memfit.worker.train import join_world

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "records" / "memory_truth_ranks.jsonl", HERE / "memory_truth_ranks.md"
SETTLED, AS_THEY_COME, LIMIT_S = 3, 3, 120.0  # repeats; for one row
# Memory goes back to a pool and not to the system, which takes long and keeps gloo's threads from it.
QUICK_FREES = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}
WHOLE = 64  # micro-batches: play them all
SCALAR_BYTES = 64  # numbers wrapped as tensors inside operators: no trace sees them


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``rounding``: how far the loss may be from one process's."""

    name: str
    job: str
    plan: Plan
    rounding: float = 1e-5

    @property
    def ref(self) -> JobRef:
        return JobRef(spec=f"{HERE / 'rank_jobs.py'}:{self.job}")


ONCE = {"sync": "last", "reshard": False}  # gathered and reduced


def row(job: str, ranks: int, *, rounding: float = 1e-5, **uses: Any) -> Row:
    """``ddp={"bucket_mib": 1}`` uses that technique; underscores stand for hyphens."""
    told = {k.replace("_", "-"): v for k, v in uses.items()}
    parts = (f"{k}({', '.join(f'{n}={v}' for n, v in given.items())})" for k, given in told.items())
    name = f"{job}, {ranks} ranks: {' + '.join(parts).replace('()', '')}"
    plan = Plan(uses=tuple(make_use(k, given) for k, given in told.items()), ranks=ranks)
    return Row(name=name, job=job, plan=plan, rounding=rounding)


FOUR = {"micro_batches": 4}
BF16 = {"precision": "bf16"}
EVERY_TOKEN = {"capacity_percent": 400}  # none is dropped, so the loss is that of one process
BUCKET = {"reduce_bucket_elements": 1_000_000}
WINDOW = {"live_elements": 1_000_000, "prefetch_elements": 500_000}
ROWS = (
    row("gpt", 2, ddp={}),
    row("gpt", 2, ddp={"bucket_view": False}),
    row("gpt_wide", 2, ddp={"bucket_mib": 1}),
    row("gpt_wide", 2, ddp={"bucket_mib": 1, "bucket_view": False}),
    row("gpt_wide", 2, ddp={"bucket_mib": 100}),
    row("convnet", 2, ddp={}, rounding=float("inf")),  # each rank normalises by its own batch statistics
    row("gpt_tied", 2, ddp={}),
    row("mlp", 4, ddp={}),
    row("mlp", 2, ddp={"bucket_mib": 1, "bucket_view": False}),
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
    row("mlp", 2, fsdp2={}),
    row("mlp", 2, fsdp2={}, gradient_accumulation=FOUR),
    row("mlp_odd", 3, fsdp2={}),
    row("mlp", 4, fsdp2={"reshard": False}),
    row("mlp", 4, fsdp2={"replicas": 2}),
    row("gpt_wide", 4, fsdp2={"replicas": 2}),
    row("gpt", 4, fsdp2={"replicas": 2, **BF16}, rounding=2e-2),
    row("mlp", 2, zero={"stage": 1, **BUCKET}),
    row("mlp", 2, zero={"stage": 2, **BUCKET}),
    row("mlp", 2, zero={"stage": 3, **BUCKET}),
    row("gpt", 2, zero={"stage": 1, **BUCKET}, gradient_accumulation=FOUR),
    row("gpt", 2, zero={"stage": 2, "overlap": True, **BUCKET}, gradient_accumulation=FOUR),
    row("gpt_wide", 2, zero={"stage": 2, **BUCKET, **BF16}, rounding=2e-2),
    row("gpt_wide", 2, zero={"stage": 2, "offload": "optimizer", **BUCKET}),
    row("gpt_wide", 2, zero={"stage": 3, **BUCKET, **BF16}, rounding=2e-2),
    row("gpt_wide", 2, zero={"stage": 3, "live_elements": 1_000_000, "prefetch_elements": 500_000, **BUCKET}),
    row("gpt", 2, zero={"stage": 3, **BUCKET}, activation_checkpointing={}, gradient_accumulation=FOUR),
    row("mlp_odd", 3, zero={"stage": 3, **BUCKET}),
    row("gpt_tied", 4, zero={"stage": 2, **BUCKET}),
    row("gpt_wide", 2, zero={"stage": 3, "offload": "parameters", **WINDOW, **BUCKET}),
    row("translator", 2, zero={"stage": 3, **WINDOW, **BUCKET}, activation_checkpointing={}),
    row("gpt_wide", 2, sharded_ddp={"reduce_buffer_elements": 1_000_000}),
    row(
        "gpt", 4, sharded_ddp={"reduce_buffer_elements": 100_000}, gradient_accumulation={"micro_batches": 2}
    ),
    row("mlp_odd", 3, sharded_ddp={}),
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
    row("gpt", 4, pipeline={"schedule": "interleaved", "virtual": 2}, fsdp2=ONCE),
    row("gpt", 4, pipeline={}, fsdp2=ONCE),
    # Tried once predictions held above: three of them did not run or parted, and what was wrong was mended.
    row("pyramid", 2, ddp={"bucket_mib": 1}, bf16_autocast={}, rounding=float("inf")),
    row("pyramid", 2, fsdp2={}, sgd={}, rounding=float("inf")),
    row("pyramid", 2, zero={"stage": 3, **BUCKET}, rounding=float("inf")),
    row("lstm", 2, ddp={}),
    row("lstm", 2, fsdp2={}),
    row("translator", 2, ddp={}),
    row("translator", 2, fsdp2={"units": "parts"}, activation_checkpointing={}),
    row("llama_uneven", 2, ddp={}),
    row("llama_frozen", 2, fsdp2=BF16, rounding=2e-2),
    row("llama_frozen", 2, zero={"stage": 3, **BUCKET}),
    row("llama", 2, fsdp2={}, lora={"rank": 4}, rounding=float("inf")),
    row(
        "llama",
        2,
        ddp={"sync": "last"},
        gradient_accumulation={"micro_batches": 3},
        adafactor={},
        rounding=1e-2,
    ),
    row("llama", 2, tensor_parallel={"sequence": True, "vocabulary": "gathered"}),
    row("llama", 4, tensor_parallel={"sequence": True}, context_parallel={}),
    row("llama", 4, context_parallel={"degree": 4}),
    row("llama", 4, context_parallel={}, fsdp2={"reshard": False}),
    row("llama", 2, pipeline={"schedule": "interleaved", "virtual": 2}, activation_checkpointing={}),
    row("llama", 4, pipeline={"micro_batches": 2}, tensor_parallel={}),
    row("moe", 4, expert_parallel={"degree": 4, "capacity_percent": 125}, fsdp2={}, rounding=float("inf")),
    row("folds", 2, axial_parallel={}),
    row("folds", 2, axial_parallel={}, ddp={}),
    row("folds", 2, axial_parallel={}, fsdp2={}, activation_checkpointing={}),
    row("folds", 2, axial_parallel={}, ddp={}, bf16_autocast={}, rounding=2e-2),
    row("folds", 4, axial_parallel={"degree": 4}, ddp={}),
    row("folds", 4, axial_parallel={}, fsdp2={}, rounding=float("inf")),  # dropout of each pair's own
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
        self.probes: dict[str, ProbeResult | None] = {}
        self.losses: dict[str, list[float]] = {}

    def measure(self, rows: list[Row], only: str) -> None:
        for one, told in zip(rows, _on_ranks(rows, only), strict=True):
            record = self.record(one, told)
            with RECORDS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            print(f"{record['name']}: sequence {record['sequence']['verdict']}", flush=True)

    def record(self, one: Row, told: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """``told``: of every rank, its repeats."""
        job, ranks = load(one.ref), range(one.plan.ranks)
        traces = [trace(job, one.plan, rank=r, max_micro_batches=WHOLE) for r in ranks]
        with late_collectives():
            latest = [trace(job, one.plan, rank=r, max_micro_batches=WHOLE) for r in ranks]
        logs = [[repeat.pop("second_step") for repeat in repeats] for repeats in told]
        ratio = self.loss_ratio(one, job, told)
        return {
            "name": one.name,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "environment": dict(fingerprint()),
            "predicted": [self.peaks(t) for t in traces],
            "high": [self.peaks(t) for t in latest],
            "repeats": told,
            "loss_ratio": ratio,
            "losses_equal": ratio <= one.rounding,
            "sequence": self.compared(traces, logs),
        }

    def peaks(self, traced: Trace) -> dict[str, int]:
        profile = memory_profile(traced, self.probed(traced))
        return {**profile.phase_peak_bytes, "peak": profile.peak_bytes}

    def probed(self, traced: Trace) -> Calibration:
        """Scratch memory inside kernels, one operator at a time; collectives cannot be run alone."""
        signatures = {op.signature for op in traced.ops if "c10d" not in op.op}
        self.probes |= {s: probe(s, self.counter) for s in signatures - self.probes.keys()}
        known = {s: found for s in signatures if (found := self.probes[s]) is not None}
        return Calibration(
            op_peak_bytes={s: p.peak_bytes for s, p in known.items()},
            op_kept_bytes={s: p.kept_bytes for s, p in known.items() if p.kept_bytes},
        )

    def loss_ratio(self, one: Row, job: Job, told: list[list[dict[str, Any]]]) -> float:
        """How far the mean loss of the ranks is from one process's, in the worst step."""
        if one.job not in self.losses:
            self.losses[one.job] = train(job, Plan(), World(layout=Layout()), self.counter).losses
        steps = zip(*(repeats[0]["losses"] for repeats in told), strict=True)
        pairs = zip(map(statistics.fmean, steps), self.losses[one.job], strict=True)
        return max(abs(ours / alone - 1) for ours, alone in pairs)

    def compared(self, traces: list[Trace], logs: list[list[list[int]]]) -> dict[str, Any]:
        """The second step's whole sequence against each repeat's log; the verdict is the best that every rank
        reaches in one of its repeats."""
        ranks = []
        for traced, repeats in zip(traces, logs, strict=True):
            ours = predicted_sequence(traced, self.probed(traced))
            strict, loose = (
                [first_difference(ours, log, above=SCALAR_BYTES, strictly=s) for log in repeats]
                for s in (True, False)
            )
            ranks.append(
                {
                    "events": sum(abs(size) > SCALAR_BYTES for size in repeats[0]),
                    "equal": strict.count(None),
                    "equal_but_for_order_of_frees": loose.count(None),
                    "first_difference": str(max((d for d in loose if d), key=lambda d: d.index, default="")),
                }
            )
        verdict = "differs"
        if all(r["equal"] for r in ranks):
            verdict = "equal"
        elif all(r["equal_but_for_order_of_frees"] for r in ranks):
            verdict = "order of frees"
        return {"verdict": verdict, "ranks": ranks}


def _on_ranks(rows: list[Row], only: str) -> list[list[list[dict[str, Any]]]]:
    """Of every row, every rank's repeats. All rows have as many ranks, which live for all."""
    ranks, port, children = rows[0].plan.ranks, free_port(), []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(ranks):
            env = {**os.environ, **rank_env(rank, ranks, port), **QUICK_FREES, "OMP_NUM_THREADS": "1"}
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
    """One rank: of every row a training to warm up, then those measured."""
    counter = CountingAllocator()
    counter.install()
    with join_world(rows[0].plan) as first, path.open("w") as file:
        for one in rows:
            job, world = load(one.ref), make_world(one.plan, rank=first.rank, device="cpu")
            train(job, one.plan, world, counter)
            settle = [True] * SETTLED + [False] * AS_THEY_COME
            repeats = [train(job, one.plan, world, counter, settle=s) for s in settle]
            file.write(json.dumps([dataclasses.asdict(r) for r in repeats]) + "\n")
            file.flush()


def _last_records() -> list[dict[str, Any]]:
    """Of each row that is still in the table, the last record."""
    by_name = {r["name"]: r for r in map(json.loads, RECORDS.read_text().splitlines())}
    return [by_name[r.name] for r in ROWS if r.name in by_name]


if __name__ == "__main__":
    main()
