"""Does this error mean that memory ran out? Standard library only: the parent process asks as well."""

from __future__ import annotations

import errno
import resource
from typing import Final

# torch on CPU; C++; Python; the C library; CUDA, libgomp and others
_TEXTS: Final = (
    "can't allocate memory",
    "std::bad_alloc",
    "memoryerror",
    "cannot allocate memory",
    "out of memory",
)
_NO_KERNEL: Final = "could not create a primitive"


def is_oom_error(error: BaseException) -> bool:
    """True for MemoryError, torch.OutOfMemoryError, ENOMEM and torch's CPU allocator's RuntimeError.

    oneDNN tells no reason when it finds no memory for a kernel's code: believed while a cap is set.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    capped = resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY
    return isinstance(error, RuntimeError) and (is_oom_text(text) or (capped and _NO_KERNEL in text))


def is_oom_text(text: str) -> bool:
    """The same for what a dead process wrote."""
    lowered = text.lower()
    return any(t in lowered for t in _TEXTS)
