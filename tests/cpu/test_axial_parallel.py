"""Axial parallelism on two and four real ranks over gloo against one process: every output, every gradient,
and what a rank holds of activations.

The file is also the program that each rank runs.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from child_ranks import leave, run_children
from torch import nn

from memfit.jobs.builtin import alphafold2
from memfit.jobs.builtin.alphafold.evoformer import EvoformerBlock, Widths
from memfit.jobs.builtin.alphafold.model import AlphaFold, small_size
from memfit.jobs.training_step import TrainingStep
from memfit.runtime.counting_allocator import CountingAllocator, available
from memfit.runtime.gloo import gloo_first
from memfit.techniques.axial import Axial
from memfit.techniques.rank_mesh import make_world
from memfit.techniques.registry import make_use
from memfit.types.job import Job
from memfit.types.plan import Plan
from memfit.types.trace import Phase
from memfit.worker.train import join_world

RATIO = 0.6  # the share of one process's activations that one of two ranks may hold
# Neither residues nor rows nor extra rows divide by two; every part of the network is there.
SIZE = dataclasses.replace(
    small_size(residues=21, batch_size=2), templates=2, rows=7, extra_rows=9, blocks=2, extra_blocks=1
)


folds = functools.cache(alphafold2.built_in_folds)  # reading them takes longer than a step


def _whole_model(**changed: Any) -> nn.Module:
    """With weights that make every part count: initially what is added to a residual is zero."""
    model = AlphaFold(dataclasses.replace(SIZE, **changed))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape) * 0.1)
    return model


def _without_dropout() -> nn.Module:
    model = _whole_model(
        widths=dataclasses.replace(SIZE.widths, dropout=(0.0, 0.0)),
        extra=dataclasses.replace(SIZE.extra, dropout=(0.0, 0.0)),
        template=dataclasses.replace(SIZE.template, dropout=(0.0, 0.0)),
        structure=dataclasses.replace(SIZE.structure, dropout=0.0),
    )
    assert isinstance(model, AlphaFold)
    return model


def _batch(step: int, seed: int) -> dict[str, torch.Tensor]:
    """Chains of which one has residues missing inside and at its end; one of its two templates is real."""
    batch = alphafold2.train_batch(folds(), SIZE, step=step, seed=seed)
    batch["mask"][0, 16:], batch["mask"][0, 5] = 0, 0
    numbers = torch.Generator().manual_seed(step)
    batch["template"] = torch.randn(batch["template"].shape, generator=numbers)
    batch["template_mask"] = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    return batch


class _Stack(Axial):
    """Evoformer blocks alone."""

    def __init__(self) -> None:
        super().__init__()
        widths = Widths(
            c_m=32, c_z=32, msa_heads=4, msa_head_width=8, pair_head_width=8, triangle=32, outer=8
        )
        self.blocks = nn.ModuleList(EvoformerBlock(widths) for _ in range(3))

    def forward(self, batch: Any) -> torch.Tensor:
        rows, pairs = batch["rows"], batch["pairs"]
        m, z = self.across.own(batch["m"], 1), self.across.own(batch["z"], 1)
        for block in self.blocks:
            m, z = block(m, z, rows, pairs)
        m, z = self.across.whole(m, 1, rows.shape[1]), self.across.whole(z, 1, rows.shape[2])
        return m.square().mean() + z.square().mean()


def _stack_batch(step: int, seed: int) -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(step)
    held = torch.ones(2, 40)
    return {
        "m": torch.randn(2, 16, 40, 32, generator=numbers),
        "z": torch.randn(2, 40, 40, 32, generator=numbers),
        "rows": held.unsqueeze(1).repeat(1, 16, 1),
        "pairs": held.unsqueeze(1) * held.unsqueeze(2),
    }


def _job(name: str, build: Any, **more: Any) -> Job:
    given = {"make_batch": _batch, "loss": alphafold2.loss, "batch_size": 2} | more
    return Job(name=name, build_model=build, blocks="blocks", **given)


JOBS = {
    j.name: j
    for j in (
        _job("folds", _whole_model),
        _job("dry", _without_dropout),
        _job("stack", _Stack, make_batch=_stack_batch, loss=lambda model, batch: model(batch)),
        dataclasses.replace(alphafold2.make(), name="tiny"),
    )
}


def _plan(ranks: int = 2, **uses: Any) -> Plan:
    return Plan(ranks=ranks, uses=tuple(make_use(k.replace("_", "-"), v) for k, v in uses.items()))


def _alone(plan: Plan) -> Plan:
    """The part of the plan that applies to one device."""
    kept = [u for u in plan.uses if u.technique not in ("axial-parallel", "ddp", "fsdp2")]
    return Plan(uses=tuple(kept))


SAME = {
    2: (
        ("folds", _plan(axial_parallel={})),
        ("folds", _plan(axial_parallel={}, ddp={}, activation_checkpointing={})),
        ("folds", _plan(axial_parallel={}, fsdp2={}, selective_checkpointing={})),
        ("folds", _plan(axial_parallel={}, gradient_accumulation={}, chunking={})),
        ("folds", _plan(axial_parallel={}, bf16_autocast={})),
    ),
    4: (("folds", _plan(4, axial_parallel={"degree": 4})), ("dry", _plan(4, axial_parallel={}, ddp={}))),
}
HELD = (("stack", _plan(axial_parallel={})), ("tiny", _plan(axial_parallel={})))


# -- what a rank does --------------------------------------------------------------------------------------


def _stepped(job: Job, plan: Plan, world: Any = None) -> dict[str, Any]:
    """Loss, norm, outputs and gradients of one step."""
    found: dict[str, Any] = {}

    def loss(model: Any, batch: Any) -> torch.Tensor:
        out = model(batch)
        found["out"] = {name: tensor.detach() for name, tensor in out.items()}
        return alphafold2.terms(out, batch)["loss"]

    torch.manual_seed(0)
    step = TrainingStep(dataclasses.replace(job, loss=loss), plan, world=world)

    def on_phase(phase: Phase) -> None:
        if phase is Phase.OPTIMIZER:
            named = {n: p.grad for n, p in step.model.named_parameters()}
            found["grads"] = {n: getattr(g, "full_tensor", g.clone)() for n, g in named.items()}

    part, terms = step.local(job.make_batch(0, 0))
    found["told"] = [float(v) for v in step.run(part, on_phase, terms_per_rank=terms)]
    step.close()
    return found


def _activations(job: Job, plan: Plan, world: Any, counter: CountingAllocator) -> int:
    """Most bytes in a step beside parameters, inputs included; of gradients and optimizer state there are
    none when the first one begins, and what they take meanwhile is not taken off."""
    gc.collect()
    with gloo_first(patient=True) as ask:
        step = TrainingStep(job, plan, world=world)
        ask()
        held = counter.live_bytes()
        counter.reset_peak()
        part, terms = step.local(job.make_batch(0, 0))
        step.run(part, terms_per_rank=terms)
        step.close()
    return counter.peak_bytes() - held


def _rank(target: Path) -> None:
    torch.set_num_threads(1)
    ranks, counter = int(os.environ["WORLD_SIZE"]), None
    with join_world(SAME[ranks][0][1]):
        rank = torch.distributed.get_rank()
        worlds = [make_world(plan, rank=rank, device="cpu") for _, plan in (*SAME[ranks], *HELD)]
        same = [_stepped(JOBS[n], p, w) for (n, p), w in zip(SAME[ranks], worlds, strict=False)]
        held = list[int]()
        if ranks == 2 and available() is None:
            counter = CountingAllocator()
            counter.install()
            held = [
                _activations(JOBS[n], p, w, counter)
                for (n, p), w in zip(HELD, worlds[len(SAME[ranks]) :], strict=True)
            ]
            held += [_activations(JOBS[n], Plan(), None, counter) for n, _ in HELD if rank == 0]
    torch.save({"same": same, "held": held}, target)


# -- the tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank has found, by number of ranks."""
    found = {}
    for ranks in SAME:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        run_children(__file__, [[folder / str(rank)] for rank in range(ranks)])
        found[ranks] = [torch.load(folder / str(rank)) for rank in range(ranks)]
    return found


CASES = [(ranks, index) for ranks, cases in SAME.items() for index in range(len(cases))]


@pytest.mark.parametrize(("ranks", "index"), CASES, ids=str)
def test_outputs_and_every_gradient_are_those_of_one_process(
    ranks: int, index: int, told: dict[int, list[dict[str, Any]]]
) -> None:
    name, plan = SAME[ranks][index]
    alone, found = _stepped(JOBS[name], _alone(plan)), [rank["same"][index] for rank in told[ranks]]
    if plan.get("bf16-autocast") is not None:  # sums in another order, rounded to eight bits
        assert [f["told"] for f in found] == [pytest.approx(alone["told"], rel=0.02)] * ranks
        return
    losses = [f["told"][0] for f in found]
    assert sum(losses) / ranks == pytest.approx(alone["told"][0], rel=1e-5)
    norm = alone["told"][1]
    for one in found:
        assert one["told"][1] == pytest.approx(norm, rel=1e-4)
        assert one["grads"].keys() == alone["grads"].keys()
        for parameter, gradient in alone["grads"].items():
            torch.testing.assert_close(
                one["grads"][parameter],
                gradient,
                rtol=1e-3,
                atol=1e-6 * norm,
                msg=lambda m, p=parameter: f"{p}: {m}",
            )
    if plan.get("ddp") is not None and ranks == 4:
        return  # each pair of ranks has seen its own samples
    pairs = torch.cat([f["out"].pop("pairs") for f in found], dim=1)[:, : SIZE.residues]
    torch.testing.assert_close(pairs, alone["out"].pop("pairs"), rtol=1e-4, atol=1e-4)
    for output, tensor in alone["out"].items():
        for one in found:
            torch.testing.assert_close(one["out"][output], tensor, rtol=1e-4, atol=1e-4, msg=output)


@pytest.mark.skipif(available() is not None, reason=f"no counting allocator: {available()}")
@pytest.mark.parametrize("index", range(len(HELD)), ids=[n for n, _ in HELD])
def test_each_of_two_ranks_holds_little_more_than_half_of_the_activations(
    index: int, told: dict[int, list[dict[str, Any]]]
) -> None:
    of_one = told[2][0]["held"][len(HELD) + index]
    for rank in told[2]:
        of_rank = rank["held"][index]
        assert 0.5 * of_one < of_rank <= RATIO * of_one


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
    leave()
