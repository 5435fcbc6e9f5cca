"""A plan under construction, made of a configuration's settings, and what of them no plan can say."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from memfit.lint.models import DescribedModel
from memfit.techniques.registry import conflict, make_use
from memfit.types.errors import UserError
from memfit.types.plan import KnobValue, Plan


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """``option`` as the file writes it, with its value, and why the plan is without it."""

    option: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """``engine``: who would run it. ``micro_batch``: samples in a forward pass of one rank; ``batch``: in an
    optimizer step of all ranks; ``length``: tokens of a sample; None where the files leave them open.
    ``size``: of the built-in job that the files are about, "" where they are about no such."""

    plan: Plan
    engine: str
    micro_batch: int | None
    batch: int | None
    left_out: tuple[LeftOut, ...]
    size: str = ""
    length: int | None = None
    model: DescribedModel | None = None


@dataclasses.dataclass(kw_only=True)
class Draft:
    """A plan under construction: what clashes with what is there already is left out with the reason."""

    ranks: int
    plan: Plan = dataclasses.field(default_factory=Plan)
    left_out: list[LeftOut] = dataclasses.field(default_factory=list)
    micro_batch: int | None = None
    batch: int | None = None
    length: int | None = None
    size: str = ""
    model: DescribedModel | None = None

    def take(self, technique: str, option: str, **knobs: KnobValue) -> None:
        try:
            tried = self.plan.with_use(make_use(technique, knobs))
        except UserError as error:
            self.leave(option, str(error))
            return
        clash = conflict(tried)
        if clash:
            self.leave(option, f"in memfit {clash}")
        else:
            self.plan = tried

    def leave(self, option: str, reason: str) -> None:
        self.left_out.append(LeftOut(option=option, reason=reason))

    def accumulate(self, steps: int | None) -> None:
        if steps is not None and steps > 1:
            self.take("gradient-accumulation", f"{steps} accumulation steps", micro_batches=steps)

    def sized(self, data: int, steps: int | None) -> None:
        """The step's batch from the micro-batch, ``data`` ranks with other samples and ``steps`` of them."""
        if self.micro_batch is not None and self.batch is None:
            self.batch = self.micro_batch * data * (steps or 1)


def product(values: Iterable[int | None]) -> int:
    found = 1
    for value in values:
        found *= value or 1
    return found
