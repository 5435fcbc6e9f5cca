"""Recording: what forward's operators made and read, and when backward needed it, in a trace's clock."""

from __future__ import annotations

import dataclasses

from memfit.types.trace import Trace


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForwardStorage:
    """A tensor storage that an operator of forward made: its size, its lifetime, the calls that wrote to it,
    when forward last read it, when backward needed it, and whether it must not be recomputed. Storages are
    numbered from 0 in the order in which they are made.
    """

    size_bytes: int
    start: int  # clock of its allocation
    end: int | None  # clock of its release
    last_read: int  # clock of the last forward operator that read it
    calls: tuple[int, ...]  # indices of the call that made it, then of the calls that wrote to it
    needs: tuple[int, ...]  # clocks at which backward needed it
    pinned: bool  # it cannot be recomputed


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForwardCall:
    """A recorded operator call of forward: its clock and the numbers of the storages that it reads."""

    clock: int  # clock of its operator in the trace
    reads: tuple[int, ...]  # numbers of the storages it reads


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The last forward pass of ``trace``: its operator calls and the storages that they made. ``key``:
    checksum of the operators that made storages.
    """

    trace: Trace
    key: int
    start: int  # clock of the forward pass
    storages: tuple[ForwardStorage, ...]
    calls: tuple[ForwardCall, ...]
