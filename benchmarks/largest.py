"""`memfit plan --largest` against runs: does the value found run under the cap, and does the next one die?

    python benchmarks/largest.py [--only WORD]               ask, run, record, write the page
    python benchmarks/largest.py --measure [--only WORD]     the same questions to `--largest --measure`
    python benchmarks/largest.py --page                      the page from the records only

The questions were fixed before the first of them was asked. For each, the largest safe value, the largest
that is expected to fit, and the next of either are trained for three steps in memfit's worker under the same
hard cap. Then larger and smaller values are run until the largest that runs is known to a step, or to 0.25 %.
With --measure, memfit itself runs values; the two that it answers with are then each run three times more.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memfit.planner.capacity import expected_bytes, needed_bytes
from memfit.planner.request import Request, make_predictor
from memfit.runtime import local_machine
from memfit.techniques.registry import make_use
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan
from memfit.types.result import OutcomeKind
from memfit.workflows.largest import largest
from memfit.workflows.single_run import run_spec

HERE = Path(__file__).parent
MEASURED = HERE / "records" / "largest_measured.jsonl"
RECORDS, PAGE = HERE / "records" / "largest.jsonl", HERE / "largest.md"
MIB = 2**20
STEPS, REPEATS = 3, 3
RESOLUTION = 0.0025  # of the value: the largest that runs is not searched more finely


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    job: str
    dimension: str
    cap_mib: int
    uses: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    half: int = 1

    @property
    def plan(self) -> Plan:
        return Plan(uses=tuple(make_use(name, settings) for name, settings in self.uses.items()))

    @property
    def name(self) -> str:
        later = " (3)" if self.half == 3 else ""
        return f"{self.job.rpartition('/')[2]}: {self.dimension}{later}"


QUESTIONS = (
    Question(job="char-lm", dimension="batch", cap_mib=256),
    Question(
        job="protein-ss", dimension="length", cap_mib=192, uses={"activation-checkpointing": {"every": 1}}
    ),
    Question(job="protein-lm", dimension="hidden", cap_mib=192),
    Question(job="potential", dimension="atoms", cap_mib=128),
    Question(job="segmentation3d", dimension="crop", cap_mib=320),
    Question(job="weather", dimension="rollout", cap_mib=96),
    Question(job=f"{HERE / 'largest_jobs.py'}:graph", dimension="edges", cap_mib=128),
    # Fixed after the answers to those above: then what is expected on a CPU became the tensors alone.
    Question(job="molecules", dimension="batch", cap_mib=96, half=2),
    Question(job="genome", dimension="length", cap_mib=128, half=2),
    Question(job="alphafold2", dimension="rows", cap_mib=192, half=2),
    Question(job="protein-ss", dimension="batch", cap_mib=160, uses={"bf16-autocast": {}}, half=2),
    Question(
        job="weather", dimension="batch", cap_mib=64, uses={"activation-checkpointing": {"every": 1}}, half=2
    ),
    Question(job=f"{HERE / 'largest_jobs.py'}:graph", dimension="nodes", cap_mib=96, half=2),
    # Fixed on 2026-11-30: since the day before, no number of rows of alphafold2 fits 192 MiB.
    Question(job="alphafold2", dimension="rows", cap_mib=640, half=3),
)


def run(question: Question, value: int) -> dict[str, Any]:
    """Train the plan at one value under the cap, and return what was predicted and what happened."""
    own = {"batch": value} if question.dimension == "batch" else {}
    own |= {"length": value} if question.dimension == "length" else {}
    ref = JobRef(spec=question.job, **own, dimensions={} if own else {question.dimension: value})
    request = Request(job_ref=ref, machine=local_machine.this_machine("world", "cpu"))
    job, predictor = make_predictor(request)
    estimate = predictor.whole(question.plan)
    spec = RunSpec(
        name=f"{question.name} {value}",
        role="run",
        job=ref,
        plan=question.plan,
        seed=0,
        steps=STEPS,
        batch_size=job.batch_size,
        cap_bytes=question.cap_mib * MIB,
        threads=local_machine.threads(),
        timeout_s=300,
    )
    measured = run_spec(spec, estimate, lambda *progress: None, spec.name).measurement
    return {
        "value": value,
        "outcome": measured.outcome.value,
        "reason": measured.reason,
        "needed_bytes": needed_bytes(estimate, request.machine),
        "expected_bytes": expected_bytes(estimate, request.machine),
        "tensor_bytes": int(estimate.allocated_bytes.value),
        "measured_tensor_bytes": measured.peak_bytes,
        "measured_process_bytes": measured.process_peak_bytes,
        "limit": measured.limit_kind,
    }


def request_of(question: Question) -> Request:
    return Request(
        job_ref=JobRef(spec=question.job),
        machine=local_machine.this_machine("world", "cpu"),
        cap_bytes=question.cap_mib * MIB,
    )


def answer(question: Question) -> dict[str, Any]:
    request = request_of(question)
    begun = time.perf_counter()
    report = largest(request, question.dimension, plans=[question.plan])
    asked_s = time.perf_counter() - begun
    row = report.rows[0]
    assert row.result is not None, row.problem
    result = row.result
    predicted = {
        name: size.value if size is not None else None
        for name in ("safe", "safe_next", "expected", "expected_next")
        for size in [getattr(result, name)]
    }
    runs: dict[int, dict[str, Any]] = {}

    def runs_at(value: int) -> bool:
        if value not in runs:
            runs[value] = run(question, value)
            print(question.name, value, runs[value]["outcome"], flush=True)
        return bool(runs[value]["outcome"] == OutcomeKind.OK.value)

    for value in filter(None, predicted.values()):
        runs_at(value)
    low, high = _boundary(runs_at, runs, result.step)
    return {
        "question": question.name,
        "half": question.half,
        "cap_mib": question.cap_mib,
        "plan": question.plan.label,
        "step": result.step,
        **predicted,
        "limit": result.limit,
        "traces": len(result.traced),
        "asked_s": asked_s,
        "largest_run": low,
        "smallest_dead": high,
        "runs": [runs[value] for value in sorted(runs)],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def measured_answer(question: Question) -> dict[str, Any]:
    """Ask with --measure, and run the largest value that ran and the next one three times more."""
    request = request_of(question)
    begun = time.perf_counter()
    row = largest(request, question.dimension, plans=[question.plan], measure=True).rows[0]
    asked_s = time.perf_counter() - begun
    assert row.result is not None, row.problem
    measured = row.result.measured
    assert measured is not None
    again = {
        name: [run(question, size.value)["outcome"] for _ in range(REPEATS)] if size else []
        for name, size in (("ran", measured.ran), ("died", measured.died))
    }
    print(question.name, measured.ran, measured.died, again, flush=True)
    return {
        "question": question.name,
        "cap_mib": question.cap_mib,
        "plan": question.plan.label,
        "step": row.result.step,
        "safe": row.result.safe.value if row.result.safe else None,
        "ran": measured.ran.value if measured.ran else None,
        "died": measured.died.value if measured.died else None,
        "runs": [[r.value, r.outcome.value, r.process_bytes, r.cap_bytes] for r in measured.runs],
        "again": again,
        "asked_s": asked_s,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _boundary(runs_at: Any, runs: Mapping[int, Mapping[str, Any]], step: int) -> tuple[int, int]:
    """Return (the largest value that runs, a value that dies), which are next to each other or at most
    RESOLUTION apart."""
    value, stride = max(runs), step
    while runs_at(value):
        value, stride = value + stride, 2 * stride
    high = min(v for v, r in runs.items() if r["outcome"] != OutcomeKind.OK.value)
    low = max((v for v, r in runs.items() if v < high), default=0)
    while high - low > max(step, RESOLUTION * high // step * step):
        value = (low + high) // 2 // step * step
        low, high = (value, high) if runs_at(value) else (low, value)
    return low, high


def page(records: list[dict[str, Any]], measured: list[dict[str, Any]]) -> str:
    lines = [
        "# The largest value that fits",
        "",
        "Generated by `python benchmarks/largest.py` from `benchmarks/records/largest.jsonl`; do not edit.",
        "The questions and their caps were fixed before they were asked. CPU, RLIMIT_DATA, three steps each.",
    ]
    first = "fixed before what is expected on a CPU became the tensors alone"
    names = (first, "fixed after that", "fixed on 2026-11-30")
    for half, which in enumerate(names, start=1):
        if of_half := [r for r in records if r.get("half", 1) == half]:
            lines += ["", f"## Questions {half}: {which}", "", *_section(of_half)]
    lines += _measured_section(measured)
    return "\n".join(lines) + "\n"


def _section(records: list[dict[str, Any]]) -> list[str]:
    safe_ran = sum(_outcome(r, "safe") == "ok" for r in records)
    next_died = sum(_outcome(r, "safe_next") not in ("ok", None) for r in records)
    expected_died = sum(_outcome(r, "expected_next") not in ("ok", None) for r in records)
    expected_ran = sum(_outcome(r, "expected") == "ok" for r in records)
    shares = [r["safe"] / r["largest_run"] for r in records if r["safe"]]
    above = [r["expected"] / r["largest_run"] for r in records if r["expected"]]
    nothing = len(records) - len(shares)
    lines = [
        f"- the largest safe value ran under the cap in {safe_ran} of {len(shares)}",
        *([f"- no value is safe in {nothing}"] if nothing else []),
        f"- it is {min(shares):.1%} to {max(shares):.1%} of the largest value that runs",
        f"- the next one died in {next_died}: the others lie in memfit's margin",
        f"- the largest expected value ran in {expected_ran} of {len(above)}",
        f"- it is {min(above):.1%} to {max(above):.1%} of the largest value that runs",
        f"- the next one died in {expected_died}",
        "",
        (
            "| job: size | plan | cap MiB | largest safe | ran | largest expected | ran | the next | ran "
            "| largest that runs | dies | traces | s |"
        ),
        "|---|---|--:|--:|---|--:|---|--:|---|--:|--:|--:|--:|",
    ]
    for r in records:
        cells = [r["question"], r["plan"], f"{r['cap_mib']}"]
        for name in ("safe", "expected", "expected_next"):
            cells += [f"{r[name]:,}" if r[name] else "none", _word(_outcome(r, name))]
        cells += [f"{r['largest_run']:,}", f"{r['smallest_dead']:,}", str(r["traces"]), f"{r['asked_s']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _measured_section(records: list[dict[str, Any]]) -> list[str]:
    if not records:
        return []
    both = [r for r in records if r["ran"] and r["died"]]
    adjacent = [r for r in both if r["died"] - r["ran"] <= max(r["step"], r["ran"] / 1000)]
    widest_ratio = max((r["died"] / r["ran"] - 1 for r in both if r not in adjacent), default=0.0)
    widest = f"the others at most {widest_ratio:.1%}" if widest_ratio else "none is further apart"
    nothing = sum(not r["ran"] for r in records)
    ran = sum(bool(r["again"]["ran"]) and set(r["again"]["ran"]) == {"ok"} for r in records)
    died = sum(bool(r["again"]["died"]) and set(r["again"]["died"]) == {"oom"} for r in records)
    lines = [
        "",
        "## The same questions with --measure",
        "",
        "memfit runs values itself, three steps each, at most 16 runs: the largest that runs twice with",
        "0.5 MiB or 0.25 % less than the cap, and the next one, which runs out of memory twice with as much",
        "more. Whether values between the two run is chance. Afterwards, the two were each run",
        f"{REPEATS} times more, both under the cap itself.",
        "",
        f"- in {len(adjacent)} of {len(both)} the two are one step or at most 0.1 % apart; {widest}",
        *([f"- no value ran in {nothing}"] if nothing else []),
        f"- the largest that ran did so in all {REPEATS} further runs in {ran} of {len(both)}",
        f"- the next one ran out of memory in all {REPEATS} further runs in {died} of {len(records)}",
        "",
        "| job: size | plan | cap MiB | largest safe | ran | again | died | again | runs | s |",
        "|---|---|--:|--:|--:|---|--:|---|--:|--:|",
    ]
    for r in records:
        again = [
            f"{v.count(w)} of {len(v)}" for v, w in ((r["again"]["ran"], "ok"), (r["again"]["died"], "oom"))
        ]
        numbers = [f"{r[name]:,}" if r[name] else "none" for name in ("safe", "ran", "died")]
        cells = [r["question"], r["plan"], str(r["cap_mib"]), numbers[0], numbers[1], again[0], numbers[2]]
        cells += [again[1], str(len(r["runs"])), f"{r['asked_s']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _outcome(record: Mapping[str, Any], name: str) -> str | None:
    return next((r["outcome"] for r in record["runs"] if r["value"] == record[name]), None)


def _word(outcome: str | None) -> str:
    return {"ok": "yes", "oom": "out of memory", None: ""}.get(outcome, outcome or "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--half", type=int, default=0, help="1, 2 or 3; 0: all")
    parser.add_argument("--measure", action="store_true", help="ask with --measure")
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    for question in QUESTIONS if not args.page else ():
        if args.only in question.name and args.half in (0, question.half):
            record = measured_answer(question) if args.measure else answer(question)
            with (MEASURED if args.measure else RECORDS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    PAGE.write_text(page(_latest(RECORDS), _latest(MEASURED)), encoding="utf-8")


def _latest(records: Path) -> list[dict[str, Any]]:
    """Return the latest record of each question."""
    lines = records.read_text(encoding="utf-8").splitlines() if records.exists() else []
    return list({r["question"]: r for r in map(json.loads, lines)}.values())


if __name__ == "__main__":
    main()
