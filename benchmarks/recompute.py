"""Optimal recomputation against torch's memory budget and against every k-th block, at equal measured peak.

    python benchmarks/recompute.py [--only NAME ...] [--rounds 6]   measure, record, write the page
    python benchmarks/recompute.py --page                           the page from the records only

Every configuration of an architecture lives in a process of its own; one step at a time is run, in
interleaved rounds. For each rival's measured peak memfit is asked for a plan of that budget (rounded down to
a whole MiB). Every number in the page comes from benchmarks/records/recompute.jsonl, the last line of each
architecture.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architectures.attention import evoformer
from architectures.common import job, pictures, to_class, to_target
from architectures.convolutions import Residual, UNet
from architectures.hugging_face import _hf, _own_loss, _text
from recompute_page import EVERY, KNOB, MIB, NEAR_RATIO, OURS, PER_TURN, PLAIN, RATIOS, page
from torch import nn

from memfit.cost.memory import memory_profile
from memfit.cost.op_time import signatures_by_weight, time_model
from memfit.jobs.registry import load
from memfit.jobs.training_step import TrainingStep
from memfit.model.blocks import find_blocks
from memfit.planner.recompute_budget import choose_tensors
from memfit.runtime import local_machine
from memfit.runtime.counting_allocator import CountingAllocator
from memfit.runtime.op_benchmark import calibrate
from memfit.store.environment import fingerprint
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job, JobRef
from memfit.types.plan import Plan, use
from memfit.types.units import format_bytes

RECORDS = Path(__file__).parent / "records" / "recompute.jsonl"
PAGE = Path(__file__).parent / "recompute.md"
STEPS = 4  # before timing: the first two compile and make optimizer state, the next two show the peak
# Freed memory stays with the process, as with the caching allocator of a GPU: no step waits for fresh pages.
HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_ARENA_MAX": "1"}


def _bert(name: str, kind: str, rows: int, length: int, **fields: Any) -> Job:
    config = {
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "intermediate_size": 768,
        **fields,
    }
    model = _hf(f"{kind}Config", f"{kind}ForMaskedLM", **config)
    return job(name, model, _text(rows, length, config["vocab_size"], masked=True), _own_loss, rows=rows)


def esm() -> Job:
    return _bert(
        "esm",
        "Esm",
        3,
        192,
        vocab_size=33,
        position_embedding_type="rotary",
        pad_token_id=1,
        mask_token_id=32,
    )


def llama() -> Job:
    model = _hf(
        "LlamaConfig",
        "LlamaForCausalLM",
        vocab_size=1024,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=512,
        max_position_embeddings=256,
        use_cache=False,
    )
    return job("llama", model, _text(3, 192, 1024), _own_loss, rows=3)


def vit() -> Job:
    model = _hf(
        "ViTConfig",
        "ViTForImageClassification",
        image_size=64,
        patch_size=8,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=768,
        num_labels=100,
    )

    def batch(g: torch.Generator) -> dict[str, torch.Tensor]:
        pixels, labels = pictures(8, 64, 100)(g)
        return {"pixel_values": pixels, "labels": labels}

    return job("vit", model, batch, _own_loss, rows=8)


def t5() -> Job:
    model = _hf(
        "T5Config",
        "T5ForConditionalGeneration",
        vocab_size=1024,
        d_model=192,
        d_kv=32,
        d_ff=512,
        num_layers=4,
        num_heads=6,
        decoder_start_token_id=0,
        use_cache=False,
    )
    batch = _text(4, 160, 1024, decoder=96)
    return job("t5", model, batch, _own_loss, rows=4, blocks="encoder.block")


def resnet() -> Job:
    def model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 32, 7, 2, 3, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
            nn.Sequential(*(Residual(32) for _ in range(8))),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 100),
        )

    return job("resnet", model, pictures(12, 96, 100), to_class, rows=12, blocks="4")


def unet() -> Job:
    return job(
        "unet",
        lambda: UNet(24),
        lambda g: (torch.randn(4, 1, 96, 96, generator=g), torch.randn(4, 1, 96, 96, generator=g)),
        to_target,
        rows=4,
        blocks="up",
    )


JOBS: dict[str, Callable[[], Job]] = {
    "gpt": lambda: load(JobRef(spec="char-lm", batch=8)),
    "unet": unet,
    "llama": llama,
    "esm": esm,
    "resnet": resnet,
    "vit": vit,
    "evoformer": evoformer,
    "t5": t5,
}


_PLAIN_PLAN = Plan()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """``ratio``: of torch's budget; ``backend`` "": not compiled."""

    kind: str
    label: str
    plan: Plan = _PLAIN_PLAN
    backend: str = ""
    ratio: float = 1.0
    budget_mib: int = 0
    predicted_bytes: int = 0


# --- one configuration, in a process of its own


def _child(conn: Any, make: Callable[[], Job], config: Config) -> None:
    try:
        counter = CountingAllocator()
        counter.install()
        base = counter.live_bytes()
        torch.manual_seed(0)
        job = make()
        step = TrainingStep(job, config.plan)
        _compile(step, job, config)
        losses = []
        for index in range(STEPS):
            if index == STEPS - 2:
                gc.collect()
                counter.reset_peak()
            batch = job.make_batch(index, 0)
            losses.append([float(v) for v in step.run(batch)])
            del batch
        conn.send({"peak_bytes": counter.peak_bytes() - base, "losses": losses})
        while conn.recv():
            taken = []
            for index in range(PER_TURN):
                batch = job.make_batch(STEPS + index, 0)
                begun = time.process_time()
                step.run(batch)
                taken.append(time.process_time() - begun)
            conn.send(min(taken))
    except Exception as error:  # noqa: BLE001  # of compilers too: it is told in the page
        conn.send({"error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"})


def _compile(step: TrainingStep, job: Job, config: Config) -> None:
    if not config.backend:
        return
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.config.recompile_limit = 64
    torch._functorch.config.activation_memory_budget = config.ratio
    modules = [step.model] if config.kind == KNOB else find_blocks(step.model, job.blocks)[1]
    for module in modules:
        module.compile(backend=config.backend)


class Live:
    """A configuration under way."""

    def __init__(self, make: Callable[[], Job], config: Config) -> None:
        context: Any = multiprocessing.get_context("fork")
        self.config = config
        self.conn, theirs = context.Pipe()
        self.process = context.Process(target=_child, args=(theirs, make, config), daemon=True)
        self.process.start()
        theirs.close()
        self.told = self.conn.recv()
        self.step_s: list[float] = []
        print(
            f"  {config.label}: {self.told.get('error') or format_bytes(self.told['peak_bytes'])}", flush=True
        )

    @property
    def runs(self) -> bool:
        return "error" not in self.told

    def turn(self) -> None:
        self.conn.send(True)
        self.step_s.append(self.conn.recv())

    def close(self) -> None:
        if self.runs:
            self.conn.send(False)
        self.process.join()

    def row(self) -> dict[str, Any]:
        c = self.config
        return {
            "kind": c.kind,
            "label": c.label,
            "budget_mib": c.budget_mib,
            "predicted_bytes": c.predicted_bytes,
            **self.told,
            "step_s": self.step_s,
        }


# --- one architecture


def rivals(blocks: int) -> list[Config]:
    found = [Config(kind=PLAIN, label="plain"), Config(kind=PLAIN, label="plain again")]
    for kind, ratios in RATIOS.items():
        found += [Config(kind=kind, label=f"{kind}, {r:g}", backend="aot_eager", ratio=r) for r in ratios]
    for k in range(1, min(blocks, 3)):
        plan = Plan(uses=(use("activation-checkpointing", every=k),))
        found.append(Config(kind=EVERY, label=f"every {k}", plan=plan))
    return found


def measured(name: str, rounds: int) -> dict[str, Any]:
    print(name, flush=True)
    make = JOBS[name]
    blocks = len(find_blocks(make().build_model(), make().blocks)[1])
    alive: list[Live] = []
    for config in rivals(blocks):
        one = Live(make, config)
        same = [o for o in alive if o.runs and one.runs and o.config.kind == config.kind and _same(o, one)]
        if not one.runs or not same or config.kind == PLAIN:
            alive.append(one)
        else:
            one.close()
    plain = next(o for o in alive if o.config.kind == PLAIN)
    wanted = {
        o.told["peak_bytes"] // MIB
        for o in alive
        if o.runs and o.told["peak_bytes"] < NEAR_RATIO * plain.told["peak_bytes"]
    }
    plans, refused = _asked(make, sorted(wanted))
    alive += [Live(make, config) for config in plans]
    running = [o for o in alive if o.runs]
    for turn in range(rounds):
        for one in running[turn:] + running[:turn]:
            one.turn()
    for one in alive:
        one.close()
    return {"name": name, "blocks": blocks, "refused_mib": refused, "rows": [o.row() for o in alive]}


def _same(one: Live, other: Live) -> bool:
    return bool(abs(one.told["peak_bytes"] - other.told["peak_bytes"]) < 0.001 * one.told["peak_bytes"])


def _asked(make: Callable[[], Job], budgets_mib: list[int]) -> tuple[list[Config], dict[int, str]]:
    """Plans for the budgets, chosen in a process that ends before the rounds."""
    context: Any = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_choose, args=(theirs, make, budgets_mib), daemon=True)
    process.start()
    answer: tuple[list[Config], dict[int, str]] = mine.recv()
    process.join()
    return answer


def _choose(conn: Any, make: Callable[[], Job], budgets_mib: list[int]) -> None:
    counter = CountingAllocator()
    counter.install()
    job, configs, refused = make(), [], {}
    plain = trace(job, Plan())
    known = calibrate(signatures_by_weight((op, 1) for op in plain.ops), timing_s=20.0, counter=counter)
    model = time_model(local_machine.this_machine("world").device, known, plain.ops)
    assert model is not None
    for budget in budgets_mib:
        asked = Plan(uses=(use("optimal-checkpointing", budget_mib=budget, dropped=""),))
        begun = time.perf_counter()
        try:
            plan = choose_tensors(job, asked, seconds=model.op_s, calibration=known)
        except UserError as error:
            refused[budget] = str(error)
            print(f"  {error}", flush=True)
            continue
        took_s = time.perf_counter() - begun
        predicted = memory_profile(trace(job, plan), known).peak_bytes
        label = f"{OURS}, {budget} MiB"
        configs.append(
            Config(kind=OURS, label=label, plan=plan, budget_mib=budget, predicted_bytes=predicted)
        )
        print(f"  chosen for {budget} MiB in {took_s:.1f} s", flush=True)
    conn.send((configs, refused))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(JOBS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.page:
        if any(os.environ.get(k) != v for k, v in HEAP.items()):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **HEAP})
        _prepare()
        for name in options.only or JOBS:
            record = {
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "rounds": options.rounds,
                "environment": dict(fingerprint()),
                "architecture": measured(name, options.rounds),
            }
            with RECORDS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    last = {r["architecture"]["name"]: r for r in map(json.loads, RECORDS.read_text().splitlines())}
    PAGE.write_text(page([last[name] for name in JOBS if name in last]), encoding="utf-8")
    print(PAGE.read_text())


def _prepare() -> None:
    """What every child needs is imported before they are forked."""
    import scipy.optimize  # noqa: F401

    trace(JOBS["esm"](), Plan())


if __name__ == "__main__":
    main()
