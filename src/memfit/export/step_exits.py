"""Find what leaves a step of a training loop between the model's call and the optimizer's step.

`memfit.apply` raises an error in the next step if a step was begun and neither ended nor given up.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from memfit.export.loop_update import FUNCTIONS, LOOPS, LoopPlace, Statements, Update, lists_of
from memfit.export.source_edits import Source
from memfit.types.errors import UserError

_GIVE_UP = "each step must end with fit.step(), or be given up with fit.discard()"


def must_end_each_step(source: Source, place: LoopPlace, update: Update, forward: int) -> None:
    """Raise UserError, which names the line, if ``continue``, ``break`` or ``return`` leaves the loop at
    ``place`` after the statement with the index ``forward`` in its body and before the optimizer's step, or
    if an error in a step is caught inside a loop and the training may go on."""
    first, last = place.body[forward].lineno, update.step.lineno
    bodies = [place.body] if update.step_body is place.body else [place.body, update.step_body]
    for statement in (s for body in bodies for s in _exits(body, in_loop=False)):
        if first <= statement.lineno < last:
            raise UserError(
                f"line {statement.lineno} leaves a step with {type(statement).__name__.lower()} before the "
                f"optimizer's step: {_GIVE_UP}"
            )
    for loop in (n for n in ast.walk(source.tree) if isinstance(n, LOOPS)):
        for statement in (n for n in ast.walk(loop) if isinstance(n, ast.Try)):
            catches = any(not isinstance(h.body[-1], ast.Raise) for h in statement.handlers)
            if catches and any(n is update.backward for s in statement.body for n in ast.walk(s)):
                raise UserError(
                    f"the try in line {statement.lineno} catches errors of a step inside a loop, after which "
                    f"the training may go on: {_GIVE_UP}"
                )


def _exits(statements: Statements, *, in_loop: bool) -> Iterator[ast.stmt]:
    """Yield each ``return`` in ``statements``, also inside compound ones, and each ``continue`` and ``break``
    that leaves them: not those of loops inside. ``in_loop``: the statements are in such an inner loop."""
    for statement in statements:
        is_jump = isinstance(statement, ast.Continue | ast.Break) and not in_loop
        if is_jump or isinstance(statement, ast.Return):
            yield statement
        if not isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
            for inner in lists_of(statement):
                is_body = isinstance(statement, LOOPS) and inner is statement.body
                yield from _exits(inner, in_loop=in_loop or is_body)
