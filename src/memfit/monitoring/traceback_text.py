"""Read Python tracebacks in a log: plain ones, those of notebooks and of rich, also of several ranks."""

from __future__ import annotations

import dataclasses
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_HEADER: Final = "Traceback (most recent call last)"
_RANK: Final = re.compile(r"^\s*\[(?:rank|default)?(\d+)\]:\s?")
_TIME: Final = re.compile(r"^\d{4}-\d\d-\d\d[T ][\d:.,]+Z?\s+(?=\S)")
# What loggers put before a line: times, levels, names in brackets.
_LOGGED: Final = re.compile(
    r"^\s*(?:(?:\d[\d:.,/TZ+-]*|(?:\[[^\]]*\])+|\([^)]*\)|[A-Z]{3,}:?)\s+)+(?=[A-Za-z_])"
)
_PATH: Final = re.compile(r"^(?:[/~]|[A-Za-z]:\\)\S+(?P<calls> in)?\s*$")  # the rest is on the next line
_EDGE: Final = re.compile(r"^[\s│|]*│ ?|\s*│\s*$")
_PLAIN: Final = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)(?:, in (?P<function>\S+))?')
_NOTEBOOK: Final = re.compile(
    r"^(?:File )?(?P<file>\S+\.py|<ipython-input[^>]*>|Cell In ?\[\d+\])"
    r"(?::(?P<line>\d+))?,? (?:line (?P<cell>\d+)|in (?P<function>[\w.<>]+))"
)
_ARROW: Final = re.compile(r"^\s*(?:-+>|❱)\s*(?P<line>\d+)\s(?P<code>.*)")
_ERROR: Final = re.compile(
    r"^(?P<type>(?:[A-Za-z_]\w*\.)*_*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)|"
    r"(?:[A-Za-z_]\w*\.)+[A-Z]\w*|StopIteration)\b(?::\s?(?P<message>.*)|\s*)$"
)
_LIBRARIES: Final = (
    "site-packages/", "dist-packages/", "/lib/python3", "/python3.", "/torch/", "<frozen", "<string>",
)  # fmt: skip
_INSTALLED: Final = re.compile(r"(?:site|dist)-packages/|/lib/python3\.")
_OWN: Final = Path(__file__).parents[1].as_posix() + "/"
_MESSAGE_LINES: Final = 6
_MOST_FRAMES: Final = 50
_OUTERMOST: Final = 10  # of these
_LONGEST_CODE: Final = 200


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StackFrame:
    """A call in a traceback. ``line`` is 0 and ``code`` "" if the log does not show them."""

    file: str
    line: int
    function: str
    code: str = ""

    @property
    def is_library(self) -> bool:
        """Whether the file belongs to an installed package or to Python."""
        path = self.file.replace("\\", "/").lower()
        return path.startswith("torch/") or any(part in path for part in _LIBRARIES)

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TracebackText:
    """A traceback in a log. ``frames``: outermost first. ``error``: type of the exception without its
    package. ``start`` and ``end``: indices of its first line and of the line with the exception.
    """

    frames: tuple[StackFrame, ...]
    error: str
    message: str
    start: int
    end: int


def innermost_user_frame(frames: Sequence[StackFrame]) -> StackFrame | None:
    """Return the innermost frame outside installed packages, or None."""
    return next((f for f in reversed(frames) if not f.is_library), None)


def frames_of(error: BaseException) -> tuple[StackFrame, ...]:
    """Return the calls in which an error was raised, outermost first, without memfit's own and without the
    folders of the user; of many, the first 10 and the last 40."""
    calls = [c for c in traceback.extract_tb(error.__traceback__) if not c.filename.startswith(_OWN)]
    kept = calls if len(calls) <= _MOST_FRAMES else [*calls[:_OUTERMOST], *calls[_OUTERMOST - _MOST_FRAMES :]]
    return tuple(
        StackFrame(
            file=_short_path(c.filename),
            line=c.lineno or 0,
            function=c.name,
            code=(c.line or "")[:_LONGEST_CODE],
        )
        for c in kept
    )


def _short_path(path: str) -> str:
    """Return the path of an installed module from the folder site-packages (or Python's lib) on, that of a
    file below the current folder relative to it, and of any other file the name."""
    path = path.replace("\\", "/")
    if match := _INSTALLED.search(path):
        return path[match.start() :]
    here = f"{Path.cwd().as_posix()}/"
    return path.removeprefix(here) if path.startswith(here) else path.rpartition("/")[2]


def read_tracebacks(lines: Sequence[str]) -> list[TracebackText]:
    """Return the tracebacks of a log by the line of their exception. Lines that begin with ``[rank3]:`` form
    a log of their own for each rank."""
    by_rank: dict[str, list[tuple[int, str]]] = {}
    for row, line in enumerate(lines):
        rank = _RANK.match(line)
        text = _TIME.sub("", line[rank.end() :] if rank else line)
        by_rank.setdefault(rank[1] if rank else "", []).append((row, _EDGE.sub("", text)))
    readers = [_Reader(rows) for rows in by_rank.values()]
    return sorted((t for r in readers for t in r.read()), key=lambda t: t.end)


class _Reader:
    """Reads the lines of one rank."""

    def __init__(self, rows: Sequence[tuple[int, str]]) -> None:
        self._rows = rows
        self._frames: list[StackFrame] = []
        self._start = -1
        self._half_line = ""
        self._tracebacks: list[TracebackText] = []

    def read(self) -> list[TracebackText]:
        for i, (row, line) in enumerate(self._rows):
            if _HEADER in line:
                self._frames, self._start = [], row
            elif frame := _frame(line) or _frame(self._half_line + line.strip()):
                self._half_line = ""
                self._start = row if self._start < 0 else self._start
                self._frames.append(frame)
            elif half := _PATH.match(line):
                self._half_line = line.strip() + (" " if half["calls"] else "")
            elif self._frames and (error := _error(line)):
                self._end(i, error)
            elif self._frames:
                self._add_code(line)
        return self._tracebacks

    def _add_code(self, line: str) -> None:
        last = self._frames[-1]
        if arrow := _ARROW.match(line):
            self._frames[-1] = dataclasses.replace(
                last, line=int(arrow["line"]), code=arrow["code"].strip(" │")
            )
        elif not last.code and line.startswith("    ") and not set(line.strip()) <= set("^~"):
            self._frames[-1] = dataclasses.replace(last, code=line.strip())

    def _end(self, i: int, error: re.Match[str]) -> None:
        more = [line for _, line in self._rows[i + 1 : i + _MESSAGE_LINES]]
        ends = (n for n, line in enumerate(more) if not line.strip() or _HEADER in line)
        message = " ".join([error["message"] or "", *more[: next(ends, len(more))]])
        self._tracebacks.append(
            TracebackText(
                frames=tuple(self._frames),
                error=error["type"].rpartition(".")[2],
                message=" ".join(message.split()),
                start=self._start,
                end=self._rows[i][0],
            )
        )
        self._frames, self._start = [], -1


def _error(line: str) -> re.Match[str] | None:
    """Return the match of a line that names an exception, None for another. A line with four spaces before it
    is code."""
    return None if line.startswith("    ") else _ERROR.match(_LOGGED.sub("", line).strip())


def _frame(line: str) -> StackFrame | None:
    match = _PLAIN.search(line) or _NOTEBOOK.match(line.strip())
    if match is None:
        return None
    groups = match.groupdict()
    number = groups.get("line") or groups.get("cell") or 0
    return StackFrame(file=groups["file"], line=int(number), function=groups.get("function") or "")
