"""Which options of a front end memfit carries over into a plan or a job, and why it does not carry over the
others.

The tables are reasons/LIBRARY.toml. ``carried``: names of the options that the module to_plan_LIBRARY.py
reads. ``silent``: options that change neither what is trained nor the memory or time of a step. ``group``:
options with the reason why they are not carried over; ``if_on`` says that they ask for nothing while they are
off. An option that no table names is unknown, which is said as well."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from memfit.lint.draft import Draft
from memfit.lint.option_schema import find_similar
from memfit.lint.parse import Options
from memfit.lint.tables import read_table

_OFF = (None, False, "", 0, "false", "False", "no", "none", "None")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OptionReasons:
    """The options of one library. ``title``: its name, as in "Axolotl"; ``carried``: dotted names of the
    options that are carried over; ``silent``: of those of which nothing is said; ``reasons``: dotted name ->
    why it is not carried over; ``if_on``: names in ``reasons`` of the options that are listed only if they
    are on; ``sections``: dotted names of the mappings whose keys are options."""

    title: str
    carried: frozenset[str]
    silent: frozenset[str]
    reasons: Mapping[str, str]
    if_on: frozenset[str]
    sections: frozenset[str]


@functools.cache
def option_reasons(library: str) -> OptionReasons:
    """Return the options of ``library``: "axolotl", "llamafactory", "lightning", "mace", "trainer",
    "deepspeed" or "accelerate"."""
    data = read_table(f"reasons/{library}.toml")
    groups = [
        (group["reason"], group.get("if_on", False), group["options"].split()) for group in data["group"]
    ]
    return OptionReasons(
        title=data["title"],
        carried=frozenset(data["carried"].split()),
        silent=frozenset(data.get("silent", "").split()),
        reasons={name: reason for reason, _, names in groups for name in names},
        if_on=frozenset(name for _, if_on, names in groups if if_on for name in names),
        sections=frozenset(data.get("sections", "").split()),
    )


def account_for(options: Options, library: str, draft: Draft) -> None:
    """Say in ``draft`` what became of each option of the file ``options``, after the options were read. An
    option that is carried over is added to ``draft.carried``; so is an option that is off and is listed only
    if it is on (``if_on``). Options that are not carried over are listed as left out, those of one reason
    together; so are unknown ones. Skipped are options without a value, those of which nothing is said
    (``silent``), and those that ``draft.left_out`` names already."""
    table = option_reasons(library)
    noted = {name for note in draft.left_out for name in re.split(r"[ ,]+", note.option)}
    names_by_reason: dict[str, list[str]] = {}
    for name, value in _named_values(options.data, table, ""):
        if name in noted or name in table.silent:
            continue
        if name in table.carried or (name in table.if_on and value in _OFF):
            draft.carried.append(name)
        else:
            names_by_reason.setdefault(_reason(name, table), []).append(name)
    for reason, names in names_by_reason.items():
        draft.leave(", ".join(names), reason)


def _named_values(data: Mapping[str, Any], table: OptionReasons, section: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) for each option in ``data``, the content of ``section``. A mapping is one
    option unless it is one of the table's sections."""
    for key, value in data.items():
        name = f"{section}.{key}".lstrip(".")
        if isinstance(value, Mapping) and name in table.sections:
            yield from _named_values(value, table, name)
        elif value is not None:
            yield name, value


def _reason(name: str, table: OptionReasons) -> str:
    reason = table.reasons.get(name)
    if reason is not None:
        return reason
    near = find_similar(name, table.carried | table.silent | table.reasons.keys())
    if near is not None:
        return f"memfit knows no such option of {table.title}; did you mean {near}?"
    return f"memfit knows no such option of {table.title}: predicted without it"
