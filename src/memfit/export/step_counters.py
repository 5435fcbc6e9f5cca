"""Find the statements of a training loop's forward pass that must not run once for each micro-batch, such as
counts of steps, on which a learning-rate schedule depends."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from memfit.export.loop_update import FUNCTIONS, Statements, lists_of, loaded_names, stored_names
from memfit.export.source_edits import name_of

_HARMLESS = frozenset({"train", "eval", "zero_grad", "backward"})  # methods that may run several times


def step_counters(between: Statements, kept: Sequence[str]) -> tuple[ast.stmt, ...]:
    """Return those statements of ``between``, which are those from the forward pass to backward, that count
    steps and can run after backward instead: ``N += 1``, ``N = N + 1`` or ``SCHEDULER.step()``. They use no
    variable that another of the statements sets or that is in ``kept`` (the batch and the loss), and no later
    statement uses what they set."""
    counters = []
    for index, statement in enumerate(between):
        names = _counted_variables(statement)
        others = {n for s in between if s is not statement for n in stored_names(s)}
        later = {n for s in between[index + 1 :] for n in loaded_names(s) | set(stored_names(s))}
        reads = loaded_names(statement)
        if names and not (reads | names) & (others | set(kept)) and not names & later:
            counters.append(statement)
    return tuple(counters)


def _counted_variables(statement: ast.stmt) -> set[str]:
    """Return the variables to which the statement adds: N of ``N += 1`` or ``N = N + 1``, and for
    ``X.step()`` all variables in it. Return an empty set for any other statement."""
    if isinstance(statement, ast.AugAssign):
        return set(stored_names(statement.target))
    if isinstance(statement, ast.Assign):
        names = {t.id for t in statement.targets if isinstance(t, ast.Name)}
        return names if names <= loaded_names(statement.value) else set()
    call = statement.value if isinstance(statement, ast.Expr) else None
    is_step = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "step"
    return loaded_names(statement) if is_step else set()


def repeated_lines(between: Statements, omitted: Sequence[ast.stmt], batch: Sequence[str]) -> list[int]:
    """Return the lines of the statements in ``between``, also inside compound ones, whose effect adds up if
    they run once for each micro-batch: calls whose result is not used (except train, eval, zero_grad and
    backward), and sums that go on from step to step. Statements in ``omitted`` or inside functions, and those
    that read a variable in ``batch`` (sums over its samples), are left out."""
    return [s.lineno for s in _repeated_statements(between, omitted, set(batch), set())]


def _repeated_statements(
    statements: Statements, omitted: Sequence[ast.stmt], batch: set[str], known: set[str]
) -> Iterator[ast.stmt]:
    """Yield the statements whose lines `repeated_lines` returns. ``known``: the variables that the step has
    set before ``statements``; the variables that these set are added to it."""
    for statement in statements:
        if statement in omitted or isinstance(statement, FUNCTIONS):
            continue
        if inner_lists := lists_of(statement):
            for inner in inner_lists:
                yield from _repeated_statements(inner, omitted, batch, known)
            continue
        if _adds_up(statement, known) and not loaded_names(statement) & batch:
            yield statement
        known |= set(stored_names(statement))


def _adds_up(statement: ast.stmt, known: set[str]) -> bool:
    if isinstance(statement, ast.AugAssign):
        return not set(stored_names(statement.target)) & known
    if isinstance(statement, ast.Expr):
        call = statement.value
        return isinstance(call, ast.Call) and name_of(call.func) not in _HARMLESS
    return bool(_counted_variables(statement) - known)
