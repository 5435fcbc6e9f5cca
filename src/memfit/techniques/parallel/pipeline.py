"""Pipeline parallelism: each rank holds some of the blocks, and micro-batches pass through them.

GPipe runs all forwards, then all backwards (Huang et al. 2019). 1F1B alternates, so that stage r of p keeps
min(m, p - r) of m micro-batches (Narayanan et al. 2019). Interleaved gives each rank several stages
(Narayanan et al. 2021). Zero-bubble delays the weights' part of backward (Qi et al. 2023, ZB1P and ZBV).
torch.distributed.pipelining runs them. With gradient accumulation, each accumulated micro-batch passes
through as ``micro_batches`` smaller ones.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from memfit.techniques.base import Knob, StepPart, Technique, Workbench
from memfit.techniques.rank_mesh import Layout
from memfit.types.errors import UserError
from memfit.types.plan import EffectClass, KnobValue

_VIRTUAL = {  # minimum and maximum number of stages per rank
    "gpipe": (1, 1),
    "1f1b": (1, 1),
    "interleaved": (2, sys.maxsize),
    "zero-bubble": (1, sys.maxsize),
    "zero-bubble-v": (2, 2),
}


def _apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    if bench.world.sub("pipeline") is None:
        return
    from memfit.techniques.parallel.pipeline_stages import Pipeline

    schedule, virtual = str(settings["schedule"]), int(settings["virtual"])
    _check(schedule, virtual, bench.world.layout)
    bench.pipeline = Pipeline(
        bench,
        schedule=schedule,
        virtual=virtual,
        micro_batches=int(settings["micro_batches"]),
        first_fewer=int(settings["first_fewer"]),
        last_fewer=int(settings["last_fewer"]),
    )


def _check(schedule: str, virtual: int, layout: Layout) -> None:
    low, high = _VIRTUAL[schedule]
    if not low <= virtual <= high:
        raise UserError(
            f"pipeline schedule {schedule!r} does not support virtual={virtual} (stages on each rank)",
            allowed=f"virtual={low}{'' if high == low else ' or more'}",
        )
    if schedule.startswith("zero-bubble") and layout.data > 1:
        raise UserError(
            f"pipeline schedule {schedule!r} does not support {layout.data} data-parallel ranks",
            allowed="the schedules gpipe, 1f1b and interleaved, or one data-parallel rank",
            hint="the reason: torch's split backward bypasses the hooks with which ranks average gradients",
        )
    if virtual > 1 and layout.replicate > 1 and layout.shard == 1:
        raise UserError(
            f"{virtual} pipeline stages on a rank (virtual) cannot be combined with ddp, nor with fsdp2 of "
            f"{layout.replicate} replicas over {layout.data} data-parallel ranks",
            allowed=f"fsdp2 with fewer than {layout.replicate} replicas; or one stage on a rank: the "
            "schedule gpipe or 1f1b with virtual=1",
            hint="the reason: DDP waits for every parameter's gradient, but each backward computes those of "
            "one stage",
        )


TECHNIQUE = Technique(
    name="pipeline",
    summary="each rank holds some of the blocks, and micro-batches stream through them",
    script_call="torch.distributed.pipelining in {stages} stages, schedule {schedule}, {micro_batches} "
    "micro-batches",
    changes=StepPart.PASSES,
    effect=EffectClass.E1,
    apply=_apply,
    order=86,
    slot="pipeline",
    knobs=(
        Knob(
            name="stages", default=2, doc="number of ranks over which the blocks are distributed", minimum=2
        ),
        Knob(
            name="schedule",
            default="1f1b",
            doc="order in which the forwards and backwards of micro-batches run",
            choices=tuple(_VIRTUAL),
        ),
        Knob(
            name="virtual",
            default=1,
            doc="pipeline stages on each rank; gpipe, 1f1b: 1; interleaved: at least 2; zero-bubble: any "
            "number; zero-bubble-v: 2",
        ),
        Knob(
            name="micro_batches",
            default=4,
            doc="equal parts into which a rank's batch, or each micro-batch of gradient-accumulation, is cut",
        ),
        Knob(
            name="first_fewer",
            default=0,
            doc="blocks that the first stage has fewer than an even share, because it has the embedding",
            minimum=0,
        ),
        Knob(
            name="last_fewer",
            default=0,
            doc="blocks that the last stage has fewer than an even share, because it has the head",
            minimum=0,
        ),
    ),
    forbids=("optimizer-in-backward", "qlora"),
)
