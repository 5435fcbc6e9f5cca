"""Edits of a Python source text at positions that ``ast`` gives, and their unified diff."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import io
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from memfit.types.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """``text`` replaces the bytes from ``start`` to ``end`` (exclusive) of a source in UTF-8. If both are
    equal, it is inserted there."""

    start: int
    end: int
    text: str


class Source:
    """The source of a Python file: ``text``, its syntax ``tree``, and ``lines`` with their line ends.
    ``path``: the file's path as the user wrote it, for messages and diffs. Raises UserError if ``text`` is
    not Python."""

    def __init__(self, path: str, text: str) -> None:
        self.path, self.text = path, text
        try:
            self.tree = ast.parse(text)
        except (SyntaxError, ValueError) as error:
            raise UserError(
                f"{path} cannot be parsed as Python: {' '.join(str(error).split())[:160]}",
                allowed="a Python script",
            ) from error
        self.lines = _lines(text)
        self._starts = [0]
        for line in self.lines:
            self._starts.append(self._starts[-1] + len(line.encode()))

    def offset(self, line: int, column: int) -> int:
        """Return the byte offset of ``column`` (in bytes) of ``line``, which counts from 1, as in ``ast``."""
        return self._starts[line - 1] + column

    def start(self, node: Any) -> int:
        return self.offset(node.lineno, node.col_offset)

    def end(self, node: Any) -> int:
        return self.offset(node.end_lineno, node.end_col_offset)

    def of(self, node: ast.expr) -> str:
        """Return the source of an expression, in parentheses unless it is a name, an attribute, a constant, a
        call or a subscript."""
        text = self.text.encode()[self.start(node) : self.end(node)].decode()
        is_simple = isinstance(node, ast.Name | ast.Attribute | ast.Constant | ast.Call | ast.Subscript)
        return text if is_simple else f"({text})"

    def indent(self, line: int) -> str:
        """Return the white space with which ``line``, which counts from 1, begins."""
        text = self.lines[line - 1]
        return text[: len(text) - len(text.lstrip())]

    def replaced(self, replacements: Iterable[Replacement]) -> str:
        """Return the text with all ``replacements``, which must not overlap. Of those that insert at one
        place, the text of the first comes first."""
        data = self.text.encode()
        changes = sorted(replacements, key=lambda r: (r.start, r.end))
        for change in reversed(changes):
            data = data[: change.start] + change.text.encode() + data[change.end :]
        return data.decode()

    def diff(self, new_text: str) -> str:
        """Return the unified diff from this source to ``new_text``, for ``patch -p0`` and ``git apply -p0``;
        "" if they are equal."""
        lines = difflib.unified_diff(self.lines, _lines(new_text), fromfile=self.path, tofile=self.path)
        return "".join(
            line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
        )

    def calls(self, names: frozenset[str]) -> list[ast.Call]:
        """Return all calls of a function or class whose name, without the module, is in ``names``, also under
        another name that an import gives it."""
        imports = [node for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom)]
        aliases = {a.asname: a.name for statement in imports for a in statement.names if a.asname}
        calls = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]
        return [c for c in calls if aliases.get(name_of(c.func), name_of(c.func)) in names]

    def with_keywords(self, call: ast.Call, values: Mapping[str, str]) -> list[Replacement]:
        """Return the replacements that give ``call`` the keyword arguments ``values``, name -> source of the
        value. One that the call has already gets the new value, unless it has the same source."""
        present = {k.arg: k.value for k in call.keywords}
        changes = [
            Replacement(start=self.start(present[name]), end=self.end(present[name]), text=value)
            for name, value in values.items()
            if name in present and self.of(present[name]).strip("()") != value.strip("()")
        ]
        if new_values := {name: value for name, value in values.items() if name not in present}:
            changes.append(self._insertion(call, new_values))
        return changes

    def _insertion(self, call: ast.Call, values: Mapping[str, str]) -> Replacement:
        items = [f"{name}={value}" for name, value in values.items()]
        arguments = sorted(
            [*call.args, *(k.value for k in call.keywords)], key=lambda n: (n.lineno, n.col_offset)
        )
        if not arguments:
            place = self.end(call) - 1
            return Replacement(start=place, end=place, text=", ".join(items))
        last: Any = arguments[-1]
        place = self.end(last)
        rest = self.text.encode()[place : self._starts[last.end_lineno]].decode()
        if not self._on_own_lines(call):
            return Replacement(start=place, end=place, text="".join(f", {item}" for item in items))
        nodes: list[Any] = [*call.args, *call.keywords]
        first_of_line = min(n.lineno for n in nodes if n.end_lineno == last.end_lineno)
        indent = self.indent(first_of_line)
        if re.fullmatch(r",[ \t]*(#.*)?\r?\n?", rest):  # after the comma and the comment of the last line
            place += len(rest.rstrip("\r\n").encode())
            return Replacement(start=place, end=place, text="".join(f"\n{indent}{item}," for item in items))
        return Replacement(start=place, end=place, text="".join(f",\n{indent}{item}" for item in items))

    def _on_own_lines(self, call: ast.Call) -> bool:
        nodes: list[Any] = [*call.args, *call.keywords]
        return all(n.lineno > call.func.lineno for n in nodes)


def _lines(text: str) -> list[str]:
    """Return the lines of ``text``, with their line ends, as ``ast`` counts them. (str.splitlines also splits
    at form feeds.)"""
    return io.StringIO(text).readlines()


def number_lines(lines: Iterable[int]) -> str:
    """Return the line numbers as text, in ascending order, such as "line 3" or "lines 3, 5"."""
    numbers = sorted(lines)
    return f"line{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def name_of(node: ast.expr) -> str:
    """Return the last part of a dotted name, such as "AdamW" for ``torch.optim.AdamW``; "" for any other
    expression."""
    if isinstance(node, ast.Name):  # "self.NAME" in `self_variables`
        return node.id.rpartition(".")[2]
    return node.attr if isinstance(node, ast.Attribute) else ""


def literal(node: ast.expr | None) -> Any:
    """Return the value of a literal, such as 8 or "sum"; None for any other expression."""
    try:
        return None if node is None else ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


def source_of(value: Any) -> str:
    """Return ``value`` as a Python literal, with texts in double quotes, also in mappings. Texts in other
    containers have the quotes that repr gives them."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{source_of(k)}: {source_of(v)}" for k, v in value.items()) + "}"
    return repr(value)
