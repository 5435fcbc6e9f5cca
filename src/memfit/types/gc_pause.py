"""Python's cyclic garbage collector, put off."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector, whose walks over what imports and fake tensors leave are a fifth of a cold
    prediction's time. When it runs is chance: cycles of a model's own stay here, as they may there."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
