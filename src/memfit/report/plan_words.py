"""Plans and techniques in the words of a language, from the identifiers that commands and records use:
"activation checkpointing, every second block; activation offload to disk" for
``activation-checkpointing(every=2) + activation-offload(minimum_kib=64, to=disk)``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from memfit.engines.registry import ENGINES
from memfit.report.words import JAPANESE, Words
from memfit.techniques.registry import TECHNIQUES

PLAIN_LABELS: Final = ("plain", "plain training")
_USE: Final = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*)(?:\((.*)\))?")
_JAPANESE_SPACE: Final = re.compile(rf"(?<={JAPANESE.pattern}) (?={JAPANESE.pattern})")
_RANKS: Final = re.compile(r" on (\d+) ranks$")


def plan_phrase(label: str, words: Words) -> str:
    """Return a plan in words, as in running text. ``label``: that of `Plan.label`, or "plain training".

    A setting is said if the word catalogs have a text for its value, or one for "other" values and it is not
    the default. A technique that is not registered, as in a record of an older version, keeps its identifier.
    A text that is no label is returned unchanged.
    """
    if label in PLAIN_LABELS:
        return words.get("plan.plain")
    ranks = _RANKS.search(label)
    parts = [_USE.fullmatch(part) for part in _RANKS.sub("", label).split(" + ")]
    uses = [part for part in parts if part is not None]
    if len(uses) < len(parts):
        return label
    phrases = (_use_phrase(part[1], _settings(part[2] or ""), words) for part in uses)
    plan = words.get("plan.separator").join(
        words.get("plan.plain") if phrase == "plain" else phrase for phrase in phrases
    )
    return words.get("plan.ranks", plan=plan, ranks=ranks[1]) if ranks else plan


def plan_title(label: str, words: Words) -> str:
    """Return a plan in words as `plan_phrase` does, with a capital letter at its beginning, unless its first
    word has a digit."""
    return capitalize(plan_phrase(label, words))


def capitalize(phrase: str) -> str:
    """Return the phrase with a capital letter at its beginning, unless its first word has a digit."""
    return phrase if re.match(r"\S*\d", phrase) else phrase[:1].upper() + phrase[1:]


def is_plan_label(text: str) -> bool:
    """Return whether the text is the label of a plan all of whose techniques are registered."""
    parts = [_USE.fullmatch(part) for part in _RANKS.sub("", text).split(" + ")]
    return text in PLAIN_LABELS or all(part is not None and part[1] in TECHNIQUES for part in parts)


def in_words(text: str, words: Words) -> str:
    """Return a text of another package for readers: a plan's label in words; of any other text its
    translation, in which identifiers of engines, and of techniques that have a hyphen, are replaced by their
    names."""
    if is_plan_label(text):
        return plan_phrase(text, words)
    named = _IDENTIFIER.sub(
        lambda m: (plan_phrase if "(" in m[0] else technique_names)(m[0], words), words.of(text)
    )
    named = _ENGINE.sub(lambda m: words.texts.get(f"engine.{m[0]}", m[0]), named)
    return _JAPANESE_SPACE.sub("", named)


def technique_names(names: str, words: Words) -> str:
    """Return identifiers of techniques, separated by ", ", as their names in the language of ``words``. An
    identifier without a name stays."""
    return words.get("plan.detail_separator").join(
        words.texts.get(f"technique.{name}.name", name) for name in names.split(", ")
    )


def glossary(labels: Iterable[str], words: Words) -> Mapping[str, tuple[str, str]]:
    """Return identifier -> (name, one sentence for a reader who does not train models) of each registered
    technique that occurs in the ``labels`` of plans or is one of them, sorted by name."""
    parts = (part for label in labels for part in _RANKS.sub("", label).split(" + "))
    identifiers = {m[1] for part in parts if (m := _USE.fullmatch(part)) and m[1] in TECHNIQUES}
    texts = {
        i: (capitalize(words.get(f"technique.{i}.name")), words.get(f"technique.{i}.picture"))
        for i in identifiers
    }
    return dict(sorted(texts.items(), key=lambda item: item[1][0].lower()))


_IDENTIFIER: Final = re.compile(
    r"(?<![\w-])(?:{})(?:\([^()\s]*=[^()]*\))?(?![\w-])".format(
        "|".join(sorted((name for name in TECHNIQUES if "-" in name), key=len, reverse=True))
    )
)
_ENGINE: Final = re.compile(
    r"(?<![\w-])(?:{})(?![\w-])".format("|".join(e.name for e in ENGINES.values() if e.distribution))
)


def _settings(text: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in text.split(", ") if part)
    return {name: value for name, _, value in pairs}


def _use_phrase(name: str, settings: Mapping[str, str], words: Words) -> str:
    key = f"technique.{name}"
    if f"{key}.name" not in words.texts:
        return name
    phrase = words.texts.get(f"{key}.phrase", words.texts[f"{key}.name"])
    knobs = {knob.name: settings.get(knob.name, str(knob.default)) for knob in TECHNIQUES[name].knobs}
    in_phrase = {
        n: _setting(key, n, v, words, default="") or v for n, v in knobs.items() if f"{{{n}}}" in phrase
    }
    details = [
        text
        for knob in TECHNIQUES[name].knobs
        if knob.name not in in_phrase
        and (text := _setting(key, knob.name, knobs[knob.name], words, default=str(knob.default)))
    ]
    phrase = phrase.format(**in_phrase)
    joined = words.get("plan.detail_separator").join(details)
    return words.get("plan.detail", phrase=phrase, details=joined) if details else phrase


def _setting(technique: str, knob: str, value: str, words: Words, *, default: str) -> str:
    """Return the text of a setting, or "" if it is not said."""
    exact = words.texts.get(f"{technique}.{knob}.{value}")
    if exact is not None or value == default:
        return exact or ""
    other = words.texts.get(f"{technique}.{knob}.other", "")
    return other.format(value=f"{int(value):,}" if value.isdigit() else value)
