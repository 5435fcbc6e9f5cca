"""Whether a script trains again after the loop that runs, such as after a range test of the learning rate."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_PACKAGE = f"{Path(__file__).parents[1]}/"
_RUN = f"{_PACKAGE}capture/child.py"  # has called the script
_INSTALLED = "/site-packages/"
_TRAINERS = frozenset({"lightning", "pytorch_lightning", "transformers"})  # whose fit or train is a training
_LOOPS = (ast.For, ast.AsyncFor, ast.While)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def later_training() -> str:
    """Return the place, such as "train.py:12", of the first statement that trains again after the script's
    outermost running loop: its code calls ``backward`` and ``step``, or ``fit`` or ``train`` of a trainer.
    Return "" if there is none. Whether the script gets there is not known."""
    frames = []
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _RUN:
        frames.append(frame)
        frame = frame.f_back
    for frame in reversed(frames):
        path = frame.f_code.co_filename
        is_installed = _INSTALLED in path
        if path.startswith((_PACKAGE, "<")) or ("/lib/python3" in path and not is_installed):
            continue
        if f"{_INSTALLED}torch/" in path:
            return ""
        following, is_in_loop = _following(frame)
        scope = _variables(frame)
        definitions = {s.name: s for s in following if isinstance(s, ast.FunctionDef | ast.ClassDef)}
        for statement in () if is_installed else following:
            if _trains(statement, scope, definitions):
                return f"{Path(path).name}:{statement.lineno}"
        if is_in_loop:
            return ""
    return ""


def _variables(frame: types.FrameType) -> dict[str, Any]:
    """Return the variables that the code of the frame sees, by name."""
    local: Any = frame.f_locals
    scope = {**frame.f_globals, **local}
    if isinstance(local, dict) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        local.clear()  # before Python 3.13 it is a copy that the frame keeps, with the tensors in it
    return scope


def _following(frame: types.FrameType) -> tuple[list[ast.stmt], bool]:
    """Return the statements that the function of ``frame`` runs after its present one, or after the outermost
    loop around that, and whether there is such a loop. Without source code, and for a comprehension, return
    ([], True)."""
    tree = _parsed(frame.f_code.co_filename)
    if tree is None or frame.f_code.co_name in ("<listcomp>", "<genexpr>", "<setcomp>", "<dictcomp>"):
        return [], True
    line, _, column, _ = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    place = (line or frame.f_lineno, column or 0)
    following: list[ast.stmt] = []
    block: list[ast.stmt] = tree.body
    while (index := next((i for i, s in enumerate(block) if _contains(s, place)), None)) is not None:
        statement = block[index]
        following = [] if isinstance(statement, _SCOPES) else [*block[index + 1 :], *following]
        if isinstance(statement, _LOOPS):
            return following, True
        inner = [b for node in ast.walk(statement) for b in _blocks(node)]
        blocks = [b for b in inner if any(_contains(part, place) for part in b)]
        block = blocks[0] if blocks else []
    return following, False


def _blocks(node: ast.AST) -> list[list[ast.stmt]]:
    """Return the lists of statements that ``node`` holds itself, such as the body and the ``else`` branch."""
    values = (getattr(node, name, None) for name in ("body", "orelse", "finalbody"))
    return [value for value in values if isinstance(value, list)]


def _contains(statement: ast.stmt, place: tuple[int, int]) -> bool:
    end = (statement.end_lineno or statement.lineno, statement.end_col_offset or 0)
    return (statement.lineno, statement.col_offset) <= place < end


@functools.lru_cache
def _parsed(path: str) -> ast.Module | None:
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        return ast.parse(Path(path).read_text(encoding="utf-8"))
    return None


def _trains(
    statement: ast.stmt, scope: Mapping[str, Any], later: Mapping[str, ast.FunctionDef | ast.ClassDef]
) -> bool:
    """Return whether the code of a statement, and of the functions of the script that it calls or passes on,
    such as the closure of an optimizer, makes backward passes and updates, or calls ``fit`` or ``train`` of a
    trainer. False for a definition, which is only run when it is called. ``scope``: name -> object.
    ``later``: the functions and classes that the script defines after the loop, by name."""
    if isinstance(statement, _SCOPES):
        return False
    names, seen, statements = set[str](), set[Any](), [statement]
    while statements:
        for call in (node for node in ast.walk(statements.pop()) if isinstance(node, ast.Call)):
            owner = _owner(call.func, scope)
            if isinstance(call.func, ast.Attribute):
                names.add(call.func.attr)
                if call.func.attr in ("fit", "train") and _is_trainer(owner):
                    return True
            for used in (call.func, *call.args, *(k.value for k in call.keywords)):
                names |= _names_of(used, scope, seen, is_called=used is call.func)
                definition = later.get(used.id) if isinstance(used, ast.Name) else None
                if definition is not None and definition not in seen:
                    seen.add(definition)
                    statements += definition.body
    return {"backward", "step"} <= names


def _owner(node: ast.expr, scope: Mapping[str, Any]) -> Any:
    """Return the value of the variable X if ``node`` is X.NAME, else None."""
    is_of_name = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return scope.get(node.value.id) if is_of_name else None  # type: ignore[attr-defined]


def _names_of(node: ast.expr, scope: Mapping[str, Any], seen: set[Any], *, is_called: bool) -> set[str]:
    """Return the names that the code of a function or class uses. ``node`` names it, where it is called
    (``is_called``) or passed to a call. A class counts only if it is called and no torch module, with all its
    methods. Empty for anything else, for code of Python and installed packages, and for code in ``seen``."""
    if isinstance(node, ast.Attribute):
        owner = _owner(node, scope)
        if not is_called and isinstance(owner, types.ModuleType):
            return set()  # it may be imported only when it is needed
        holder = owner if isinstance(owner, types.ModuleType | type) else type(owner)
        return _names_in(getattr(holder, node.attr, None), holder, set())
    value = scope.get(node.id) if isinstance(node, ast.Name) else None
    is_class = is_called and isinstance(value, type) and not issubclass(value, torch.nn.Module)
    names = set[str]()
    for part in vars(value).values() if is_class else (value,):
        names |= _names_in(part, value, seen)
    return names


def _is_trainer(owner: Any) -> bool:
    roots = {kind.__module__.partition(".")[0] for kind in type(owner).__mro__}
    return bool(roots & _TRAINERS) and not isinstance(owner, torch.nn.Module)


def _names_in(function: Any, holder: Any, seen: set[Any]) -> set[str]:
    """Return the names that a function of the script and the functions that it calls use. Empty for anything
    else and for code in ``seen``, to which the code is added. ``holder``: the class whose method it is."""
    with contextlib.suppress(ValueError):
        function = inspect.unwrap(function) if callable(function) else None
    code = getattr(function, "__code__", None)
    if code is None or code in seen or "/lib/python3" in code.co_filename:
        return set()
    seen.add(code)
    codes, names = [code], set[str]()
    while codes:
        code = codes.pop()
        names |= {*code.co_names}
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    called = [function.__globals__.get(name) for name in names]
    called += [getattr(holder, name, None) for name in names] if isinstance(holder, type) else []
    for inner in called:
        if isinstance(inner, types.FunctionType):
            names |= _names_in(inner, holder, seen)
    return names
