"""Print the findings in a terminal: short tables, words from the catalogs.

No text is interpreted as markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from memfit.cost.memory_estimate import UNKNOWN_FOOTPRINT, UNKNOWN_FOOTPRINT_HERE
from memfit.report.choices import SPEAKING_FOR, search_view
from memfit.report.quantities import (
    Figure,
    Sentence,
    figure_text,
    measured,
    predicted,
    sentence_text,
    value_text,
)
from memfit.report.rows import ChoiceRow, RunRow, SearchView, VerdictRow
from memfit.report.view import estimate_view, poc_view
from memfit.report.words import Words, load_words
from memfit.report.workload_text import workload_text
from memfit.techniques.registry import short_label
from memfit.types.dependence import DependenceKind, SampleDependence
from memfit.types.machine import Calibration
from memfit.types.result import Effort, Estimate, Poc, SearchResult, Timings, Trial
from memfit.types.trace import UNKNOWN_BUFFER

_STYLES: Final = {
    "ok": "green",
    "equivalent": "green",
    "oom": "red",
    "failed": "red",
    "different": "red",
    "timeout": "yellow",
    "interrupted": "yellow",
    "undecided": "yellow",
    "not_sensitive": "yellow",
}
MOST_MODULES: Final = 15
MOST_ASSUMPTIONS: Final = 5
Parts = Sequence[tuple[str, Figure, Figure]]


def print_poc(poc: Poc, *, console: Console, lang: str) -> None:
    """Print, in this order and each if there is one: the workload, that the PoC was interrupted, the
    sentences of `answer`, a table of the runs, why runs failed, the verdicts, the effort, the notes, and the
    path of the report with how long the PoC took. Raises UserError for an unknown ``lang``."""
    words, view = load_words(lang), poc_view(poc)
    if poc.workload is not None:
        console.print(Text(workload_text(poc.workload, words)))
    if not poc.finished:
        console.print(Text(words.get("page.unfinished"), style="yellow"))
    for sentence in view.answer:
        console.print(Text(sentence_text(sentence, words).strip(), style="bold"))
    if view.runs:
        console.print(_run_table(view.runs, poc.metric, words))
        _print_failures(view.runs, console, words)
    _print_verdicts(view.verdicts, console, words)
    console.print(Text(_effort(poc.effort, words)))
    for note in poc.notes:
        console.print(Text(words.of(note), style="dim"))
    took = words.get("terminal.took", took=figure_text(measured(poc.took_s, "s"), words))
    report = words.get("terminal.report", path=poc.report) if poc.report else ""
    console.print(Text(words.get("text.with_note", text=report, note=took) if report else took))


_MOST_ROWS = 12  # most rows of a frontier; more would not help to choose
_COSTED_STEPS = 1000


def print_search(
    result: SearchResult, *, console: Console, lang: str, correction: Calibration | None = None
) -> None:
    """Print the result of a search: goal, memory cap and number of plans; memory and step time of plain
    training; that the host has too little memory for it, if so; for a demonstration, how the cap was chosen;
    cautions; and a table of the frontier, of more than twelve plans only twelve and the recommended one.

    If a plan is recommended, then the plans that were tried for a few steps, the recommended plan, the time,
    cost and CO2 of 1,000 steps with it, its reasons, how far the search got, and what changes of the machine
    would bring. Otherwise only that no plan fits and what the smallest needs.

    ``correction``: the calibration that corrected the step times by runs, or None. Raises UserError for an
    unknown ``lang``.
    """
    words, view = load_words(lang), search_view(result)
    cap = figure_text(view.cap, words)
    goal = words.name("goal", view.goal)
    considered = figure_text(view.considered, words)
    title = words.get("terminal.search", goal=goal, cap=cap, considered=considered)
    console.print(Text(title, style="bold"))
    console.print(Text(_plain_line(view, result.baseline.estimate, cap, words)))
    if view.baseline.host_short and (host := _host(result.baseline.estimate, words)) is not None:
        console.print(Text(host))
    if result.cap_reason.startswith("demonstration"):
        cap_reason = words.of(words.name("cap_reason", result.cap_reason))
        console.print(Text(words.get("page.cap_line", cap=cap, reason=cap_reason)))
    _print_cautions(result, correction, words, console)
    if view.frontier:
        shown_rows = _spread(view.frontier)
        console.print(_frontier(shown_rows, words))
        if not all(row.traced for row in shown_rows):
            console.print(Text(words.get("terminal.sketched"), style="dim"))
        if hidden_count := len(view.frontier) - len(shown_rows):
            console.print(Text(words.get("terminal.frontier_left", count=hidden_count), style="dim"))
    if view.recommended is None:
        smallest_need = figure_text(_need(view.smallest), words)
        text_key = "terminal.no_plan_yet" if result.unfinished else "terminal.no_plan"
        text = words.get(text_key, cap=cap, least=smallest_need, plan=view.smallest.plan)
        console.print(Text(text, style="red"))
        return
    _print_trials(result.trials, words, console)
    console.print(Text(words.get("terminal.recommended", plan=view.recommended.plan), style="bold green"))
    if (cost := _cost(result, words)) is not None:
        console.print(Text(cost))
    for reason in view.recommended.reasons:
        console.print(_reason(reason, words))
    _print_extent(view, words, console)


def _print_extent(view: SearchView, words: Words, console: Console) -> None:
    """Print how far the search got, and what changes of the machine would bring."""
    if view.extent:
        console.print(Text(words.get("extent.title"), style="bold"))
    for sentence in view.extent:
        console.print(Padding(Text(sentence_text(sentence, words).strip()), (0, 0, 0, 2)))
    if view.sensitivity:
        console.print(Text(words.get("sensitivity.title"), style="bold"))
    for change in view.sensitivity:
        console.print(Padding(Text(f"? {sentence_text(change, words).strip()}"), (0, 0, 0, 2)))


def _print_cautions(
    result: SearchResult, correction: Calibration | None, words: Words, console: Console
) -> None:
    """Print, each if it is the case: that the search was interrupted, which part of the memory is unknown,
    that timings are noisy, and by the runs of which PoC the step times were corrected."""
    if result.unfinished:
        console.print(Text(words.get("terminal.unfinished"), style="bold yellow"))
    assumed = {a for c in filter(None, (result.baseline, result.recommended)) for a in c.estimate.assumptions}
    for unknown in sorted(assumed & {UNKNOWN_FOOTPRINT, UNKNOWN_FOOTPRINT_HERE, UNKNOWN_BUFFER}):
        assumed_text = words.get("terminal.assumed", what=words.of(unknown))
        console.print(Text(assumed_text, style="yellow"))
    if result.timings is not None and result.timings.noisy:
        console.print(Text(_noise(result.timings, words), style="yellow"))
    if correction is not None and correction.corrected_by:
        console.print(Text(_correction(correction, words), style="dim"))


def _print_trials(trials: Sequence[Trial], words: Words, console: Console) -> None:
    if trials:
        console.print(Text(words.get("terminal.trials")))
    for trial in sorted(trials, key=lambda t: t.median_s or math.inf):
        placeholders = {
            "plan": short_label(trial.plan),
            "predicted": figure_text(predicted(trial.predicted_s, "s"), words),
        }
        if trial.median_s is None:
            line = words.get("terminal.trial_failed", reason=trial.reason, **placeholders)
        else:
            low, high = (figure_text(measured(f(trial.step_s), "s"), words) for f in (min, max))
            spread = words.get("terminal.trial_spread", low=low, high=high) if len(trial.step_s) > 1 else ""
            median = figure_text(measured(trial.median_s, "s"), words)
            line = words.get("terminal.trial", measured=median, spread=spread, **placeholders)
        console.print(Padding(Text(line), (0, 0, 0, 2)))


def _noise(timings: Timings, words: Words) -> str:
    percents = {"spread": timings.spread_ratio, "waited": timings.waited_ratio}
    texts = {name: figure_text(measured(100 * ratio, "percent"), words) for name, ratio in percents.items()}
    return words.get("terminal.noisy", load=f"{timings.load_count:.1f}", **texts)


def _cost(result: SearchResult, words: Words) -> str | None:
    """Return the sentence on time, cost and CO2 of 1,000 steps of the recommended plan. None if there is no
    such plan, or if its step time or its cost is unknown."""
    best = result.recommended.estimate if result.recommended else None
    if best is None or best.step_s is None or best.usd is None:
        return None
    figures = {
        "time": predicted(_COSTED_STEPS * best.step_s.value, "s"),
        "money": predicted(_COSTED_STEPS * best.usd, "usd"),
        "carbon": predicted(None if best.co2_g is None else _COSTED_STEPS * best.co2_g, "g"),
        "steps": predicted(_COSTED_STEPS, "count"),
    }
    return words.get(
        "terminal.cost", **{name: figure_text(figure, words) for name, figure in figures.items()}
    )


def _correction(calibration: Calibration, words: Words) -> str:
    spread = calibration.step_spread_ratio
    percent = predicted(None if spread is None else 100 * spread, "percent")
    placeholders = {"poc": calibration.corrected_by, "plans": calibration.corrected_count}
    ratio = figure_text(measured(calibration.step_ratio, "ratio"), words)
    return words.get("terminal.corrected", ratio=ratio, spread=figure_text(percent, words), **placeholders)


def print_estimate(
    estimate: Estimate,
    *,
    console: Console,
    lang: str,
    title: str | None = None,
    not_included: str = "terminal.not_included",
) -> None:
    """Print the prediction for one plan, in this order: the title (by default one that names the plan); the
    peak of live tensors with its range, and the step time; other kinds of memory; whether the host has enough
    memory; the probability that the plan does not fit; phase and operator of the peak; what the plan keeps in
    local storage; a warning if splitting the batch may change the training or this was not tested; the first
    `MOST_ASSUMPTIONS` (5) assumptions; tables of memory by category, phase, module and part of the device;
    what is not included. ``not_included``: key of the text for the last, in the word catalogs.

    The first two and the last are always printed, all others only if they are known or apply. Raises
    UserError for an unknown ``lang``.
    """
    words, view = load_words(lang), estimate_view(estimate)
    peak, low, high, step = (figure_text(f, words) for f in (view.peak, view.low, view.high, view.step))
    step += _basis(estimate, words)
    title = words.get("terminal.estimate", plan=view.plan) if title is None else title
    console.print(Text(title, style="bold"))
    console.print(Text(words.get("terminal.peak_line", peak=peak, low=low, high=high, step=step)))
    for kind, *figures in view.further:
        value, low, high = (figure_text(f, words) for f in figures)
        name = words.name("memory", kind)
        console.print(Text(words.get("terminal.memory_line", name=name, value=value, low=low, high=high)))
    if (host := _host(estimate, words)) is not None:
        console.print(Text(host))
    if view.oom is not None:
        console.print(Text(words.get("terminal.oom_line", chance=figure_text(view.oom, words))))
    if view.peak_phase and view.peak_op:
        phase = words.name("phase", view.peak_phase)
        console.print(Text(words.get("terminal.at", phase=phase, op=view.peak_op)))
    if estimate.storage_bytes:
        console.print(
            Text(
                words.get(
                    "terminal.storage",
                    size=figure_text(predicted(estimate.storage_bytes, "bytes"), words),
                    written=figure_text(predicted(estimate.storage_written_bytes, "bytes"), words),
                )
            )
        )
    if (split := _split(estimate.dependence, words)) is not None:
        console.print(split)
    for assumption in estimate.assumptions[:MOST_ASSUMPTIONS]:
        console.print(Text(words.get("terminal.assumed", what=words.of(assumption)), style="dim"))
    categories = [(words.name("category", name), size, share) for name, size, share in view.categories]
    phases = [(words.name("phase", name), size, share) for name, size, share in view.phases]
    device = [(words.name("memory", name), size, share) for name, size, share in view.device_parts]
    for column, parts in (
        ("category", categories),
        ("phase", phases),
        ("module", _few_modules(view.modules, words)),
        ("device", device),
    ):
        if parts:
            console.print(_shares(words.get(f"column.{column}"), parts, words))
    console.print(Text(words.get(not_included), style="dim"))


def print_verdict(
    estimate: Estimate, *, needed_bytes: int, cap_bytes: int, fits: bool, console: Console, words: Words
) -> None:
    """Print whether the plan fits. If it does not, print whose memory is too small: the device's, which has
    ``cap_bytes`` and would need ``needed_bytes``, or only the host's; or that the host's memory is
    unknown."""
    values = {"needed": needed_bytes, "cap": cap_bytes, "host": estimate.needed_host_bytes}
    texts = {name: figure_text(predicted(value, "bytes"), words) for name, value in values.items()}
    key = "fits" if fits else "does_not_fit"
    if not fits and needed_bytes <= cap_bytes:
        key = "fits_device_only"
        if estimate.host_memory_bytes is None:
            key = "fits_if_host_has"
        else:
            texts["there"] = figure_text(predicted(estimate.host_memory_bytes, "bytes"), words)
    console.print(Text(words.get(f"terminal.{key}", **texts), style="bold green" if fits else "bold red"))


def _host(estimate: Estimate, words: Words) -> str | None:
    """Return the sentence on whether the host has the memory that the plan needs there, or that the host's
    memory is unknown. None if this need is not predicted, or on a CPU, where the host's memory is the
    device's."""
    need, host_memory_bytes = estimate.host_bytes, estimate.host_memory_bytes
    if need is None or "tensors" in estimate.host_parts_bytes:
        return None
    values = {"need": figure_text(predicted(estimate.needed_host_bytes, "bytes"), words)}
    if host_memory_bytes is None:
        offload_bytes = estimate.host_parts_bytes.get("offload")
        return words.get(
            "terminal.host_unknown_offload" if offload_bytes else "terminal.host_unknown", **values
        )
    values["there"] = value_text(predicted(host_memory_bytes, "bytes"), words)
    if estimate.host_memory_assumed:
        values["there"] += f" ({words.get('mark.assumed')})"
    if not estimate.lacks_host_memory:
        return words.get("terminal.host_enough", **values)
    way_out = words.get("terminal.host_give") if estimate.host_memory_assumed else ""
    return words.get("terminal.host_short", way_out=way_out, **values).strip()


def _split(dependence: SampleDependence | None, words: Words) -> Text | None:
    """Return the warning that splitting the batch changes the training, or that it was not tested whether it
    does. None if the plan does not split the batch or the samples do not depend on each other."""
    if dependence is None or dependence.kind is DependenceKind.INDEPENDENT:
        return None
    if dependence.kind is DependenceKind.NOT_TESTED:
        return Text(words.get("reason.not_tested", detail=words.of(dependence.reason)), style="yellow")
    changes, way_out = words.of(dependence.changes), words.of(dependence.way_out)
    message = words.get(
        "terminal.split", changes=changes, reason=words.of(dependence.reason), way_out=way_out
    )
    return Text(message, style="red")


def new_table(columns: Iterable[str], *, left: int = 1) -> Table:
    """Return a table with these columns and no rows. The first ``left`` columns are for text, which may wrap;
    the others are for numbers, right-aligned and never wrapped."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        text = index < left
        table.add_column(Text(name), justify="left" if text else "right", overflow="fold", no_wrap=not text)
    return table


def _run_table(rows: Sequence[RunRow], metric: str, words: Words) -> Table:
    predicted_label, measured_label = words.get("mark.predicted"), words.get("mark.measured")
    peak, step = words.get("column.peak_short"), words.get("column.step_short")
    run, outcome, error = (words.get(f"column.{name}") for name in ("run", "outcome", "error"))
    numbers = (f"{peak}\n{predicted_label}", f"{peak}\n{measured_label}", error, f"{step}\n{measured_label}")
    table = new_table(
        [run, outcome, *numbers, words.of(metric) if metric else words.get("column.metric")], left=2
    )
    for row in rows:
        table.add_row(*_run_cells(row, words))
    return table


def _run_cells(row: RunRow, words: Words) -> list[Text]:
    name = words.name("run", row.name) if f"run.{row.name}" in words.texts else words.name("role", row.role)
    if row.role == "ablation":
        name = _one_per_line(row.plan)
    capped = words.get("capped.yes" if row.capped else "capped.no")
    outcome = Text(words.get(f"outcome.{row.outcome}"), style=_STYLES.get(row.outcome, ""))
    figures = (row.predicted_peak, row.peak, row.peak_error, row.step, row.metric)
    cells = [Text("–" if f.value is None and row.outcome != "ok" else figure_text(f, words)) for f in figures]
    return [Text(words.get("terminal.run", name=name, capped=capped, seed=row.seed)), outcome, *cells]


def _one_per_line(plan: str) -> str:
    """Return the plan's label with each technique on its own line."""
    return plan.replace(" + ", "\n+ ")


def _print_failures(rows: Sequence[RunRow], console: Console, words: Words) -> None:
    for row in rows:
        if row.reason:
            name, detail = words.of(row.plan), words.get("plan.detail_separator")
            outcome = f"{words.get(f'outcome.{row.outcome}')}{words.get('text.colon')}{words.of(row.reason)}"
            console.print(Text(f"{name} #{row.seed}{detail}{outcome}", style="dim"))


def _print_verdicts(rows: Sequence[VerdictRow], console: Console, words: Words) -> None:
    if not rows:
        return
    console.print(Text(words.get("terminal.verdicts"), style="bold"))
    for row in rows:
        line = Text("  ")
        line.append(words.get(f"verdict.{row.kind}"), style=_STYLES[row.kind])
        effect = words.get(f"effect.{row.effect}")
        line.append("  " + words.get("terminal.verdict", plan=row.plan, effect=row.effect, meaning=effect))
        console.print(line)
        detail = value_text(row.why, words) if row.in_margins is None else _verdict_line(row, words)
        for text in (detail, *(sentence_text(note, words).strip() for note in row.notes)):
            console.print(Padding(Text(text, style="dim"), (0, 0, 0, 4)))


def _verdict_line(row: VerdictRow, words: Words) -> str:
    names = ("difference", "low", "high", "margin", "power")
    figures = {name: figure_text(getattr(row, name), words) for name in names}
    return words.get(
        "text.verdict_line", metric=words.of(row.metric), pairs=figure_text(row.pairs, words), **figures
    )


def _effort(effort: Effort, words: Words) -> str:
    return words.get(
        "terminal.effort",
        commands=effort.commands,
        lines=effort.changed_lines,
        packages=effort.packages,
        installed=figure_text(measured(effort.installed_mib, "MiB"), words),
        failed=effort.failed_attempts,
    )


def _basis(estimate: Estimate, words: Words) -> str:
    """Return what the estimate's step time rests on, in parentheses, to follow the time. "" if there is none,
    and for a record of an older version."""
    if not estimate.step_basis:
        return ""
    return words.get("text.with_note", text="", note=words.name("step_basis", estimate.step_basis))


def _plain_line(view: SearchView, estimate: Estimate, cap: str, words: Words) -> str:
    plain = view.baseline
    fits = words.get("text.fits" if plain.fits or plain.host_short else "text.does_not_fit")
    need, peak, step = (figure_text(figure, words) for figure in (_need(plain), plain.peak, plain.step))
    basis = _basis(estimate, words)
    placeholders = {"needed": need, "peak": peak, "step": step, "basis": basis, "fits": fits, "cap": cap}
    if plain.device is None:
        return words.get("terminal.baseline", **placeholders)
    low, expected, high = (figure_text(figure, words) for figure in plain.device)
    return words.get("terminal.baseline_device", **placeholders, low=low, expected=expected, high=high)


def _need(row: ChoiceRow) -> Figure:
    """Return the bytes that were compared with the cap, or the peak of live tensors if the record is of an
    older version without them."""
    return row.peak if row.needed.value is None else row.needed


def _spread(rows: Sequence[ChoiceRow]) -> list[ChoiceRow]:
    """Return the rows; of more than twelve only the first, the last, ten at equal distances between them, and
    the recommended plan, in the same order."""
    step = max(1.0, (len(rows) - 1) / (_MOST_ROWS - 1))
    indices = {round(i * step) for i in range(_MOST_ROWS)}
    return [row for i, row in enumerate(rows) if i in indices or row.recommended]


def _frontier(rows: Sequence[ChoiceRow], words: Words) -> Table:
    mark = words.get("mark.predicted")
    numbers = [f"{words.get(f'column.{name}')}\n{mark}" for name in ("needs", "peak_short", "step_short")]
    table = new_table(
        [*(words.get(f"column.{name}") for name in ("plan", "effect", "fits")), *numbers], left=3
    )
    for row in rows:
        effect = f"{row.effect} {words.get(f'effect.{row.effect}')}"
        fits = words.get(f"text.{row.verdict}")
        name = ("* " if row.recommended else "") + _one_per_line(row.plan)
        prefix = "" if row.traced else "~ "
        figures = (prefix + figure_text(figure, words) for figure in (_need(row), row.peak, row.step))
        cells = (name, effect, fits, *figures)
        style = "bold green" if row.recommended else "" if row.fits else "dim"
        table.add_row(*map(Text, cells), style=style)
    return table


def _reason(reason: Sentence, words: Words) -> Padding:
    sign, style = ("+", "") if reason.key in SPEAKING_FOR else ("-", "dim")
    return Padding(Text(f"{sign} {sentence_text(reason, words).strip()}", style=style), (0, 0, 0, 2))


def _few_modules(parts: Parts, words: Words) -> Parts:
    """Return the first `MOST_MODULES` (15) modules, and all others together as one more entry, if there are
    any.

    ``parts``: (path, bytes, % of the peak), largest first. The root, whose path is "", gets a name.
    """
    modules = [(name or words.get("text.root"), size, share) for name, size, share in parts]
    rest = modules[MOST_MODULES:]
    if not rest:
        return modules
    size = predicted(sum(size.value or 0 for _, size, _ in rest), "bytes")
    share = predicted(sum(share.value or 0 for _, _, share in rest), "percent")
    label = words.get("terminal.more_modules", count=len(rest))
    return [*modules[:MOST_MODULES], (label, size, share)]


def _shares(title: str, parts: Parts, words: Words) -> Table:
    mark = words.get("mark.predicted")
    table = new_table([title, f"{words.get('column.memory')}\n{mark}", words.get("column.share")])
    for name, size, share in parts:
        table.add_row(Text(name), Text(figure_text(size, words)), Text(figure_text(share, words)))
    return table
