"""How much of a machine's memory a plan needs, and whether it fits: `needed_bytes` is compared with a
`Cap`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from memfit.cost.host import host_holds
from memfit.cost.memory_estimate import ASSUMED_RESERVED_RATIO
from memfit.engines.registry import engine
from memfit.techniques.recompute.optimal import OPTIMAL_CHECKPOINTING
from memfit.techniques.registry import conflict, make_use
from memfit.types.machine import Machine
from memfit.types.plan import Plan
from memfit.types.result import Estimate
from memfit.types.trace import Category

# Process memory above its tensors under a hard cap: 1.02x to 1.04x was observed under RLIMIT_DATA.
CPU_HEADROOM_RATIO, CPU_HEADROOM_BYTES = 1.05, 2 * 2**20
# Assumed for context and libraries on an accelerator for which the catalog has no figure.
UNKNOWN_DEVICE_BYTES = 1 * 2**30
_RANDOM_STATE_BYTES = 8 * 2**10  # that of the host has 5,056 bytes, that of a GPU 16
_CAP_SHARE = 0.99  # of the cap that a plan with a memory budget for recomputation is to use
Fits = Callable[[Estimate], bool]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """The memory limit of a search: ``bytes`` of one device, and the memory of its host.

    The way from --memory to the answer: the command line reads it into ``Request.cap_bytes``; `search.search`
    decides the cap if it is None; `memory_cap` makes the Cap; and `Cap.holds` compares, for the estimate of
    each plan, `needed_bytes` with ``bytes``.

    ``needs`` returns how many bytes of a device an estimate's plan needs. ``host`` tells whether the host has
    enough memory for it. ``refuses`` returns the reasons why the search's engine does not support a plan;
    empty if it does.
    """

    bytes: int
    needs: Callable[[Estimate], int]
    refuses: Callable[[Plan], tuple[str, ...]]
    host: Callable[[Estimate], bool] = lambda estimate: True

    def holds(self, estimate: Estimate) -> bool:
        """Return whether the estimate's plan fits the device and the host."""
        return self.needs(estimate) <= self.bytes and self.host(estimate)

    def can_add_optimal_checkpointing(self, plan: Plan) -> bool:
        """Return whether optimal-checkpointing, which recomputes within a memory budget, can be added to the
        plan: the plan is then without conflicts, and the engine supports it.
        """
        with_budget = plan.with_use(make_use(OPTIMAL_CHECKPOINTING, {}))
        return conflict(with_budget) is None and not self.refuses(with_budget)

    def room_bytes(self, traced: Sequence[Estimate]) -> int:
        """Return the peak of tensors, in bytes, at which a plan would need 99 % of the cap; at least 0.

        The need is taken to be linear in the peak: on the line through the estimates of ``traced`` (at least
        one) with the lowest and the highest peak. If that line does not rise, the need is taken to be
        proportional to the peak, as in the estimate with the lowest peak.
        """
        lowest, highest = (f(traced, key=lambda e: e.allocated_bytes.value) for f in (min, max))
        tensor_bytes, lowest_need = lowest.allocated_bytes.value, self.needs(lowest)
        need_rise = self.needs(highest) - lowest_need
        slope = (
            (highest.allocated_bytes.value - tensor_bytes) / need_rise
            if need_rise > 0
            else tensor_bytes / lowest_need
        )
        return max(0, int(tensor_bytes + (self.bytes * _CAP_SHARE - lowest_need) * slope))


def memory_cap(cap_bytes: int, machine: Machine, engine_name: str = "native") -> Cap:
    """Return the memory limit of plans for the machine and engine: ``cap_bytes`` of a device, and the memory
    of the machine's host, which is not limited on a CPU whose memory is less than ``cap_bytes``. Raises
    UserError if there is no such engine."""
    return Cap(
        bytes=cap_bytes,
        needs=lambda estimate: needed_bytes(estimate, machine),
        refuses=engine(engine_name).refusals,
        host=host_holds_under(cap_bytes, machine),
    )


def needed_bytes(estimate: Estimate, machine: Machine, *, use_upper_end: bool | None = None) -> int:
    """Return the least cap in bytes under which the estimate's plan fits: its tensors, and what the process
    or device uses beside them. Memory of an accelerator's host is not included.

    - On a CPU: the value of the peak of tensors plus 5 % and 2 MiB; with ``use_upper_end``, at least the
      upper end of the peak plus 2 MiB.
    - On an accelerator of this machine: what the caching allocator reserves, because only that is capped;
      with ``use_upper_end`` the upper end of it, else the value.
    - On another accelerator whose context and libraries the catalog knows: with ``use_upper_end``, the upper
      end of the estimate's device memory; else the value of what the caching allocator reserves and the upper
      end of the rest.
    - On any other accelerator: the value of what the caching allocator reserves, plus 1 GiB.

    Where it is unknown what the allocator reserves, 1.06 times the value of the peak of tensors stands for
    it. ``use_upper_end``: None stands for whether the plan was traced. The values of an untraced estimate (a
    sketch, composed from traces of parts) are upper bounds already.
    """
    use_upper_end = estimate.traced if use_upper_end is None else use_upper_end
    allocated_bytes = estimate.allocated_bytes.value
    if machine.device.is_host:
        if use_upper_end:  # it is higher if the workspaces of kernels were not probed
            allocated_bytes = max(allocated_bytes, estimate.allocated_bytes.high / CPU_HEADROOM_RATIO)
        return int(allocated_bytes * CPU_HEADROOM_RATIO) + CPU_HEADROOM_BYTES
    reserved = estimate.reserved_bytes
    if machine.is_here:
        if reserved is None:
            return int(allocated_bytes * ASSUMED_RESERVED_RATIO)
        return int(reserved.high if use_upper_end else reserved.value)
    if (device_bytes := estimate.device_bytes) is not None:
        if use_upper_end or reserved is None:
            return int(device_bytes.high)
        return int(reserved.value + device_bytes.high - reserved.high)
    reserved_bytes = reserved.value if reserved else allocated_bytes * ASSUMED_RESERVED_RATIO
    return int(reserved_bytes) + UNKNOWN_DEVICE_BYTES


def saved_bytes(estimate: Estimate) -> int:
    """Return how many bytes a save of the plan's largest rank writes, at most: those of the random state, and
    of parameters, buffers and optimizer state at the peak. A save writes less if some of these are gathered
    parameters or parameters with a master copy, which are not saved."""
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
    return needed_bytes(estimate, machine, use_upper_end=False)


def fits_under(cap_bytes: int, machine: Machine) -> Fits:
    """Return a function that tells whether an estimate's plan fits: it needs at most ``cap_bytes`` on the
    device (`needed_bytes`), and the host has the memory that it needs there, which is not checked on a CPU
    whose memory is less than ``cap_bytes``.
    """
    return memory_cap(cap_bytes, machine).holds


def host_holds_under(cap_bytes: int, machine: Machine) -> Fits:
    """Return a function that tells whether the host has the memory that an estimate's plan needs there. If
    the host's memory is unknown, it has not enough for a plan that keeps tensors there, and enough for any
    other.

    On a CPU with a cap above the machine's memory, the function always returns True: such a cap stands for
    the memory of another machine.
    """
    if machine.device.is_host and cap_bytes > machine.device.memory_bytes.value:
        return lambda estimate: True
    return lambda estimate: host_holds(estimate, machine)


def states_bytes(estimate: Estimate) -> int:
    """Return the bytes of parameters, gradients and optimizer state at the peak; 0 for an estimate that was
    not traced whole, which does not know them."""
    return sum(estimate.at_peak_bytes.get(c, 0) for c in ("parameter", "gradient", "optimizer_state"))
