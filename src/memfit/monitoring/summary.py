"""A watched training in a few numbers for each rank."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Final

from memfit.monitoring.alarms import alarms_of
from memfit.monitoring.prediction import MEASURED_AS
from memfit.monitoring.record import Alarm, CommandExit, RankRecord, WatchEnd, WatchRecord
from memfit.types.result import Interval

_RECENT_STEPS: Final = 50
_LATEST: Final = (
    "loss",
    "grad_norm",
    "allocated_bytes",
    "reserved_bytes",
    "device_bytes",
    "heap_bytes",
    "host_bytes",
    "headroom_bytes",
)
_PEAKS: Final = tuple(MEASURED_AS.values())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankSummary:
    """One rank. ``step`` is the number of its last recorded step, ``recorded_steps`` how many there are.
    ``latest``: the latest value of fields of WatchStep, ``peaks``: the highest; what was never measured is
    left out. ``step_s``: median over the last 50 recorded steps. ``energy_j``: joules per step, inside
    ``energy_boundary``. ``state``: "ended", "failed", "killed" (if memfit ran the command and it has ended)
    or "running" (or killed, which the file cannot tell). Numbers are None if they were not measured. If the
    line ``start`` is missing, what it says is None or "".
    """

    rank: int
    host: str
    device: str
    device_name: str
    total_bytes: int | None
    memory_source: str
    state: str
    step: int | None
    recorded_steps: int
    time_s: float | None  # of the last step, in seconds since 1970
    step_s: float | None
    energy_j: float | None
    energy_boundary: str
    latest: dict[str, float]
    peaks: dict[str, int]
    least_headroom_bytes: int | None
    earlier_starts: int
    unreadable_lines: int
    end: WatchEnd | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WatchSummary:
    """All ranks, their alarms by step, the rank with the least free memory, and the end of the command if
    memfit ran it. ``prediction``: that of rank 0, by name."""

    ranks: tuple[RankSummary, ...]
    alarms: tuple[Alarm, ...]
    fullest_rank: int | None
    prediction: dict[str, Interval]
    exit: CommandExit | None

    @property
    def is_over(self) -> bool:
        """Whether the command has ended, or each rank by itself."""
        return self.exit is not None or all(r.end is not None for r in self.ranks)

    @property
    def compared(self) -> list[tuple[str, Interval, int]]:
        """(name, prediction, highest measured value of all ranks) of all that was predicted and measured.
        Host memory is left out for several ranks, whose processes share it."""
        peaks = {
            name: [r.peaks[peak] for r in self.ranks if peak in r.peaks] for name, peak in MEASURED_AS.items()
        }
        return [
            (name, self.prediction[name], max(values))
            for name, values in peaks.items()
            if values and name in self.prediction and not (name == "host_bytes" and len(self.ranks) > 1)
        ]


def summarize(record: WatchRecord) -> WatchSummary:
    """Return the summary of a record, with a `RankSummary` for each of its ranks."""
    start = record.ranks[0].start if record.ranks else None
    return WatchSummary(
        ranks=tuple(_rank(r, is_over=record.exit is not None) for r in record.ranks),
        alarms=alarms_of(record),
        fullest_rank=record.fullest.rank if record.fullest is not None else None,
        prediction=dict(start.prediction) if start is not None else {},
        exit=record.exit,
    )


def _rank(record: RankRecord, *, is_over: bool) -> RankSummary:
    start, last = record.start, record.steps[-1] if record.steps else None
    recent_s = [s.step_s for s in record.steps[-_RECENT_STEPS:] if s.step_s is not None]
    state = "killed" if is_over else "running"
    if record.end is not None:
        state = "failed" if record.end.error else "ended"
    return RankSummary(
        rank=record.rank,
        host=start.host if start else "",
        device=start.device if start else "",
        device_name=start.device_name if start else "",
        total_bytes=start.total_bytes if start else None,
        memory_source=start.memory_source if start else "",
        state=state,
        step=last.step if last else None,
        recorded_steps=len(record.steps),
        time_s=last.time_s if last else None,
        step_s=statistics.median(recent_s) if recent_s else None,
        energy_j=_energy_per_step_j(record),
        energy_boundary=start.energy_boundary if start else "",
        latest={name: v for name in _LATEST if (v := _latest(record, name)) is not None},
        peaks={name: v for name in _PEAKS if (v := record.peak(name)) is not None},
        least_headroom_bytes=record.least_headroom_bytes,
        earlier_starts=record.earlier_starts,
        unreadable_lines=record.unreadable_lines,
        end=record.end,
    )


def _latest(record: RankRecord, name: str) -> float | None:
    return next((v for s in reversed(record.steps) if (v := getattr(s, name)) is not None), None)


def _energy_per_step_j(record: RankRecord) -> float | None:
    readings = [(s.step, s.energy_j) for s in record.steps if s.energy_j is not None]
    if len(readings) < 2 or readings[-1][0] == readings[0][0]:
        return None
    (first_step, first_j), (last_step, last_j) = readings[0], readings[-1]
    return (last_j - first_j) / (last_step - first_step)
