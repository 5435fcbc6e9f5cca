"""Known chatter of libraries at import that says nothing about the user's machine or job."""

from __future__ import annotations

import logging
from typing import Final


class _Without(logging.Filter):
    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self._text not in record.getMessage()


_CHATTER: Final = {
    # torchao tries every binary that it ships, those for other processors and Pythons too
    "torchao": _Without("Failed to load "),
    # torch tells the authors of torchao about a deprecation
    "torch.utils._pytree": _Without("register_constant()"),
    # that there is no GPU, on standard output, where Accelerate asks which engine it has
    "DeepSpeed": _Without("Setting accelerator to CPU"),
    # an optional accelerator of bitsandbytes that nobody asked for
    "bitsandbytes.backends.cpu.ops": _Without("from kernels-community"),
}


def quiet_libraries() -> None:
    """Drop those messages and no others; call before the libraries are imported."""
    for logger, known in _CHATTER.items():
        logging.getLogger(logger).addFilter(known)
