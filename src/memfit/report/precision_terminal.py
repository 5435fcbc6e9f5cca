"""Print precision advice in a terminal."""

from __future__ import annotations

import math
from typing import Final

from rich.console import Console
from rich.text import Text

from memfit.report.terminal import new_table
from memfit.report.words import Words, load_words
from memfit.types.precision import ExaminedModules, PrecisionAdvice

MOST: Final = 12  # most rows for modules that need no island
_COLUMNS: Final = ("module", "why", "alone", "gradient", "autocast", "loss")


def print_advice(advice: PrecisionAdvice, *, console: Console, lang: str) -> None:
    """Print advice on which modules to compute in float32 (islands).

    First a table of the modules that need float32, and the worst `MOST` (12) of the others. Then, each if it
    applies: how many others are not in the table; that the loss function or the root's own code needs
    float32; that no module does, or the ``islands=`` line for the Job without autocast and, if it differs,
    that under autocast; the modules that rely on torch's summing in float32. Last, how far the loss moves
    without and with the islands. Raises UserError for an unknown ``lang``.
    """
    words = load_words(lang)
    title = words.get(
        "precision.title",
        job=advice.job,
        size=advice.size,
        dtype=advice.dtype,
        device=advice.device,
        batches=advice.batches_count,
        steps=advice.trained_steps,
    )
    console.print(Text(title, style="bold"))
    faulty_places = [e for e in advice.examined if e.reason or e.reason_autocast]
    other_places = [e for e in advice.examined if not e.reason and not e.reason_autocast]
    table = new_table([words.get(f"precision.{name}") for name in _COLUMNS], left=2)
    for place in (*faulty_places, *other_places[:MOST]):
        table.add_row(*map(Text, _cells(place, words)))
    console.print(table)
    if hidden_places := other_places[MOST:]:
        console.print(Text(words.get("precision.more", count=len(hidden_places))))
    for place in advice.outside:
        if place.reason or place.reason_autocast:
            location = words.get("precision.root" if place.pattern == "" else "precision.loss_code")
            console.print(Text(words.get("precision.outside", where=location, why=_why(place, words))))
    _print_islands(advice, console, words)


def _cells(place: ExaminedModules, words: Words) -> list[str]:
    loss = "" if place.loss_ratio is None else _percent(place.loss_ratio, words)
    name = place.pattern if place.modules_count == 1 else f"{place.pattern}  ×{place.modules_count}"
    return [
        name,
        _why(place, words),
        _error(place.pure.error_ratio, place.pure.lost, words),
        _percent(place.pure.gradient_ratio, words),
        _error(place.autocast.error_ratio, place.autocast.lost, words),
        loss,
    ]


def _error(ratio: float, lost: str, words: Words) -> str:
    return words.get("precision.lost") if lost else _percent(ratio, words)


def _percent(ratio: float, words: Words) -> str:
    return f"{100 * ratio:.2g} %" if math.isfinite(ratio) and ratio < 100 else words.get("precision.lost")


def _why(place: ExaminedModules, words: Words) -> str:
    reason = place.reason or place.reason_autocast
    if not reason:
        return ""
    return words.get(f"precision.reason.{reason}", what=place.pure.lost or place.autocast.lost)


def _print_islands(advice: PrecisionAdvice, console: Console, words: Words) -> None:
    if not advice.islands and not advice.islands_autocast:
        console.print(Text(words.get("precision.none", dtype=advice.dtype)))
    if advice.islands:
        console.print(Text(words.get("precision.pure", dtype=advice.dtype)))
        console.print(Text(_line(advice.islands)))
    if advice.islands_autocast != advice.islands:
        console.print(Text(words.get("precision.under_autocast", device=advice.device)))
        console.print(Text(_line(advice.islands_autocast)))
    if advice.sums:
        worst = max(e.sums_ratio for e in advice.examined if e.pattern in advice.sums)
        text = words.get("precision.sums", names=", ".join(advice.sums), worst=_percent(worst, words))
        console.print(Text(text))
    percents = (_percent(r, words) for r in (advice.loss_ratio, advice.kept_ratio))
    console.print(Text(words.get("precision.whole", **dict(zip(("all", "kept"), percents, strict=True)))))


def _line(islands: tuple[str, ...]) -> str:
    return f"  islands={islands!r}"
