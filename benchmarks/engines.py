"""Every engine on the same plan: losses against one native process, peaks of every rank against predictions.

    python benchmarks/engines.py [--only WORD]    train, record, write the page
    python benchmarks/engines.py --page           the page from the records only

Each row starts the worker as `memfit run --engine` does, one process a rank over gloo, 20 steps, with the
engine's configuration beside it. The reference trains plainly in one native process from the same weights and
data. Peaks are the counting allocator's, in the worker; predictions are traces of the plan for the engine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from memfit.cost.memory import memory_profile
from memfit.engines.environment import load_environment
from memfit.engines.registry import engine, render
from memfit.jobs.registry import load
from memfit.planner.request import Request, make_predictor
from memfit.runtime.child_process import run
from memfit.runtime.counting_allocator import CountingAllocator
from memfit.runtime.local_machine import this_machine
from memfit.runtime.op_benchmark import CANNOT_RUN, CallMemory, measure_call
from memfit.runtime.ranks import run_ranks
from memfit.store.environment import fingerprint
from memfit.techniques.registry import make_use
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.result import Measurement, OutcomeKind

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "records" / "engines.jsonl", HERE / "engines.md"
STEPS, ROUNDING = 20, 1e-5
SMALL = {"reduce_bucket_elements": 1_000_000}


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    engine: str
    job: str
    uses: Mapping[str, Mapping[str, Any]]
    ranks: int = 2
    bits: bool = False  # losses must be the reference's bits
    low: bool = False  # bf16: against other seeds of the reference
    short: bool = False  # also a test
    reference: str = ""  # the job natively trained beside it; "": the row's own

    @property
    def plan(self) -> Plan:
        return Plan(uses=tuple(make_use(n, k) for n, k in self.uses.items()), ranks=self.ranks)

    @property
    def name(self) -> str:
        told = " + ".join(n + _knobs(k) for n, k in self.uses.items()) or "plain"
        return f"{self.engine}, {self.job}, {self.ranks} rank{'s'[: self.ranks - 1]}: {told}"

    @property
    def fixed_bytes(self) -> int:
        """Buffers of a size that the model does not decide, which would hide errors: DeepSpeed's buckets."""
        zero = self.plan.get("zero")
        if zero is None:
            return 0
        width = 2 if zero.settings["precision"] == "bf16" else 4
        count = 2 if zero.settings["overlap"] and int(zero.settings["stage"]) < 3 else 1
        return count * width * int(zero.settings["reduce_bucket_elements"])


def _knobs(knobs: Mapping[str, Any]) -> str:
    return f"({', '.join(f'{k}={v}' for k, v in knobs.items())})" if knobs else ""


def rows() -> Iterator[Row]:
    for name in ("native", "accelerate", "deepspeed", "fairscale"):
        yield Row(name, "gpt", {}, ranks=1, bits=True)
    for knobs in ({"stage": 1}, {"stage": 2}, {"stage": 3, "memory_efficient_linear": False}):
        yield Row(
            "deepspeed", "gpt", {"zero": {**knobs, **SMALL}}, ranks=1, bits=True, short=knobs["stage"] == 3
        )
    for job in ("mlp", "gpt"):  # tests/cpu tests the native ones
        for name in ("native", "accelerate"):
            yield Row(name, job, {"ddp": {}}, short=(name, job) == ("accelerate", "mlp"))
            yield Row(name, job, {"fsdp2": {}})
        for stage in (1, 2, 3):
            yield Row("deepspeed", job, {"zero": {"stage": stage, **SMALL}}, short=job == "mlp" and stage > 1)
        yield Row("fairscale", job, {"sharded-ddp": {}}, short=job == "mlp")
    yield Row("native", "gpt", {"tensor-parallel": {}})
    yield Row("native", "gpt", {"pipeline": {"stages": 2}})
    yield Row("native", "gpt", {"fsdp2": {}, "activation-checkpointing": {}})
    yield Row("accelerate", "gpt", {"fsdp2": {}, "activation-checkpointing": {}}, short=True)
    yield Row("accelerate", "gpt", {"ddp": {"sync": "last"}, "gradient-accumulation": {"micro_batches": 2}})
    yield Row("accelerate", "gpt", {"fsdp2": {"precision": "bf16"}}, low=True)
    for stage in (1, 2, 3):
        yield Row("accelerate", "gpt", {"zero": {"stage": stage, **SMALL}}, short=stage == 2)
    yield Row("accelerate", "gpt", {"zero": {"stage": 1, **SMALL}}, ranks=1, bits=True)
    yield Row("deepspeed", "gpt", {"zero": {"stage": 2, "precision": "bf16", **SMALL}}, low=True)
    split = {"gradient-accumulation": {"micro_batches": 2}}
    yield Row("deepspeed", "gpt", {"zero": {"stage": 2, **SMALL}, **split})
    yield Row("deepspeed", "gpt", {"zero": {"stage": 3, **SMALL}, "activation-checkpointing": {}})
    yield Row("deepspeed", "mlp", {"zero": {"stage": 2}})
    yield Row("fairscale", "gpt", {"sharded-ddp": {}, "activation-checkpointing": {}})
    yield Row("megatron", "gpt_house", {}, ranks=1, bits=True, short=True, reference="gpt_sequence_first")
    for sequence in (False, True):
        cut = {"sequence": sequence, "vocabulary": "gathered"}
        yield Row("megatron", "gpt_house", {"tensor-parallel": cut}, short=True)
    yield Row("colossalai", "gpt", {}, ranks=1, bits=True)
    yield Row("colossalai", "mlp", {"ddp": {}}, short=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.page:
        bench = Bench()
        for row in rows():
            if options.only in row.name:
                record = bench.record(row)
                with RECORDS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                print(f"{row.name}: {_verdict(record)}", flush=True)
    PAGE.write_text(page(_last()), encoding="utf-8")


class Bench:
    """Trains rows; what they share is found once."""

    def __init__(self) -> None:
        self.counter = CountingAllocator()
        self.counter.install()
        self.probes: dict[str, CallMemory | None] = {}
        self.references: dict[tuple[str, ...], list[float]] = {}

    def record(self, row: Row) -> dict[str, Any]:
        found: dict[str, Any] = {
            "name": row.name,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "environment": dict(fingerprint()),
            "bits": row.bits,
            "low": row.low,
            "fixed_bytes": row.fixed_bytes,
        }
        chosen = engine(row.engine)
        why = "; ".join(chosen.refusals(row.plan)) or chosen.probe().problem
        if why:
            return {**found, "why_not": why}
        spec = spec_of(row)
        seen = run_ranks(render(spec)) if row.ranks > 1 else (run(render(spec), on_event=_silent),)
        failed = [m.reason for m in seen if m.outcome is not OutcomeKind.OK]
        if failed:
            return {**found, "why_not": f"failed: {failed[0][-400:]}"}
        return {
            **found,
            "version": chosen.probe().version,
            "losses": _mean(seen),
            "reference": self.reference(row, 0),
            "other_seeds": [self.reference(row, seed) for seed in (1, 2, 3)] if row.low else [],
            "peaks": [m.peak_bytes for m in seen],
            "phases": [dict(m.phase_peak_bytes) for m in seen],
            "predicted": [self.predicted(row, spec, rank) for rank in range(row.ranks)],
        }

    def reference(self, row: Row, seed: int) -> list[float]:
        """Losses of one native process trained plainly, in the engine's own environment where it has one: its
        torch is another."""
        has_own = load_environment(row.engine) is not None
        config = render(spec_of(dataclasses.replace(row, ranks=1, uses={}))) if has_own else None
        job = row.reference or row.job
        key = (job, str(seed), config.argv[0] if config else "")
        if key not in self.references:
            beside = dataclasses.replace(spec_of(dataclasses.replace(row, job=job)), plan=Plan(), seed=seed)
            plain = render(dataclasses.replace(beside, engine="native"))
            if config:
                argv = (config.argv[0], *plain.argv[1:])
                plain = dataclasses.replace(plain, argv=argv, env={**plain.env, **config.env})
            done = run(plain, on_event=_silent)
            assert done.outcome is OutcomeKind.OK, done.reason
            self.references[key] = list(done.losses)
        return self.references[key]

    def predicted(self, row: Row, spec: RunSpec, rank: int) -> dict[str, int]:
        request = Request(job_ref=spec.job, machine=this_machine("world"), engine=row.engine)
        traced = make_predictor(request)[1].trace(row.plan, rank)
        signatures = {op.signature for op in traced.ops if "c10d" not in op.op}
        self.probes |= {s: self.probe(s) for s in signatures - self.probes.keys()}
        known = {s: p for s in signatures if (p := self.probes[s]) is not None}
        profile = memory_profile(
            traced,
            Calibration(
                op_peak_bytes={s: p.peak_bytes for s, p in known.items()},
                op_kept_bytes={s: p.kept_bytes for s, p in known.items() if p.kept_bytes},
            ),
        )
        return {**profile.phase_peak_bytes, "peak": profile.peak_bytes}

    def probe(self, signature: str) -> CallMemory | None:
        with contextlib.suppress(*CANNOT_RUN):
            return measure_call(signature, self.counter)[1]
        return None


def spec_of(row: Row) -> RunSpec:
    ref = JobRef(spec=f"{HERE / 'rank_jobs.py'}:{row.job}")
    return RunSpec(
        name=row.name,
        role="benchmark",
        job=ref,
        plan=row.plan,
        engine=row.engine,
        seed=0,
        steps=STEPS,
        batch_size=load(ref).batch_size,
        threads=1,
        evaluate=False,
    )


def _silent(event: Mapping[str, object]) -> None:
    """Nobody is watching."""


def _mean(seen: tuple[Measurement, ...]) -> list[float]:
    return [statistics.fmean(step) for step in zip(*(m.losses for m in seen), strict=True)]


# -- the page ------------------------------------------------------------------------------------------


def _last() -> list[dict[str, Any]]:
    lines = RECORDS.read_text(encoding="utf-8").splitlines()
    found = {record["name"]: record for record in map(json.loads, lines)}
    return [found[row.name] for row in rows() if row.name in found]


def _apart(record: dict[str, Any]) -> float:
    """How far the losses are from the reference's, in the worst step."""
    pairs = zip(record["losses"], record["reference"], strict=True)
    return max(abs(ours / theirs - 1) for ours, theirs in pairs)


def _band(record: dict[str, Any]) -> float:
    """How far other seeds of the reference are from it, in their worst steps, the nearest of them."""
    return min(
        max(abs(o / r - 1) for o, r in zip(other, record["reference"], strict=True))
        for other in record["other_seeds"]
    )


def agrees(record: dict[str, Any]) -> bool:
    if record["bits"]:
        return bool(record["losses"] == record["reference"])
    return _apart(record) <= (_band(record) if record["low"] else ROUNDING)


def errors(record: dict[str, Any]) -> tuple[float, float]:
    """Of the worst rank: (of the peak, of what is left of it without buffers of fixed size)."""
    pairs = [(p["peak"], m) for p, m in zip(record["predicted"], record["peaks"], strict=True)]
    fixed = record["fixed_bytes"]
    whole = max((p / m - 1 for p, m in pairs), key=abs)
    rest = max(((p - m) / max(m - fixed, 1) for p, m in pairs), key=abs)
    return whole, rest if fixed < min(m for _, m in pairs) else float("nan")


def _verdict(record: dict[str, Any]) -> str:
    if "why_not" in record:
        return f"not run: {record['why_not']}"
    whole, rest = errors(record)
    told = "losses agree" if agrees(record) else f"losses differ by {_apart(record):.1e}"
    return f"{told}; peak {100 * whole:+.3f} %, without fixed buffers {100 * rest:+.3f} %"


def page(records: list[dict[str, Any]]) -> str:
    run_, not_run = [r for r in records if "why_not" not in r], [r for r in records if "why_not" in r]
    wrong = [errors(r) for r in run_]
    worst = max((abs(w) for w, _ in wrong), default=0.0)
    rests = [abs(r) for _, r in wrong if r == r]
    agree, most = sum(map(agrees, run_)), max(rests, default=0.0)
    lines = [
        "# Engines: the same plan, the same losses, the peak that was predicted",
        "",
        "Generated by `python benchmarks/engines.py` from `benchmarks/records/engines.jsonl`; do not edit.",
        "",
        f"- {_where(run_)}",
        f"- {len(run_)} rows trained {STEPS} steps over gloo, {agree} with the reference's losses",
        f"- {len(not_run)} rows not run",
        f"- peaks of ranks: worst error {100 * worst:.3f} %",
        f"- of what is left without buffers of fixed size, DeepSpeed's buckets: {100 * most:.3f} %",
        "",
        "Losses are the mean over ranks beside one native process, plainly trained. *Bits* are the same at",
        f"one rank; fp32 is within {ROUNDING:g} of it in every step; bf16 is nearer than another seed of the",
        "reference comes. Peaks are of the rank that is furthest off. Colossal-AI's environment has an older",
        "torch, and its reference is trained by that. Megatron-core keeps another layout and",
        "adds biases apart: at one rank its reference is the same model in plain torch with its sums in that",
        "order (`gpt_sequence_first` in `benchmarks/rank_jobs.py`).",
        "",
        "| engine, job, ranks: plan | version | losses | apart | peak | predicted | without fixed buffers |",
        "|---|---|---|--:|--:|--:|--:|",
        *map(_line, run_),
    ]
    if not_run:
        lines += ["", "Not run here:", "", *(f"- {r['name']}: {r['why_not']}" for r in not_run)]
    return "\n".join(lines) + "\n"


def _where(records: list[dict[str, Any]]) -> str:
    environments = [r["environment"] for r in records]
    machines = sorted({f"{e['processor']}, {e['cores']} cores, torch {e['torch']}" for e in environments})
    dates = sorted(r["created"] for r in records)
    return f"{'; '.join(machines)}; {dates[0]} to {dates[-1]}" if records else "nothing was run"


def _line(record: dict[str, Any]) -> str:
    whole, rest = errors(record)
    kind = "bits" if record["bits"] else "bf16 band" if record["low"] else "fp32"
    told = kind if agrees(record) else f"{kind}: **differ**"
    left = "" if not record["fixed_bytes"] else "-" if rest != rest else f"{100 * rest:+.3f} %"
    peak = max(record["peaks"]) / 2**20
    return (
        f"| {record['name']} | {record['version']} | {told} | {_apart(record):.1e} | {peak:.2f} MiB"
        f" | {100 * whole:+.3f} % | {left} |"
    )


if __name__ == "__main__":
    main()
