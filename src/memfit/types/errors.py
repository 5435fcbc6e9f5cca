"""Every error that memfit raises on purpose.

::

    MemfitError
    ├── UserError      the input was wrong: what was given, what is allowed, what to do (exit 2)
    ├── NothingFits    no allowed plan fits; carries the least memory that would be enough (exit 3)
    ├── RunError       a child process failed in a way that is not an Outcome (exit 1)
    └── Interrupted    Ctrl-C, after the best plan so far was shown (exit 130)
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from memfit.types.units import format_bytes

_Entry = TypeVar("_Entry")


class MemfitError(Exception):
    """Base class. ``exit_code`` is what the command line returns."""

    exit_code = 1


class UserError(MemfitError):
    """Wrong input, explained in one line: what was given, what is allowed, what to do."""

    exit_code = 2

    def __init__(self, given: str, *, allowed: str = "", hint: str = "") -> None:
        self.given, self.allowed, self.hint = given, allowed, hint
        parts = [given]
        if allowed:
            parts.append(f"allowed: {allowed}")
        if hint:
            parts.append(hint)
        super().__init__("; ".join(parts))


def named(what: str, name: str, table: Mapping[str, _Entry]) -> _Entry:
    """Return the entry with that name. Raises UserError with the allowed names and the closest one."""
    if name in table:
        return table[name]
    matches = difflib.get_close_matches(name, table, n=1)
    hint = f"did you mean {matches[0]!r}?" if matches else ""
    raise UserError(f"unknown {what} {name!r}", allowed=", ".join(table), hint=hint)


class NothingFits(MemfitError):
    """No plan of the allowed effect classes fits under the cap, or none meets the deadline and budget (see
    ``missed``).

    ``ways``: changes, each of which alone would be enough. ``host``: the host memory that a plan needs which
    fits the device.
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
    ) -> None:
        self.cap_bytes, self.least_bytes, self.plan_text = cap_bytes, least_bytes, plan_text
        self.ways = ways
        host_text = f"; {host}" if host else ""
        super().__init__(
            missed
            or f"no allowed plan fits {format_bytes(cap_bytes)} ({cap_bytes} B); the smallest plan "
            f"needs {format_bytes(least_bytes)} ({least_bytes} B): {plan_text}{host_text}"
        )

    def explained(self) -> NothingFits:
        """Return the same error with the possible changes in its text."""
        if self.ways:
            self.args = (f"{self}; any one of these would be enough: {'; '.join(self.ways)}",)
        return self


class RunError(MemfitError):
    """A worker ended without reporting its outcome."""


class Interrupted(MemfitError):
    """The user interrupted a search and was shown the best plan so far."""

    exit_code = 130  # 128 + SIGINT, as shells count

    def __init__(self) -> None:
        super().__init__("interrupted: the search was not finished; a better plan may exist")
