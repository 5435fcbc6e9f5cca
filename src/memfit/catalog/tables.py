"""The TOML tables of this package. Names are found regardless of case, spaces, dashes and brand words."""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Final

from memfit.types.errors import UserError
from memfit.types.machine import Fact

_BRANDS: Final = re.compile(r"\b(nvidia|amd|tesla|geforce|instinct)\b")
_FEW_ROWS: Final = 12  # a longer list of all names would hide the closest ones
_LISTED: Final = ("device", "host", "network", "place")  # what `memfit list machines` lists

Row = Mapping[str, Any]


@functools.cache
def table(file: str) -> dict[str, Any]:
    """Return a TOML file of this package, by its name such as "gpus.toml", as a dictionary.

    Each file is read once; callers must not change the dictionary.
    """
    return tomllib.loads((files("memfit.catalog") / file).read_text(encoding="utf-8"))


def fact(row: list[Any], sources: Mapping[str, dict[str, str]]) -> Fact:
    """Return a row of a table, ``[value, key]`` or ``[value, key, low, high]``, as a Fact. ``sources[key]``
    has the Fact's source and date, and its kind if that is not "published".
    """
    value, key, *bounds = row
    low, high = map(float, bounds) if bounds else (None, None)
    return Fact(value=float(value), low=low, high=high, **sources[key])


def facts(row: Row, sources: Mapping[str, dict[str, str]], keys: tuple[str, ...]) -> dict[str, Fact]:
    """Return the facts of a table's row for those of `keys` that it has; the other keys are absent."""
    return {key: fact(row[key], sources) for key in keys if key in row}


def find(name: str, *, what: str, rows: Mapping[str, Row]) -> str:
    """Return the key of ``rows`` that ``name`` means: the key itself or one of the row's ``aliases``, both
    compared after `normalized_name`.

    If there is none, raises UserError: "unknown" ``what``, the closest names if there are any, and all keys.
    If there are more than 12 keys, and `memfit list machines` lists them, the error names that command
    instead of all keys, provided that a name is close or ``what`` is "device". For a device to which no name
    is close, it also names machine files.
    """
    names_by_key = {
        normalized_name(a): name for name, row in rows.items() for a in (name, *row.get("aliases", ()))
    }
    query = normalized_name(name)
    if query in names_by_key:
        return names_by_key[query]
    matches = _closest(query, names_by_key)
    did_you_mean = (
        f"did you mean {' or '.join(filter(None, (', '.join(matches[:-1]), matches[-1])))}?"
        if matches
        else ""
    )
    if (matches or what == "device") and len(rows) > _FEW_ROWS and what in _LISTED:
        machine_file = (
            "a machine file (--on FILE.toml) describes a device that the catalog lacks, "
            "see docs/several-gpus.md"
        )
        hints = [did_you_mean or machine_file, "(`memfit list machines` lists all)"]
        if did_you_mean and what == "device":
            hints.append("or one of the same generation, with the memory of yours: --memory 12GiB")
        raise UserError(f"unknown {what}: {name!r} is not in memfit's catalog", hint=" ".join(hints))
    raise UserError(
        f"unknown {what}: {name!r} is not in memfit's catalog",
        allowed=", ".join(rows),
        hint=did_you_mean,
    )


def normalized_name(name: str) -> str:
    """Return a name in lower-case letters and digits only, without the brand words nvidia, amd, tesla,
    geforce and instinct: "h100sxm" for "NVIDIA H100-SXM".
    """
    return re.sub(r"[^a-z0-9]", "", _BRANDS.sub("", name.lower()))


def _closest(query: str, names_by_key: dict[str, str]) -> tuple[str, ...]:
    """Return the names closest to ``query``, without repeats. ``names_by_key``: the names by their
    `normalized_name`, which is also the form of ``query``.

    These are all names whose key begins with ``query``; those whose key goes on with a digit come last. If
    there are none, they are at most 3 names with a similar key.
    """
    prefix_matches = [key for key in names_by_key if query and key.startswith(query)]
    prefix_matches.sort(key=lambda key: key[len(query) :][:1].isdigit())
    matches = prefix_matches or difflib.get_close_matches(query, names_by_key, n=3, cutoff=0.6)
    return tuple(dict.fromkeys(names_by_key[key] for key in matches))
