"""Findings as SARIF 2.1.0, the format in which code hosts and editors show results beside the code."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

SCHEMA: Final = "https://json.schemastore.org/sarif-2.1.0.json"
LEVELS: Final = ("error", "warning", "note")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SarifResult:
    """One finding. ``rule``: its rule's name; ``level``: one of `LEVELS`; ``text``: what was found;
    ``advice``: what to do, which is the rule's help; ``link``: address of a page on the rule, "" for none.
    ``file``: path of the file, from the current folder; ``line``, ``column``: from 1, None if unknown."""

    rule: str
    level: str
    text: str
    advice: str
    file: Path
    line: int | None = None
    column: int | None = None
    link: str = ""


def sarif_text(results: Sequence[SarifResult], *, version: str) -> str:
    """Return the results of one run of memfit, of this ``version``, as the text of a SARIF log, which is
    JSON. Its rules are those of the results. Files in or below the current folder are named by their path
    from there, others by a file: URI."""
    rules = dict[str, SarifResult]()
    for result in results:
        rules.setdefault(result.rule, result)
    run = {
        "tool": {"driver": {"name": "memfit", "version": version, "rules": [*map(_rule, rules.values())]}},
        "results": [_result(result, list(rules).index(result.rule)) for result in results],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _rule(result: SarifResult) -> dict[str, Any]:
    rule: dict[str, Any] = {
        "id": result.rule,
        "shortDescription": {"text": result.rule.replace("-", " ")},
        "help": {"text": result.advice},
        "defaultConfiguration": {"level": result.level},
    }
    return rule | ({"helpUri": result.link} if result.link else {})


def _result(result: SarifResult, rule_index: int) -> dict[str, Any]:
    location: dict[str, Any] = {"artifactLocation": {"uri": _uri(result.file)}}
    if result.line is not None:
        column = {"startColumn": result.column} if result.column is not None else {}
        location["region"] = {"startLine": result.line, **column}
    return {
        "ruleId": result.rule,
        "ruleIndex": rule_index,
        "level": result.level,
        "message": {"text": f"{result.text} {result.advice}".strip()},
        "locations": [{"physicalLocation": location}],
    }


def _uri(file: Path) -> str:
    path, here = file.resolve(), Path.cwd().resolve()
    return quote(path.relative_to(here).as_posix()) if path.is_relative_to(here) else path.as_uri()
