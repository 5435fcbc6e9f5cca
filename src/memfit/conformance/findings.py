"""What a check reports: a part of the plan that it compared with the observations, or one that it could
not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
    """``feature`` was compared: the plan has ``planned``, the model has ``found``, both in words. ``wrong``:
    whether they differ."""

    feature: str
    planned: str
    found: str
    wrong: bool


@dataclasses.dataclass(frozen=True, slots=True)
class NotChecked:
    """``text`` names a part of the plan that was not checked, and the reason."""

    text: str


CheckFinding = Checked | NotChecked


def join_values(values: Iterable[Any]) -> str:
    """Return the values separated by commas, or "none" if there are no values."""
    return ", ".join(map(str, values)) or "none"
