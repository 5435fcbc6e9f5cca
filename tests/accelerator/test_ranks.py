"""Two ranks on two accelerators: each takes what was predicted of it, and together they train as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import forked
import pytest

from memfit.cost.memory import memory_profile
from memfit.engines.registry import render
from memfit.jobs.registry import load
from memfit.runtime.ranks import run_ranks
from memfit.techniques.registry import make_use
from memfit.trace.tracer import trace
from memfit.types.device_kind import DeviceKind, add_device_kind
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.result import Measurement, OutcomeKind

KIND = "sim"
JOB = JobRef(spec="protein-lm", batch=4)
_ON_DEVICE = Path(__file__).with_name("on_the_device.py")
WORST_RATIO = 0.005
PLANS = {
    "one rank": Plan(),
    "ddp": Plan(ranks=2, uses=(make_use("ddp", {}),)),
    "fsdp2": Plan(ranks=2, uses=(make_use("fsdp2", {}),)),
    "fsdp2 in bf16": Plan(ranks=2, uses=(make_use("fsdp2", {"precision": "bf16"}),)),
    "fsdp2 under bf16 autocast": Plan(ranks=2, uses=(make_use("fsdp2", {}), make_use("bf16-autocast", {}))),
    "fsdp2 offloaded to the host": Plan(ranks=2, uses=(make_use("fsdp2", {"offload": True}),)),
    "tensor parallel": Plan(ranks=2, uses=(make_use("tensor-parallel", {"degree": 2}),)),
    "pipeline": Plan(ranks=2, uses=(make_use("pipeline", {"stages": 2, "micro_batches": 2}),)),
    "context parallel": Plan(ranks=2, uses=(make_use("context-parallel", {"degree": 2}),)),
    "zero 2 offloaded": Plan(
        ranks=2,
        uses=(make_use("zero", {"stage": 2, "offload": "optimizer", "reduce_bucket_elements": 1_000_000}),),
    ),
    "sharded ddp": Plan(ranks=2, uses=(make_use("sharded-ddp", {}),)),
    "zero 3": Plan(ranks=2, uses=(make_use("zero", {"stage": 3, "reduce_bucket_elements": 1_000_000}),)),
}
# Alike in what the device does: ranks that gather, and states in host memory.
LONG = {"fsdp2 in bf16", "context parallel", "zero 2 offloaded", "sharded ddp", "zero 3", "tensor parallel"}
LONG |= {"fsdp2 under bf16 autocast"}
NAMES = [pytest.param(n, marks=pytest.mark.long if n in LONG else ()) for n in PLANS]


@pytest.fixture(scope="session")
def measured(
    device_environment: Callable[..., dict[str, str]],
) -> Callable[[str], tuple[Measurement, ...]]:
    """The runs of a plan's ranks."""
    results: dict[str, tuple[Measurement, ...]] = {}
    add_device_kind(DeviceKind(name=KIND, kernels="cpu", checked=True))

    def of(name: str) -> tuple[Measurement, ...]:
        if name not in results:
            plan = PLANS[name]
            spec = RunSpec(
                name=name,
                role="run",
                job=JOB,
                plan=plan,
                seed=0,
                steps=3,
                evaluate=False,
                device=KIND,
                threads=1,
            )
            with pytest.MonkeyPatch.context() as patch:
                for variable, value in device_environment(devices=plan.ranks).items():
                    patch.setenv(variable, value)
                workers = forked.processes("memfit.worker ", by=_ON_DEVICE)
                patch.setattr("memfit.runtime.child_process.subprocess", workers)
                results[name] = run_ranks(render(spec))
        failed = [m.reason for m in results[name] if m.outcome is not OutcomeKind.OK]
        assert not failed, failed
        return results[name]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_each_ranks_peak_is_the_predicted_one(
    name: str, measured: Callable[[str], tuple[Measurement, ...]]
) -> None:
    for rank, measurement in enumerate(measured(name)):
        profile = memory_profile(trace(load(JOB), PLANS[name], device=KIND, rank=rank), Calibration())
        assert profile.peak_bytes == pytest.approx(measurement.peak_bytes, rel=WORST_RATIO), rank


@pytest.mark.parametrize("name", NAMES[1:])
def test_two_ranks_train_as_one(name: str, measured: Callable[[str], tuple[Measurement, ...]]) -> None:
    alone = measured("one rank")[0].losses
    by_rank = [measurement.losses for measurement in measured(name)]
    together = [sum(losses) / len(losses) for losses in zip(*by_rank, strict=True)]
    assert together == pytest.approx(alone, rel=2e-2 if "bf16" in name else 1e-4)
