"""Progress on standard error: bars on a terminal, an occasional line of text elsewhere."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from memfit.types.sanitize import one_line
from memfit.types.units import format_seconds

if TYPE_CHECKING:
    import rich.console

    from memfit.report.words import Words

_TICK_S: Final = 0.25
_SILENT_S: Final = 3.0  # no progress for a command that ends or fails within this time
_STAGE_S: Final = 1.0  # no line for shorter stages
_LINE_EVERY_S: Final = 10.0
_DETAIL_COLUMNS: Final = 60

# Held while progress is written and while the process forks. A child that is forked while standard error is
# locked could never write to it, and would hang at its first warning.
_WRITING: Final = threading.RLock()
os.register_at_fork(
    before=_WRITING.acquire, after_in_parent=_WRITING.release, after_in_child=_WRITING.release
)


class _Ticker:
    """A thread that calls ``beat`` every quarter of a second, from its creation until ``close`` is called. It
    holds the lock ``_WRITING`` during each call. The process may fork while it runs."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat, self._closed = beat, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.safe_to_fork = True  # type: ignore[attr-defined]
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(_TICK_S):
            with _WRITING:
                self._beat()


@dataclasses.dataclass(slots=True, kw_only=True)
class _Stage:
    """One stage in progress, of which ``done`` of ``total`` units are done. ``total`` is 0 if the amount of
    work is unknown; ``name``: the stage's key, such as "trace"; ``title``: its name in the language of the
    user; ``detail``: what is being worked on."""

    name: str
    title: str
    done: int
    total: int
    detail: str
    begun_s: float = dataclasses.field(default_factory=time.monotonic)

    def gives_way_to(self, name: str, done: int, total: int, detail: str) -> bool:
        """Return whether an update with these values belongs to a new stage. It does if ``name`` differs.
        With the same name, it does only if ``done`` is 0, ``total`` is known, ``detail`` contains no ": "
        (with which it is a part of a run, such as ``baseline: evaluate``), and the stage is "run" or has
        already counted units."""
        from_start = total > 0 and done == 0 and ": " not in detail
        return name != self.name or (from_start and (name == "run" or self.done > 0))

    @property
    def complete(self) -> bool:
        """Whether at most one unit is left to do, or the total is unknown. One unit may be left because some
        stages report a unit when its work begins, and not when it is done."""
        return self.done + 1 >= self.total

    @property
    def count(self) -> str:
        return f"{self.done}/{self.total}" if self.total else ""

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.begun_s

    @property
    def left_s(self) -> float | None:
        """An estimate of the seconds until the stage ends, if its remaining units take as long as those that
        are done; None in its first three seconds, before a unit is done, and if the total is unknown."""
        if not self.total or not 0 < self.done < self.total or self.age_s < _SILENT_S:
            return None
        return self.age_s * (self.total - self.done) / self.done


class Bars:
    """A progress callback, called with (name of the stage, units done, units in total or 0 if unknown, what
    is being worked on). Within its ``with`` block it shows the progress on standard error, in the language
    ``lang``: as a bar if standard error is a terminal, otherwise as lines of text."""

    def __init__(self, lang: str) -> None:
        self._lang = lang
        self._stage: _Stage | None = None

    def __enter__(self) -> Self:
        from rich.console import Console

        from memfit.report.words import load_words

        self._words = load_words(self._lang)
        console = Console(file=sys.stderr, highlight=False)
        self._display: _Bar | _Lines = (
            _Bar(console, self._words) if console.is_terminal else _Lines(self._words)
        )
        self("load", 0, 0, "")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stage is not None:
            self._display.end(self._stage, well=kind is None)
        self._display.close()

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        current = self._stage
        if current is None or current.gives_way_to(stage, done, total, detail):
            if current is not None:
                self._display.end(current, well=True)
            title = self._words.name("stage", stage)
            self._stage = current = _Stage(name=stage, title=title, done=done, total=total, detail=detail)
            self._display.begin(current)
        current.done, current.total = max(current.done, done), total or current.total
        current.detail = detail
        self._display.update(current)


class _Bar:
    """The display on a terminal: a live bar for the current stage. When a stage ends, a line with its name
    and duration stays, unless it took less than a second and its amount of work was unknown."""

    def __init__(self, console: rich.console.Console, words: Words) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._live = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
            console=console,
            transient=True,
            auto_refresh=False,
        )
        self._words = words
        self._live.start()
        self._ticker = _Ticker(self._live.refresh)

    def begin(self, stage: _Stage) -> None:
        self._live.add_task(stage.title, total=stage.total or None, detail="", count="", left="")

    def update(self, stage: _Stage) -> None:
        self._live.update(
            self._live.task_ids[-1],
            completed=max(stage.done - 0.01, 0),  # rich stops the clock of a full bar
            total=stage.total or None,
            count=stage.count,
            left=_time_left_text(stage, self._words),
            detail=_short(stage.detail),
        )

    def end(self, stage: _Stage, *, well: bool) -> None:
        from rich.text import Text

        self._live.remove_task(self._live.task_ids[-1])
        if stage.age_s < _STAGE_S and stage.total == 0:
            return
        finished = well and stage.complete
        run = _short(stage.detail.partition(": ")[0]) if stage.name == "run" else ""
        text = " ".join(filter(None, (stage.title, run, "" if finished else stage.count)))
        sign = ("✓ ", "green") if finished else ("• ", "yellow")
        self._live.console.print(Text.assemble(sign, text, (f"  {format_seconds(stage.age_s)}", "dim")))

    def close(self) -> None:
        self._ticker.close()
        self._live.stop()


class _Lines:
    """The display where there is no terminal: lines of text on standard error. The first of a stage is
    printed when the stage has lasted a second, another every ten seconds until it ends, and none in the first
    three seconds after the display was created."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._stage: _Stage | None = None
        self._silent_until_s = self._next_s = time.monotonic() + _SILENT_S
        self._ticker = _Ticker(self._beat)

    def begin(self, stage: _Stage) -> None:
        self._next_s = max(self._silent_until_s, time.monotonic() + _STAGE_S)
        self._stage = stage

    def update(self, stage: _Stage) -> None:
        pass  # the ticker reads the stage itself

    def end(self, stage: _Stage, *, well: bool) -> None:
        self._stage = None

    def close(self) -> None:
        self._ticker.close()

    def _beat(self) -> None:
        stage, now_s = self._stage, time.monotonic()
        if stage is not None and now_s >= self._next_s:
            self._next_s = now_s + _LINE_EVERY_S
            elapsed = f"({format_seconds(stage.age_s)})"
            parts = (
                stage.title,
                stage.count,
                _short(stage.detail),
                elapsed,
                _time_left_text(stage, self._words),
            )
            print(*filter(None, parts), file=sys.stderr, flush=True)


def _time_left_text(stage: _Stage, words: Words) -> str:
    """Return the estimate of the time that the stage still takes as text; "" if there is none."""
    left_s = stage.left_s
    return "" if left_s is None else words.get("terminal.left", time=format_seconds(round(left_s)))


def _short(text: str) -> str:
    text = one_line(text)
    return text if len(text) <= _DETAIL_COLUMNS else f"{text[: _DETAIL_COLUMNS - 1]}…"
