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


def test_an_argument_is_shown_by_its_metavar_and_an_option_by_its_name() -> None:
    tree = ast.parse(
        """
class Options:
    words: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files.")]
    other: Annotated[str, typer.Argument(help="A word.")]
    keep_last: Annotated[int, typer.Option(metavar="N", help="How many.")] = 0
    files: Annotated[str, typer.Option("--from", help="A file.")] = ""
"""
    )
    texts = [text for _, text in reading.helps(Path("m.py"), tree)]
    assert texts == ["FILE...\nFiles.", "other\nA word.", "--keep-last\nHow many.", "--from\nA file."]
