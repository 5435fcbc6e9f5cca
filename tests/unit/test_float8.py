"""Matrix products in 8-bit floats: the layers that use them, their cost, and the devices that have them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

import memfit
from memfit.catalog import machine
from memfit.cost.kernel_model import FULL_SUM, kernels
from memfit.jobs.builtin.gpt import Gpt, GptSize
from memfit.jobs.training_step import TrainingStep
from memfit.planner.parallelism_grid import _inside
from memfit.techniques.float8 import NAME
from memfit.techniques.registry import check, make_use, unsupported_techniques
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.plan import Plan
from memfit.types.trace import OpCall, Phase

pytest.importorskip("torchao")
SIZE = GptSize(layers=2, width=64, heads=4, length=32, vocabulary=96, batch_size=4)


def _batch(step: int, seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 96, (4, 33), generator=torch.Generator().manual_seed(seed + step))
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


JOB = Job(name="gpt", build_model=lambda: Gpt(SIZE), make_batch=_batch, loss=_loss, batch_size=4)


def plan(*names: str) -> Plan:
    return Plan(uses=tuple(make_use(name, {}) for name in names))


def test_linear_layers_of_the_blocks_are_converted_and_the_head_is_not() -> None:
    step = TrainingStep(JOB, plan(NAME, "bf16-autocast"))
    kinds = {name: type(m).__name__ for name, m in step.model.named_modules() if isinstance(m, nn.Linear)}
    assert {k for n, k in kinds.items() if n.startswith("blocks.")} == {"Float8Linear"}
    assert {k for n, k in kinds.items() if not n.startswith("blocks.")} == {"Linear"}


def test_linear_layers_are_converted_in_a_model_that_is_itself_the_sequence_of_blocks() -> None:
    job = dataclasses.replace(
        JOB,
        build_model=lambda: nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(2))),
    )
    layers = [m for m in TrainingStep(job, plan(NAME)).model.modules() if isinstance(m, nn.Linear)]
    assert [type(layer).__name__ for layer in layers] == ["Float8Linear"] * 2


def test_float8_is_refused_where_no_layer_has_sizes_that_are_multiples_of_16() -> None:
    size = dataclasses.replace(SIZE, width=36)
    odd = dataclasses.replace(JOB, build_model=lambda: Gpt(size))
    with pytest.raises(UserError, match="multiples of 16"):
        TrainingStep(odd, plan(NAME))


def test_on_an_accelerator_products_of_the_blocks_run_in_8_bits() -> None:
    traced = trace(JOB, plan(NAME, "bf16-autocast"), device="cuda")
    low = [o for o in traced.ops if o.op == "aten._scaled_mm.default" and o.step == traced.steps - 1]
    assert len(low) == 3 * 4 * 2  # output, two gradients; four layers in each of two blocks
    assert {o.dtype for o in low if o.phase is Phase.FORWARD} == {"float8_e4m3fn"}
    assert {o.dtype for o in low if o.phase is Phase.BACKWARD} == {"float8_e5m2"}


def test_float8_does_not_raise_the_peak_of_compiled_blocks() -> None:
    """Backward rounds the weights to 8 bits again, so no second copy of them is kept."""
    peaks = [
        max(
            sum(a.size_bytes for a in t.allocations if a.start <= at and (a.end is None or a.end > at))
            for at in {a.start for a in t.allocations}
        )
        for t in (
            trace(JOB, plan("compile", "bf16-autocast"), device="cuda"),
            trace(JOB, plan("compile", "bf16-autocast", NAME), device="cuda"),
        )
    ]
    assert peaks[1] <= peaks[0] * 1.02


def product(fast: bool) -> OpCall:
    sizes = [{"t": [[4096, 4096], s, "float8_e4m3fn"]} for s in ([4096, 1], [1, 4096])]
    args = [*sizes, {"t": [[], [], "float32"]}, {"t": [[], [], "float32"]}, None, None, {"torch": "bfloat16"}]
    signature = json.dumps(["aten._scaled_mm.default", [*args, *([True] if fast else [])], {}])
    return OpCall(
        clock=0,
        op="aten._scaled_mm.default",
        signature=signature.replace(" ", ""),
        phase=Phase.FORWARD,
        step=0,
        module="",
        dtype="float8_e4m3fn",
        flops=2 * 4096**3,
        moved_bytes=4 * 4096**2,
    )


def test_float8_products_with_full_precision_accumulation_take_longer() -> None:
    rates = kernels(machine("H100-SXM").device)
    assert rates is not None
    quick, full = rates.arithmetic_s(product(fast=True)), rates.arithmetic_s(product(fast=False))
    assert quick / full == pytest.approx(FULL_SUM)


CARDS = {"A100-80GB-SXM": False, "V100-16GB-SXM2": False, "H100-SXM": True, "L4": True, "MI300X": True}


@pytest.mark.parametrize(("name", "able"), CARDS.items())
def test_float8_is_supported_only_on_devices_with_8_bit_matrix_units(name: str, able: bool) -> None:
    on = machine(name)
    assert (NAME not in unsupported_techniques(on)) == able
    if able:
        check(plan(NAME), on)
    else:
        with pytest.raises(UserError, match=f"{NAME} is not supported on {name}, for which no peak rate"):
            check(plan(NAME), on)


def test_memfit_estimate_refuses_float8_for_a_device_without_it() -> None:
    with pytest.raises(UserError, match=f"{NAME} is not supported on A100-80GB-SXM"):
        memfit.estimate(torch.nn.Linear(16, 16), torch.ones(2, 16), plan=NAME, machine="A100-80GB-SXM")


def test_searches_try_float8_only_together_with_compile() -> None:
    tried = [uses for uses in _inside() if any(u.technique == NAME for u in uses)]
    assert tried
    assert all(any(u.technique == "compile" for u in uses) for uses in tried)
