"""Generate plans that differ from a given one in one change that may save memory. Whether they do is for the
caller to find out."""

from __future__ import annotations

from collections.abc import Iterator

from memfit.techniques.registry import conflict, make_use
from memfit.types.plan import KnobValue, Plan


def neighbours(plan: Plan, *, parameters: int | None = None) -> tuple[Plan, ...]:
    """Return the plans that differ from ``plan`` in one change and in which no techniques conflict, without
    duplicates. The changes, in this order: every block recomputed; with ZeRO, its bucket reduced to
    ``parameters`` elements if it is larger, the next stage up to 3, and, from stage 1 on, precision bf16;
    with FSDP2 and no ZeRO, precision bf16, and parameters resharded after the forward pass; with neither,
    bf16 autocast; last, gradient accumulation over twice as many micro-batches (two if there is none). A
    change that ``plan`` already has is skipped. ``parameters``: the number of the model's parameters; None:
    the bucket is not reduced."""
    candidates = (_with(plan, name, knobs) for name, knobs in _changes(plan, parameters))
    return tuple(dict.fromkeys(p for p in candidates if p != plan and conflict(p) is None))


def _with(plan: Plan, name: str, knobs: dict[str, KnobValue]) -> Plan:
    current_use = plan.get(name)
    return plan.with_use(make_use(name, (current_use.settings if current_use is not None else {}) | knobs))


def _changes(plan: Plan, parameters: int | None) -> Iterator[tuple[str, dict[str, KnobValue]]]:
    zero, fsdp = plan.get("zero"), plan.get("fsdp2")
    yield "activation-checkpointing", {"every": 1}
    if zero is not None:
        stage, bucket = int(zero.settings["stage"]), int(zero.settings["reduce_bucket_elements"])
        if parameters is not None and bucket > parameters:
            yield "zero", {"reduce_bucket_elements": parameters}
        if stage < 3:
            yield "zero", {"stage": stage + 1}
        if stage:
            yield "zero", {"precision": "bf16"}
    elif fsdp is not None:
        yield "fsdp2", {"precision": "bf16"}
        yield "fsdp2", {"reshard": True}
    else:
        yield "bf16-autocast", {}
    yield "gradient-accumulation", {"micro_batches": 2 * plan.micro_batches}
