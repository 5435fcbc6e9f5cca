"""The columns of a file of published runs: reading it, and what each cell may hold
(data/published.schema.toml)."""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

from memfit.types.errors import UserError

DATA = Path(__file__).parents[1] / "data"
GIB = 2**30
Row = Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """``kind``, ``read_by``: as the schema explains them. ``blank``: what an empty cell means; None: it
    must not be empty."""

    kind: str
    read_by: str
    meaning: str
    blank: str | None = None
    allowed: tuple[str, ...] = ()


@functools.cache
def columns() -> Mapping[str, Column]:
    text = (DATA / "published.schema.toml").read_text(encoding="utf-8")
    return {
        k: Column(**{**v, "allowed": tuple(v.get("allowed", ()))}) for k, v in tomllib.loads(text).items()
    }


def read(path: Path) -> list[dict[str, str]]:
    """Rows with every column of the schema. Raises UserError, once, for a file that is not so."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, strict=True)
            rows = [{k: (v or "").strip() for k, v in r.items() if isinstance(k, str)} for r in table]
            names = tuple(table.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"cannot read {path}: {what}", hint="give a CSV file in UTF-8") from None
    if not names:
        raise UserError(f"{path} is empty", hint="a header and one run a line are expected")
    if missing := [c for c in columns() if c not in names]:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise UserError(f"{path} has no column {shown}", hint="the columns are in benchmarks/data/README.md")
    if not rows:
        raise UserError(f"{path} has no rows", hint="one run a line below the header")
    return rows


def settings(text: str) -> dict[str, str]:
    """``{"rank": "8"}`` of ``rank=8``; a word without ``=`` has no value."""
    return {k: v for k, _, v in (part.partition("=") for part in text.split())}


def number(row: Row, name: str) -> float:
    """0 where the cell is empty."""
    return float(row[name] or 0)


def assumed(row: Row) -> dict[str, str]:
    """Reasons by column."""
    parts = (part.strip().partition(":") for part in row["assumed"].split(";") if part.strip())
    return {name.strip(): reason.strip() for name, _, reason in parts}


def problems(row: Row) -> list[str]:
    """What is wrong with single cells, one line each."""
    found = []
    for name, column in columns().items():
        if not row[name]:
            if column.blank is None:
                found.append(f"{name} is empty")
        elif why := _WRONG[column.kind](row[name], column):
            found.append(f"{name} is {row[name]!r}: {why}")
    for name, reason in assumed(row).items():
        if name not in columns():
            found.append(f"assumed names {name!r}, which is no column")
        elif not reason:
            found.append(f"assumed gives no reason for {name}")
    return found


def _no_number(text: str) -> bool:
    try:
        value = float(text)
    except ValueError:
        return True
    return not (value > 0 and math.isfinite(value))


def _no_settings(text: str, column: Column) -> str:
    found = settings(text)
    if unknown := [k for k in found if k not in column.allowed]:
        return f"{unknown[0]!r} is none of {', '.join(column.allowed)}"
    if wrong := [k for k, v in found.items() if k not in _WORDS and v != "y" and _no_number(v) and v != "0"]:
        return f"{wrong[0]} is a number, or y"
    missing = [k for name in _NEEDED if {*name} <= {*column.allowed} for k in name if k not in found]
    return f"{missing[0]} is missing" if missing else ""


_WORDS = ("norm", "mlp", "targets", "base", "adapter_dtype")
_NEEDED = (("count", "top_k", "ffn"), ("rank", "targets"), ("q_rank", "kv_rank"))


def _no_month(text: str) -> bool:
    year, _, month = text.partition("-")
    return not (
        len(text) == len("2024-05") and year.isdecimal() and month.isdecimal() and 0 < int(month) < 13
    )


_WRONG: Mapping[str, Callable[[str, Column], str]] = {
    "text": lambda text, column: "",
    "count": lambda text, column: (
        "" if text.isdecimal() and int(text) else "a whole number above 0 is allowed"
    ),
    "number": lambda text, column: "a number above 0 is allowed" if _no_number(text) else "",
    "flag": lambda text, column: "" if text in ("y", "n") else "y or n is allowed",
    "month": lambda text, column: "a month such as 2024-05 is allowed" if _no_month(text) else "",
    "choice": lambda text, column: "" if text in column.allowed else f"allowed: {', '.join(column.allowed)}",
    "set": lambda text, column: (
        "" if {*text.split()} <= {*column.allowed} else f"allowed: {', '.join(column.allowed)}"
    ),
    "settings": _no_settings,
}
