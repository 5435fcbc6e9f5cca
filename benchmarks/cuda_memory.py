"""Predicted GPU memory against torch's own CUDA code and caching allocator, on a machine without a GPU.

    PYTHON benchmarks/cuda_memory.py [--only REGEX]      measure what has no record, then write the page
    PYTHON benchmarks/cuda_memory.py --again measured    measure all anew
    PYTHON benchmarks/cuda_memory.py --again predicted   predict anew what was measured
    PYTHON benchmarks/cuda_memory.py --page              write the page from the records only

PYTHON is that of an environment with torch's CUDA build (from 2.15 on) and memfit. benchmarks/cuda_stub
replaces CUDA's runtime and libraries: memory of the device is the host's, kernels do nothing. Which
operators run, what they allocate and what the allocator reserves is decided by torch as on a card. Not by
the stub: workspaces of cuDNN, of cuFFT and of cuBLASLt's algorithms are 0 here, and so is the reserve of
cuDNN's recurrent layers. Results have no values, so a job whose sizes depend on values is not in the list.
Attention by cuDNN is switched off, because the stub has no cuDNN.

Protocol, committed before the first result. Two steps of each built-in job and of each training in
tests/unit/cuda_jobs.py; the jobs under nine plans on an H100 (compute capability 9.0) and two on an A100
(8.0); allocated is torch.cuda.max_memory_allocated, reserved is max_memory_reserved, of the whole process.
A prediction is that of `memfit estimate` for the card, made in a process without the stub. Every row
counts; none is left out for its result. A row without a measurement or a prediction says why. While this
was written, char-lm and protein-ss were run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).parent
sys.path += [str(HERE / "cuda_stub"), str(HERE.parent / "tests" / "unit")]
RECORDS, PAGE = HERE / "records" / "cuda_memory.jsonl", HERE / "cuda_memory.md"
CARDS: Final[Mapping[str, int]] = {
    "H100-SXM": 90,
    "A100-80GB-SXM": 80,
}  # name -> compute capability, times 10
BUILT_IN: Final = (
    *("char-lm", "protein-ss", "protein-lm", "genome", "molecules", "potential"),
    *("weather", "segmentation3d", "alphafold2"),
)
PLANS: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
    "plain": {},
    "bf16-autocast": {"bf16-autocast": {}},
    "fp16-autocast": {"fp16-autocast": {}},
    "checkpointing": {"activation-checkpointing": {"every": 1}},
    "checkpointing, bf16-autocast": {"activation-checkpointing": {"every": 1}, "bf16-autocast": {}},
    "bf16-parameters, fused": {"bf16-parameters": {"rounding": "master"}, "adamw-fused": {}},
    "accumulation": {"gradient-accumulation": {"micro_batches": 2}},
    "optimizer in backward": {"optimizer-in-backward": {}},
    "offload": {"activation-offload": {"to": "host"}},
}
_ALL_PLANS_ON, _STEPS, _LIMIT_S = "H100-SXM", 2, 600.0


def cases() -> Iterator[tuple[str, str, str]]:
    """Yield (card, job, plan) of each row."""
    import cuda_jobs  # type: ignore[import-not-found]

    for card in CARDS:
        for job in BUILT_IN:
            for plan in PLANS if card == _ALL_PLANS_ON else ("plain", "bf16-autocast"):
                yield card, job, plan
        for job in cuda_jobs.JOBS:
            yield card, job, "plain"


def _load(job: str, plan: str) -> tuple[Any, Any]:
    import cuda_jobs

    from memfit.jobs.registry import load
    from memfit.techniques.plan_file import parse_plan
    from memfit.types.job import JobRef

    loaded = cuda_jobs.job_of(job) if job in cuda_jobs.JOBS else load(JobRef(spec=job))
    return loaded, parse_plan({"techniques": PLANS[plan]}, what=plan)


def measured(job: str, plan: str) -> dict[str, int]:
    """Train two steps on the device, and return the highest bytes that torch allocated and reserved."""
    import torch

    from memfit.jobs.training_step import TrainingStep

    torch.backends.cuda.enable_cudnn_sdp(False)
    step = TrainingStep(*_load(job, plan), device="cuda", torch_device="cuda:0")
    for index in range(_STEPS):
        inputs, terms = step.local(step.job.make_batch(index, 0))
        step.run(inputs, terms_per_rank=terms)
        del inputs
    step.close()
    counters = {"allocated": torch.cuda.max_memory_allocated, "reserved": torch.cuda.max_memory_reserved}
    return {name: counter() for name, counter in counters.items()}


def predicted(card: str, job: str, plan: str) -> dict[str, tuple[float, float, float]]:
    """Return (value, low, high) of the predicted bytes."""
    from memfit.catalog import machine
    from memfit.jobs.registry import add_job
    from memfit.planner.request import Request, make_predictor
    from memfit.types.job import JobRef

    loaded, parsed = _load(job, plan)
    add_job(loaded.name, loaded)
    _, predictor = make_predictor(Request(job_ref=JobRef(spec=loaded.name), machine=machine(card)))
    estimate = predictor.whole(parsed)
    assert estimate.reserved_bytes is not None
    figures = {"allocated": estimate.allocated_bytes, "reserved": estimate.reserved_bytes}
    return {name: (figure.value, figure.low, figure.high) for name, figure in figures.items()}


def _child(function: str, *arguments: str, environment: Mapping[str, str]) -> Any:
    """Return what the function of this file returns in a process of its own; {"problem": why not}."""
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import json, cuda_memory\n"
        f"print(json.dumps(cuda_memory.{function}(*{arguments!r})), flush=True)\n"
        "import os; os._exit(0)"  # torch's threads would end in libraries that are not there
    )
    try:
        child = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"not done after {_LIMIT_S:g} s"}
    if child.returncode:
        lines = [line for line in child.stderr.splitlines() if line.strip() and "leaked" not in line]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Refused)\b", line)]
        return {"problem": (errors or lines or [f"exit code {child.returncode}"])[-1][:200]}
    return json.loads(child.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="rows CARD/JOB/PLAN that match")
    parser.add_argument(
        "--again", choices=("measured", "predicted"), help="make this anew where there is a record"
    )
    parser.add_argument("--page", action="store_true", help="write the page from the records only")
    options = parser.parse_args()
    if not options.page:
        _measure(options.only, options.again)
    PAGE.write_text(page(read_records()))


def _measure(only: str, again: str | None) -> None:
    import cuda_stub_build
    import torch

    if torch.version.cuda is None:
        sys.exit(f"torch {torch.__version__} is not built for CUDA: run this with the Python of such a build")
    known = {(r["card"], r["job"], r["plan"]): r for r in read_records()}
    with tempfile.TemporaryDirectory() as folder:
        stub = cuda_stub_build.build(Path(folder))
        for card, job, plan in cases():
            row = known.get((card, job, plan))
            if not re.search(only, f"{card}/{job}/{plan}") or (row is not None and not again):
                continue
            if row is None or again == "measured":
                capability = {"CUDA_STUB_CC": str(CARDS[card])}
                row = {
                    "card": card,
                    "job": job,
                    "plan": plan,
                    "measured": _child("measured", job, plan, environment=stub | capability),
                    "torch": torch.__version__,
                    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                }
            row["predicted"] = _child("predicted", card, job, plan, environment={"CUDA_VISIBLE_DEVICES": ""})
            with RECORDS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(card, job, plan, *(_cell(row, name) for name in ("allocated", "reserved")), flush=True)


def read_records() -> list[dict[str, Any]]:
    """Return the newest record of each row, in the order of `cases`."""
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    rows = {(r["card"], r["job"], r["plan"]): r for r in map(json.loads, lines)}
    return [rows[case] for case in cases() if case in rows]


def error_of(row: Mapping[str, Any], name: str) -> float | None:
    """Return predicted over measured, less 1; None if either is missing."""
    if "problem" in row["measured"] or "problem" in row["predicted"]:
        return None
    return float(row["predicted"][name][0] / row["measured"][name] - 1)


def is_inside(row: Mapping[str, Any], name: str) -> bool:
    """Return whether the measured bytes lie in the predicted interval."""
    _, low, high = row["predicted"][name]
    return bool(low <= row["measured"][name] <= high)


def _cell(row: Mapping[str, Any], name: str) -> str:
    error = error_of(row, name)
    if error is None:
        problems = {
            side: row[side]["problem"] for side in ("measured", "predicted") if "problem" in row[side]
        }
        return "; ".join(f"not {side}: {problem}" for side, problem in problems.items())
    return f"{error:+.2%}{'' if is_inside(row, name) else ', outside'}"


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of the records."""
    both = [r for r in rows if error_of(r, "allocated") is not None]
    lines = [
        "# Memory on torch's CUDA code, without a GPU",
        "",
        "Predictions for two cards against torch's own CUDA build, whose runtime and libraries are",
        "replaced by a [stub](cuda_stub/runtime.c): torch chooses operators and kernels, and its caching",
        "allocator hands out and keeps memory, as on a card; kernels do nothing. What the stub cannot",
        "show: workspaces of cuDNN, cuFFT and cuBLASLt's algorithms, attention by cuDNN, the context, and",
        "anything that depends on values. Convolutions in bfloat16 run torch's own kernels here, because",
        "the interface of cuDNN that the stub has knows no bfloat16; on a card cuDNN runs them. It is no",
        "measurement on a card.",
        "",
        "Generated by `PYTHON benchmarks/cuda_memory.py` from `benchmarks/records/cuda_memory.jsonl`; the",
        "script has the protocol.",
        _made_with(rows),
        "",
        "| figure | rows | median error | worst | within 1 % | inside of the interval |",
        "|---|--:|--:|--:|--:|--:|",
        *(_summary(both, name) for name in ("allocated", "reserved")),
        "",
        f"Rows without a measurement or a prediction: {len(rows) - len(both)}.",
        "",
        "| card | job | plan | allocated, MiB | predicted | error | reserved, MiB | predicted | error |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
        *map(_row, rows),
    ]
    return "\n".join(lines) + "\n"


def _made_with(rows: Sequence[Mapping[str, Any]]) -> str:
    versions, dates = ({r[key] for r in rows} for key in ("torch", "date"))
    return f"torch {', '.join(sorted(versions))}, {min(dates, default='')} to {max(dates, default='')}."


def _summary(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    errors = [abs(error_of(row, name) or 0.0) for row in rows]
    inside = sum(is_inside(row, name) for row in rows)
    within = sum(error <= 0.01 for error in errors)
    median, worst = statistics.median(errors or [0.0]), max(errors, default=0.0)
    return f"| {name} | {len(rows)} | {median:.2%} | {worst:.2%} | {within} | {inside} |"


def _row(row: Mapping[str, Any]) -> str:
    cells = [row["card"], row["job"], row["plan"]]
    if error_of(row, "allocated") is None:
        return f"| {' | '.join(cells)} | {_cell(row, 'allocated')} | | | | | |"
    for name in ("allocated", "reserved"):
        value, low, high = (size / 2**20 for size in row["predicted"][name])
        cells += [f"{row['measured'][name] / 2**20:.1f}", f"{value:.1f} ({low:.1f} to {high:.1f})"]
        cells.append(_cell(row, name))
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
