"""Trace: what one training step would allocate and compute, seen on fake tensors.

Time inside a trace is a clock that ticks once per allocation, free or operator.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping


class Category(enum.StrEnum):
    PARAMETER = "parameter"  # and buffers
    GRADIENT = "gradient"
    OPTIMIZER_STATE = "optimizer_state"
    EMA = "ema"  # the averaged copy of the weights
    ACTIVATION = "activation"  # made in forward, needed after it
    TEMPORARY = "temporary"  # lives within one phase
    INPUT = "input"
    WORKSPACE = "workspace"  # inside a kernel while it runs; seen by probing the operator alone


class Phase(enum.StrEnum):
    SETUP = "setup"  # model and optimizer are built
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"


GRANULARITY_BYTES = {"cpu": 64, "cuda": 512}  # c10's alignment; the caching allocator's smallest block


def rounded(size_bytes: int, device: str) -> int:
    """What the device's allocator takes for a request."""
    step = GRANULARITY_BYTES[device]
    return -(-size_bytes // step) * step


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """One storage's life, rounded to the device's allocation granularity."""

    start: int  # clock
    end: int | None  # clock of the free; None: still alive when the trace ended
    size_bytes: int
    category: Category
    phase: Phase  # in which it was made
    step: int
    module: str  # dotted path of the module whose forward (or its backward) made it; "" is the root
    op: str
    line: str = ""  # "file.py:123" of user code, when asked for
    requested_bytes: int = 0  # before rounding
    stream: str = ""  # "" is the compute stream; else e.g. "all-gather": its own pool in the CUDA allocator


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OpCall:
    """One operator call. ``signature`` is JSON: enough to run the operator alone on real tensors.

    ``group``: the process group of a collective. ``waits``: this call waits for that stream, all but its
    last so many calls (counted back from here, so that repeated blocks say the same).
    """

    clock: int  # just before its outputs exist
    op: str
    signature: str
    phase: Phase
    step: int
    module: str
    dtype: str  # of the arithmetic: "float32", "bfloat16", ...
    flops: int
    moved_bytes: int  # inputs read + outputs written
    stream: str = ""  # "" is the compute stream; a collective's own is that of its group
    group: str = ""
    waits: tuple[str, int] | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSpan:
    phase: Phase
    step: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Of equal micro-steps only a few are played: the rest, `repeated_micro_steps` of them, are like the last
    that was, or in a pipeline like the forwards and backwards of `repeated_spans`, for time and FLOPs."""

    device: str  # whose kernels were chosen: "cpu", "cuda"
    steps: int
    allocations: tuple[Allocation, ...]
    ops: tuple[OpCall, ...]
    spans: tuple[PhaseSpan, ...]
    parameter_count: int
    trainable_count: int
    repeated_micro_steps: int = 0
    repeated_spans: tuple[PhaseSpan, ...] = ()
    offloaded_bytes: int = 0  # written out in the played part of one step
    restored_bytes: int = 0  # and read back, more where several operators keep one tensor
    offloaded_tensors: int = 0  # in so many pieces
    assumptions: tuple[str, ...] = ()  # e.g. answers given to .item()
    guessed: tuple[str, ...] = ()  # lines that asked for a number which nothing decides but weights
    assumed: tuple[str, ...] = ()  # lines that asked for a value which only a run has, within its range
    assumed_low_ratio: float = 1.0  # the peak under other values of what only a run decides, lowest to
    assumed_high_ratio: float = 1.0  # highest, to this peak
    rank: int = 0  # the one traced, of `ranks`
    ranks: int = 1
    host_peak_bytes: int = 0  # of tensors that lie in host memory beside the device; not in `allocations`
    host_step_bytes: int = 0  # the same from the first forward pass on, when the model is built
    model_bytes: int = 0  # of parameters and buffers, as the job builds them
    communicators: tuple[tuple[str, int], ...] = ()  # (name, ranks in it) of every process group in use
    members: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # their ranks

    def unplayed(self, phase: Phase) -> int:
        """Forwards or backwards of a step beyond those played."""
        each = sum(s.phase is phase for s in self.repeated_spans) or 1
        return each * self.repeated_micro_steps
