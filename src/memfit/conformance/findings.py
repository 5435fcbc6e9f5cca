"""What a check reports: a part of the plan that it compared with the observations, or one that it could
not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
    """A comparison that was made. ``feature`` names what was compared, for example "fsdp2: reshard".
    ``planned`` and ``found`` are texts: what the plan says, and what was observed. ``wrong``: whether they
    contradict each other."""

    feature: str
    planned: str
    found: str
    wrong: bool


@dataclasses.dataclass(frozen=True, slots=True)
class NotChecked:
    """A part of the plan that was not checked. ``text`` names it and the reason, for example "compile: no
    training step was observed"."""

    text: str


CheckFinding = Checked | NotChecked


def join_values(values: Iterable[Any]) -> str:
    """Return the values as text, separated by ", ", or "none" if there are no values."""
    return ", ".join(map(str, values)) or "none"
