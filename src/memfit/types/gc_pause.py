"""Postpone Python's cyclic garbage collector."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Disable the garbage collector within the context.

    Its walks over the objects left by imports and fake tensors take a fifth of a cold prediction's time. When
    the collector runs is chance anyway: a model's own reference cycles stay alive here, as they may without
    this context.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
