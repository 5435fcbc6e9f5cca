"""What two ranks do for test_checkpoints.py, in one start of two processes: every plan saves, every plan goes
on from what every other saved. Rank 0 writes the losses as JSON.

    python checkpoint_ranks.py FOLDER
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from child_ranks import leave
from torch import nn
from torch.nn import functional

from memfit.engines.registry import render
from memfit.jobs.training_step import TrainingStep
from memfit.techniques.rank_mesh import make_world
from memfit.techniques.registry import make_use
from memfit.types.job import Job, JobRef
from memfit.types.launch import CheckpointSettings, RunSpec
from memfit.types.plan import Plan
from memfit.worker.checkpoint import Checkpointer, Entry
from memfit.worker.train import step_maker

SAVED, MORE = 3, 5
VOCABULARY, WIDTH, LENGTH, BATCH = 128, 62, 12, 8  # four does not divide the width, and half of it is odd


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[0], x.shape[1], self.num_heads, -1)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Small(nn.Module):
    """Embedding and head are tied, the last norm is frozen, a bias of 7 is cut unevenly, and of a gain of one
    element every rank but the first has nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.narrow = nn.Linear(WIDTH, 7)
        self.wide = nn.Linear(7, WIDTH)
        self.gain = nn.Parameter(torch.ones(1))
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([0.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x + self.gain * self.scale * self.wide(self.narrow(x))))


def _batch(step: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    return {"x": tokens[:, :-1].contiguous(), "y": tokens[:, 1:].contiguous()}


def _loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


def small() -> Job:
    return Job(
        name="small",
        build_model=Small,
        make_batch=_batch,
        loss=_loss,
        batch_size=BATCH,
        blocks="blocks",
        head="head",
    )


BUCKET = {"reduce_bucket_elements": 10_000}
PLANS: dict[str, dict[str, dict[str, object]]] = {
    "ddp": {"ddp": {}},
    "fsdp2": {"fsdp2": {}},
    "fsdp2-recomputed": {"fsdp2": {}, "activation-checkpointing": {}},
    "zero1": {"zero": {"stage": 1, **BUCKET}},
    "zero2": {"zero": {"stage": 2, "offload": "optimizer", **BUCKET}},
    "zero3": {"zero": {"stage": 3, "persist_elements": 100, **BUCKET}},
    "sharded-ddp": {"sharded-ddp": {}},
    "tensor": {"tensor-parallel": {"degree": 2}},
    "pipeline": {"pipeline": {"stages": 2, "micro_batches": 2}},
}
ENGINES = {"fairscale": "sharded-ddp", "accelerate": "fsdp2", "deepspeed": "zero3", "deepspeed-2": "zero2"}
HERE = {n: used for n, used in ENGINES.items() if importlib.util.find_spec(n.partition("-")[0])}
_CORE = ("ddp", "fsdp2", "zero2", "zero3")
PAIRS = [
    *itertools.product(("plain", "tensor", *_CORE), _CORE),
    ("ddp", "tensor"),
    ("zero3", "tensor"),
    ("tensor", "tensor"),
    ("fsdp2", "fsdp2-recomputed"),
    ("fsdp2-recomputed", "fsdp2"),
    ("sharded-ddp", "zero2"),
    ("zero3", "sharded-ddp"),
    ("zero1", "zero2"),
    ("ddp", "zero1"),
    ("tensor", "pipeline"),
    ("pipeline", "ddp"),
    *[
        pair
        for pair in [
            ("fairscale", "sharded-ddp"),
            ("fsdp2", "fairscale"),
            ("accelerate", "fsdp2"),
            ("fsdp2", "accelerate"),
            ("deepspeed-2", "deepspeed"),
            ("deepspeed", "deepspeed-2"),
            ("deepspeed", "fsdp2"),
            ("ddp", "deepspeed"),
            ("zero3", "deepspeed-2"),
        ]
        if {n for n in pair if n in ENGINES} <= set(HERE)
    ],
]
SAVING = [*PLANS, *HERE]


def plan(name: str, ranks: int = 2) -> Plan:
    return Plan(uses=tuple(make_use(n, k) for n, k in PLANS.get(name, {}).items()), ranks=ranks)


def spec(given: Plan, keep: CheckpointSettings, engine: str = "native", job: str = "small") -> RunSpec:
    return RunSpec(
        name="x",
        role="run",
        job=JobRef(spec=job),
        plan=given,
        engine=engine,
        seed=0,
        batch_size=BATCH,
        steps=SAVED,
        keep=keep,
    )


class Training:
    """A step of a plan, its checkpoints, and the loss over all ranks."""

    def __init__(self, told: RunSpec, job: Job, folder: Path, rank: int = 0) -> None:
        for name, text in render(told).files.items():
            (folder / name).write_text(text)
        torch.manual_seed(told.seed)
        world = make_world(told.plan, rank=rank, device="cpu")
        self.step: TrainingStep = step_maker(told.engine, folder)(job, told.plan, world=world)
        self.keeper = Checkpointer(told, self.step)

    def losses(self, first: int, count: int) -> list[float]:
        return [self._loss(index) for index in range(first, first + count)]

    def _loss(self, index: int) -> float:
        given, terms = self.step.local(self.step.job.make_batch(index, 0))
        loss = torch.as_tensor(float(self.step.run(given, terms_per_rank=terms)[0]))
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        return float(loss)


def launched(name: str, keep: CheckpointSettings) -> RunSpec:
    engine = name.partition("-")[0] if name in ENGINES else "native"
    return spec(plan(ENGINES.get(name, name)), keep, engine)


def main(folder: Path) -> None:
    """Rank 0 writes losses.json: by plan, by pair of plans, and of a resumption without optimizer state."""
    rank = dist.get_rank()
    found: dict[str, list[float]] = {}
    own = folder / f"rank{rank}"
    own.mkdir()
    for number, name in enumerate(SAVING):
        keep = CheckpointSettings(save=str(folder / name), asynchronous=number % 2 == 0)
        training = Training(launched(name, keep), small(), own, rank)
        training.losses(0, SAVED)
        training.keeper.save(SAVED)
        found[name] = training.losses(SAVED, MORE)
        training.keeper.finish()
        training.step.close()
    for source, target in PAIRS:
        found[f"{source} -> {target}"] = resumed(folder / source, target, own, rank)
    Checkpointer._read = _without_state  # type: ignore[method-assign]
    found["state lost"] = resumed(folder / "ddp", "fsdp2", own, rank)
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(found))


def resumed(saved: Path, target: str, own: Path, rank: int) -> list[float]:
    path = saved / f"step-{SAVED:08d}"
    training = Training(launched(target, CheckpointSettings(resume=str(path))), small(), own, rank)
    losses = training.losses(training.keeper.restore(), MORE)
    training.step.close()
    return losses


_read = Checkpointer._read


def _without_state(keeper: Checkpointer, path: Path, entries: list[Entry], random: str) -> None:
    _read(keeper, path, [], random)
    for optimizer in keeper.optimizers:
        optimizer.state.clear()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
    leave()
