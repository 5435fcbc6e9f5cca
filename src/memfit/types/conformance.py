"""What a prepared model does, beside what its plan says."""

from __future__ import annotations

import dataclasses

from memfit.types.errors import MemfitError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """``feature``: the technique, and what of it."""

    feature: str
    planned: str
    found: str

    def __str__(self) -> str:
        return f"{self.feature}: planned {self.planned}, found {self.found}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Conformance:
    """``checked``: what was looked at; ``unseen``: what the plan says and nobody could look at, with why."""

    differences: tuple[Difference, ...]
    checked: tuple[str, ...]
    unseen: tuple[str, ...]

    def __str__(self) -> str:
        told = "; ".join(map(str, self.differences)) or f"as planned ({', '.join(self.checked)})"
        return f"{told}; not seen: {'; '.join(self.unseen)}" if self.unseen else told


class NotConforming(MemfitError):
    """What was prepared is not what the plan says."""

    def __init__(self, found: Conformance) -> None:
        self.found = found
        told = "; ".join(str(d) for d in found.differences)
        super().__init__(f"the plan was not applied: {told}")
