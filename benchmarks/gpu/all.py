"""Everything that only a GPU can show, in one command: predictions beside measurements of memory, time and
energy, of each engine, and of a whole proof of concept.

    python benchmarks/gpu/all.py                        measure, record, write the pages
    python benchmarks/gpu/all.py --minutes 8            stop after 8 minutes; the same command continues
    python benchmarks/gpu/all.py --only steps poc       these pieces only: steps, engines, poc
    python benchmarks/gpu/all.py --plans 1              the first plan of each job only, as a rehearsal
    python benchmarks/gpu/all.py --page                 the page from the records only
    python benchmarks/gpu/all.py --contribute FILE      pack the records of this card, to send to others

It needs no network. Each measurement is a line of benchmarks/records/gpu.jsonl as soon as it ends, so that a
killed run loses at most one; what this card, torch and memfit have a line for is not measured again
(--again does), what failed is tried again after all others, what memfit refuses is not. A measurement that
takes over 8 minutes has failed. Predictions are made before the step runs, once from the catalog's figures
for the card and once after its operators were timed. Training runs in a process of its own (memfit's worker):
allocated and reserved bytes are those of torch's allocator, device memory is what the driver counts on the
card less what was used before, so nothing else may run there. On a device that is no GPU this is a rehearsal
with small sizes: its lines are marked "simulated" and stay out of the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from memfit.engines.registry import ENGINES
from memfit.planner.request import Request, make_predictor
from memfit.runtime.devices import accelerator_kind
from memfit.runtime.local_machine import this_machine
from memfit.store.environment import fingerprint
from memfit.techniques.registry import make_use
from memfit.types.errors import MemfitError, UserError
from memfit.types.job import JobRef
from memfit.types.plan import Plan, Use
from memfit.types.result import Measurement, OutcomeKind
from memfit.workflows.single_run import run_plan

_HERE = Path(__file__).parent
RECORDS, PAGE = _HERE.parent / "records" / "gpu.jsonl", _HERE / "all.md"
GPUS = ("cuda", "xpu", "mps")
STEPS, WARM_UP = 12, 3
REHEARSED_STEPS = 4
NO_DEVICE = "no accelerator: nothing is measured"
PIECE_LIMIT_S = 480.0
_TARGETS = {  # name: (target, whether its worst case counts)
    "allocated": "worst 1 %",
    "reserved": "worst 5 %",
    "device": "worst 300 MiB",
    "time before calibration": "-",
    "time after calibration": "median 10 %",
    "energy": "10 %",
}

AUTOCAST, FULL = make_use("bf16-autocast", {}), make_use("activation-checkpointing", {"every": 1})
MASTER, FUSED = make_use("bf16-parameters", {"rounding": "master"}), make_use("adamw-fused", {})
OFFLOAD = make_use("activation-offload", {"to": "host"})
SLICES = make_use("chunking", {})
PLANS: tuple[tuple[Use, ...], ...] = ((), (AUTOCAST,), (AUTOCAST, FULL), (MASTER, FUSED))
_EVOFORMER = ((), (AUTOCAST,), (MASTER,), (AUTOCAST, SLICES))
# job, size and batch on a GPU, batch in a rehearsal, plans
JOBS: tuple[tuple[str, str, int | None, int | None, tuple[tuple[Use, ...], ...]], ...] = (
    ("protein-lm", "650M", 4, 2, (*PLANS, (AUTOCAST, OFFLOAD))),
    ("evoformer.py:fine_tuning", "", None, None, _EVOFORMER),
    ("evoformer.py:initial_training", "", None, None, _EVOFORMER),
    ("protein-lm", "35M", 16, 2, PLANS),
    ("char-lm", "", 64, 4, PLANS),
    ("protein-ss", "", 64, 4, (*PLANS, (OFFLOAD,))),
    ("alphafold2", "", 4, 2, PLANS),
    ("genome", "", 16, 2, PLANS),
    ("weather", "", 16, 2, PLANS),
    ("segmentation3d", "", 8, 2, PLANS),
    ("potential", "", 16, 4, PLANS),
    ("molecules", "", 64, 8, PLANS),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the record: ``piece`` and ``name`` identify it."""

    piece: str
    name: str
    measure: Callable[[], dict[str, Any]]


def main() -> int:
    options = _options()
    target = PAGE if options.records == RECORDS else options.records.with_suffix(".md")
    lines = read(options.records)
    if options.page:
        target.write_text(page(lines), encoding="utf-8")
        return 0
    kind = accelerator_kind()
    if options.contribute is not None:
        return contribute(options.contribute, lines)
    if not kind:
        print(NO_DEVICE)
        return 0
    simulated = kind not in GPUS
    machine = this_machine("world")
    about = {
        "card": machine.device.name,
        "kind": kind,
        "simulated": simulated,
        "torch": fingerprint()["torch"],
        "memfit": fingerprint()["memfit"],
    }
    deadline = time.monotonic() + options.minutes * 60 if options.minutes else float("inf")
    left = 0
    chosen = list(cases(options.only, simulated=simulated, plans=options.plans))
    for case in _unmeasured(iter(chosen), about, lines, again=options.again):
        if time.monotonic() > deadline:
            left += 1
            continue
        line = {**about, "piece": case.piece, "name": case.name}
        try:
            line |= case.measure()
        except UserError as error:  # what cannot be run here: another attempt would end so, too
            line["outcome"] = f"refused: {str(error)[:200]}"
        except (MemfitError, RuntimeError, OSError, ValueError, subprocess.TimeoutExpired) as error:
            line["error"] = f"{type(error).__name__}: {str(error)[:200]}"
        line["created"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        append(options.records, line)
        lines.append(line)
        print(f"{case.piece}: {case.name}: {line.get('error') or line.get('outcome', 'done')}", flush=True)
    target.write_text(page(lines), encoding="utf-8")
    if left:
        print(f"{left} measurements are left; the same command continues")
    if others := {c.name for c in cases(options.only, simulated=simulated)} - {c.name for c in chosen}:
        print(f"--plans {options.plans} leaves out {len(others)} measurements of further plans")
    return 0


def _unmeasured(
    all_cases: Iterator[Case], about: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], *, again: bool
) -> list[Case]:
    """Return the cases that ``lines`` have no line for, in order, then those of which the last line is an
    error. ``again``: all of them. ``about``: the fields of the lines to write that all cases share."""
    failed = {_key(line): "error" in line for line in lines}
    # Sizes of one job are one case in a rehearsal, which has small sizes only.
    keyed = {_key({**about, "piece": c.piece, "name": c.name}): c for c in all_cases}
    new = [c for key, c in keyed.items() if again or key not in failed]
    return new + [c for key, c in keyed.items() if not again and failed.get(key)]


def cases(only: Sequence[str] | None, *, simulated: bool, plans: int | None = None) -> Iterator[Case]:
    """Yield the cases of the pieces ``only`` (None: all), the most important first. ``plans``: of each job's
    plans in the piece "steps", only so many."""
    pieces: dict[str, Callable[..., Iterator[Case]]] = {
        "steps": functools.partial(_steps, plans=plans),
        "poc": _poc,
        "engines": _engines,
    }
    for name, piece in pieces.items():
        if not only or name in only:
            yield from piece(simulated=simulated)


# -- steps ------------------------------------------------------------------------------------------


def _steps(*, simulated: bool, plans: int | None) -> Iterator[Case]:
    for spec, size, batch, small_batch, of_job in JOBS:
        if ".py:" in spec:
            ref = JobRef(spec=str(_HERE / spec) + "_rehearsal" * simulated)
        else:
            ref = JobRef(spec=spec, size=None if simulated else size or None, batch=small_batch)
            ref = ref if simulated else dataclasses.replace(ref, batch=batch)
        for uses in of_job[:plans]:
            plan = Plan(uses=uses)
            name = f"{Path(ref.spec).name} {ref.size or ''} {plan.label}"
            label = " ".join(name.split())
            yield Case(
                piece="steps", name=label, measure=lambda r=ref, p=plan: step(r, p, simulated=simulated)
            )


def step(ref: JobRef, plan: Plan, engine: str = "native", *, simulated: bool) -> dict[str, Any]:
    """Return what was predicted of the plan's step and what was measured."""
    machine = this_machine("world")
    request = Request(job_ref=ref, machine=machine, engine=engine, timeout_s=PIECE_LIMIT_S, evaluates=False)
    before = make_predictor(request)[1].whole(plan)  # from the catalog's figures
    steps = REHEARSED_STEPS if simulated else STEPS
    run = run_plan(request, plan, seed=0, steps=steps, capped=False, progress=_silent)
    measured = run.measurement
    if measured.outcome is not OutcomeKind.OK:
        is_answer = measured.outcome is OutcomeKind.OOM  # another attempt would end so, too
        return {"outcome" if is_answer else "error": f"{measured.outcome.value}: {measured.reason}"}
    values = {
        "allocated": (before.allocated_bytes, measured.peak_bytes),
        "reserved": (before.reserved_bytes, measured.reserved_peak_bytes),
        "device": (before.device_bytes, measured.device_peak_bytes),
        "time before calibration": (before.step_s, _median_s(measured)),
        "energy": (None if before.energy_j is None else before.energy_j, _energy_j(measured)),
    }
    pairs = {name: [_value(predicted), truth] for name, (predicted, truth) in values.items()}
    pairs["time after calibration"] = [run.predicted_step_s, _median_s(measured)]
    return {
        "values": pairs,
        "retries": measured.allocator_retries,
        "energy_boundary": measured.energy_boundary,
    }


def _value(predicted: Any) -> float | None:
    value = getattr(predicted, "value", predicted)
    return None if value is None else float(value)


def _median_s(measured: Measurement) -> float | None:
    times = measured.step_s[WARM_UP:]
    return statistics.median(times) if times else None


def _energy_j(measured: Measurement) -> float | None:
    return None if measured.energy_j is None else measured.energy_j / max(1, measured.steps_done)


def _silent(*_: Any) -> None:
    """Show no progress."""


# -- a proof of concept and engines -----------------------------------------------------------------


def _poc(*, simulated: bool) -> Iterator[Case]:
    job = "char-lm" if simulated else "protein-ss"
    yield Case(piece="poc", name=f"{job}, 6 steps, 1 seed", measure=lambda: poc(job))


def poc(job: str) -> dict[str, Any]:
    """Run a whole proof of concept and return its verdict and its runs' predicted and measured peaks."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "memfit", "poc", job, "--steps", "6", "--seeds", "1"]
        command += ["--json", "--store", f"{folder}/store.sqlite3", "--out", f"{folder}/report.html"]
        child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PIECE_LIMIT_S)
    if not child.stdout.startswith("{"):
        return {"error": (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1][:200]}
    answer = json.loads(child.stdout)
    fields = ("name", "plan", "outcome", "predicted_peak_bytes", "measured_peak_bytes")
    return {
        "verdict": answer["verdict"],
        "recommended": answer["recommended"]["plan"] if answer["recommended"] else None,
        "runs": [{f: run.get(f) for f in fields} for run in answer["runs"]],
    }


def _engines(*, simulated: bool) -> Iterator[Case]:
    """Yield one case for each engine that is installed, with a plan that it supports on one device."""
    zero = make_use("zero", {"stage": 2, "reduce_bucket_elements": 1_000_000})
    for engine in ENGINES.values():
        if engine.name == "replay" or engine.probe().problem:
            continue
        job, size, batch = ("char-lm", "", 64) if engine.name == "megatron" else ("protein-lm", "35M", 16)
        ref = JobRef(spec=job, size=None if simulated else size or None, batch=2 if simulated else batch)
        by_engine = {"deepspeed": Plan(uses=(zero,)), "megatron": Plan(), "colossalai": Plan()}
        plan = by_engine.get(engine.name, Plan(uses=(AUTOCAST,)))
        yield Case(
            piece="engines",
            name=f"{engine.name}: {job}, {plan.label}",
            measure=lambda r=ref, p=plan, name=engine.name: step(r, p, name, simulated=simulated),
        )


# -- records and the page ---------------------------------------------------------------------------


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(line.get(name) for name in ("card", "torch", "memfit", "piece", "name"))


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of the record. One that is incomplete, as a kill or a full disk leaves it, is left out
    with a note on standard error, so that its measurement is made again."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            lines += [json.loads(text)] if text else []
        except ValueError:
            print(f"note: line {number} of {path} is incomplete and is left out", file=sys.stderr)
    return lines


def _latest(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return of several lines for one measurement the last."""
    return list({_key(line): line for line in lines}.values())


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line to the record. If its last line was not ended, the new one still begins at a line's
    start."""
    is_torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * is_torn + json.dumps(line) + "\n")


def contribute(target: Path, lines: Sequence[dict[str, Any]]) -> int:
    """Write the lines of real GPUs to ``target``."""
    lines = [line for line in _latest(lines) if not line["simulated"]]
    if not lines:
        print("nothing to contribute: no GPU has been measured here")
        return 1
    target.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{target}: {len(lines)} measurements of {', '.join(sorted({line['card'] for line in lines}))}")
    return 0


def page(lines: Sequence[dict[str, Any]]) -> str:
    """Return the page as Markdown: for each card what is claimed, then every measurement."""
    lines = _latest(lines)
    head = ["# Predictions beside measurements on GPUs", ""]
    head += ["Generated by `python benchmarks/gpu/all.py`; do not edit.", ""]
    cards = sorted({line["card"] for line in lines if not line["simulated"]})
    if not cards:
        return "\n".join(
            [*head, "Not measured: no GPU was at hand. No accuracy is claimed for GPUs here.", ""]
        )
    return "\n".join([*head, *(text for card in cards for text in _of_card(card, lines))])


def _of_card(card: str, lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    own = [line for line in lines if line["card"] == card]
    steps = [line for line in own if "values" in line]
    yield f"## {card}"
    last = own[-1]
    yield f"\ntorch {last['torch']}, memfit {last['memfit']}, {last['created'][:10]}; {STEPS} steps a run.\n"
    yield "| number | runs | median error | worst error | worst MiB | target |\n|---|--:|--:|--:|--:|---|"
    for name, target in _TARGETS.items():
        pairs = [p for line in steps if (p := line["values"].get(name)) and None not in p]
        errors = [abs(predicted / truth - 1) for predicted, truth in pairs if truth]
        far = max((abs(p - m) / 2**20 for p, m in pairs), default=0.0) if "time" not in name else 0.0
        numbers = (
            f"{statistics.median(errors):.2%} | {max(errors):.2%} | {far:.0f}" if errors else "- | - | -"
        )
        yield f"| {name} | {len(pairs)} | {numbers} | {target} |"
    yield "\n| piece | run | allocated MiB | reserved MiB | device MiB | step s | J |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    yield from map(_row, own)
    yield ""


def _row(line: Mapping[str, Any]) -> str:
    begin = f"| {line['piece']} | {line['name']} "
    if "values" not in line:
        said = (
            line.get("error")
            or line.get("outcome")
            or f"verdict {line.get('verdict')}, recommended {line.get('recommended')}"
        )
        return f"{begin}| {said.replace('|', '/')} | | | | |"
    units = {"allocated": 2**20, "reserved": 2**20, "device": 2**20, "time after calibration": 1, "energy": 1}
    cells = [_both(line["values"].get(name), unit) for name, unit in units.items()]
    return f"{begin}| {' | '.join(cells)} |"


def _both(pair: Sequence[float | None] | None, unit: int) -> str:
    return " / ".join("-" if v is None else f"{v / unit:.4g}" for v in pair or (None, None))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("steps", "poc", "engines"), help="these pieces")
    parser.add_argument("--plans", type=int, metavar="N", help="only the first N plans of each job")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin nothing after so many minutes")
    parser.add_argument("--again", action="store_true", help="also measure what has a line already")
    parser.add_argument("--page", action="store_true", help="write the page from the records only")
    parser.add_argument("--contribute", type=Path, metavar="FILE", help="write this card's records to FILE")
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="FILE", help="the record to use")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
