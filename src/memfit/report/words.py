"""The report's words, separate from its numbers: one catalog per language, with the same keys and
placeholders.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Final

from memfit.files.read import leaves
from memfit.types.errors import UserError

LANGUAGES: Final = ("en", "ja")
JAPANESE: Final = re.compile("[\u3001-\u303f\u3040-\u30ff\u4e00-\u9fff\uff01-\uff60]")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """The texts of one language, ``lang``.

    ``texts``: dotted key, such as "outcome.oom", -> text with ``{placeholders}``. ``translations``: English
    text of another package, which may have placeholders too, -> the text in this language; empty for English.
    """

    lang: str
    texts: Mapping[str, str]
    translations: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def get(self, key: str, **placeholders: object) -> str:
        """Return the text of ``key`` with its placeholders filled. Placeholders that the text does not have
        are ignored.

        Raises KeyError for an unknown key, or if the text has a placeholder that is not given.
        """
        return self.template(key, placeholders).format(**placeholders)

    def template(self, key: str, values: Mapping[str, object]) -> str:
        """Return the text of ``key`` with its placeholders not yet filled. ``values``: what they will be
        filled with; it matters in Japanese only, where the space before or after a placeholder is removed if
        the characters on its two sides are Japanese.

        Raises KeyError for an unknown key.
        """
        text = self.texts[key]
        for name, value in values.items() if self.lang == "ja" else ():
            if isinstance(value, str) and value and JAPANESE.match(value[-1]):
                text = re.sub(rf"(\{{{name}\}}) (?={JAPANESE.pattern})", r"\1", text)
            if isinstance(value, str) and value and JAPANESE.match(value[0]):
                text = re.sub(rf"(?<={JAPANESE.pattern}) (\{{{name}\}})", r"\1", text)
        return text

    def name(self, group: str, value: str) -> str:
        """Return the text of the key GROUP.VALUE for a name that another package defines: "setup" of the
        group "phase". Without such a key, return the name with spaces for underscores."""
        return self.texts.get(f"{group}.{value}", value.replace("_", " "))

    def of(self, text: str) -> str:
        """Return the translation of an English text of another package, also if it is one of ``translations``
        with its placeholders filled; what fills them is translated in the same way. A text without a
        translation, such as a proper name or a citation, is returned unchanged."""
        if text in self.translations:
            return self.translations[text]
        for pattern, template in _patterns(self.lang):
            if match := pattern.fullmatch(text):
                return template.format(**{k: self.of(v) for k, v in match.groupdict().items()})
        return text

    def all(self, group: str) -> tuple[str, ...]:
        """Return the texts of all keys that begin with GROUP and a dot, in the catalog's order."""
        return tuple(text for key, text in self.texts.items() if key.startswith(f"{group}."))


def load_words(lang: str) -> Words:
    """Return the texts of a language: "en" or "ja". Raises UserError for any other."""
    if lang not in LANGUAGES:
        raise UserError(f"no such language: {lang!r}", allowed=", ".join(LANGUAGES))
    texts: dict[str, str] = {}
    for file in (f"{lang}.toml", f"{lang}_decision.toml", f"{lang}_techniques.toml", f"{lang}_watch.toml"):
        text = resources.files("memfit.report").joinpath("words", file).read_text(encoding="utf-8")
        texts |= dict(leaves(tomllib.loads(text)))
    return Words(lang=lang, texts=texts, translations=_translations(lang))


@functools.cache
def _translations(lang: str) -> Mapping[str, str]:
    file = resources.files("memfit.report").joinpath("words", f"{lang}_told.toml")
    return tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@functools.cache
def _patterns(lang: str) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Return (pattern that the filled English text matches, translation with placeholders) for each text of
    ``translations`` that has placeholders, the longest English text first."""
    templates = sorted((text for text in _translations(lang) if "{" in text), key=len, reverse=True)
    return tuple((re.compile(_pattern(text)), _translations(lang)[text]) for text in templates)


# placeholders for single names and numbers, not for sentences by others
_ONE_WORD: Final = dict.fromkeys(
    ("technique", "engine", "knob", "name", "option", "job", "count", "layers", "ranks"), r"\S+"
)


# of placeholders whose name ends in "bytes": a size as `format_bytes` writes it
_BYTES: Final = r"[\d.,e+]+ (?:[KMGT]i)?B"


def _pattern(text: str) -> str:
    pattern = ""
    for index, part in enumerate(re.split(r"\{(\w+)\}", text)):
        value_pattern = _BYTES if part.endswith("bytes") else _ONE_WORD.get(part, ".+?")
        pattern += f"(?P<{part}>{value_pattern})" if index % 2 else re.escape(part)
    return pattern
