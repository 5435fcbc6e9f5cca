"""The report's three plots, from the view's series and the word catalogs."""

from __future__ import annotations

from collections.abc import Sequence

from memfit.report import charts
from memfit.report.quantities import Figure, figure_text, number_text
from memfit.report.rows import LossCurve, PocView, SearchView, Timeline
from memfit.report.words import Words
from memfit.types.units import GIB, KIB, MIB


def timeline_plot(timelines: Sequence[Timeline], *, cap: Figure, words: Words) -> str:
    """Return the plot of live memory over one step as SVG text, or "" if there are no timelines. All lines
    are stepped; the area below measured ones is filled. A level line shows the memory ``cap``."""
    if not timelines:
        return ""
    highest = [float(max(t.values)) for t in timelines]
    return charts.plot(
        "timeline",
        title=words.get("section.timeline"),
        description=words.get("alt.timeline"),
        x=charts.Axis(title=words.get("text.through_step"), low=0, high=1, text="{:.0%}".format),
        y=bytes_axis(words.get("text.memory_axis"), [*highest, cap.value or 0]),
        lines=[_timeline(t) for t in timelines],
        rules=[_cap_rule(cap, words)],
    )


def _timeline(timeline: Timeline) -> charts.Line:
    count = len(timeline.values)
    points = [(i / count, float(v)) for i, v in enumerate(timeline.values)]
    points.append((1.0, float(timeline.values[-1])))
    return charts.Line(
        css=f"{timeline.role} {timeline.mark}",
        points=points,
        area=timeline.mark == "measured",
        stepped=True,
    )


def bytes_axis(title: str, values: Sequence[float]) -> charts.Axis:
    """Return an axis from 0 that covers ``values``, in bytes. Ticks and labels are in the largest of GiB, MiB
    and KiB of which the largest value is at least two, else in bytes."""
    scale = next((s for s in (GIB, MIB, KIB) if max(values) >= 2 * s), 1)
    name = {GIB: "GiB", MIB: "MiB", KIB: "KiB"}.get(scale, "B")
    return charts.axis(title, values=values, scale=scale, text=lambda v: f"{v / scale:,g} {name}")


def _cap_rule(cap: Figure, words: Words, *, vertical: bool = False) -> charts.Rule:
    label = words.get("text.cap", cap=figure_text(cap, words))
    return charts.Rule(value=cap.value or 0, label=label, vertical=vertical)


def pareto_plot(view: PocView, words: Words) -> str:
    """Return the plot of step time over peak memory as SVG text, or "" if no plan has both figures.

    Rings are predicted plans: plain training, the frontier and the recommended plan. Filled dots are plans as
    measured. The frontier is also drawn as a staircase, and the memory cap as an upright line.
    """
    search = view.search
    dots = _predicted_dots(search, words) + _measured_dots(view, words)
    if not dots:
        return ""
    return charts.plot(
        "pareto",
        title=words.get("section.search"),
        description=words.get("alt.pareto"),
        x=bytes_axis(words.get("text.peak_axis"), [*(d.x for d in dots), search.cap.value or 0]),
        y=charts.axis(
            words.get("text.time_axis"),
            values=[d.y for d in dots],
            zero=False,
            text=lambda v: number_text(v, "s"),
        ),
        lines=[charts.Line(css="stairs", points=_stairs(search), stepped=True)],
        dots=dots,
        rules=[_cap_rule(search.cap, words, vertical=True)],
    )


def _stairs(search: SearchView) -> list[tuple[float, float]]:
    """Return (peak, step time) of those plans of the frontier that are faster than all plans with a smaller
    peak, by increasing peak. Plans that are on the frontier only because they change results less are thus
    left out, and so are plans without a known peak or step time."""
    points = sorted((r.peak.value, r.step.value) for r in search.frontier if r.peak.value and r.step.value)
    corners: list[tuple[float, float]] = []
    for peak, step in points:
        if not corners or step < corners[-1][1]:
            corners.append((peak, step))
    return corners


def _predicted_dots(search: SearchView, words: Words) -> list[charts.Dot]:
    rows = {row.plan: row for row in (search.baseline, *search.frontier)}
    if search.recommended:
        rows[search.recommended.plan] = search.recommended
    dots = []
    for row in rows.values():
        label = "recommended" if row.recommended else "plain" if row.plan == search.baseline.plan else ""
        css = "recommended" if row.recommended else "baseline" if label else "ablation"
        if row.peak.value is not None and row.step.value is not None:
            hint = _hint(row.plan, row.peak, row.step, words)
            dots.append(
                charts.Dot(
                    css=f"{css} ring",
                    x=row.peak.value,
                    y=row.step.value,
                    hint=hint,
                    label=words.get(f"text.{label}") if label else "",
                )
            )
    return dots


def _measured_dots(view: PocView, words: Words) -> list[charts.Dot]:
    return [
        charts.Dot(
            css=f"{row.role} filled",
            x=row.peak.value,
            y=row.step.value,
            hint=_hint(row.plan, row.peak, row.step, words),
        )
        for row in view.plans
        if row.peak.value is not None and row.step.value is not None
    ]


def _hint(plan: str, peak: Figure, step: Figure, words: Words) -> str:
    mark = words.get(f"mark.{peak.mark}")
    return f"{plan} ({mark}): {figure_text(peak, words)}, {figure_text(step, words)}"


def loss_plot(curves: Sequence[LossCurve], words: Words) -> str:
    """Return the plot of loss over step number as SVG text, one line for each curve; "" if there are no
    curves."""
    if not curves:
        return ""
    longest = max(len(c.values) for c in curves)
    return charts.plot(
        "losses",
        title=words.get("section.losses"),
        description=words.get("alt.losses"),
        x=charts.Axis(title=words.get("text.step_number"), low=1, high=max(2, longest)),
        y=charts.axis(words.get("text.loss"), values=[v for c in curves for v in c.values], zero=False),
        lines=[
            charts.Line(css=f"{c.role} thin", points=[(i + 1.0, v) for i, v in enumerate(c.values)])
            for c in curves
        ],
    )
