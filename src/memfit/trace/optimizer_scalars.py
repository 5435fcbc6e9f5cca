"""Values of an optimizer's tensors of one element, such as its count of steps, on which its update may
branch: RAdam adapts its step sizes from about the sixth step on, ASGD averages after ``t0`` steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from memfit.trace.concrete_values import ConcreteValues

LATE_STEP: Final = 100_000
_COUNTING: Final = frozenset(
    {
        torch.ops.aten.add_.Tensor,
        torch.ops.aten._foreach_add_.Scalar,
        torch.ops.aten._foreach_add_.List,
        torch.ops.aten._foreach_add_.Tensor,
    }
)


class OptimizerScalars(ConcreteValues):
    """Follow tensors of one element that an optimizer makes from Python numbers.

    A count that an addition in place takes from 0 to 1 becomes `LATE_STEP`, so that the update takes the
    branches of a late step of the training and not those of the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.max_elements = 1

    def values(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Return the operator's result on known values, None if values are missing, as in the base class."""
        result = super().values(func, args, kwargs)
        if func in _COUNTING:
            for tensor in args[0] if isinstance(args[0], list | tuple) else args[:1]:
                real = self.of(tensor)
                if real is not None and not real.dim():
                    with torch.no_grad(), unset_fake_temporarily():
                        real.masked_fill_(real == 1, LATE_STEP)
        return result
