"""Plan searches of other projects and memfit's on the same questions: seconds, what was searched, and how
good the plan of each is by costs that are not its own.

    python benchmarks/peers_search.py [--source PEER=FOLDER ...] [--only REGEX]    ask, record, page
    python benchmarks/peers_search.py --page                                       the page from the record

Each peer is installed into an environment of its own (--environments FOLDER keeps them). Calculon, Galvatron
and a newer llm-analysis are on GitHub: give clones by --source calculon=..., --source galvatron=... and
--source llm-analysis=... . A line of the record is one answer; the page shows the last of each. ``--only``
asks those whose "question / peer" matches.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from peers.install import Peer, python_of

HERE = Path(__file__).parent
RECORD, PAGE = HERE / "records" / "peers_search.jsonl", HERE / "peers_search.md"
PUBLISHED = HERE / "records" / "published.jsonl"
LIMIT_S = 3600.0
PEERS = {
    "calculon": Peer(name="calculon", says="", called="", packages=["pandas", "psutil"], source="needed"),
    "llm-analysis": Peer(
        name="llm-analysis", says="", called="", packages=["llm-analysis>=0.2.2,<0.3"], source="optional"
    ),
    "galvatron": Peer(
        name="galvatron",
        says="",
        called="",
        source="needed",
        packages=["hydra-core", "rich", "pydantic", "scipy", "pybind11"],
    ),
    "deepspeed": Peer(name="deepspeed", says="", called="", packages=["deepspeed>=0.19,<0.20", "tabulate"]),
}
Question = dict[str, Any]
_COMMON = {"per_host": 8, "gib": 80, "cores": 1, "limit": 100_000, "patience": 120}
QUESTIONS: dict[str, Question] = {
    "GPT-3 175B, 64 A100": {
        "layers": 96,
        "hidden": 12288,
        "heads": 96,
        "kv_heads": 96,
        "ffn": 49152,
        "gated": False,
        "vocab": 51200,
        "length": 2048,
        "batch": 64,
        "gpus": 64,
        "gpu": "A100-80GB-SXM",
        "on": "8x8xA100-80GB-SXM@IB-HDR",
        "without": ["compile"],
        **_COMMON,
    },
    "Llama-2-7B, 8 A100": {
        "layers": 32,
        "hidden": 4096,
        "heads": 32,
        "kv_heads": 32,
        "ffn": 11008,
        "gated": True,
        "vocab": 32000,
        "length": 2048,
        "batch": 64,
        "gpus": 8,
        "gpu": "A100-80GB-SXM",
        "on": "8xA100-80GB-SXM",
        "galvatron": "llama2-7b",
        **_COMMON,
    },
    "Llama-3.1-70B, 512 H100": {
        "layers": 80,
        "hidden": 8192,
        "heads": 64,
        "kv_heads": 8,
        "ffn": 28672,
        "gated": True,
        "vocab": 128256,
        "length": 8192,
        "batch": 1024,
        "gpus": 512,
        "gpu": "H100-SXM",
        "on": "64x8xH100-SXM@IB-NDR",
        **_COMMON,
    },
}
# GPT-181B of the BLOOM team on 384 A100 and 2048 sequences (the 12 x 4 layout: 2016): measured layouts.
MEASURED = "GPT-181B, 384 A100: which measured layout"
QUESTIONS[MEASURED] = {
    "layers": 72,
    "hidden": 14336,
    "heads": 64,
    "kv_heads": 64,
    "ffn": 57344,
    "gated": False,
    "vocab": 250880,
    "length": 2048,
    "batch": 2048,
    "gpus": 384,
    "gpu": "A100-80GB-SXM",
    **_COMMON,
}


def _layout(tensor: int, stages: int, data: int, micro: int, zero: int = 1) -> dict[str, Any]:
    return {
        "tensor": tensor,
        "sequence": False,
        "stages": stages,
        "virtual": 1,
        "data": data,
        "zero": zero,
        "micro": micro,
        "recompute": "full",
        "offload": [],
    }


BLOOM = {
    "BLOOM-prequel-0718": (_layout(8, 12, 4, 1), 2048),
    "BLOOM-prequel-0719": (_layout(8, 12, 4, 2), 2048),
    "BLOOM-prequel-0720": (_layout(8, 12, 4, 4), 2048),
    "BLOOM-prequel-0721": (_layout(8, 12, 4, 8), 2048),
    "BLOOM-prequel-0733": (_layout(8, 12, 4, 2, 0), 2048),
    "BLOOM-prequel-0762": (_layout(8, 4, 12, 4), 2016),
    "BLOOM-prequel-0769": (_layout(4, 6, 16, 2), 2048),
}

# -- memfit -----------------------------------------------------------------------------------------------


def _job(name: str, question: Question) -> Any:
    """Hugging Face's OPT (GPT-3's sizes and parts) or Llama of these sizes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    from memfit.types.job import Job

    shared = {
        "num_hidden_layers": question["layers"],
        "hidden_size": question["hidden"],
        "use_cache": False,
        "num_attention_heads": question["heads"],
        "vocab_size": question["vocab"],
        "max_position_embeddings": question["length"],
        "attn_implementation": "sdpa",
    }
    llama, blocks = question["gated"], "model.layers" if question["gated"] else "model.decoder.layers"

    def build() -> Any:
        if llama:
            return LlamaForCausalLM(
                LlamaConfig(
                    **shared,
                    intermediate_size=question["ffn"],
                    num_key_value_heads=question["kv_heads"],
                    tie_word_embeddings=False,
                )
            )
        return OPTForCausalLM(
            OPTConfig(
                **shared,
                ffn_dim=question["ffn"],
                dropout=0.0,
                word_embed_proj_dim=question["hidden"],
                activation_function="gelu",
                tie_word_embeddings=False,
            )
        )

    def batch(step: int, seed: int) -> Any:
        shape = question["batch"], question["length"]
        return {n: torch.zeros(*shape, dtype=torch.long) for n in ("input_ids", "labels")}

    return Job(
        name=re.sub(r"\W+", "-", name.lower()),
        build_model=build,
        make_batch=batch,
        blocks=blocks,
        loss=lambda model, given: model(**given).loss,
        batch_size=question["batch"],
    )


def memfit(name: str) -> dict[str, Any]:
    begun = time.perf_counter()
    from search import searched

    from memfit.catalog import machine
    from memfit.techniques.registry import short_label

    question = QUESTIONS[name]
    without = question.get("without", ())
    found = searched(_job(name, question), machine(question["on"]), lambda *progress: None, without)
    chosen = found.recommended.estimate
    return {
        "seconds": time.perf_counter() - begun,
        "considered": found.considered,
        "said": short_label(chosen.plan),
        "layout": _from_memfit(chosen.plan, question),
        "own_s": chosen.step_s.value,
        "own_gib": chosen.allocated_bytes.value / 2**30,
        "raw": chosen.plan.to_dict(),
    }


def _from_memfit(plan: Any, question: Question) -> dict[str, Any]:
    used = plan.to_dict()
    tensor, pipe = used.get("tensor-parallel", {}), used.get("pipeline", {})
    degree, stages = tensor.get("degree", 1), pipe.get("stages", 1)
    context = used.get("context-parallel", {}).get("degree", 1)
    data = plan.ranks // (degree * stages * context)
    count = pipe.get("micro_batches") or used.get("gradient-accumulation", {}).get("micro_batches", 1)
    shards, zero = used.get("fsdp2"), used.get("zero", {}).get("stage", 0)
    if shards:
        zero = 3 if shards["reshard"] else 2
    offload = [w for w in ("activation-offload",) if w in used]
    offload += ["states"] if used.get("fsdp2", {}).get("offload") else []
    return {
        "tensor": degree,
        "sequence": bool(tensor.get("sequence")),
        "stages": stages,
        "context": context,
        "virtual": pipe.get("virtual", 1),
        "schedule": pipe.get("schedule", ""),
        "data": data,
        "zero": zero,
        "micro": question["batch"] // data // count,
        "recompute": _recompute(used, question["layers"]),
        "offload": offload,
    }


def _recompute(used: Mapping[str, Any], blocks: int) -> str:
    every = used.get("activation-checkpointing", {}).get("every")
    if every:
        return "full" if every == 1 else f"{blocks // every} of {blocks} blocks"
    keep = used.get("selective-checkpointing", {}).get("keep")
    return f"all but {keep}" if keep else "none"


def to_plan(layout: Mapping[str, Any], question: Question) -> Any:
    """A peer's layout as a plan of memfit's. ZeRO 1 and 2 are sharded parameters gathered once a step; 16-bit
    weights with float32 masters or, sharded, float32 shards gathered in 16 bits."""
    from memfit.techniques.registry import make_use
    from memfit.types.plan import Plan

    tensor, stages, data = layout["tensor"], layout["stages"], layout["data"]
    count = question["batch"] // data // layout["micro"]
    wanted: dict[str, dict[str, Any]] = {"adamw-fused": {}}
    if tensor > 1:
        wanted["tensor-parallel"] = {
            "degree": tensor,
            "sequence": layout["sequence"],
            "vocabulary": "parallel-loss",
        }
    if stages > 1:
        schedule = layout.get("schedule") or ("interleaved" if layout["virtual"] > 1 else "1f1b")
        wanted["pipeline"] = {
            "stages": stages,
            "schedule": schedule,
            "virtual": layout["virtual"],
            "micro_batches": count,
        }
    elif count > 1:
        wanted["gradient-accumulation"] = {"micro_batches": count}
    if data > 1:
        whole = layout["zero"] != 3
        once = (
            {"sync": "last"} if stages > 1 and whole else {}
        )  # gradients reduced, weights gathered once a step
        wanted["fsdp2"] = {"reshard": not whole, "precision": "bf16", **once}
    else:
        wanted["bf16-parameters"] = {"rounding": "master"}
    again = re.match(r"(\d+) of (\d+)", layout["recompute"])
    if layout["recompute"] == "full" or again:
        every = max(1, round(int(again[2]) / int(again[1]))) if again else 1
        wanted["activation-checkpointing"] = {"every": every}
    return Plan(uses=tuple(make_use(n, s) for n, s in wanted.items()), ranks=question["gpus"])


def memfit_costs(name: str, layouts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    from memfit.catalog import machine
    from memfit.planner.evaluate import Predictor
    from memfit.planner.request import job_facts

    question = QUESTIONS[name]
    on, job = machine(question["on"]), _job(name, question)
    predictor = Predictor(job=job, machine=on, job_facts=job_facts(job, on.device.kind, on.device_count))
    found: list[dict[str, Any]] = []
    for layout in layouts:
        try:
            told = predictor.whole(to_plan(layout, question))
            seconds = told.step_s.value if told.step_s else None
            found.append({"seconds": seconds, "gib": told.allocated_bytes.value / 2**30})
        except Exception as error:  # noqa: BLE001  the page says which plans it cannot express
            found.append({"refused": str(error).partition("\n")[0][:160]})
    return found


# -- asking -----------------------------------------------------------------------------------------------


def ask(peer: str, question: Question, sources: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """The answer, or ``refused`` and why. Peers that are not there are said to be."""
    name = peer.removesuffix("-costs")
    source = sources.get(name, "")
    if PEERS[name].source == "needed" and not Path(source).is_dir():
        return {"refused": "not installed: its repository is not a package; see --source"}
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [python_of(PEERS[name], folder), "-W", "ignore", "-m", "peers.searches", peer, source],
            env=env,
            check=True,
            capture_output=True,
            input=json.dumps(question),
            text=True,
            timeout=LIMIT_S,
        )
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told
    except subprocess.TimeoutExpired:
        return {"refused": f"no answer in {LIMIT_S:.0f} s"}
    except subprocess.CalledProcessError as error:
        return {"refused": f"it failed: {(error.stderr or str(error)).strip().splitlines()[-1][:200]}"}


def record(question: str, peer: str, answer: Mapping[str, Any]) -> None:
    when = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    line = {
        "when": when,
        "question": question,
        "peer": peer,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        **answer,
    }
    print(json.dumps(line)[:600], flush=True)
    with RECORD.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def last() -> dict[str, dict[str, Any]]:
    """The last answer of each question and peer."""
    found: dict[str, dict[str, Any]] = {}
    for text in RECORD.read_text(encoding="utf-8").splitlines() if RECORD.exists() else []:
        line = json.loads(text)
        found.setdefault(line["question"], {})[line["peer"]] = line
    return found


def run(only: str, sources: Mapping[str, str], folder: Path) -> None:
    for name, question in QUESTIONS.items():
        if name == MEASURED:
            continue
        for peer in ("memfit", *PEERS):
            if re.search(only, f"{name} / {peer}"):
                answer = memfit(name) if peer == "memfit" else ask(peer, question, sources, folder)
                record(name, peer, answer)
        if re.search(only, f"{name} / costs"):
            _costs(name, sources, folder)
    if re.search(only, f"{MEASURED} / costs"):
        for peer in ("calculon", "llm-analysis"):
            record(MEASURED, peer, _measured(peer, sources, folder))


def _costs(name: str, sources: Mapping[str, str], folder: Path) -> None:
    """Every party's plan by every model that can say something of it."""
    answers = last().get(name, {})
    parties = [p for p in ("memfit", *PEERS) if answers.get(p, {}).get("layout")]
    layouts = [answers[p]["layout"] for p in parties]
    found: dict[str, Any] = {"parties": parties, "memfit": memfit_costs(name, layouts)}
    for model in ("calculon", "llm-analysis"):
        told = ask(
            f"{model}-costs", {**QUESTIONS[name], "layouts": [plainer(x) for x in layouts]}, sources, folder
        )
        found[model] = told.get("costs") or [told for _ in layouts]
    record(name, "costs", {"costs": found})


def plainer(layout: Mapping[str, Any]) -> dict[str, Any]:
    """The nearest layout in words that every model has."""
    kept = dict(layout)
    text = str(kept["recompute"])
    part = re.match(r"(\d+) of (\d+)", text)
    if part:
        kept["recompute"] = "full" if int(part[1]) * 2 >= int(part[2]) else "none"
    elif text.startswith("all but"):
        kept["recompute"] = "full" if text.endswith("attention") else "attention"
    if kept.get("schedule") in ("zero-bubble", "zero-bubble-v", "gpipe"):
        kept["virtual"] = 1
    kept["offload"] = []
    return kept


def _measured(peer: str, sources: Mapping[str, str], folder: Path) -> dict[str, Any]:
    costs: dict[str, Any] = {}
    for batch in sorted({b for _, b in BLOOM.values()}):
        rows = {i: layout for i, (layout, b) in BLOOM.items() if b == batch}
        question = {**QUESTIONS[MEASURED], "batch": batch, "layouts": list(rows.values())}
        told = ask(f"{peer}-costs", question, sources, folder)
        costs |= dict(zip(rows, told.get("costs") or [told] * len(rows), strict=True))
    return {"costs": costs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", action="append", default=[], metavar="PEER=FOLDER")
    parser.add_argument(
        "--environments", type=Path, metavar="FOLDER", default=Path(tempfile.gettempdir()) / "memfit-peers"
    )
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    if not args.page:
        run(args.only, dict(text.split("=", 1) for text in args.source), args.environments)
    from peers.search_page import page

    PAGE.write_text(page(last(), QUESTIONS, MEASURED, PUBLISHED), encoding="utf-8")


if __name__ == "__main__":
    main()
