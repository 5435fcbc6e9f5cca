"""Numbers of a training step, some of them tensors on a device, read without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from memfit.types.device_kind import HOST


def scalar_of(value: Any) -> float | torch.Tensor | None:
    """Return the number in a plain tensor or parameter of one element on the host; if it is on a device,
    ``value`` without its graph. Return None for anything else, also for a complex tensor, a tensor on the
    meta device, a fake tensor and one that is distributed over ranks."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.numel() != 1 or value.is_complex():
        return None
    if value.is_cpu:
        return float(value.item())
    return None if value.is_meta else value.detach()


def split_scalars(values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Return the numbers among ``values`` and those in tensors of one element on the host, and the tensors of
    one element that a device has to copy first. Anything else is left out."""
    now: dict[str, float] = {}
    later: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        scalar = value if isinstance(value, int | float) else scalar_of(value)
        if isinstance(scalar, torch.Tensor):
            later[name] = scalar
        elif scalar is not None:
            now[name] = float(scalar)
    return now, later


class PendingScalars:
    """Numbers of a step that a device copies to the host while the training goes on. ``tensors``: one at
    least, all on one device."""

    def __init__(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        self.step = step
        self._copies = {name: t.to(HOST, non_blocking=True) for name, t in tensors.items()}
        self._event = torch.Event(next(iter(tensors.values())).device)
        self._event.record()

    def is_ready(self) -> bool:
        """Return whether the copies are complete, without waiting for them."""
        return bool(self._event.query())

    def values(self) -> dict[str, float]:
        """Wait until the copies are complete and return the numbers."""
        self._event.synchronize()
        return {name: float(t) for name, t in self._copies.items()}
