"""Rows beside their predictions: errors, the summary, and the page."""

from __future__ import annotations

import dataclasses
import re
import statistics
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from memfit.types.errors import UserError
from published.predict import predict
from published.rows import GIB, Measured, Setup, setup_of

_FULL_RATIO = 0.94  # of the card: above it the allocator's cache is what fills it


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """``predicted_bytes`` None: refused, for ``reason``. ``compared``: which of the three numbers."""

    id: str
    source: str
    quality: str
    metric: str
    compared: str
    measured_bytes: float
    predicted_bytes: float | None
    reason: str
    full: bool  # the measured number is within 6 % of the card
    sure: bool

    @property
    def error(self) -> float | None:
        return self.predicted_bytes / self.measured_bytes - 1 if self.predicted_bytes else None


def score(row: dict[str, str]) -> Scored | None:
    """None: the row has no memory that was measured."""
    setup = setup_of(row)
    if setup.measured is None or row["scope"] == "analytic_reference":
        return None
    predicted, compared, reason = None, setup.measured.kind, ""
    try:
        predicted, compared = _number(setup, setup.measured)
    except UserError as error:
        reason = str(error)
    card = float(row["gpu_mem_gb"] or 0)
    return Scored(
        id=setup.id, source=row["group"], quality=row["quality"], metric=row["mem_metric"], compared=compared,
        measured_bytes=setup.measured.size_bytes, predicted_bytes=predicted, reason=reason,
        full=bool(card) and setup.measured.size_bytes > _FULL_RATIO * card * GIB, sure=setup.measured.sure,
    )  # fmt: skip


def _number(setup: Setup, measured: Measured) -> tuple[float, str]:
    """The number of a prediction that the source's own metric is, and its name."""
    found = predict(setup)
    if measured.kind == "resident":
        return found.resident_bytes, "resident"
    if measured.kind == "device" and found.device_bytes:
        return found.device_bytes, "device"
    if measured.kind in ("device", "reserved") and found.reserved_bytes:
        return found.reserved_bytes, "reserved"
    return found.allocated_bytes * _times_counted(setup), "allocated"


def _times_counted(setup: Setup) -> float:
    """A source that sums more measurements than it divides by says so in its notes."""
    found = re.search(r"averages (\d+) trials over (\d+)", setup.row["notes"])
    return int(found[1]) / int(found[2]) if found else 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Errors are absolute ratios; a refused row counts in ``rows`` and not in ``predicted``."""

    name: str
    rows: int
    predicted: int
    median: float | None
    median_of_sources: float | None
    worst: float | None


def summaries(scored: Sequence[Scored]) -> list[Summary]:
    exact = [s for s in scored if s.compared == "allocated" and "alloc" in s.metric.lower() + _active(s)]
    beside = [s for s in scored if s.compared in ("reserved", "device")]
    return [
        _summary("allocated, quality A", [s for s in exact if s.quality == "A"]),
        _summary("allocated, all", exact),
        _summary(
            "reserved and nvidia-smi below 94 % of the card", [s for s in beside if not s.full and s.sure]
        ),
        _summary("all with a measurement", scored),
    ]


def _active(scored: Scored) -> str:
    return " alloc" if "active" in scored.metric.lower() else ""


def _summary(name: str, scored: Sequence[Scored]) -> Summary:
    errors = {s.id: abs(s.error) for s in scored if s.error is not None}
    sources = {s.source for s in scored}
    each = [
        statistics.median(found)
        for source in sources
        if (found := [errors[s.id] for s in scored if s.source == source and s.id in errors])
    ]
    return Summary(
        name=name, rows=len(scored), predicted=len(errors),
        median=statistics.median(errors.values()) if errors else None,
        median_of_sources=statistics.median(each) if each else None,
        worst=max(errors.values(), default=None),
    )  # fmt: skip


def line(s: Scored) -> str:
    """``id, quality, mem_metric, measured, predicted, error``."""
    if s.error is None or s.predicted_bytes is None:
        return f"{s.id:32} {s.quality} {s.compared:10} {s.measured_bytes / GIB:8.2f}  refused: {s.reason}"
    numbers = f"{s.measured_bytes / GIB:8.2f} {s.predicted_bytes / GIB:8.2f} {s.error:+7.1%}"
    return f"{s.id:32} {s.quality} {s.compared:10} {numbers}" + (" (card full)" if s.full else "")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def page(scored: Iterable[Scored], command: str) -> str:
    """Caveats first, then the summary, then every row with what explains a large error."""
    scored = list(scored)
    why = tomllib.loads((Path(__file__).parent / "why.toml").read_text())
    lines = ["# Published training runs", "", why["caveats"].strip(), "", f"Command: `{command}`", ""]
    lines += [
        "| rows | measured | predicted | median error | median of sources | worst |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for s in summaries(scored):
        numbers = " | ".join(map(_percent, (s.median, s.median_of_sources, s.worst)))
        lines.append(f"| {s.name} | {s.rows} | {s.predicted} | {numbers} |")
    lines += [
        "",
        "| id | quality | metric | measured GiB | predicted GiB | error | why |",
        "|---|---|---|--:|--:|--:|---|",
    ]
    for s in scored:
        predicted = f"{s.predicted_bytes / GIB:.2f}" if s.predicted_bytes else "-"
        error = f"{s.error:+.1%}" if s.error is not None else "refused"
        reason = s.reason or _why(s, why["rows"])
        measured = f"{s.measured_bytes / GIB:.2f}" + ("" if s.sure else " (unit unsure)")
        lines.append(
            f"| {s.id} | {s.quality} | {s.compared} | {measured} | {predicted} | {error} | {reason} |"
        )
    return "\n".join(lines) + "\n"


def _why(s: Scored, rows: dict[str, str]) -> str:
    """What is known about this row or its source, where the error is above 3 %."""
    if s.error is None or abs(s.error) < 0.03:
        return ""
    if s.full:
        return "the allocator's cache fills the card: an upper bound only"
    return next((text for start, text in rows.items() if s.id.startswith(start)), "not known")
