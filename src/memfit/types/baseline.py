"""Baseline: predicted peaks of memory that a project commits, so that a later prediction can be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Final

ROOT: Final = "(model)"  # the module that is the model itself
OTHERS: Final = "(others)"  # all modules that hold less than 1 % of the peak
PLAIN: Final = "plain"  # training without any technique
_STRICT: Final = {"extra": "forbid"}  # pydantic refuses unknown keys


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModuleMemory:
    """Bytes of the tensors that one line of the user's code makes in one module. Lines of one file with the
    same text count as one.

    ``module``: dotted path, with a star for the number of one of several alike blocks; "(model)", the model
    itself; or "(others)", all modules that hold less than 1 % of the peak.
    ``line``: one of these lines, such as "src/model.py:12", relative to the baseline's folder; ``code``: its
    text; both "" if no line is known. ``state_bytes``: parameters, gradients, optimizer state, weight
    averages and inputs, which count under one line of the module: their highest sum at the peaks of the three
    phases. ``forward_bytes``, ``backward_bytes``, ``optimizer_bytes``: all other tensors that are alive at
    the peak of that phase.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _STRICT

    module: str
    line: str = ""
    code: str = ""
    state_bytes: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0
    optimizer_bytes: int = 0

    @property
    def file(self) -> str:
        """The file of ``line``, "" if no line is known."""
        return self.line.rpartition(":")[0]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockMemory:
    """What the same module of several alike blocks holds in each of them, by the columns of `ModuleMemory`:
    the bytes of each block with at least 1 % of the peak, largest first. Which block it is does not count, as
    the peak may move from one to another. ``module``: its path with a star for the number of the block."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = _STRICT

    module: str
    state_bytes: tuple[int, ...] = ()
    forward_bytes: tuple[int, ...] = ()
    backward_bytes: tuple[int, ...] = ()
    optimizer_bytes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BaselineTarget:
    """What is predicted for a baseline: one job, or the model of one test, under one plan on one machine.

    ``job``: as on the command line, with the path relative to the baseline's folder; of a test its name.
    ``size``, ``batch``, ``length``: as on the command line, None if not given. ``plan``: "plain", the path of
    a plan file relative to the baseline's folder, or the name of a technique. ``machine``: name of the
    catalog, or the path of a machine file relative to the baseline's folder.
    """

    job: str
    size: str | None = None
    batch: int | None = None
    length: int | None = None
    plan: str = PLAIN
    machine: str

    @property
    def key(self) -> tuple[str, str, int, int, str, str]:
        """All fields as a tuple that can be sorted; equal for equal targets. None is "" or 0 there."""
        return self.job, self.size or "", self.batch or 0, self.length or 0, self.plan, self.machine

    @property
    def title(self) -> str:
        """The job with its size, batch and length, the plan and the machine, for messages."""
        options = (("size", self.size), ("batch", self.batch), ("length", self.length))
        words = [self.job, *(f"{name} {value}" for name, value in options if value is not None)]
        return f"{' '.join(words)}, {self.plan}, {self.machine}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBaseline(BaselineTarget):
    """The predicted peaks of a target.

    ``plan_label``: techniques and settings of the plan. ``memfit`` and ``torch``: the versions that
    predicted. ``reserved_bytes``: by the caching allocator; None if the device has none, or if memfit cannot
    predict it. ``phase_bytes``: peak of live tensors in each phase. ``category_bytes``: what is alive at the
    highest of them.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _STRICT

    plan_label: str
    memfit: str
    torch: str
    parameter_count: int
    allocated_bytes: int
    reserved_bytes: int | None = None
    peak_phase: str
    phase_bytes: Mapping[str, int]
    category_bytes: Mapping[str, int]
    modules: tuple[ModuleMemory, ...] = ()
    blocks: tuple[BlockMemory, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BaselineFile:
    """The content of a baseline file: predictions of jobs, which `memfit baseline` writes and checks, and of
    tests, which the fixture ``memfit_memory`` of pytest writes and checks. ``format``: version of the file
    format."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = _STRICT

    format: str = "1"
    jobs: tuple[MemoryBaseline, ...] = ()
    tests: tuple[MemoryBaseline, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModuleGrowth:
    """A module that holds more bytes than in the baseline, and the line of its code that grew most; "" if no
    line is known. ``new``: the baseline does not name the module. ``single``: the bytes are those of one of
    several alike blocks."""

    module: str
    line: str
    from_bytes: int
    to_bytes: int
    new: bool = False
    single: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryDrift:
    """Memory that is higher than in the baseline by more than the tolerance: the peak of a phase, reserved
    memory, or what one module holds at the peak of a phase.

    ``phase``: phase of the step, "states" (what `ModuleMemory.state_bytes` counts) or "reserved" (by the
    caching allocator). ``whole``: whether the bytes are those of the whole model, not of the one module
    in ``modules``. ``modules``: those that grew, the largest growth first, at most five.
    """

    phase: str
    whole: bool
    from_bytes: int
    to_bytes: int
    modules: tuple[ModuleGrowth, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BaselineComparison:
    """The comparison of a prediction with the baseline. ``drifts``: what grew by more than the tolerance;
    empty if nothing did. ``notes``: what else differs, one sentence each. ``fell``: whether the peak of a
    phase is lower than in the baseline by more than the tolerance."""

    title: str
    drifts: tuple[MemoryDrift, ...]
    notes: tuple[str, ...] = ()
    fell: bool = False
