"""Known misconfigurations, found in a set-up. What each is, what to do, where it was reported: rules.toml."""

from __future__ import annotations

import dataclasses
import enum
import functools
import tomllib
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from memfit.lint import (
    rules_deepspeed,
    rules_hugging_face,
    rules_known,
    rules_megatron,
    rules_openfold,
    rules_torchtitan,
    rules_trainer,
)
from memfit.lint.parse import Found, Setup

# Rule -> the kinds of files it compares, and what finds it: called with their options and the whole set-up.
CHECKS: Mapping[str, tuple[tuple[str, ...], Callable[..., Found]]] = {
    check.__name__.replace("_", "-"): (kinds, check)
    for module in (
        rules_known,
        rules_deepspeed,
        rules_hugging_face,
        rules_trainer,
        rules_megatron,
        rules_torchtitan,
        rules_openfold,
    )
    for kinds, checks in module.CHECKS.items()
    for check in checks
}


class Severity(enum.StrEnum):
    ERROR = "error"  # the library refuses, or trains something else than the files say
    WARNING = "warning"  # an option without effect, or one that takes memory or time for nothing
    NOTE = "note"  # it works; there is something better


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One misconfiguration and its values. ``links``: where it was reported or is documented."""

    rule: str
    severity: Severity
    file: str
    says: str
    do: str
    links: tuple[str, ...]


@functools.cache
def texts() -> Mapping[str, Mapping[str, Any]]:
    """Rule -> severity, links, and the finding and the advice in each language."""
    path = resources.files("memfit.lint").joinpath("rules.toml")
    return tomllib.loads(path.read_text(encoding="utf-8"))


def check(setup: Setup, *, lang: str = "en") -> tuple[Finding, ...]:
    """What was found, worst first. Raises KeyError for a language without texts."""
    found: list[Finding] = []
    for name, (kinds, finds) in CHECKS.items():
        options = [getattr(setup, kind) for kind in kinds]
        if all(o is not None for o in options):
            found += (_finding(name, options[0].file, v, lang) for v in finds(*options, setup))
    return tuple(sorted(found, key=lambda f: list(Severity).index(f.severity)))


def _finding(name: str, file: str, values: Mapping[str, Any], lang: str) -> Finding:
    rule = texts()[name]
    says, do = (text.format(**values) for text in rule[lang])
    return Finding(
        rule=name,
        severity=Severity(rule["severity"]),
        file=file,
        says=says,
        do=do,
        links=tuple(rule["links"]),
    )
