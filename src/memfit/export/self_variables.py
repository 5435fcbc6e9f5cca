"""Attributes of ``self`` as variables, so that a loop in a method is read as a loop in a function is."""

from __future__ import annotations

import ast
import copy
from typing import Any

from memfit.export.source_edits import Source

_SELF = "self"


def source_with_self_variables(source: Source) -> Source:
    """Return the source with a syntax tree as `with_self_variables` returns it. The text stays the same."""
    changed = copy.copy(source)
    changed.tree = with_self_variables(ast.parse(source.text))
    return changed


def with_self_variables(tree: ast.Module) -> ast.Module:
    """Return the tree, changed in place, with each attribute ``self.NAME`` as a variable called "self.NAME"
    at the position of the attribute."""
    changed: ast.Module = _SelfVariables().visit(tree)
    return changed


class _SelfVariables(ast.NodeTransformer):
    def visit_Attribute(self, node: ast.Attribute) -> Any:
        if isinstance(node.value, ast.Name) and node.value.id == _SELF:
            return ast.copy_location(ast.Name(id=f"{_SELF}.{node.attr}", ctx=node.ctx), node)
        return self.generic_visit(node)


def is_of_self(name: str) -> bool:
    """Return whether the variable is an attribute of ``self``."""
    return name.startswith(f"{_SELF}.")


def class_of(source: Source, function: Any) -> ast.ClassDef | None:
    """Return the class that has ``function`` as a method, or None."""
    classes = (n for n in ast.walk(source.tree) if isinstance(n, ast.ClassDef))
    return next((c for c in classes if any(s is function for s in c.body)), None)
