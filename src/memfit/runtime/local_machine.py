"""This machine as a machine of the catalog, with its accelerators or its processor as devices, and the CPUs
and the memory that can be used now."""

from __future__ import annotations

import dataclasses
import datetime
import os

from memfit import catalog
from memfit.runtime import cgroup, devices
from memfit.types.device_kind import HOST
from memfit.types.errors import UserError
from memfit.types.machine import Device, Fact, Host, Machine

NAME = "this machine"


def this_machine(place: str, kind: str = "") -> Machine:
    """Return the machine on which memfit runs, with devices of the kind ``kind``, such as "cuda" or "cpu". ""
    means its accelerators if torch finds some, else its processor. ``place``: name of a place in the catalog.

    Accelerators are called by their product name and have the catalog's figures if it knows the product.
    Their memory is what the driver reports in all. If they differ, all count as devices like the first. The
    processor is called "this machine", or "this machine's processor" if there is an accelerator as well. Its
    memory is what this process may use of it (`host_memory_limit`), its power an assumed number of watts for
    each CPU thread that this process may use. Raises UserError if torch finds no device of this kind or the
    catalog has no such place, and MemfitError if torch finds an accelerator that does not work.
    """
    accelerator_kind = devices.accelerator_kind()
    if kind not in ("", HOST, accelerator_kind):
        raise UserError(
            f"torch finds no device of the kind {kind!r} on this machine",
            allowed=", ".join(f"this:{k}" for k in (accelerator_kind, HOST) if k),
            hint="`memfit doctor` says what torch finds",
        )
    if not accelerator_kind or kind == HOST:
        name = f"{NAME}'s processor" if accelerator_kind else NAME
        device = Device(
            name=name, kind=HOST, memory_bytes=_host_memory(), power_w=catalog.cpu_power(threads())
        )
        return Machine(name=name, device=device, place=catalog.place(place), is_here=True)
    accelerators = devices.accelerators()
    first = accelerators[0]
    memory = _memory_fact(first.total_bytes, "driver of the device")
    known = _find_device(first.name) or Device(name=first.name, kind=accelerator_kind, memory_bytes=memory)
    return Machine(
        name=f"{first.name} of {NAME}",
        device=dataclasses.replace(
            known,
            name=first.name,
            kind=accelerator_kind,
            gpu_target=first.gpu_target or known.gpu_target,
            memory_bytes=memory,
        ),
        device_count=len(accelerators),
        place=catalog.place(place),
        host=Host(name=NAME, memory_bytes=_host_memory()),
        is_here=True,
    )


def _find_device(name: str) -> Device | None:
    """Return the catalog's device with the product name ``name``, or None."""
    try:
        return catalog.device(name)
    except UserError:
        return None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostMemoryLimit:
    """The memory of this machine that this process may use. ``total_bytes``: in all; ``free_bytes``: what can
    be allocated now without swapping; ``source``: what sets the total: "operating system", "control group",
    or "Slurm" with the variable in parentheses (`slurm_memory`).
    """

    total_bytes: int
    free_bytes: int
    source: str


def host_memory_limit() -> HostMemoryLimit:
    """Return the memory that this process may use. The total is the least of the machine's memory, the limit
    of the process's control groups (of version 1 or 2, such as those of containers and Kubernetes pods), and
    what Slurm has allotted to the job on this node. What is free is the least of the total, what the machine
    has available and what these groups have left."""
    import psutil

    system = psutil.virtual_memory()
    totals = [(int(system.total), "operating system")]
    free_bytes = int(system.available)
    if (group := cgroup.limit_here()) is not None:
        totals.append((group[0], "control group"))
        free_bytes = min(free_bytes, group[1])
    if (allotted := devices.slurm_memory()) is not None:
        totals.append((allotted[0], f"Slurm ({allotted[1]})"))
    total_bytes, source = min(totals, key=lambda total: total[0])
    return HostMemoryLimit(total_bytes=total_bytes, free_bytes=min(free_bytes, total_bytes), source=source)


def _host_memory() -> Fact:
    limit = host_memory_limit()
    return _memory_fact(limit.total_bytes, limit.source)


def _memory_fact(size_bytes: int, source: str) -> Fact:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Fact(value=float(size_bytes), source=source, date=today, kind="measured")


def threads() -> int:
    """Return the number of logical CPUs on which this process may run (its CPU affinity; on systems without,
    those of the machine). A limit on CPU time, as of a container, does not count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_bytes() -> int:
    """Return the bytes of this machine's memory that this process can allocate now without swapping
    (`host_memory_limit`)."""
    return host_memory_limit().free_bytes


def free_device_bytes(kind: str) -> int:
    """Return the bytes that training on a device of this kind could take now: `free_bytes` on the processor;
    on an accelerator the free memory of the first one, less what a process's context takes there, as when
    this process first asked (`accelerators`). Raises MemfitError if an accelerator does not work."""
    if kind == HOST:
        return free_bytes()
    first = devices.accelerators()[0]
    return first.free_bytes - first.context_bytes
