"""The module ``torch.sim``: what programs find under ``torch.get_device_module("sim")``.

It is imported by `activate` only. Its functions have the names and arguments of those of ``torch.cuda``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.accelerator import (
    current_stream,
    empty_cache,
    max_memory_allocated,
    max_memory_reserved,
    memory_allocated,
    memory_reserved,
    memory_stats,
    reset_accumulated_memory_stats,
    reset_peak_memory_stats,
    set_stream,
    synchronize,
)
from torch.accelerator import get_memory_info as mem_get_info
from torch.accelerator._utils import _get_device_index

from simulated_accelerator import load

__all__ = [
    "Event",
    "Stream",
    "current_device",
    "current_stream",
    "default_stream",
    "device",
    "device_count",
    "empty_cache",
    "get_amp_supported_dtype",
    "get_device_name",
    "get_device_properties",
    "get_per_process_memory_fraction",
    "get_rng_state",
    "get_rng_state_all",
    "init",
    "initial_seed",
    "is_available",
    "is_bf16_supported",
    "is_initialized",
    "late_copies",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "max_pinned_memory",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "pinned_memory",
    "reset_accumulated_memory_stats",
    "reset_peak_memory_stats",
    "reset_peak_pinned_memory",
    "seed",
    "set_capacity",
    "set_device",
    "set_per_process_memory_fraction",
    "set_rng_state",
    "set_rng_state_all",
    "set_stream",
    "stream",
    "synchronize",
]

_Device = torch.device | str | int | None

_library = load()
_initialized = True  # checkpointing keeps the random state of a device only if this is set


def _lazy_init() -> None:
    """Do nothing: torch calls it before the first tensor of the device is made."""


def init() -> None:
    """Do nothing: an active device is ready."""


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


# -- devices -----------------------------------------------------------------------------------------


def device_count() -> int:
    return int(_library.device_count())  # torch.accelerator asks this function: it must not ask back


def current_device() -> int:
    return int(_library.current_device())


def set_device(device: _Device) -> None:
    _library.set_device(_get_device_index(device, optional=True))


class device(torch.accelerator.device_index):  # noqa: N801 (the name is torch's)
    """A context in which this device is the current one."""

    def __init__(self, device: _Device) -> None:
        super().__init__(_get_device_index(device, optional=True))


def get_device_name(device: _Device = None) -> str:
    return "Simulated accelerator"


def get_device_properties(device: _Device = None) -> SimpleNamespace:
    return SimpleNamespace(name=get_device_name(device), total_memory=mem_get_info(device)[1])


def is_bf16_supported() -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


# -- memory ------------------------------------------------------------------------------------------


def set_capacity(capacity_bytes: int, device: _Device = None) -> None:
    """Set the memory of a device. A fraction that was set is forgotten. What is allocated stays."""
    _library.set_capacity(_get_device_index(device, optional=True), capacity_bytes)


def get_per_process_memory_fraction(device: _Device = None) -> float:
    return float(_library.fraction(_get_device_index(device, optional=True)))


def set_per_process_memory_fraction(fraction: float, device: _Device = None) -> None:
    _library.set_fraction(_get_device_index(device, optional=True), fraction)


def pinned_memory() -> int:
    """Return the bytes of pinned host memory now, each block rounded up to a power of two."""
    return int(_library.pinned_bytes()[0])


def max_pinned_memory() -> int:
    return int(_library.pinned_bytes()[1])


def reset_peak_pinned_memory() -> None:
    _library.reset_pinned_peak()


# -- streams and events ------------------------------------------------------------------------------


class Stream(torch.Stream):
    def __new__(cls, device: _Device = None, priority: int = 0, **stream: Any) -> Stream:
        if stream:  # an existing one: stream_id, device_index, device_type
            return super().__new__(cls, **stream)
        index = _get_device_index(device, optional=True)
        return super().__new__(cls, torch.device("sim", index), priority=priority)


class Event(torch.Event):
    def __new__(
        cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> Event:
        return super().__new__(
            cls, "sim", enable_timing=enable_timing, blocking=blocking, interprocess=interprocess
        )


def default_stream(device: _Device = None) -> torch.Stream:
    index = _get_device_index(device, optional=True)
    kind = torch._C._autograd.DeviceType.PrivateUse1
    return torch.Stream(stream_id=0, device_index=index, device_type=int(kind))


@contextlib.contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    """A context in which this stream is the current one of its device."""
    if stream is None:
        yield
        return
    device, outside = current_device(), current_stream(stream.device)
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(outside)
        set_device(device)


@contextlib.contextmanager
def late_copies() -> Iterator[None]:
    """A context in which non-blocking copies to pinned memory arrive as late as the program allows: where it
    synchronizes with them. Until then the target is NaN (integers: 1), so a missing synchronization shows."""
    _library.set_late_copies(True)
    try:
        yield
    finally:
        _library.set_late_copies(False)


# -- random numbers ----------------------------------------------------------------------------------


def _generator(device: _Device = None) -> torch.Generator:
    generator: torch.Generator = _library.default_generator(_get_device_index(device, optional=True))
    return generator


def manual_seed(seed: int) -> None:
    _generator().manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    for index in range(device_count()):
        _generator(index).manual_seed(seed)


def seed() -> None:
    _generator().seed()


def initial_seed() -> int:
    return _generator().initial_seed()


def get_rng_state(device: _Device = None) -> torch.Tensor:
    return _generator(device).get_state()


def set_rng_state(new_state: torch.Tensor, device: _Device = None) -> None:
    _generator(device).set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state(index) for index in range(device_count())]


def set_rng_state_all(new_states: list[torch.Tensor]) -> None:
    for index, state in enumerate(new_states):
        set_rng_state(state, index)
