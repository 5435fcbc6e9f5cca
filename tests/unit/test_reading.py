"""What `benchmarks/reading.py` shows to its readers."""

from __future__ import annotations

import ast
from pathlib import Path

import reading


def test_constants_of_a_module_are_shown_by_their_text() -> None:
    tree = ast.parse(
        """
_LEAST: Final = 2
_ALLOWED = f"at least {_LEAST} of {KINDS}"
def check(given):
    raise UserError(f"{given} is below {_LEAST}", allowed=_ALLOWED, hint=HINT)
"""
    )
    ((_, text),) = reading.messages(Path("m.py"), tree)
    assert text == "{given} is below 2\n  allowed: at least 2 of {KINDS}\n  hint: HINT"
