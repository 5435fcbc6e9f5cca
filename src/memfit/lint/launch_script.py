"""Read the flags that a shell script passes to the program it starts, as far as they are known without
running it."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_VALUE = r"\"[^\"\n]*\"|'[^'\n]*'|\$\(\([^\n]*\)\)|[^\s;(]*"
_ASSIGNED = re.compile(rf"({_NAME})=({_VALUE})")
# Where a command starts, the word that declares variables, and all assignments after it.
_ASSIGNMENTS = re.compile(
    r"(?:^|;|&&|\|\||\b(?:then|do|else)\b)\s*"
    r"((?:(?:export|readonly|declare|typeset|local)\s+(?:-\w+\s+)*)?)"
    rf"((?:{_NAME}=(?:{_VALUE})\s*)+)"
)
_ASSIGNED_DEFAULT = re.compile(rf"\$\{{({_NAME}):?=([^{{}}]*)\}}")
_VARIABLE = re.compile(rf"\$\{{({_NAME}|\d+)(?::?[-=]([^{{}}]*))?\}}|\$({_NAME})")
_SUM = re.compile(r"\$\(\(([^()]*)\)\)")
_FLAG = re.compile(r"--[A-Za-z][\w-]*")
_OPENS, _CLOSES = re.compile(r"\b(?:if|case|for|while|until)\b"), re.compile(r"\b(?:fi|esac|done)\b")
_OPERATORS = frozenset({"\\", "|", "||", "&", "&&", ">"})
_NUMBER = re.compile(r"-[\d.][\d.e-]*")
_QUOTED_VALUE = re.compile(r"=([\"'])([^\s\"'(){}\[\];]*)\1")  # of a flag, as in --dtype="float32"
# In shell arithmetic, octal after a leading 0. Longer numbers do not fit the shell's 64 bits.
_INTEGER = re.compile(r"0[0-7]{0,17}|[1-9][0-9]{0,17}")
_MOST_ROUNDS = 6  # of substitution, for variables whose values refer to other variables
_WORK: Mapping[str, Callable[[int, int], int]] = {
    "*": operator.mul,
    "/": operator.floordiv,
    "+": operator.add,
    "-": operator.sub,
}
_JSON = re.compile(r"'(\{[^']*\})'|\"(\{(?:[^\"\\]|\\.)*\})\"", re.S)
# Characters that the shell interprets -> private-use characters, which replace them in JSON text.
_HIDDEN = {ord(character): 0xE000 + i for i, character in enumerate("\"'(){}[];$`#\\ \t\r\n")}
_SHOWN = {hidden: character for character, hidden in _HIDDEN.items()}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What a shell script passes to the programs that it starts. ``flags``: Python name (``--micro-batch`` is
    ``micro_batch``) -> True for a flag without a value, otherwise the text of its first value. For a flag
    that is given twice, the last one counts. ``env``: name -> value of the variables that the script exports.
    ``unsure``: Python names of flags that are given within a branch or a loop, or given twice with different
    values. ``underscored``: names of the flags that the script writes with an underscore, such as
    ``micro_batch`` for ``--micro_batch``."""

    flags: Mapping[str, Any]
    env: Mapping[str, str]
    unsure: frozenset[str]
    underscored: frozenset[str] = frozenset()


def read_script(text: str) -> Script:
    """Return the flags and exported variables of the shell script ``text``. A variable is replaced by its
    value if the whole script gives it only one value. Otherwise the default of ``${NAME:-default}`` takes its
    place, or, without a default, the text ``$NAME`` stays. Sums such as ``$((2 * N))`` are calculated where
    all variables are known. An exported variable with several values is left out. JSON text in quotation
    marks is one value."""
    lines = _lines(text)
    variables = _variables(lines)
    flags: dict[str, Any] = {}
    unsure: set[str] = set()
    for line, in_branch in _branches(lines):
        for name, value in _flags(_substitute(line, variables)):
            if in_branch or flags.get(name, value) != value:
                unsure.add(name)
            flags[name] = value
    exported = {name for name, _, is_exported in _assignments(lines) if is_exported}
    environment = {
        variable: variable_value for variable, variable_value in variables.items() if variable in exported
    }
    underscored = frozenset(re.findall(r"--(\w*_\w*)", "\n".join(lines)))
    return Script(flags=flags, env=environment, unsure=frozenset(unsure), underscored=underscored)


def option_values(text: str) -> dict[str, tuple[str, ...]]:
    """Return Python name (``--micro-batch`` is ``micro_batch``) -> all values of the flag, for each flag in
    the shell script ``text``. Variables are replaced as in `read_script`; a flag without values has an empty
    tuple. If a flag is given twice, only the values of the last one are returned."""
    lines = _lines(text)
    variables = _variables(lines)
    options: dict[str, tuple[str, ...]] = {}
    for line in lines:
        name: str | None = None
        for word in _words(_substitute(line, variables)):
            flag, has_value, value = word.partition("=")
            if _FLAG.fullmatch(flag):
                name = flag[2:].replace("-", "_")
                options[name] = (value.translate(_SHOWN),) if has_value else ()
            elif word in _OPERATORS or (word[0] in "->" and not _NUMBER.fullmatch(word)):
                name = None
            elif name is not None:
                options[name] = (*options[name], word.translate(_SHOWN))
    return options


def _lines(text: str) -> list[str]:
    """Return the lines of a shell script without comments. Lines that are continued with a backslash are
    joined. In JSON text in quotation marks, private-use characters replace spaces, quotation marks and others
    that the shell interprets (``_HIDDEN``), so that it is one word."""
    text = re.sub(r"(?m)(?:^|(?<=\s))#.*$", "", _JSON.sub(_hide, text))
    return re.sub(r"\\\s*\n", " ", text).splitlines()


def _hide(match: re.Match[str]) -> str:
    text = match[1] if match[1] is not None else re.sub(r"\\(.)", r"\1", match[2])
    return f"'{text.translate(_HIDDEN)}'"


def _words(line: str) -> list[str]:
    line = _QUOTED_VALUE.sub(r"=\2", line)
    return re.sub(r"[\"'(){}\[\];]", " ", line).split()


def _branches(lines: list[str]) -> Iterator[tuple[str, bool]]:
    """Yield each line of a shell script, and whether it lies within a branch or a loop (if, case, for, while,
    until). The lines that open and close one count as within; a branch or loop on a single line does not."""
    depth = 0
    for line in lines:
        unquoted = re.sub(r"\"[^\"]*\"|'[^']*'|--[\w-]+", "", line)
        opened_count, closed_count = len(_OPENS.findall(unquoted)), len(_CLOSES.findall(unquoted))
        yield line, depth > 0 or opened_count > closed_count
        depth = max(0, depth + opened_count - closed_count)


def _assignments(lines: list[str]) -> Iterator[tuple[str, str, bool]]:
    """Yield (name, value, whether ``export`` precedes it) for each assignment of a shell variable at the
    start of a command in ``lines``, and, as not exported, for each default that ``${NAME:=value}`` or
    ``${NAME=value}`` assigns."""
    for line in lines:
        for declaration, assignments in _ASSIGNMENTS.findall(line):
            for name, value in _ASSIGNED.findall(assignments):
                yield name, value.strip("\"'"), declaration.startswith("export")
        for name, value in _ASSIGNED_DEFAULT.findall(line):
            yield name, value, False


def _variables(lines: list[str]) -> dict[str, str]:
    """Return name -> value of the shell variables to which ``lines``, those of the whole script, assign only
    one value, once or repeatedly. Variables within these values are replaced by their own values, if they
    have one here."""
    values: dict[str, set[str]] = {}
    for name, value, _ in _assignments(lines):
        values.setdefault(name, set()).add(value)
    variables = {
        name: distinct_values.pop() for name, distinct_values in values.items() if len(distinct_values) == 1
    }
    for _ in range(_MOST_ROUNDS):
        variables = {
            name: _substitute(value, {k: v for k, v in variables.items() if k != name})
            for name, value in variables.items()
        }
    return variables


def _substitute(text: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name, default = match[1] or match[3], match[2]
        return variables.get(name, default if default is not None else match[0])

    text = _VARIABLE.sub(value, text)
    return _SUM.sub(lambda m: _evaluate(m[1], variables) or m[0], text)


def _evaluate(text: str, variables: Mapping[str, str]) -> str | None:
    """Evaluate ``text``, an expression of whole numbers and variables: * and / first, then + and -, from left
    to right; quotients are rounded down. A number that begins with 0 is octal, and double quotes are ignored,
    as in the shell. Return the result as text, or None if a variable is unknown, an intermediate or the final
    result is negative, a number or a result has more than 18 digits, a divisor is 0, or the expression has
    anything else, such as the invalid number 08."""
    words = [variables.get(w, w) for w in re.findall(r'\w+|[^\s\w"]', text)]
    parts = [str(int(w, 8 if w.startswith("0") else 10)) if _INTEGER.fullmatch(w) else w for w in words]
    for operators in ("*/", "+-"):
        reduced: list[str] = []
        for part in parts:
            if len(reduced) > 1 and reduced[-1] in _WORK and reduced[-1] in operators:
                if not (_INTEGER.fullmatch(part) and _INTEGER.fullmatch(reduced[-2])) or (
                    reduced[-1] == "/" and int(part) == 0
                ):
                    return None
                reduced[-2:] = [str(_WORK[reduced[-1]](int(reduced[-2]), int(part)))]
            else:
                reduced.append(part)
        parts = reduced
    return parts[0] if len(parts) == 1 and _INTEGER.fullmatch(parts[0]) else None


def _flags(line: str) -> Iterator[tuple[str, Any]]:
    words = _words(line)
    for index, word in enumerate(words):
        flag, has_value, value = word.partition("=")
        if not _FLAG.fullmatch(flag):
            continue
        next_word = words[index + 1] if index + 1 < len(words) else "--"
        if not has_value:
            value = "" if next_word.startswith("--") or next_word in _OPERATORS else next_word
        yield flag[2:].replace("-", "_"), value.translate(_SHOWN) or True
