"""Explanations in a terminal: what is alive at the peak, and why two plans differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.text import Text

from memfit.report.explain import Contributor, MemoryChange, PlanDifference, TracedEstimate, contributors
from memfit.report.quantities import Figure, Mark, figure_text, predicted, sentence_text
from memfit.report.terminal import new_table, print_estimate, print_verdict
from memfit.report.words import Words, load_words

MOST: Final = 15
Row = tuple[list[str], list[Figure]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScriptFacts:
    """What is said of a training script beside its estimate. ``needed_bytes``: memory of one device that the
    script needs; ``fits``: whether it fits ``cap_bytes`` and the host. ``notes``: sentences for the user.
    ``growth_bytes``: by how many bytes the memory in use grows with each step. ``steps``: number of the
    script's first optimizer steps that were traced."""

    program: str
    model: str
    parameter_count: int
    trainable_count: int
    optimizers: tuple[str, ...]
    machine: str
    ranks: int
    cap_bytes: int
    needed_bytes: int
    fits: bool
    notes: tuple[str, ...]
    steps: int
    growth_bytes: int = 0


def print_script(explained: TracedEstimate, facts: ScriptFacts, *, console: Console, lang: str) -> None:
    """Print the estimate of a script's training step: what the script trains, whether it fits, notes, and
    then what `print_explained` prints. Raises UserError for an unknown ``lang``."""
    words = load_words(lang)
    line = words.get(
        "script.line",
        program=facts.program,
        model=facts.model or words.get("script.no_model"),
        parameters=figure_text(predicted(facts.parameter_count, "parameters"), words),
        trainable=figure_text(predicted(facts.trainable_count, "parameters"), words),
        optimizer=", ".join(facts.optimizers),
        machine=words.of(facts.machine),
        ranks=facts.ranks,
    )
    console.print(Text(line))
    print_verdict(
        explained.estimate,
        needed_bytes=facts.needed_bytes,
        cap_bytes=facts.cap_bytes,
        fits=facts.fits,
        console=console,
        words=words,
    )
    if facts.growth_bytes:
        rate = figure_text(predicted(facts.growth_bytes, "bytes"), words)
        steps = max(0, facts.cap_bytes - facts.needed_bytes) // facts.growth_bytes
        key = "grows_to_cap" if facts.fits else "grows"
        console.print(Text(words.get(f"script.{key}", rate=rate, steps=f"{steps:,}"), style="bold red"))
    for note in facts.notes:
        console.print(Text(words.get("script.note", note=words.of(note)), style="yellow"))
    print_explained(
        explained,
        console=console,
        lang=lang,
        title=words.get("script.title"),
        not_included="script.not_included",
    )


def print_explained(
    explained: TracedEstimate, *, console: Console, lang: str, title: str | None = None, **how: str
) -> None:
    """Print the estimate (see `print_estimate`, which gets ``how``), then a table of what is alive at its
    peak: the `MOST` (15) largest contributors, and all others as one row. Raises UserError for an unknown
    ``lang``."""
    words, parts = load_words(lang), contributors(explained)
    print_estimate(explained.estimate, console=console, lang=lang, title=title, **how)
    rows = [([*_who(c, words), c.line], _sizes(c.size_bytes, c.count)) for c in parts[:MOST]]
    if rest := parts[MOST:]:
        label = words.get("explain.more", count=len(rest))
        total = _sizes(sum(c.size_bytes for c in rest), sum(c.count for c in rest))
        rows.append(([label, "", "", ""], total))
    console.print(Text(words.get("explain.contributors"), style="bold"))
    _print(("category", "module", "op", "line"), ("memory", "count"), rows, console=console, words=words)


def print_difference(difference: PlanDifference, *, console: Console, lang: str) -> None:
    """Print why two plans differ: sentences, then tables with the bytes of both plans and their change by
    category, by phase, and by operator of a module; of the last the `MOST` (15) largest changes, and all
    others as one row. Raises UserError for an unknown ``lang``."""
    words = load_words(lang)
    console.print(Text(words.get("explain.difference"), style="bold"))
    for sentence in difference.sentences:
        console.print(Text(sentence_text(sentence, words)))
    for kind, first, second, changes in (
        (
            "category",
            difference.first.at_peak_bytes,
            difference.second.at_peak_bytes,
            difference.by_category_bytes,
        ),
        (
            "phase",
            difference.first.phase_peak_bytes,
            difference.second.phase_peak_bytes,
            difference.by_phase_bytes,
        ),
    ):
        rows = [
            ([words.name(kind, name)], _changes(first.get(name, 0), second.get(name, 0))) for name in changes
        ]
        _print((kind,), ("first", "second", "change"), rows, console=console, words=words)
    console.print(Text(words.get("explain.movers"), style="bold"))
    movers = [(_who(m, words), _changes(m.first_bytes, m.second_bytes)) for m in difference.movers[:MOST]]
    if rest := difference.movers[MOST:]:
        label = words.get("explain.more", count=len(rest))
        total = _changes(sum(m.first_bytes for m in rest), sum(m.second_bytes for m in rest))
        movers.append(([label, "", ""], total))
    _print(("category", "module", "op"), ("first", "second", "change"), movers, console=console, words=words)


def _who(part: Contributor | MemoryChange, words: Words) -> list[str]:
    return [words.name("category", part.category), part.module or words.get("text.root"), part.op]


def _sizes(size_bytes: int, count: int) -> list[Figure]:
    return [predicted(size_bytes, "bytes"), predicted(count, "count")]


def _changes(first_bytes: int, second_bytes: int) -> list[Figure]:
    change = Figure(value=second_bytes - first_bytes, unit="bytes", mark=Mark.PREDICTED, signed=True)
    return [predicted(first_bytes, "bytes"), predicted(second_bytes, "bytes"), change]


def _print(
    texts: Sequence[str], numbers: Sequence[str], rows: Sequence[Row], *, console: Console, words: Words
) -> None:
    columns = [words.get(f"column.{name}") for name in (*texts, *numbers)]
    table = new_table(columns, left=len(texts))
    for cells, figures in rows:
        table.add_row(*map(Text, [*cells, *(figure_text(f, words) for f in figures)]))
    console.print(table)
