"""This machine as a catalog row would describe it, as far as it can be known without an accelerator."""

from __future__ import annotations

import datetime
import os

from memfit import catalog
from memfit.types.machine import Device, Fact, Machine


def this_machine(place: str) -> Machine:
    """The processor of this machine as one device: memory measured, power assumed per thread."""
    import psutil

    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    memory = Fact(
        value=float(psutil.virtual_memory().total), source="operating system", date=today, kind="measured"
    )
    device = Device(
        name="this machine", kind="cpu", memory_bytes=memory, power_w=catalog.cpu_power(threads())
    )
    return Machine(name="this machine", device=device, place=catalog.place(place))


def threads() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def accelerator_kind() -> str:
    """Of the accelerator that torch could use here, such as "cuda"; "" where there is none. Loads torch, and
    begins nothing on the device."""
    import torch

    if not torch.accelerator.is_available():
        return ""
    found = torch.accelerator.current_accelerator()
    return found.type if found is not None else ""


def free_bytes() -> int:
    """Memory that can be taken now without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)
