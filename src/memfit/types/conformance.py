"""How a prepared model compares with its plan."""

from __future__ import annotations

import dataclasses

from memfit.types.errors import MemfitError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One deviation of a prepared model from its plan. ``feature``: the technique and the aspect of it that
    differs; ``planned`` and ``found``: texts that say what the plan and the model have there.
    """

    feature: str
    planned: str
    found: str

    def __str__(self) -> str:
        return f"{self.feature}: planned {self.planned}, found {self.found}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Conformance:
    """The result of a check of a prepared model against its plan.

    ``differences``: empty if none was found. ``checked``: names of what was checked. ``unseen``: texts that
    name what the plan states but could not be checked, with the reason.
    """

    differences: tuple[Difference, ...]
    checked: tuple[str, ...]
    unseen: tuple[str, ...]

    def __str__(self) -> str:
        text = "; ".join(map(str, self.differences)) or f"as planned ({', '.join(self.checked)})"
        return f"{text}; not checked: {'; '.join(self.unseen)}" if self.unseen else text


class NotConforming(MemfitError):
    """Raised if a prepared model differs from its plan; the message lists the differences. ``found``: the
    result of the check, with at least one difference.
    """

    def __init__(self, conformance: Conformance) -> None:
        self.found = conformance
        differences = "; ".join(str(d) for d in conformance.differences)
        super().__init__(f"the plan was not applied: {differences}")
