"""The report's chapter on a watched training, from its record: memory against its prediction, free memory,
step time, loss and alarms, per step and rank."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from memfit.monitoring.alarms import alarms_of
from memfit.monitoring.prediction import MEASURED_AS
from memfit.monitoring.record import Alarm, RankRecord, WatchRecord
from memfit.monitoring.summary import RankSummary, WatchSummary, summarize
from memfit.report import charts, report_charts
from memfit.report.provenance import ProvenanceRecord
from memfit.report.quantities import (
    Figure,
    Mark,
    Sentence,
    assumed,
    figure_text,
    measured,
    number_text,
    predicted,
)
from memfit.report.words import Words

WATCH = "record-watch"
_POINTS = 400  # of a line; of more steps, the highest of each stretch is drawn
_MOST_LINES = 16  # ranks that are drawn
_MOST_RANKS, _MOST_ALARMS = 32, 40
_IN_BYTES = frozenset({"creep", "maximum", "above-prediction", "headroom"})
_MEMORY = ("peak_allocated_bytes", "heap_bytes", "host_bytes")  # what is drawn, the first that was measured
Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankRow:
    """One rank in the table. ``name``: its number and machine. ``is_fullest``: whether it has the least free
    memory of several. ``state``: as in `RankSummary`. ``error``: the error that ended it, "" without.
    ``tensors``, ``reserved``, ``device`` and ``host``: highest measured memory. ``energy``:
    joules per step."""

    name: str
    is_fullest: bool
    state: str
    error: str
    step: Figure
    step_time: Figure
    loss: Figure
    tensors: Figure
    reserved: Figure
    device: Figure
    host: Figure
    least_free: Figure
    energy: Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PredictionRow:
    """The highest measured value of all ranks beside what was predicted. ``quantity``: key of its name.
    ``error``: predicted minus measured, in % of measured."""

    quantity: str
    measured: Figure
    predicted: Figure
    low: Figure
    high: Figure
    error: Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WatchChapter:
    """What the chapter on a watched training shows. ``plots``: name ("memory", "free", "time", "loss") -> SVG
    text; those without data are absent. ``hidden_ranks`` and ``hidden_alarms``: how many are not in the table
    and the list, None if all are. ``several``: whether there are several ranks. ``ending``: how the command
    ended, None if memfit did not run it."""

    head: Sentence
    ending: Sentence | None
    ranks: tuple[RankRow, ...]
    predictions: tuple[PredictionRow, ...]
    alarms: tuple[Sentence, ...]
    hidden_ranks: Figure | None
    hidden_alarms: Figure | None
    several: bool
    plots: dict[str, str]


def watch_chapter(record: WatchRecord, words: Words) -> WatchChapter:
    """Return the chapter on a record. All its figures come from the record `watch_record`."""
    totals = summarize(record)
    alarms = alarms_of(record)
    steps = max((r.step for r in totals.ranks if r.step is not None), default=0)
    devices = sorted({r.device_name for r in totals.ranks if r.device_name})
    key = ("watch.head" if devices else "watch.head_processor") + ("_one" if len(totals.ranks) == 1 else "")
    head = Sentence(
        key=key,
        values={"ranks": _count(len(totals.ranks)), "steps": _count(steps), "device": ", ".join(devices)},
    )
    return WatchChapter(
        head=head,
        ending=_ending(totals),
        ranks=tuple(_rank_row(r, totals) for r in totals.ranks[:_MOST_RANKS]),
        predictions=tuple(_prediction_rows(totals)),
        alarms=tuple(_alarm(alarm) for alarm in alarms[-_MOST_ALARMS:]),
        hidden_ranks=_hidden_count(len(totals.ranks), _MOST_RANKS),
        hidden_alarms=_hidden_count(len(alarms), _MOST_ALARMS),
        several=len(totals.ranks) > 1,
        plots={name: svg for name, svg in _plots(record, totals, alarms, words) if svg},
    )


def watch_record(record: WatchRecord) -> ProvenanceRecord:
    """Return the record to which the chapter's figures link. ``record`` has at least one rank."""
    start = next((r.start for r in record.ranks if r.start is not None), None)
    return ProvenanceRecord(
        anchor=WATCH,
        label="W",
        what=Sentence(key="record.watch", values={"file": record.ranks[0].path.name}),
        sources=tuple(r for r in (start.memory_source if start else "",) if r),
        date=start_date(record),
    )


def start_date(record: WatchRecord) -> str:
    """Return the day on which the training began, in UTC, such as "2026-03-01"; "" if it is unknown."""
    import datetime

    times = [r.start.time_s for r in record.ranks if r.start is not None]
    return datetime.datetime.fromtimestamp(min(times), datetime.UTC).date().isoformat() if times else ""


def _count(value: int) -> Figure:
    return measured(value, "count", WATCH)


def _hidden_count(count: int, most: int) -> Figure | None:
    return _count(count - most) if count > most else None


def _ending(totals: WatchSummary) -> Sentence | None:
    if totals.exit is None:
        return None
    killed = totals.exit.code < 0
    values = {"code": _count(abs(totals.exit.code))}
    return Sentence(key="watch.killed" if killed else "watch.exit", values=values)


def _rank_row(rank: RankSummary, totals: WatchSummary) -> RankRow:
    def of(name: str, unit: str, values: dict[str, float] | dict[str, int]) -> Figure:
        return measured(values.get(name), unit, WATCH)

    end = rank.end
    return RankRow(
        name=f"{rank.rank}" + (f" ({rank.host})" if rank.host else ""),
        is_fullest=len(totals.ranks) > 1 and rank.rank == totals.fullest_rank,
        state=rank.state,
        error=f"{end.error}: {end.message.partition(chr(10))[0][:160]}" if end and end.error else "",
        step=measured(rank.step, "count", WATCH),
        step_time=measured(rank.step_s, "s", WATCH),
        loss=of("loss", "rate", rank.latest),
        tensors=of("peak_allocated_bytes", "bytes", rank.peaks),
        reserved=of("peak_reserved_bytes", "bytes", rank.peaks),
        device=of("device_bytes", "bytes", rank.peaks),
        host=of("peak_host_bytes", "bytes", rank.peaks),
        least_free=measured(rank.least_headroom_bytes, "bytes", WATCH),
        energy=measured(rank.energy_j, "j", WATCH),
    )


def _prediction_rows(totals: WatchSummary) -> list[PredictionRow]:
    rows = []
    for name, interval, peak in totals.compared:
        error = Figure(
            value=100 * (interval.value / peak - 1),
            unit="percent",
            mark=Mark.MEASURED,
            signed=True,
            source=WATCH,
        )
        rows.append(
            PredictionRow(
                quantity=f"watch.quantity.{MEASURED_AS[name]}",
                measured=measured(peak, "bytes", WATCH),
                predicted=predicted(interval.value, "bytes", WATCH),
                low=predicted(interval.low, "bytes", WATCH),
                high=predicted(interval.high, "bytes", WATCH),
                error=error,
            )
        )
    return rows


def _alarm(alarm: Alarm) -> Sentence:
    unit = "bytes" if alarm.kind in _IN_BYTES else "rate"
    of_limit = predicted if alarm.kind == "above-prediction" else assumed
    return Sentence(
        key=f"watch.alarm.{alarm.kind}",
        values={
            "step": _count(alarm.step),
            "rank": _count(alarm.rank),
            "quantity": Sentence(key=f"watch.quantity.{alarm.quantity}"),
            "value": measured(alarm.value, unit, WATCH),
            "limit": of_limit(alarm.limit, unit, WATCH),
        },
    )


# -- charts -----------------------------------------------------------------------------------------------


def _plots(
    record: WatchRecord, totals: WatchSummary, alarms: Sequence[Alarm], words: Words
) -> list[tuple[str, str]]:
    memory = next((n for n in _MEMORY if any(r.peak(n) is not None for r in record.ranks)), "")
    key = next((name for name, peak in MEASURED_AS.items() if peak == memory), "")
    interval = totals.prediction.get(key)
    rules = [] if interval is None else [("watch.rule.predicted", interval.value)]
    start = next((r.start for r in record.ranks if r.start is not None), None)
    least = (start.total_bytes or 0) * start.limits.get("headroom_ratio", 0.0) if start is not None else 0.0
    free_rules = [("watch.rule.free", least)] if least else []
    return [
        ("memory", _memory_plot(record, memory, "memory", rules, alarms, words) if memory else ""),
        ("free", _memory_plot(record, "headroom_bytes", "free", free_rules, (), words)),
        ("time", _seconds_plot(record, words)),
        ("loss", _loss_plot(record, words)),
    ]


def _memory_plot(
    record: WatchRecord,
    field: str,
    name: str,
    rules: Sequence[tuple[str, float]],
    alarms: Sequence[Alarm],
    words: Words,
) -> str:
    series = _series(record, field, lowest=name == "free")
    if not series:
        return ""
    values = [v for _, points in series for _, v in points] + [v for _, v in rules]
    title = words.get(f"watch.quantity.{field}")
    y = report_charts.bytes_axis(title, values)
    lines = [
        charts.Rule(value=value, label=words.get(key, value=figure_text(measured(value, "bytes"), words)))
        for key, value in rules
    ]
    at = {(r.rank, s.step): getattr(s, field) for r in record.ranks for s in r.steps}
    dots = [
        charts.Dot(
            css="ablation filled",
            x=alarm.step,
            y=float(value),
            hint=f"{words.get('watch.alarm_kind.' + alarm.kind)} ({alarm.step:,})",
        )
        for alarm in alarms
        if alarm.kind in _IN_BYTES and (value := at.get((alarm.rank, alarm.step))) is not None
    ]
    return _plot(record, name, title, series, y, words, rules=lines, dots=dots)


def _seconds_plot(record: WatchRecord, words: Words) -> str:
    series = _series(record, "step_s")
    values = [v for _, points in series for _, v in points]
    y = charts.axis(words.get("watch.quantity.step_s"), values=values, text=lambda v: number_text(v, "s"))
    return _plot(record, "time", words.get("watch.quantity.step_s"), series, y, words)


def _loss_plot(record: WatchRecord, words: Words) -> str:
    series = _series(record, "loss")
    values = [v for _, points in series for _, v in points]
    y = charts.axis(words.get("watch.quantity.loss"), values=values, zero=False)
    return _plot(record, "loss", words.get("watch.quantity.loss"), series, y, words)


def _plot(
    record: WatchRecord,
    name: str,
    title: str,
    series: Sequence[tuple[int, Points]],
    y: charts.Axis,
    words: Words,
    *,
    rules: Sequence[charts.Rule] = (),
    dots: Sequence[charts.Dot] = (),
) -> str:
    if not series:
        return ""
    fullest = record.fullest.rank if record.fullest is not None and len(record.ranks) > 1 else None
    ordered = sorted(series, key=lambda item: item[0] == fullest)  # drawn last, over the others
    first = min(points[0][0] for _, points in series)
    last = max(points[-1][0] for _, points in series)
    return charts.plot(
        f"watch-{name}",
        title=title,
        description=words.get("watch.alt"),
        x=charts.Axis(title=words.get("watch.step_axis"), low=first, high=max(last, first + 1)),
        y=y,
        lines=[
            charts.Line(css=f"{'recommended' if fullest in (None, rank) else 'baseline'} thin", points=points)
            for rank, points in ordered
        ],
        rules=rules,
        dots=dots,
    )


def _series(record: WatchRecord, field: str, *, lowest: bool = False) -> list[tuple[int, Points]]:
    """Return (rank, points) for each rank that measured the field, where a point is (step, value). Of more
    than 16 ranks, only some at equal distances and the one with the least free memory are taken. More than
    400 points become 400: the highest of each stretch, or the lowest with ``lowest``."""
    fullest = record.fullest
    ranks = list(record.ranks)
    if len(ranks) > _MOST_LINES:
        stride = math.ceil(len(ranks) / (_MOST_LINES - 1))
        ranks = [r for i, r in enumerate(ranks) if i % stride == 0 or r is fullest]
    series = [(r.rank, _thin_out(_points(r, field), lowest=lowest)) for r in ranks]
    return [(rank, points) for rank, points in series if points]


def _points(rank: RankRecord, field: str) -> Points:
    points = [(float(s.step), float(v)) for s in rank.steps if (v := getattr(s, field)) is not None]
    return [p for p in points if math.isfinite(p[1])]


def _thin_out(points: Points, *, lowest: bool) -> Points:
    if len(points) <= _POINTS:
        return points
    edges = [round(i * len(points) / _POINTS) for i in range(_POINTS + 1)]
    choose = min if lowest else max
    return [choose(points[a:b], key=lambda p: p[1]) for a, b in itertools.pairwise(edges)]
