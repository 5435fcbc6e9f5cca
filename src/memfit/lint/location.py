"""Find the line of a configuration file that a finding is about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from memfit.files.read import MOST_YAML_BYTES

_WORD = re.compile(r"[A-Za-z_][\w.-]*\w")
_TABLE, _ASSIGNMENT = re.compile(r"\s*\[+\s*([^\]]+?)\s*\]"), re.compile(r"\s*([\w.\-\"']+)\s*=")
_FLAG = re.compile(r"(?<![\w-])--([A-Za-z][\w-]*)")
_NAMES_A_KEY = re.compile(r"[_.\-\d]")  # other words of a sentence may be plain English

Position = tuple[int, int]  # line and column, both from 1


def locate(text: str, suffix: str, sentence: str) -> Position | None:
    """Return the position of the setting that ``sentence`` names, in a file with the content ``text`` and the
    suffix ``suffix``, such as ".json"; files of other suffixes than .json, .yaml, .yml and .toml are shell
    scripts.

    It is that of the first word that is the name, the dotted path or the end of the dotted path of exactly
    one key, or the name of exactly one flag. Words without a digit, underscore, dot or hyphen are skipped.
    None if there is no such word, and for JSON or YAML that cannot be parsed or is too large
    (`MOST_YAML_BYTES`).
    """
    keys = list(_keys(text, suffix))
    for word in _WORD.findall(sentence):
        name = _normal(word)
        matches = [position for key, position in keys if key == name or key.endswith(f".{name}")]
        if _NAMES_A_KEY.search(word) and len(matches) == 1:
            return matches[0]
    return None


def _normal(key: str) -> str:
    return key.replace("-", "_").replace('"', "").replace("'", "")


def _keys(text: str, suffix: str) -> Iterator[tuple[str, Position]]:
    """Yield the dotted path and the position of each key, with underscores for hyphens."""
    if suffix in (".json", ".yaml", ".yml"):
        yield from _yaml_keys(text)
    elif suffix == ".toml":
        yield from _toml_keys(text)
    else:
        for number, line in enumerate(text.splitlines(), 1):
            for match in _FLAG.finditer(line.partition("#")[0]):
                yield _normal(match[1]), (number, match.start() + 1)


def _yaml_keys(text: str) -> Iterator[tuple[str, Position]]:
    """Yield as `_keys` does the keys of YAML or JSON, which is read as YAML, too; nothing if it cannot be
    parsed or is too large."""
    import yaml

    from memfit.files.yaml_loader import BoundedLoader

    if len(text) > MOST_YAML_BYTES:
        return
    try:
        root = yaml.compose(text, BoundedLoader)
    except yaml.YAMLError:  # such as JSON that is indented with tabs
        return
    nodes: list[tuple[str, Any]] = [("", root)]
    seen = set[int]()  # an alias may refer to a mapping that contains it
    for prefix, node in nodes:
        if not isinstance(node, yaml.MappingNode) or id(node) in seen:
            continue
        seen.add(id(node))
        for key, value in node.value:
            path = f"{prefix}{_normal(str(key.value))}"
            yield path, (key.start_mark.line + 1, key.start_mark.column + 1)
            nodes.append((f"{path}.", value))


def _toml_keys(text: str) -> Iterator[tuple[str, Position]]:
    prefix = ""
    for number, line in enumerate(text.splitlines(), 1):
        if (table := _TABLE.match(line)) is not None:
            prefix = f"{_normal(table[1])}."
            yield prefix[:-1], (number, table.start(1) + 1)
        elif (assignment := _ASSIGNMENT.match(line)) is not None:
            yield f"{prefix}{_normal(assignment[1])}", (number, assignment.start(1) + 1)
