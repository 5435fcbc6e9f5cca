"""The AlphaFold 2 case: where its memory goes, what techniques save and cost, and whether it still learns.

    python benchmarks/alphafold_case.py [--only PART ...]      run parts, record, write the page
    python benchmarks/alphafold_case.py --page                 the page from the records only

``memory`` predicts published sizes on an H100, ``offers`` the same on every device with a price,
``train`` trains the tiny one here under every plan of the ladder, ``devices`` predicts several GPUs,
``published`` runs of a file with published.csv's columns (--csv).
Each line of benchmarks/records/alphafold_case.jsonl is one plan or run; of equal ones the last counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alphafold_page import page
from published.predict import plan_of as stack_plan
from published.predict import traces_of
from published.rows import Setup, setup_of
from published.schema import read, settings
from published.score import score

from memfit import catalog
from memfit.cost.memory import memory_profile
from memfit.jobs.registry import load
from memfit.lint.openfold import PRESETS
from memfit.lint.openfold import SIZES as PUBLISHED_SIZES
from memfit.planner.capacity import needed_bytes
from memfit.planner.evaluate import Predictor
from memfit.planner.request import Request, job_facts, make_predictor
from memfit.runtime import local_machine
from memfit.store.environment import fingerprint
from memfit.techniques.registry import effect_of, make_use
from memfit.types import serialization
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.result import Run
from memfit.types.trace import Allocation, Phase, Trace
from memfit.verify.judge import verdict
from memfit.workflows import reference_machines
from memfit.workflows.single_run import explain, run_spec

HERE = Path(__file__).parent
CASE = HERE.parent / "src" / "memfit" / "report" / "cases" / "alphafold2.json"
RECORDS, PAGE = HERE / "records" / "alphafold_case.jsonl", HERE / "alphafold_case.md"
SIZES = ("initial", "finetune")
ONE = "H100-SXM"
_LOGITS_SHARE = (0.5, 1, 2)  # of a softmax's output: its logits in another precision

_AUTOCAST: dict[str, Any] = {"bf16-autocast": {}}
_HALF: dict[str, Any] = {"bf16-parameters": {}}
_BLOCKS: dict[str, Any] = {"activation-checkpointing": {}}
LADDER: Mapping[str, dict[str, Any]] = {
    "plain, fp32": {},
    "bf16 by autocast": _AUTOCAST,
    "bf16 parameters": _HALF,
    "bf16 parameters, checkpointing per block": {**_HALF, **_BLOCKS},
    "bf16 parameters, checkpointing, chunking by 16": {**_HALF, **_BLOCKS, "chunking": {"parts": 16}},
}

KEYS = ("plain", "autocast", "half", "blocks", "chunks16")  # of its plans, in the report
SHORT = {
    "pair": "pair",
    "MSA": "msa",
    "triangle attention logits": "triangle_logits",
    "MSA attention logits": "msa_logits",
    "template": "template",
    "structure": "structure",
    "parameter": "states",
    "gradient": "states",
    "optimizer_state": "states",
}
_SHARED = "bf16 parameters, one sample on 2"
_SHARED_AGAIN = "bf16 parameters, checkpointing, one sample on 4"
BESIDE: Mapping[str, dict[str, Any]] = {  # the ladder: axial parallelism
    _SHARED: {**_HALF, "axial-parallel": {"degree": 2}},
    _SHARED_AGAIN: {**_HALF, **_BLOCKS, "axial-parallel": {"degree": 4}},
}
SEVERAL = (
    ("initial", "bf16 parameters, checkpointing per block", "8xH100-SXM"),
    ("initial", "bf16 parameters, checkpointing per block", "16x8xH100-SXM@IB-NDR"),
    ("finetune", "bf16 parameters, checkpointing, chunking by 16", "8xH100-SXM"),
    ("finetune", "bf16 parameters, checkpointing, chunking by 16", "16x8xH100-SXM@IB-NDR"),
    ("initial", _SHARED, "2xH100-SXM"),
    ("finetune", _SHARED_AGAIN, "4xH100-SXM"),
)


def plan_of(techniques: Mapping[str, Mapping[str, Any]], ranks: int = 1) -> Plan:
    replicas = ranks > 1 and "axial-parallel" not in techniques
    uses = dict(techniques) | ({"ddp": {}} if replicas else {})
    return Plan(uses=tuple(make_use(name, knobs) for name, knobs in uses.items()), ranks=ranks)


# -- memory of published sizes ---------------------------------------------------------------------------


def predicted(size: str, name: str, machine: str = ONE) -> dict[str, Any]:
    """One plan at one size. Bytes of each tensor class at the peak, and of what one Evoformer block keeps."""
    begun = time.perf_counter()
    devices = catalog.machine(machine)
    plan = plan_of({**LADDER, **BESIDE}[name], devices.device_count)
    samples = devices.device_count if name in LADDER else 1
    ref = JobRef(spec="alphafold2", size=size, batch=samples)
    job, predictor = make_predictor(
        Request(job_ref=ref, machine=devices, ranks=plan.ranks), replicas=name in LADDER
    )
    predictor.job = dataclasses.replace(job, make_batch=functools.partial(_alike, size, samples))
    found = predictor.whole(plan)
    traced = predictor.trace(plan, found.rank)
    step, kept = found.step_s, found.device_bytes
    classes = at_peak(traced)
    classes["workspace"] = int(found.allocated_bytes.value) - sum(classes.values())  # cuBLAS's own
    return {
        "kind": "predicted",
        "size": size,
        "name": name,
        "machine": machine,
        "plan": plan.label,
        "samples": samples,
        "peak_bytes": found.allocated_bytes.value,
        "phase": found.peak_phase,
        "device_bytes": kept.value if kept else None,
        "fits": needed_bytes(found, devices) <= devices.device.memory_bytes.value,
        "step_s": [step.low, step.value, step.high] if step else None,
        "energy_j": found.energy_j,
        "usd": found.usd,
        "co2_g": found.co2_g,
        "by_class": classes,
        "block_keeps": kept_by_block(traced),
        "parameters": traced.parameter_count,
        "took_s": round(time.perf_counter() - begun),
    }


OFFERED = ("plain, fp32", "bf16 parameters, checkpointing per block")


def offered(size: str = "initial") -> Iterator[dict[str, Any]]:
    """One sample a step on single devices: what a decision on a machine is made from."""
    job = load(JobRef(spec="alphafold2", size=size, batch=1))
    devices = [catalog.machine(name) for name in reference_machines.priced_accelerators()]
    facts = job_facts(job, "cuda")
    for name in OFFERED:
        plan, traces = plan_of(LADDER[name]), dict[tuple[Plan, int], Trace]()
        for machine in (m for m in devices if "bfloat16" in m.device.peak_flops):
            predictor = Predictor(job=job, machine=machine, job_facts=facts, traces=traces)
            found = predictor.whole(plan)
            traces = dict(predictor.traces)  # of one kind of device: made once
            fits = needed_bytes(found, machine) <= machine.device.memory_bytes.value
            told = reference_machines.make_offer(
                found, machine=machine.name, size=size, plain=name == OFFERED[0], fits=fits
            )
            yield {
                "kind": "offer",
                "size": size,
                "name": name,
                "machine": machine.name,
                "offer": json.loads(serialization.dumps(told)),
            }


def _alike(size: str, samples: int, step: int, seed: int) -> dict[str, Any]:
    """One sample seen many times: 128 of fine-tuning would be 57 GB."""
    one = load(JobRef(spec="alphafold2", size=size)).make_batch(step, seed)
    return {name: tensor.expand(samples, *tensor.shape[1:]) for name, tensor in one.items()}


def at_peak(traced: Trace) -> dict[str, int]:
    at = memory_profile(traced, Calibration()).peak_clock
    return _by_class(traced, _alive(traced, at))


def _alive(traced: Trace, at: int) -> Iterator[Allocation]:
    return (a for a in traced.allocations if a.start <= at and (a.end is None or a.end > at))


def kept_by_block(traced: Trace, block: str = "blocks.20") -> dict[str, int]:
    """What the forward pass of the last step leaves alive of one block in the middle."""
    span = [s for s in traced.spans if s.phase is Phase.FORWARD][-1]
    kept = (
        a
        for a in traced.allocations
        if span.start <= a.start < span.end
        and (a.end is None or a.end > span.end)
        and (a.module == block or a.module.startswith(f"{block}."))
    )
    return _by_class(traced, kept)


def _by_class(traced: Trace, held: Iterator[Allocation]) -> dict[str, int]:
    logits = defaultdict(set)
    for a in traced.allocations:
        if "softmax" in a.op and a.module.endswith(".attention"):
            logits[a.module] |= {int(a.requested_bytes * share) for share in _LOGITS_SHARE}
    total = Counter[str]()
    for a in held:
        total[_class(a, logits.get(a.module, set()))] += a.size_bytes
    return dict(total.most_common())


def _class(a: Allocation, logits: set[int]) -> str:
    if a.category in ("parameter", "gradient", "optimizer_state", "input", "workspace"):
        return str(a.category)
    stack, _, rest = a.module.partition(".")
    if stack in ("structure", "template"):
        return stack
    if stack not in ("blocks", "extra"):
        return "other"
    part = rest.partition(".")[2]  # after the block's number
    where = "extra MSA" if stack == "extra" else ""
    kind = "pair" if part.startswith(("pairs", "outer")) else "MSA"
    if a.requested_bytes in logits:
        kind = f"{'triangle' if kind == 'pair' else 'MSA'} attention logits"
    return f"{where}: {kind}" if where else kind


# -- training here ------------------------------------------------------------------------------------------


def trained(name: str, seeds: int) -> Iterator[dict[str, Any]]:
    """The tiny size under one plan, each seed in a process of its own."""
    ref, plan = JobRef(spec="alphafold2"), plan_of(LADDER[name])
    machine = local_machine.this_machine("world")
    asked = Request(job_ref=ref, machine=machine, threads=1)
    guess, job = explain(asked, plan, lambda *_: None), load(ref)
    for seed in range(seeds):
        spec = RunSpec(
            name=name,
            role="run",
            job=ref,
            plan=plan,
            engine="native",
            seed=seed,
            steps=job.steps,
            batch_size=job.batch_size,
            threads=1,
            evaluate=True,
        )
        done = run_spec(spec, guess, lambda *_: None, name)
        yield {"kind": "trained", "name": name, "seed": seed, "run": json.loads(serialization.dumps(done))}


def judged(records: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Verdicts of every plan against the first, from records."""
    runs: dict[str, dict[int, Run]] = defaultdict(dict)
    for r in records:
        if r["kind"] == "trained":
            runs[r["name"]][r["seed"]] = serialization.loads(Run, json.dumps(r["run"]), what="a record")
    basis = next(iter(LADDER))
    metric = load(JobRef(spec="alphafold2")).metric
    found = {}
    for name in [n for n in runs if n in LADDER and n != basis]:
        both = [list(runs[n].values()) for n in (basis, name)]
        judgement = verdict(*both, effect=effect_of(plan_of(LADDER[name])), metric=metric)
        found[name] = dataclasses.asdict(judgement)
    return found


# -- runs of others -----------------------------------------------------------------------------------------


def others(path: Path) -> Iterator[dict[str, Any]]:
    """Published runs of AlphaFold 2's stacks: the peak, and what lies above what forward leaves alive."""
    for row in read(path):
        if not row["id"].startswith("AF2-"):
            continue
        print(row["id"], flush=True)
        scored = score(row)
        kept = re.search(r"activation memory (\d+)", row["mem_other"])
        yield {
            "kind": "published",
            "name": row["id"],
            "shape": "N_seq {sequences} x N_res {residues}".format(**settings(row["fold"])),
            "recomputed": row["recompute"],
            "devices": row["n_gpus"],
            "software": row["software"],
            "notes": row["notes"],
            "measured_bytes": scored.measured_bytes,
            "predicted_bytes": scored.predicted_bytes,
            "reason": scored.reason,
            "kept_bytes": int(kept[1]) * 2**20 if kept else None,
            "predicted_kept_bytes": None if scored.predicted_bytes is None else _left_alive(setup_of(row)),
        }


def _left_alive(setup: Setup) -> float:
    """Live bytes when forward ends: parameters, states, gradients that are not let go of, checkpoints."""
    total = 0.0
    for weight, traced in traces_of(setup, stack_plan(setup)):
        span = [s for s in traced.spans if s.phase is Phase.FORWARD][-1]
        total += weight * sum(a.size_bytes for a in _alive(traced, span.end))
    return total


# -- records and page ------------------------------------------------------------------------------------


def keep(record: Mapping[str, Any]) -> None:
    about = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": dict(fingerprint()),
        "load": round(os.getloadavg()[1], 2),  # of five minutes
    }
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**record, **about}) + "\n")


def records() -> list[dict[str, Any]]:
    """The last of each kind, size, plan, machine and seed."""
    if not RECORDS.exists():
        return []
    found = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]
    keys = ("kind", "size", "name", "machine", "seed")
    return list({tuple(r.get(k) for k in keys): r for r in found}.values())


def for_the_report(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a report of the job shows: the ladder at published sizes, by few classes."""
    devices = catalog.machine(ONE)
    sizes = []
    for size in SIZES:
        ladder = {
            r["name"]: r
            for r in found
            if r["kind"] == "predicted" and r["machine"] == ONE and r["size"] == size
        }
        rungs = [
            {
                "plan": key,
                "peak_bytes": r["peak_bytes"],
                "step_s": round(r["step_s"][1], 3),
                "fits": r["fits"],
                "parts": _few_classes(r["by_class"]),
            }
            for key, name in zip(KEYS, LADDER, strict=True)
            if (r := ladder.get(name))
        ]
        preset = PRESETS[PUBLISHED_SIZES[size]]
        sizes.append({"name": size, "residues": preset.residues, "rows": preset.rows, "rungs": rungs})
    return {
        "created": max(r["created"] for r in found if r["kind"] == "predicted")[:10],
        "device": devices.device.name,
        "memory_bytes": devices.device.memory_bytes.value,
        "sizes": sizes,
        "offers": [r["offer"] for r in found if r["kind"] == "offer"],
    }


def _few_classes(by_class: Mapping[str, int]) -> dict[str, int]:
    total = Counter[str]()
    for name, size_bytes in by_class.items():
        short = "extra" if name.startswith("extra MSA") else SHORT.get(name, "other")
        total[short] += size_bytes
    return dict(total)


def made(part: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Records of one part, one after the other."""
    names = args.plans or list(LADDER)
    if part == "memory":
        yield from (predicted(size, name) for name in names for size in SIZES)
    elif part == "train":
        for name in names:
            yield from trained(name, args.seeds)
    elif part == "devices":
        yield from (predicted(*asked) for asked in SEVERAL)
    elif part == "offers":
        for size in SIZES:
            yield from offered(size)
    elif args.csv is not None:
        yield from others(args.csv)


def main() -> None:
    args = _arguments()
    for part in [] if args.page else args.only:
        for record in made(part, args):
            print(part, record.get("size", ""), record["name"], record.get("seed", ""), flush=True)
            keep(record)
    found = records()
    CASE.write_text(json.dumps(for_the_report(found), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(found, judged(found), list(LADDER)), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = ("memory", "offers", "train", "devices", "published")
    parser.add_argument(
        "--only", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts)
    )
    parser.add_argument(
        "--plans", nargs="+", choices=list(LADDER), default=[], metavar="PLAN", help="of the ladder"
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each plan")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="published runs, as published.py takes them")
    parser.add_argument("--page", action="store_true", help="write the page from the records only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
