"""A number with its unit and source, and the functions that turn it into text."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any, Final, TypeVar, cast

from memfit.report.plan_words import in_words
from memfit.report.words import Words
from memfit.types.units import format_bytes, format_seconds

T = TypeVar("T")


class Mark(enum.StrEnum):
    """How a number is known: measured, predicted or assumed."""

    MEASURED = "measured"  # read or counted in this PoC
    PREDICTED = "predicted"  # computed before running
    ASSUMED = "assumed"  # chosen in advance, or published by others and not checked here


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number with unit, mark and source. ``value`` None: unknown.

    ``unit``: "bytes", "s", "j", "usd", "g", "count", "parameters", "ratio", "percent", "saving" (in percent),
    "times" (a multiple), "points" (percentage points), "chance" (a probability in percent, shown as "less
    than 0.1 %" or "more than 99.9 %" at the ends), "rate" (a bare number with more digits), "years", "hours",
    "steps", "runs", "factor", "money SYMBOL DECIMALS" ("money $ 2"), or any other, such as that of a
    job's metric, which is shown after the number. ``signed``: whether a positive value is shown with a plus
    sign. ``source``: anchor of the record it comes from, or "". A page that lists its records shows no known
    figure without one. ``live``: name by which the page's script finds it, or "".
    """

    value: float | None
    unit: str
    mark: Mark
    signed: bool = False
    source: str = ""
    live: str = ""  # set if the figure follows the sliders of the page


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """A sentence that is not yet in a language: a key of the word catalogs, and ``values``, which fill the
    placeholders of its text: name -> figure, text or further sentence."""

    key: str
    values: Mapping[str, Figure | str | Sentence] = dataclasses.field(default_factory=dict)


SentenceValues = Mapping[str, Figure | str | Sentence]


def measured(value: float | None, unit: str, source: str = "") -> Figure:
    """Return a figure marked as measured. ``value`` None: unknown. ``source``: anchor of its record; "" if it
    has none or `sourced` sets it later."""
    return Figure(value=value, unit=unit, mark=Mark.MEASURED, source=source)


def predicted(value: float | None, unit: str, source: str = "") -> Figure:
    """Return a figure marked as predicted. ``value``, ``source``: as in `measured`."""
    return Figure(value=value, unit=unit, mark=Mark.PREDICTED, source=source)


def assumed(value: float | None, unit: str, source: str = "") -> Figure:
    """Return a figure marked as assumed. ``value``, ``source``: as in `measured`."""
    return Figure(value=value, unit=unit, mark=Mark.ASSUMED, source=source)


def sourced(value: T, source: str) -> T:
    """Return ``value`` with ``source`` set on every figure in it whose source is "".

    Figures are found in tuples, mappings and the dataclasses of memfit.report, also nested ones. Anything
    else is returned unchanged.
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
_PERCENT: Final = dict.fromkeys(("percent", "saving", "chance", "percentage points"), " %")
_LOWEST_CHANCE: Final = 0.1  # %; no prediction is so sure that a smaller number would mean anything
_SUFFIXES: Final = {"": ""} | _PERCENT | dict.fromkeys(_WORDED, "")


def difference_unit(unit: str) -> str:
    """Return the unit of the difference of two values in ``unit``: "points" for "%" and "percentage points",
    otherwise ``unit``."""
    return "points" if unit in ("%", "percentage points") else unit


def number_text(value: float, unit: str) -> str:
    """Return a number with its unit: "2 KiB" for ``(2048, "bytes")``.

    Bytes are shown by `format_bytes` and seconds by `format_seconds`. Money is exact to its smallest coin. A
    "rate" has five significant digits. A whole number of the units "count", "years", "hours", "steps" and
    "runs" has all its digits. "usd", "j", "g" and "parameters" have three significant digits; the last three
    are scaled, as in "1.50 kWh", and "usd" below 1e-6 has two digits and an exponent. All others have three
    digits, or two if they are below 1. Units that are words of a language ("ratio", "points", "years",
    "hours", "steps", "runs", "factor") are not added.
    """
    if unit == "bytes":
        return format_bytes(value)
    if unit == "s":
        return format_seconds(value)
    if unit.startswith("money "):
        return _cash(value, unit)
    if unit == "usd":
        return f"${_plain(value, 3)}" if value >= 1e-6 or value == 0 else f"${value:.1e}"
    if unit in _SCALES:
        return _scale_text(value, _SCALES[unit])
    if unit == "rate":
        return _plain(value, 5)
    if unit == "count" or (unit in _WHOLE and float(value).is_integer()):
        return f"{value:,.0f}" if float(value).is_integer() else _plain(value, 3)
    digits = 2 if abs(value) < 1 else 3
    return f"{_plain(value, digits)}{_SUFFIXES.get(unit, f' {unit}')}"


def _cash(value: float, unit: str) -> str:
    """Return money with its symbol: "$1,234.50" for ``(1234.5, "money $ 2")``, where 2 is the number of
    decimals. A minus sign comes before the symbol, and is left out if the shown amount is 0."""
    _, symbol, decimals = unit.split(" ")
    text = f"{abs(value):,.{int(decimals)}f}"
    sign = "-" if value < 0 and any(c in "123456789" for c in text) else ""
    return f"{sign}{symbol}{text}"


def figure_text(figure: Figure, words: Words) -> str:
    """Return the figure as text in the language of ``words``. A value that is None or not finite is shown as
    "not measured", "not predicted" or "not known", for the marks measured, predicted and assumed. A loss of
    more than 200 % (unit "saving") is also given as a multiple."""
    if figure.value is None or not math.isfinite(figure.value):
        return words.get(f"missing.{figure.mark}")
    if figure.unit == "times":
        return _times(figure.value)
    if figure.unit == "chance" and not _LOWEST_CHANCE <= figure.value <= 100 - _LOWEST_CHANCE:
        return words.get("unit.chance_low" if figure.value < _LOWEST_CHANCE else "unit.chance_high")
    sign = "+" if figure.signed and figure.value > 0 else ""
    unit = words.translations.get(figure.unit, figure.unit)  # unit of a job's own metric
    text = (sign + number_text(figure.value, unit)).replace("-", "\u2212")
    if figure.unit == "s":
        return _duration(text, words)
    if figure.unit == "saving" and figure.value < MANY:
        return words.get("unit.many", value=text, times=_times(1 - figure.value / 100))
    return words.get(f"unit.{figure.unit}", value=text) if figure.unit in _WORDED else text


def _duration(text: str, words: Words) -> str:
    """Return a time as `number_text` gives it with its unit in the language of ``words``."""
    value, _, unit = text.rpartition(" ")
    return words.get(f"duration.{unit}", value=value) if f"duration.{unit}" in words.texts else text


def _times(ratio: float) -> str:
    """Return a multiple as in running text: with two significant digits below 10 ("3.4"), else rounded to a
    whole number ("31")."""
    return _plain(ratio, 2) if ratio < 10 else f"{math.floor(ratio + 0.5):,}"


def sentence_text(sentence: Sentence, words: Words, *, plans_in_words: bool = False) -> str:
    """Return the sentence as text in the language of ``words``. ``plans_in_words``: whether plans and
    techniques in it are named in words; otherwise by their identifiers, which commands take."""
    texts = {k: value_text(v, words, plans_in_words=plans_in_words) for k, v in sentence.values.items()}
    return words.get(sentence.key, **texts)


def value_text(value: Figure | str | Sentence, words: Words, *, plans_in_words: bool = False) -> str:
    """Return a figure, a text or a sentence as text in the language of ``words``. A text is translated if the
    catalogs have a translation of it. ``plans_in_words``: as in `sentence_text`."""
    if isinstance(value, Figure):
        return figure_text(value, words)
    if isinstance(value, Sentence):
        return sentence_text(value, words, plans_in_words=plans_in_words)
    return in_words(value, words) if plans_in_words else words.of(value)


def _scale_text(value: float, scales: tuple[tuple[float, str], ...]) -> str:
    scale, name = next((s for s in scales if abs(value) >= s[0]), scales[-1])
    return f"{_plain(value / scale, 3)} {name}".rstrip()


def _plain(value: float, digits: int) -> str:
    """Return ``value`` rounded to ``digits`` significant digits, with commas and never in exponent form:
    "0.00012", "1,230". At most nine decimals are shown, so values below 5e-10 look like zero."""
    value = float(f"{value:.{digits - 1}e}")
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 9)}f}"
