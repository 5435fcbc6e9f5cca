"""Find known misconfigurations in a set-up. rules.toml holds the text, the advice and the links of each
rule."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Callable, Mapping
from typing import Any

from memfit.lint import (
    rules_deepspeed,
    rules_front_ends,
    rules_hugging_face,
    rules_megatron,
    rules_openfold,
    rules_options,
    rules_torchtitan,
    rules_trainer,
)
from memfit.lint.parse import Found, Setup
from memfit.lint.phrases import render
from memfit.lint.tables import read_table
from memfit.types.errors import UserError, suggest

# Rule name -> (the kinds of files that it compares, the check). The check is called with the options of each
# of these kinds and the whole set-up, and yields the values that fill the rule's text.
CHECKS: Mapping[str, tuple[tuple[str, ...], Callable[..., Found]]] = {
    check.__name__.replace("_", "-"): (kinds, check)
    for module in (
        rules_options,
        rules_deepspeed,
        rules_hugging_face,
        rules_trainer,
        rules_megatron,
        rules_torchtitan,
        rules_openfold,
        rules_front_ends,
    )
    for kinds, checks in module.CHECKS.items()
    for check in checks
}


class Severity(enum.StrEnum):
    """How bad a finding is. The members go from the most to the least severe; check() orders its findings in
    this way."""

    ERROR = "error"  # the library refuses to start, or trains something other than the files say
    WARNING = "warning"  # an option has no effect, or costs memory or time without a benefit
    NOTE = "note"  # the configuration works, but a better one exists


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One misconfiguration. ``rule``: name of the rule that found it, such as "deepspeed-bucket"; ``file``:
    path of the file that the rule checks or, if it compares files of several kinds, of that of the first of
    its kinds in `CHECKS`; ``says``: what is wrong, with the values of the files filled in; ``do``: the
    advice; ``links``: web addresses where the problem was reported or is documented."""

    rule: str
    severity: Severity
    file: str
    says: str
    do: str
    links: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RuleText:
    """What a rule reports. ``kinds``: the kinds of files that it compares. ``says`` and ``do``: finding and
    advice, with <name> for each value that the files give. ``when``: the condition, in English. ``links``:
    web addresses where the problem was reported or is documented."""

    rule: str
    severity: Severity
    kinds: tuple[str, ...]
    says: str
    do: str
    when: str
    links: tuple[str, ...]


def explain(name: str, *, lang: str = "en") -> RuleText:
    """Return the text of the rule ``name``, such as "deepspeed-bucket", in the language ``lang``, "en" or
    "ja"; the condition is always in English. Raises UserError for an unknown rule, and KeyError for another
    language."""
    if name not in CHECKS:
        raise UserError(
            f"unknown rule {name!r}",
            allowed="a rule as a finding names it in brackets, such as trainer-two-precisions",
            hint=suggest(name, CHECKS),
        )
    kinds, find_values = CHECKS[name]
    rule = texts()[name]
    says, do = (re.sub(r"\{(\w+)\}", r"<\1>", text) for text in rule[lang])
    return RuleText(
        rule=name,
        severity=Severity(rule["severity"]),
        kinds=kinds,
        says=says,
        do=do,
        when=_condition(find_values),
        links=tuple(rule["links"]),
    )


def _condition(find_values: Callable[..., Found]) -> str:
    """Return the docstring of a rule's function as the user's text: on one line, without references to code,
    and with rules under their names, such as deepspeed-bucket for deepspeed_bucket."""
    text = " ".join((find_values.__doc__ or "").split())
    text = re.sub(r" \((?:see `_\w+`|``m\.defaults`` is False)\)", "", text)

    def shown(word: re.Match[str]) -> str:
        name = word[0].replace("_", "-")
        return name if name in CHECKS else word[0]

    return re.sub(r"\w+_\w+", shown, text)


def texts() -> Mapping[str, Mapping[str, Any]]:
    """Return the content of rules.toml: rule name -> table with the keys "severity", "links", "en" and "ja".
    The last two are languages; each holds a pair of templates (finding, advice)."""
    return read_table("rules.toml")


def check(setup: Setup, *, lang: str = "en") -> tuple[Finding, ...]:
    """Return all findings in ``setup``, the most severe first, those of equal severity in the order of
    `CHECKS`. Their texts are in the language ``lang``, "en" or "ja". A rule is applied only if ``setup`` has
    settings of all kinds that it compares. Raises KeyError if there is a finding and rules.toml has no texts
    in ``lang``. Raises UserError if OpenFold's JSON gives a crop size or blocks_per_ckpt that is not a whole
    number above 0 (blocks_per_ckpt may also be null)."""
    findings: list[Finding] = []
    for name, (kinds, find_values) in CHECKS.items():
        options = [getattr(setup, kind) for kind in kinds]
        if all(o is not None for o in options):
            findings += (_finding(name, options[0].file, v, lang) for v in find_values(*options, setup))
    return tuple(sorted(findings, key=lambda f: list(Severity).index(f.severity)))


def _finding(name: str, file: str, values: Mapping[str, Any], lang: str) -> Finding:
    rule = texts()[name]
    parts = {key: render(value, lang) for key, value in values.items()}
    says, do = (text.format(**parts) for text in rule[lang])
    return Finding(
        rule=name,
        severity=Severity(rule["severity"]),
        file=file,
        says=says,
        do=do,
        links=tuple(rule["links"]),
    )
