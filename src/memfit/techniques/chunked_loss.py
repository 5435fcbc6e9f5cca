"""Chunked linear cross-entropy, which never holds the logits of the whole batch.

The head returns deferred logits (`LazyLogits`) instead of logits. When the job's loss asks for their
cross-entropy, the hidden states pass through the head in chunks, and each chunk's gradients are computed at
once, so that no recomputation is needed (the idea of fused linear cross-entropy; Wijmans et al. 2024, arXiv
2411.09009). Sums are reordered (E1). Any other use of the deferred logits computes the real ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memfit.model.blocks import find_head
from memfit.techniques.base import Knob, StepPart, Technique, Workbench
from memfit.types.plan import EffectClass, KnobValue

if TYPE_CHECKING:
    import torch


def _apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    from memfit.techniques.deferred_logits import LazyLogits

    _, head = find_head(bench.model, bench.job.head)
    chunks, original = int(settings["chunks"]), head.forward

    def forward(hidden: torch.Tensor) -> Any:
        if not head.training:
            return original(hidden)
        return LazyLogits(hidden, head, chunks)

    head.forward = forward  # type: ignore[method-assign,assignment]


TECHNIQUE = Technique(
    name="chunked-cross-entropy",
    summary="compute head and cross-entropy in chunks, so that the logits never exist whole",
    script_call="compute head and loss in chunks, so that the full logits never exist",
    changes=StepPart.PASSES,
    before_engine=True,
    effect=EffectClass.E1,
    apply=_apply,
    settings=lambda facts: [{"chunks": 8}] if facts.vocabulary >= 512 else [],
    order=60,
    knobs=(
        Knob(
            name="chunks",
            default=8,
            doc="number of parts into which the rows of logits (positions of all samples) are cut",
            minimum=2,
        ),
    ),
    forbids=("lora", "qlora"),
)
