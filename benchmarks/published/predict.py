"""A setup as (job, plan), traced through the CUDA lens; the number that its source measured."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from published.megatron import rank_jobs
from published.models import job_of
from published.rows import Setup

from memfit.cost.memory import levels
from memfit.trace.compose import deep_trace
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job
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


_FEW_BLOCKS = 4
_PARTS = 4  # of a phase's span: a peak lies near its start or its end


def predict(setup: Setup) -> Prediction:
    """Raises UserError with the reason where the row cannot be expressed."""
    if setup.code == "megatron" and setup.arch is not None:
        plan = _recomputed(setup)
        jobs = rank_jobs(setup, setup.arch)
        return max((_of(setup, job, plan) for job in jobs), key=lambda p: p.allocated_bytes)
    for name in ("tp", "pp", "cp", "ep"):
        if setup.ranks[name] > 1:
            raise UserError(f"{name} {setup.ranks[name]} is not expressed yet")
    return _of(setup, job_of(setup), plan_of(setup))


def _of(setup: Setup, job: Job, plan: Plan) -> Prediction:
    options: dict[str, Any] = {"device": "cuda", "played": 2, "update": setup.row["scope"] == "train_step"}
    if _is_line(setup, plan):
        return _on_a_line(job, plan, int(setup.row["layers"] or 0), options)
    return of_trace(deep_trace(job, plan, **options))


def _is_line(setup: Setup, plan: Plan) -> bool:
    """Whether only peaks are extrapolated: one graph over all blocks has no events of single blocks."""
    compiled = plan.get("compile")
    whole = compiled is not None and compiled.settings["scope"] == "model"
    return (whole or setup.code == "evoformer") and int(setup.row["layers"] or 0) > _FEW_BLOCKS + 1


def _on_a_line(job: Job, plan: Plan, count: int, options: dict[str, Any]) -> Prediction:
    few, more = (_tops(trace(job, plan, blocks=n, **options)) for n in (_FEW_BLOCKS, _FEW_BLOCKS + 1))
    whole = {key: few[key] + (count - _FEW_BLOCKS) * (more[key] - few[key]) for key in few}
    where = max(whole, key=lambda key: whole[key])
    return Prediction(allocated_bytes=whole[where], phase=where[0])


def _tops(traced: Trace) -> dict[tuple[str, int], int]:
    """Highest live bytes in each part of each phase of the last step."""
    clock, live = levels(traced)
    tops: dict[tuple[str, int], int] = {}
    for span in traced.spans:
        if span.phase is Phase.SETUP or span.step != traced.steps - 1:
            continue
        edges = [span.start + (span.end - span.start) * i // _PARTS for i in range(_PARTS + 1)]
        for part, (start, end) in enumerate(itertools.pairwise(edges)):
            first, last = clock.searchsorted((start, end))
            key = (str(span.phase), part)
            tops[key] = max(tops.get(key, 0), int(live[max(0, first - 1) : last].max(initial=0)))
    return tops


def of_trace(traced: Trace) -> Prediction:
    tops = _tops(traced)
    where = max(tops, key=lambda key: tops[key])
    return Prediction(allocated_bytes=tops[where], phase=where[0])


def _recomputed(setup: Setup) -> Plan:
    full = use("activation-checkpointing", every=1)
    return Plan(uses=(full,) if setup.recompute == "full" else ())
