"""How many plans a search prices and how long it takes, and whether it finds what trying every plan finds.

    python benchmarks/search.py                     # page and record
    python benchmarks/search.py --only REGEX        # some cases; the page has the latest of each

Large cases are fresh processes, imports and all: Llama-3.1-70B on 512 H100 and Llama-3.1-405B on 16,384, each
twice, whose answers must be the same. Small spaces are those where every plan can be traced whole: the best
of them all by the goal (the same rule for ties) is compared with what the search recommends.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE, RECORD = HERE / "search.md", HERE / "records" / "search.jsonl"
# layers, width, feed-forward width, heads (Grattafiori et al. 2024, arXiv 2407.21783, table 3)
LLAMA = {"70B": (80, 8192, 28672, 64), "405B": (126, 16384, 53248, 128)}
LENGTH = 8192
LARGE = {
    "Llama-3.1-70B, 512 H100": ("70B", "64x8xH100-SXM@IB-NDR", 1024, "10 s searching"),
    "Llama-3.1-405B, 16,384 H100": ("405B", "2048x8xH100-SXM@IB-NDR", 2048, "60 s whole"),
}
WORTH = 0.001  # scores closer than this are one


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


def _searched(job: Any, machine: Any, tell: Any = None, **wanted: Any) -> tuple[Any, Any, Any]:
    """(result, scale, aim)."""
    from memfit.cost.host import host_holds
    from memfit.planner.capacity import needed_bytes
    from memfit.planner.device_pricing import Aim, Scale
    from memfit.planner.evaluate import Pricer
    from memfit.planner.multi_device import search_scale
    from memfit.planner.request import space_of
    from memfit.planner.selection import Objective
    from memfit.types.plan import Accuracy, Bounds

    ranks = machine.device_count
    pricer = Pricer(job=job, machine=machine, space=space_of(job, machine.device.kind, ranks))
    aim = Aim(
        goal=Objective(wanted.get("goal", "fastest")),
        accuracy=Accuracy(wanted.get("accuracy", "rounding")),
        cap_bytes=wanted.get("cap_bytes") or int(machine.device.memory_bytes.value),
        needs=lambda e: needed_bytes(e, machine),
        host=lambda e: host_holds(e, machine),
        tell=tell or (lambda *a: None),
        bounds=Bounds(micro_batch=wanted.get("micro_batch", 0), without=wanted.get("without", ())),
    )
    return search_scale(pricer, ranks, aim), Scale(pricer, aim), aim


def child(name: str) -> None:
    """One large case; a line of JSON."""
    begun = time.perf_counter()
    from memfit.catalog import machine
    from memfit.techniques.registry import short_label

    size, on, rows, _ = LARGE[name]
    marks: list[float] = []

    def tell(stage: str, *rest: Any) -> None:
        if stage == "finalists" and not marks:
            marks.append(time.perf_counter() - begun)

    found, _, _ = _searched(_llama(size, rows), machine(on), tell)
    assert found.recommended is not None
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
        **{k: first[k] for k in ("considered", "plan", "step_s", "allocated_gib", "traced")},
    }


# -- small spaces -----------------------------------------------------------------------------------------


def _transformer(kind: str, batch: int, **sizes: Any) -> Callable[[], Any]:
    def make() -> Any:
        import torch
        import transformers

        from memfit.types.job import Job

        config = getattr(transformers, f"{kind}Config")(**sizes, use_cache=False)
        head = transformers.AutoModelForMaskedLM if kind == "Bert" else transformers.AutoModelForCausalLM

        def given(step: int, seed: int) -> Any:
            return {n: torch.zeros(batch, 512, dtype=torch.long) for n in ("input_ids", "labels")}

        return Job(
            name=kind.lower(),
            build_model=lambda: head.from_config(config),
            make_batch=given,
            loss=lambda model, part: model(**part).loss,
            batch_size=batch,
        )

    return make


_LLAMA = {
    "num_hidden_layers": 4,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
_GPT2 = {"n_layer": 4, "n_embd": 768, "n_head": 12, "vocab_size": 8192}
_BERT = {"num_hidden_layers": 4, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
_FEW = (
    "zero",
    "activation-offload",
    "context-parallel",
    "compile",
    "adamw-single",
    "bf16-autocast",
    "adamw-8bit",
    "selective-checkpointing",
)
_MORE = ("adamw-fused", "bf16-parameters", "chunked-cross-entropy")
SMALL: Mapping[str, tuple[Callable[[], Any], str, dict[str, Any]]] = {
    "Llama, 4 blocks, 2 L4, exact": (
        _transformer("Llama", 4, **_LLAMA),
        "2xL4",
        {"accuracy": "exact", "without": _FEW},
    ),
    "Llama, 4 blocks, 4 A100, 4.5 GiB": (
        _transformer("Llama", 4, **_LLAMA),
        "4xA100-80GB-SXM",
        {"cap_bytes": int(4.5 * 2**30), "without": (*_FEW, *_MORE, "pipeline"), "micro_batch": 1},
    ),
    "Llama, 4 blocks, 2 hosts of 2 L4, smallest": (
        _transformer("Llama", 4, **_LLAMA),
        "2x2xL4@Ethernet-100G",
        {"goal": "smallest", "micro_batch": 1, "without": (*_FEW, *_MORE, "ddp")},
    ),
    "GPT-2, 4 blocks, 2 RTX 4090, exact": (
        _transformer("GPT2", 8, **_GPT2),
        "2xRTX-4090",
        {"accuracy": "exact", "without": _FEW},
    ),
    "GPT-2, 4 blocks, 4 H100, no tensor parallelism": (
        _transformer("GPT2", 8, **_GPT2),
        "4xH100-SXM",
        {"without": (*_FEW, "tensor-parallel", "bf16-parameters", "chunked-cross-entropy", "pipeline")},
    ),
    "BERT, 4 blocks, 2 A100, 4.5 GiB": (
        _transformer("Bert", 8, **_BERT),
        "2xA100-40GB-SXM",
        {"cap_bytes": int(4.5 * 2**30), "without": (*_FEW, *_MORE, "pipeline"), "micro_batch": 2},
    ),
}


def small(name: str) -> dict[str, Any]:
    from memfit.catalog import machine
    from memfit.planner.grid_search import _cuttable
    from memfit.planner.parallelism_grid import grids
    from memfit.planner.selection import best, score, within_bounds
    from memfit.techniques.registry import short_label

    make, on, wanted = SMALL[name]
    begun = time.perf_counter()
    found, scale, aim = _searched(make(), machine(on), **wanted)
    search_s = time.perf_counter() - begun
    assert found.recommended is not None
    chosen = found.recommended.estimate
    limits, _ = _cuttable(scale.traced, machine(on), scale._limits(machine(on).device_count))
    plans = [g.plan(i) for g in grids(limits) for i in itertools.product(*map(range, g.shape))]
    plans = [p for p in plans if _as_searched(p, chosen, wanted)]
    begun, every, failed = time.perf_counter(), [], 0
    for plan in plans:
        try:
            every.append(scale.pricer.whole(plan))
        except Exception:  # noqa: BLE001  what cannot be traced cannot be the best either
            failed += 1
    fitting = [e for e in every if scale.fits_memory(e) and within_bounds(aim.bounds, e)]
    top = best(fitting, aim.goal)
    assert top is not None
    gap = score(chosen, aim.goal) / score(top, aim.goal) - 1
    return {
        "case": name,
        "goal": aim.goal.value,
        "considered": found.considered,
        "traced_all": len(every),
        "failed": failed,
        "fit": len(fitting),
        "search_s": search_s,
        "exhaustive_s": time.perf_counter() - begun,
        "found": short_label(chosen.plan),
        "best": short_label(top.plan),
        "same": chosen.plan == top.plan,
        "gap": gap,
    }


def _as_searched(plan: Any, chosen: Any, wanted: Mapping[str, Any]) -> bool:
    """float32 forward is in no search that may narrow it (there is none that it could win)."""
    exact = wanted.get("accuracy") == "exact"
    names = {u.technique for u in plan.uses}
    narrow = "bf16-parameters" in names or "bf16-autocast" in names
    narrow = narrow or any(u.settings.get("precision") == "bf16" for u in plan.uses)
    return exact or narrow


# -- page -------------------------------------------------------------------------------------------------


_SMALL_TEXT = (
    "{same} of {count} searches end with the best of all plans, or one as good to {worth:.1%}. Gap: how much "
    "worse in the goal."
)


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """Of the latest record of each case."""
    latest = {r["case"]: r for r in records}
    big = [latest[n] for n in LARGE if n in latest]
    little = [latest[n] for n in SMALL if n in latest]
    same = sum(abs(r["gap"]) <= WORTH for r in little)  # nor better than the best of all
    lines = [
        "# The search for many devices",
        "",
        "Generated by `python benchmarks/search.py` from `benchmarks/records/search.jsonl`; do not edit.",
        "",
        "## Large: fresh processes, with imports and finalists traced whole",
        "",
        "Searching: until the grids are priced; each of two runs. Load: of the machine before.",
        "",
        "| case | plans priced | searching | whole | goal | same answer | load | recommended | step | peak |",
        "|---|--:|--:|--:|---|---|--:|---|--:|--:|",
    ]
    lines += [
        f"| {r['case']} | {r['considered']:,} | {_each(r['searching_s'])} | {_each(r['seconds'])} "
        f"| {r['goal']} | {'yes' if r['same'] else 'NO'} | {r['load']:.1f} | {r['plan']} "
        f"| {r['step_s']:.3g} s | {r['allocated_gib']:.1f} GiB |"
        for r in big
    ]
    lines += [
        "",
        "## Small: every plan traced whole",
        "",
        _SMALL_TEXT.format(same=same, count=len(little), worth=WORTH),
        "",
        "| case | goal | priced | traced | of them fit | cannot be traced | gap | found | best of all |",
        "|---|---|--:|--:|--:|--:|--:|---|---|",
    ]
    lines += [
        f"| {r['case']} | {r['goal']} | {r['considered']} | {r['traced_all']} | {r['fit']} | {r['failed']} "
        f"| {r['gap']:+.2%} | {r['found']} | {'the same' if r['same'] else r['best']} |"
        for r in little
    ]
    return "\n".join(lines) + "\n"


def _each(seconds: Sequence[float]) -> str:
    return ", ".join(f"{s:.1f} s" for s in seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--child", default="")
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    for cases, run in ((LARGE, large), (SMALL, small)):
        for name in cases:
            if not re.search(args.only, name):
                continue
            begun = {
                "when": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
                "cores": os.cpu_count(),
                "load": os.getloadavg()[0],
            }
            found = run(name) | begun
            print(json.dumps(found), flush=True)
            with RECORD.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
    records = [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()]
    PAGE.write_text(page(records), encoding="utf-8")


if __name__ == "__main__":
    main()
