"""The trace of a model of which some blocks are recomputed is put together from the traces without and with
recomputation of all blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from test_unroll import Deep, job
from tiny import words
from torch import nn

from memfit.jobs.builtin import alphafold2
from memfit.jobs.builtin.alphafold.model import AlphaFold, small_size
from memfit.jobs.registry import load
from memfit.model.blocks import find_stacks
from memfit.trace.tracer import fake_model, trace
from memfit.trace.truncated_model import with_blocks
from memfit.trace.unroll import Mismatch, mix_recomputed, normalize_clocks
from memfit.types.job import Job, JobRef
from memfit.types.plan import Plan, Use, use
from memfit.types.trace import Trace

BLOCKS = 4


def folding() -> Job:
    """AlphaFold 2 with three stacks of blocks and with dropout. Its two representations have equal sizes."""
    tiny = small_size(residues=16, batch_size=1)
    shape = dataclasses.replace(
        tiny,
        widths=dataclasses.replace(tiny.widths, c_m=32),
        blocks=BLOCKS,
        extra_blocks=4,
        templates=1,
        template_blocks=2,
        rows=16,
        extra_rows=8,
    )
    folds = alphafold2.built_in_folds()
    return Job(
        name="folding",
        build_model=lambda: AlphaFold(shape),
        make_batch=lambda step, seed: alphafold2.train_batch(folds, shape, step=step, seed=seed),
        loss=alphafold2.loss,
        batch_size=1,
        blocks="blocks",
        more_blocks=("extra", "template.blocks"),
        islands=("structure", "recycle", "heads"),
    )


def protein_lm() -> Job:
    return load(JobRef(spec="protein-lm", size="tiny", batch=2, dimensions={"layers": BLOCKS}))


JOBS: dict[str, Callable[[], Job]] = {
    "alphafold2": folding,
    "protein-lm": protein_lm,
    "dropout": lambda: words(BLOCKS),
    "no-dropout": lambda: job(depth=BLOCKS),
}
AUTOCAST, HALVED = use("bf16-autocast"), use("bf16-parameters", rounding="master")
SPLIT = use("gradient-accumulation", micro_batches=2)
CASES = [
    *((name, uses) for name in JOBS for uses in ((), (AUTOCAST,), (HALVED,))),
    *((name, (SPLIT,)) for name in JOBS if name != "alphafold2"),
]


def part(of: Job, uses: tuple[Use, ...], device: str) -> Trace:
    plan = Plan(uses=uses)
    return trace(of, plan, device=device, steps=1, max_micro_batches=1, update=False)


@pytest.mark.quick_cases("*dropout-*-cuda", "*dropout-plain-cpu", "*-bf16-autocast-cuda")
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(("name", "uses"), CASES, ids=[f"{n}-{Plan(uses=u).label}" for n, u in CASES])
def test_a_mixed_trace_equals_the_trace_of_the_whole_model(
    name: str, uses: tuple[Use, ...], device: str
) -> None:
    whole = JOBS[name]()
    all_blocks = with_blocks(whole, BLOCKS)
    stacks = tuple(find_stacks(fake_model(whole), whole.blocks, whole.more_blocks))
    kept, recomputed = (
        part(all_blocks, (*uses, *more), device) for more in ((), (use("activation-checkpointing", every=1),))
    )
    for every in (2, 3):
        found = normalize_clocks(mix_recomputed(kept, recomputed, stacks, every))
        wanted = normalize_clocks(
            part(all_blocks, (*uses, use("activation-checkpointing", every=every)), device)
        )
        assert found.spans == wanted.spans
        for one, other in zip(found.allocations, wanted.allocations, strict=True):
            assert one == other
        for call, wanted_call in zip(found.ops, wanted.ops, strict=True):
            assert call == wanted_call
        assert found == wanted


def test_traces_of_different_models_are_not_mixed() -> None:
    kept = part(job(depth=3), (), "cuda")
    recomputed = part(job(depth=4), (use("activation-checkpointing", every=1),), "cuda")
    with pytest.raises(Mismatch):
        mix_recomputed(kept, recomputed, ("blocks",), 2)


class Shifting(Deep):
    """Each block also gets the input of the block before it, so that more passes between blocks if these
    keep it."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = before = self.embed(tokens)
        for block in self.blocks:
            x, before = block(x, before), x
        return self.head(x) * 1.0


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + before


def shifting() -> nn.Module:
    model = Shifting(depth=0)
    model.blocks = nn.ModuleList(Sum() for _ in range(BLOCKS))
    return model


def test_blocks_that_read_what_others_read_too_are_mixed_rightly_or_not_at_all() -> None:
    whole = dataclasses.replace(job(), build_model=shifting)
    kept, recomputed = (
        part(whole, uses, "cuda") for uses in ((), (use("activation-checkpointing", every=1),))
    )
    for every in (2, 3):
        wanted = part(whole, (use("activation-checkpointing", every=every),), "cuda")
        try:
            found = mix_recomputed(kept, recomputed, ("blocks",), every)
        except Mismatch:
            continue
        assert normalize_clocks(found) == normalize_clocks(wanted)
