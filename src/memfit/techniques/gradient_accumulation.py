"""Gradient accumulation: each rank's batch is trained in ``micro_batches`` parts, one after the other.

The memory of activations shrinks by that factor. Gradients are summed in another order (E1). Each part's mean
loss is weighted by its share of the loss terms, so that padding does not bias the sum.
"""

from __future__ import annotations

from collections.abc import Mapping

from memfit.techniques.base import Knob, StepPart, Technique, Workbench
from memfit.types.plan import EffectClass, KnobValue


def _apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    bench.micro_batches = int(settings["micro_batches"])


TECHNIQUE = Technique(
    name="gradient-accumulation",
    summary="train the batch in micro-batches and add up their gradients",
    script_call="split the batch into {micro_batches} micro-batches and update after the last",
    changes=StepPart.NONE,
    effect=EffectClass.E1,
    apply=_apply,
    settings=lambda facts: [{"micro_batches": n} for n in facts.micro_batch_counts if n > 1],
    order=5,  # others look at a micro-batch
    knobs=(
        Knob(
            name="micro_batches",
            default=2,
            doc="number of parts into which each rank's batch is cut",
            minimum=2,
        ),
    ),
    forbids=("optimizer-in-backward",),
)
