"""The tables and series of the report as plain data: figures with their provenance, no words, no markup."""

from __future__ import annotations

import dataclasses

from memfit.report.case import CaseView
from memfit.report.quantities import Figure, Mark, Sentence
from memfit.types.result import Poc


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One run. ``peak_error`` and ``step_error``: predicted minus measured, in % of the measured value;
    ``process_peak``: memory of the process above that at its start; ``overhead``: its ratio to ``peak``."""

    name: str
    role: str
    plan: str
    seed: int
    capped: bool
    outcome: str
    reason: str
    predicted_peak: Figure
    peak: Figure
    peak_error: Figure
    predicted_step: Figure
    step: Figure
    step_error: Figure
    metric: Figure
    process_peak: Figure
    overhead: Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRow:
    """Predicted and measured peak of one phase of a plan. ``error``: predicted minus measured, in % of the
    measured value."""

    role: str
    plan: str
    phase: str
    predicted: Figure
    measured: Figure
    error: Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One plan that was run, over all its completed runs. ``share``: its peak in % of plain training's."""

    role: str
    plan: str
    predicted_peak: Figure
    peak: Figure
    share: Figure
    predicted_step: Figure
    step: Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResourceRow:
    """What one run of ``steps`` steps takes: the figure of one step times the number of steps, but the energy
    of a whole run if it was measured. ``boundary``: what the energy includes."""

    role: str
    plan: str
    steps: Figure
    time: Figure
    energy: Figure
    boundary: str
    money: Figure
    carbon: Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Live bytes over one step, from its start to its end, measured or predicted."""

    role: str
    mark: Mark
    values: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LossCurve:
    """Loss per step of one run."""

    role: str
    seed: int
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRow:
    """A plan of the search.

    ``low`` and ``high``: range of its peak. ``needed``: bytes compared with the memory. ``device``: low,
    expected and high bytes on the device; None if they are not predicted, as on a CPU. ``traced``: traced as
    a whole, not estimated from traces of parts. ``reasons``: why techniques are in it or were left out.
    """

    plan: str
    effect: str
    fits: bool
    recommended: bool
    traced: bool
    peak: Figure
    low: Figure
    high: Figure
    needed: Figure
    device: tuple[Figure, Figure, Figure] | None
    step: Figure
    reasons: tuple[Sentence, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VerdictRow:
    """A verdict.

    ``low`` and ``high``: interval of the ``difference``, in the metric's unit; ``in_margins`` has the same in
    units of the margin, for drawing, None if they are unknown.
    """

    name: str
    plan: str
    kind: str
    effect: str
    test: Sentence | str
    why: Sentence | str  # a text if the record is of an older version
    metric: str
    difference: Figure
    low: Figure
    high: Figure
    margin: Figure
    pairs: Figure
    power: Figure
    in_margins: tuple[float, float, float] | None  # low, difference, high


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InteractionTable:
    """A 2 x 2 table of two techniques and their interaction."""

    first: str
    second: str
    quantity: str
    neither: Figure
    first_only: Figure
    second_only: Figure
    both: Figure
    interaction: Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PaperSide:
    """One plan at paper size on one machine of the catalog. Energy, money and carbon are those of 1,000
    steps; ``boundary``: what the energy includes."""

    plan: str
    fits: bool
    peak: Figure
    step: Figure
    energy: Figure
    boundary: str
    money: Figure
    carbon: Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PaperView:
    """The job at paper size on one machine, plain and recommended."""

    machine: str
    size: str
    memory: Figure
    plain: PaperSide
    recommended: PaperSide | None
    note: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LargestSizeRow:
    """The largest size that fits one machine, with plain training (``plain``) and with the smallest allowed
    plan (``recommended``). ``factor``: the second over the first."""

    machine: str
    quantity: str
    plain: Figure
    plain_label: str
    recommended: Figure
    recommended_label: str
    factor: Figure
    at_limit: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SearchView:
    """A search result as rows. ``sensitivity``: what changes of the machine would bring."""

    goal: str
    considered: Figure
    cap: Figure
    baseline: ChoiceRow
    frontier: tuple[ChoiceRow, ...]
    recommended: ChoiceRow | None
    smallest: ChoiceRow
    sensitivity: tuple[Sentence, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EstimateView:
    """What the peak consists of: (name, bytes, % of the peak), largest first. ``phases``: peak of each phase,
    in order; ``device_parts``: memory held on the device, in % of its sum."""

    plan: str
    peak: Figure
    low: Figure
    high: Figure
    step: Figure
    flops: Figure
    peak_phase: str
    peak_op: str
    categories: tuple[tuple[str, Figure, Figure], ...]
    phases: tuple[tuple[str, Figure, Figure], ...]
    modules: tuple[tuple[str, Figure, Figure], ...]
    further: tuple[tuple[str, Figure, Figure, Figure], ...] = ()  # (kind of memory, value, low, high)
    device_parts: tuple[tuple[str, Figure, Figure], ...] = ()
    oom: Figure | None = None  # % chance that it does not fit


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PocView:
    """Everything that the report of a PoC shows."""

    poc: Poc
    answer: tuple[Sentence, ...]
    cap: Figure
    runs: tuple[RunRow, ...]
    phases: tuple[tuple[PhaseRow, ...], ...]
    timelines: tuple[Timeline, ...]
    ladder: tuple[PlanRow, ...]
    search: SearchView
    interactions: tuple[InteractionTable, ...]
    losses: tuple[LossCurve, ...]
    naive: Figure
    verdicts: tuple[VerdictRow, ...]
    resources: tuple[ResourceRow, ...]
    paper: tuple[PaperView, ...]
    reach: tuple[LargestSizeRow, ...]
    case: CaseView | None = None  # published sizes of the job, recorded beforehand
