"""Every reason that `memfit plan` gives, held against an enumeration: is "no plan with it fits" true?

    python benchmarks/reasons.py --round first     enumerate the 30 spaces, ask, record, write the page
    python benchmarks/reasons.py --round "second draw, mended"    ask again with other caps
    python benchmarks/reasons.py --page            the page from the records only

A space is drawn by its number alone (`draw`): architecture, size, device or devices, memory, goal, accuracy,
and the techniques that are not excluded. Every plan of the space is traced whole, one after another, and
nothing of the search but the list of its plans is used. What the search says is then compared by `judge`,
whose rules were fixed before the first space was enumerated. In most of the spaces of the first draw no plan
fitted, so that few reasons were given. In rounds whose name begins with "second draw", the cap is what one of
the enumerated plans needs (`second_cap`), drawn before these rounds.

- "does not fit" is true if no plan of the space with the technique fits.
- "costs more" is true if the best plan with the technique that fits is more than 3 % worse than the
  recommended one; "not needed", if it is not more than 3 % better; "uncertain", if it is not more than 5 %
  better, which is the error that the search allows for between two predicted times.
- "needed" and "included" (many devices) are the same of the plans without the technique.
- "saves" is true if bytes and ratio of step times are those of the two plans.
- "not looked at" is neither true nor false. The page counts it apart.

All of them allow 1 % at the borders. "Fits" is what `capacity` says of the trace of the whole plan.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from regret_jobs import named

from memfit.catalog.machine_spec import machine
from memfit.cost.host import host_holds
from memfit.planner import search
from memfit.planner.capacity import fits_under, needed_bytes
from memfit.planner.device_pricing import Aim, Scale
from memfit.planner.evaluate import Pricer
from memfit.planner.grid_search import priced_grids
from memfit.planner.parallelism_grid import grids
from memfit.planner.plan_space import plans, usable
from memfit.planner.request import Request, limit_parts, make_pricer
from memfit.planner.selection import Objective
from memfit.techniques.registry import TECHNIQUES, make_plain_plan, without
from memfit.types.errors import NothingFits, UserError
from memfit.types.job import JobRef
from memfit.types.machine import Device, Fact, Machine
from memfit.types.plan import Accuracy, Bounds, Plan
from memfit.types.result import Estimate, Reason

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "records" / "reasons.jsonl", HERE / "reasons.md"
COUNT, MULTI_DEVICE = 30, 8  # spaces; the first so many are for two devices
IN_GRIDS = 6  # the first so many of these are of architectures with at least three equal blocks
MOST_PLANS = {
    1: 120,
    2: 60,
}  # of a space, by number of devices: techniques are excluded until so few are left
SIZES: dict[str, tuple[tuple[int, ...], ...]] = {  # widths, depths, lengths (sides, nodes), batches
    "gpt": ((64, 96), (2, 3, 4), (32, 64), (4, 8)),
    "bert": ((64, 96), (2, 3, 4), (32, 64), (4, 8)),
    "mixer": ((64, 96), (2, 3), (32, 64), (4, 8)),
    "rnn": ((64, 128), (1, 2), (32, 64), (4, 8)),
    "vit": ((64, 96), (2, 3, 4), (64,), (4, 8)),
    "cnn": ((16, 32), (2, 3), (32, 64), (4, 8)),
    "conv1d": ((16, 32), (2, 3), (256, 512), (4, 8)),
    "unet": ((16,), (2,), (32, 64), (4, 8)),
    "mlp": ((256, 512), (2, 4, 6), (1,), (64, 128)),
    "gnn": ((64, 96), (2, 3), (16, 32), (4, 8)),
}
REPEATED = ("gpt", "bert", "vit", "mlp")
DEVICES = {1: ("processor", "T4", "A100-80GB-SXM", "RTX-4090"), 2: ("2xT4", "2xA100-80GB-SXM", "2xRTX-4090")}
GOALS = {1: ("fastest", "fastest", "smallest", "cheapest"), 2: ("fastest", "fastest", "smallest")}
CAPS = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)  # of the peak of plain training's tensors
# Excluded last, in a random order as well; data parallelism never.
KEPT_LONGEST = ("gradient-accumulation", "bf16-autocast", "activation-checkpointing", "adamw-8bit", "ddp")
ACCURACIES = ("exact", "rounding", "rounding", "any")
SMALL_STATES = 1 / 16  # of the cap; if states are smaller, the search does not look at other optimizers
EQUAL, CLOSE, BORDER = 1.03, 1.05, 1.01


def fact(value: float) -> Fact:
    return Fact(value=value, source="assumed for this benchmark", date="2026-11-29", kind="assumed")


PROCESSOR = Machine(
    name="processor",
    device=Device(
        name="processor",
        kind="cpu",
        memory_bytes=fact(16 * 2**30),
        bandwidth_bytes_s=fact(2e10),
        peak_flops={"float32": fact(1e11), "bfloat16": fact(2e11)},
        power_w=fact(20.0),
    ),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SmallSpace:
    """A question to the search. ``offered``: the techniques that are not excluded."""

    number: int
    job: str
    devices: str
    cap_ratio: float
    goal: str
    accuracy: str
    offered: tuple[str, ...]

    @property
    def bounds(self) -> Bounds:
        return Bounds(without=tuple(sorted(set(TECHNIQUES) - set(self.offered))))

    def request(self) -> Request:
        on = PROCESSOR if self.devices == "processor" else machine(self.devices)
        return Request(
            job=JobRef(spec=f"{HERE / 'regret_jobs.py'}:{self.job}"),
            machine=on,
            goal=Objective(self.goal),
            accuracy=Accuracy(self.accuracy),
            bounds=self.bounds,
            ranks=on.device_count,
        )


def draw(number: int) -> SmallSpace:
    """Draw space ``number``. Techniques are excluded in a random order until few enough plans are left."""
    chance = random.Random(1000 + number)
    devices = 2 if number < MULTI_DEVICE else 1
    kind = chance.choice(sorted(SIZES) if devices == 1 or number >= IN_GRIDS else sorted(REPEATED))
    sizes = {letter: chance.choice(options) for letter, options in zip("wdnb", SIZES[kind], strict=True)}
    if number < IN_GRIDS:
        sizes["d"] = 4
    space = SmallSpace(
        number=number,
        job=named(kind, sizes),
        devices=chance.choice(DEVICES[devices]),
        cap_ratio=chance.choice(CAPS),
        goal=chance.choice(GOALS[devices]),
        accuracy=chance.choice(ACCURACIES),
        offered=tuple(TECHNIQUES),
    )
    order = chance.sample(sorted(set(TECHNIQUES) - set(KEPT_LONGEST)), len(TECHNIQUES) - len(KEPT_LONGEST))
    order += chance.sample(KEPT_LONGEST[:-1], len(KEPT_LONGEST) - 1)
    request, pricer, in_grids = prepared(space)
    for name in ("", *order):
        space = dataclasses.replace(space, offered=tuple(t for t in space.offered if t != name))
        request = dataclasses.replace(request, bounds=space.bounds)
        found = plans_of(request, pricer, in_grids)
        if sum(1 for _ in itertools.islice(found, MOST_PLANS[devices] + 1)) <= MOST_PLANS[devices]:
            return space
    raise AssertionError("plain training alone is few enough")


# -- the enumeration ------------------------------------------------------------------------------


def prepared(space: SmallSpace) -> tuple[Request, Pricer, bool]:
    """Return (the request with its cap, a pricer, whether the search divides the model, too, over ranks)."""
    request = space.request()
    job, pricer = make_pricer(request, replicas=False)
    in_grids = request.ranks > 1 and pricer.space.block_count >= 3 and pricer.repeats
    if not in_grids:
        limit_parts(pricer, request.accuracy)
    plain = pricer.whole(make_plain_plan(min(request.ranks, job.batch_size)))
    saved_bytes = int(plain.allocated_bytes.value * (1 - space.cap_ratio))
    cap_bytes = needed_bytes(plain, request.machine) - saved_bytes
    return dataclasses.replace(request, cap_bytes=cap_bytes), pricer, in_grids


def plans_of(request: Request, pricer: Pricer, in_grids: bool) -> Iterator[Plan]:
    if not in_grids:
        plain = pricer.whole(make_plain_plan(request.ranks))
        parts = ("parameter", "gradient", "optimizer_state")
        state_bytes = sum(plain.at_peak_bytes.get(part, 0) for part in parts)
        assert request.cap_bytes is not None
        techniques, _ = usable(
            pricer.space,
            request.accuracy,
            small_states_bytes=state_bytes if state_bytes < SMALL_STATES * request.cap_bytes else None,
            dependence=pricer.dependence if pricer.job.batch_size > 1 else None,
        )
        excluded = request.bounds.without
        yield from plans(pricer.space, [t for t in techniques if t.name not in excluded])
        return
    scale = Scale(pricer, aim_of(request))
    limits = scale.limits(request.ranks)
    if sum(math.prod(grid.shape) for grid in grids(limits)) > 4 * MOST_PLANS[2]:
        yield from itertools.repeat(Plan(), MOST_PLANS[2] + 1)  # too many: only their number is wanted
        return
    try:
        pricing, precise_grids, _ = priced_grids(scale.traced, request.machine, scale.model, limits)
    except UserError:  # no plan is possible
        return
    for grid, compute in precise_grids:
        if pricing.price(grid, compute) is not None:
            yield from map(grid.plan, itertools.product(*map(range, grid.shape)))


def aim_of(request: Request) -> Aim:
    assert request.cap_bytes is not None
    return Aim(
        goal=request.goal,
        accuracy=request.accuracy,
        cap_bytes=request.cap_bytes,
        needs=lambda e: needed_bytes(e, request.machine),
        host=lambda e: host_holds(e, request.machine),
        bounds=request.bounds,
        tell=lambda *progress: None,
    )


def value(estimate: Estimate, goal: str) -> float:
    """Return what the goal minimises."""
    if goal == "smallest":
        return estimate.allocated_bytes.value
    if goal == "cheapest" and estimate.usd is not None:
        return estimate.usd
    return estimate.step_s.value if estimate.step_s else math.inf


def enumerate_space(space: SmallSpace) -> dict[str, Any]:
    """Trace every plan of the space and return the numbers by which reasons are judged."""
    begun = time.perf_counter()
    request, pricer, in_grids = prepared(space)
    assert request.cap_bytes is not None
    fits = fits_under(request.cap_bytes, request.machine)
    rows: list[dict[str, Any]] = []
    for plan in plans_of(request, pricer, in_grids):
        try:
            estimate = pricer.whole(plan)
        except Exception as error:  # noqa: BLE001  a plan that cannot be traced cannot be recommended either
            rows.append({"plan": plan.label, "error": str(error)[:120]})
            continue
        rows.append(
            {
                "plan": plan.label,
                "techniques": [u.technique for u in plan.uses],
                "need": needed_bytes(estimate, request.machine),
                "fits": fits(estimate),
                "value": value(estimate, space.goal),
                "tensors": int(estimate.allocated_bytes.value),
                "step_s": estimate.step_s.value if estimate.step_s else None,
            }
        )
    return {
        "round": "enumeration",
        **dataclasses.asdict(space),
        "in_grids": in_grids,
        "cap_bytes": request.cap_bytes,
        "rows": rows,
        "took_s": time.perf_counter() - begun,
    }


def second_cap(enumeration: Mapping[str, Any]) -> int:
    """Draw a cap: the need of one of the enumerated plans, among the smaller 60 % of them."""
    needs = sorted({r["need"] for r in enumeration["rows"] if "error" not in r})
    chance = random.Random(2000 + enumeration["number"])
    return int(needs[int(chance.uniform(0.0, 0.6) * len(needs))])


# -- the answer -----------------------------------------------------------------------------------


def answer(space: SmallSpace, enumeration: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Ask the search and return its reasons, each with the judgement.

    In a second draw, a plan fits if it needs at most the other cap: no plan of the first draw was kept out by
    its host. Techniques that the search leaves out because states are small under the cap are no part of the
    space.
    """
    request, _, _ = prepared(space)
    rows = [r for r in enumeration["rows"] if "error" not in r]
    if name.startswith("second draw"):
        assert all(r["fits"] for r in rows if r["need"] <= enumeration["cap_bytes"])
        cap_bytes = second_cap(enumeration)
        request = dataclasses.replace(request, cap_bytes=cap_bytes)
        rows = [{**r, "fits": r["need"] <= cap_bytes} for r in rows]
    record: dict[str, Any] = {"round": name, "number": space.number, "recommended": None, "reasons": []}
    record["cap_bytes"] = request.cap_bytes
    begun = time.perf_counter()
    try:
        planning = search.search(request, lambda *progress: None)
    except NothingFits as error:
        true = not any(r["fits"] for r in rows)
        record["reasons"].append(
            {"kind": "nothing_fits", "technique": "", "detail": str(error), "true": true}
        )
    else:
        chosen = planning.result.recommended
        assert chosen is not None
        winner = chosen.estimate
        small = {r.technique for r in chosen.reasons if r.kind == "left_out_small"}
        rows = [r for r in rows if not small.intersection(r["techniques"])]
        record |= {
            "recommended": winner.plan.label,
            "considered": planning.result.considered,
            "enumerated": len(rows),
            "fitting": sum(r["fits"] for r in rows),
            "traced": len(planning.pricer.traces),
            "best": min((r["value"] for r in rows if r["fits"]), default=None),
            "value": value(winner, space.goal),
        }
        record["reasons"] = [
            {**dataclasses.asdict(r), **judge(r, winner, value(winner, space.goal), rows, request)}
            for r in chosen.reasons
        ]
    record["took_s"] = time.perf_counter() - begun
    record["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return record


def judge(
    reason: Reason, winner: Estimate, reached: float, rows: Sequence[Mapping[str, Any]], request: Request
) -> dict[str, Any]:
    """Return whether the reason is true by the ``rows`` of the enumeration (None: it says nothing that these
    can show), and the numbers that decide it. ``reached``: the winner's value by the goal."""
    about_plans_without = reason.kind.startswith(("needed", "without_"))
    related = [r for r in rows if (reason.technique in r["techniques"]) != about_plans_without]
    fitting = [r for r in related if r["fits"]]
    best = min(fitting, key=lambda r: r["value"], default=None)
    ratio = best["value"] / reached if best else math.inf
    seen = {
        "related": len(related),
        "fitting": len(fitting),
        "best_ratio": ratio if best else None,
        "best_plan": best["plan"] if best else None,
        "least_need": min((r["need"] for r in related), default=None),
    }
    if reason.kind in ("left_out_too_large", "left_out_late", "needed_priced", "needed_late", "needed"):
        return {"true": not fitting, **seen}
    if reason.kind in ("left_out_slower", "without_worse"):
        return {"true": best is not None and ratio >= EQUAL / BORDER, **seen}
    if reason.kind in ("left_out_not_needed", "without_as_good"):
        return {"true": best is not None and ratio >= 1 / EQUAL / BORDER, **seen}
    if reason.kind == "left_out_uncertain":
        return {"true": best is not None and ratio >= 1 / CLOSE / BORDER, **seen}
    if reason.kind == "saves":
        other = next((r for r in rows if r["plan"] == without(winner.plan, reason.technique).label), None)
        if other is None or winner.step_s is None or reason.time_ratio is None:
            return {"true": None}
        saved = other["tensors"] - int(winner.allocated_bytes.value)
        times = winner.step_s.value / other["step_s"]
        same = saved == reason.saved_bytes and math.isclose(times, reason.time_ratio, rel_tol=BORDER - 1)
        return {"true": same, "enumerated_saved": saved, "enumerated_ratio": times}
    return {"true": None}


# -- the page -------------------------------------------------------------------------------------

GROUPS = {
    "does not fit": ("left_out_too_large", "left_out_late"),
    "needed": ("needed_priced", "needed_late", "needed"),
    "costs more": ("left_out_slower",),
    "not needed": ("left_out_not_needed",),
    "uncertain": ("left_out_uncertain",),
    "included (many devices)": ("without_worse", "without_as_good"),
    "saves": ("saves",),
    "nothing fits": ("nothing_fits",),
    "not looked at": ("left_out_not_looked_at", "needed_not_looked_at"),
}


def page(records: Sequence[Mapping[str, Any]]) -> str:
    enumerations = {r["number"]: r for r in records if r["round"] == "enumeration"}
    rounds: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in records:
        if record["round"] != "enumeration":
            rounds.setdefault(record["round"], {})[record["number"]] = record
    plan_count = sum(len(e["rows"]) for e in enumerations.values())
    empty = sum(not any(r.get("fits", False) for r in e["rows"]) for e in enumerations.values())
    lines = [
        "# Are the reasons true?",
        "",
        "Generated by `python benchmarks/reasons.py` from `benchmarks/records/reasons.jsonl`; do not edit.",
        f"{len(enumerations)} small spaces drawn at random, {plan_count:,} plans, each traced whole; every",
        "reason of the search is held against them. The rules were fixed before the first enumeration and",
        "stand at the top of `benchmarks/reasons.py`. Memory and times are predictions: tested is the",
        "search, not the predictor.",
        "",
        f"In {empty} spaces of the first draw no plan fits, so that few reasons are given. In the second",
        "draw the cap is what one of the enumerated plans needs.",
        *([] if len(rounds) > 1 else ["It is fixed in the script, but was not run yet."]),
    ]
    for name, answers in sorted(rounds.items()):
        lines += ["", f"## Round: {name}", "", *_table(answers), "", *_false(answers, enumerations)]
    last = rounds[max(rounds)] if rounds else {}
    lines += ["", "## Spaces", "", *_spaces(enumerations, last)]
    return "\n".join(lines) + "\n"


def _table(answers: Mapping[int, Mapping[str, Any]]) -> list[str]:
    lines = ["| reason | given | true | false | not decided |", "|---|--:|--:|--:|--:|"]
    reasons = [r for a in answers.values() for r in a["reasons"]]
    for group, kinds in GROUPS.items():
        verdicts = [r["true"] for r in reasons if r["kind"] in kinds]
        counts = [len(verdicts), *(sum(v is wanted for v in verdicts) for wanted in (True, False, None))]
        lines.append(f"| {group} | {' | '.join(map(str, counts))} |")
    gaps = [a["value"] / a["best"] - 1 for a in answers.values() if a.get("best")]
    took_s = sum(a["took_s"] for a in answers.values())
    traced = sum(a.get("traced", 0) for a in answers.values())
    lines += [
        "",
        f"The recommended plan is at most {max(gaps, default=0):.1%} worse by its goal than the best of the",
        f"enumeration (median {sorted(gaps)[len(gaps) // 2] if gaps else 0:.1%}). The searches took",
        f"{took_s:,.0f} s and made {traced:,} traces.",
    ]
    return lines


def _false(answers: Mapping[int, Mapping[str, Any]], spaces: Mapping[int, Mapping[str, Any]]) -> list[str]:
    lines = [
        "| space | job | says | technique | best by the enumeration, or what was said |",
        "|--:|---|---|---|---|",
    ]
    for number, record in sorted(answers.items()):
        for reason in record["reasons"]:
            if reason["true"] is False:
                ratio = reason.get("best_ratio")
                shown = reason.get("detail", "") if ratio is None else f"{ratio:.3f}: {reason['best_plan']}"
                kind = next((g for g, kinds in GROUPS.items() if reason["kind"] in kinds), reason["kind"])
                job = spaces[number]["job"]
                lines.append(f"| {number} | {job} | {kind} | {reason['technique']} | {shown} |")
    return lines if len(lines) > 2 else ["No reason is false."]


def _spaces(
    enumerations: Mapping[int, Mapping[str, Any]], last: Mapping[int, Mapping[str, Any]]
) -> list[str]:
    lines = [
        "| space | job | on | goal | accuracy | plans | fit at first | fit at last | recommended at last |",
        "|--:|---|---|---|---|--:|--:|--:|---|",
    ]
    for number, e in sorted(enumerations.items()):
        fitting = sum(r.get("fits", False) for r in e["rows"])
        plan = last.get(number, {}).get("recommended") or "nothing fits"
        last_fitting = last.get(number, {}).get("fitting", 0)
        cells = (number, e["job"], e["devices"], e["goal"], e["accuracy"], len(e["rows"]), fitting)
        cells = (*cells, last_fitting, plan)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def append(record: Mapping[str, Any]) -> None:
    with RECORDS.open("a", encoding="utf-8") as file:
        text = json.dumps(record).replace(f"{HERE.parent}/", "")  # names no folder of this machine
        file.write(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--round", default="", help="name under which answers are recorded")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the spaces; default: all")
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    numbers = range(COUNT) if args.only is None else args.only
    for number in numbers if args.round and not args.page else ():
        enumeration = next(
            (r for r in records() if (r["round"], r["number"]) == ("enumeration", number)), None
        )
        if enumeration is None:
            enumeration = enumerate_space(draw(number))
            append(enumeration)
        names = [field.name for field in dataclasses.fields(SmallSpace)]
        space = SmallSpace(
            **{n: enumeration[n] for n in names if n != "offered"}, offered=tuple(enumeration["offered"])
        )
        if any((r["round"], r["number"]) == (args.round, number) for r in records()):
            continue
        answered = answer(space, enumeration, args.round)
        append(answered)
        wrong = sum(r["true"] is False for r in answered["reasons"])
        print(
            number, space.job, space.devices, len(enumeration["rows"]), "plans,", wrong, "false", flush=True
        )
    PAGE.write_text(page(records()), encoding="utf-8")


if __name__ == "__main__":
    main()
