"""Which files a job's code was loaded from and has read, and since when, as far as Python code opens them."""

from __future__ import annotations

import builtins
import contextlib
import functools
import io
import os
import sys
import time
import weakref
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

_CLOCK_ERROR_S = 2.0  # of the time at which the process began

# Absolute path of each file that was opened for reading while a job was loaded in this process -> the time
# before it was first opened.
OPENED_WHILE_LOADING: dict[str, float] = {}
# Module -> a time at which it was not loaded yet.
_NOT_LOADED_AT: weakref.WeakKeyDictionary[ModuleType, float] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def note_opened_files(times: dict[str, float]) -> Iterator[None]:
    """Inside this context, add to ``times`` the absolute path of each file that Python code opens for reading
    with ``open``, as ``pathlib``, ``numpy.load``, ``gzip`` and ``torch.load`` do. The value is a time, in
    seconds since the epoch, shortly before the file was first opened. Files that libraries open in native
    code, such as HDF5's, are not noticed. At its beginning and end, the context also notes which modules are
    loaded, for `not_loaded_at`.
    """
    python_open = builtins.open

    def noting_open(file: Any, mode: Any = "r", *args: Any, **kwargs: Any) -> Any:
        begin = time.time()
        opened = python_open(file, mode, *args, **kwargs)
        if not isinstance(file, int) and not any(letter in str(mode) for letter in "wxa"):
            times.setdefault(os.path.realpath(os.fsdecode(file)), begin)
        return opened

    _note_modules(process_start())
    begin = time.time()
    try:
        with mock.patch.object(builtins, "open", noting_open), mock.patch.object(io, "open", noting_open):
            yield
    finally:
        _note_modules(begin)


def not_loaded_at(module: ModuleType) -> float:
    """Return a time, in seconds since the epoch, at which the module was not loaded yet: the beginning of the
    `note_opened_files` in which it was loaded, or the start of the process if it was not loaded in one. A
    file that has changed since may contain other code than was loaded."""
    return _NOT_LOADED_AT.get(module, process_start())


@functools.cache
def process_start() -> float:
    """Return a time, in seconds since the epoch, 2 s before this process began by the system's clock."""
    import psutil

    return float(psutil.Process().create_time()) - _CLOCK_ERROR_S


def _note_modules(when: float) -> None:
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            _NOT_LOADED_AT.setdefault(module, when)
