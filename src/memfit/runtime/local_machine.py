"""This machine: its CPU as a machine of the catalog, the CPUs and the memory that can be used now, and the
kind of its accelerator."""

from __future__ import annotations

import datetime
import os

from memfit import catalog
from memfit.types.machine import Device, Fact, Machine


def this_machine(place: str) -> Machine:
    """Return a machine, called "this machine", whose only device is this machine's CPU. Its memory is what
    the operating system reports in all, its power an assumed number of watts for each CPU thread that this
    process may use. ``place`` is the name of a place in the catalog."""
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
    """Return the bytes of this machine's memory that can be allocated now without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)
