"""Output of commands: text on a console, or one JSON object."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, TextIO

from memfit.types.errors import UserError, suggest
from memfit.types.sanitize import escape_controls

if TYPE_CHECKING:
    import rich.console

    from memfit.cli.options import OutputOptions

_JSON_OUTPUT: Final = ContextVar[TextIO | None]("_JSON_OUTPUT", default=None)  # None: sys.stdout
_PIPE_COLUMNS = 120  # rich assumes 80 if there is no terminal, which is too narrow for the tables


def emit(value: Any) -> None:
    """Print ``value``, plain data or dataclasses, also nested, as JSON indented by two spaces on standard
    output. Characters that a terminal would interpret are escaped."""
    from memfit.types import serialization

    emit_text(escape_controls(serialization.dumps(value, indent=2)) + "\n")


def emit_text(text: str) -> None:
    """Print ``text``, which is JSON and ends with a line break, on standard output."""
    # The line break is written apart: Python notices a write that a full disk has cut off only in the next.
    print(text.removesuffix("\n"), file=_JSON_OUTPUT.get())


@contextlib.contextmanager
def only_json() -> Iterator[None]:
    """Inside this context, only `emit` and `emit_text` write to standard output. All else that is printed,
    for example by a job, goes to standard error."""
    token = _JSON_OUTPUT.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _JSON_OUTPUT.reset(token)


def console() -> rich.console.Console:
    """Return a console on standard output. If that is a terminal, the console has colours and its width,
    otherwise no colours and 120 columns."""
    from memfit.cli.safe_console import SafeConsole

    plain = SafeConsole(highlight=False)
    return plain if plain.is_terminal else SafeConsole(highlight=False, width=_PIPE_COLUMNS)


def check_choice(option_or_argument: str, value: str, allowed: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``allowed``. Otherwise raises UserError with the allowed values and,
    if one is similar, that one as a hint. ``option_or_argument``: what ``value`` is the value of, for the
    error; for example "--goal" or "command"."""
    allowed_values = tuple(map(str, allowed))
    if value in allowed_values:
        return value
    raise UserError(
        f"unknown {option_or_argument}: {value!r}",
        allowed=", ".join(allowed_values),
        hint=suggest(value, allowed_values, cutoff=0.4),
    )


def refuse_options(
    options: Mapping[str, object], why_refused: str, *, allowed: str = "", hint: str = ""
) -> None:
    """Raise UserError if a value of ``options``, option -> value, is set; None, False, 0 and empty values are
    not. The error names all options that are set, and then says ``why_refused``, such as "cannot be used with
    --from"; ``allowed`` and ``hint``, as in UserError, follow unless they are ""."""
    if options_given := [name for name, value in options.items() if value]:
        raise UserError(f"{', '.join(options_given)} {why_refused}", allowed=allowed, hint=hint)


def set_options(*groups: Any) -> dict[str, bool]:
    """Return option -> whether its value differs from the default, for each field of the dataclasses
    ``groups``. The option of the field ``save_every`` is "--save-every"."""
    return {
        f"--{field.name.replace('_', '-')}": getattr(group, field.name) != field.default
        for group in groups
        for field in dataclasses.fields(group)
    }


def check_language(code: str) -> str:
    """Return ``code``, the value of --lang. Raises UserError if it is not "en" or "ja", the languages in
    which memfit has texts. Call it before any long work begins."""
    from memfit.report.words import LANGUAGES

    return check_choice("--lang", code, LANGUAGES)


def english_only(output: OutputOptions, option: str) -> None:
    """Raise UserError if --lang chooses another language than English and --json is not given. Call it for an
    ``option`` whose answer memfit has in English only."""
    if output.lang != "en" and not output.json:
        raise UserError(
            f"--lang {output.lang} cannot be used with {option}, whose answer is in English only",
            hint="leave out --lang, or add --json",
        )


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on standard output, with ``columns`` as headings and one line or more for each of
    ``rows``."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    console().print(table)
