"""Rows beside their predictions, and how large the errors are."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import statistics
import tomllib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from memfit.types.errors import UserError
from published.predict import forget, predict
from published.quantities import GIB, amount
from published.rows import Setup, card_bytes, measured_of, setup_of
from published.step_time import measured_s, timed
from published.step_time import predicted as seconds_of

_COMPARABLE = Path(__file__).parent / "comparable.toml"
FULL_RATIO = 0.94  # of the card: above it the allocator's cache is what fills it


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Seconds of a step beside what the source gave: ``unit`` and ``value`` in its own words. ``predicted_s``
    None: refused, for ``reason``. ``busy_s``: what the predicted step's seconds are of, by resource."""

    unit: str
    value: float
    measured_s: float | None = None
    predicted_s: float | None = None
    busy_s: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reason: str = ""

    @property
    def error(self) -> float | None:
        if self.predicted_s is None or not self.measured_s:
            return None
        return self.predicted_s / self.measured_s - 1

    @property
    def predicted(self) -> float | None:
        """In the source's own unit."""
        if self.error is None:
            return None
        return self.value * (1 + self.error) if self.unit == "step_time_s" else self.value / (1 + self.error)

    def as_row(self) -> dict[str, Any]:
        return {
            "step_s": self.predicted_s,
            "measured_step_s": self.measured_s,
            "step_error": self.error,
            "speed_unit": self.unit,
            "measured_speed": self.value,
            "predicted_speed": self.predicted,
            "busy_s": dict(self.busy_s),
            "step_reason": self.reason,
        }


_SPEEDS = ("tok_s_gpu", "tok_s_total", "samples_s", "step_time_s")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """``predicted_bytes`` None: refused, for ``reason``. ``measured_bytes`` None: no memory was published.
    ``compared``: which of the predicted numbers is the source's own."""

    id: str
    source: str
    quality: str
    metric: str
    compared: str = ""
    measured_bytes: float | None = None
    predicted_bytes: float | None = None
    reason: str = ""
    full: bool = False  # the measured number is within 6 % of the card
    sure: bool = True  # of the measured number's unit
    reference: bool = False  # a paper's formula, not a measurement
    state: str = ""  # of system and code, where the source tells some of its rows apart (comparable.toml)
    speed: Speed | None = None  # None: no speed was published

    @property
    def error(self) -> float | None:
        if self.predicted_bytes is None or not self.measured_bytes:
            return None
        return self.predicted_bytes / self.measured_bytes - 1

    def as_row(self) -> dict[str, Any]:
        """Sizes in GiB."""
        return {
            "id": self.id,
            "quality": self.quality,
            "mem_metric": self.metric,
            "measured": _gib(self.measured_bytes),
            "predicted": _gib(self.predicted_bytes),
            "error": self.error,
            "compared": self.compared,
            "reason": self.reason,
            "source": self.source,
            "card_full": self.full,
            "unit_sure": self.sure,
            "reference": self.reference,
            "state": self.state,
            **(self.speed.as_row() if self.speed else {}),
        }


def _gib(size_bytes: float | None) -> float | None:
    return None if size_bytes is None else size_bytes / GIB


def score(row: Mapping[str, str]) -> Scored:
    """One row can be odd in ways that nobody foresaw: it is then refused, and the others go on."""
    found = Scored(
        id=row["id"],
        source=row["group"],
        quality=row["quality"],
        metric=row["mem_metric"],
        reference=row["scope"] == "analytic_reference",
        state=state_of(row),
    )
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = _tried(lambda: measured_of(row), lambda why: None)
        if measured is not None:  # known also of a row that is refused
            found = dataclasses.replace(
                found, compared=measured.kind, measured_bytes=measured.size_bytes, sure=measured.sure
            )
        found = _tried(lambda: _scored(row, found), lambda why: dataclasses.replace(found, reason=why))
        unit = _tried(lambda: next((c for c in _SPEEDS if _number_in(row, c)), None), lambda why: None)
        if unit is None or found.reference:
            return found
        bare = Speed(unit=unit, value=_number_in(row, unit))
        speed = _tried(lambda: _timed(row, bare), lambda why: dataclasses.replace(bare, reason=why))
    return dataclasses.replace(found, speed=speed)


def state_of(row: Mapping[str, str]) -> str:
    """Empty where the source says nothing: its rows are comparable."""
    told = told_apart().get(row["group"])
    if told is None:
        return ""
    if told["apart"][0] in row["notes"]:
        return f"apart: {row['id']}"
    day = re.match(r"\d\d-\d\d", row["notes"])
    past = [since for since, _ in told["since"] if day and since <= day[0]]
    return f"from {past[-1]}" if past else f"before {told['since'][0][0]}"


@functools.cache
def told_apart() -> Mapping[str, Any]:
    return tomllib.loads(_COMPARABLE.read_text(encoding="utf-8"))


_Found = TypeVar("_Found")


def _tried(made: Callable[[], _Found], refused: Callable[[str], _Found]) -> _Found:
    try:
        return made()
    except UserError as error:
        return refused(str(error))
    except Exception as error:  # noqa: BLE001
        first = str(error).strip().partition("\n")[0]
        return refused(f"failed: {type(error).__name__}: {first}"[:200])


def _number_in(row: Mapping[str, str], column: str) -> float:
    return amount(row.get(column, ""))


def _timed(row: Mapping[str, str], bare: Speed) -> Speed:
    setup = timed(setup_of(row))
    measured = measured_s(setup)
    if not measured:
        raise UserError("the row does not say how many tokens or samples a step has")
    found = dataclasses.replace(bare, measured_s=measured)
    try:
        played = seconds_of(setup)
    except UserError as error:
        return dataclasses.replace(found, reason=str(error))
    return dataclasses.replace(found, predicted_s=played.step_s, busy_s=played.busy_s)


def _scored(row: Mapping[str, str], found: Scored) -> Scored:
    setup = setup_of(row)
    measured, card = setup.measured, card_bytes(row)
    if measured is not None:
        full = bool(card) and measured.size_bytes / _times_counted(setup) > FULL_RATIO * card
        found = dataclasses.replace(found, full=full)
    if found.reference:
        return dataclasses.replace(found, reason="a paper's formula, not a measurement")
    try:
        predicted, compared = _number(setup)
    except UserError as error:
        return dataclasses.replace(found, reason=str(error))
    return dataclasses.replace(found, predicted_bytes=predicted, compared=compared)


def _number(setup: Setup) -> tuple[float, str]:
    """The number of a prediction that the source's own metric is, and its name."""
    found = predict(setup)
    kind = setup.measured.kind if setup.measured else "allocated"
    if kind == "resident":
        return found.resident_bytes, "resident"
    if kind == "device" and found.device_bytes:
        return found.device_bytes, "device"
    if kind in ("device", "reserved") and found.reserved_bytes:
        return found.reserved_bytes, "reserved"
    return found.allocated_bytes * _times_counted(setup), "allocated"


def _times_counted(setup: Setup) -> float:
    """A source that sums more measurements than it divides by says so in its notes; one that adds up its
    devices, in its metric."""
    found = re.search(r"averages (\d+) trials over (\d+)", setup.row["notes"])
    times = int(found[1]) / int(found[2]) if found else 1.0
    total = re.search(r"total over (all )?(gpus|devices|ranks)|sum over", setup.row["mem_metric"].lower())
    return times * math.prod(setup.ranks[k] for k in ("dp", "tp", "pp", "cp")) if total else times


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Errors are absolute ratios; a refused row counts in ``rows`` and not in ``predicted``."""

    name: str
    rows: int
    predicted: int
    median: float | None
    median_of_sources: float | None
    worst: float | None


def _allocated(s: Scored) -> bool:
    return bool(re.search("alloc|active", s.metric.lower()))


_GROUPS: tuple[tuple[str, Callable[[Scored], bool]], ...] = (
    ("allocated, quality A", lambda s: _allocated(s) and s.quality == "A"),
    ("allocated, all", _allocated),
    (
        "reserved and nvidia-smi below 94 % of the card",
        lambda s: bool(re.search("reserved|nvidia-smi|nvml", s.metric.lower())) and not s.full and s.sure,
    ),
    ("all with a measurement", lambda s: True),
)


def summaries(scored: Sequence[Scored]) -> list[Summary]:
    known = [s for s in scored if s.measured_bytes and not s.reference]
    return [_summary(name, [s for s in known if belongs(s)]) for name, belongs in _GROUPS]


def _summary(name: str, scored: Sequence[Scored]) -> Summary:
    errors = [(s.source, abs(s.error)) for s in scored if s.error is not None]
    sources = sorted({source for source, _ in errors})
    each = [statistics.median(e for source, e in errors if source == one) for one in sources]
    return Summary(
        name=name,
        rows=len(scored),
        predicted=len(errors),
        median=statistics.median(e for _, e in errors) if errors else None,
        median_of_sources=statistics.median(each) if each else None,
        worst=max((e for _, e in errors), default=None),
    )


# -- time -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Of rows with a speed: absolute errors of the step's seconds. ``within``: the share at most 30 % off."""

    name: str
    rows: int
    predicted: int
    median: float | None
    within: float | None
    worst: float | None
    sources: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Rows of one source in one unit: how well their order is kept. ``rank``: Spearman's correlation;
    ``pairs``: the share of pairs in the right order (measured within 2 % of each other: no order).
    ``comparable``: False for all rows of a source that says not to compare some of them."""

    name: str
    unit: str
    rows: int
    rank: float
    pairs: float
    told: int  # pairs that have an order
    median: float
    comparable: bool = True


def times(scored: Sequence[Scored]) -> list[Times]:
    known = [s for s in scored if s.speed is not None]
    named: list[tuple[str, list[Scored]]] = [
        ("all with a speed", known),
        ("quality A", [s for s in known if s.quality == "A"]),
        ("quality B and C", [s for s in known if s.quality != "A"]),
    ]
    return [_times(name, rows) for name, rows in named]


def _times(name: str, rows: Sequence[Scored]) -> Times:
    errors = [abs(s.speed.error) for s in rows if s.speed and s.speed.error is not None]
    return Times(
        name=name,
        rows=len(rows),
        predicted=len(errors),
        median=statistics.median(errors) if errors else None,
        within=sum(e <= 0.30 for e in errors) / len(errors) if errors else None,
        worst=max(errors, default=None),
        sources=len({s.source for s in rows}),
    )


def sweeps(scored: Sequence[Scored]) -> list[Sweep]:
    """Every source with at least two comparable rows of one unit, the largest first; where a source tells its
    rows apart, all of them together too."""
    groups: dict[tuple[str, str], list[tuple[str, Speed]]] = {}
    for s in scored:
        if s.speed is not None and s.speed.predicted is not None:
            groups.setdefault((s.source, s.speed.unit), []).append((s.state, s.speed))
    found = []
    for (name, unit), rows in groups.items():
        states: dict[str, list[Speed]] = {}
        for state, speed in rows:
            states.setdefault(state, []).append(speed)
        found += [_sweep(f"{name} {state}".strip(), unit, speeds) for state, speeds in states.items()]
        if len(states) > 1:
            whole = _sweep(f"{name}, all", unit, [speed for _, speed in rows])
            found.append(dataclasses.replace(whole, comparable=False))
    return sorted((s for s in found if s.rows > 1), key=lambda s: (not s.comparable, -s.rows))


def _sweep(name: str, unit: str, speeds: Sequence[Speed]) -> Sweep:
    true, made = [s.value for s in speeds], [s.predicted or 0.0 for s in speeds]
    pairs = [
        (a - b) * (p - q) > 0
        for (a, p), (b, q) in itertools.combinations(zip(true, made, strict=True), 2)
        if abs(a / b - 1) > 0.02
    ]
    return Sweep(
        name=name,
        unit=unit,
        rows=len(speeds),
        rank=_spearman(true, made),
        pairs=sum(pairs) / len(pairs) if pairs else 1.0,
        told=len(pairs),
        median=statistics.median(abs(s.error or 0.0) for s in speeds),
    )


def _spearman(one: Sequence[float], other: Sequence[float]) -> float:
    ranks = [_ranks(values) for values in (one, other)]
    if min(len(set(r)) for r in ranks) == 1:
        return 1.0
    return statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]
