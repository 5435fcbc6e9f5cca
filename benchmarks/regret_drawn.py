"""Ten jobs drawn at random: how far is the plan that ``memfit plan --measure`` recommends from the quickest
of eight rivals that fit beside it?

    python benchmarks/regret.py --draw 10 --seed 23     write what is drawn, to be committed before any result
    python benchmarks/regret.py --drawn 10 --seed 23    measure what is missing, record, write the page
    python benchmarks/regret.py --drawn 10 --seed 23 --again    measure disturbed jobs once more

Architecture, size and cap come from the seed alone. The rivals follow a fixed rule (`RIVALS`): what somebody
who knows the techniques would try by hand. Recommendation and rivals run under the cap in three interleaved
rounds, whose order rotates; a plan's time is the median of its rounds, a round's the median of its steps
after the first two. A run that was stopped goes on with the next job. One thread for each processor.

A job is disturbed if its slowest round is more than `DISTURBED` times its fastest in the middle of its plans:
something else ran on the machine then, whatever the plan. Such jobs alone can be measured once more; the page
shows both.
"""

from __future__ import annotations

import datetime
import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regret_jobs import ARCHITECTURES, named

from memfit.planner.request import Planning, Request, autocast, make_predictor
from memfit.planner.trials import few_steps
from memfit.runtime import local_machine
from memfit.store.environment import fingerprint
from memfit.techniques.registry import TECHNIQUES, conflict, effect_of, make_use
from memfit.types.errors import NothingFits, UserError
from memfit.types.job import JobRef
from memfit.types.plan import Plan, Use, use
from memfit.types.result import OutcomeKind
from memfit.types.units import format_bytes, format_seconds
from memfit.workflows.plan import find_plan

FOLDER = Path(__file__).parent
DRAWS, RECORDS = FOLDER / "records" / "regret_draws.json", FOLDER / "records" / "regret_drawn.jsonl"
PAGE = FOLDER / "regret_drawn.md"
ROUNDS, STEPS, WARM_UP, MEASURE_S = 3, 6, 2, 150.0
DISTURBED = 1.5
# Widths, depths, lengths (sides, nodes) and batches; a step of each takes 0.05 to 1 s on two processors.
SIZES: dict[str, tuple[tuple[int, ...], ...]] = {
    "gpt": ((128, 192, 256), (4, 6, 8), (64, 128), (8, 16)),
    "bert": ((128, 192, 256), (4, 6, 8), (64, 128), (8, 16)),
    "mixer": ((128, 192, 256), (4, 6, 8), (64, 128), (8, 16)),
    "rnn": ((128, 256), (1, 2), (64, 128), (8, 16)),
    "vit": ((128, 192, 256), (4, 6, 8), (64, 96), (8, 16)),
    "cnn": ((32, 48, 64), (4, 6), (64, 96), (8, 16)),
    "conv1d": ((32, 48, 64), (4, 6, 8), (1024, 2048), (8, 16)),
    "unet": ((16, 24), (2, 3), (64, 96), (8, 16)),
    "mlp": ((512, 1024), (4, 8, 12), (1,), (512, 1024)),
    "gnn": ((64, 96, 128), (4, 6), (32, 64), (16, 32)),
}
CONDITIONS = {  # what else ran, where it was unusual, by seed
    71: "Tests ran on the two cores during the sixth to the eighth job, which were measured once more "
    "without them.",
    67: "Ten to twenty-three other processes ran on the two cores. The first job shared them evenly; the "
    "others had real-time priority, while caches, memory and disk were still shared.",
}
CAPS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)  # of plain training's predicted peak


def draw(count: int, seed: int) -> list[dict[str, Any]]:
    """Architectures in random order, each at most once before all were drawn; sizes and caps at random."""
    chance = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += chance.sample(ARCHITECTURES, len(ARCHITECTURES))
    found = []
    for kind in kinds[:count]:
        sizes = {letter: chance.choice(options) for letter, options in zip("wdnb", SIZES[kind], strict=True)}
        found.append({"job": named(kind, sizes), "cap_ratio": chance.choice(CAPS)})
    return found


def commit_draw(count: int, seed: int) -> None:
    draws = json.loads(DRAWS.read_text()) if DRAWS.exists() else {}
    draws[str(seed)] = draw(count, seed)
    DRAWS.write_text(json.dumps(draws, indent=1) + "\n")


def measure_drawn(count: int, seed: int) -> None:
    """Raises UserError where the draw was not written before."""
    draws = json.loads(DRAWS.read_text()) if DRAWS.exists() else {}
    wanted = draw(count, seed)
    if draws.get(str(seed), [])[:count] != wanted:
        raise UserError(f"seed {seed} is not in {DRAWS}", hint=f"--draw {count} --seed {seed}, and commit it")
    done = {(r["seed"], r["job"]) for r in _records()}
    for index, drawn in enumerate(wanted):
        if (seed, drawn["job"]) not in done:
            record = {"seed": seed, "index": index, **measure_one(drawn)}
            with RECORDS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    write_page()


def measure_again(count: int, seed: int) -> None:
    """Measure the disturbed jobs of a seed once more. What was measured before stays in the record."""
    records, again = _records(), f"{seed}, again"
    done = {r["job"] for r in records if r["seed"] == again}
    disturbed = {r["job"] for r in records if r["seed"] == seed and disturbance_ratio(r["rows"]) > DISTURBED}
    for index, drawn in enumerate(draw(count, seed)):
        if drawn["job"] in disturbed - done:
            record = {"seed": again, "index": index, **measure_one(drawn)}
            with RECORDS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    write_page()


def disturbance_ratio(rows: list[dict[str, Any]]) -> float:
    """Return the slowest round divided by the fastest, the median over the plans that ran in all rounds."""
    whole = [r["step_s"] for r in rows if len(r["step_s"]) == ROUNDS]
    return statistics.median(max(rounds) / min(rounds) for rounds in whole) if whole else 1.0


def measure_one(drawn: dict[str, Any]) -> dict[str, Any]:
    begun = datetime.datetime.now(datetime.UTC)
    planning = _recommended(drawn)
    chosen = planning.result.recommended
    assert chosen is not None, "search raises NothingFits otherwise"
    rivals = list(_first_eight(planning, chosen.estimate.plan))
    rows = {plan: _row(planning, plan) for plan in (chosen.estimate.plan, *rivals)}
    every = list(rows)
    for turn in range(ROUNDS):
        at = turn * len(every) // ROUNDS
        for index, plan in enumerate((*every[at:], *every[:at])):
            print(f"{drawn['job']}: round {turn + 1}/{ROUNDS}, plan {index + 1}/{len(every)}", flush=True)
            _run(planning, plan, rows[plan])
    fine = [r for r in rows.values() if len(r["step_s"]) == ROUNDS]
    own = rows[chosen.estimate.plan]
    quickest = min(statistics.median(r["step_s"]) for r in fine)
    took_s = (datetime.datetime.now(datetime.UTC) - begun).total_seconds()
    return {
        **drawn,
        "created": begun.isoformat(timespec="seconds"),
        "cap_bytes": planning.cap_bytes,
        "recommended": chosen.estimate.plan.label,
        "regret": statistics.median(own["step_s"]) / quickest - 1,
        "rows": list(rows.values()),
        "trials": [
            {"plan": t.plan.label, "predicted_s": t.predicted_s, "step_s": t.step_s}
            for t in planning.result.trials
        ],
        "took_s": took_s,
        "environment": dict(fingerprint()),
    }


def _recommended(drawn: dict[str, Any]) -> Planning:
    """Under the drawn cap; where nothing fits, under one a tenth of the plain peak larger, and so on."""
    request = Request(job_ref=JobRef(spec=f"{FOLDER / 'regret_jobs.py'}:{drawn['job']}"), machine=_machine())
    plain = make_predictor(request)[1].whole(Plan()).allocated_bytes.value
    share = drawn["cap_ratio"]
    while True:
        asked = Request(job_ref=request.job_ref, machine=request.machine, cap_bytes=int(share * plain))
        try:
            return find_plan(asked, _progress, measure_s=MEASURE_S)
        except NothingFits:
            share += 0.1


def _machine() -> Any:
    return local_machine.this_machine("world")


def _progress(stage: str, done: int, total: int, detail: str) -> None:
    if stage == "trial":
        print(f"  trial {done + 1}/{total}: {detail}", flush=True)


# -- rivals ---------------------------------------------------------------------------------------

# In this order, each with as few micro-batches as fit, then the same with the next number of them.
RIVALS: tuple[tuple[Use | str, ...], ...] = (
    (),
    ("autocast",),
    (use("activation-checkpointing", every=1),),
    (use("activation-checkpointing", every=2),),
    ("autocast", use("activation-checkpointing", every=1)),
    (use("adamw-8bit"),),
    ("autocast", use("adamw-8bit")),
    (use("activation-checkpointing", every=1), use("adamw-8bit")),
    (use("optimizer-in-backward"),),
    (use("bf16-parameters", rounding="stochastic"),),
    (use("activation-offload", to="disk"),),
)


def _first_eight(planning: Planning, recommended: Plan) -> Iterator[Plan]:
    found: list[Plan] = []
    for fewest in (True, False):
        for uses in RIVALS:
            fitting = _that_fit(planning, uses)
            plan = next(fitting, None) if fewest else next((p for p in fitting if p not in found), None)
            if plan is not None and plan != recommended and plan not in found and len(found) < 8:
                found.append(plan)
                yield plan


def _that_fit(planning: Planning, uses: tuple[Use | str, ...]) -> Iterator[Plan]:
    """By growing number of micro-batches."""
    batch, highest = planning.job.batch_size, planning.request.accuracy.highest
    plan = Plan()
    for one in uses:
        mixed = autocast(planning.predictor.job_facts)
        plan = plan.with_use(mixed if isinstance(one, str) else make_use(one.technique, one.settings))
    for micro_batches in (n for n in range(1, batch + 1) if batch % n == 0):
        tried = plan
        if micro_batches > 1:
            tried = plan.with_use(use("gradient-accumulation", micro_batches=micro_batches))
        if conflict(tried) is None and effect_of(tried) <= highest and _works(planning, tried):
            yield tried


def _works(planning: Planning, plan: Plan) -> bool:
    try:
        missing = any(TECHNIQUES[u.technique].missing for u in plan.uses)
        return not missing and planning.meets_limits(planning.predictor.whole(plan))
    except UserError:
        return False


def _row(planning: Planning, plan: Plan) -> dict[str, Any]:
    step = planning.predictor.whole(plan).step_s
    return {"plan": plan.label, "predicted_s": step.value if step else None, "step_s": [], "reason": ""}


def _run(planning: Planning, plan: Plan, row: dict[str, Any]) -> None:
    if row["reason"]:
        return
    seen = few_steps(planning, plan, STEPS, expected_s=row["predicted_s"] or 1.0)
    if seen.outcome is OutcomeKind.OK and seen.step_s:
        row["step_s"].append(statistics.median(seen.step_s[WARM_UP:] or seen.step_s))
    else:
        row["reason"] = seen.reason or seen.outcome.value


# -- the page -------------------------------------------------------------------------------------


def _records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def write_page() -> None:
    records = _records()
    lines = [
        "# Regret of `memfit plan --measure` on jobs drawn at random",
        "",
        "Generated by `python benchmarks/regret.py --drawn` from `benchmarks/records/`; do not edit.",
        "Shared machines are noisy: compare times within one job only.",
        "",
    ]
    for seed in dict.fromkeys(r["seed"] for r in records):
        of_seed = [r for r in records if r["seed"] == seed]
        regrets = [max(0.0, r["regret"]) for r in of_seed]
        where, within = of_seed[0]["environment"], sum(r <= 0.05 for r in regrets)
        lines += [
            f"## Seed {seed}",
            "",
            f"{where.get('processor')}, torch {where.get('torch')}.",
            f"Regret at most 5 % in {within} of {len(regrets)}, worst {max(regrets):.1%}.",
            *([CONDITIONS[seed]] if seed in CONDITIONS else []),
            "",
            "| job | cap | recommended | step | quickest rival | step | regret | rivals | took |",
            "|---|--:|---|--:|---|--:|--:|--:|--:|",
            *map(_line, of_seed),
            "",
        ]
    PAGE.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def _line(record: dict[str, Any]) -> str:
    own, *others = record["rows"]
    fine = [r for r in others if len(r["step_s"]) == ROUNDS]
    rival = min(fine, key=lambda r: statistics.median(r["step_s"])) if fine else own
    cells = [
        record["job"],
        format_bytes(record["cap_bytes"]),
        own["plan"],
        format_seconds(statistics.median(own["step_s"])),
        rival["plan"],
        format_seconds(statistics.median(rival["step_s"])),
        f"{max(0.0, record['regret']):.1%}",
        str(len(fine)),
        format_seconds(record["took_s"]),
    ]
    return f"| {' | '.join(cells)} |"
