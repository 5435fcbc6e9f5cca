"""Drop a few log messages of other libraries that say nothing about the user's machine or job."""

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
    # torchao tries to load every binary that it ships, including those for other processors and Pythons.
    "torchao": _Without("Failed to load "),
    # A deprecation warning of torch to the authors of torchao.
    "torch.utils._pytree": _Without("register_constant()"),
    # Printed to standard output if there is no GPU, when Accelerate asks DeepSpeed for its accelerator.
    "DeepSpeed": _Without("Setting accelerator to CPU"),
    # About an optional accelerator of bitsandbytes that memfit does not use.
    "bitsandbytes.backends.cpu.ops": _Without("from kernels-community"),
}


def quiet_libraries() -> None:
    """Drop a few log messages of torchao, torch, DeepSpeed and bitsandbytes that say nothing about the user's
    machine or job. Call it before these libraries are imported."""
    for logger, message_filter in _CHATTER.items():
        logging.getLogger(logger).addFilter(message_filter)
