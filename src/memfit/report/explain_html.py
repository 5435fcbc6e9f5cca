"""A treemap and a timeline of a traced step: one HTML file with its own script and no network access."""

from __future__ import annotations

import bisect
import json
from collections import Counter
from collections.abc import Hashable
from itertools import pairwise
from typing import Any, Final

from memfit.report.explain import TracedEstimate, events, live_allocations, op_name
from memfit.report.html import render
from memfit.report.quantities import figure_text, predicted
from memfit.report.words import Words, load_words
from memfit.store.exchange.anonymous import anonymous_command
from memfit.types.trace import Category, Phase

MOST_BYTES: Final = 1_800_000  # most bytes of data in the page
_POINTS: Final = (3000, 1500, 750, 375, 180, 90)
_STACK: Final = (
    Category.PARAMETER,
    Category.OPTIMIZER_STATE,
    Category.EMA,
    Category.INPUT,
    Category.GRADIENT,
    Category.ACTIVATION,
    Category.TEMPORARY,
    Category.WORKSPACE,
)


def render_explained(explained: TracedEstimate, *, job: str, lang: str) -> str:
    """Return the text of an HTML page with the treemap of what is alive at an instant and the timeline of the
    step. ``job``: name of the job, for the title; folders in it are left out. Raises UserError for a language
    without a catalog."""
    words, estimate = load_words(lang), explained.estimate
    traced_bytes = sum(a.size_bytes for a in live_allocations(explained.trace, explained.peak_clock))
    workspace_bytes = estimate.allocated_bytes.value - traced_bytes
    return render(
        "explain.html.j2",
        words,
        job=anonymous_command(job),
        estimate=estimate,
        trace=explained.trace,
        op=op_name(estimate.peak_op),
        peak=figure_text(predicted(estimate.allocated_bytes.value, "bytes"), words),
        stack=_STACK,
        data=_data(explained, words),
        count=f"{len(explained.trace.allocations):,}",
        apart=figure_text(predicted(workspace_bytes, "bytes"), words) if workspace_bytes > 0 else "",
    )


def _data(explained: TracedEstimate, words: Words) -> str:
    """Return the data of the page's script as JSON that can stand inside a script element. It has as many
    instants as the largest of the `_POINTS` (3000 to 90) with which the JSON has at most `MOST_BYTES` (1.8
    MB), or as the smallest if even that is too large."""
    explain_texts = {
        k.removeprefix("explain."): v for k, v in words.texts.items() if k.startswith("explain.")
    }
    names = {str(x): words.name("category", x) for x in Category} | {
        str(x): words.name("phase", x) for x in Phase
    }
    texts = {**explain_texts, **names, "root": words.get("text.root")}
    for points in _POINTS:
        data = {"words": texts, "lang": words.lang, "stack": _STACK, **series(explained, points)}
        text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
        if len(text.encode()) <= MOST_BYTES:
            break
    return text


def series(explained: TracedEstimate, points: int) -> dict[str, Any]:
    """Return what is alive at selected instants of the trace, exactly, as lists for the page's script. Sizes
    are in bytes.

    "clock": the instants, sorted: that with the most live bytes in each of ``points`` equal stretches of the
    clock, the peak, and the start of each phase. "peak": index of the peak among them. "end": clock at which
    the trace ends. "spans": (phase, step, start, end) of each phase. The lists "first", "length", "group",
    "bytes" and "count" have one entry for each row. A row stands for "count" equal allocations of "bytes"
    each, alive from one instant on for "length" instants; "first" is the index of that instant minus the one
    of the row before. Allocations that are alive at none of the instants, or have 0 bytes, are left out.
    "group" is an index into "groups", whose entries are (category, module, operator, line) as indices into
    the page's order of categories and into "modules" (where 0 is the root and i the entry i - 1), "ops" and
    "lines".
    """
    trace = explained.trace
    clocks = _instants(explained, points)
    rows: Counter[tuple[int, int, int, int]] = Counter()  # (first, length, group, size) -> count
    groups, modules, ops, lines = _Table(), _Table(), _Table(), _Table()
    for a in trace.allocations:
        first = bisect.bisect_left(clocks, a.start)
        end = len(clocks) if a.end is None else bisect.bisect_left(clocks, a.end)
        if end > first and a.size_bytes:
            group = (
                _STACK.index(a.category),
                _path(modules, a.module),
                ops.index(op_name(a.op)),
                lines.index(a.line),
            )
            rows[first, end - first, groups.index(group), a.size_bytes] += 1
    ordered = sorted(rows)
    starts = [0, *(r[0] for r in ordered)]
    return {
        "clock": clocks,
        "peak": clocks.index(explained.peak_clock),
        "end": max((s.end for s in trace.spans), default=clocks[-1]),
        "spans": [(s.phase, s.step, s.start, s.end) for s in trace.spans],
        "modules": list(modules.places),  # (index of the parent + 1, name)
        "ops": list(ops.places),
        "lines": list(lines.places),
        "groups": list(groups.places),
        "first": [b - a for a, b in pairwise(starts)],
        "length": [r[1] for r in ordered],
        "group": [r[2] for r in ordered],
        "bytes": [r[3] for r in ordered],
        "count": [rows[r] for r in ordered],
    }


class _Table:
    """Distinct values, numbered from 0 in the order in which ``index`` was first called with them."""

    def __init__(self) -> None:
        self.places: dict[Hashable, int] = {}

    def index(self, value: Hashable) -> int:
        return self.places.setdefault(value, len(self.places))


def _path(modules: _Table, module: str) -> int:
    """Return the number of the module with the dotted path ``module`` in the tree ``modules``, whose entries
    are (number of the parent, name); missing modules are added. The root is 0, the first entry is 1."""
    index = 0
    for name in module.split(".") if module else ():
        index = modules.index((index, name)) + 1
    return index


def _instants(explained: TracedEstimate, points: int) -> list[int]:
    trace = explained.trace
    level, level_by_clock = 0, Counter[int]()
    for clock, change_bytes, _ in events(trace):
        level += change_bytes
        level_by_clock[clock] = level
    width = max(1.0, (max(level_by_clock) + 1) / points)
    highest: dict[int, int] = {}
    for clock, height in level_by_clock.items():
        stretch = int(clock / width)
        if stretch not in highest or height > level_by_clock[highest[stretch]]:
            highest[stretch] = clock
    return sorted({*highest.values(), explained.peak_clock, *(s.start for s in trace.spans)})
