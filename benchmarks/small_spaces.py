"""Does the search find the best plan, and are its reasons true? 30 small spaces drawn at random, enumerated.

    python benchmarks/small_spaces.py --round first      draw, enumerate, ask, record, write the page
    python benchmarks/small_spaces.py --round again --rows first     ask again about what was enumerated
    python benchmarks/small_spaces.py --page             the page from the records only
    python benchmarks/small_spaces.py --seed 1 --round a --records FILE     other spaces, for development

A space is drawn by seed and number alone (`draw`): architecture, sizes, device or devices, goal, accuracy,
micro-batch, cap, and the techniques that are not excluded. Every plan of the space is traced whole, one after
another; nothing of the search is used but the list of its plans, and for pipelines that list has more: every
division of the blocks in which the first and the last stage have up to two fewer. The cap is what one of the
enumerated plans needs (`cap_of`), so that something fits and, unless all plans need the same, something does
not. Spaces of seed 28 are judged; the search is mended by what others show.

What the search recommends is compared with the best of the enumeration, found by the search's published rule
(`best_by_rule`): of the plans that fit and whose score by the goal is within 3 % of the lowest (5 % for step
times and what follows from them, on one device or where only the batch is divided), the mildest and simplest.
The gap is by how much the recommended plan's score is above that plan's, 0 if it is below. Scores are those
of the enumeration, also that of the recommended plan; a plan outside it has the score that the search says.
The page also says how far each is above the lowest score of all. An answer that is an error, such as
"nothing fits", has an infinite gap.

Aims, fixed before the first run: a gap of at most 0.1 % in 28 of the 30 spaces, at most 2 % in the others;
every reason true. Rules for reasons (`judge`):

- "does not fit" is true if no plan of the space with the technique fits.
- "costs more" is true if the best plan with the technique that fits is more than 3 % worse than the
  recommended one; "not needed", if it is not more than 3 % better; "uncertain", if it is not more than 5 %
  better, which is the error that the search allows for between two predicted times.
- "needed" and "included" (many devices) are the same of the plans without the technique.
- "too small to matter" is true if the best plan with the technique that fits is not more than 5 % better.
- "saves" is true if bytes and ratio of step times are those of the two plans.
- "not looked at" is neither true nor false. The page counts it apart.

All of them allow 1 % at the borders. "Fits" is what `capacity` says of the trace of the whole plan. Not in
any space: optimal-checkpointing, which has a plan for every number of bytes, and adapters, chunking,
imported optimizers and compilation, which a search proposes only where they were asked for or take long.
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
from memfit.planner.block_costs import BLOCKS
from memfit.planner.capacity import memory_cap, needed_bytes
from memfit.planner.evaluate import Predictor
from memfit.planner.multi_device import counts
from memfit.planner.multi_device_predictor import MultiDevicePredictor, MultiDeviceRequest
from memfit.planner.parallelism_grid import Grid, Limits, grids, rank_blocks
from memfit.planner.plan_space import plans, usable
from memfit.planner.request import Request, limit_micro_batches, make_predictor
from memfit.planner.selection import Objective, preference_key
from memfit.techniques.registry import TECHNIQUES, without
from memfit.types.errors import NothingFits, UserError
from memfit.types.job import JobRef
from memfit.types.machine import Device, Fact, Machine
from memfit.types.plan import Accuracy, Bounds, Plan
from memfit.types.result import Estimate, Reason

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "records" / "small_spaces.jsonl", HERE / "small_spaces.md"
SEED = 28
Choices = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What spaces of one kind are drawn from. ``count``: how many of the 30 there are. ``kept``: techniques
    that are excluded last; where there are several alternatives, one of each tuple is drawn."""

    count: int
    jobs: tuple[str, ...]
    depths: tuple[int, ...]
    devices: tuple[str, ...]
    goals: tuple[str, ...] = ("fastest", "fastest", "smallest", "cheapest")
    kept: tuple[Choices, ...] = ()


DATA = ("ddp", "fsdp2", "zero")
FAMILIES: Mapping[str, Family] = {
    "dense, several devices": Family(
        count=5,
        jobs=("gpt", "bert", "vit"),
        depths=(3, 4),
        devices=("2xA100-80GB-SXM", "4xH100-SXM", "2xRTX-4090", "4xL4"),
        goals=("fastest", "fastest", "smallest", "cheapest", "fewest"),
        kept=(DATA, ("tensor-parallel", "context-parallel", "activation-checkpointing")),
    ),
    "mixture of experts": Family(
        count=4,
        jobs=("moe",),
        depths=(3, 4),
        devices=("2xA100-80GB-SXM", "4xH100-SXM", "8xH100-SXM", "8xA100-80GB-SXM"),
        goals=("fastest", "fastest", "smallest"),
        kept=(("ddp", "fsdp2"), ("expert-parallel",)),
    ),
    "uneven pipeline": Family(
        count=4,
        jobs=("gpt", "bert"),
        depths=(3, 5, 7),
        devices=("2xA100-80GB-SXM", "4xH100-SXM", "2xRTX-4090"),
        goals=("fastest", "fastest", "smallest"),
        kept=(("ddp",), ("pipeline",)),
    ),
    "encoder-decoder": Family(
        count=4,
        jobs=("encdec",),
        depths=(2, 3, 4),
        devices=("A100-80GB-SXM", "RTX-4090", "2xA100-80GB-SXM", "4xH100-SXM"),
        goals=("fastest", "fastest", "smallest"),
        kept=(DATA, ("activation-checkpointing", "bf16-autocast")),
    ),
    "convolutions": Family(
        count=4,
        jobs=("unet", "cnn", "conv1d"),
        depths=(2, 3),
        devices=("processor", "T4", "RTX-4090", "2xA100-80GB-SXM"),
        goals=("fastest", "fastest", "smallest"),
        kept=(("ddp", "fsdp2"), ("gradient-accumulation",), ("bf16-autocast", "activation-checkpointing")),
    ),
    "graphs and perceptrons": Family(
        count=3,
        jobs=("gnn", "mlp", "rnn", "mixer"),
        depths=(2, 3),
        devices=("processor", "L4", "H100-SXM", "2xRTX-4090"),
        goals=("fastest", "fastest", "smallest"),
        kept=(("ddp", "fsdp2"), ("gradient-accumulation",), ("bf16-parameters", "adamw-8bit")),
    ),
    "NVMe": Family(  # on hosts whose disk the catalog knows; plans to disk are those that the search has
        count=3,
        jobs=("gpt", "mlp"),
        depths=(3, 4),
        devices=("A100-80GB-SXM", "H100-SXM", "2xH100-SXM"),
        goals=("fastest", "smallest"),
        kept=(("zero", "fsdp2"), ("activation-offload",)),
    ),
    "dense, one device": Family(
        count=3,
        jobs=("gpt", "bert", "vit"),
        depths=(3, 4, 6),
        devices=("processor", "T4", "A100-80GB-SXM", "RTX-4090"),
        kept=(("gradient-accumulation",), ("activation-checkpointing",), ("bf16-autocast", "adamw-8bit")),
    ),
}
COUNT = sum(f.count for f in FAMILIES.values())
SIZES: dict[str, tuple[tuple[int, ...], ...]] = {  # widths, lengths (sides, nodes), batches
    "gpt": ((256, 512), (64, 128), (8, 16)),
    "bert": ((256, 512), (64, 128), (8, 16)),
    "vit": ((256, 512), (64, 128), (8, 16)),
    "moe": ((256, 512), (64, 128), (8, 16)),
    "encdec": ((256, 512), (64, 128), (8, 16)),
    "mixer": ((256, 512), (64, 128), (8, 16)),
    "rnn": ((256, 512), (32, 64), (8, 16)),
    "cnn": ((32, 64), (32, 64), (8, 16)),
    "conv1d": ((32, 64), (512, 1024), (8, 16)),
    "unet": ((16, 32), (32, 64), (8, 16)),
    "mlp": ((512, 1024), (1,), (256, 1024)),
    "gnn": ((128, 256), (32, 64), (8, 16)),
}
# Of a space on one device and on several: techniques are excluded until so few are left.
MOST_PLANS = {False: 80, True: 96}
NEVER = (
    "optimal-checkpointing",
    "chunking",
    "compile",
    "float8-linear",
    "lora",
    "qlora",
    "optimizer",
    "adamw-paged",
)
ACCURACIES = ("exact", "rounding", "rounding", "any")
MOST_FEWER = 2  # blocks that the first or the last stage may have fewer
CAPS = (0.05, 0.7)  # of the way from the smallest to the largest of the different needs
WORTH, WORST, WANTED = 0.001, 0.02, 28
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
    """A question to the search, without its cap. ``offered``: the techniques that are not excluded.
    ``cap_place``: where the cap is, from 0 (the smallest need) to 1 (the largest)."""

    seed: int
    number: int
    family: str
    job: str
    devices: str
    goal: str
    accuracy: str
    micro_batch: int
    cap_place: float
    offered: tuple[str, ...]

    def request(self) -> Request:
        on = PROCESSOR if self.devices == "processor" else machine(self.devices)
        excluded = tuple(sorted(set(TECHNIQUES) - set(self.offered)))
        return Request(
            job_ref=JobRef(spec=f"{HERE / 'regret_jobs.py'}:{self.job}"),
            machine=on,
            goal=Objective(self.goal),
            accuracy=Accuracy(self.accuracy),
            bounds=Bounds(without=excluded, micro_batch=self.micro_batch),
            ranks=on.device_count,
        )


def draw(seed: int, number: int) -> SmallSpace:
    """Draw space ``number``, from 0. Techniques are excluded in a random order, in which each has a place of
    its own whatever others there are, until few enough plans are left."""
    chance = random.Random(f"{seed} {number}")
    families = [name for name, family in FAMILIES.items() for _ in range(family.count)]
    family = FAMILIES[families[number]]
    kind = chance.choice(family.jobs)
    sizes = {letter: chance.choice(options) for letter, options in zip("wnb", SIZES[kind], strict=True)}
    devices = chance.choice(family.devices)
    several = devices[0].isdigit()
    space = SmallSpace(
        seed=seed,
        number=number,
        family=families[number],
        job=named(kind, sizes | {"d": chance.choice(family.depths)}),
        devices=devices,
        goal=chance.choice(family.goals),
        accuracy=chance.choice(ACCURACIES),
        micro_batch=chance.choice((0, 1, 2)) if several and kind not in ("mlp", "unet", "cnn") else 0,
        cap_place=round(chance.uniform(*CAPS), 3),
        offered=tuple(name for name in TECHNIQUES if name not in NEVER),
    )
    kept = [chance.choice(names) for names in family.kept]  # data parallelism is never excluded
    order = sorted(space.offered, key=lambda name: random.Random(f"{seed} {number} {name}").random())
    if space.micro_batch:
        kept.insert(0, "gradient-accumulation")  # micro-batches of this size need it
    order = [*(n for n in order if n not in kept), *(n for n in reversed(kept) if n not in DATA)]
    for name in ("", *order):
        space = dataclasses.replace(space, offered=tuple(t for t in space.offered if t != name))
        question = Question(space)
        if 0 < question.count(MOST_PLANS[several] + 1) <= MOST_PLANS[several]:
            return space
    raise AssertionError(f"no exclusion leaves a small space: {space}")


# -- the enumeration ------------------------------------------------------------------------------


class Question:
    """A space, prepared to list its plans and to trace them. ``in_grids``: whether the search divides the
    model, too, over the devices."""

    def __init__(self, space: SmallSpace) -> None:
        self.space, self.request = space, space.request()
        self.predictor = _predictor(space)
        ranks = self.request.ranks
        self.in_grids = (
            ranks > 1 and self.predictor.job_facts.block_count >= BLOCKS and self.predictor.repeats
        )
        if not self.in_grids:
            limit_micro_batches(self.predictor, self.request.accuracy)

    def count(self, most: int) -> int:
        """Return the number of plans, or ``most`` if there are more."""
        if self.in_grids:
            found = 0
            for limits in self._limits():
                for grid in grids(limits):
                    found += math.prod(grid.shape) * sum(1 for _ in _divisions(grid, limits))
                    if found > most:
                        return most
            return found
        return sum(1 for _ in itertools.islice(self.plans(), most))

    def plans(self) -> Iterator[Plan]:
        if self.in_grids:
            listed = (
                divided.plan(index)
                for limits in self._limits()
                for grid in grids(limits)
                for divided in _divisions(grid, limits)
                for index in itertools.product(*map(range, grid.shape))
            )
            yield from dict.fromkeys(listed)
            return
        predictor, request = self.predictor, self.request
        dependence = predictor.dependence if predictor.job.batch_size > 1 else None
        techniques, _ = usable(predictor.job_facts, request.accuracy, dependence=dependence)
        names = self.space.offered
        for plan in plans(predictor.job_facts, [t for t in techniques if t.name in names]):
            size, use = self.space.micro_batch, plan.get("gradient-accumulation")
            parts = int(use.settings["micro_batches"]) if use else 1
            if not size or size * parts == predictor.job_facts.batch_size:
                yield plan

    def _limits(self) -> Iterator[Limits]:
        for ranks in counts(self.request.ranks, self.request.goal):
            yield MultiDevicePredictor(self.predictor, many_devices_request(self.request, 2**50)).limits(
                ranks
            )

    def whole(self, plan: Plan) -> Estimate:
        """Return the estimate of the plan's whole trace, with the money of as many devices as it has."""
        estimate = self.predictor.whole(plan)
        return (
            MultiDevicePredictor(self.predictor, many_devices_request(self.request, 2**50)).with_bill(
                estimate
            )
            if self.in_grids
            else estimate
        )


_PREDICTORS: dict[tuple[str, str], Predictor] = {}


def _predictor(space: SmallSpace) -> Predictor:
    key = space.job, space.devices
    if key not in _PREDICTORS:
        _PREDICTORS.clear()
        _PREDICTORS[key] = make_predictor(space.request(), replicas=False)[1]
    return dataclasses.replace(_PREDICTORS[key])


def _divisions(grid: Grid, limits: Limits) -> Iterator[Grid]:
    """Yield the grid with every possible division of the blocks over its pipeline's stages."""
    layout = grid.layout
    if layout.stages == 1 or layout.schedule == "zero-bubble-v":
        yield grid
        return
    for fewer in itertools.product(range(MOST_FEWER + 1), repeat=2):
        try:
            rank_blocks(limits.blocks, layout.stages, layout.virtual, layout.schedule, fewer)
        except UserError:
            continue
        yield dataclasses.replace(grid, layout=dataclasses.replace(layout, fewer=fewer))


def many_devices_request(request: Request, cap_bytes: int) -> MultiDeviceRequest:
    return MultiDeviceRequest(
        goal=request.goal,
        accuracy=request.accuracy,
        cap=memory_cap(cap_bytes, request.machine, request.engine),
        bounds=request.bounds,
        progress=lambda *progress: None,
    )


def value(estimate: Estimate, goal: str) -> float:
    """Return what the goal minimises."""
    time_s = estimate.step_s.value if estimate.step_s else math.inf
    if goal == "smallest":
        return estimate.allocated_bytes.value
    if goal == "cheapest" and estimate.usd is not None:
        return estimate.usd
    if goal == "fewest":
        return estimate.plan.ranks * (1 + 1e-3 * time_s / (1 + time_s))
    return time_s


def enumerate_space(question: Question) -> list[dict[str, Any]]:
    """Trace every plan of the space, and return the numbers by which answers are judged, from the mildest and
    simplest plan to the last."""
    rows: list[tuple[Any, dict[str, Any]]] = []
    for plan in question.plans():
        try:
            estimate = question.whole(plan)
        except Exception as error:  # noqa: BLE001  a plan that cannot be traced cannot be recommended either
            rows.append((preference_key(plan), {"plan": plan.label, "error": str(error)[:120]}))
            continue
        rows.append((preference_key(plan, estimate.dependence), _row(estimate, question)))
    return [row for _, row in sorted(rows, key=lambda entry: entry[0])]


def _row(estimate: Estimate, question: Question) -> dict[str, Any]:
    return {
        "plan": estimate.plan.label,
        "techniques": [u.technique for u in estimate.plan.uses],
        "need": needed_bytes(estimate, question.request.machine),
        "host": host_holds(estimate, question.request.machine),
        "value": value(estimate, question.space.goal),
        "tensors": int(estimate.allocated_bytes.value),
        "step_s": estimate.step_s.value if estimate.step_s else None,
    }


def _judged(rows: Sequence[Mapping[str, Any]], cap_bytes: int) -> list[dict[str, Any]]:
    """Return the rows of plans that could be traced, each with whether it fits."""
    return [{**r, "fits": r["host"] and r["need"] <= cap_bytes} for r in rows if "error" not in r]


def cap_of(space: SmallSpace, rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the cap: the need of one of the plans that fit their host; the largest only if all are equal."""
    needs = sorted({r["need"] for r in rows if "error" not in r and r["host"]})
    return int(needs[int(space.cap_place * (len(needs) - 1))])


def best_by_rule(fitting: Sequence[Mapping[str, Any]], band: float) -> Mapping[str, Any]:
    """Return the mildest and simplest plan whose value is at most ``band`` above the lowest. ``fitting``:
    rows of plans that fit, the mildest and simplest first."""
    limit = min(r["value"] for r in fitting) * (1 + band)
    return next(r for r in fitting if r["value"] <= limit)


# -- the answer -----------------------------------------------------------------------------------


def answer(question: Question, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ask the search, and return its answer and reasons, each with the judgement."""
    space = question.space
    cap_bytes = cap_of(space, rows)
    request = dataclasses.replace(question.request, cap_bytes=cap_bytes)
    rows = _judged(rows, cap_bytes)
    fitting = [r for r in rows if r["fits"]]
    band = EQUAL - 1 if question.in_grids or space.goal in ("smallest", "fewest") else CLOSE - 1
    best, lowest = best_by_rule(fitting, band), min(r["value"] for r in fitting)
    record: dict[str, Any] = {"cap_bytes": cap_bytes, "fitting": len(fitting), "in_grids": question.in_grids}
    record |= {"best": best["plan"], "best_value": best["value"], "lowest": lowest, "reasons": []}
    begun, begun_cpu = time.perf_counter(), time.process_time()
    try:
        planning = search.search(request, lambda *progress: None)
    except (NothingFits, UserError) as error:
        return record | {"recommended": f"error: {str(error)[:200]}", "value": None}
    took = {"took_s": time.perf_counter() - begun, "own_cpu_s": time.process_time() - begun_cpu}
    chosen = planning.result.recommended
    assert chosen is not None
    winner = chosen.estimate
    reached = value(winner, space.goal)
    own = next((r["value"] for r in rows if r["plan"] == winner.plan.label), None)
    plain = planning.result.baseline.estimate  # may be recommended even if its techniques are excluded
    judged = [*(r for r in rows if r["plan"] != plain.plan.label)]
    judged += _judged([_row(plain, question)], cap_bytes) if plain.traced else []
    return record | {
        **took,
        "recommended": winner.plan.label,
        "value": reached if own is None else own,
        "enumerated": own is not None,
        "differs": 0.0 if own is None else reached / own - 1,  # what the search says of it from its trace
        "considered": planning.result.considered,
        "traced": len(planning.predictor.traces),
        "reasons": [{**dataclasses.asdict(r), **judge(r, winner, reached, judged)} for r in chosen.reasons],
    }


def judge(
    reason: Reason, winner: Estimate, reached: float, rows: Sequence[Mapping[str, Any]]
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
    if reason.kind in ("left_out_uncertain", "left_out_small"):
        is_known = best is not None or reason.kind == "left_out_small"
        return {"true": is_known and ratio >= 1 / CLOSE / BORDER, **seen}
    if reason.kind == "left_out_only_saves":  # each plan fits without it, and is not slower then
        by_plan = {r["plan"]: r for r in rows}
        others = [by_plan.get(label_without(r["plan"], reason.technique)) for r in related]
        are_better = [
            o is not None and o["fits"] and o["value"] <= r["value"] * BORDER
            for r, o in zip(related, others, strict=True)
        ]
        return {"true": all(are_better), **seen}
    if reason.kind == "saves":
        other = next((r for r in rows if r["plan"] == without(winner.plan, reason.technique).label), None)
        if other is None or winner.step_s is None or reason.time_ratio is None:
            return {"true": None}
        saved = other["tensors"] - int(winner.allocated_bytes.value)
        times = winner.step_s.value / other["step_s"]
        same = saved == reason.saved_bytes and math.isclose(times, reason.time_ratio, rel_tol=BORDER - 1)
        return {"true": same, "enumerated_saved": saved, "enumerated_ratio": times}
    return {"true": None}


def label_without(label: str, technique: str) -> str:
    """Return the label of the plan without the technique."""
    parts = [part for part in label.split(" + ") if part.partition("(")[0] != technique]
    return " + ".join(parts) or "plain"


def gap(record: Mapping[str, Any]) -> float:
    """Return by how much the recommended plan's score is above that of the best plan; 0 if it is below."""
    if record["value"] is None:
        return math.inf
    return max(0.0, record["value"] / record["best_value"] - 1)


# -- the page -------------------------------------------------------------------------------------

GROUPS = {
    "does not fit": ("left_out_too_large", "left_out_late"),
    "needed": ("needed_priced", "needed_late", "needed"),
    "costs more": ("left_out_slower",),
    "not needed": ("left_out_not_needed",),
    "uncertain": ("left_out_uncertain",),
    "too small to matter": ("left_out_small",),
    "only saves": ("left_out_only_saves",),
    "included (many devices)": ("without_worse", "without_as_good"),
    "saves": ("saves",),
    "not looked at": ("left_out_not_looked_at", "needed_not_looked_at"),
}


def page(records: Sequence[Mapping[str, Any]]) -> str:
    rounds: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        rounds.setdefault(record["round"], []).append(record)
    lines = [
        "# Does the search find the best plan, and are its reasons true?",
        "",
        "Generated by `python benchmarks/small_spaces.py` from `benchmarks/records/small_spaces.jsonl`; do",
        f"not edit. {COUNT} small spaces drawn at random by seed {SEED}; every plan of each is traced whole.",
        "Drawing, seed and rules were committed before the first run; they stand at the top of the script.",
        "Memory and times are predictions: tested is the search, not the predictor. A round may have fewer",
        "spaces than were drawn: those of which no answer is recorded were not run yet.",
        "",
        "| round | spaces | plans | failed | gap up to 0.1 % | worst gap | reasons | true | false | unseen |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, answers in rounds.items():
        gaps = [gap(a) for a in answers]
        counted = sum(len(a["rows"]) for a in answers), sum("error" in r for a in answers for r in a["rows"])
        verdicts = [r["true"] for a in answers for r in a["reasons"]]
        idle = sum(r["kind"] in GROUPS["not looked at"] for a in answers for r in a["reasons"])
        lines.append(
            f"| {name} | {len(answers)} | {counted[0]:,} | {counted[1]:,} | {sum(g <= WORTH for g in gaps)} "
            f"| {max(gaps):.1%} | {len(verdicts)} | {verdicts.count(True)} | {verdicts.count(False)} "
            f"| {idle} |"
        )
    lines += [
        "",
        *_missing(rounds),
        "",
        f"Aim: a gap of at most {WORTH:.1%} in {WANTED} of {COUNT} spaces, at most {WORST:.0%} in the rest;",
        'no false reason. Failed: cannot be traced. Unseen: the search says "not looked at". Reasons that',
        "plans cannot show, such as a package that is not installed, are neither true nor false.",
    ]
    for name, answers in rounds.items():
        lines += ["", f"## Round: {name}", "", *_gaps(answers), "", *_reasons(answers), "", *_false(answers)]
    return "\n".join(lines) + "\n"


def _missing(rounds: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return which spaces each round lacks."""
    lines = []
    for name, answers in rounds.items():
        numbers = sorted(set(range(COUNT)) - {a["number"] for a in answers})
        if numbers:
            lines.append(f"Round {name}, not run: spaces {', '.join(map(str, numbers))}.")
    return lines


def _gaps(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "Above: how far the recommended plan and the best by the rule are above the lowest score.",
        "",
        "| space | family | job | on | goal | accuracy | plans | fit | gap | above | recommended | best |",
        "|--:|---|---|---|---|---|--:|--:|--:|--:|---|---|",
    ]
    for a in sorted(answers, key=lambda a: a["number"]):
        best = "the same" if a["recommended"] == a["best"] else a["best"]
        above = [f"{v / a['lowest'] - 1:.1%}" for v in (a["value"], a["best_value"]) if v is not None]
        cells = (a["number"], a["family"], a["job"], a["devices"], a["goal"], a["accuracy"], len(a["rows"]))
        cells = (*cells, a["fitting"], f"{gap(a):.2%}", ", ".join(above), a["recommended"])
        lines.append(f"| {' | '.join(map(str, cells))} | {best} |")
    return lines


def _reasons(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| reason | given | true | false | not decided |", "|---|--:|--:|--:|--:|"]
    reasons = [r for a in answers for r in a["reasons"]]
    for group, kinds in GROUPS.items():
        verdicts = [r["true"] for r in reasons if r["kind"] in kinds]
        numbers = [len(verdicts), *(sum(v is wanted for v in verdicts) for wanted in (True, False, None))]
        lines.append(f"| {group} | {' | '.join(map(str, numbers))} |")
    return lines


def _false(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| space | job | says | technique | best by the enumeration, or what was said |",
        "|--:|---|---|---|---|",
    ]
    for record in sorted(answers, key=lambda a: a["number"]):
        for reason in record["reasons"]:
            if reason["true"] is False:
                ratio = reason.get("best_ratio")
                shown = reason.get("detail", "") if ratio is None else f"{ratio:.3f}: {reason['best_plan']}"
                kind = next((g for g, kinds in GROUPS.items() if reason["kind"] in kinds), reason["kind"])
                lines.append(
                    f"| {record['number']} | {record['job']} | {kind} | {reason['technique']} | {shown} |"
                )
    return lines if len(lines) > 2 else ["No reason is false."]


def read(path: Path) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--round", default="", help="name under which answers are recorded")
    parser.add_argument("--rows", default="", help="ask again, with what this round has enumerated")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the spaces; default: all")
    parser.add_argument("--records", type=Path, default=RECORDS, help="required for another seed")
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    if (args.seed == SEED) != (args.records == RECORDS):
        parser.error(f"spaces of seed {SEED}, and no others, are recorded in {RECORDS.name}")
    numbers = range(COUNT) if args.only is None else args.only
    for number in numbers if args.round and not args.page else ():
        known = {r["round"]: r for r in read(args.records) if r["number"] == number}
        if args.round in known:
            continue
        if earlier := known.get(args.rows):
            names = [field.name for field in dataclasses.fields(SmallSpace)]
            space = SmallSpace(**{n: earlier[n] for n in names} | {"offered": tuple(earlier["offered"])})
            question, rows = Question(space), earlier["rows"]
        else:
            question = Question(draw(args.seed, number))
            rows = enumerate_space(question)
        record = {"round": args.round, **dataclasses.asdict(question.space), "rows_of": args.rows}
        record |= {"rows": rows, **answer(question, rows)}
        record["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with args.records.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record).replace(f"{HERE.parent}/", "") + "\n")
        wrong = [f"{r['kind']} {r['technique']}" for r in record["reasons"] if r["true"] is False]
        space = question.space
        print(
            f"{number:2} {space.job} {space.devices} {space.goal}: {len(rows)} plans, "
            f"{record['fitting']} fit, gap {gap(record):.2%}, false: {', '.join(wrong) or 'none'}",
            flush=True,
        )
    if args.records == RECORDS and RECORDS.exists():
        PAGE.write_text(page(read(RECORDS)), encoding="utf-8")


if __name__ == "__main__":
    main()
