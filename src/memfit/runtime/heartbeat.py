"""How far a rank is: a file of a few bytes that the worker overwrites at each phase and its parent reads.

It is mapped into memory, so that a beat costs no system call, and the last one stays readable when the rank
is stopped, hangs or has died.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import struct
from pathlib import Path
from typing import Final

HEARTBEAT: Final = "heartbeat"
STACKS: Final = "stacks.txt"
"""Names of the files in a child's temporary folder: its last beat, and stack traces of its threads."""
_LAYOUT: Final = struct.Struct("<qq24s")  # beats so far, step, phase


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a rank was doing at its last beat. ``count``: beats so far; 0: none yet. ``step``: counted from 0;
    that which it works on, or between steps that which comes next. ``phase``: what it then began,
    such as "data", "forward", "backward", "optimizer", "between" (steps) or "save"; "start" at first."""

    count: int = 0
    step: int = 0
    phase: str = "start"


class Heartbeat:
    """Writes the beats of this process to the file ``path``, which its parent creates. If there is no such
    file, as under another launcher than memfit, nothing is written."""

    def __init__(self, path: Path) -> None:
        self._count, self._map = 0, None
        if path.is_file():
            with path.open("r+b") as file:
                file.truncate(_LAYOUT.size)
                self._map = mmap.mmap(file.fileno(), _LAYOUT.size)

    def beat(self, step: int, phase: str) -> None:
        """Record that ``phase`` of ``step`` begins."""
        self._count += 1
        if self._map is not None:
            _LAYOUT.pack_into(self._map, 0, self._count, step, phase.encode())


def read_beat(path: Path) -> Beat:
    """Return the last beat in the file ``path``; one with the count 0 if there is none yet, or if the file
    cannot be read."""
    with contextlib.suppress(OSError, struct.error, UnicodeDecodeError):
        count, step, phase = _LAYOUT.unpack(path.read_bytes())
        return Beat(count=count, step=step, phase=phase.rstrip(b"\0").decode() or "start")
    return Beat()
