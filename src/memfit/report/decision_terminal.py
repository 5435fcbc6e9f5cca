"""The decision in a terminal: the four answers, the ways side by side, what is still asked for."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from memfit.report.decision import DecisionView, decision_view
from memfit.report.figures import figure_text, sentence_text
from memfit.report.terminal import new_table
from memfit.report.words import Words, load_words
from memfit.types.decision import Decision
from memfit.types.result import Poc

_COLUMNS = ("initial", "running_per_year", "present_cost", "cost_per_run")


def print_decision(poc: Poc, made: Decision, *, console: Console, lang: str) -> None:
    """Raises UserError for an unknown `lang`."""
    words, view = load_words(lang), decision_view(poc, made)
    for name, sentences in view.questions.items():
        console.print(Text(words.get(f"decide.{name}_q"), style="bold"))
        for sentence in sentences:
            console.print(Text(f"  {sentence_text(sentence, words).strip()}"))
    if view.best is not None:
        _print_ways(view, console, words)
    if made.asked:
        console.print(Text(words.get("decide.asked"), style="bold"))
        for key in made.asked:
            console.print(Text(f"  {words.get(f'ask.{key}')}  ({key})"))
        console.print(Text(words.get("lead.terms"), style="dim"))


def _print_ways(view: DecisionView, console: Console, words: Words) -> None:
    names = ("way", *_COLUMNS)
    table = new_table([*(words.get(f"money.{name}") for name in names), words.get("money.saved")])
    for row in view.ways:
        name = sentence_text(row.name, words)
        notes = [
            words.get("way.plain") if row.plain else row.plan,
            *([words.get("way.best")] if row.best else []),
            *([words.get("way.reference")] if row.reference else []),
            *([] if row.enough else [words.get("way.not_enough")]),
        ]
        if row.slot != "nothing":
            name = f"{name} ({', '.join(notes)})"
        figures = [figure_text(row.money[column], words) for column in _COLUMNS]
        saved = "–" if row.saved.value is None else figure_text(row.saved, words)
        table.add_row(Text(name), *map(Text, figures), Text(saved), style="bold" if row.best else "")
    console.print(table)
    if view.saved_low.value is not None:
        told = {
            "saved": view.saved, "low": view.saved_low, "high": view.saved_high, "chance": view.chance,
        }  # fmt: skip
        line = words.get("uncertainty.interval", **{k: figure_text(f, words) for k, f in told.items()})
        console.print(Text(line))
    if view.payback is not None:
        console.print(Text(sentence_text(view.payback, words)))
