"""Show a watched training in a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from memfit.monitoring.summary import RankSummary, WatchSummary
from memfit.types.units import format_bytes, format_seconds

_MOST_ALARMS: Final = 12
_MOST_RANKS: Final = 32
_TITLES: Final = {
    "allocated_bytes": "tensors",
    "reserved_bytes": "reserved",
    "device_bytes": "device",
    "host_bytes": "host",
}


def print_watch(summary: WatchSummary, *, console: Console) -> None:
    """Print the number of ranks and their devices, how failed ranks and the command ended, a table of the
    ranks, the prediction beside what was measured, and the alarms (see `watch_text`)."""
    console.print(watch_text(summary))


def watch_text(summary: WatchSummary) -> Group:
    """Return what `print_watch` prints, for a display that is renewed. The table has at most the first 32
    ranks, the list the last 12 alarms, and both say how many are left out. All failed ranks are named."""
    return Group(
        *map(Text, _head(summary)), _table(summary), *map(Text, _predictions(summary)), *_alarms(summary)
    )


def _head(summary: WatchSummary) -> Iterable[str]:
    ranks = summary.ranks
    devices = sorted({r.device_name or "processor" for r in ranks if r.device})
    steps = max((r.step for r in ranks if r.step is not None), default=0)
    count = "1 rank" if len(ranks) == 1 else f"{len(ranks)} ranks"
    yield f"{count} on {', '.join(devices) or 'an unknown device'}, step {steps}"
    for r in ranks:
        if r.end is not None and r.end.error:
            yield f"rank {r.rank} failed: {r.end.error}: {r.end.message.partition(chr(10))[0][:200]}"
    if summary.exit is not None:
        code = summary.exit.code
        yield f"the command was killed by signal {-code}" if code < 0 else f"the command ended with {code}"
        if summary.exit.oom_kills:
            yield f"the kernel killed {summary.exit.oom_kills} processes because memory ran out"
    if all(not r.memory_source for r in ranks):
        yield "tensors are not counted on this device; host is the resident memory of the process"


def _table(summary: WatchSummary) -> Table:
    shown = summary.ranks[:_MOST_RANKS]
    columns = {
        "rank": [str(r.rank) for r in shown],
        "step": [str(r.step) if r.step is not None else "" for r in shown],
        "": [r.state for r in shown],
        "time": [format_seconds(r.step_s) if r.step_s is not None else "" for r in shown],
        "loss": [_number(r, "loss") for r in shown],
        "gradient": [_number(r, "grad_norm") for r in shown],
        "tensors": [_size(r.latest.get("allocated_bytes")) for r in shown],
        "their peak": [_size(r.peaks.get("peak_allocated_bytes")) for r in shown],
        "reserved": [_size(r.latest.get("reserved_bytes")) for r in shown],
        "device": [_size(r.latest.get("device_bytes")) for r in shown],
        "host": [_size(r.latest.get("host_bytes")) for r in shown],
        "least free": [_size(r.least_headroom_bytes) for r in shown],
        "J/step": [f"{r.energy_j:.3g}" if r.energy_j is not None else "" for r in shown],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table(*filled, box=box.SIMPLE_HEAD, pad_edge=False)
    for cells, r in zip(zip(*filled.values(), strict=True), shown, strict=True):
        is_fullest = len(summary.ranks) > 1 and r.rank == summary.fullest_rank
        table.add_row(*map(Text, cells), style="bold" if is_fullest else "")
    if len(summary.ranks) > _MOST_RANKS:
        table.caption = f"{len(summary.ranks) - _MOST_RANKS} more ranks"
    return table


def _number(rank: RankSummary, name: str) -> str:
    return f"{rank.latest[name]:.4g}" if name in rank.latest else ""


def _size(size_bytes: float | None) -> str:
    return format_bytes(size_bytes) if size_bytes is not None else ""


def _predictions(summary: WatchSummary) -> Iterable[str]:
    if len(summary.ranks) > 1 and summary.fullest_rank is not None:
        yield f"rank {summary.fullest_rank} has the least free memory"
    for name, predicted, peak in summary.compared:
        error = 100 * (predicted.value / peak - 1)
        yield (
            f"{_TITLES[name]}: {format_bytes(peak)} at most, {format_bytes(predicted.value)} predicted "
            f"({format_bytes(predicted.low)} to {format_bytes(predicted.high)}; {error:+.1f} %)"
        )


def _alarms(summary: WatchSummary) -> Iterable[Text]:
    if not summary.alarms:
        yield Text("no alarms", style="green")
        return
    hidden = len(summary.alarms) - _MOST_ALARMS
    if hidden > 0:
        yield Text(f"{hidden} earlier alarms")
    for alarm in summary.alarms[-_MOST_ALARMS:]:
        yield Text(f"{alarm.kind}, step {alarm.step}, rank {alarm.rank}: {alarm.text}", style="yellow")
