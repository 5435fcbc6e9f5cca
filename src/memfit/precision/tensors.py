"""Find and replace tensors inside nested values, and measure the difference of two tensors."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

_FAR: Final = 1e4  # times the median: values beyond it belong to an additive mask, not to the signal
_SAMPLE: Final = 1 << 14  # number of elements that is enough for a mean


def leaves(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a value in a fixed order, depth first: in dicts, tuples and lists, and in
    dataclasses and plain objects that have a tensor, tuple or list as attribute, such as rigid frames. A
    tensor that occurs twice is yielded twice. Modules and classes are not searched."""
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
    """Return a copy of the value with ``change(tensor)`` in place of every tensor, called in the order of
    `leaves`. Parts of the value that contain no tensors may be shared with it."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        mapping = copy.copy(value)
        for key, item in value.items():
            mapping[key] = rebuild(item, change)
        return mapping
    if isinstance(value, tuple | list):
        items = [rebuild(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if _holds(value):
        clone = copy.copy(value)
        for name in _fields(value):
            object.__setattr__(clone, name, rebuild(getattr(value, name), change))
        return clone
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
    """Return whether the tensor is floating-point, and not a parameter of a lazy module that has no shape
    yet."""
    return tensor.is_floating_point() and not isinstance(tensor, torch.nn.parameter.UninitializedParameter)


def all_finite(tensor: torch.Tensor) -> bool:
    """Return whether all elements are finite.

    Their sum is tested first, because that is much faster. If the sum is not finite, each element is tested,
    because the sum may overflow although all elements are finite.
    """
    total = tensor.detach().sum(dtype=torch.float32 if tensor.itemsize < 4 else None)
    return math.isfinite(float(total)) or bool(tensor.isfinite().all())


@dataclasses.dataclass(slots=True)
class Gap:
    """Difference of a tensor from a reference.

    ``error``: root mean square of the difference over that of the reference. ``spread``: root mean square of
    the difference over the reference's standard deviation, or ``error`` if all its elements are equal.
    ``lost``: whether the tensor is not finite somewhere where the reference is, or has another number of
    elements."""

    error: float = 0.0
    spread: float = 0.0
    lost: bool = False

    def worst(self, other: Gap) -> Gap:
        """Return a `Gap` with the larger ``error`` and the larger ``spread`` of the two, which is lost if one
        of them is."""
        return Gap(max(self.error, other.error), max(self.spread, other.spread), self.lost or other.lost)


def gap(reference: torch.Tensor, tensor: torch.Tensor, floor: float = 0.0, *, trim: bool = False) -> Gap:
    """Return the difference of ``tensor`` from ``reference``. ``error`` and ``spread`` are those of all
    elements or, if there are 2**15 or more, of a regular sample of at least 2**13 of them. ``lost`` is that
    of all elements.

    Elements that are not finite in one of the two are left out. So are those whose absolute value in the
    reference is above 10**4 times the median there of those that are not zero, as in an additive mask.
    ``floor``: lower bound of the reference's root mean square in ``error``, because nothing is accurate
    relative to zero. ``trim`` leaves out the worst 1 % if there are at least 100 elements: values near a
    kink, as of a ReLU, may fall on its other side. Without a ``floor``, both errors are 0 if the reference is
    zero everywhere. If the numbers of elements differ, both errors are 1, and ``lost`` is True."""
    reference_values, values = reference.detach().flatten(), tensor.detach().flatten()
    if reference_values.shape != values.shape:
        return Gap(1.0, 1.0, lost=True)
    lost = not all_finite(values) and bool((reference_values.isfinite() & ~values.isfinite()).any())
    step = max(1, reference_values.numel() // _SAMPLE) | 1  # odd, so that no channel is left out
    reference_values, values = reference_values[::step].double(), values[::step].double()
    mask = reference_values.isfinite() & values.isfinite()
    reference_values, values = reference_values[mask], values[mask]
    magnitude = reference_values.abs()
    if bool((positive := magnitude > 0).any()):
        mask = magnitude <= _FAR * magnitude[positive].median()
        reference_values, values = reference_values[mask], values[mask]
    differences = (values - reference_values).abs()
    if trim and differences.numel() >= 100:
        differences = differences[differences <= differences.kthvalue(differences.numel() * 99 // 100).values]
    error, rms = _rms(differences), max(_rms(reference_values), floor)
    spread = _rms(reference_values - reference_values.mean()) if reference_values.numel() > 1 else 0.0
    if spread <= 1e-9 * rms:
        spread = rms
    return Gap(error / rms if rms else 0.0, error / spread if spread else 0.0, lost)


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0
