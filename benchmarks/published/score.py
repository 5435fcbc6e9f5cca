"""Rows beside their predictions, and how large the errors are."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memfit.types.errors import UserError
from published.predict import predict
from published.rows import GIB, Setup, card_bytes, setup_of

FULL_RATIO = 0.94  # of the card: above it the allocator's cache is what fills it


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

    @property
    def error(self) -> float | None:
        if self.predicted_bytes is None or not self.measured_bytes:
            return None
        return self.predicted_bytes / self.measured_bytes - 1

    def as_row(self) -> dict[str, Any]:
        """Sizes in GiB."""
        return {
            "id": self.id, "quality": self.quality, "mem_metric": self.metric,
            "measured": _gib(self.measured_bytes), "predicted": _gib(self.predicted_bytes),
            "error": self.error, "compared": self.compared, "reason": self.reason, "source": self.source,
            "card_full": self.full, "unit_sure": self.sure, "reference": self.reference,
        }  # fmt: skip


def _gib(size_bytes: float | None) -> float | None:
    return None if size_bytes is None else size_bytes / GIB


def score(row: Mapping[str, str]) -> Scored:
    """One row can be odd in ways that nobody foresaw: it is then refused, and the others go on."""
    found = Scored(
        id=row["id"], source=row["group"], quality=row["quality"], metric=row["mem_metric"],
        reference=row["scope"] == "analytic_reference",
    )  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _scored(row, found)
    except UserError as error:
        return dataclasses.replace(found, reason=str(error))
    except Exception as error:  # noqa: BLE001
        first = str(error).strip().partition("\n")[0]
        return dataclasses.replace(found, reason=f"failed: {type(error).__name__}: {first}"[:200])


def _scored(row: Mapping[str, str], found: Scored) -> Scored:
    setup = setup_of(row)
    measured, card = setup.measured, card_bytes(row)
    if measured is not None:
        full = bool(card) and measured.size_bytes / _times_counted(setup) > FULL_RATIO * card
        found = dataclasses.replace(
            found, compared=measured.kind, measured_bytes=measured.size_bytes, full=full, sure=measured.sure
        )
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
        name=name, rows=len(scored), predicted=len(errors),
        median=statistics.median(e for _, e in errors) if errors else None,
        median_of_sources=statistics.median(each) if each else None,
        worst=max((e for _, e in errors), default=None),
    )  # fmt: skip
