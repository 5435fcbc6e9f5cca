"""Rows beside their predictions, and how large the errors are (PROTOCOL.md)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from memfit.cost.estimate import KERNELS_TIME_RATIO, interval_of_rates
from memfit.types.errors import UserError
from published.alternatives import alternatives
from published.checks import contradictions
from published.predict import Prediction, apart, forget, predict
from published.rows import SPEEDS, Setup, setup_of, unit_sure
from published.schema import GIB, Row, assumed, problems
from published.step_time import measured_s, timed
from published.step_time import predicted as seconds_of

FULL_RATIO = 0.94  # of the card: above it the allocator's cache is what fills it
WITHIN = 0.30
STEP_RANGE = interval_of_rates(1.0, KERNELS_TIME_RATIO)  # where kernels' shares are known


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
    def inside(self) -> bool:
        """Whether the measured step lies in the interval of memfit's answers."""
        return self.error is not None and STEP_RANGE.low <= 1 / (1 + self.error) <= STEP_RANGE.high

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
            "step_inside": self.inside,
            "speed_unit": self.unit,
            "measured_speed": self.value,
            "predicted_speed": self.predicted,
            "busy_s": dict(self.busy_s),
            "step_reason": self.reason,
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """``rejected``: the row contradicts the schema or itself, for ``reason``. ``predicted_bytes`` None and
    not rejected: refused, for ``reason``. ``measured_bytes`` None: no memory was published. ``kind``: what
    was measured; ``compared``: which of the predicted numbers stands beside it. ``ends``: those of memfit's
    interval over the predicted number. ``others``: the number, in bytes, where a column that the source does
    not state has another value. ``low``, ``high``: the ends of the interval over all of these, over the
    predicted number."""

    id: str
    source: str
    quality: str
    kind: str = ""
    house: str = ""
    blind: str = ""
    compared: str = ""
    measured_bytes: float | None = None
    predicted_bytes: float | None = None
    ends: tuple[float, float] = (1.0, 1.0)
    others: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reason: str = ""
    rejected: bool = False
    full: bool = False  # the measured number is within 6 % of the card
    sure: bool = True  # of the measured number's unit
    reference: bool = False  # a paper's formula, not a measurement
    state: str = ""
    speed: Speed | None = None  # None: no speed was published

    @property
    def error(self) -> float | None:
        if self.predicted_bytes is None or not self.measured_bytes:
            return None
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def low(self) -> float:
        return self.ends[0] * min((1.0, *self._over_predicted()))

    @property
    def high(self) -> float:
        """A number whose unit is not sure may count units of powers of ten, of which there are more."""
        return self.ends[1] * max((1.0, *self._over_predicted())) * (1.0 if self.sure else GIB / 1e9)

    def _over_predicted(self) -> Iterator[float]:
        return (other / (self.predicted_bytes or math.inf) for other in self.others.values())

    @property
    def inside(self) -> bool:
        if self.error is None:
            return False
        return self.low <= 1 / (1 + self.error) <= self.high

    def as_row(self) -> dict[str, Any]:
        """Sizes in GiB."""
        return {
            "id": self.id,
            "source": self.source,
            "house": self.house,
            "blind": self.blind,
            "quality": self.quality,
            "kind": self.kind,
            "measured": _gib(self.measured_bytes),
            "predicted": _gib(self.predicted_bytes),
            "error": self.error,
            "interval": [self.low, self.high],
            "ends": list(self.ends),
            "others": {name: _gib(size) for name, size in self.others.items()},
            "inside": self.inside,
            "compared": self.compared,
            "reason": self.reason,
            "rejected": self.rejected,
            "card_full": self.full,
            "unit_sure": self.sure,
            "reference": self.reference,
            "state": self.state,
            **(self.speed.as_row() if self.speed else {}),
        }


def _gib(size_bytes: float | None) -> float | None:
    return None if size_bytes is None else size_bytes / GIB


def scored_of(row: Mapping[str, Any]) -> Scored:
    """The inverse of `Scored.as_row`."""

    def size(gib: float | None) -> float | None:
        return None if gib is None else gib * GIB

    return Scored(
        **{key: row[key] for key in ("id", "source", "house", "blind", "quality", "kind", "compared")},
        **{key: row[key] for key in ("reason", "rejected", "reference", "state")},
        measured_bytes=size(row["measured"]),
        predicted_bytes=size(row["predicted"]),
        ends=tuple(row.get("ends", row["interval"])),  # in older records that is all
        others={name: gib * GIB for name, gib in row.get("others", {}).items()},
        full=row["card_full"],
        sure=row["unit_sure"],
        speed=speed_of(row),
    )


def speed_of(row: Mapping[str, Any]) -> Speed | None:
    """That of a row as `Scored.as_row` gives it."""
    if "speed_unit" not in row:
        return None
    return Speed(
        unit=row["speed_unit"],
        value=row["measured_speed"],
        measured_s=row["measured_step_s"],
        predicted_s=row["step_s"],
        busy_s=row["busy_s"],
        reason=row["step_reason"],
    )


def in_development(source: str) -> bool:
    """Whether what intervals cover may be chosen with the source's rows in view (PROTOCOL.md, 9)."""
    return hashlib.sha256(source.encode()).digest()[0] % 2 == 0


def score(row: Row, *, times: bool = True) -> Scored:
    """Checks before anything is predicted. A row can be odd in ways that nobody foresaw: it is then
    refused, and the others go on. ``times``: whether its step is predicted too."""
    found = Scored(
        id=row["id"],
        source=row["group"],
        quality=row["quality"],
        house=row["house"],
        blind=row["blind"],
        reference=row["scope"] == "analytic_reference",
        state=row["state"],
    )
    if wrong := problems(row) or contradictions(row, setup_of(row)):
        return dataclasses.replace(found, reason="; ".join(wrong), rejected=True)
    setup = setup_of(row)
    if setup.measured is not None:
        measured, kind = setup.measured.size_bytes, setup.measured.kind
        full = measured / setup.measured.scale > FULL_RATIO * setup.card_bytes > 0
        found = dataclasses.replace(
            found, measured_bytes=measured, kind=kind, compared=kind, full=full, sure=unit_sure(row)
        )
    if found.reference:
        return dataclasses.replace(found, reason="a paper's formula, not a measurement")
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if setup.measured is not None:
            found = _tried(
                lambda: _sized(setup, found, assumed(row)), lambda why: dataclasses.replace(found, reason=why)
            )
        unit = next((name for name in SPEEDS if name in setup.speeds), None)
        if unit is None or not times:
            return found
        bare = Speed(unit=unit, value=setup.speeds[unit])
        speed = _tried(lambda: _timed(setup, bare), lambda why: dataclasses.replace(bare, reason=why))
    return dataclasses.replace(found, speed=speed)


_Found = TypeVar("_Found")


def _tried(made: Callable[[], _Found], refused: Callable[[str], _Found]) -> _Found:
    try:
        return made()
    except UserError as error:
        return refused(str(error))
    except Exception as error:  # noqa: BLE001
        first = str(error).strip().partition("\n")[0]
        return refused(f"failed: {type(error).__name__}: {first}"[:200])


def _timed(setup: Setup, bare: Speed) -> Speed:
    setup = timed(setup)
    measured = measured_s(setup)
    if not measured:
        raise UserError("the row does not say how many tokens or samples a step has")
    found = dataclasses.replace(bare, measured_s=measured)
    try:
        played = seconds_of(setup)
    except UserError as error:
        return dataclasses.replace(found, reason=str(error))
    return dataclasses.replace(found, predicted_s=played.step_s, busy_s=played.busy_s)


def _sized(setup: Setup, found: Scored, open_columns: Iterable[str]) -> Scored:
    assert setup.measured is not None
    kind, scale = setup.measured.kind, setup.measured.scale
    predicted = predict(setup)
    size_bytes, compared = number_of(predicted, kind)
    fits = (
        setup.card_bytes or math.inf
    )  # the run fitted its card, so a value with which it would not was not its
    others = {
        name: scale * other
        for name, changed in alternatives(setup, open_columns, predicted.phase).items()
        if (other := _other(changed, kind)) is not None and other <= fits
    }
    low, high = predicted.ranges["unstated" if kind == "unstated" else compared]
    high = max(1.0, min(high, fits / size_bytes))
    return dataclasses.replace(
        found,
        predicted_bytes=scale * size_bytes,
        compared=compared,
        ends=(low, high),
        others=others,
    )


def _other(setup: Setup, kind: str) -> float | None:
    """The number that is compared, where another value was assumed; None where that is not expressed. Its
    own interval is not needed, and allocated memory, which unstated numbers are compared as, is the
    quickest."""
    assert setup.measured is not None
    measured = dataclasses.replace(setup.measured, kind="allocated" if kind == "unstated" else kind)
    with contextlib.suppress(UserError), apart():
        return number_of(predict(dataclasses.replace(setup, measured=measured)), kind)[0]
    return None


def number_of(predicted: Prediction, kind: str) -> tuple[float, str]:
    """The number of a prediction that a source measured, and its name."""
    if kind == "resident":
        return predicted.resident_bytes, "resident"
    if kind == "device" and predicted.device_bytes:
        return predicted.device_bytes, "device"
    if kind in ("device", "reserved") and predicted.reserved_bytes:
        return predicted.reserved_bytes, "reserved"
    return predicted.allocated_bytes, "allocated"


# -- statistics -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """``error`` None: a miss. ``width``: of the interval, high less low over the predicted value."""

    source: str
    error: float | None
    inside: bool
    width: float = math.nan


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Absolute errors as ratios. ``median_of_sources``: over sources, of each source's median. ``within``,
    ``inside``: shares within 30 % and in the interval, of each source, averaged. ``width``: median of the
    sources' median widths of intervals, of predicted rows. None: a miss decides it, or there is no row."""

    rows: int
    sources: int
    median_of_sources: float | None = None
    median: float | None = None
    worst: float | None = None
    within: float | None = None
    within_rows: float | None = None
    inside: float | None = None
    inside_rows: float | None = None
    width: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Statistic:
    """``predicted``: of the predicted rows; ``all``: refused rows are misses. ``rejected``: rows that are in
    neither."""

    name: str
    predicted: Errors
    all: Errors
    rejected: int


def errors_of(answers: Sequence[Answer]) -> Errors:
    sources: dict[str, list[Answer]] = {}
    for answer in answers:
        sources.setdefault(answer.source, []).append(answer)
    if not answers:
        return Errors(rows=0, sources=0)
    sizes = [[_size(a) for a in own] for own in sources.values()]

    def shares(of: Callable[[Answer], bool]) -> tuple[float, float]:
        each = [statistics.fmean(map(of, own)) for own in sources.values()]
        return statistics.fmean(each), statistics.fmean(map(of, answers))

    within, within_rows = shares(lambda a: _size(a) <= WITHIN)
    inside, inside_rows = shares(lambda a: a.inside)
    widths = [[a.width for a in own if a.error is not None] for own in sources.values()]
    return Errors(
        rows=len(answers),
        sources=len(sources),
        median_of_sources=_finite(statistics.median(map(statistics.median, sizes))),
        median=_finite(statistics.median(itertools.chain(*sizes))),
        worst=_finite(max(itertools.chain(*sizes))),
        within=within,
        within_rows=within_rows,
        inside=inside,
        inside_rows=inside_rows,
        width=_finite(statistics.median([statistics.median(own) for own in widths if own] or [math.nan])),
    )


def _size(answer: Answer) -> float:
    return math.inf if answer.error is None else abs(answer.error)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def statistic(name: str, answers: Sequence[Answer], rejected: int) -> Statistic:
    known = [a for a in answers if a.error is not None]
    return Statistic(name=name, predicted=errors_of(known), all=errors_of(answers), rejected=rejected)


_GROUPS: tuple[tuple[str, Callable[[Scored], bool]], ...] = (
    ("allocated, quality A", lambda s: s.kind == "allocated" and s.quality == "A"),
    ("allocated, all", lambda s: s.kind == "allocated"),
    (
        "reserved and device below 94 % of the card",
        lambda s: s.kind in ("reserved", "device") and not s.full and s.sure,
    ),
    ("all with a measurement", lambda s: True),
    ("all of the development half", lambda s: in_development(s.source)),
    ("all of the test half", lambda s: not in_development(s.source)),
)


def memory(scored: Sequence[Scored]) -> list[Statistic]:
    known = [s for s in scored if s.measured_bytes and not s.reference]
    rejected = sum(s.rejected for s in scored)
    return [
        statistic(name, [_memory_answer(s) for s in known if belongs(s)], rejected)
        for name, belongs in _GROUPS
    ]


def _memory_answer(s: Scored) -> Answer:
    return Answer(source=s.source, error=s.error, inside=s.inside, width=s.high - s.low)


def times(scored: Sequence[Scored]) -> list[Statistic]:
    known = [s for s in scored if s.speed is not None]
    rejected = sum(s.rejected for s in scored)
    named: list[tuple[str, list[Scored]]] = [
        ("all with a speed", known),
        ("quality A", [s for s in known if s.quality == "A"]),
        ("quality B and C", [s for s in known if s.quality != "A"]),
        ("development half", [s for s in known if in_development(s.source)]),
        ("test half", [s for s in known if not in_development(s.source)]),
    ]
    return [
        statistic(
            name,
            [_step_answer(s.source, s.speed) for s in rows if s.speed],
            rejected,
        )
        for name, rows in named
    ]


def _step_answer(source: str, speed: Speed) -> Answer:
    width = STEP_RANGE.high - STEP_RANGE.low
    return Answer(source=source, error=speed.error, inside=speed.inside, width=width)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Rows of one source in one unit: how well their order is kept. ``rank``: Spearman's correlation;
    ``pairs``: the share of pairs in the right order (measured within 2 % of each other: no order).
    ``refused``: rows that are in neither. ``ordered``: pairs that have an order; ``refused_pairs``: such
    with a refused row. ``comparable``: False for all rows of a source that says not to compare some of
    them."""

    name: str
    unit: str
    rows: int
    rank: float
    pairs: float
    ordered: int
    median: float
    refused: int = 0
    refused_pairs: int = 0
    comparable: bool = True


def sweeps(scored: Sequence[Scored]) -> list[Sweep]:
    """Every source with at least two comparable rows of one unit, the largest first; where a source tells its
    rows apart, all of them together too."""
    groups: dict[tuple[str, str], list[tuple[str, Speed]]] = {}
    for s in scored:
        if s.speed is not None:
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
    kept = (s for s in found if s.rows > 1)
    return sorted(kept, key=lambda s: (not s.comparable, -s.rows))


def _sweep(name: str, unit: str, speeds: Sequence[Speed]) -> Sweep:
    known = [s for s in speeds if s.predicted is not None]
    true, made = [s.value for s in known], [s.predicted or 0.0 for s in known]
    pairs = [
        (a - b) * (p - q) > 0
        for (a, p), (b, q) in itertools.combinations(zip(true, made, strict=True), 2)
        if _apart(a, b)
    ]
    every = sum(_apart(a.value, b.value) for a, b in itertools.combinations(speeds, 2))
    return Sweep(
        name=name,
        unit=unit,
        rows=len(known),
        rank=_spearman(true, made) if len(known) > 1 else 1.0,
        pairs=sum(pairs) / len(pairs) if pairs else 1.0,
        ordered=len(pairs),
        median=statistics.median(abs(s.error or 0.0) for s in known) if known else 0.0,
        refused=len(speeds) - len(known),
        refused_pairs=every - len(pairs),
    )


def _apart(a: float, b: float) -> bool:
    return abs(a / b - 1) > 0.02


def _spearman(one: Sequence[float], other: Sequence[float]) -> float:
    ranks = [_ranks(values) for values in (one, other)]
    if min(len(set(r)) for r in ranks) == 1:
        return 1.0
    return statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Of comparable rows. ``ranks``: of sources with five or more. ``pairs``: the share in order over the
    smaller ones. ``*_with_misses``: a refused row makes its pairs wrong, and its source's rank 0."""

    ranks: tuple[float, ...]
    ranks_with_misses: tuple[float, ...]
    small: int
    pairs: float
    pairs_with_misses: float


_LARGE = 5


def order(found: Sequence[Sweep]) -> Order:
    known = [s for s in found if s.comparable]
    large = [s for s in known if s.rows + s.refused >= _LARGE]
    small = [s for s in known if s.rows + s.refused < _LARGE]
    right = sum(s.pairs * s.ordered for s in small)
    return Order(
        ranks=tuple(s.rank for s in large if s.rows >= _LARGE),
        ranks_with_misses=tuple(0.0 if s.refused else s.rank for s in large),
        small=len(small),
        pairs=right / max(1, sum(s.ordered for s in small)),
        pairs_with_misses=right / max(1, sum(s.ordered + s.refused_pairs for s in small)),
    )
