"""Predicted beside measured on a CUDA GPU: allocated, reserved and device memory, time and energy of a step.

    python benchmarks/gpu/steps.py [--only NAME ...]     measures, records, writes the page
    python benchmarks/gpu/steps.py --page                the page from the last record

Each job and plan of benchmarks/memory_truth.py is predicted for the catalog's row of this GPU, and then runs
in a process of its own that never traces. Allocated and reserved come from torch.cuda.memory_stats, device
memory from NVML: what is used on the card at the end less what was used before the process touched it, so
nothing else may run there. One Evoformer block at AlphaFold 2's published crops is among them. Time is a
median, energy NVML's counter over the steps after the warm-up. Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import memory_truth
import torch
from torch.utils import _pytree

from memfit import catalog
from memfit.api import estimate
from memfit.jobs.builtin.alphafold.evoformer import EvoformerBlock
from memfit.jobs.builtin.alphafold.model import published
from memfit.jobs.training_step import TrainingStep
from memfit.runtime.energy import EnergyMeter
from memfit.store.environment import fingerprint
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.machine import Device, Fact, Machine
from memfit.types.plan import Plan, use

_HERE = Path(__file__).parent
PAGE, RECORDS = _HERE / "steps.md", _HERE.parent / "records" / "gpu_steps.jsonl"
STEPS, WARM_UP = 33, 3
NO_GPU = "not measured: no GPU"
# A case that fails, out of memory among them, is a row that says so; the others go on.
_REFUSALS = (UserError, RuntimeError, ValueError, TypeError, NotImplementedError)
_LIMITS = {"allocated": "worst 1 %", "reserved": "worst 5 %", "device": "worst 300 MiB"}


_BLOCKS = {"evoformer-256": (256, 128), "evoformer-384": (384, 512)}  # residues, rows of the alignment
_OF_BLOCKS = (
    (),
    (use("bf16-autocast"),),
    (use("bf16-parameters", rounding="master"),),
    (use("chunking", parts=0, mib=0),),
)


def _block(name: str) -> Job:
    """One block of AlphaFold 2 at a published crop: initial training, fine-tuning."""
    residues, rows = _BLOCKS[name]
    widths = published(residues=residues, rows=rows, extra_rows=rows, batch_size=1).widths

    def batch(step: int, seed: int) -> list[torch.Tensor]:
        numbers = torch.Generator().manual_seed(step)
        m = torch.randn(1, rows, residues, widths.c_m, generator=numbers)
        z = torch.randn(1, residues, residues, widths.c_z, generator=numbers)
        return [m, z, torch.ones(1, rows, residues), torch.ones(1, residues, residues)]

    def loss(model: Any, given: Any) -> torch.Tensor:
        m, z = model(*given)
        return m.square().mean() + z.square().mean()  # type: ignore[no-any-return]

    return Job(
        name=name, build_model=lambda: EvoformerBlock(widths), make_batch=batch, loss=loss, batch_size=1
    )


def jobs(only: Sequence[str] | None) -> list[Job]:
    blocks = [_block(name) for name in _BLOCKS if not only or name in only]
    others = [name for name in only or () if name not in _BLOCKS]
    return [*(job for job, _ in memory_truth.jobs(others or None) if others or not only), *blocks]


def cases(name: str) -> list[Plan]:
    return [Plan(uses=uses) for uses in _OF_BLOCKS] if name in _BLOCKS else memory_truth.cases(name)


def main() -> int:
    args = _arguments()
    if args.measure:
        print(json.dumps(measured(args.measure, args.case, args.card)))
        return 0
    if not args.page:
        if not torch.cuda.is_available():
            print(NO_GPU)
            if not RECORDS.exists():
                PAGE.write_text(page(None), encoding="utf-8")
            return 0
        record = run(args.only)
        with RECORDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.exists() else []
    PAGE.write_text(page(json.loads(lines[-1]) if lines else None), encoding="utf-8")
    return 0


def run(only: Sequence[str] | None) -> dict[str, Any]:
    machine, rows = this_gpu(), []
    card = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    for job in jobs(only):
        for index, plan in enumerate(cases(job.name)):
            said = predicted(job, plan, machine)  # before the step runs
            found = said if "error" in said else {"predicted": said, **_child(job.name, index, card)}
            rows.append({"job": job.name, "plan": plan.label, **found})
            print(json.dumps(rows[-1]), flush=True)
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "environment": dict(fingerprint()),
        "rows": rows,
    }


def this_gpu() -> Machine:
    """The catalog's row, or a card of which no more is known than its memory."""
    name = torch.cuda.get_device_name()
    try:
        return catalog.machine(name)
    except UserError:
        total = float(torch.cuda.get_device_properties(0).total_memory)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        memory = Fact(value=total, source="torch total_memory", date=today, kind="measured")
        return Machine(name=name, device=Device(name=name, kind="cuda", memory_bytes=memory))


def predicted(job: Job, plan: Plan, machine: Machine) -> dict[str, Any]:
    """Bytes, seconds and joules; None: not known for this card."""
    try:
        found = estimate(job, plan=plan, machine=machine)
    except _REFUSALS as error:
        return _failure(error)
    said = {
        "allocated": found.allocated_bytes,
        "reserved": found.reserved_bytes,
        "device": found.device_bytes,
    }
    step_s = found.estimate.step_s
    return {
        **{k: None if v is None else v.value for k, v in said.items()},
        "step_s": None if step_s is None else step_s.value,
        "energy_j": found.estimate.energy_j,
    }


def _failure(error: Exception) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def _child(name: str, case: int, card: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--measure", name]
    command += ["--case", str(case), "--card", card]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    except subprocess.TimeoutExpired:
        return {"error": "not done after 30 minutes"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"error": f"ended with {done.returncode}: {last[0][:200]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(name: str, case: int, card: str) -> dict[str, Any]:
    job = jobs([name])[0]
    try:
        return {"measured": _truth(job, cases(name)[case], card)}
    except _REFUSALS as error:
        return _failure(error)


def _truth(job: Job, plan: Plan, card: str) -> dict[str, Any]:
    before = _used_bytes(card)
    step = TrainingStep(on(job, "cuda"), plan, device="cuda")
    meter, times = EnergyMeter("cuda:0"), []
    for index in range(STEPS):
        batch = step.job.make_batch(index, 0)
        torch.cuda.synchronize()
        if index == WARM_UP:
            meter.start()
        begun = time.perf_counter()
        with torch.device("cuda"):
            step.run(batch)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
        del batch
    joules, boundary = meter.stop()
    stats, used = torch.cuda.memory_stats(), _used_bytes(card)
    return {
        "allocated": stats["allocated_bytes.all.peak"],
        "reserved": stats["reserved_bytes.all.peak"],
        "device": used - before if used is not None and before is not None else None,
        "step_s": statistics.median(times[WARM_UP:]),
        "energy_j": None if joules is None else joules / (STEPS - WARM_UP),
        "energy_boundary": boundary,
    }


def on(job: Job, device: str) -> Job:
    """The same job with model and batches on ``device``."""

    def batch(step: int, seed: int) -> Any:
        return _pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), job.make_batch(step, seed))

    return dataclasses.replace(job, build_model=lambda: job.build_model().to(device), make_batch=batch)


def _used_bytes(card: str) -> int | None:
    """Of the whole card, by everybody, as NVML says; it knows cards by UUID, whatever the process may see."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(card)).used)
    except pynvml.NVMLError:
        return None


def page(record: Mapping[str, Any] | None) -> str:
    head = ["# Steps on a GPU", ""]
    if record is None:
        return "\n".join(
            [*head, "Not measured: no GPU was at hand. No accuracy is claimed for GPUs here.", ""]
        )
    environment = record["environment"]
    about = (
        f"{record['gpu']}, torch {environment.get('torch')}, {record['created'][:10]}; {STEPS} steps a row, "
        "predicted / measured."
    )
    lines = [*head, about, "", "| number | rows | median error | worst error | worst MiB | target |"]
    lines.append("|---|--:|--:|--:|--:|---|")
    for name, limit in _LIMITS.items():
        lines.append(_summary(name, [r for r in record["rows"] if _pair(r, name)], limit))
    lines += ["", "| job | plan | allocated MiB | reserved MiB | device MiB | step s | J |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|")
    return "\n".join([*lines, *map(_line, record["rows"])]) + "\n"


def _pair(row: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """(predicted, measured), where both are known."""
    if "error" in row or row["predicted"][name] is None or row["measured"][name] is None:
        return None
    return float(row["predicted"][name]), float(row["measured"][name])


def _summary(name: str, rows: Sequence[Mapping[str, Any]], limit: str) -> str:
    pairs = [pair for r in rows if (pair := _pair(r, name))]
    if not pairs:
        return f"| {name} | 0 | - | - | - | {limit} |"
    errors = [abs(p / m - 1) for p, m in pairs]
    off = max(abs(p - m) for p, m in pairs) / 2**20
    numbers = f"{statistics.median(errors):.2%} | {max(errors):.2%} | {off:.0f}"
    return f"| {name} | {len(pairs)} | {numbers} | {limit} |"


def _line(row: Mapping[str, Any]) -> str:
    begin = f"| {row['job']} | {row['plan']} "
    if "error" in row:
        return f"{begin}| {row['error'].replace('|', '/')} | | | | |"
    cells = [_both(row, name, 2**20, ".1f") for name in _LIMITS]
    return (
        f"{begin}| {' | '.join([*cells, _both(row, 'step_s', 1, '.4f'), _both(row, 'energy_j', 1, '.2f')])} |"
    )


def _both(row: Mapping[str, Any], name: str, unit: int, style: str) -> str:
    pair = (row["predicted"][name], row["measured"][name])
    return " / ".join("-" if v is None else format(v / unit, style) for v in pair)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these jobs of memory_truth.py")
    parser.add_argument("--page", action="store_true", help="write the page from the last record only")
    parser.add_argument("--measure", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--card", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
