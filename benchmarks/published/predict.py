"""A setup as (job, plan), traced through the CUDA lens; the number that its source measured."""

from __future__ import annotations

import dataclasses

from published.megatron import rank_jobs
from published.models import job_of
from published.rows import Setup

from memfit.cost.memory import levels
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.plan import Plan, use
from memfit.types.trace import Phase, Trace


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Peaks of a training step. ``phase``: where the allocated one lies."""

    allocated_bytes: int
    phase: str
    reserved_bytes: int | None = None
    device_bytes: int | None = None


def plan_of(setup: Setup) -> Plan:
    uses = []
    if setup.micro_batches > 1:
        uses.append(use("gradient-accumulation", micro_batches=setup.micro_batches))
    if (
        setup.lora is not None and setup.lora.adapter_dtype == "float32"
    ) or (
        setup.parameters == "float32"
        and setup.compute != "float32"
        and setup.sharding not in ("fsdp1", "fsdp2")
    ):
        uses.append(use("bf16-autocast"))
    if setup.recompute == "full" or setup.recompute.startswith("every"):
        every = int(setup.recompute.rpartition("-")[2]) if "-" in setup.recompute else 1
        uses.append(use("activation-checkpointing", every=every))
    if setup.recompute == "operators":
        uses.append(use("selective-checkpointing", keep="matmul"))
    if setup.compiled:
        whole = setup.code in ("thunder", "vision", "litgpt") and setup.ranks["dp"] == 1
        uses.append(use("compile", scope="model" if whole else "blocks"))
    if setup.optimizer in ("adamw-8bit", "adamw-4bit", "adafactor", "sgd"):
        uses.append(use(setup.optimizer))
    elif setup.fused and setup.optimizer == "adamw":
        uses.append(use("adamw-fused"))
    uses += _sharding(setup)
    return Plan(uses=tuple(uses), ranks=setup.ranks["dp"])


def _sharding(setup: Setup) -> list[object]:
    if setup.ranks["dp"] == 1:
        return []
    if setup.sharding in ("fsdp1", "fsdp2"):
        precision = "bf16" if setup.parameters == "float32" else "as-is"
        return [
            use(
                "fsdp2",
                precision=precision,
                reshard=setup.reshard,
                prefetch=1,
                replicas=1,
                offload=False,
                sync="every",
            )
        ]
    if setup.sharding == "ddp":
        return [use("ddp", bucket_mib=25, bucket_view=True, sync="every")]
    raise UserError(f"{setup.sharding} is not expressed yet")


def predict(setup: Setup) -> Prediction:
    if setup.code == "megatron" and setup.arch is not None:
        return max(
            (of_trace(trace(job, _recomputed(setup), device="cuda")) for job in rank_jobs(setup, setup.arch)),
            key=lambda p: p.allocated_bytes,
        )
    for name in ("tp", "pp", "cp", "ep"):
        if setup.ranks[name] > 1:
            raise UserError(f"{name} {setup.ranks[name]} is not expressed yet")
    traced = trace(job_of(setup), plan_of(setup), device="cuda", played=2)
    return of_trace(traced)


def _recomputed(setup: Setup) -> Plan:
    full = use("activation-checkpointing", every=1)
    return Plan(uses=(full,) if setup.recompute == "full" else ())


def of_trace(traced: Trace) -> Prediction:
    clock, live = levels(traced)
    best, phase = 0, ""
    for span in traced.spans:
        first, last = clock.searchsorted((span.start, span.end))
        top = int(live[max(0, first - 1) : last].max(initial=0))
        if span.phase is not Phase.SETUP and span.step == traced.steps - 1 and top > best:
            best, phase = top, f"{span.phase} {span.step}"
    return Prediction(allocated_bytes=best, phase=phase)
