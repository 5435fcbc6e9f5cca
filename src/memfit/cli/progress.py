"""Progress on standard error: bars on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import dataclasses
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from memfit.types.units import format_seconds

if TYPE_CHECKING:
    import rich.console
    import rich.progress

_LINE_EVERY_S: Final = 5.0
_DETAIL_COLUMNS: Final = 60


@dataclasses.dataclass(slots=True, kw_only=True)
class _Stage:
    """One stage under way. ``total`` 0: nobody knows how much there is to do."""

    name: str
    done: int
    total: int
    detail: str
    begun_s: float

    def gives_way_to(self, name: str, done: int, total: int, detail: str) -> bool:
        """Another stage begins, or the same from its start; ``baseline: evaluate`` still is that run."""
        return name != self.name or (total > 0 and done == 0 and ": " not in detail)

    @property
    def complete(self) -> bool:
        """Whether its last unit was begun; stages tell before the work or after it."""
        return self.done + 1 >= self.total

    @property
    def count(self) -> str:
        return f"{self.done}/{self.total}" if self.total else ""

    @property
    def what(self) -> str:
        return _short(self.detail.partition(": ")[0])


class Bars:
    """The pipeline's progress callback, shown until the ``with`` block ends.

    On a terminal the present stage is a live bar and every finished one leaves a line; elsewhere a
    stage is told when it begins and then every few seconds while it moves.
    """

    def __init__(self, lang: str) -> None:
        self._lang = lang
        self._stage: _Stage | None = None
        self._told_s = 0.0

    def __enter__(self) -> Self:
        from rich.console import Console

        from memfit.report.words import load_words

        self._words = load_words(self._lang)
        console = Console(file=sys.stderr, highlight=False)
        self._live = _live(console) if console.is_terminal else None
        if self._live is not None:
            self._live.start()
        self("load", 0, 0, "")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish(well=kind is None)
        if self._live is not None:
            self._live.stop()

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        now_s = time.monotonic()
        current = self._stage
        if current is None or current.gives_way_to(stage, done, total, detail):
            self._finish()
            self._stage = current = _Stage(name=stage, done=done, total=total, detail=detail, begun_s=now_s)
            self._begin(current)
        current.done, current.total = max(current.done, done), total or current.total
        current.detail = detail
        self._show(current, now_s)

    def _begin(self, stage: _Stage) -> None:
        self._told_s = 0.0
        if self._live is not None:
            self._live.add_task(self._name(stage), total=stage.total or None, detail="", count="")

    def _show(self, stage: _Stage, now_s: float) -> None:
        if self._live is not None:
            self._live.update(
                self._live.task_ids[-1],
                completed=max(stage.done - 0.01, 0),  # a full bar would stop its clock
                total=stage.total or None,
                count=stage.count,
                detail=_short(stage.detail),
            )
        elif now_s - self._told_s >= _LINE_EVERY_S:
            self._told_s = now_s
            since_s = now_s - stage.begun_s
            since = f"({format_seconds(since_s)})" if since_s >= 1 else ""
            words = (self._name(stage), stage.count, _short(stage.detail), since)
            print(*filter(None, words), file=sys.stderr, flush=True)

    def _finish(self, *, well: bool = True) -> None:
        """On a terminal the bar becomes a line: the stage, how far it came if not to its end, its time."""
        stage = self._stage
        if self._live is None or stage is None:
            return
        self._live.remove_task(self._live.task_ids[-1])
        took_s = time.monotonic() - stage.begun_s
        if took_s < 1 and stage.total == 0:
            return
        self._live.console.print(self._finished(stage, took_s, whole=well and stage.complete))

    def _finished(self, stage: _Stage, took_s: float, *, whole: bool) -> object:
        from rich.text import Text

        sign = ("✓ ", "green") if whole else ("• ", "yellow")
        what = stage.what if stage.name == "run" else ""
        words = (self._name(stage), what, "" if whole else stage.count)
        return Text.assemble(sign, " ".join(filter(None, words)), (f"  {format_seconds(took_s)}", "dim"))

    def _name(self, stage: _Stage) -> str:
        return self._words.name("stage", stage.name)


def _live(console: rich.console.Console) -> rich.progress.Progress:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
        console=console,
        transient=True,
    )


def _short(text: str) -> str:
    return text if len(text) <= _DETAIL_COLUMNS else f"{text[: _DETAIL_COLUMNS - 1]}…"
