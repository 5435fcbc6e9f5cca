"""Predicted against measured memory of real training steps: architectures x techniques, one process.

    python benchmarks/memory_truth.py [--csv FILE] [--json FILE]   measure, record, write the page
    python benchmarks/memory_truth.py --only NAME ...              some architectures; nothing is recorded
    python benchmarks/memory_truth.py --first                      the third set's first run, recorded as such
    python benchmarks/memory_truth.py --science                    built-in jobs, recorded as such
    python benchmarks/memory_truth.py --page                       the page from the records only

A prediction is a trace on fake tensors plus the peaks of kernels run alone ("probe"); beside it stands the
same without any probe. The truth is the counting CPU allocator over all threads, in a child process that
never traces. Every number in the page comes from benchmarks/records/memory_truth.jsonl.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from architectures import FIRST_SET, SECOND_SET, THIRD_SET
from memory_truth_page import LOOSE, PHASES, THIRD, line, page, science, table
from sequences import equal_but_for_scratch, first_difference, predicted_sequence

from memfit.cost.memory import memory_profile
from memfit.jobs.registry import load
from memfit.jobs.training_step import TrainingStep
from memfit.planner.plan_space import usable
from memfit.planner.request import job_facts
from memfit.runtime.counting_allocator import CountingAllocator
from memfit.runtime.op_benchmark import ProbeResult, probe
from memfit.store.environment import fingerprint
from memfit.techniques.registry import make_use
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job, JobRef
from memfit.types.machine import Calibration
from memfit.types.plan import Accuracy, Plan, Use, use
from memfit.types.trace import Trace

RECORDS = Path(__file__).parent / "records" / "memory_truth.jsonl"
PAGE = Path(__file__).parent / "memory_truth.md"
STEPS = 2
SCIENCE = {  # built-in jobs and the batch they are measured with
    "alphafold2": 2,
    "protein-ss": 8,
    "protein-lm": 4,
    "weather": 4,
    "molecules": 16,
    "potential": 8,
    "genome": 4,
    "segmentation3d": 2,
    "char-lm": 8,
}
SEQUENCE_BYTES = 64  # blocks this small are numbers wrapped as tensors; compared apart

AUTOCAST, MASTER = use("bf16-autocast"), use("bf16-parameters", rounding="master")
STOCHASTIC = use("bf16-parameters", rounding="stochastic")
FULL, SECOND = use("activation-checkpointing", every=1), use("activation-checkpointing", every=2)
MATMUL, ATTENTION = (use("selective-checkpointing", keep=k) for k in ("matmul", "attention"))
CHUNKED, SMALL = use("chunked-cross-entropy", chunks=4), use("adamw-8bit")
ADAFACTOR, SGD, INSIDE = use("adafactor"), use("sgd"), use("optimizer-in-backward")
LORA, QLORA = use("lora", rank=4), use("qlora", rank=4)
DISK = use("activation-offload", to="disk", minimum_kib=16)


def parts(count: int) -> Use:
    return use("gradient-accumulation", micro_batches=count)


# Beside plain training, which every architecture has.
PLANS: dict[str, tuple[tuple[Use, ...], ...]] = {
    "esm": ((AUTOCAST,), (FULL,), (MATMUL,), (parts(3),), (DISK,), (AUTOCAST, FULL, SMALL)),
    "gpt2": ((AUTOCAST,), (FULL,), (CHUNKED,), (INSIDE,), (ADAFACTOR,), (CHUNKED, AUTOCAST, FULL)),
    "llama-gqa": ((MASTER,), (FULL,), (CHUNKED,), (parts(2),), (LORA,), (QLORA, AUTOCAST)),
    "bert-dropout": ((AUTOCAST,), (FULL,), (parts(3), AUTOCAST), (ATTENTION,)),
    "t5": ((FULL,), (ADAFACTOR,), (AUTOCAST,)),
    "vit": ((AUTOCAST,), (SECOND,), (SGD,)),
    "resnet": ((FULL,), (SGD,), (parts(4),)),
    "unet": ((FULL,), (INSIDE,)),
    "conv3d": ((ADAFACTOR,),),
    "lstm": ((SGD,), (parts(2),)),
    "gru": ((SMALL,),),
    "lstm-packed": ((AUTOCAST,), (parts(2),)),
    "mamba-scan": ((FULL,), (MASTER,)),
    "tied-embedding": ((CHUNKED,), (parts(4),), (STOCHASTIC,), (SMALL, INSIDE), (ADAFACTOR,)),
    "custom-function": ((FULL,), (AUTOCAST,), (MATMUL,), (DISK,)),
    "compiled-aot-eager": ((SGD,),),
    "gnn-radius": ((SGD,),),
    "force-field": ((INSIDE,),),
    "fno": ((FULL,), (SGD,)),
    "evoformer": ((FULL,), (AUTOCAST,), (AUTOCAST, FULL)),
    "moe-dense": ((FULL,), (AUTOCAST,), (MASTER,)),
    "moe-index": ((FULL,), (SMALL,)),
    "multi-input": ((AUTOCAST,), (parts(4),)),
    "swin": ((FULL,), (AUTOCAST,)),
    "perceiver": ((AUTOCAST,),),
    "convnext": ((AUTOCAST,),),
    "set-transformer": ((FULL,),),
    "graph-transformer": ((AUTOCAST,),),
    "mlp-mixer": ((FULL,),),
    "gru-attention": ((parts(2),),),
    "glow": ((AUTOCAST,),),
    "diffusion-ema": ((AUTOCAST,),),
    "dlrm": ((SGD,),),
    "selective-cumsum": ((FULL,), (AUTOCAST,)),
    "equivariant-forces": ((INSIDE,),),
    "swav": ((AUTOCAST,),),
    "fno-3d": ((FULL,),),
    "detr": ((AUTOCAST,),),
    "wgan-gp": ((SGD,),),
    "conformer-ctc": ((FULL,),),
    "masked-autoencoder": ((FULL,), (AUTOCAST,)),
    "nerf": ((parts(2),),),
    "pde-rollout": ((parts(2),),),
}


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    if options.measure:
        print(json.dumps(measured(options.measure)))
        return
    if not options.page:
        named = [make().name for make in THIRD_SET] if options.first else options.only
        record = run(list(SCIENCE) if options.science else named)
        _write(record["rows"], options)
        if options.only:
            print(table(record["rows"]))
            return
        with RECORDS.open("a", encoding="utf-8") as file:
            marks = {"first_run": True} if options.first else {"science": True} if options.science else {}
            file.write(json.dumps(record | marks) + "\n")
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    first = next((r for r in records if r.get("first_run")), None)
    of_jobs = next((r for r in reversed(records) if r.get("science")), None)
    main_run = [r for r in records if not r.get("first_run") and not r.get("science")][-1]
    text = page(main_run, first) + "".join(f"{line}\n" for line in science(of_jobs))
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE.read_text())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures; nothing is recorded")
    parser.add_argument("--first", action="store_true", help="the third set, recorded as its first run")
    parser.add_argument("--science", action="store_true", help="the built-in jobs, recorded as such")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--measure", metavar="NAME", help=argparse.SUPPRESS)
    return parser.parse_args()


def cases(name: str) -> list[Plan]:
    if name in SCIENCE:
        return _every_technique(science_job(name))
    return [Plan(uses=uses) for uses in ((), *PLANS.get(name, ()))]


def science_job(name: str) -> Job:
    return dataclasses.replace(load(JobRef(spec=name, batch=SCIENCE[name])), steps=STEPS)


def _every_technique(job: Job) -> list[Plan]:
    """Each that the search offers for this job, alone at its first and last setting, and some together."""
    facts = job_facts(job, "cpu")
    found = [Plan()]
    for one in usable(facts, Accuracy.ANY)[0]:
        settings = list(one.settings(facts))
        found += [Plan(uses=(make_use(one.name, s),)) for s in (settings[0], settings[-1])]
    found += [Plan(uses=(AUTOCAST, parts(2)))]
    found += [Plan(uses=uses) for uses in ((MASTER, FULL), (AUTOCAST, FULL, parts(2))) if facts.block_count]
    return list(dict.fromkeys(found))


def jobs(only: Sequence[str] | None) -> list[tuple[Job, str]]:
    """(job, why it counts as new); a first-set job counts as known. What the third set's first run showed is
    a record."""
    known = [(make(), "") for make in FIRST_SET]
    new = [(make(), told) for make, told in SECOND_SET] + [(make(), THIRD) for make in THIRD_SET]
    science = [(science_job(name), "") for name in SCIENCE if only and name in only]
    return [pair for pair in known + new if not only or pair[0].name in only] + science


# --- the truth, in a child process


def measured(name: str) -> list[dict[str, Any]]:
    counter = CountingAllocator()
    counter.install()
    job = next(j for j, _ in jobs([name]))
    _one(job, Plan(), counter)  # kernels set up their caches once
    return [_guarded(job, plan, counter) for plan in cases(name)]


def _guarded(job: Job, plan: Plan, counter: CountingAllocator) -> dict[str, Any]:
    try:
        return _one(job, plan, counter)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def _one(job: Job, plan: Plan, counter: CountingAllocator) -> dict[str, Any]:
    """Highest live bytes of each phase over the steps, and the last step's whole sequence."""
    gc.collect()
    base, now = counter.live_bytes(), ["setup"]
    peaks: dict[str, int] = {}
    marks: list[int] = []

    def turn(phase: str) -> None:
        peaks[now[0]] = max(peaks.get(now[0], 0), counter.peak_bytes() - base)
        counter.reset_peak()
        now[0] = phase
        marks.append(sum(counter.counts()[:2]))

    counter.reset_peak()
    torch.manual_seed(0)
    step = TrainingStep(job, plan)
    for index in range(STEPS):
        turn("between")
        batch = job.make_batch(index, 0)
        turn("between")
        marks.clear()
        begun = sum(counter.counts()[:2])
        counter.start_log()
        outputs = step.run(batch, lambda phase: turn(str(phase)))
        log = counter.stop_log().deltas_bytes
        turn("between")
        del batch, outputs
    step.close()
    return {"peaks": {**peaks, "peak": max(peaks.values())}, "sequence": log[marks[0] - begun :]}


# --- the prediction


def run(only: Sequence[str] | None) -> dict[str, Any]:
    counter = CountingAllocator()
    counter.install()
    probes: dict[str, ProbeResult | None] = {}
    rows: list[dict[str, Any]] = []
    begun = time.perf_counter()
    for job, new in jobs(only):
        command = [sys.executable, "-W", "ignore", __file__, "--measure", job.name]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        predictions = [_predicted(job, plan, probes, counter) for plan in cases(job.name)]
        out, _ = child.communicate()
        truths = json.loads(out.splitlines()[-1]) if child.returncode == 0 else []
        truths += [{"error": f"the child ended with {child.returncode}"}] * (len(predictions) - len(truths))
        for plan, predicted, truth in zip(cases(job.name), predictions, truths, strict=True):
            rows.append(_row(job, plan, predicted, truth, new))
            print(line(rows[-1]), flush=True)
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "took_s": round(time.perf_counter() - begun),
        "environment": dict(fingerprint()),
        "rows": rows,
    }


def _predicted(
    job: Job, plan: Plan, probes: dict[str, ProbeResult | None], counter: CountingAllocator
) -> tuple[Trace, Calibration] | str:
    """A refusal is its reason."""
    try:
        traced = trace(job, plan, steps=STEPS, max_micro_batches=99)
    except (UserError, RuntimeError, ValueError, TypeError) as error:
        return f"not predicted, {type(error).__name__}: {str(error)[:200]}"
    wanted = {op.signature for op in traced.ops}
    probes.update({s: probe(s, counter) for s in wanted - probes.keys()})
    found = {s: p for s in wanted if (p := probes[s]) is not None}
    return traced, Calibration(
        op_peak_bytes={s: p.peak_bytes for s, p in found.items()},
        op_kept_bytes={s: p.kept_bytes for s, p in found.items() if p.kept_bytes},
    )


def _row(
    job: Job, plan: Plan, predicted: tuple[Trace, Calibration] | str, truth: dict[str, Any], new: str
) -> dict[str, Any]:
    row: dict[str, Any] = {"architecture": job.name, "plan": plan.label, "new": new}
    if "error" in truth:
        return {**row, "error": truth["error"]}
    if isinstance(predicted, str):
        return {**row, "error": predicted}
    traced, calibration = predicted
    probed, bare = memory_profile(traced, calibration), memory_profile(traced, Calibration())
    peaks, real = truth["peaks"], truth["sequence"]
    sequences = {
        "as traced": predicted_sequence(traced, None),
        "probed": predicted_sequence(traced, calibration),
    }
    compared = [
        (
            f"{name}{'' if strictly else LOOSE}",
            first_difference(sequence, real, above=SEQUENCE_BYTES, strictly=strictly),
        )
        for name, sequence in sequences.items()
        for strictly in (True, False)
    ]
    return {
        **row,
        "measured_bytes": peaks["peak"],
        "predicted_bytes": probed.peak_bytes,
        "without_probe_bytes": bare.peak_bytes,
        "error_ratio": probed.peak_bytes / peaks["peak"] - 1,
        "without_probe_ratio": bare.peak_bytes / peaks["peak"] - 1,
        "probed": probed.peak_bytes != bare.peak_bytes,
        "phases": {p: probed.phase_peak_bytes[p] / peaks[p] - 1 for p in PHASES},
        "events": sum(abs(d) > SEQUENCE_BYTES for d in real),
        "sequence": next((name for name, difference in compared if difference is None), "differs"),
        "first_difference": str(compared[-1][1] or ""),
        "equal_without_probe": equal_but_for_scratch(sequences["as traced"], real, above=SEQUENCE_BYTES),
        "assumptions": list(traced.assumptions),
    }


# --- files


def _write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if options.csv:
        fields = (
            "architecture",
            "plan",
            "measured_bytes",
            "predicted_bytes",
            "error_ratio",
            "without_probe_ratio",
        )
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, fields, extrasaction="ignore")
            table.writeheader()
            table.writerows(rows)


if __name__ == "__main__":
    main()
