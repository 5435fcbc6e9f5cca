"""Convert a Poc to plain tables and series: figures with their marks (measured, predicted or assumed) and
sources, no words and no markup.

The measured peak, step time and metric of a run that did not complete are left out. Runs of one plan are
pooled in tables with one line per plan.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from memfit.report.answer import answer
from memfit.report.case import case_view
from memfit.report.choices import search_view
from memfit.report.provenance import (
    CASE,
    MARGIN,
    POC,
    group_anchor,
    interaction_anchor,
    paper_anchor,
    reach_anchor,
    run_anchor,
    verdict_anchor,
)
from memfit.report.quantities import (
    Figure,
    Mark,
    Sentence,
    assumed,
    difference_unit,
    measured,
    predicted,
    sourced,
)
from memfit.report.rows import (
    EstimateView,
    InteractionTable,
    LargestSizeRow,
    LossCurve,
    PaperSide,
    PaperView,
    PhaseRow,
    PlanRow,
    PocView,
    ResourceRow,
    RunRow,
    Timeline,
    VerdictRow,
)
from memfit.report.sensitivity import control_sentence, surrogate_sentences
from memfit.types.result import (
    Cause,
    Estimate,
    Interaction,
    LargestSize,
    OutcomeKind,
    PaperRow,
    Poc,
    Run,
    SearchResult,
    Verdict,
)
from memfit.verify.aggregate import by_plan, median_step_s, ok_runs, peak_bytes, step_s

MAX_POINTS: Final = 600  # most points of one timeline, about one per pixel


def poc_view(poc: Poc) -> PocView:
    """Convert a PoC to the figures, rows and sentences that the report shows. Parts that the PoC lacks are
    empty or None."""
    groups = by_plan(poc.runs)
    return PocView(
        poc=poc,
        answer=answer(poc),
        cap=assumed(poc.cap_bytes, "bytes", POC),
        runs=tuple(sourced(_run_row(r, poc.metric_unit), run_anchor(i)) for i, r in enumerate(poc.runs)),
        phases=tuple(sourced(rows, _group(runs)) for runs in groups if (rows := _phase_rows(runs))),
        timelines=_timelines(poc),
        plans=_plan_rows(groups),
        search=search_view(poc.search),
        interactions=tuple(
            sourced(_interaction(table, poc.metric_unit), interaction_anchor(i))
            for i, table in enumerate(poc.interactions)
        ),
        losses=_losses(poc.runs),
        naive=assumed(poc.metric_naive, poc.metric_unit, POC),
        verdicts=tuple(
            sourced(_verdict(n.name, n.plan.label, n.verdict, poc), verdict_anchor(n.name))
            for n in poc.verdicts
        ),
        resources=tuple(sourced(_resources(runs, _estimates(poc.search)), _group(runs)) for runs in groups),
        paper=tuple(sourced(_paper(row), paper_anchor(i)) for i, row in enumerate(poc.paper)),
        reach=tuple(sourced(_reach(row), reach_anchor(i)) for i, row in enumerate(poc.reach)),
        case=sourced(case_view(poc.job_name), CASE),
    )


def _group(runs: Sequence[Run]) -> str:
    return group_anchor(runs[0].spec.role, runs[0].spec.plan)


def estimate_view(estimate: Estimate) -> EstimateView:
    """Convert an estimate to rows. Shares are in % of the peak of live tensors, but those of ``device_parts``
    in % of the sum of these parts."""
    peak, chance = estimate.allocated_bytes, estimate.oom_probability
    return EstimateView(
        plan=estimate.plan.label,
        peak=predicted(peak.value, "bytes"),
        low=predicted(peak.low, "bytes"),
        high=predicted(peak.high, "bytes"),
        step=predicted(estimate.step_s.value if estimate.step_s else None, "s"),
        flops=predicted(estimate.flops_per_step, "count"),
        peak_phase=estimate.peak_phase,
        peak_op=estimate.peak_op,
        categories=_shares(_largest(estimate.at_peak_bytes), peak.value),
        phases=_shares(estimate.phase_peak_bytes.items(), peak.value),
        modules=_shares(_largest(estimate.by_module_bytes), peak.value),
        further=_further(estimate),
        device_parts=_shares(estimate.device_parts_bytes.items(), sum(estimate.device_parts_bytes.values())),
        oom=None if chance is None else predicted(100 * chance, "chance"),
    )


def _further(estimate: Estimate) -> tuple[tuple[str, Figure, Figure, Figure], ...]:
    kinds = {
        "reserved": estimate.reserved_bytes,
        "device": estimate.device_bytes,
        "host": estimate.host_bytes,
    }
    return tuple(
        (name, predicted(i.value, "bytes"), predicted(i.low, "bytes"), predicted(i.high, "bytes"))
        for name, i in kinds.items()
        if i is not None
    )


def _largest(parts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(parts.items(), key=lambda item: -item[1])


def _shares(parts: Iterable[tuple[str, int]], whole: float) -> tuple[tuple[str, Figure, Figure], ...]:
    return tuple(
        (name, predicted(size, "bytes"), predicted(100 * size / whole if whole else None, "percent"))
        for name, size in parts
    )


def _error(guess: float | None, truth: float | None) -> Figure:
    """Return predicted (``guess``) minus measured (``truth``), in % of measured; unknown if one of them is
    None or if measured is 0.

    It is marked as measured, because it depends on a measurement.
    """
    value = None if guess is None or not truth else 100 * (guess - truth) / truth
    return Figure(value=value, unit="percent", mark=Mark.MEASURED, signed=True)


def _run_row(run: Run, metric_unit: str) -> RunRow:
    spec, m = run.spec, run.measurement
    ok = m.outcome is OutcomeKind.OK
    peak, step = (m.peak_bytes, median_step_s(m)) if ok else (None, None)
    return RunRow(
        name=spec.name,
        role=spec.role,
        plan=spec.plan.label,
        seed=spec.seed,
        capped=spec.cap_bytes is not None,
        outcome=m.outcome.value,
        reason=m.reason,
        predicted_peak=predicted(run.predicted_peak_bytes, "bytes"),
        peak=measured(peak, "bytes"),
        peak_error=_error(run.predicted_peak_bytes, peak),
        predicted_step=predicted(run.predicted_step_s, "s"),
        step=measured(step, "s"),
        step_error=_error(run.predicted_step_s, step),
        metric=measured(m.metric if ok else None, metric_unit),
        process_peak=measured(m.process_peak_bytes, "bytes"),
        overhead=measured(m.overhead_ratio, "ratio"),
    )


def _phase_rows(runs: Sequence[Run]) -> tuple[PhaseRow, ...]:
    """Return one row for each phase of one run that stands for all ``runs`` of a plan: the first completed
    run with measured phases, or the first run if there is none. Phases that were only predicted or only
    measured have rows too."""
    run = next((r for r in ok_runs(runs) if r.measurement.phase_peak_bytes), runs[0])
    measured_bytes, predicted_bytes = run.measurement.phase_peak_bytes, run.predicted_phase_peak_bytes
    return tuple(
        PhaseRow(
            role=run.spec.role,
            plan=run.spec.plan.label,
            phase=phase,
            predicted=predicted(predicted_bytes.get(phase), "bytes"),
            measured=measured(measured_bytes.get(phase), "bytes"),
            error=_error(predicted_bytes.get(phase), measured_bytes.get(phase)),
        )
        for phase in dict.fromkeys([*predicted_bytes, *measured_bytes])
    )


def _plan_rows(groups: Sequence[Sequence[Run]]) -> tuple[PlanRow, ...]:
    base = next((peak_bytes(g) for g in groups if g[0].spec.role == "baseline"), None)
    return tuple(sourced(_plan_row(group, base), _group(group)) for group in groups)


def _plan_row(runs: Sequence[Run], base_bytes: int | None) -> PlanRow:
    first_run, peak = runs[0], peak_bytes(runs)
    return PlanRow(
        role=first_run.spec.role,
        plan=first_run.spec.plan.label,
        predicted_peak=predicted(first_run.predicted_peak_bytes, "bytes"),
        peak=measured(peak, "bytes"),
        share=measured(100 * peak / base_bytes if peak and base_bytes else None, "percent"),
        predicted_step=predicted(first_run.predicted_step_s, "s"),
        step=measured(step_s(runs), "s"),
    )


def downsample(values: Sequence[int], most: int = MAX_POINTS) -> tuple[int, ...]:
    """Return the values as a tuple, at most ``most`` of them. More values are divided in order into ``most``
    parts of about equal length, and the largest of each part is returned, so that no peak is lost."""
    if len(values) <= most:
        return tuple(values)
    edges = [i * len(values) // most for i in range(most + 1)]
    return tuple(max(values[a:b]) for a, b in itertools.pairwise(edges))


def _timelines(poc: Poc) -> tuple[Timeline, ...]:
    timelines: list[Timeline] = []
    for role in ("baseline", "recommended"):
        runs = [r for r in poc.runs if r.spec.role == role]
        measured_bytes = next(
            (r.measurement.timeline_bytes for r in ok_runs(runs) if r.measurement.timeline_bytes), ()
        )
        predictions = poc.predicted_timeline_bytes
        predicted_bytes = next(
            (predictions[r.spec.name] for r in runs if predictions.get(r.spec.name)),
            predictions.get(role, ()),
        )
        if measured_bytes:
            timelines.append(Timeline(role=role, mark=Mark.MEASURED, values=downsample(measured_bytes)))
        if predicted_bytes:
            timelines.append(Timeline(role=role, mark=Mark.PREDICTED, values=downsample(predicted_bytes)))
    return tuple(timelines)


def _losses(runs: Sequence[Run]) -> tuple[LossCurve, ...]:
    """Return the loss curves of completed runs of plain training and of the recommended plan. Of several runs
    with the same role and seed only the first counts, because the cap does not change the training."""
    curves: dict[tuple[str, int], LossCurve] = {}
    for run in ok_runs(runs):
        spec, losses = run.spec, run.measurement.losses
        if spec.role in ("baseline", "recommended") and losses:
            curve = LossCurve(role=spec.role, seed=spec.seed, values=losses)
            curves.setdefault((spec.role, spec.seed), curve)
    return tuple(curves.values())


def _verdict(name: str, plan: str, verdict: Verdict, poc: Poc) -> VerdictRow:
    unit = poc.metric_unit
    bounds = (verdict.low, verdict.difference, verdict.high)
    margin = verdict.margin
    bounds_in_margins = [b / margin for b in bounds if b is not None and margin]
    low, difference, high = (
        Figure(value=b, unit=difference_unit(unit), mark=Mark.MEASURED, signed=True) for b in bounds
    )
    return VerdictRow(
        name=name,
        plan=plan,
        kind=verdict.kind.value,
        effect=verdict.effect.label,
        test=verdict.test if verdict.cause is None else _test(verdict),
        why=verdict.reason if verdict.cause is None else _why(verdict, verdict.cause),
        metric=verdict.metric,
        difference=difference,
        low=low,
        high=high,
        margin=assumed(margin, difference_unit(unit), MARGIN if poc.metric_margin_source else ""),
        pairs=measured(verdict.pairs, "count"),
        power=predicted(None if verdict.power is None else 100 * verdict.power, "percent"),
        in_margins=(bounds_in_margins[0], bounds_in_margins[1], bounds_in_margins[2])
        if len(bounds_in_margins) == 3
        else None,
        notes=tuple(s for s in (*surrogate_sentences(verdict), control_sentence(verdict)) if s is not None),
    )


def _test(verdict: Verdict) -> Sentence:
    same_plan = verdict.cause is not None and verdict.cause.kind == "same_plan"
    return Sentence(key=f"test.{'same' if same_plan else verdict.effect.label}")


def _why(verdict: Verdict, cause: Cause) -> Sentence:
    """Return the reason of the verdict as a sentence. Numbers of seeds and steps are texts in it, not figures
    with a mark, because they are names and not quantities."""
    values: dict[str, Figure | str | Sentence] = {
        "pairs": measured(verdict.pairs, "count"),
        "seed": str(cause.seed),
        "step": str(cause.step),
        "difference": measured(_percent(cause.difference), "percent"),
        "limit": assumed(_percent(cause.limit_ratio), "percent"),
        "needed": predicted(cause.needed_count, "count"),
        "detail": cause.detail,
    }
    if cause.kind == "few_pairs":
        values["needed"] = assumed(cause.needed_count, "count")
    return Sentence(key=f"why.{cause.kind}", values=values)


def _percent(ratio: float | None) -> float | None:
    return None if ratio is None else 100 * ratio


def _interaction(table: Interaction, metric_unit: str) -> InteractionTable:
    unit = {"peak_bytes": "bytes", "step_s": "s"}.get(table.quantity, metric_unit)
    return InteractionTable(
        first=table.first,
        second=table.second,
        quantity=table.quantity,
        neither=measured(table.neither, unit),
        first_only=measured(table.first_only, unit),
        second_only=measured(table.second_only, unit),
        both=measured(table.both, unit),
        interaction=Figure(
            value=table.interaction, unit=difference_unit(unit), mark=Mark.MEASURED, signed=True
        ),
    )


def _estimates(search: SearchResult) -> dict[str, Estimate]:
    choices = [search.smallest, search.baseline, *search.frontier]
    choices += [search.recommended] if search.recommended else []
    return {c.estimate.plan.fingerprint: c.estimate for c in choices}


def _times(value: float | None, count: int) -> float | None:
    return None if value is None else value * count


def _resources(runs: Sequence[Run], estimates: Mapping[str, Estimate]) -> ResourceRow:
    first_run = runs[0]
    steps, estimate = first_run.spec.steps, estimates.get(first_run.spec.plan.fingerprint)
    one_step_s = step_s(runs)
    time = measured(_times(one_step_s, steps), "s")
    if one_step_s is None:
        time = predicted(_times(first_run.predicted_step_s, steps), "s")
    energy, boundary = _energy(runs, estimate)
    return ResourceRow(
        role=first_run.spec.role,
        plan=first_run.spec.plan.label,
        steps=assumed(steps, "count", POC),
        time=time,
        energy=energy,
        boundary=boundary,
        money=predicted(_times(estimate.usd, steps) if estimate else None, "usd"),
        carbon=predicted(_times(estimate.co2_g, steps) if estimate else None, "g"),
    )


def _energy(runs: Sequence[Run], estimate: Estimate | None) -> tuple[Figure, str]:
    """Return (energy of one run, what it includes). The energy is the median over the completed runs for
    which it was measured; else the predicted energy of one step times the number of steps.

    A measured energy is marked as predicted if what it includes contains "model".
    """
    measurements = [r.measurement for r in ok_runs(runs) if r.measurement.energy_j is not None]
    if measurements:
        joules = statistics.median(m.energy_j for m in measurements if m.energy_j is not None)
        mark = Mark.PREDICTED if "model" in measurements[0].energy_boundary else Mark.MEASURED
        return Figure(value=joules, unit="j", mark=mark), measurements[0].energy_boundary
    per_step = estimate.energy_j if estimate else None
    return predicted(_times(per_step, runs[0].spec.steps), "j"), estimate.energy_boundary if estimate else ""


def _paper(row: PaperRow) -> PaperView:
    best = row.recommended
    return PaperView(
        machine=row.machine,
        size=row.size,
        memory=assumed(row.device_memory_bytes, "bytes"),
        plain=_paper_side(row.plain, row.plain_fits),
        recommended=_paper_side(best, fits=True) if best else None,
        note=row.note,
    )


def _paper_side(estimate: Estimate, fits: bool) -> PaperSide:
    return PaperSide(
        plan=estimate.plan.label,
        fits=fits,
        peak=predicted(estimate.allocated_bytes.value, "bytes"),
        step=predicted(estimate.step_s.value if estimate.step_s else None, "s"),
        energy=predicted(_times(estimate.energy_j, 1000), "j"),
        boundary=estimate.energy_boundary,
        money=predicted(_times(estimate.usd, 1000), "usd"),
        carbon=predicted(_times(estimate.co2_g, 1000), "g"),
    )


def _reach(row: LargestSize) -> LargestSizeRow:
    unit = "parameters" if row.quantity == "parameters" else "count"
    factor = row.recommended / row.plain if row.plain and row.recommended else None
    return LargestSizeRow(
        machine=row.machine,
        quantity=row.quantity,
        plain=predicted(row.plain, unit),
        plain_label=row.plain_label,
        recommended=predicted(row.recommended, unit),
        recommended_label=row.recommended_label,
        factor=predicted(factor, "ratio"),
        at_limit=row.at_limit,
    )
