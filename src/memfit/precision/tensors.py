"""Values with tensors inside, whatever holds them, and how far two tensors are apart."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

_FAR: Final = 1e4  # times the median: an additive mask, not part of the signal
_SAMPLE: Final = 1 << 20


def leaves(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in a fixed order, also inside dataclasses and plain objects such as rigid frames."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from leaves(item)
    elif _holds(value):
        for name in _fields(value):
            yield from leaves(getattr(value, name))


def rebuild(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """A copy with every tensor changed, in the order of `leaves`."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        made = copy.copy(value)
        for key, item in value.items():
            made[key] = rebuild(item, change)
        return made
    if isinstance(value, tuple | list):
        items = [rebuild(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if _holds(value):
        held = copy.copy(value)
        for name in _fields(value):
            object.__setattr__(held, name, rebuild(getattr(value, name), change))
        return held
    return value


def _holds(value: Any) -> bool:
    if isinstance(value, type | torch.nn.Module):
        return False
    return any(
        True for name in _fields(value) if isinstance(getattr(value, name), torch.Tensor | tuple | list)
    )


def _fields(value: Any) -> list[str]:
    if dataclasses.is_dataclass(value):
        return [f.name for f in dataclasses.fields(value)]
    return list(vars(value)) if hasattr(value, "__dict__") and not callable(value) else []


def is_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and not isinstance(tensor, torch.nn.parameter.UninitializedParameter)


@dataclasses.dataclass(slots=True)
class Gap:
    """``error``: root mean square of the difference over that of the reference; ``spread``: over the
    reference's standard deviation; ``lost``: not finite where the reference is."""

    error: float = 0.0
    spread: float = 0.0
    lost: bool = False

    def worst(self, other: Gap) -> Gap:
        return Gap(max(self.error, other.error), max(self.spread, other.spread), self.lost or other.lost)


def gap(reference: torch.Tensor, found: torch.Tensor, floor: float = 0.0) -> Gap:
    """``floor``: a reference below it counts as that, since nothing is accurate relative to zero."""
    want, got = reference.detach().double().flatten(), found.detach().double().flatten()
    if want.shape != got.shape:
        return Gap(1.0, 1.0, lost=True)
    finite = want.isfinite()
    if not finite.any():
        return Gap()
    lost = bool((finite & ~got.isfinite()).any())
    size = want[finite].abs()
    typical = size[size > 0]
    if not len(typical):
        return Gap(lost=lost, error=0.0 if not got[finite & got.isfinite()].any() else _ratio(got, floor))
    near = finite & got.isfinite() & (want.abs() <= _FAR * typical[:_SAMPLE].median())
    if not near.any():
        return Gap(lost=lost)
    error, kept = _rms(got[near] - want[near]), want[near]
    spread = _rms(kept - kept.mean())
    size_rms = max(_rms(kept), floor)
    spread = spread if spread > 1e-9 * size_rms and kept.numel() > 1 else size_rms
    return Gap(error / size_rms if size_rms else 0.0, error / spread if spread else 0.0, lost)


def _ratio(got: torch.Tensor, floor: float) -> float:
    return _rms(got[got.isfinite()]) / floor if floor else 0.0


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0
