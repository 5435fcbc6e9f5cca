"""Dynamic scaling of the loss, so that gradients do not underflow in float16."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, section 3.2).

    Small gradients would underflow in float16, so the loss is multiplied by a scale before backward, and
    gradients are divided by it afterwards. If the norm of the gradients is not finite, the step is skipped
    and the scale is halved; a scale of 1 stays 1, and the step is then not skipped. The scale doubles after
    ``patience`` finite steps in a row. The scale, which begins at ``first``, and the number of such steps are
    in the optimizer's ``param_groups``, so that checkpoints save them.
    """

    first, patience = 65536.0, 2000  # the values of torch.amp.GradScaler
    growth, backoff, least = 2.0, 0.5, 1.0

    def keep_in(self, optimizer: Any) -> None:
        """Keep the scale and the number of finite steps in ``optimizer.param_groups`` from now on, as
        "loss_scale" and "good_steps". Values that are there already, as from a checkpoint, are used."""
        self.groups = optimizer.param_groups
        for group in self.groups:
            group.setdefault("loss_scale", self.first)
            group.setdefault("good_steps", 0)

    @property
    def value(self) -> float:
        """The present scale. It can be read after `keep_in` has been called."""
        return float(self.groups[0]["loss_scale"])

    @property
    def good_steps(self) -> int:
        """The number of finite steps in a row. It can be read after `keep_in` has been called."""
        return int(self.groups[0]["good_steps"])

    def set(self, value: float, good_steps: int) -> None:
        """Change the scale and the number of finite steps in a row, after `keep_in` has been called."""
        for group in self.groups:
            group["loss_scale"], group["good_steps"] = value, good_steps

    def unscale(self, norm: torch.Tensor, params: list[torch.nn.Parameter]) -> bool:
        """If ``norm`` is finite, divide it and the gradients of ``params`` by the scale, in place. In any
        case adjust the scale afterwards. Return whether the step may be taken: False if the norm is not
        finite and the scale was above ``least``. ``norm`` is that of the scaled gradients, the same on all
        ranks."""
        import torch

        finite = math.isfinite(float(norm))
        scale, good_steps = self.value, self.good_steps
        if finite:
            norm.div_(scale)
            torch._foreach_mul_([p.grad for p in params if p.grad is not None], 1 / scale)
            good_steps = (good_steps + 1) % self.patience
            self.set(scale * (1 if good_steps else self.growth), good_steps)
        else:
            self.set(max(self.least, scale * self.backoff), 0)
        return finite or scale <= self.least  # it cannot be smaller: the loss itself is not finite


class GradScalerScale(LossScale):
    """The loss scale of a user's ``torch.amp.GradScaler``, which keeps the scale and says how it changes.

    A step with gradients that are not finite is always skipped, as ``GradScaler.step`` does. The number of
    finite steps in a row is kept here, and is not in the scaler's ``state_dict``.
    """

    least = 0.0

    def __init__(self, scaler: torch.amp.GradScaler, device: torch.device) -> None:
        import torch

        self.scaler, self._good_steps = scaler, 0
        self.growth, self.backoff = scaler.get_growth_factor(), scaler.get_backoff_factor()
        self.patience = scaler.get_growth_interval()
        scaler.scale(torch.zeros((), device=device))  # lets it make its tensors, which `update` needs

    def keep_in(self, optimizer: Any) -> None:
        """Do nothing: the scaler keeps the scale."""

    @property
    def value(self) -> float:
        return float(self.scaler.get_scale())

    @property
    def good_steps(self) -> int:
        return self._good_steps

    def set(self, value: float, good_steps: int) -> None:
        self.scaler.update(value)
        self._good_steps = good_steps
