"""Build a plan from a configuration's settings, and record the settings that no plan can express."""

from __future__ import annotations

import dataclasses

from memfit.lint.models import DescribedModel
from memfit.techniques.registry import conflict, make_use
from memfit.types.errors import UserError
from memfit.types.plan import KnobValue, Plan


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A setting that the plan leaves out. ``option``: the setting with its value, such as "optim lomo"; the
    names of several settings, separated by ", "; or words for it, such as "selective recomputation".
    ``reason``: why it is left out, or what is predicted in its place."""

    option: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A set-up converted to a plan. ``plan``: its techniques and its number of ranks; ``engine``: the name of
    memfit's engine that would run it: "native", "deepspeed", "accelerate" or "megatron". ``micro_batch``:
    samples per forward pass of one rank; ``batch``: samples per optimizer step of all ranks; ``length``:
    tokens per sample. Each of the three is None if the files do not determine it. ``left_out``: the settings
    that the plan leaves out; ``size``: the size of the built-in job alphafold2 that OpenFold's settings
    describe, "" for other files or if no size does; ``model``: the model that the settings describe or name,
    None if they describe none; ``carried``: dotted names of the options that are in the plan or the job,
    empty for files of OpenFold, Megatron-LM and torchtitan; ``ema``: the decay of the average of weights that
    the files ask for, None if they ask for none."""

    plan: Plan
    engine: str
    micro_batch: int | None
    batch: int | None
    left_out: tuple[LeftOut, ...]
    size: str = ""
    length: int | None = None
    model: DescribedModel | None = None
    carried: tuple[str, ...] = ()
    ema: float | None = None


@dataclasses.dataclass(kw_only=True)
class Draft:
    """A plan under construction, for ``ranks`` processes; ``plan.ranks`` is not used. take() does not add a
    technique that conflicts with those already in the plan: it lists the setting that asks for it in
    ``left_out``, with the reason. The other fields are as in Conversion, where None and "" stand for what the
    files do not say."""

    ranks: int
    plan: Plan = dataclasses.field(default_factory=Plan)
    left_out: list[LeftOut] = dataclasses.field(default_factory=list)
    micro_batch: int | None = None
    batch: int | None = None
    length: int | None = None
    size: str = ""
    model: DescribedModel | None = None
    carried: list[str] = dataclasses.field(default_factory=list)
    ema: float | None = None

    def take(self, technique: str, option: str, **knobs: KnobValue) -> None:
        """Add the technique named ``technique``, with the settings ``knobs``, to the plan; it replaces an
        earlier use of the same technique. ``option``: the setting of the file that asks for it. If memfit has
        no such technique, if a setting is invalid, or if the technique conflicts with others in the plan, add
        ``option`` to ``left_out`` with that reason, and leave the plan as it is."""
        try:
            new_plan = self.plan.with_use(make_use(technique, knobs))
        except UserError as error:
            self.leave(option, str(error))
            return
        conflict_reason = conflict(new_plan)
        if conflict_reason:
            self.leave(option, f"in memfit {conflict_reason}")
        else:
            self.plan = new_plan

    def leave(self, option: str, reason: str) -> None:
        """Add ``option``, a setting of the file, to ``left_out`` with ``reason``."""
        self.left_out.append(LeftOut(option=option, reason=reason))

    def drop(self, technique: str) -> None:
        """Remove the technique named ``technique`` from the plan, if it is there."""
        self.plan = self.plan.without(technique)

    def accumulate(self, steps: int | None) -> None:
        """Add gradient accumulation over ``steps`` micro-batches to the plan if ``steps`` is above 1; for 1
        and None, add nothing."""
        if steps is not None and steps > 1:
            self.take("gradient-accumulation", f"{steps} accumulation steps", micro_batches=steps)

    def set_batch(self, data: int, steps: int | None) -> None:
        """Set ``batch`` to micro-batch x ``data`` x ``steps``, unless it is already set or the micro-batch is
        unknown. ``data``: the number of ranks that see different samples; ``steps``: the number of
        accumulation steps (None: 1)."""
        if self.micro_batch is not None and self.batch is None:
            self.batch = self.micro_batch * data * (steps or 1)
