"""Read the memory of a training process. No counter is reset, and no reading waits for a device."""

from __future__ import annotations

import time
from typing import Final

import torch

from memfit.runtime import devices, local_machine
from memfit.runtime.counting_allocator import active_allocator
from memfit.runtime.energy import EnergyMeter
from memfit.runtime.memory import heap_bytes, rss_bytes, rss_peak_bytes
from memfit.types.device_kind import HOST

_DRIVER_PERIOD_S: Final = 1.0  # between questions to the driver or the operating system that take longer
_ENERGY_PERIOD_S: Final = 1.0


class MemoryReadings:
    """The memory of one device and of this process.

    ``source``: what counts allocated bytes; "" if nothing does, as on a processor without memfit's counting
    allocator. ``total_bytes``: memory of the device; for a processor, that of the machine that the
    process may use.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_host = device, device.type == HOST
        self._next_driver_s = 0.0
        self._counter = active_allocator() if self._is_host else None
        if self._is_host:
            self.source = self._counter.source if self._counter is not None else ""
            self.total_bytes = local_machine.host_memory_limit().total_bytes
        else:
            self.source = f"torch's allocator of {device.type}"
            self.total_bytes = devices.memory_info(device)[1]

    def read(self) -> dict[str, int | None]:
        """Return what can be measured now, by the names of `WatchStep`. Values that take longer to read, such
        as those of the driver, are left out if they were read less than a second ago."""
        asks_driver = time.monotonic() >= self._next_driver_s
        if asks_driver:
            self._next_driver_s = time.monotonic() + _DRIVER_PERIOD_S
        if self._is_host:
            return self._host(asks_driver)
        figures = devices.allocator_figures(self._device)
        values: dict[str, int | None] = {
            "allocated_bytes": figures.allocated_bytes,
            "peak_allocated_bytes": figures.peak_allocated_bytes,
            "reserved_bytes": figures.reserved_bytes,
            "peak_reserved_bytes": figures.peak_reserved_bytes,
            "allocator_retries": figures.retries,
        }
        if asks_driver:
            free_bytes, total_bytes = devices.memory_info(self._device)
            values |= {
                "device_bytes": total_bytes - free_bytes,
                "headroom_bytes": free_bytes,
                "heap_bytes": heap_bytes(),
                "host_bytes": rss_bytes(),
                "peak_host_bytes": rss_peak_bytes(),
            }
        return values

    def _host(self, asks_driver: bool) -> dict[str, int | None]:
        heap = heap_bytes()
        values = {"heap_bytes": heap}
        if self._counter is not None:
            values["allocated_bytes"] = self._counter.live_bytes()
            values["peak_allocated_bytes"] = self._counter.peak_bytes()
        if asks_driver or heap is None:
            values["host_bytes"] = rss_bytes()
        if asks_driver:
            values |= {"peak_host_bytes": rss_peak_bytes(), "headroom_bytes": local_machine.free_bytes()}
        return values


class EnergyReadings:
    """Joules since its construction, read once a second at most. ``boundary``: what they include; "" without
    a meter."""

    def __init__(self, device: torch.device) -> None:
        self._meter = EnergyMeter(str(device))
        self._meter.start()
        _, self.boundary = self._meter.stop()
        self._joules = 0.0
        self._next_s = time.monotonic() + _ENERGY_PERIOD_S

    def read(self) -> float | None:
        """Return the joules so far. None without a meter, or less than a second after the construction or the
        last reading."""
        if not self.boundary or time.monotonic() < self._next_s:
            return None
        self._next_s = time.monotonic() + _ENERGY_PERIOD_S
        joules, _ = self._meter.stop()
        self._meter.start()
        self._joules += joules or 0.0
        return self._joules
