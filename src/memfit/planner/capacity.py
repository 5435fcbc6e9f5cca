"""How much of a machine's memory a plan needs, and whether it fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from memfit.cost.host import host_holds
from memfit.cost.memory_estimate import ASSUMED_RESERVED_RATIO
from memfit.types.machine import Machine
from memfit.types.result import Estimate
from memfit.types.trace import Category

# Process memory above its tensors under a hard cap: 1.02x to 1.04x was observed under RLIMIT_DATA.
CPU_HEADROOM_RATIO, CPU_HEADROOM_BYTES = 1.05, 2 * 2**20
# Assumed for context and libraries on an accelerator for which the catalog has no figure.
UNKNOWN_DEVICE_BYTES = 1 * 2**30
_RANDOM_STATE_BYTES = 8 * 2**10  # that of the host has 5,056 bytes, that of a GPU 16
Fits = Callable[[Estimate], bool]


def needed_bytes(estimate: Estimate, machine: Machine) -> int:
    """Return the least cap in bytes under which the estimate's plan fits: its tensors, and what the process
    or device uses beside them.

    On an accelerator of this machine, it is what the caching allocator reserves, because only that is capped.
    On another accelerator whose context and libraries the catalog knows, it is the upper end of the
    estimate's device memory; for a sketch, what the caching allocator reserves, whose value already is an
    upper bound, and the upper end of the rest. On any other accelerator it is what the caching allocator
    reserves, plus 1 GiB. On a CPU, it is the value of the peak of tensors plus 5 % and 2 MiB; for a traced
    plan, at least the upper end of the peak plus 2 MiB. Memory of an accelerator's host is not included.
    """
    allocated_bytes = estimate.allocated_bytes.value
    if machine.device.is_host:
        if estimate.traced:  # the upper end is higher if the workspaces of kernels were not probed
            allocated_bytes = max(allocated_bytes, estimate.allocated_bytes.high / CPU_HEADROOM_RATIO)
        return int(allocated_bytes * CPU_HEADROOM_RATIO) + CPU_HEADROOM_BYTES
    reserved = estimate.reserved_bytes
    if machine.is_here:
        if reserved is None:
            return int(allocated_bytes * ASSUMED_RESERVED_RATIO)
        return int(reserved.high if estimate.traced else reserved.value)
    if (device_bytes := estimate.device_bytes) is not None:
        if estimate.traced or reserved is None:
            return int(device_bytes.high)
        return int(reserved.value + device_bytes.high - reserved.high)
    reserved_bytes = reserved.value if reserved else allocated_bytes * ASSUMED_RESERVED_RATIO
    return int(reserved_bytes) + UNKNOWN_DEVICE_BYTES


def saved_bytes(estimate: Estimate) -> int:
    """Return how many bytes a save of the plan's largest rank writes, at most: the random state, and
    parameters, buffers and optimizer state at the peak. Of these, gathered parameters and those with a master
    copy are not saved."""
    saved = (Category.PARAMETER, Category.OPTIMIZER_STATE)
    return sum(estimate.at_peak_bytes.get(str(c), 0) for c in saved) + _RANDOM_STATE_BYTES


def expected_bytes(estimate: Estimate, machine: Machine) -> int:
    """Return the bytes of one device's memory that the estimate's plan is expected to need: the same quantity
    as `needed_bytes`, without its margin and with the value of each interval instead of its upper end. A step
    that needs this much may need more, up to `needed_bytes`, or less. On a CPU it is the peak of tensors:
    under a hard cap, processes held 0.97 to 1.02 times that (benchmarks/largest.md)."""
    if machine.device.is_host:
        return int(estimate.allocated_bytes.value)
    if estimate.device_bytes is not None and not machine.is_here:
        return int(estimate.device_bytes.value)
    values = dataclasses.replace(estimate, traced=False)  # of which `needed_bytes` takes the values
    return needed_bytes(values, machine)


def fits_under(cap_bytes: int, machine: Machine) -> Fits:
    """Return a function that tells whether an estimate's plan fits: it needs at most ``cap_bytes`` on the
    device (`needed_bytes`), and the host has the memory that it needs there (`host_holds_under`).
    """
    host_fits = host_holds_under(cap_bytes, machine)
    return lambda estimate: needed_bytes(estimate, machine) <= cap_bytes and host_fits(estimate)


def host_holds_under(cap_bytes: int, machine: Machine) -> Fits:
    """Return a function that tells whether the host has the memory that an estimate's plan needs there, as
    `host_holds` does.

    On a CPU with a cap above the machine's memory, the function always returns True: such a cap stands for
    the memory of another machine.
    """
    if machine.device.is_host and cap_bytes > machine.device.memory_bytes.value:
        return lambda estimate: True
    return lambda estimate: host_holds(estimate, machine)


def states_bytes(estimate: Estimate) -> int:
    """Return the bytes of parameters, gradients and optimizer state at the peak; 0 for a sketch, which does
    not know them.
    """
    return sum(estimate.at_peak_bytes.get(c, 0) for c in ("parameter", "gradient", "optimizer_state"))
