"""A number with its unit and source, and the functions that turn it into text."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any, Final, TypeVar, cast

from memfit.report.words import Words
from memfit.types.units import format_bytes, format_seconds

T = TypeVar("T")


class Mark(enum.StrEnum):
    """How a number is known. A number computed from several takes the weakest of their marks."""

    MEASURED = "measured"  # read or counted in this PoC
    PREDICTED = "predicted"  # computed before running
    ASSUMED = "assumed"  # chosen in advance, or published by others and not checked here


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number with unit, mark and source.

    ``unit``: bytes, s, j, usd, g, count, parameters, ratio, percent, saving (in percent), times, points,
    rate (a bare number with more digits), years, hours, steps, runs, factor, ``money SYMBOL DECIMALS``, or
    another one, such as the metric's, that is shown after the number. ``value`` is None if it is unknown.
    ``signed``: whether a positive value has a plus sign. ``source``: anchor of the record it comes from; a
    page that lists its records shows no figure without one. ``live``: name by which the page's script finds
    it.
    """

    value: float | None
    unit: str
    mark: Mark
    signed: bool = False
    source: str = ""
    live: str = ""  # set if the figure follows the sliders of the page


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """A key of the word catalogs with the values of its placeholders: figures, texts by others, or further
    sentences.
    """

    key: str
    values: Mapping[str, Figure | str | Sentence] = dataclasses.field(default_factory=dict)


def measured(value: float | None, unit: str, source: str = "") -> Figure:
    """Return a measured figure; ``source``: anchor of its record."""
    return Figure(value=value, unit=unit, mark=Mark.MEASURED, source=source)


def predicted(value: float | None, unit: str, source: str = "") -> Figure:
    """Return a predicted figure; ``source``: anchor of its record."""
    return Figure(value=value, unit=unit, mark=Mark.PREDICTED, source=source)


def assumed(value: float | None, unit: str, source: str = "") -> Figure:
    """Return an assumed figure; ``source``: anchor of its record."""
    return Figure(value=value, unit=unit, mark=Mark.ASSUMED, source=source)


def sourced(value: T, source: str) -> T:
    """Return the value with ``source`` set on every figure in it that has none.

    Figures are found in tuples, mappings and dataclasses of this package, also nested ones; other values are
    returned as they are.
    """
    result: Any = value
    if isinstance(value, Figure):
        result = value if value.source else dataclasses.replace(value, source=source)
    elif isinstance(value, tuple):
        result = tuple(sourced(item, source) for item in value)
    elif isinstance(value, Mapping):
        result = {key: sourced(item, source) for key, item in value.items()}
    elif dataclasses.is_dataclass(value) and type(value).__module__.startswith("memfit.report."):
        names = [f.name for f in dataclasses.fields(value)]
        result = dataclasses.replace(value, **{n: sourced(getattr(value, n), source) for n in names})  # type: ignore[type-var]
    return cast(T, result)


_SCALES: Final[Mapping[str, tuple[tuple[float, str], ...]]] = {
    "j": ((3.6e6, "kWh"), (3.6e3, "Wh"), (1.0, "J"), (1e-3, "mJ")),
    "g": ((1e6, "t"), (1e3, "kg"), (1.0, "g"), (1e-3, "mg"), (1e-6, "µg")),
    "parameters": ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, "")),
}


_WHOLE: Final = ("years", "hours", "steps", "runs")  # shown without decimals if they are whole
# these units are words of a language; figure_text adds them
_WORDED: Final = ("ratio", "points", "years", "hours", "steps", "runs", "factor")
MANY: Final = -200.0  # % saved: a larger loss is also given as a multiple
_PERCENT: Final = dict.fromkeys(("percent", "saving", "percentage points"), " %")
_SUFFIXES: Final = {"": ""} | _PERCENT | dict.fromkeys(_WORDED, "")


def difference_unit(unit: str) -> str:
    """Return the unit of a difference of two values in ``unit``: points for "%" and "percentage points",
    otherwise the same unit."""
    return "points" if unit in ("%", "percentage points") else unit


def number_text(value: float, unit: str) -> str:
    """Format ``(2048, "bytes")`` as ``2 KiB``. Other numbers have three significant digits, or two below 1,
    unless their unit has a form of its own: money is exact to the coin, a rate has five digits, a whole count
    all of them. Units that are words of a language are not added."""
    if unit == "bytes":
        return format_bytes(value)
    if unit == "s":
        return format_seconds(value)
    if unit.startswith("money "):
        return _cash(value, unit)
    if unit == "usd":
        return f"${_plain(value, 3)}" if value >= 1e-6 or value == 0 else f"${value:.1e}"
    if unit in _SCALES:
        return _scaled(value, _SCALES[unit])
    if unit == "rate":
        return _plain(value, 5)
    if unit == "count" or (unit in _WHOLE and float(value).is_integer()):
        return f"{value:,.0f}" if float(value).is_integer() else _plain(value, 3)
    digits = 2 if abs(value) < 1 else 3
    return f"{_plain(value, digits)}{_SUFFIXES.get(unit, f' {unit}')}"


def _cash(value: float, unit: str) -> str:
    """Format ``(1234.5, "money $ 2")`` as ``$1,234.50``, to the smallest coin, with the sign before the
    symbol.
    """
    _, symbol, decimals = unit.split(" ")
    text = f"{abs(value):,.{int(decimals)}f}"
    sign = "-" if value < 0 and any(c in "123456789" for c in text) else ""
    return f"{sign}{symbol}{text}"


def figure_text(figure: Figure, words: Words) -> str:
    """Format the figure in the language of ``words``. A value that is unknown or not finite is said to be not
    measured, not predicted or not known, by its mark."""
    if figure.value is None or not math.isfinite(figure.value):
        return words.get(f"missing.{figure.mark}")
    if figure.unit == "times":
        return _times(figure.value)
    sign = "+" if figure.signed and figure.value > 0 else ""
    unit = words.translations.get(figure.unit, figure.unit)  # unit of a job's own metric
    text = (sign + number_text(figure.value, unit)).replace("-", "\u2212")
    if figure.unit == "saving" and figure.value < MANY:
        return words.get("unit.many", value=text, times=_times(1 - figure.value / 100))
    return words.get(f"unit.{figure.unit}", value=text) if figure.unit in _WORDED else text


def _times(ratio: float) -> str:
    """Format a multiple with the precision used in running text: ``3.4``, ``31``."""
    return _plain(ratio, 2) if ratio < 10 else f"{math.floor(ratio + 0.5):,}"


def sentence_text(sentence: Sentence, words: Words) -> str:
    """Return the sentence as text in the language of ``words``."""
    return words.get(sentence.key, **{k: value_text(v, words) for k, v in sentence.values.items()})


def value_text(value: Figure | str | Sentence, words: Words) -> str:
    """Return a figure, a text or a sentence as text in the language of ``words``."""
    if isinstance(value, Figure):
        return figure_text(value, words)
    return words.of(value) if isinstance(value, str) else sentence_text(value, words)


def _scaled(value: float, scales: tuple[tuple[float, str], ...]) -> str:
    scale, name = next((s for s in scales if abs(value) >= s[0]), scales[-1])
    return f"{_plain(value / scale, 3)} {name}".rstrip()


def _plain(value: float, digits: int) -> str:
    """Format with `digits` significant digits, never in exponent form: ``0.00012``, ``1,230``. At most nine
    decimals are shown, so that tinier values appear as zero."""
    value = float(f"{value:.{digits - 1}e}")
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 9)}f}"
