"""Hardware energy counters: RAPL for the CPU package, NVML for a GPU board."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from pathlib import Path
from typing import Any, Final

from memfit.types.device_kind import HOST, device_kind

_POWERCAP: Final = Path("/sys/class/powercap")
_NO_METER: Final = (None, "")


class EnergyMeter:
    """Measures the energy between start() and stop(), and names the boundary at which it is measured:
    "package (RAPL)" or "board (NVML)".

    For a CPU the boundary is the package (cores and caches of every socket, without DRAM, disks and power
    supply), for a GPU of NVIDIA (``device`` "cuda" or "cuda:1") the board. Other accelerators have no meter,
    nor has a CPU whose counters this user may not read. The counters include everything that runs there, not
    only this process. ``powercap`` is the folder of the CPU's counters, unused for other devices."""

    def __init__(self, device: str = HOST, *, powercap: Path = _POWERCAP) -> None:
        self._board = board(device) if device_kind(device.partition(":")[0]).nvml else None
        self._zones = _zones(powercap) if device == HOST else ()
        self._started: tuple[int | None, ...] = ()

    def start(self) -> None:
        """Start measuring, from now on only."""
        self._started = self._read()

    def stop(self) -> tuple[float | None, str]:
        """Return (joules since the last start(), boundary). Return (None, "") if there is no meter, if a
        counter could not be read now or at the start, or if start() was not called."""
        start_readings, end_readings = self._started, self._read()
        if not end_readings or len(start_readings) != len(end_readings):
            return _NO_METER
        if self._board is not None:
            (start_mj,), (end_mj,) = start_readings, end_readings
            return (
                _NO_METER
                if start_mj is None or end_mj is None
                else ((end_mj - start_mj) / 1e3, "board (NVML)")
            )
        spent_uj = [
            zone.spent_uj(b, a) for zone, b, a in zip(self._zones, start_readings, end_readings, strict=True)
        ]
        joules = sum(s for s in spent_uj if s is not None) / 1e6
        return _NO_METER if None in spent_uj else (joules, "package (RAPL)")

    def _read(self) -> tuple[int | None, ...]:
        if self._board is not None:
            return (self._board.energy_mj(),)
        return tuple(zone.energy_uj() for zone in self._zones)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Zone:
    """A package (socket) of the CPU: its folder in /sys/class/powercap, and the number of microjoules at
    which its counter starts again at 0."""

    path: Path
    range_uj: int

    def energy_uj(self) -> int | None:
        return _int(self.path / "energy_uj")

    def spent_uj(self, before: int | None, after: int | None) -> int | None:
        """Return the microjoules between two readings, or None if a reading is missing. This is correct if
        the counter wrapped at most once (a range of 262 kJ is 20 minutes at 200 W)."""
        if before is None or after is None:
            return None
        return after - before if after >= before else after - before + self.range_uj


def _zones(powercap: Path) -> tuple[_Zone, ...]:
    """Return the zones of packages: `intel-rapl:0` and so on, also on AMD. Subzones, such as core and dram,
    and zones whose range cannot be read are left out."""
    zones = []
    for path in sorted(powercap.glob("intel-rapl:*")):
        range_uj = _int(path / "max_energy_range_uj")
        if path.name.count(":") == 1 and _text(path / "name").startswith("package") and range_uj:
            zones.append(_Zone(path=path, range_uj=range_uj))
    return tuple(zones)


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def _int(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A GPU of NVIDIA, as its management library NVML (``nvml``, with its ``handle`` of the GPU) knows it."""

    nvml: Any
    handle: Any

    def free_bytes(self) -> int | None:
        """Return the bytes of the board's memory that no process uses; None if NVML does not tell."""
        try:
            return int(self.nvml.nvmlDeviceGetMemoryInfo(self.handle).free)
        except self.nvml.NVMLError:
            return None

    def used_bytes(self) -> int | None:
        """Return the bytes of the board's memory that all processes use together; None if NVML does not tell
        them."""
        try:
            return int(self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used)
        except self.nvml.NVMLError:
            return None

    def energy_mj(self) -> int | None:
        """Return the millijoules that the board has used since its driver was loaded; None if NVML does not
        tell."""
        try:
            return int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))
        except self.nvml.NVMLError:
            return None  # GPUs before Volta have no such counter


def board(device: str) -> Board | None:
    """Return the board of torch's CUDA `device`, such as "cuda:0", found by UUID because NVML ignores
    CUDA_VISIBLE_DEVICES. Return None if pynvml is not installed or NVML does not find the device."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    import torch

    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        nvml.nvmlInit()
        return Board(nvml=nvml, handle=nvml.nvmlDeviceGetHandleByUUID(uuid))
    except nvml.NVMLError:
        return None
