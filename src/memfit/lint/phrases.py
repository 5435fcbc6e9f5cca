"""Parts of findings that depend on the language. phrases.toml has their texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from memfit.lint.tables import read_table


@dataclasses.dataclass(frozen=True, slots=True)
class Phrase:
    """A part of a finding: the text ``name`` of phrases.toml with ``values`` in place of its placeholders.
    ``values``: placeholder -> value; a value may itself be a Phrase or a Series."""

    name: str
    values: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Series:
    """Parts of a finding, one after another. ``separator``: the name of the text of phrases.toml that stands
    between two parts: "comma", "and" or "space". A part may itself be a Phrase or a Series."""

    parts: tuple[Any, ...]
    separator: str


def phrase(name: str, /, **values: Any) -> Phrase:
    """Return the part of a finding that is the text ``name`` of phrases.toml, with ``values``
    (placeholder=value) in place of its placeholders."""
    return Phrase(name, values)


def texts() -> Mapping[str, Mapping[str, str]]:
    """Return the content of phrases.toml: name -> language code ("en" or "ja") -> text."""
    return read_table("phrases.toml")


def render(value: Any, lang: str) -> str:
    """Return ``value`` as text in the language ``lang``, "en" or "ja": a Phrase filled in, the parts of a
    Series joined, and anything else as str() gives it."""
    if isinstance(value, Phrase):
        return texts()[value.name][lang].format(**{k: render(v, lang) for k, v in value.values.items()})
    if isinstance(value, Series):
        return texts()[value.separator][lang].join(render(part, lang) for part in value.parts)
    return str(value)
