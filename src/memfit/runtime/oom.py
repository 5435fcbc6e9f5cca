"""Recognise out-of-memory errors. This module uses only the standard library, because the parent process
needs it too."""

from __future__ import annotations

import errno
import resource
from typing import Final

# Messages of torch on CPU; C++; Python; the C library; CUDA, libgomp and others.
_TEXTS: Final = (
    "can't allocate memory",
    "std::bad_alloc",
    "memoryerror",
    "cannot allocate memory",
    "out of memory",
)
_NO_KERNEL: Final = "could not create a primitive"


def is_oom_error(error: BaseException) -> bool:
    """Return True for MemoryError, torch.OutOfMemoryError, an OSError with ENOMEM, and a RuntimeError whose
    text says that memory ran out (`is_oom_text`), such as that of torch's CPU allocator.

    oneDNN gives no reason if it finds no memory for a kernel's code. Its RuntimeError counts as out of memory
    while this process has a limit RLIMIT_DATA.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    is_capped = resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY
    return isinstance(error, RuntimeError) and (is_oom_text(text) or (is_capped and _NO_KERNEL in text))


def is_oom_text(text: str) -> bool:
    """Return whether ``text``, an error message or a line of a dead process's output, contains a phrase such
    as "out of memory", in upper or lower case."""
    lower_text = text.lower()
    return any(t in lower_text for t in _TEXTS)
