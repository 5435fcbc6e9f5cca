"""How many plans a search for many devices prices, and how long it takes.

    python benchmarks/search.py                     # page and record
    python benchmarks/search.py --only REGEX        # some cases; the page has the latest of each

The cases are fresh processes, imports and all: Llama-3.1-70B on 512 H100 and Llama-3.1-405B on 16,384, each
twice, whose answers must be the same. Whether a search finds the best plan is measured in small spaces
(small_spaces.py).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE, RECORD = HERE / "search.md", HERE / "records" / "search.jsonl"
# layers, width, feed-forward width, heads (Grattafiori et al. 2024, arXiv 2407.21783, table 3)
LLAMA = {"70B": (80, 8192, 28672, 64), "405B": (126, 16384, 53248, 128)}
LENGTH = 8192
# size, machine, samples, aim, time limit of the search in seconds
LARGE: Mapping[str, tuple[str, str, int, str, float | None]] = {
    "Llama-3.1-70B, 512 H100": ("70B", "64x8xH100-SXM@IB-NDR", 1024, "10 s searching", None),
    "Llama-3.1-70B, 512 H100, within 10 s": ("70B", "64x8xH100-SXM@IB-NDR", 1024, "bound of 1 %", 10.0),
    "Llama-3.1-70B, 512 H100, within 60 s": ("70B", "64x8xH100-SXM@IB-NDR", 1024, "bound of 1 %", 60.0),
    "Llama-3.1-405B, 16,384 H100": ("405B", "2048x8xH100-SXM@IB-NDR", 2048, "60 s whole", None),
}


def _llama(size: str, rows: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from memfit.types.job import Job

    layers, width, feed_forward, heads = LLAMA[size]
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_attention_heads=heads,
        vocab_size=128256,
        num_key_value_heads=8,
        use_cache=False,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )

    def batch(step: int, seed: int) -> Any:
        return {name: torch.zeros(rows, LENGTH, dtype=torch.long) for name in ("input_ids", "labels")}

    return Job(
        name=f"llama-3.1-{size}",
        build_model=lambda: LlamaForCausalLM(config),
        make_batch=batch,
        loss=lambda model, given: model(**given).loss,
        batch_size=rows,
        blocks="model.layers",
    )


def searched(
    job: Any, machine: Any, progress: Any, without: Sequence[str] = (), limit_s: float | None = None
) -> Any:
    from memfit.planner.capacity import memory_cap
    from memfit.planner.evaluate import Predictor
    from memfit.planner.multi_device import search_many_devices
    from memfit.planner.multi_device_predictor import MultiDeviceRequest
    from memfit.planner.request import job_facts
    from memfit.planner.selection import Objective
    from memfit.types.deadline import Deadline
    from memfit.types.plan import Accuracy, Bounds

    ranks, deadline = machine.device_count, Deadline.after(limit_s)
    predictor = Predictor(
        job=job,
        machine=machine,
        job_facts=job_facts(job, machine.device.kind, ranks),
        deadline=deadline,
    )
    request = MultiDeviceRequest(
        goal=Objective.FASTEST,
        accuracy=Accuracy.ROUNDING,
        cap=memory_cap(int(machine.device.memory_bytes.value), machine),
        progress=progress,
        bounds=Bounds(without=tuple(without)),
        limit_s=limit_s,
    )
    return search_many_devices(predictor, ranks, request)


def child(name: str) -> None:
    """One large case; a line of JSON."""
    begun = time.perf_counter()
    from memfit.catalog import machine
    from memfit.techniques.registry import short_label

    size, on, rows, _, limit_s = LARGE[name]
    marks: list[float] = []

    def progress(stage: str, *rest: Any) -> None:
        if stage == "finalists" and not marks:
            marks.append(time.perf_counter() - begun)

    found = searched(_llama(size, rows), machine(on), progress, limit_s=limit_s)
    assert found.recommended is not None
    extent = found.extent
    chosen = found.recommended.estimate
    print(
        json.dumps(
            {
                "searching_s": marks[0],
                "considered": found.considered,
                "plan": short_label(chosen.plan),
                "step_s": chosen.step_s.value,
                "allocated_gib": chosen.allocated_bytes.value / 2**30,
                "traced": chosen.traced,
                "gain_ratio": extent.gain_ratio,
                "traces": extent.traced_count,
                "time_up": extent.time_up,
                "answer": json.dumps([c.estimate.plan.fingerprint for c in found.frontier]),
            }
        )
    )


def large(name: str) -> dict[str, Any]:
    runs = []
    for _ in range(2):
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, "--child", name], capture_output=True, text=True, check=True
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]) | {"whole_s": time.perf_counter() - begun})
    first, second = runs
    return {
        "case": name,
        "goal": LARGE[name][3],
        "seconds": [r["whole_s"] for r in runs],
        "searching_s": [r["searching_s"] for r in runs],
        "same": first["answer"] == second["answer"] and first["plan"] == second["plan"],
        "gain_ratios": [r["gain_ratio"] for r in runs],
        **{
            k: first[k]
            for k in ("considered", "plan", "step_s", "allocated_gib", "traced", "traces", "time_up")
        },
    }


# -- page -------------------------------------------------------------------------------------------------


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """Of the latest record of each case."""
    latest = {r["case"]: r for r in records}
    big = [latest[n] for n in LARGE if n in latest]
    lines = [
        "# The search for many devices",
        "",
        "Generated by `python benchmarks/search.py` from `benchmarks/records/search.jsonl`; do not edit.",
        "",
        "## Large: fresh processes, with imports and finalists traced whole",
        "",
        "Searching: until the grids are priced; each of two runs. Load: of the machine before.",
        "Bound: what a plan that was not traced could gain at most, in each run; plans traced.",
        "",
        "| case | priced | searching | whole | goal | bound | same | load | recommended | step | peak |",
        "|---|--:|--:|--:|---|--:|---|--:|---|--:|--:|",
    ]
    lines += [
        f"| {r['case']} | {r['considered']:,} | {_each(r['searching_s'])} | {_each(r['seconds'])} "
        f"| {r['goal']} | {_bounds(r)} | {'yes' if r['same'] else 'NO'} | {r['load']:.1f} | {r['plan']} "
        f"| {r['step_s']:.3g} s | {r['allocated_gib']:.1f} GiB |"
        for r in big
    ]
    return "\n".join(lines) + "\n"


def _bounds(record: Mapping[str, Any]) -> str:
    if "gain_ratios" not in record:
        return "not stated"
    texts = ["unknown" if g is None else f"{g:.2%}" for g in record["gain_ratios"]]
    cut = ", cut by the time limit" if record["time_up"] else ""
    return f"{', '.join(texts)} ({record['traces']} traced{cut})"


def _each(seconds: Sequence[float]) -> str:
    return ", ".join(f"{s:.1f} s" for s in seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--child", default="")
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    for name in () if args.page else LARGE:
        if not re.search(args.only, name):
            continue
        begun = {
            "when": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        }
        found = large(name) | begun
        print(json.dumps(found), flush=True)
        with RECORD.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    records = [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()]
    PAGE.write_text(page(records), encoding="utf-8")


if __name__ == "__main__":
    main()
