"""Host memory: ten offloaded runs measured, and 500 random questions whose answers simple sums can refute.

    python benchmarks/host_memory.py --runs       the resident memory of ten runs beside their estimates
    python benchmarks/host_memory.py --law 500    random machines, offloads and sizes: none may fit by mistake

Runs: every process of a run tells its own resident peak; the sum is compared with `Prediction.host_bytes`. On
a processor the tensors of the step lie in that memory too. Law: the bytes that the host must hold at least
are counted from the number of parameters by hand here, with nothing of memfit's; "fits" where the host has
less is a mistake.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import memfit
from memfit import Job

MIB, GIB = 2**20, 2**30
TOKENS = 16
SMALLEST = 64 * 1024  # smaller tensors are not moved to the host


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return out


class Stack(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(x)
        return out


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch["x"]).float(), batch["y"])


def job(width: int, depth: int, batch: int, **more: Any) -> Job:
    def make_batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        x = torch.randn(batch, TOKENS, width, generator=generator)
        return {"x": x, "y": torch.randn(batch, TOKENS, 32, generator=generator)}

    return Job(
        name=f"stack-{width}x{depth}",
        build_model=functools.partial(Stack, width, depth),
        loss=_loss,
        make_batch=make_batch,
        batch_size=batch,
        blocks="blocks",
        **more,
    )


def parameters(width: int, depth: int) -> int:
    """Of the stack, by hand: two matrices, their biases and the norm of each block, and the head."""
    return depth * (8 * width * width + 5 * width + 2 * width) + 32 * width + 32


# -- ten runs -------------------------------------------------------------------------------------

wide = job(1024, 8, 64)
long = job(512, 8, 512)
averaged = job(1024, 6, 32, ema=True, clip=1.0)
_SMALL_BUCKET = {"reduce_bucket_elements": 20_000_000}
RUNS: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("activations to disk", "long", {"activation-offload": {"to": "disk"}}, 1),
    (
        "activations to disk, every other block recomputed",
        "long",
        {"activation-offload": {"to": "disk"}, "activation-checkpointing": {"every": 2}},
        1,
    ),
    (
        "activations to disk, four micro-batches",
        "wide",
        {"activation-offload": {"to": "disk"}, "gradient-accumulation": {"micro_batches": 4}},
        1,
    ),
    (
        "activations to disk, bf16 autocast",
        "long",
        {"activation-offload": {"to": "disk"}, "bf16-autocast": {}},
        1,
    ),
    ("activations to disk, EMA and clipping", "averaged", {"activation-offload": {"to": "disk"}}, 1),
    ("FSDP2, parameters away", "wide", {"fsdp2": {"offload": True}}, 2),
    (
        "FSDP2, parameters away, recomputed",
        "long",
        {"fsdp2": {"offload": True}, "activation-checkpointing": {}},
        2,
    ),
    ("ZeRO 2, optimizer away", "wide", {"zero": {"stage": 2, "offload": "optimizer", **_SMALL_BUCKET}}, 2),
    ("ZeRO 3, parameters away", "wide", {"zero": {"stage": 3, "offload": "parameters", **_SMALL_BUCKET}}, 2),
    (
        "ZeRO 3, parameters away, one rank",
        "averaged",
        {"zero": {"stage": 3, "offload": "parameters", **_SMALL_BUCKET}},
        1,
    ),
)


def measured(name: str, plan: memfit.Plan) -> int:
    """Resident bytes of all processes of a run, each at its own peak."""
    from memfit.engines.registry import render
    from memfit.runtime.child_process import run
    from memfit.runtime.ranks import run_ranks
    from memfit.types.job import JobRef
    from memfit.types.launch import RunSpec

    spec = RunSpec(
        name=name,
        role="run",
        job=JobRef(spec=f"{Path(__file__)}:{name}"),
        plan=plan,
        seed=0,
        steps=3,
        threads=1,
        evaluate=False,
    )
    one_process = plan.ranks == 1
    seen = [run(render(spec), on_event=lambda event: None)] if one_process else [*run_ranks(render(spec))]
    for one in seen:
        assert one.outcome.value == "ok", one.reason
    return sum(one.rss_peak_bytes or 0 for one in seen)


def runs() -> int:
    print("| run | processes | estimate MiB | measured MiB | error |\n|---|--:|--:|--:|--:|")
    worst = 0.0
    for title, name, techniques, ranks in RUNS:
        found = memfit.estimate(globals()[name], plan={"ranks": ranks, "techniques": techniques})
        assert found.host_bytes is not None
        guess, truth = found.host_bytes.value, measured(name, found.plan)
        worst = max(worst, abs(guess / truth - 1))
        cells = f"{title} | {ranks} | {guess / MIB:,.0f} | {truth / MIB:,.0f} | {guess / truth - 1:+.1%}"
        print(f"| {cells} |", flush=True)
    print(f"\nworst error {worst:.1%}")
    return int(worst > 0.05)


# -- 500 questions --------------------------------------------------------------------------------

MACHINES = ("RTX-4090", "RTX-3090", "A100-80GB-SXM", "H100-SXM", "L4", "MI300A", "H100-PCIe", "B200")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """``host_bytes`` None: the catalog's."""

    width: int
    depth: int
    machine: str
    devices: int
    techniques: dict[str, Any]
    host_bytes: int | None
    workers: int


def questions(count: int, *, seed: int, widest: int = 16_384) -> Iterator[Question]:
    chance = random.Random(seed)
    for _ in range(count):
        width = 64 * max(2, round(2 ** chance.uniform(2, 14) / 64 * widest / 16_384))
        yield Question(
            width=width,
            depth=chance.choice((2, 3, 4)),
            machine=chance.choice(MACHINES),
            devices=chance.choice((1, 1, 2, 4, 8)),
            techniques=chance.choice(
                (
                    {},
                    {"fsdp2": {}},
                    {"fsdp2": {"offload": True}},
                    {"zero": {"stage": 2, "offload": "optimizer"}},
                    {"zero": {"stage": 3, "offload": "optimizer"}},
                    {"zero": {"stage": 3, "offload": "parameters"}},
                    {"zero": {"stage": 3, "offload": "parameters", "precision": "bf16"}},
                    {"activation-offload": {"to": "host"}},
                )
            ),
            host_bytes=chance.choice((None, int(GIB * 2 ** chance.uniform(3, 12)))),
            workers=chance.choice((0, 0, 4)),
        )


def at_least(asked: Question) -> tuple[float, bool]:
    """(bytes that one host must hold at least, whether tensors of the plan lie there), by hand. Every device
    is in one host, so that all shards of a model are: its parameters count once."""
    count, kept = parameters(asked.width, asked.depth), 0.0
    batch_bytes = 4 * TOKENS * (asked.width + 32)  # a sample of each rank
    zero = asked.techniques.get("zero", {})
    if asked.techniques.get("fsdp2", {}).get("offload") and asked.devices > 1:
        kept = count * (4 + 4 + 8)  # parameters, gradients, two moments
    elif zero.get("offload") == "optimizer":
        kept = count * (4 + 4 + 8)  # master, its gradient, two moments
    elif zero.get("offload") == "parameters":
        half = zero.get("precision") == "bf16"
        kept = count * ((2 + 2 if half else 4 + 4) + 4 + 8)  # parameters, gradients, master, two moments
    elif "activation-offload" in asked.techniques:
        sizes = (4 * TOKENS * width for width in (asked.width, 4 * asked.width, 4 * asked.width))
        moved = sum(size for size in sizes if size >= SMALLEST)  # what the matrices and the GELU take in
        kept = asked.devices * asked.depth * moved
    workers = asked.devices * asked.workers * 2 * batch_bytes
    return max(kept + workers, 4 * count), kept > 0


def answer(asked: Question) -> memfit.Prediction:
    techniques = asked.techniques or ({"ddp": {}} if asked.devices > 1 else {})
    if "activation-offload" in techniques and asked.devices > 1:
        techniques = {**techniques, "ddp": {}}
    name = f"{asked.devices}x{asked.machine}" if asked.devices > 1 else asked.machine
    return memfit.estimate(
        job(asked.width, asked.depth, asked.devices, workers=asked.workers),
        plan={"ranks": asked.devices, "techniques": techniques},
        machine=name,
        host_memory=asked.host_bytes,
    )


def mistaken(asked: Question, found: memfit.Prediction) -> bool:
    """Whether it "fits" where the host cannot hold it, or nobody knows whether it can."""
    least, kept = at_least(asked)
    there = asked.host_bytes
    if there is None and found.machine.host is not None and found.machine.host.memory_bytes is not None:
        there = int(found.machine.host.memory_bytes.value)
    unknown = there is None and kept
    return found.fits and (unknown or (there is not None and least > there))


def law(count: int) -> int:
    wrong, fitting, short = 0, 0, 0
    for asked in questions(count, seed=23):
        found = answer(asked)
        fitting += found.fits
        short += not found.fits and at_least(asked)[0] > (found.estimate.host_memory_bytes or 0)
        if mistaken(asked, found):
            wrong += 1
            print(f"mistaken: {asked}: {found}", flush=True)
    print(f"{count} questions: {fitting} fit, {short} hosts are too small by hand, {wrong} mistaken")
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", action="store_true")
    parser.add_argument("--law", type=int, metavar="N", default=0)
    asked = parser.parse_args()
    return (runs() if asked.runs else 0) | (law(asked.law) if asked.law else 0)


if __name__ == "__main__":
    sys.exit(main())
