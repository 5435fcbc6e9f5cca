"""Counts of steps that an optimizer keeps as tensors of one element, on which its update may branch: RAdam
adapts its step sizes from its sixth step on, ASGD averages after ``t0`` steps."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from memfit.trace.concrete_values import ConcreteValues

LATE_STEP: Final = 100_000
COUNTING: Final = frozenset(
    {
        torch.ops.aten.add_.Tensor,
        torch.ops.aten._foreach_add_.Scalar,
        torch.ops.aten._foreach_add_.List,
        torch.ops.aten._foreach_add_.Tensor,
    }
)


def count_from_late_step(concrete_values: ConcreteValues, args: Any) -> None:
    """Set each known tensor without dimensions that an operator of `COUNTING`, called with ``args``, has made
    1, as a count that begins, to `LATE_STEP` (100,000). The optimizer's update then takes the branches of a
    late step of the training, and not those of the first."""
    for tensor in args[0] if isinstance(args[0], list | tuple) else args[:1]:
        real = concrete_values.of(tensor)
        if real is not None and not real.dim():
            with torch.no_grad(), unset_fake_temporarily():
                real.masked_fill_(real == 1, LATE_STEP)
