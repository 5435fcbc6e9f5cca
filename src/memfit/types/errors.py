"""Errors that memfit raises on purpose.

::

    MemfitError
    ├── UserError             the input was wrong: what was given, what is allowed, what to do (exit 2)
    ├── NothingFits           no allowed plan fits or meets the limits; carries the least memory (exit 3)
    ├── RunError              a child process failed before it reported an outcome (exit 1)
    ├── Interrupted           Ctrl-C, after the best plan so far was shown (exit 130)
    ├── NotConforming         a prepared model differs from its plan (exit 1; types.conformance)
    └── AllocatorUnavailable  the counting allocator cannot be used (exit 1; runtime.counting_allocator)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from memfit.types.units import format_bytes

_Entry = TypeVar("_Entry")

# Parts of the messages of errors that say that memory ran out, whatever their class.
OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "out of memory",
    "could not create a primitive",
    "bad_alloc",
)


_LONGEST_GIVEN = 1200


class MemfitError(Exception):
    """Base class of memfit's errors. ``exit_code``: the exit status of the command line for this error; 1
    unless a subclass sets another.
    """

    exit_code = 1


class UserError(MemfitError):
    """Wrong input; exit code 2. ``given``: what is wrong with what was given. ``allowed``: what is allowed;
    ``hint``: what to do; both "" if there is nothing to say. The message is these three in one line: "GIVEN;
    allowed: ALLOWED; HINT". Of ``given``, which may contain what a file contains, 1,200 characters are kept.
    """

    exit_code = 2

    def __init__(self, given: str, *, allowed: str = "", hint: str = "") -> None:
        given = given if len(given) <= _LONGEST_GIVEN else f"{given[:_LONGEST_GIVEN]}..."
        self.given, self.allowed, self.hint = given, allowed, hint
        super().__init__("; ".join(filter(None, (given, allowed and f"allowed: {allowed}", hint))))


def look_up(what: str, name: str, table: Mapping[str, _Entry]) -> _Entry:
    """Return the entry of ``table`` called ``name``. Raises UserError if there is none: the message lists all
    names and suggests a similar one, if any (`suggest`). ``what``: what the names are of, such as "engine",
    for the message.
    """
    if name in table:
        return table[name]
    raise UserError(f"unknown {what} {name!r}", allowed=", ".join(table), hint=suggest(name, table))


def suggest(name: str, names: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return the hint ``did you mean 'NAME'?`` with the one of ``names`` that is most similar to ``name``.
    Return "" if none has a similarity (`difflib`, from 0 to 1) of at least ``cutoff``.
    """
    matches = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f"did you mean {matches[0]!r}?" if matches else ""


def first_names(names: Iterable[str], most: int) -> str:
    """Return the first ``most`` of the names with commas, and how many more there are: "a, b and 3 more"."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


# What torch appends to its errors, such as "Enable TORCH_FAKE_TENSOR_DEBUG=1 to get stack traces".
_TORCH_ADVICE = re.compile(r"[\s.;,]*\b(?:Enable|Set|Use|Run with|To \w+)\b[^.]*\bTORCH\w*=.*")


def first_line(error: BaseException) -> str:
    """Return the first line of the error's text without torch's advice on debugging, or the name of its class
    if that line is empty."""
    return first_line_of(str(error)) or type(error).__name__


def first_line_of(text: str) -> str:
    """Return the first line of an error's text without torch's advice on debugging."""
    return _TORCH_ADVICE.sub("", next(iter(text.splitlines()), ""))


class NothingFits(MemfitError):
    """No plan of the allowed effect classes fits the memory, or none that fits meets the deadline and the
    limit on cost. Exit code 3.

    ``cap_bytes``: the memory that a plan may use. ``least_bytes``, ``plan_text``: what the smallest plan
    needs, and that plan's label. ``ways``: texts of changes that would help; they are not in the message
    before `add_ways` is called.

    Three more arguments only form the message and are not attributes. ``missed``: the message if a plan fits
    the memory but the deadline or the limit on cost is missed, else "". ``host``: a text that says that
    the host's memory is too small for the smallest plan, else ""; it is left out if ``missed`` is given.
    ``unfinished``: a text that says that the time limit ended the search, so that a plan may fit that was not
    looked at; else "".
    """

    exit_code = 3

    def __init__(
        self,
        *,
        cap_bytes: int,
        least_bytes: int,
        plan_text: str,
        ways: tuple[str, ...] = (),
        missed: str = "",
        host: str = "",
        unfinished: str = "",
    ) -> None:
        self.cap_bytes, self.least_bytes, self.plan_text = cap_bytes, least_bytes, plan_text
        self.ways = ways
        host_text = f"; {host}" if host else ""
        which_plan = "plan that was looked at" if unfinished else "allowed plan"
        message = missed or (
            f"no {which_plan} fits {format_bytes(cap_bytes)} ({cap_bytes} B); the smallest plan "
            f"needs {format_bytes(least_bytes)} ({least_bytes} B): {plan_text}{host_text}"
        )
        super().__init__(f"{message}; {unfinished}" if unfinished else message)

    def add_ways(self) -> NothingFits:
        """Add ``ways``, the changes that would help, to this error's message, if there are any. Return the
        error itself.
        """
        if self.ways:
            self.args = (f"{self}; any one of these would be enough: {'; '.join(self.ways)}",)
        return self


class RunError(MemfitError):
    """A child process, such as a training run or an installation, failed before it reported a result. Exit
    code 1.
    """


class Interrupted(MemfitError):
    """Raised after the user interrupted a search (Ctrl-C) and was shown the best plan so far. Exit code
    130."""

    exit_code = 130  # 128 + SIGINT, as shells count

    def __init__(self) -> None:
        super().__init__("interrupted: the search was not finished; a better plan may exist")
