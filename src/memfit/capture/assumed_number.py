"""A number that a script reads and that is not known, such as ``loss.item()``: it notes if it is compared."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_COMPARED = ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "__bool__")
_COMPUTED = (
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__"),
    *("__pow__", "__rpow__", "__neg__", "__abs__", "__round__"),
)


class AssumedNumber(float):
    """A number that stands for one that is not known, and what Python's arithmetic makes of it. When the
    script compares it, ``on_compared`` is called. Copies of it are plain numbers."""

    on_compared: Callable[[], None]
    __hash__ = float.__hash__

    def __new__(cls, value: float, on_compared: Callable[[], None]) -> AssumedNumber:
        number = super().__new__(cls, value)
        number.on_compared = on_compared
        return number

    def __reduce__(self) -> Any:
        return float, (float(self),)


def _compared(name: str) -> Any:
    inner = getattr(float, name)

    @functools.wraps(inner)
    def compare(self: AssumedNumber, *other: Any) -> Any:
        self.on_compared()
        return inner(self, *other)

    return compare


def _computed(name: str) -> Any:
    inner = getattr(float, name)

    @functools.wraps(inner)
    def compute(self: AssumedNumber, *other: Any) -> Any:
        result = inner(self, *other)
        return AssumedNumber(result, self.on_compared) if isinstance(result, float) else result

    return compute


for _name in _COMPARED:
    setattr(AssumedNumber, _name, _compared(_name))
for _name in _COMPUTED:
    setattr(AssumedNumber, _name, _computed(_name))
