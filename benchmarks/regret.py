"""How far is the recommended plan from the fastest that fits, found by measuring?

    python benchmarks/regret.py [--plans 24] [--rounds 2] [--steps 8]   measure, record, write the page
    python benchmarks/regret.py --page                                  the page from the records only
    python benchmarks/regret.py --drawn 10 --seed 23                    jobs drawn at random (regret_drawn.py)

First a proof of concept's own plans run once and correct step times (cost/step_time_calibration.py); they are
not counted. Plans are drawn evenly over the predicted order of all plans that fit, the recommendation and
plain training added; they are measured in interleaved rounds, so that all see the same noise. Every number in
the page comes from benchmarks/records/regret.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
from pathlib import Path
from typing import Any

import regret_drawn

from memfit.cost.step_time_calibration import correct_calibration, factor
from memfit.engines import native
from memfit.planner.capacity import fits_under
from memfit.planner.plan_space import plans, usable
from memfit.planner.request import Planning, Request, autocast
from memfit.planner.search import search
from memfit.planner.selection import Objective, score
from memfit.runtime import local_machine
from memfit.runtime.child_process import run
from memfit.store.environment import fingerprint
from memfit.techniques.registry import without
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.plan import Accuracy, Plan, use
from memfit.types.units import format_bytes
from memfit.verify.aggregate import median_step_s

RECORDS = Path(__file__).parent / "records" / "regret.jsonl"
PAGE = Path(__file__).parent / "regret.md"
WIDE = 0.10  # of a plan's own time: rounds further apart are measured again
REPEATS, T_95 = 5, 2.776  # turns, and Student's t of four degrees of freedom


def main() -> None:
    options = _options()
    if options.draw:
        regret_drawn.commit_draw(options.draw, options.seed)
    elif options.drawn and options.again:
        regret_drawn.measure_again(options.drawn, options.seed)
    elif options.drawn:
        regret_drawn.measure_drawn(options.drawn, options.seed)
    else:
        all_of_one_job(options)


def all_of_one_job(options: argparse.Namespace) -> None:
    if not options.page:
        with RECORDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(measure(options), ensure_ascii=False) + "\n")
    PAGE.write_text(page([json.loads(line) for line in RECORDS.read_text().splitlines()]), encoding="utf-8")
    print(PAGE.read_text())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--job", default="protein-ss")
    parser.add_argument("--plans", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cap-ratio", type=float, default=0.25, help="of the plain plan's predicted peak")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--draw", type=int, metavar="N", help="write N drawn jobs, to be committed")
    parser.add_argument("--drawn", type=int, metavar="N", help="measure the N jobs of the committed draw")
    parser.add_argument("--again", action="store_true", help="of the drawn jobs, those that were disturbed")
    parser.add_argument("--seed", type=int, default=23)
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    request = Request(job_ref=JobRef(spec=options.job), machine=local_machine.this_machine("world"))
    planning = search(request, lambda *stage: None)
    if options.cap_ratio != 0.25:
        plain = planning.result.baseline.estimate.allocated_bytes.value
        request = Request(
            job_ref=request.job_ref, machine=request.machine, cap_bytes=int(plain * options.cap_ratio)
        )
        planning = search(request, lambda *stage: None)
    assert planning.result.recommended is not None
    teachers = taught(planning, options.steps)
    chosen = [
        p
        for p in drawn(planning, options.plans + len(teachers))
        if p not in teachers or p in always(planning)
    ]
    rows = {plan: {"plan": plan.label, "step_s": [], "outcome": "ok"} for plan in chosen}
    for round_ in range(options.rounds):
        for index, plan in enumerate(chosen):
            print(
                f"round {round_ + 1}/{options.rounds}, plan {index + 1}/{len(chosen)}: {plan.label}",
                flush=True,
            )
            _measure_one(planning, plan, options.steps, rows[plan])
    _again_where_wide(planning, rows, options)
    repeats = _repeated(planning, rows, options.steps)
    known = correct_calibration(planning.predictor.calibration, list(teachers.items()), source="these")
    for plan in chosen:
        estimate = planning.predictor.whole(plan)
        rows[plan]["predicted_peak_bytes"] = int(estimate.allocated_bytes.value)
        assert estimate.step_s is not None, "this machine is calibrated"
        rows[plan]["uncorrected_step_s"] = estimate.step_s.value
        rows[plan]["predicted_step_s"] = estimate.step_s.value * factor(known, plan)
        rows[plan]["taught"] = plan in teachers
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "job": options.job,
        "cap_bytes": planning.cap_bytes,
        "goal": "fastest",
        "recommended": planning.result.recommended.estimate.plan.label,
        "considered": planning.result.considered,
        "environment": dict(fingerprint()),
        "correction": {
            "plans": len(teachers),
            "base": known.step_ratio,
            "techniques": dict(known.technique_ratio),
            "spread": known.step_spread_ratio,
        },
        "repeats": repeats,
        "rows": list(rows.values()),
    }


def _again_where_wide(
    planning: Planning, rows: dict[Plan, dict[str, Any]], options: argparse.Namespace
) -> None:
    """What was measured with a wide spread does not count."""
    for plan, row in rows.items():
        if row["outcome"] == "ok" and _spread(row) > WIDE:
            print(f"again: {plan.label}", flush=True)
            row["before_s"], row["step_s"] = row["step_s"], []
            for _ in range(options.rounds):
                _measure_one(planning, plan, options.steps, row)


def _repeated(planning: Planning, rows: dict[Plan, dict[str, Any]], steps: int) -> dict[str, Any]:
    """The recommended plan, the fastest that fits and plain training, in turns: seconds of each."""
    fitting = {
        p: r for p, r in rows.items() if r["step_s"] and r["measured_peak_bytes"] <= planning.cap_bytes
    }
    fastest = min(fitting, key=lambda p: statistics.median(fitting[p]["step_s"]))
    found: dict[str, Any] = {plan.label: [] for plan in dict.fromkeys([*always(planning), fastest])}
    for turn in range(REPEATS):
        for plan in dict.fromkeys([*always(planning), fastest]):
            print(f"turn {turn + 1}/{REPEATS}: {plan.label}", flush=True)
            row: dict[str, Any] = {"step_s": found[plan.label]}
            _measure_one(planning, plan, steps, row)
    return found


def taught(planning: Planning, steps: int) -> dict[Plan, float]:
    """Measured over predicted step time of what a proof of concept runs: plain, the recommendation, that
    without each technique, precision and checkpointing alone and together."""
    assert planning.result.recommended is not None
    best, plain = planning.result.recommended.estimate.plan, Plan()
    mixed, checkpointing = autocast(planning.predictor.job_facts), use("activation-checkpointing", every=1)
    found: dict[Plan, float] = {}
    for plan in dict.fromkeys(
        [
            plain,
            best,
            *(without(best, u.technique) for u in best.uses),
            plain.with_use(mixed),
            plain.with_use(checkpointing),
            plain.with_use(mixed).with_use(checkpointing),
        ]
    ):
        try:
            guess = planning.predictor.whole(plan).step_s
        except UserError:  # a budget that cannot be met without the technique
            continue
        print(f"teaching: {plan.label}", flush=True)
        row: dict[str, Any] = {"step_s": []}
        _measure_one(planning, plan, steps, row)
        if row["outcome"] == "ok" and guess is not None:
            found[plan] = row["step_s"][0] / guess.value
    return found


def always(planning: Planning) -> list[Plan]:
    assert planning.result.recommended is not None
    return [planning.result.recommended.estimate.plan, Plan()]


def drawn(planning: Planning, count: int) -> list[Plan]:
    """The recommendation, plain training and an even draw over the predicted order of what fits."""
    techniques, _ = usable(planning.predictor.job_facts, Accuracy.ROUNDING)
    sketches = [planning.predictor.sketch(p) for p in plans(planning.predictor.job_facts, techniques)]
    fits = fits_under(planning.cap_bytes, planning.request.machine)
    order = sorted((e for e in sketches if fits(e)), key=lambda e: score(e, Objective.FASTEST))
    # Half from the fastest quarter, where regret is decided, half from everywhere.
    near, step = order[: max(1, len(order) // 4)], max(1, len(order) // (count // 2))
    picked = near[:: max(1, len(near) // (count // 2))] + order[::step]
    return list(dict.fromkeys([*always(planning), *(e.plan for e in picked)]))[: count + 2]


def _measure_one(planning: Planning, plan: Plan, steps: int, row: dict[str, Any]) -> None:
    spec = RunSpec(
        name=plan.label,
        role="benchmark",
        job=planning.request.job_ref,
        plan=plan,
        seed=0,
        steps=steps,
        threads=local_machine.threads(),
        evaluate=False,
    )
    measured = run(native.render(spec), on_event=lambda event: None)
    row["outcome"] = measured.outcome.value
    row["measured_peak_bytes"] = measured.peak_bytes
    if (step_s := median_step_s(measured)) is not None:
        row["step_s"].append(step_s)


def page(records: list[dict[str, Any]]) -> str:
    parts = [
        "# Regret: the recommended plan against the fastest measured one that fits",
        "Generated by `python benchmarks/regret.py` from `benchmarks/records/regret.jsonl`; do not edit.",
        (
            "Shared machines are noisy: compare times within one record only. A plan fits when its measured "
            "tensor peak is at most the cap. Times are medians of steps after the first two, then of rounds."
        ),
    ]
    return "\n\n".join([*parts, *(_section(r) for r in records)]) + "\n"


def _spread(row: dict[str, Any]) -> float:
    """Of a plan's rounds, from the lowest to the highest, by the median."""
    return float((max(row["step_s"]) - min(row["step_s"])) / statistics.median(row["step_s"]))


def _turns(record: dict[str, Any], chosen: str, best: str) -> list[str]:
    """Turns of the recommended plan and the fastest: their ratio with its 95 % interval, and how far a plan's
    own turns are apart."""
    turns: dict[str, list[float]] = record.get("repeats", {})
    if not turns:
        return []
    floor = statistics.median(_spread({"step_s": each}) for each in turns.values())
    told = (
        f"- {len(turns[chosen])} turns: noise floor {100 * floor:.1f} % (a plan's turns, lowest to highest)"
    )
    if chosen == best or best not in turns:
        return [f"{told}; the recommended plan is the fastest measured"]
    ratios = [a / b for a, b in zip(turns[chosen], turns[best], strict=True)]
    mean, half = statistics.fmean(ratios), T_95 * statistics.stdev(ratios) / math.sqrt(len(ratios))
    interval = f"95 % interval {mean - half:.3f} to {mean + half:.3f}"
    return [f"{told}; the recommended plan takes {mean:.3f} of the fastest's time, {interval}"]


def _section(record: dict[str, Any]) -> str:
    rows = [r for r in record["rows"] if r["outcome"] == "ok" and r["step_s"]]
    for row in rows:
        row["median_s"] = statistics.median(row["step_s"])
    fitting = [r for r in rows if r["measured_peak_bytes"] <= record["cap_bytes"]]
    best = min(fitting, key=lambda r: r["median_s"])
    chosen = next(r for r in rows if r["plan"] == record["recommended"])
    unseen = [r for r in rows if not r.get("taught") and ("repeats" not in record or _spread(r) <= WIDE)]
    wide = sum("repeats" in record and _spread(r) > WIDE for r in rows)
    again = sum("before_s" in r for r in rows)
    errors = [abs(r["predicted_step_s"] / r["median_s"] - 1) for r in unseen]
    before = [abs(r.get("uncorrected_step_s", r["predicted_step_s"]) / r["median_s"] - 1) for r in unseen]
    memory = [abs(r["predicted_peak_bytes"] / r["measured_peak_bytes"] - 1) for r in rows]
    lines = [
        f"## {record['job']}, {record['created']}",
        f"- {record['environment'].get('processor', 'unknown')}, torch {record['environment'].get('torch')}",
        (
            f"- cap {format_bytes(record['cap_bytes'])}; {record['considered']} plans considered, "
            f"{len(rows)} measured, {len(fitting)} of them fit"
        ),
        (
            f"- recommended: {chosen['plan']}, {chosen['median_s']:.3f} s; "
            f"fastest that fits: {best['plan']}, {best['median_s']:.3f} s; "
            f"**regret {100 * (chosen['median_s'] / best['median_s'] - 1):.1f} %**"
        ),
        (
            f"- predicted step time of {len(unseen)} plans that taught nothing: median error "
            f"{100 * statistics.median(errors):.1f} %, worst {100 * max(errors):.1f} % "
            f"({100 * statistics.median(before):.1f} and {100 * max(before):.1f} % before runs corrected "
            f"it); predicted peak: worst {100 * max(memory):.3f} %"
        ),
        *_turns(record, chosen["plan"], best["plan"]),
        *(
            [f"- spread above {WIDE:.0%}: {again} measured again, {wide} still, which do not count"]
            * (again > 0)
        ),
        "",
        "| plan | fits | peak measured | peak error | step measured | spread | step predicted |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    return "\n".join(
        [*lines, *(_row(r, record["cap_bytes"]) for r in sorted(rows, key=lambda r: r["median_s"]))]
    )


def _row(row: dict[str, Any], cap_bytes: int) -> str:
    spread = _spread(row)
    error = row["predicted_peak_bytes"] / row["measured_peak_bytes"] - 1
    return (
        f"| {row['plan']} | {'yes' if row['measured_peak_bytes'] <= cap_bytes else 'no'} "
        f"| {format_bytes(row['measured_peak_bytes'])} | {100 * error:+.3f} % | {row['median_s']:.3f} s "
        f"| {100 * spread:.0f} % | {row['predicted_step_s']:.3f} s |"
    )


if __name__ == "__main__":
    main()
