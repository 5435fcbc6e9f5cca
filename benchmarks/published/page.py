"""What is printed and written: a line a row, the summary, and the page made of a record."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from published.score import Scored, Summary
from published.step_time_page import speed_line, tables

HEADER = f"{'id':32} {'quality':7} {'mem_metric':30} {'measured':>9} {'predicted':>9} {'error':>7}  (GiB)"
_LARGE = 0.03
_WHY = Path(__file__).parent / "why.toml"

_WORDS = {
    "predicted": "rows predicted",
    "median": "median error",
    "worst": "worst error",
    "median_of_sources": "median of sources' medians",
}
_TARGETS = (
    ("allocated, quality A", "predicted", 28),
    ("allocated, quality A", "median", 0.03),
    ("allocated, quality A", "median_of_sources", 0.03),
    ("allocated, quality A", "worst", 0.10),
    ("reserved and nvidia-smi below 94 % of the card", "median", 0.10),
)


def line(s: Scored) -> str:
    row = s.as_row()
    numbers = f"{_size(row['measured']):>9} {_size(row['predicted']):>9} {_percent(s.error, '+.1%'):>7}"
    remark = s.reason or ("card full" if s.full else "")
    return f"{s.id:32} {s.quality:7} {s.metric[:30]:30} {numbers}  {remark}".rstrip() + speed_line(s)


def in_words(s: Summary) -> str:
    """One line of the summary."""
    begin = f"{s.name}: {s.predicted} of {s.rows} predicted"
    if s.median is None:
        return begin
    sources = f"median of sources' medians {_percent(s.median_of_sources)}"
    return f"{begin}, median error {_percent(s.median)}, {sources}, worst {_percent(s.worst)}"


def _size(gib: float | None) -> str:
    return "-" if gib is None else f"{gib:.2f}"


def _percent(value: float | None, style: str = ".1%") -> str:
    return "-" if value is None else format(value, style)


def page(record: Mapping[str, Any]) -> str:
    """Caveats first, then the summary, then every row with what explains a large error."""
    why = tomllib.loads(_WHY.read_text(encoding="utf-8"))
    environment = record["environment"]
    lines = [
        "# Published training runs",
        "",
        why["caveats"].strip(),
        "",
        f"Command: `{record['command']}`, {record['took_s'] / 60:.0f} minutes, cores {environment['cores']},",
        f"torch {environment['torch']}, {record['created'][:10]}.",
        "Sizes in GiB. Generated from `benchmarks/records/published.jsonl`.",
        "",
        "| rows | measured | predicted | median error | median of sources | worst |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for s in record["summary"]:
        numbers = " | ".join(_percent(s[k]) for k in ("median", "median_of_sources", "worst"))
        lines.append(f"| {s['name']} | {s['rows']} | {s['predicted']} | {numbers} |")
    lines += ["", *_targets({s["name"]: s for s in record["summary"]})]
    rows: Sequence[Mapping[str, Any]] = record["rows"]
    known = [r for r in rows if r["measured"] is not None and not r["reference"]]
    lines += _table("Predicted", [r for r in known if r["predicted"] is not None], why["rows"])
    lines += _refusals("Not expressed", [r for r in known if r["predicted"] is None])
    without = [r for r in rows if r["measured"] is None or r["reference"]]
    names = ", ".join(f"`{r['id']}`" for r in without)
    lines += ["", f"{len(without)} more rows publish no memory, or a formula's (step time below): {names}."]
    lines += tables(record, why["time"])
    return "\n".join(lines) + "\n"


def _targets(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was aimed at, and whether it was reached. A refused row counts as missed."""
    lines = ["| target | found | reached |", "|---|--:|---|"]
    for name, key, limit in _TARGETS:
        found = summary[name][key]
        at_least = key == "predicted"
        reached = found is not None and (found >= limit if at_least else found <= limit)
        shown, aim = (
            (str(found), f"at least {limit}") if at_least else (_percent(found), f"at most {limit:.0%}")
        )
        lines.append(f"| {name}: {_WORDS[key]} {aim} | {shown} | {'yes' if reached else 'no'} |")
    return lines


def _table(title: str, rows: Sequence[Mapping[str, Any]], why: Mapping[str, str]) -> list[str]:
    lines = [
        "",
        f"## {title}",
        "",
        "| id | quality | mem_metric | measured | predicted | error | why |",
        "|---|---|---|--:|--:|--:|---|",
    ]
    for r in rows:
        measured = _size(r["measured"]) + ("" if r["unit_sure"] else " (unit unsure)")
        numbers = f"{measured} | {_size(r['predicted'])} | {_percent(r['error'], '+.1%')}"
        lines.append(
            f"| {r['id']} | {r['quality']} | {_cell(r['mem_metric'])} | {numbers} | {_why(r, why)} |"
        )
    return lines


def _refusals(title: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["| id | quality | mem_metric | measured | reason |", "|---|---|---|--:|---|"]
    return ["", f"## {title}", "", *head, *map(_refusal, rows)]


def _refusal(r: Mapping[str, Any]) -> str:
    about = f"{r['id']} | {r['quality']} | {_cell(r['mem_metric'])} | {_size(r['measured'])}"
    return f"| {about} | {_cell(r['reason'])} |"


def _cell(text: str) -> str:
    return text.replace("|", "/")


def _why(row: Mapping[str, Any], why: Mapping[str, str]) -> str:
    """What is known about this row or its source, where the error is above 3 %."""
    if row["error"] is None or abs(row["error"]) < _LARGE:
        return ""
    if row["card_full"]:
        return "the allocator's cache fills the card: an upper bound only"
    return next((text for start, text in why.items() if row["id"].startswith(start)), "not known")
