"""The tables and series of the report as plain data: figures with their provenance, no words, no markup."""

from __future__ import annotations

import dataclasses

from memfit.report.case import CaseView
from memfit.report.quantities import Figure, Mark, Sentence
from memfit.types.result import Poc


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One run.

    ``predicted_peak``, ``peak`` and ``peak_error``: predicted and measured peak of live tensors, and
    predicted minus measured in % of measured; the same for ``step``, the median step time. Measured peak,
    step and metric are unknown if the run did not complete. ``capped``: whether it ran under the memory cap.
    ``outcome``: ok, oom, timeout, interrupted or failed; ``reason``: what happened if it is not ok.
    ``process_peak``: how much memory the process took more than at its start; ``overhead``: ``process_peak``
    / ``peak``.
    """

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
    """Predicted and measured peak of live tensors in one phase (such as "forward") of one plan. ``error``:
    predicted minus measured, in % of measured."""

    role: str
    plan: str
    phase: str
    predicted: Figure
    measured: Figure
    error: Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One plan that was run, over all its runs. ``role``: baseline, ablation or recommended. ``peak``: the
    largest of its completed runs; ``step``: the median of their step times; ``share``: its peak in % of that
    of plain training."""

    role: str
    plan: str
    predicted_peak: Figure
    peak: Figure
    share: Figure
    predicted_step: Figure
    step: Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResourceRow:
    """What one run of ``steps`` optimizer steps takes.

    ``time``: measured step time times ``steps``; predicted if none was measured. ``energy``: measured for
    whole runs, or predicted for one step times ``steps``; ``boundary``: what it includes. ``money`` and
    ``carbon`` (grams of CO2): predicted for one step times ``steps``.
    """

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
    """Bytes of live tensors over one step: ``values`` at equal distances from its start to its end. ``mark``:
    measured or predicted."""

    role: str
    mark: Mark
    values: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LossCurve:
    """The loss of each step of one run, in order."""

    role: str
    seed: int
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRow:
    """A plan of the search, as predicted.

    ``effect``: class of its effect on results, "E0" to "E3". ``peak``, ``low`` and ``high``: peak of live
    tensors and its range. ``host_short``: it does not fit, because the host has too little memory; the device
    may have enough. ``needed``: bytes that were compared with the cap. ``device``: low end, value and
    high end of the memory held on the device; None if that is not predicted, as on a CPU. ``traced``: True if
    the plan was traced as a whole, False if it was estimated from traces of parts. ``reasons``: why each
    technique is in the plan or was left out.
    """

    plan: str
    effect: str
    fits: bool
    host_short: bool
    recommended: bool
    traced: bool
    peak: Figure
    low: Figure
    high: Figure
    needed: Figure
    device: tuple[Figure, Figure, Figure] | None
    step: Figure
    reasons: tuple[Sentence, ...]

    @property
    def verdict(self) -> str:
        """Key, in the section "text" of the word catalogs, of the text that says whether the plan fits:
        "fits", "host_too_small" or "does_not_fit"."""
        return "fits" if self.fits else "host_too_small" if self.host_short else "does_not_fit"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VerdictRow:
    """A verdict: whether a plan's results are equivalent to those of plain training.

    ``kind``: equivalent, different, undecided or not_sensitive. ``difference``: of the metric, in its unit,
    with the interval ``low`` to ``high``; results within the ``margin`` count as equivalent. ``power``:
    probability in % of showing equivalence if there is no difference. ``in_margins``:
    low, difference and high divided by the margin, for drawing; None if one of them is unknown or the margin
    is unknown or 0. ``notes``: on the endpoints beside the metric, and whether the test would have noticed
    the negative control.
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
    notes: tuple[Sentence, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InteractionTable:
    """A measured quantity ("peak_bytes", "step_s" or "metric") without two techniques, with each of them
    alone, and with both. ``interaction``: both - first_only - second_only + neither; 0 means that the effects
    add up."""

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
    """The prediction for one plan at paper size on one machine of the catalog. ``step``: time of one step.
    Energy, money and carbon (grams of CO2) are those of 1,000 steps; ``boundary``: what the energy includes.
    """

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
    """Predictions for the job at paper size on one machine: with plain training, and with the best plan that
    fits (``recommended``; None if none fits). ``memory``: that of the device."""

    machine: str
    size: str
    memory: Figure
    plain: PaperSide
    recommended: PaperSide | None
    note: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LargestSizeRow:
    """The largest size of the job that fits one machine: with plain training (``plain``), and with the
    allowed plan that needs the least memory (``recommended``); unknown if no size that was tried fits.
    ``factor``: recommended / plain.

    ``quantity``: "parameters" or "length", what the two numbers count. ``plain_label`` and
    ``recommended_label``: names of these sizes. ``at_limit``: the largest size that was tried fits with the
    plan of ``recommended``, so larger ones may fit too.
    """

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
    """The result of a search as rows.

    ``considered``: number of plans that were predicted. ``frontier``: by increasing peak, the plans that fit
    and that no other plan beats in peak, time and effect on results at once, and plain training, the smallest
    and the recommended plan. ``recommended``: None if no plan fits. ``smallest``: the plan with the lowest
    peak. ``sensitivity``: what changes of the machine would bring, such as more memory. ``extent``: how far
    the search got, and how much better a plan could still be; empty if that was not recorded.
    """

    goal: str
    considered: Figure
    cap: Figure
    baseline: ChoiceRow
    frontier: tuple[ChoiceRow, ...]
    recommended: ChoiceRow | None
    smallest: ChoiceRow
    sensitivity: tuple[Sentence, ...] = ()
    extent: tuple[Sentence, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EstimateView:
    """The prediction for one plan.

    ``categories``, ``modules``: what the peak of live tensors consists of, (name, bytes, % of the peak),
    largest first. ``phases``: (name, peak in this phase, % of the peak), in the order of the step.
    ``device_parts``: what the device holds, (name, bytes, % of the sum of these parts): "reserved" by the
    caching allocator, then what is outside it, such as "context". Empty if the device has no such parts, as a
    CPU.
    """

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
    """Everything that the report of a PoC shows, its decision part aside. ``plans``: one row for each plan
    that was run. ``naive``: the metric of a naive rule, for comparison."""

    poc: Poc
    answer: tuple[Sentence, ...]
    cap: Figure
    runs: tuple[RunRow, ...]
    phases: tuple[tuple[PhaseRow, ...], ...]
    timelines: tuple[Timeline, ...]
    plans: tuple[PlanRow, ...]
    search: SearchView
    interactions: tuple[InteractionTable, ...]
    losses: tuple[LossCurve, ...]
    naive: Figure
    verdicts: tuple[VerdictRow, ...]
    resources: tuple[ResourceRow, ...]
    paper: tuple[PaperView, ...]
    reach: tuple[LargestSizeRow, ...]
    case: CaseView | None = None  # published sizes of the job, recorded beforehand
