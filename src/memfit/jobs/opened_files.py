"""Which files a job's code reads, as far as it opens them in Python."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

# Absolute paths of the files that were opened for reading while jobs were loaded in this process.
OPENED_WHILE_LOADING: set[str] = set()


@contextlib.contextmanager
def note_opened_files(paths: set[str]) -> Iterator[None]:
    """Inside this context, add to ``paths`` the absolute path of each file that Python code opens for
    reading: with ``open``, and so with ``pathlib``, ``numpy.load``, ``gzip`` or ``torch.load``. Files that
    libraries open in native code, such as HDF5's, are not noticed.
    """
    python_open = builtins.open

    def noting_open(file: Any, mode: Any = "r", *args: Any, **kwargs: Any) -> Any:
        opened = python_open(file, mode, *args, **kwargs)
        if not isinstance(file, int) and not any(letter in str(mode) for letter in "wxa"):
            paths.add(os.path.realpath(os.fsdecode(file)))
        return opened

    with mock.patch.object(builtins, "open", noting_open), mock.patch.object(io, "open", noting_open):
        yield
