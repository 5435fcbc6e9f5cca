"""Put each statement of a training loop on a line of its own, because edits of the loop are edits of lines.

Messages name the lines of the user's script, so that line numbers are translated back.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Sequence

from memfit.export.loop_update import Statements, end, find_place, find_update
from memfit.export.source_edits import Replacement, Source, number_lines
from memfit.types.errors import UserError

_LINES = re.compile(r"\blines? (\d+(?:, \d+)*)")


def on_own_lines(source: Source) -> tuple[Source, list[int]]:
    """Return (the source with the statements of the training loop on lines of their own; for each of its
    lines, the number of the line that it comes from). Statements behind the head of a compound statement, as
    in ``for x in y: a; b``, stay there."""
    changes, lines = [], []
    for body in _loop_bodies(source):
        for a, b in itertools.pairwise(body):
            indent = source.indent(a.lineno)
            if end(a) == b.lineno and len(indent.encode()) == body[0].col_offset:
                changes.append(Replacement(start=source.end(a), end=source.start(b), text=f"\n{indent}"))
                lines.append(b.lineno)
    numbers = [n for n in range(1, len(source.lines) + 1) for _ in range(1 + lines.count(n))]
    return Source(source.path, source.replaced(changes)), numbers


def with_original_lines(text: str, numbers: Sequence[int]) -> str:
    """Return a message about lines of a source that `on_own_lines` returned with ``numbers``, with the
    numbers of the lines that they come from."""

    def original(match: re.Match[str]) -> str:
        return number_lines({numbers[int(n) - 1] for n in match[1].split(", ")})

    return _LINES.sub(original, text)


def _loop_bodies(source: Source) -> list[Statements]:
    """Return the statement lists of the training loop from backward to the optimizer's step: one, or two if
    the step is in another one than backward. Return [] if there is no such loop."""
    bodies: list[Statements] = []
    with contextlib.suppress(UserError):
        place = find_place(source)
        bodies.append(place.body)
        if (step_body := find_update(source, place).step_body) is not place.body:
            bodies.append(step_body)
    return bodies
