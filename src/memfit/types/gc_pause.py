"""Postpone Python's cyclic garbage collector."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from typing import Final

_USUAL: Final[list[tuple[int, int, int]]] = []


@contextlib.contextmanager
def pause_gc() -> Iterator[None]:
    """A context manager that disables Python's garbage collector within the context, and enables it
    afterwards if it was enabled before.

    The collector's walks over the objects left by imports and fake tensors take a fifth of the time of a
    first prediction. Reference cycles of a model stay alive within the context.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def collect_rarely() -> None:
    """Let Python's garbage collector run only after every 20,000 new objects, until `collect_as_usual`. To be
    called where a process begins: the collector otherwise takes a sixth of the time of importing torch."""
    _USUAL.append(gc.get_threshold())
    gc.set_threshold(20_000, 20, 20)


def collect_as_usual() -> None:
    """Let the garbage collector run as often as before `collect_rarely`, because that decides when reference
    cycles of the user's objects are freed. Objects that exist now, such as imported modules, are excluded
    from it for good. Do nothing in a process that has not called `collect_rarely`."""
    if _USUAL:
        gc.freeze()
        gc.set_threshold(*_USUAL.pop())


def skip_gc_at_exit() -> None:
    """Exclude all objects from garbage collection, in a process that is about to end. The collection at its
    end takes longer than many a command where torch and transformers are loaded. Do nothing if Triton is
    loaded, because its bindings then list on stderr what was not collected."""
    if "triton" not in sys.modules:
        gc.freeze()
