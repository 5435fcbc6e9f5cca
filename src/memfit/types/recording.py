"""Recording: what forward's operators made and read, and when backward asked for it, in a trace's clock."""

from __future__ import annotations

import dataclasses

from memfit.types.trace import Trace


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A storage that an operator of forward made; storages are numbered in that order."""

    size_bytes: int
    start: int  # clock of its birth
    end: int | None  # of its death
    last_read: int  # of the last operator of forward that read it
    calls: tuple[int, ...]  # the call that made it, then those that wrote to it
    needs: tuple[int, ...]  # clocks at which backward asked for it
    pinned: bool  # it cannot be made again


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    clock: int  # of its operator in the trace
    reads: tuple[int, ...]  # numbers of storages


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The last forward pass of a trace. ``key``: checksum of the operators that made storages."""

    trace: Trace
    key: int
    start: int  # clock of the forward pass
    made: tuple[Made, ...]
    calls: tuple[Called, ...]
