"""How long a cold prediction takes and what memory it needs itself, beside torch's own tracker.

    python benchmarks/speed_memory.py                  # all cases, three runs each: page and record
    python benchmarks/speed_memory.py --runs 1 --keep  # a look

Each run is a fresh process: the interpreter, imports, the model, the prediction. Memory comes from one more
run, untimed since reading it slows the process: the sum of the proportional set sizes of it and its children,
sampled twenty times a second. torch's tracker cannot make CUDA tensors without a build for CUDA: its peak is
that of CPU kernels, with attention's scores in full; what is compared is time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
PAGE, RECORD = HERE / "speed_memory.md", HERE / "records" / "speed_memory.jsonl"
# layers, width, feed-forward width, heads (Grattafiori et al. 2024, arXiv 2407.21783, table 3)
LLAMA = {"8B": (32, 4096, 14336, 32), "405B": (126, 16384, 53248, 128)}
LENGTH = 8192
GOALS_S = {"ESM-2 650M, one device": 3, "Llama-3.1-8B, FSDP2 x 8": 6, "Llama-3.1-405B, 16,384 GPUs": 20}


def _config(size: str) -> Any:
    from transformers import LlamaConfig

    layers, width, feed_forward, heads = LLAMA[size]
    return LlamaConfig(
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


def _llama(size: str, rows: int) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    from memfit.types.job import Job

    def loss(model: Any, batch: Any) -> Any:
        logits = model(input_ids=batch["tokens"]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def batch(step: int, seed: int) -> Any:
        return {name: torch.zeros(rows, LENGTH, dtype=torch.long) for name in ("tokens", "labels")}

    return Job(
        name=f"llama-3.1-{size}",
        build_model=lambda: LlamaForCausalLM(_config(size)),
        make_batch=batch,
        loss=loss,
        batch_size=rows,
        blocks="model.layers",
        head="lm_head",
    )


def _told(prediction: Any) -> int:
    return int(prediction.allocated_bytes.value)


def imports() -> int:
    """What a prediction of Hugging Face's model cannot do without; ours is written out."""
    import torch  # noqa: F401
    from transformers.models.esm import modeling_esm  # noqa: F401

    return 0


def esm() -> int:
    import memfit
    from memfit.jobs.registry import load
    from memfit.types.job import JobRef

    job = load(JobRef(spec="protein-lm", size="650M"))
    return _told(memfit.estimate(job, plan={"bf16-autocast": {}}, machine="1xA100-80"))


def llama_8b() -> int:
    import memfit

    plan = {"ranks": 8, "techniques": {"fsdp2": {"precision": "bf16"}, "activation-checkpointing": {}}}
    return _told(memfit.estimate(_llama("8B", 8), plan=plan, machine="8xH100-SXM"))


def llama_405b() -> int:
    import memfit

    plan = {
        "ranks": 16384,
        "techniques": {
            "tensor-parallel": {"degree": 8, "sequence": True},
            "pipeline": {"stages": 16, "micro_batches": 16, "schedule": "1f1b"},
            "fsdp2": {"precision": "bf16"},
            "activation-checkpointing": {},
        },
    }
    return _told(memfit.estimate(_llama("405B", 128 * 16), plan=plan, machine="8xH100-SXM"))


def tracker_8b() -> int:
    """torch's FSDPMemTracker on the same model, sharding and recomputation, as its documentation does."""
    import torch
    import torch.distributed as dist
    from torch._subclasses import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    mesh = init_device_mesh("cpu", (8,))
    with FakeTensorMode():
        model = LlamaForCausalLM(_config("8B"))
        apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, LlamaDecoderLayer))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        tokens = torch.zeros(1, LENGTH, dtype=torch.long)
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs((tokens,))
        with tracker:
            for _ in range(2):
                logits = model(input_ids=tokens).logits
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


CASES: dict[str, Callable[[], int]] = {
    "torch and transformers' ESM imported, no prediction": imports,
    "ESM-2 650M, one device": esm,
    "Llama-3.1-8B, FSDP2 x 8": llama_8b,
    "torch's FSDPMemTracker: Llama-3.1-8B, FSDP2 x 8": tracker_8b,
    "Llama-3.1-405B, 16,384 GPUs": llama_405b,
}


def cold(name: str, *, watch: bool) -> dict[str, Any]:
    """Seconds, or peak bytes, of a fresh process that predicts the case."""
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__, "--case", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    watched, peak_bytes = psutil.Process(child.pid), 0
    while watch and child.poll() is None:
        peak_bytes = max(peak_bytes, _proportional_bytes(watched))
        time.sleep(0.05)
    assert child.stdout is not None
    out = child.stdout.readline()  # the answer; taking a process with torch apart lasts a second more
    took_s = time.perf_counter() - began
    child.wait()
    if child.returncode:
        raise SystemExit(f"{name} failed: python {__file__} --case {name!r} shows why")
    told = {"case": name, "told_bytes": int(out.split()[-1])}
    return told | ({"own_bytes": peak_bytes} if watch else {"seconds": took_s})


def _proportional_bytes(process: psutil.Process) -> int:
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_full_info().pss
    except psutil.Error:
        pass  # it has just ended
    return total


def page(record: dict[str, Any]) -> str:
    by_case: dict[str, list[dict[str, Any]]] = {}
    for run in record["runs"]:
        by_case.setdefault(run["case"], []).append(run)
    tracker = next((runs for name, runs in by_case.items() if "Tracker" in name), [])
    lines = [
        "# Speed of a cold prediction",
        "",
        "Generated by `python benchmarks/speed_memory.py` from `benchmarks/records/speed_memory.jsonl`.",
        "",
        _machine(record),
        "",
        "| case | seconds (each run) | median | goal | against torch's tracker | own memory | told peak |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, runs in by_case.items():
        seconds = [r["seconds"] for r in runs if "seconds" in r]
        ratio = "-"
        if tracker and "8B" in name:
            ratio = f"{statistics.median(seconds) / _median_s(tracker):.2f}"
        goal = f"{GOALS_S[name]} s" if name in GOALS_S else "-"
        lines.append(
            f"| {name} | {', '.join(f'{s:.1f}' for s in seconds)} | {statistics.median(seconds):.1f} s "
            f"| {goal} | {ratio} | {max(r.get('own_bytes', 0) for r in runs) / 2**30:.2f} GiB "
            f"| {_gib(runs[0]['told_bytes'])} |"
        )
    return "\n".join([*lines, ""])


def _gib(told_bytes: int) -> str:
    return f"{told_bytes / 2**30:.2f} GiB" if told_bytes else "-"


def _median_s(runs: list[dict[str, Any]]) -> float:
    return statistics.median(r["seconds"] for r in runs if "seconds" in r)


def _machine(record: dict[str, Any]) -> str:
    return (
        f"{record['when']}, {record['cores']} cores ({record['processor']}), Python {record['python']}, "
        f"torch {record['torch']}; load of the machine before: {record['load']:.1f}. "
        "Each run is a fresh process, with imports, until it has printed its answer. Cases take turns. "
        "The tracker is told of CPU kernels."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="print only; page and record stay as they are")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(json.loads(RECORD.read_text())))
        return
    if options.case:
        print(CASES[options.case](), flush=True)
        return
    import torch

    record: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "runs": [],
    }
    for turn in range(options.runs + 1):
        for name in CASES:
            record["runs"].append(cold(name, watch=turn == options.runs))
            print(json.dumps(record["runs"][-1]), flush=True)
    if not options.keep:
        RECORD.write_text(json.dumps(record) + "\n")
        PAGE.write_text(page(record))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


if __name__ == "__main__":
    main()
