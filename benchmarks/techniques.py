"""What each technique saves and costs by itself: peaks by phase and step time, beside training without it.

    python benchmarks/techniques.py [--only NAME ...]    train, record, write the page
    python benchmarks/techniques.py --page               the page from the records only

Protocol, fixed in a commit before the first record:

- Every technique with its default settings (optimal-checkpointing: a budget of 160 MiB; optimizer:
  RMSprop), on ESM-2 of 8M parameters (`protein-lm`, 8 sequences of 128 residues); expert parallelism
  and chunked cross-entropy on a small Mixtral with 2 layers, axial parallelism on AlphaFold 2. Those of
  several ranks run on two processes, beside DDP with the same batch.
- Runs are processes of memfit's own worker on a processor, one thread each, 8 steps without evaluation:
  without the technique, with it, without, with. Peaks are the counting allocator's, of the fullest rank. The
  step time is the median of the steps after the second of a run; of both runs the smaller one counts.
- A technique that a processor cannot run stays in the record with the reason.
- Changed once, after its first record: ZeRO has buckets of a million elements. Those of the default, 500
  million, take ten times the memory of this small model (226 MB without, 2,181 MB with).

The records of 2026-12-01 were made beside other work on the same two hardware threads: their step times are
rough. A processor is no accelerator: what a technique saves in bytes carries over, what it costs in time does
not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

from memfit.engines.registry import render
from memfit.jobs.registry import load
from memfit.planner.recompute_budget import choose_tensors
from memfit.runtime.child_process import run
from memfit.runtime.ranks import run_ranks
from memfit.store.environment import fingerprint
from memfit.techniques.rank_mesh import SEVERAL
from memfit.techniques.registry import TECHNIQUES, make_use, short_label
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan
from memfit.types.result import Measurement, OutcomeKind

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "records" / "techniques.jsonl", HERE / "techniques.md"
STEPS, WARM_UP = 8, 2
MIXTRAL = JobRef(
    spec="hf:mixtral?num_hidden_layers=2&hidden_size=256&intermediate_size=512&vocab_size=4096",
    length=128,
    batch=8,
)
JOBS = {
    "axial-parallel": JobRef(spec="alphafold2"),
    "chunked-cross-entropy": MIXTRAL,  # its logits are larger than those of 33 residues
    "expert-parallel": MIXTRAL,
}
USUAL = JobRef(spec="protein-lm", size="8M", length=128, batch=8)
SETTINGS: dict[str, dict[str, Any]] = {
    "optimal-checkpointing": {"budget_mib": 160},
    "optimizer": {"path": "torch.optim:RMSprop"},
    "zero": {"reduce_bucket_elements": 1_000_000},
}
PHASES = ("forward", "backward", "optimizer")


def plans_of(name: str) -> tuple[Plan, Plan]:
    """The plan without the technique and the one with it."""
    ranks = 2 if name in SEVERAL else 1
    alone = Plan(uses=(make_use(name, SETTINGS.get(name, {})),), ranks=ranks)
    ddp = Plan(uses=(make_use("ddp", {}),), ranks=2)
    if name == "ddp":
        return Plan(), alone
    if name == "expert-parallel":  # each rank has samples of its own
        return ddp, ddp.with_use(make_use(name, {}))
    if name == "optimal-checkpointing":
        return Plan(), choose_tensors(load(USUAL), alone)
    return (ddp if ranks > 1 else Plan()), alone


def trained(job: JobRef, plan: Plan) -> Measurement:
    spec = RunSpec(
        name=plan.label,
        role="run",
        job=job,
        plan=plan,
        seed=0,
        steps=STEPS,
        threads=1,
        evaluate=False,
        timeout_s=300.0,
    )
    if plan.ranks == 1:
        return run(render(spec), on_event=lambda event: None)
    measurements = run_ranks(render(spec))
    failed = [m for m in measurements if m.outcome is not OutcomeKind.OK]
    return failed[0] if failed else max(measurements, key=lambda m: m.peak_bytes or 0)


def measured(name: str) -> dict[str, Any]:
    job, plans = JOBS.get(name, USUAL), plans_of(name)
    record: dict[str, Any] = {
        "technique": name,
        "job": " ".join(filter(None, (job.spec.partition("?")[0], job.size))),
        "plans": [short_label(plan) for plan in plans],
        "ranks": plans[1].ranks,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": fingerprint()["processor"],
    }
    sides: list[list[Measurement]] = [[], []]
    for _ in range(2):
        for side, plan in zip(sides, plans, strict=True):
            try:
                side.append(trained(job, plan))
            except UserError as error:
                return record | {"error": error.given}
            if side[-1].outcome is not OutcomeKind.OK:
                return record | {"error": side[-1].reason}
    return record | {
        "peak_bytes": [max(m.peak_bytes or 0 for m in side) for side in sides],
        "phase_bytes": [
            {phase: max(m.phase_peak_bytes.get(phase, 0) for m in side) for phase in PHASES} for side in sides
        ],
        "step_s": [min(statistics.median(m.step_s[WARM_UP:]) for m in side) for side in sides],
    }


def read_records() -> dict[str, dict[str, Any]]:
    """The last record of each technique."""
    rows = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]
    return {row["technique"]: row for row in rows}


def page() -> str:
    rows = []
    for name in TECHNIQUES:
        row = read_records().get(name)
        if row is None:
            continue
        if "error" in row:
            rows.append(f"| `{name}` | {row['job']} | {row['ranks']} | {row['error']} | | |")
            continue
        (plain, peak), (plain_s, step_s) = row["peak_bytes"], row["step_s"]
        cells = (
            f"{plain / 2**20:,.1f}",
            f"{peak / 2**20:,.1f} ({peak / plain:.0%})",
            f"{step_s / plain_s:.2f}×",
        )
        rows.append(f"| `{name}` | {row['job']} | {row['ranks']} | {' | '.join(cells)} |")
    protocol = (__doc__ or "").partition("Protocol, fixed")[2].partition("\n\n")[2]
    return "\n".join(
        [
            "# What each technique saves and costs by itself",
            "",
            "Generated by `benchmarks/techniques.py`.",
            "",
            protocol.strip(),
            "",
            "| technique | job | processes | peak without, MiB | peak with, MiB | step time |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], help="names of techniques")
    parser.add_argument("--page", action="store_true", help="write the page from the records only")
    arguments = parser.parse_args()
    names = [] if arguments.page else [n for n in TECHNIQUES if not arguments.only or n in arguments.only]
    for name in names:
        row = measured(name)
        with RECORDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(name, row.get("error") or [row["peak_bytes"], row["step_s"]], flush=True)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
