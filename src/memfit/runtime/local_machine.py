"""This machine as an entry of the catalog, as far as it is known without an accelerator."""

from __future__ import annotations

import datetime
import os

from memfit import catalog
from memfit.types.machine import Device, Fact, Machine


def this_machine(place: str) -> Machine:
    """Return this machine's CPU as one device, with measured memory and an assumed power per thread."""
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
    """Return the number of logical CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def accelerator_kind() -> str:
    """Return the kind of the accelerator that torch can use here, such as "cuda", or "" if there is none.
    This imports torch but does not initialise the device."""
    import torch

    if not torch.accelerator.is_available():
        return ""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator is not None else ""


def free_bytes() -> int:
    """Return the memory that can be allocated now without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)
