"""Compare the settings in a file with those that its library accepts, and find unknown settings and invalid
values.

The accepted settings are in options/*.toml, which scripts/library_options.py writes from the libraries' own
classes and parsers.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from memfit.lint.parse import Options
from memfit.lint.phrases import Phrase, Series, phrase
from memfit.lint.tables import read_table

_LIKE = 0.85  # difflib's similarity cutoff
_MOST_SHOWN = 9  # allowed values that are shown in full
_MOST_FOREIGN = 0.5  # at most this share of the top-level keys of a library's own file is unknown to it
_SWITCHES = {True: ("true", "yes", "on", "1", "y", "t"), False: ("false", "no", "off", "0", "n", "f")}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """The values that a setting accepts. ``kind``: integer, number, switch (true or false), text, list, table
    (a mapping), or any; ``least`` and ``most``: bounds of a number, None for no bound; ``open``: True if the
    number must be above ``least``, not equal to it; ``values``: the only accepted values, empty if they are
    not enumerated; ``any_case``: whether upper and lower case are the same in ``values``."""

    kind: str = "any"
    least: float | None = None  # inclusive, unless ``open``
    most: float | None = None
    open: bool = False
    values: tuple[Any, ...] = ()
    any_case: bool = False

    def accepts(self, value: Any, *, spelled: bool) -> bool:
        """Return whether the setting accepts ``value``; None is always accepted. ``spelled``: whether a
        number or a switch may be written as text. If ``values`` is not empty, ``value`` must be one of these,
        compared as text; a boolean also matches words for it, such as yes. Otherwise ``kind`` decides: any
        and text accept every value, list all but a mapping, table only a mapping; for the other kinds see
        `is_number` and `is_switch`."""
        if value is None or (self.kind == "any" and not self.values):
            return True
        if self.values:
            return self._is_one(value)
        if isinstance(value, Mapping | list):
            return self.kind == ("table" if isinstance(value, Mapping) else "list") or self.kind == "text"
        return _CHECKS[self.kind](self, value, spelled)

    def _is_one(self, value: Any) -> bool:
        if isinstance(value, Mapping | list):
            return False
        normalize = str.lower if self.any_case or isinstance(value, bool) else str
        # YAML reads the word no as False, so a boolean matches every spelling of itself.
        spellings = _SWITCHES[value] if isinstance(value, bool) else (normalize(str(value)),)
        return any(normalize(str(v)) in spellings for v in self.values)

    def is_number(self, value: Any, spelled: bool) -> bool:
        """Return whether ``value`` is a number within ``least`` and ``most`` and, if the kind is integer, a
        whole one. true and false count as 1 and 0. ``spelled``: whether the number may be written as text."""
        number = _number(value, spelled)
        if number is None or (self.kind != "number" and not _is_integer(value, number)):
            return False
        above_minimum = self.least is None or number > self.least or (number == self.least and not self.open)
        return above_minimum and (self.most is None or number <= self.most)

    def is_switch(self, value: Any, spelled: bool) -> bool:
        """Return whether ``value`` is true, false, 0 or 1. If ``spelled``, also whether its text, in any
        case, is one of true, yes, on, 1, y, t, false, no, off, 0, n and f."""
        words = (*_SWITCHES[True], *_SWITCHES[False])
        return isinstance(value, bool) or value in (0, 1) or (spelled and str(value).lower() in words)

    @property
    def description(self) -> Phrase:
        """The accepted values by their kind and bounds, such as "integer >= 1"; for a setting whose values
        are not enumerated."""
        minimum, maximum = "above" if self.open else "at-least", "at-most"
        bounds = [
            phrase(name, limit=f"{limit:g}")
            for name, limit in ((minimum, self.least), (maximum, self.most))
            if limit is not None
        ]
        kind = phrase(self.kind)
        return phrase("bounded", kind=kind, bounds=Series(tuple(bounds), "space")) if bounds else kind


_CHECKS = {
    "integer": Spec.is_number,
    "number": Spec.is_number,
    "switch": Spec.is_switch,
    "text": lambda *_: True,
    "list": lambda *_: True,  # most libraries split text into a list
    "table": lambda *_: False,
}


def _number(value: Any, spelled: bool) -> float | None:
    if isinstance(value, str) and not spelled:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _is_integer(value: Any, number: float) -> bool:
    """Return whether ``value``, which float() converts to ``number``, is an integer. The number 5e8 is one;
    the text "5e8" is not, because int() does not parse it."""
    is_other_text = isinstance(value, str) and not value.strip().lstrip("+-").replace("_", "").isdigit()
    return number == number and abs(number) != float("inf") and number == int(number) and not is_other_text


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LibrarySettings:
    """The settings of one library, by section; a section is a dotted path, "" is the top level. ``release``:
    name and version of the library that ``now`` describes, such as "DeepSpeed 0.19.8"; ``now``: section ->
    setting -> accepted values; ``older``: section -> names that this release does not have but other
    releases, forks or front ends do; ``refuses``: sections in which an unknown key stops the library;
    ``spelled``: sections in which numbers and switches may be written as text; ``needs``: a top-level key
    without which a file is not the library's, "" if there is none; ``shares``: whether a file may hold
    settings of other programs as well."""

    release: str
    now: Mapping[str, Mapping[str, Spec]]
    older: Mapping[str, frozenset[str]]
    refuses: frozenset[str]
    spelled: frozenset[str]
    needs: str
    shares: bool

    @property
    def sections(self) -> frozenset[str]:
        return frozenset(self.now.keys() | self.older.keys())

    def names(self, section: str) -> frozenset[str]:
        """Return the names of all settings that ``section`` has in the described release (``now``) or in
        others (``older``); empty for an unknown section."""
        return frozenset(self.now.get(section, {})) | self.older.get(section, frozenset())

    def near(self, section: str, key: str) -> str | None:
        """Return the dotted path of the setting that was probably meant by ``key``, a name unknown in
        ``section``: that of the most similar name in the section (see `find_similar`). If none is similar,
        return the path of the setting called ``key`` in another section, if exactly one section has it,
        otherwise None. If files may hold settings of other programs (``shares``), only names in ``now`` count
        as similar, and other sections are not searched for a top-level key."""
        similar_name = find_similar(key, self.now.get(section, {}) if self.shares else self.names(section))
        if similar_name is not None:
            return f"{section}.{similar_name}".lstrip(".")
        if self.shares and not section:
            return None
        paths = [
            f"{other_section}.{key}".lstrip(".")
            for other_section in self.sections
            if key in self.names(other_section)
        ]
        return paths[0] if len(paths) == 1 else None


def find_similar(name: str, names: Iterable[str]) -> str | None:
    """Return the one of ``names`` that is most similar to ``name``, or None if the similarity of each, as
    difflib measures it, is below 0.85: in a name of seven letters or more, one letter may be left out,
    doubled or swapped with the next. Capitals in ``name`` count as small letters, hyphens as underscores."""
    matches = difflib.get_close_matches(name.lower().replace("-", "_"), names, n=1, cutoff=_LIKE)
    return matches[0] if matches else None


@functools.cache
def library_settings(library: str) -> LibrarySettings:
    """Return the settings that ``library`` accepts. ``library``: "accelerate", "deepspeed", "megatron",
    "torchtitan" or "trainer", a file in options/ without its suffix."""
    data = read_table(f"options/{library}.toml")
    now = {
        section: {
            key: _spec(
                spec,
                data.get("also", {}).get(section, {}).get(key),
                f"{section}.{key}".lstrip(".") in data["any_case"],
            )
            for key, spec in keys.items()
        }
        for section, keys in data["now"].items()
    }
    return LibrarySettings(
        release=data["release"],
        now=now,
        older={section: frozenset(words.split()) for section, words in data["older"].items()},
        refuses=frozenset(data["refuses"]),
        spelled=frozenset(data["spelled"]),
        needs=data["needs"],
        shares=data["shares"],
    )


def _spec(schema: Any, extra_values: Any, any_case: bool) -> Spec:
    if extra_values == "any":
        return Spec()
    if isinstance(schema, list):
        return Spec(values=(*schema, *(extra_values or ())), any_case=any_case)
    kind, *bounds = schema.split()
    limits = dict(zip(bounds[::2], map(float, bounds[1::2]), strict=True))
    return Spec(kind=kind, least=limits.get(">=", limits.get(">")), most=limits.get("<="), open=">" in limits)


def _is_own(options: Options, library: str) -> bool:
    """Return whether the file of ``options`` is the library's own: it has the key that such files need
    (``needs``), if any, and at most half of its top-level keys are unknown to the library. Front ends mix the
    library's settings with many of their own, and a file that maps words to numbers can contain some of the
    names by chance."""
    table = library_settings(library)
    foreign = [key for key in options.data if str(key) not in table.names("")]
    if table.needs and table.needs not in options.data:
        return False
    return len(foreign) <= _MOST_FOREIGN * len(options.data)


def find_unknown(options: Options, library: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield (section, key, dotted path of the setting that was probably meant) for each setting of
    ``options`` that the library has in that section neither in the described release (``now``) nor under
    ``older`` names. The path is None if `LibrarySettings.near` finds none, or if the file already sets what
    it finds: then the key is assumed to be the user's own. Yield nothing for a file that is not the library's
    own: that lacks the key ``needs``, or most of whose top-level keys the library does not have."""
    table = library_settings(library)
    for section, key, _ in _settings(options.data, table, "") if _is_own(options, library) else ():
        if key not in table.names(section):
            near = table.near(section, key)
            yield section, key, near if near is None or options.raw(near) is None else None


def find_invalid(options: Options, library: str) -> Iterator[tuple[str, Any, Spec]]:
    """Yield (dotted path, value, accepted values) for each value in ``options`` that the library does not
    accept. Skipped are settings that are not in ``now`` of `library_settings`, values that are left to the
    library ("auto") or known only when a script runs, flags of a script without a value, and files that are
    not the library's own (as in `find_unknown`)."""
    table = library_settings(library)
    script = not options.file.endswith((".json", ".yaml", ".yml", ".toml"))
    for section, key, _ in _settings(options.data, table, "") if _is_own(options, library) else ():
        path = f"{section}.{key}".lstrip(".")
        spec, value = table.now.get(section, {}).get(key), options.get(path)
        if spec is None or (value is True and script):  # True in a script: its value was not read
            continue
        if not spec.accepts(value, spelled=section in table.spelled):
            yield path, value, spec


def _settings(
    data: Mapping[str, Any], table: LibrarySettings, section: str
) -> Iterator[tuple[str, str, Any]]:
    """Yield (section, key, value) for all settings in ``data``, the content of ``section``, and in the
    sections below it. If a value is a mapping that is no section of the library, the mapping is yielded as
    one value, but not what it contains: that is the user's own."""
    for key, value in data.items():
        yield section, str(key), value
        path = f"{section}.{key}".lstrip(".")
        if isinstance(value, Mapping) and path in table.sections:
            yield from _settings(value, table, path)


def accepted_text(spec: Spec, value: Any) -> str | Phrase:
    """Return the values that ``spec`` accepts, as a part of a finding. Up to nine enumerated values are all
    listed; of more, only the three that are most similar to ``value``, followed by "..." and the number of
    all. Values that are not enumerated are described by kind and bounds."""
    names = [str(v) for v in spec.values]
    if not names:
        return spec.description
    if len(names) <= _MOST_SHOWN:
        return ", ".join(names)
    closest = difflib.get_close_matches(str(value), names, n=3, cutoff=0) or names[:3]
    return f"{', '.join(closest)}, ... ({len(names)})"
