"""Find what a script of Accelerate or Lightning computes from its number of batches, which an edit to
micro-batches changes: the length of a learning-rate schedule is adapted to it, all else is named."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any, Final

from memfit.export.source_edits import Replacement, Source, literal, name_of, number_lines

_SHOWN: Final = frozenset({"print", "info", "debug", "warning", "tqdm"})  # calls whose numbers train nothing
_OF_TRAINER: Final = frozenset({"limit_train_batches", "val_check_interval"})  # Lightning's, in batches


class BatchCounts:
    """What in ``source`` depends on the number of batches of the DataLoader that the call ``loader`` makes.

    An edit makes each of its batches one of ``steps`` micro-batches of an update. ``stated``: the expression
    for the script's own number of micro-batches so far, None for 1. `changes`: replacements that keep the
    length of learning-rate schedules. `remarks`: one text for each thing that the user should check, with
    line numbers. Both are empty if the number of micro-batches does not change.
    """

    def __init__(self, source: Source, loader: ast.Call, steps: int, stated: ast.expr | None) -> None:
        self.source, self.steps = source, steps
        self.changes: list[Replacement] = []
        self.remarks: list[str] = []
        self._parents = {inner: n for n in ast.walk(source.tree) for inner in ast.iter_child_nodes(n)}
        self._names = _targets(self._statement(loader))
        old_steps = 1 if stated is None else literal(stated)
        if old_steps == steps:
            return
        lines = {node.lineno for node in self._iterations()}
        adapted = set[int]()
        for count in self._counts():
            of_count = self._schedules_of(count)
            if of_count is None:
                lines.add(count.lineno)
            elif all(map(self._steps_with_updates, of_count)):
                edits = self._adapt(count, None if old_steps == 1 else stated)
                (adapted if edits else lines).add(count.lineno)
                self.changes += [edit for edit in edits if edit not in self.changes]
        schedules = [n for n in ast.walk(source.tree) if isinstance(n, ast.Call) and _is_schedule(n)]
        lines |= {line for schedule in schedules for line in self._early_steps(schedule)}
        if adapted:
            self.remarks.append(
                f"the schedule of {number_lines(adapted)} counts updates of {steps} micro-batches: check its "
                "length"
            )
        if lines:
            share = f"{steps} for each update" if old_steps == 1 else "of another number for each update"
            self.remarks.append(
                f"iterations of the loop and batches of the DataLoader are now micro-batches, {share}; "
                f"check what counts them: {number_lines(lines)}"
            )

    # -- what counts ------------------------------------------------------------------------------

    def _counts(self) -> Iterator[ast.Call]:
        """Yield each ``len(LOADER)`` outside calls that only show it, such as print and tqdm. LOADER: the
        variable of the DataLoader, or one whose name contains "train" and "loader"."""
        for call in self.source.calls(frozenset({"len"})):
            argument: Any = call.args[0] if call.args else None
            name = name_of(argument.func if isinstance(argument, ast.Call) else argument) if argument else ""
            counts = name in self._names or ("train" in name and "loader" in name)
            if counts and not any(name_of(c.func) in _SHOWN for c in self._above(call, ast.Call)):
                yield call

    def _iterations(self) -> Iterator[Any]:
        """Yield the nodes that count iterations: in Accelerate's loop and Lightning's ``training_step``, each
        use of the iteration's index and each ``X += CONSTANT``; and the whole numbers given as Lightning's
        limit_train_batches and val_check_interval."""
        for node in ast.walk(self.source.tree):
            if isinstance(node, ast.For) and _accumulates(node):
                yield from self._uses_of_index(node, _index(node))
            elif isinstance(node, ast.FunctionDef) and node.name == "training_step":
                yield from self._uses_of_index(node, "".join(a.arg for a in node.args.args[2:3]))
            elif isinstance(node, ast.keyword) and node.arg in _OF_TRAINER:
                yield from [node.value] if isinstance(literal(node.value), int) else []

    def _uses_of_index(self, node: ast.For | ast.FunctionDef, index: str) -> Iterator[Any]:
        """Yield each use of the variable ``index``, and each ``X += CONSTANT``, in the body of ``node``,
        except under a condition on Accelerate's ``sync_gradients``."""
        for use in (n for s in node.body for n in ast.walk(s)):
            is_index = isinstance(use, ast.Name) and use.id == index and isinstance(use.ctx, ast.Load)
            is_count = isinstance(use, ast.AugAssign) and isinstance(use.value, ast.Constant)
            if (is_index or is_count) and not self._is_synchronized(use):
                yield use

    # -- schedules --------------------------------------------------------------------------------

    def _schedules_of(self, node: ast.AST, seen: frozenset[str] = frozenset()) -> list[ast.Call] | None:
        """Return the calls that make learning-rate schedules from the value of ``node``, directly or through
        variables. Return None if anything else uses the value, or nothing does. ``seen``: the variables
        through which it has come."""
        if inside := next((c for c in self._above(node, ast.Call) if _is_schedule(c)), None):
            return [inside]
        statement = self._statement(node)
        names = _targets(statement)
        if not isinstance(statement, ast.Assign) or len(names) != 1 or names & seen:
            return None
        uses = [
            self._schedules_of(n, seen | names)
            for n in ast.walk(self.source.tree)
            if isinstance(n, ast.Name) and n.id in names and isinstance(n.ctx, ast.Load)
        ]
        schedules = [schedule for of_use in uses if of_use is not None for schedule in of_use]
        return schedules if uses and None not in uses else None

    def _steps_with_updates(self, schedule: ast.Call) -> bool:
        """Return whether the schedule steps once for each update. It does in a script without a loop of
        Accelerate, as with Lightning; if Accelerate's ``prepare`` gets it; or if all its calls of step() are
        under a condition on ``sync_gradients``."""
        if not any(map(_accumulates, ast.walk(self.source.tree))):
            return True
        name = next(iter(_targets(self._statement(schedule))), "")
        for prepare in self.source.calls(frozenset({"prepare"})):
            if any(a is schedule or (isinstance(a, ast.Name) and a.id == name) for a in prepare.args):
                return True
        steps = list(self._step_calls(name))
        return bool(steps) and all(map(self._is_synchronized, steps))

    def _early_steps(self, schedule: ast.Call) -> Iterator[int]:
        """Yield the lines in which ``schedule`` would step once for each micro-batch. Yield none if its
        length is computed from ``len(LOADER)``."""
        is_by_batches = any(schedule in (self._schedules_of(c) or ()) for c in self._counts())
        if not is_by_batches and not self._steps_with_updates(schedule):
            for step in self._step_calls(next(iter(_targets(self._statement(schedule))), "")):
                if any(map(_accumulates, self._above(step, ast.For))) and not self._is_synchronized(step):
                    yield step.lineno

    def _step_calls(self, name: str) -> Iterator[ast.Call]:
        for call in self.source.calls(frozenset({"step"})):
            if isinstance(call.func, ast.Attribute) and name_of(call.func.value) == name:
                yield call

    def _adapt(self, count: ast.Call, stated: ast.expr | None) -> list[Replacement]:
        """Return the edits that make ``count``, a number of batches, a number of updates. If ``stated`` is
        None, it is divided by the number of micro-batches and rounded up. Otherwise each ``stated`` in its
        statement, the old number of micro-batches, is replaced by the new one; no edits if there is none."""
        if stated is None:
            text = f"-(-{self.source.of(count)} // {self.steps})"
            return [Replacement(start=self.source.start(count), end=self.source.end(count), text=text)]
        old = ast.unparse(stated)
        divisors = [
            n
            for n in ast.walk(self._statement(count))
            if isinstance(n, ast.Name | ast.Attribute) and ast.unparse(n) == old
        ]
        return [
            Replacement(start=self.source.start(n), end=self.source.end(n), text=str(self.steps))
            for n in divisors
        ]

    # -- the tree ---------------------------------------------------------------------------------

    def _above(self, node: ast.AST, kind: Any) -> Iterator[Any]:
        while (parent := self._parents.get(node)) is not None:
            node = parent
            if isinstance(node, kind):
                yield node

    def _statement(self, node: ast.AST) -> ast.AST:
        statement: ast.stmt = next(self._above(node, ast.stmt))
        return statement

    def _is_synchronized(self, node: ast.AST) -> bool:
        return any("sync_gradients" in ast.unparse(c.test) for c in self._above(node, ast.If))


def _is_schedule(call: ast.Call) -> bool:
    name = name_of(call.func)
    return name.endswith("LR") or "schedule" in name.lower() or name == "CosineAnnealingWarmRestarts"


def _accumulates(node: ast.AST) -> bool:
    """Return whether ``node`` is a ``for`` loop that calls Accelerate's accumulate() and contains no other
    such loop."""
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)] if isinstance(node, ast.For) else []
    inner = [n for n in ast.walk(node) if isinstance(n, ast.For) and n is not node]
    return any(name_of(c.func) == "accumulate" for c in calls) and not any(map(_accumulates, inner))


def _index(loop: ast.For) -> str:
    """Return the variable INDEX of a loop ``for INDEX, BATCH in enumerate(...)``; "" for any other loop."""
    is_counted = isinstance(loop.iter, ast.Call) and name_of(loop.iter.func) == "enumerate"
    first = loop.target.elts[0] if isinstance(loop.target, ast.Tuple) else None
    return first.id if is_counted and isinstance(first, ast.Name) else ""


def _targets(statement: ast.AST) -> set[str]:
    """Return the names to which an assignment assigns, of ``self.x`` the name "x"; names in a tuple are left
    out. Empty for any other statement."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return {name_of(t) for t in targets} - {""}
