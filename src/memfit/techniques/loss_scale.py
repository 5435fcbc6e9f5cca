"""The scale of the loss under fp16."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, section 3.2): small gradients would be zero in float16,
    so the loss is multiplied before backward and gradients are divided after it. A step whose gradients
    overflow is left out and the scale halved; it doubles after ``patience`` good ones. Both numbers lie in
    the optimizer's groups, so that checkpoints keep them."""

    first, patience = 65536.0, 2000  # those of torch.amp.GradScaler

    def keep_in(self, optimizer: Any) -> None:
        self.groups = optimizer.param_groups
        for group in self.groups:
            group.setdefault("loss_scale", self.first)
            group.setdefault("good_steps", 0)

    @property
    def value(self) -> float:
        return float(self.groups[0]["loss_scale"])

    def unscaled(self, norm: torch.Tensor, params: list[torch.nn.Parameter]) -> bool:
        """Divides the gradients by the scale, and the norm, which all ranks share; False where they
        overflowed and the step is to be left out."""
        import torch

        finite = math.isfinite(float(norm))
        scale, good = self.value, int(self.groups[0]["good_steps"])
        if finite:
            norm.div_(scale)
            torch._foreach_mul_([p.grad for p in params if p.grad is not None], 1 / scale)
            good = (good + 1) % self.patience
            new = scale * (1 if good else 2)
        else:
            new, good = max(1.0, scale / 2), 0
        for group in self.groups:
            group["loss_scale"], group["good_steps"] = new, good
        return finite or scale <= 1  # nothing is left to halve: the loss itself is not finite
