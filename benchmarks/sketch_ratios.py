"""How far are the step times of sketches, which are composed from small traces, from those of whole traces?

    python benchmarks/sketch_ratios.py [--only WORD] [--family WORD] [--minutes M]   trace, record, page
    python benchmarks/sketch_ratios.py --page                                        the page only

A search for many devices sketches every plan and traces few. Of the others it says how much better one could
still be. For a way of dividing the work of which it traced no plan, that rests on the ratios measured here
(`unseen_ratio` in planner/multi_device_bound.py).

Protocol, fixed in a commit before the first run:

- Models of more than 12 blocks, by the shapes of published configurations, each on one machine or two.
- All plans of a search without exclusions are sketched. A family is a set of techniques that divide the model
  with a kind of data parallelism. Of each family, plans are drawn at random (seed 12) from those that the
  search keeps (`GridSketches.picks`), whose sketch fits the device and is at most 1.5 times as long as the
  shortest that fits: 3 of each family, the shortest one of the family among them.
- Each is traced whole. The ratio is the trace's step time over the sketch's. A plan that cannot be traced
  stays in the record with its error.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from memfit.catalog import machine
from memfit.jobs.registry import load
from memfit.planner.capacity import memory_cap
from memfit.planner.evaluate import Predictor
from memfit.planner.grid_search import Sketch
from memfit.planner.multi_device_bound import family
from memfit.planner.multi_device_predictor import MultiDevicePredictor, MultiDeviceRequest
from memfit.planner.request import job_facts
from memfit.planner.selection import Objective
from memfit.types.job import JobRef
from memfit.types.plan import Accuracy, Bounds

HERE = Path(__file__).parent
PAGE, RECORD = HERE / "sketch_ratios.md", HERE / "records" / "sketch_ratios.jsonl"
SEED, EACH, LONGEST = 12, 3, 1.5
# job, length, samples of a step, machine
CASES = (
    ("hf:meta-llama/Llama-3.1-8B", 8192, 16, "8xH100-SXM"),
    ("hf:meta-llama/Llama-3.1-8B", 8192, 64, "4x8xA100-80GB-SXM@IB-HDR"),
    ("hf:meta-llama/Llama-3.1-70B", 8192, 256, "16x8xH100-SXM@IB-NDR"),
    ("hf:Qwen/Qwen2.5-7B", 4096, 32, "8xA100-80GB-SXM"),
    ("hf:facebook/esm2_t33_650M_UR50D", 1024, 64, "8xA100-40GB-SXM"),
    ("hf:facebook/esm2_t36_3B_UR50D", 1024, 64, "8xH100-SXM"),
    ("hf:mistralai/Mistral-7B-v0.1", 32768, 8, "8xH100-SXM"),
    ("hf:openai-community/gpt2-xl", 1024, 64, "8xL40S"),
)


def predictor_of(name: str, length: int, samples: int, on: str) -> MultiDevicePredictor:
    job, device = load(JobRef(spec=name, length=length, batch=samples)), machine(on)
    facts = job_facts(job, device.device.kind, device.device_count)
    memory = device.device.memory_bytes
    assert memory is not None
    request = MultiDeviceRequest(
        goal=Objective.FASTEST,
        accuracy=Accuracy.ROUNDING,
        cap=memory_cap(int(memory.value), device),
        bounds=Bounds(),
        progress=lambda *state: None,
    )
    return MultiDevicePredictor(Predictor(job=job, machine=device, job_facts=facts), request)


def drawn(predictor: MultiDevicePredictor, ranks: int) -> Iterator[Sketch]:
    """Yield the sketches whose plans are traced."""
    sketches = predictor.sketches(ranks)
    by_family: dict[tuple[str, ...], list[Sketch]] = {}
    for sketch in sorted(sketches.picks, key=lambda s: (s.step_s, s.allocated_bytes, s.plan.fingerprint)):
        if predictor.fits_memory(predictor.estimate(sketch)):
            by_family.setdefault(family(sketch.plan.uses), []).append(sketch)
    shortest_s = min(members[0].step_s for members in by_family.values())
    for name, members in sorted(by_family.items()):
        near = [s for s in members if s.step_s <= LONGEST * shortest_s]
        others = random.Random(f"{SEED} {name}").sample(near[1:], min(EACH - 1, len(near[1:])))
        yield from (*near[:1], *others)


def measure(
    case: tuple[str, int, int, str], technique: str, known: Collection[str], until_s: float
) -> Iterator[dict[str, Any]]:
    """Yield one record for each plan that is traced. ``technique``: one that its family must have; "": any.
    ``known``: labels of plans that are left out."""
    predictor = predictor_of(*case)
    ranks = machine(case[3]).device_count
    for sketch in drawn(predictor, ranks):
        if sketch.plan.label in known or (technique and technique not in family(sketch.plan.uses)):
            continue
        if time.monotonic() > until_s:
            return
        record: dict[str, Any] = {"case": list(case), "family": list(family(sketch.plan.uses))}
        record |= {"plan": sketch.plan.label, "sketch_s": sketch.step_s, "techniques": _names(sketch)}
        traced = predictor.trace_or_refuse(predictor.estimate(sketch))
        if traced is None or traced.step_s is None:
            record["error"] = predictor.refused.get(sketch.plan, "no step time")
        else:
            record |= {"trace_s": traced.step_s.value, "ratio": traced.step_s.value / sketch.step_s}
        record["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        yield record


def _names(sketch: Sketch) -> list[str]:
    return sorted(u.technique for u in sketch.plan.uses)


def page(records: list[Mapping[str, Any]]) -> str:
    """Return the text of sketch_ratios.md."""
    lines = [
        "# How far step times of sketches are from those of whole traces",
        "",
        "Written by `python benchmarks/sketch_ratios.py`, whose docstring is the protocol, from",
        "`benchmarks/records/sketch_ratios.jsonl`. Ratio: step time by the whole trace over that by the",
        "sketch.",
        "",
        "| divides the model | data parallelism | models | plans | failed | lowest | median | highest |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    by_family: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        by_family.setdefault(tuple(record["family"]), []).append(record)
    for name, rows in sorted(by_family.items()):
        ratios = [r["ratio"] for r in rows if "ratio" in r]
        shown = [f"{f(ratios):.3f}" for f in (min, statistics.median, max)] if ratios else ["-"] * 3
        cells = (", ".join(name[:-1]) or "-", name[-1] if name else "-", len({r["case"][0] for r in rows}))
        counts = (len(rows), len(rows) - len(ratios))
        lines.append(f"| {' | '.join(map(str, (*cells, *counts, *shown)))} |")
    lines += ["", "| job | length | samples | machine | plan | ratio |", "|---|--:|--:|---|---|--:|"]
    for record in sorted(records, key=lambda r: r.get("ratio", 0.0)):
        ratio = f"{record['ratio']:.3f}" if "ratio" in record else record["error"][:100]
        lines.append(f"| {' | '.join(map(str, record['case']))} | {record['plan']} | {ratio} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="a part of the names of the jobs or machines to run")
    parser.add_argument("--family", default="", help="a technique that the families to run must have")
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    until_s = time.monotonic() + arguments.minutes * 60
    records = [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []
    for case in () if arguments.page else CASES:
        if arguments.only in f"{case[0]} {case[3]}":
            known = {r["plan"] for r in records if r["case"] == list(case)}
            for record in measure(case, arguments.family, known, until_s):
                records.append(record)
                with RECORD.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(f"{record.get('ratio', 0):.3f} {case[0]} {case[3]} {record['plan'][:120]}", flush=True)
    PAGE.write_text(page(records), encoding="utf-8")


if __name__ == "__main__":
    main()
