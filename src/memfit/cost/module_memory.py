"""Which module and which line of the user's code holds how many bytes at the peak of each phase."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import numpy

from memfit.cost.memory import levels
from memfit.types.baseline import OTHERS, BlockMemory, ModuleMemory
from memfit.types.trace import Category, Phase, Trace

_STATES: Final = (
    Category.PARAMETER,
    Category.GRADIENT,
    Category.OPTIMIZER_STATE,
    Category.EMA,
    Category.INPUT,
)
PHASES: Final = (Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER)
COLUMNS: Final = ("state_bytes", *(f"{phase}_bytes" for phase in PHASES))
MODULE_RATIO: Final = 0.01  # a module that holds less of the peak is not listed alone
_LINE_RATIO: Final = 0.002  # nor a line that holds less

# (path of a file, its line "file.py:12") -> ("src/file.py:12", text of the line)
Place = Callable[[str, str], tuple[str, str]]
_Line = tuple[str, str]


def module_memory(trace: Trace, fold: Callable[[str], str], place: Place) -> tuple[ModuleMemory, ...]:
    """Return one entry for each module and line of code that holds memory at the peak of forward, backward or
    optimizer, sorted by module, file and text of the line. Lines of one file with the same text are one
    entry. All states of a module (parameters, gradients, optimizer state, averaged weights, inputs) are in
    the entry of one line, that of most parameter bytes, with the most that they take at one of these peaks.

    ``fold``: returns the name of the module with this path; modules of one name are added up. ``place``:
    returns the path with the line, and the text of the line, of a file and line of the trace. The trace must
    have lines.
    """
    states, kept = defaultdict[str, Counter[Phase]](Counter), Counter[tuple[str, _Line, Phase]]()
    state_lines = defaultdict[str, Counter[_Line]](Counter)
    for phase, clock in _peak_clocks(trace).items():
        for a in trace.allocations:
            if a.start > clock or (a.end is not None and a.end <= clock):
                continue
            module, line = fold(a.module), (a.file, a.line)
            if a.category in _STATES:
                states[module][phase] += a.size_bytes
                if a.line:
                    state_lines[module][line] += a.size_bytes * (a.category is Category.PARAMETER)
            else:
                kept[module, line, phase] += a.size_bytes
    rows = defaultdict[tuple[str, str, str], Counter[str]](Counter)
    lines = dict[tuple[str, str, str], str]()
    entries: list[tuple[str, _Line, str, int]] = [
        (m, line, f"{phase}_bytes", n) for (m, line, phase), n in kept.items()
    ]
    for module, by_phase in states.items():
        line = max(state_lines[module].items(), key=lambda item: (item[1], item[0]), default=(("", ""), 0))[0]
        entries.append((module, line, "state_bytes", max(by_phase.values())))
    for module, line, column, size_bytes in sorted(entries):
        where, code = place(*line) if line[1] else ("", "")
        key = (module, where.rpartition(":")[0], code)
        rows[key][column] += size_bytes
        lines.setdefault(key, where)
    return tuple(
        ModuleMemory(module=key[0], line=lines[key], code=key[2], **rows[key])
        for key in sorted(rows)
        if any(rows[key].values())
    )


def _peak_clocks(trace: Trace) -> dict[Phase, int]:
    """Return the clock at which forward, backward and optimizer, as far as they were traced, have their first
    highest level of live bytes; the level at the start of a phase counts."""
    clock, live = levels(trace)
    highest: dict[Phase, tuple[int, int]] = {}
    for span in trace.spans:
        start, end = numpy.searchsorted(clock, (span.start, span.end))
        first = max(0, int(start) - 1)
        if span.phase not in PHASES or end <= first:
            continue
        top = first + int(numpy.argmax(live[first:end]))
        if span.phase not in highest or live[top] > highest[span.phase][0]:
            highest[span.phase] = int(live[top]), int(clock[top])
    return {phase: top_clock for phase, (_, top_clock) in highest.items()}


def module_sums(rows: Iterable[ModuleMemory]) -> dict[str, dict[str, int]]:
    """Return module -> column -> bytes, summed over the module's lines. The columns are "state_bytes",
    "forward_bytes", "backward_bytes" and "optimizer_bytes"."""
    sums = dict[str, dict[str, int]]()
    for row in rows:
        of_module = sums.setdefault(row.module, dict.fromkeys(COLUMNS, 0))
        for column in COLUMNS:
            of_module[column] += getattr(row, column)
    return sums


def block_memory(
    rows: Iterable[ModuleMemory], fold: Callable[[str], str], peak_bytes: int
) -> tuple[BlockMemory, ...]:
    """Return for each module that ``fold`` names together with others what it holds in the single blocks, as
    far as that is at least 1 % of ``peak_bytes``. ``rows``: with the modules' own paths."""
    sizes = defaultdict[str, dict[str, list[int]]](lambda: {column: [] for column in COLUMNS})
    for path, sums in module_sums(rows).items():
        if (name := fold(path)) != path:
            for column, size_bytes in sums.items():
                sizes[name][column] += [size_bytes] if size_bytes >= MODULE_RATIO * peak_bytes else []
    blocks = (
        BlockMemory(module=name, **{c: tuple(sorted(by_column[c], reverse=True)) for c in COLUMNS})
        for name, by_column in sorted(sizes.items())
    )
    return tuple(b for b in blocks if any(getattr(b, column) for column in COLUMNS))


def largest_modules(rows: Sequence[ModuleMemory], peak_bytes: int) -> tuple[ModuleMemory, ...]:
    """Return the rows of the modules that hold at least 1 % of ``peak_bytes`` in one of the columns (states,
    forward, backward, optimizer), and one row with the name "(others)" for the remaining modules, if there
    are any. In each module, lines that hold less than 0.2 % in every column become one row without a line.
    Sums stay the same."""
    large = {
        module
        for module, sums in module_sums(rows).items()
        if max(sums.values()) >= MODULE_RATIO * peak_bytes
    }
    single, merged = list[ModuleMemory](), list[ModuleMemory]()
    for row in rows:
        is_small = max(getattr(row, column) for column in COLUMNS) < _LINE_RATIO * peak_bytes
        if row.module in large and row.line and not is_small:
            single.append(row)
        else:
            module = row.module if row.module in large else OTHERS
            merged.append(dataclasses.replace(row, module=module, line="", code=""))
    single += _merge_rows(merged)
    return tuple(sorted(single, key=lambda row: (row.module, row.file, row.code)))


def _merge_rows(rows: Iterable[ModuleMemory]) -> Iterator[ModuleMemory]:
    for module, sums in module_sums(rows).items():
        columns: dict[str, Any] = dict(sums)
        yield ModuleMemory(module=module, **columns)
