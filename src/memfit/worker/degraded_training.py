"""Trainings that differ from a job's plain training on purpose: its negative controls, and its repetition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from memfit.techniques.optimizers import innermost
from memfit.types.errors import UserError

if TYPE_CHECKING:
    import torch

    from memfit.jobs.training_step import TrainingStep
    from memfit.types.job import Job

_LEVELS = 127  # of each sign in 8 bits


def degrade(step: TrainingStep, degraded: str) -> Callable[[], None]:
    """Change ``step`` before its first run as ``degraded`` says, and return a function to be called after
    each step. "tenth-learning-rate" divides all learning rates by 10; "last-bit" is `change_last_bits`;
    "eight-bit-weights" is `round_weights` after each step; anything else changes nothing. Raises UserError
    for "tenth-learning-rate" if the optimizer has no ``param_groups``, or one without "lr"."""
    if degraded == "tenth-learning-rate":
        groups = [g for inner in innermost(step.optimizer) for g in getattr(inner, "param_groups", [])]
        if not groups or any("lr" not in group for group in groups):
            raise UserError(
                "the negative control 'tenth-learning-rate' needs an optimizer with a learning rate, and the "
                f"job's {type(step.optimizer).__name__} has none",
                allowed="Job(negative_control=...) of 'half-steps' or 'eight-bit-weights'",
            )
        for group in groups:
            group["lr"] = group["lr"] / 10
    elif degraded == "last-bit":
        change_last_bits(step.model)
    elif degraded == "eight-bit-weights":
        return lambda: round_weights(step.model)
    return lambda: None


def change_last_bits(model: torch.nn.Module) -> None:
    """Move each number of the floating-point parameters up or down by one unit in its last place, or keep it,
    each with equal probability, the same in every run. The random numbers of training stay as they are."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point():
                direction = torch.randint(-1, 2, weight.shape, generator=generator).to(weight)
                target = torch.where(direction == 0, weight, direction * torch.inf)
                weight.copy_(torch.nextafter(weight, target))


def round_weights(model: torch.nn.Module) -> None:
    """Round each number of a floating-point parameter of ``model`` to 8 bits: to the nearest of 255 equally
    spaced numbers between minus and plus the largest absolute value of this parameter."""
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point() and weight.numel():
                spacing = weight.abs().amax().clamp_min(torch.finfo(weight.dtype).tiny) / _LEVELS
                weight.copy_((weight / spacing).round() * spacing)


def scores_by_endpoint(job: Job, scores: Any) -> Mapping[str, float]:
    """Return name -> value of the job's endpoints, the metric before its surrogates, from ``scores``, which
    its ``evaluate`` returned: a number (or tensor of one element), which is the metric, or a mapping, whose
    other entries are left out. Without a metric, the number's name is "". Return an empty mapping for None.
    Raises UserError if an endpoint is missing or is not a number, and for a mapping if the job has no
    metric."""
    if scores is None:
        return {}
    name = job.metric.name if job.metric is not None else ""
    values = dict(scores) if isinstance(scores, Mapping) else {name: scores}
    names = [endpoint.name for endpoint in job.endpoints] or [name]
    missing = [n for n in names if n not in values]
    if missing and job.metric is None:
        raise UserError(
            f"the job's evaluate returned {', '.join(values) or 'nothing'}, but the job has no metric",
            allowed="a number; or a mapping, for a job with Job(metric=...)",
        )
    if missing:
        raise UserError(
            f"the job's evaluate returned {', '.join(values) or 'nothing'}, but not {', '.join(missing)}",
            allowed="a mapping with the name of the metric and of each surrogate",
        )
    return {n: _number(n, values[n]) for n in names}


def _number(name: str, value: Any) -> float:
    try:
        if getattr(value, "numel", lambda: 1)() == 1:  # of a tensor
            return float(value)
    except (TypeError, ValueError):
        pass
    text, as_name = str(value)[:100], f" as {name}" if name else ""
    raise UserError(
        f"the job's evaluate returned {text!r}{as_name}, which is not a number",
        allowed="a number; or a mapping of names to numbers, for a job with Job(metric=...)",
    )
