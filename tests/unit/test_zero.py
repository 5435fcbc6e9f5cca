"""ZeRO and sharded DDP: parameters without a gradient, and ranks that update nothing."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from tiny import regression
from torch import nn

from memfit.cost.allocator import events_of, run
from memfit.cost.memory import memory_profile
from memfit.jobs.training_step import TrainingStep
from memfit.techniques.registry import make_use
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job, OptimizerChoice
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.trace import Category, Phase

# Whether the right branch runs for the first and for the second half of the batch of each step.
STEPS = ((True, True), (False, True), (True, False), (False, False), (True, True))
SMALL = {"reduce_bucket_elements": 20, "persist_elements": 1}


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x) if right.any() else self.left(x)


def _batch(step: int, seed: int) -> dict[str, torch.Tensor]:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed + step))
    return {"x": x, "right": torch.tensor(STEPS[step]).repeat_interleave(2)}


JOB = Job(
    name="branches",
    build_model=_Branches,
    make_batch=_batch,
    loss=lambda model, batch: model(batch["x"], batch["right"]).square().mean(),
    batch_size=4,
    optimizer=OptimizerChoice(name="plain", make=lambda params: torch.optim.SGD(params, lr=0.1)),
)


def _plan(micro_batches: int, ranks: int = 1, **uses: dict[str, Any]) -> Plan:
    accumulation = {"gradient-accumulation": {"micro_batches": micro_batches}} if micro_batches > 1 else {}
    named = {k.replace("_", "-"): v for k, v in uses.items()} | accumulation
    return Plan(ranks=ranks, uses=tuple(make_use(name, settings) for name, settings in named.items()))


def _curve(plan: Plan, device: str = "cpu", job: Job = JOB) -> list[float]:
    """Losses and gradient norms of `STEPS`."""
    torch.manual_seed(0)
    step = TrainingStep(job, plan, device=device)
    results = [step.run(job.make_batch(index, 0)) for index in range(len(STEPS))]
    step.close()
    return [float(value) for result in results for value in result]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 0},
        {"stage": 1},
        {"stage": 1, "overlap": True},
        {"stage": 1, "offload": "optimizer"},
        {"stage": 2},
        {"stage": 2, "offload": "optimizer"},
        {"stage": 3},
        {"stage": 3, "offload": "optimizer"},
        {"stage": 3, "offload": "parameters"},
    ],
    ids=str,
)
def test_zero_trains_as_plain_training_if_steps_leave_parameters_unused(
    zero: dict[str, Any], micro_batches: int
) -> None:
    """The gradients of an earlier step count neither in the norm nor in the update."""
    plain = _curve(_plan(micro_batches))
    assert _curve(_plan(micro_batches, zero={**SMALL, **zero})) == pytest.approx(plain, rel=1e-5)


ON_NVME = {"stage": 3, "offload": "optimizer", "nvme": "optimizer", "sub_group_elements": 10, **SMALL}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_optimizer_state_on_nvme_trains_bit_by_bit_as_in_host_memory(micro_batches: int) -> None:
    adamw = OptimizerChoice(name="adamw", learning_rate=0.1)
    job = dataclasses.replace(JOB, optimizer=adamw, clip=0.5)
    on_host = {"stage": 3, "offload": "optimizer", **SMALL}
    assert _curve(_plan(micro_batches, zero=ON_NVME), job=job) == _curve(
        _plan(micro_batches, zero=on_host), job=job
    )


def test_a_step_reads_and_writes_each_stored_element_once_and_host_memory_holds_one_sub_group() -> None:
    job = dataclasses.replace(JOB, optimizer=OptimizerChoice(name="adamw"))
    traced = trace(job, _plan(1, zero=ON_NVME), device="cuda")
    elements = 2 * (8 * 4 + 4)
    stored_bytes = 16 * elements  # master copy, gradient, two moments
    assert traced.storage_bytes == stored_bytes
    assert traced.storage_read_bytes == traced.storage_written_bytes == stored_bytes
    # Sub-groups of whole tensors of at least 10 elements: (32), (4 + 32), (4). Buffers, and in the first step
    # moments beside them, are for the largest; low-precision gradients stay in host memory.
    assert 36 * 16 < traced.host_step_bytes - 4 * elements < 36 * 32
    at_once = trace(job, _plan(1, zero=ON_NVME | {"sub_group_elements": 1_000}), device="cuda")
    assert at_once.host_step_bytes > 1.5 * traced.host_step_bytes


@pytest.mark.parametrize("wrong", [{"stage": 2}, {"offload": "none"}], ids=str)
def test_only_offloaded_state_of_stage_3_can_be_on_nvme(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="stage 3"):
        trace(JOB, _plan(1, zero=ON_NVME | wrong))


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_gradients_of_micro_batches_are_summed(stage: int) -> None:
    zero = {**SMALL, "stage": stage, "offload": "optimizer"}
    assert _curve(_plan(2, zero=zero), "cuda") == pytest.approx(_curve(_plan(2)), rel=1e-5)


class _OneElement(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x[:, :4]


@pytest.mark.parametrize("offload", ["none", "optimizer"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_whose_part_is_only_padding_has_a_gradient_norm(stage: int, offload: str) -> None:
    plan = _plan(1, ranks=4, zero={**SMALL, "stage": stage, "offload": offload})
    assert trace(regression(_OneElement), plan, rank=3).spans


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)  # type: ignore[no-any-return]


def test_a_rank_that_owns_only_unused_parameters_has_a_gradient_norm() -> None:
    plan = _plan(1, ranks=2, sharded_ddp={"reduce_buffer_elements": 0})
    assert trace(regression(_Unused), plan, rank=1).spans


def test_a_rank_that_owns_no_parameter_is_traced_without_optimizer_state() -> None:
    """Two parameters are divided among four ranks."""
    traces = [trace(regression(_Unused), _plan(1, ranks=4, sharded_ddp={}), rank=rank) for rank in (0, 3)]
    states = [{a.category for a in t.allocations} & {Category.OPTIMIZER_STATE} for t in traces]
    assert states == [{Category.OPTIMIZER_STATE}, set()]


LAYERS, SIDE = 8, 4096  # fake tensors: 256 MiB in bfloat16


class _Wide(nn.Module):
    """Equal square layers, of which the last ``frozen`` are not trained."""

    def __init__(self, frozen: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False, dtype=dtype) for _ in range(LAYERS)))
        for layer in list(self.layers)[LAYERS - frozen :]:
            layer.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).float()


WIDE = Job(
    name="wide",
    build_model=_Wide,
    make_batch=lambda step, seed: torch.zeros(16, SIDE),
    loss=lambda model, batch: model(batch).square().mean(),
    batch_size=16,
)
WHOLE = LAYERS * SIDE * SIDE  # elements


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("precision", "offload", "ranks", "setup_elements"),
    [
        ("fp32", "none", 8, 4 + 8 / 8),  # flat parameters; master copy and zeros for its gradient
        ("bf16", "none", 8, 2 + 8 / 8),
        ("fp32", "optimizer", 8, 4 + 4 / 8),  # flat parameters; a copy of the part
        ("bf16", "optimizer", 8, 2 + 2 / 8),
        ("bf16", "optimizer", 1, 2 + 2 / 1),
    ],
)
def test_an_accelerator_has_the_parameters_once_while_stages_1_and_2_are_set_up(
    stage: int, precision: str, offload: str, ranks: int, setup_elements: float
) -> None:
    """Counted by hand from deepspeed/runtime/zero/stage_1_and_2.py: bytes per element times elements."""
    zero = {**SMALL, "stage": stage, "precision": precision, "offload": offload}
    traced = trace(WIDE, _plan(1, ranks=ranks, zero=zero), device="cuda")
    setup_bytes = memory_profile(traced, Calibration()).phase_peak_bytes[Phase.SETUP]
    assert setup_bytes == pytest.approx(setup_elements * WHOLE, rel=1e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_flat_buffer_reuses_the_memory_that_parameters_or_their_pieces_would_take(stage: int) -> None:
    """Reserved in set-up are the buffer, and under stage 2 the copy of the part: what made them was never
    there."""
    zero = {**SMALL, "stage": stage, "precision": "bf16", "offload": "optimizer"}
    traced = trace(WIDE, _plan(1, zero=zero), device="cuda")
    setup = [a for a in traced.allocations if a.phase is Phase.SETUP]
    reserved_bytes = run(events_of(setup)).reserved_peak_bytes
    flat_bytes = 2 * WHOLE
    assert flat_bytes < reserved_bytes < (2.5 if stage == 2 else 1.5) * flat_bytes


def test_parameters_that_are_not_trained_are_on_the_accelerator_too() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        job = dataclasses.replace(WIDE, build_model=functools.partial(_Wide, frozen=4, dtype=dtype))
        plan = _plan(1, zero={**SMALL, "stage": 2, "precision": "bf16", "offload": "optimizer"})
        traced = trace(job, plan, device="cuda")
        kept = [a for a in traced.allocations if a.category is Category.PARAMETER and a.end is None]
        assert sum(a.size_bytes for a in kept) == pytest.approx(2 * WHOLE, rel=1e-3)
