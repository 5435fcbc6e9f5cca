"""How long memfit takes to answer, beside an earlier revision in the same run.

    python benchmarks/answer_times.py [--base REVISION] [--only WORD ...] [--repeats N]   ask, record, page
    python benchmarks/answer_times.py --page                                              the page only

Protocol, fixed in a commit before the first record:

- Each question is a command of its own process, imports and all. The base revision and this one are asked in
  turn, one after the other, on a machine that does nothing else; the page shows the machine's load before
  each question.
- "cold": with an empty cache folder. "again": the same question with another ``--memory``, in the folder that
  the cold question has filled.
- Traces are timed in a process that has imported torch and transformers and traced a small job before: one
  trace of the plan, its model built on fake tensors included. Since 2026-11-29 21:20 UTC the architecture's
  module of transformers is imported before, too; until then its import, half a second, was in the times.
- Times are wall times in seconds. With several repeats the median counts. The ratio is base over this one.
- The base can be left out where it would take too long: then there is no ratio.
- Modules are compiled to bytecode before the first question, as an installation does. (Added on 2026-11-30
  at 15:12 UTC, after questions had been asked with PYTHONDONTWRITEBYTECODE set: each process then compiled
  500 modules anew.)
- What this machine takes to train is asked of each job, too: its operators are timed then. (Added on
  2026-12-01 at 19:35 UTC.)
- A question that fails, or that the base cannot answer, stays in the record with its error.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import dataclasses
import datetime
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memfit.jobs import registry

HERE = Path(__file__).parent
PAGE, RECORD = HERE / "answer_times.md", HERE / "records" / "answer_times.jsonl"
DEFAULT_BASE = "e6c7ba79"  # the last revision before answers were made faster
LIMIT_S = 1800


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A command of memfit, with the seconds that it may take at most. ``again``: further arguments of the
    second question; empty if there is none, or if it is a trace (``trace``: what `_traced` gets)."""

    name: str
    limit_s: float
    arguments: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    again_limit_s: float = 0.0
    trace: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _plan(job: str, *more: str, limit_s: float, again: str = "40GiB", again_limit_s: float = 5.0) -> Question:
    arguments = ("plan", job, *more, "--on", "A100-80GB-SXM")
    name = " ".join(arguments)
    return Question(
        name=name,
        limit_s=limit_s,
        arguments=arguments,
        again=("--memory", again),
        again_limit_s=again_limit_s,
    )


def _llama(name: str, rows: int, length: int, **plan: Any) -> Question:
    return Question(
        name=f"trace of {name}, {', '.join(plan['techniques']) or 'plain'} on {plan.get('ranks', 1)}",
        limit_s=plan.pop("limit_s"),
        trace={"job": name, "batch": rows, "length": length, **plan},
    )


JOBS = tuple(name for name in registry.names() if name != "protein-ss")  # which has limits of its own

QUESTIONS = (
    Question(name="--help", limit_s=0.3, arguments=("--help",)),
    Question(name="plan protein-ss, on this machine", limit_s=25, arguments=("plan", "protein-ss")),
    *(Question(name=f"plan {job}, on this machine", limit_s=30, arguments=("plan", job)) for job in JOBS),
    Question(name="poc alphafold2", limit_s=360, arguments=("poc", "alphafold2", "--seeds", "1")),
    _plan("alphafold2", "--size", "initial", limit_s=60),
    _plan("alphafold2", "--size", "finetune", limit_s=90),
    _plan("protein-ss", limit_s=12, again="2GiB"),
    *(_plan(job, limit_s=30, again="2GiB") for job in JOBS),
    Question(
        name="trace of alphafold2 at its initial size, plain",
        limit_s=5,
        trace={"job": "alphafold2", "size": "initial", "techniques": {}},
    ),
    _llama("hf:facebook/esm2_t33_650M_UR50D", 8, 512, techniques={}, limit_s=0.8),
    _llama("hf:meta-llama/Llama-3.1-8B", 8, 8192, techniques={"fsdp2": {}}, ranks=8, limit_s=2),
    _llama(
        "hf:mistralai/Mixtral-8x7B-v0.1",
        8,
        4096,
        techniques={"fsdp2": {}, "expert-parallel": {"degree": 8}},
        ranks=8,
        limit_s=5,
    ),
    _llama("hf:meta-llama/Llama-3.1-70B", 8, 4096, techniques={"ddp": {}}, ranks=8, limit_s=10),
    _llama("hf:meta-llama/Llama-3.1-70B", 8, 4096, techniques={"zero": {"stage": 3}}, ranks=8, limit_s=10),
    _llama("hf:meta-llama/Llama-3.1-405B", 16, 4096, techniques={"fsdp2": {}}, ranks=16, limit_s=10),
)


def _traced(request: Mapping[str, Any]) -> dict[str, float]:
    """Return the wall seconds and the largest resident memory (MiB) of one trace."""
    import resource

    from memfit.jobs.huggingface import read_config
    from memfit.jobs.registry import load
    from memfit.techniques.plan_file import parse_plan
    from memfit.trace.trace_extrapolation import deep_trace
    from memfit.types.gc_pause import pause_gc
    from memfit.types.job import JobRef
    from memfit.types.plan import Plan

    deep_trace(load(JobRef(spec="char-lm")), Plan(), device="cuda")
    size, batch, length = (request.get(key) for key in ("size", "batch", "length"))
    if request["job"].startswith("hf:"):  # imports do not count
        family = read_config(request["job"].removeprefix("hf:")).model_type
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    job = load(JobRef(spec=request["job"], size=size, batch=batch, length=length))
    plan = parse_plan({"techniques": request["techniques"], "ranks": request.get("ranks", 1)}, what="plan")
    with pause_gc():
        start = time.perf_counter()
        deep_trace(job, plan, device="cuda")
        wall_s = time.perf_counter() - start
    return {"wall_s": wall_s, "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _run(command: list[str], source: Path, cache: Path) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": str(source / "src"), "XDG_CACHE_HOME": str(cache)}
    load, start = os.getloadavg()[0], time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment, cwd=cache, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not answered in {LIMIT_S} s", "load": load}
    wall_s = time.perf_counter() - start
    if done.returncode:
        error = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": error.replace(str(source), "SOURCE"), "load": load}
    return {"wall_s": wall_s, "output": done.stdout, "load": load}


def _ask(question: Question, source: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        if question.trace:
            code = (
                "import json, sys, answer_times as a; print(json.dumps(a._traced(json.loads(sys.argv[1]))))"
            )
            command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(question.trace)]
            command[4] = f"import sys; sys.path.append({str(HERE)!r}); {code}"
            answer = _run(command, source, cache)
            if "output" in answer:
                answer |= json.loads(answer.pop("output").strip().splitlines()[-1])
            return answer
        command = [sys.executable, "-W", "ignore", "-m", "memfit", *question.arguments]
        answer = _run(command, source, cache)
        answer.pop("output", None)
        if question.again and "error" not in answer:
            second = _run([*command, *question.again], source, cache)
            answer["again_s" if "wall_s" in second else "again_error"] = second.get(
                "wall_s", second.get("error")
            )
        return answer


@contextlib.contextmanager
def _revision(name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(path), name], cwd=HERE, check=True)
        try:
            yield path
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(path)], cwd=HERE, check=True)


def _head() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short=8", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def measure(base: str, only: list[str], repeats: int) -> None:
    head = _head()
    compileall.compile_dir(HERE.parent / "src", quiet=1)
    with _revision(base) if base != "none" else contextlib.nullcontext() as base_source:
        if base_source:
            compileall.compile_dir(base_source / "src", quiet=1)
        for question in QUESTIONS:
            if only and not any(word in question.name for word in only):
                continue
            for _ in range(repeats):
                row: dict[str, Any] = {
                    "question": question.name,
                    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                }
                row |= {"base": base, "head": head, "cores": os.cpu_count()}
                row["base_answer"] = _ask(question, base_source) if base_source else {"error": "not asked"}
                row["head_answer"] = _ask(question, HERE.parent)
                with RECORD.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(question.name, row["base_answer"], row["head_answer"], flush=True)


def _seconds(rows: list[dict[str, Any]], which: str, key: str) -> float | None:
    values = [row[which][key] for row in rows if isinstance(row[which].get(key), float)]
    return statistics.median(values) if values else None


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def page() -> str:
    rows = [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []
    lines = [
        "# How long memfit takes to answer",
        "",
        "Written by `python benchmarks/answer_times.py`; the protocol is in its docstring. Seconds of wall",
        "time; the base revision and the newer one were asked in turn. Of each question the latest pair.",
        "",
        "| question | limit | base | now | base / now | again | limit | MiB | load | revisions | date |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|---|",
    ]
    for question in QUESTIONS:
        own = [row for row in rows if row["question"] == question.name]
        own = [row for row in own if (row["base"], row["head"]) == (own[-1]["base"], own[-1]["head"])]
        if not own:
            continue
        base_s, now_s = (_seconds(own, which, "wall_s") for which in ("base_answer", "head_answer"))
        ratio = base_s / now_s if base_s and now_s else None
        memory = _seconds(own, "head_answer", "rss_mib")
        load = max(row["head_answer"]["load"] for row in own)
        cells = [
            f"`{question.name}`",
            _text(question.limit_s),
            _text(base_s) if base_s else str(own[-1]["base_answer"].get("error", "-"))[:60],
            _text(now_s) if now_s else str(own[-1]["head_answer"].get("error", "-"))[:60],
            _text(ratio),
            _text(_seconds(own, "head_answer", "again_s")),
            _text(question.again_limit_s or None),
            _text(memory),
            _text(load),
            f"{own[-1]['base']}, {own[-1]['head']}",
            own[-1]["date"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default=DEFAULT_BASE, help="the earlier revision, or none")
    parser.add_argument(
        "--only", nargs="*", default=[], help="questions whose name contains one of the words"
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    if not options.page:
        measure(options.base, options.only, options.repeats)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
