"""Trace: what one training step would allocate and compute, observed on fake tensors.

Time in a trace is a clock that ticks once per allocation, free or operator.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import operator
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from memfit.types.device_kind import device_kind

# One of a trace's assumptions if it has recurrent networks that are one kernel each.
UNKNOWN_BUFFER: Final = (
    "what the kernel of a recurrent network keeps for backward (cuDNN's reserve space) has no published "
    "size: the least that backward needs is counted"
)


class Category(enum.StrEnum):
    """What a memory allocation is for: "parameter" (parameters and buffers), "gradient", "optimizer_state",
    "ema" (an averaged copy of the weights, and what else is kept beside the model), "activation" (made in
    forward and needed after it), "temporary" (lives within one phase), "input", or "workspace" (inside a
    kernel while it runs; measured by running the operator alone).
    """

    PARAMETER = "parameter"
    GRADIENT = "gradient"
    OPTIMIZER_STATE = "optimizer_state"
    EMA = "ema"
    ACTIVATION = "activation"
    TEMPORARY = "temporary"
    INPUT = "input"
    WORKSPACE = "workspace"


class Phase(enum.StrEnum):
    """A phase of a training step: "forward", "backward" or "optimizer"; or "setup", in which the model and
    the optimizer are built.
    """

    SETUP = "setup"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"


def rounded(size_bytes: int, device: str) -> int:
    """Return the bytes that the allocator of a device of kind ``device`` takes for a request of
    ``size_bytes``: the next multiple of the kind's ``block_bytes``, which is 64 for "cpu" and 512 for "cuda";
    ``size_bytes`` itself if it is one.
    """
    step = device_kind(device).block_bytes
    return -(-size_bytes // step) * step


def peak_of_lives(lives: Iterable[tuple[int, int | None, int]]) -> int:
    """Return the highest number of bytes alive at once, 0 without lives. ``lives``: of each allocation (clock
    of its begin, clock of its end or None if it does not end, bytes). At the same clock, ends come before
    begins."""
    lives = list(lives)
    changes = [(start, size_bytes) for start, _, size_bytes in lives]
    changes += [(end, -size_bytes) for _, end, size_bytes in lives if end is not None]
    return max(itertools.accumulate(size for _, size in sorted(changes)), default=0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """One tensor storage: when it was allocated and freed, and its size, rounded up as by `rounded`."""

    start: int  # clock
    end: int | None  # clock of the free; None: still alive when the trace ended
    size_bytes: int
    category: Category
    phase: Phase  # phase in which it was made
    step: int
    module: str  # dotted path of the module whose forward or backward made it; "" is the root
    op: str
    line: str = ""  # "file.py:123" in user code, if requested
    file: str = ""  # path of that file
    requested_bytes: int = 0  # before rounding
    # "" is the compute stream; others, such as "stream 1", have their own pool in the CUDA allocator
    stream: str = ""
    pieces: int = 1  # number of equal storages that this stands for; the sizes are those of all together


def base_name(op: str) -> str:
    """Return the bare name of an operator, without namespace, overload, "_foreach_" (of operators on many
    tensors) and trailing underscores: "add" for ``aten.add_.Tensor`` and for ``aten._foreach_add_.List``.
    """
    parts = op.split(".")
    name = parts[1] if len(parts) > 1 else op
    return name.removeprefix("_foreach_").rstrip("_")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OpCall:
    """One operator call, or ``times`` equal ones in as many equal slices of a module's input, of which one is
    traced (trace/slice_replay.py). The clock, FLOPs and bytes are those of one call.

    ``signature``: JSON with enough information to run the operator alone on real tensors. ``group``: name of
    the process group of a collective, else "". ``waits``: (stream, count): this call waits for all calls made
    on that stream before it, except the last ``count`` of them; None: it waits for no stream.
    """

    clock: int  # just before its outputs exist
    op: str
    signature: str
    phase: Phase
    step: int
    module: str
    dtype: str  # dtype of the arithmetic: "float32", "bfloat16", ...
    flops: int
    moved_bytes: int  # inputs read + outputs written
    # "": the compute stream; "group NAME": that of a process group, on which its collectives run; "host":
    # the host's processor; "stream 1" and so on: others
    stream: str = ""
    group: str = ""
    waits: tuple[str, int] | None = None
    times: int = 1


_Row = TypeVar("_Row", Allocation, OpCall)


def rows_of(kind: type[_Row], columns: Mapping[str, Iterable[Any]], count: int) -> tuple[_Row, ...]:
    """Return ``count`` instances of ``kind``, `Allocation` or `OpCall`, with the values of each field in
    ``columns``. They are built a field at a time, in a quarter of the time that the constructor takes: long
    traces have 100,000 of them.
    """
    rows = list(map(object.__new__, itertools.repeat(kind, count)))
    assert columns.keys() == set(kind.__slots__), kind
    for name, values in columns.items():
        deque(map(getattr(kind, name).__set__, rows, values), maxlen=0)
    return tuple(rows)


def copied_rows(rows: Sequence[_Row], indices: Sequence[int], **columns: Iterable[Any]) -> tuple[_Row, ...]:
    """Return a copy of ``rows[i]`` for every i in ``indices``. The fields named in ``columns`` get the values
    there, one for each index.
    """
    if not indices:
        return ()
    kind = type(rows[0])
    for name in kind.__slots__:
        if name not in columns:
            values = list(map(operator.attrgetter(name), rows))
            columns[name] = map(values.__getitem__, indices)
    return rows_of(kind, columns, len(indices))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSpan:
    """The range of clocks of one phase in one step, from ``start`` until before ``end``."""

    phase: Phase
    step: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The trace of some training steps. Times in it are clocks, which count allocations, frees and operators.

    Of the equal micro-steps (micro-batches) of a step, only a few are traced. Each of the other
    `repeated_micro_steps` takes time and FLOPs like the last traced one; in a pipeline, like the forwards and
    backwards in `repeated_spans`.
    """

    device: str  # its kind, such as "cpu" or "cuda", which determines the kernels (types/device_kind.py)
    steps: int
    allocations: tuple[Allocation, ...]
    ops: tuple[OpCall, ...]
    spans: tuple[PhaseSpan, ...]
    parameter_count: int
    trainable_count: int
    repeated_micro_steps: int = 0
    repeated_spans: tuple[PhaseSpan, ...] = ()
    offloaded_bytes: int = 0  # written out in the traced part of one step
    restored_bytes: int = 0  # read back; more than written if several operators keep one tensor
    offloaded_tensors: int = 0  # number of pieces written out
    # On local storage: written and read in one step, and the most that it holds.
    storage_written_bytes: int = 0
    storage_read_bytes: int = 0
    storage_bytes: int = 0
    assumptions: tuple[str, ...] = ()  # sentences, such as the answers given to .item()
    guessed: tuple[str, ...] = ()  # lines that read a number that is not known; they got 1
    assumed: tuple[str, ...] = ()  # lines whose value only a run has; it was assumed within its range
    # lowest and highest peak under other assumed values, relative to this trace's peak
    assumed_low_ratio: float = 1.0
    assumed_high_ratio: float = 1.0
    rank: int = 0  # the traced rank, of `ranks`
    ranks: int = 1
    host_peak_bytes: int = 0  # of tensors in the memory of an accelerator's host; not in `allocations`
    host_step_bytes: int = 0  # the same from the first forward pass on, when the model is built
    host_optimizer_bytes: int = 0  # the most of it at once that the optimizer's step made; never pinned
    # (size in bytes, number at once) of the other tensors that it consists of, which may be pinned
    host_blocks_bytes: tuple[tuple[int, int], ...] = ()
    model_bytes: int = 0  # parameters and buffers as built by the job
    communicators: tuple[tuple[str, int], ...] = ()  # (name, number of ranks) of every process group in use
    members: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # their ranks

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle rows by columns, which takes a quarter of the time."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        columns = [
            {name: [getattr(row, name) for row in rows] for name in kind.__slots__}
            for kind, rows in ((Allocation, values.pop("allocations")), (OpCall, values.pop("ops")))
        ]
        return _unpickled, (values, *columns)

    @property
    def last_step_spans(self) -> tuple[PhaseSpan, ...]:
        """The spans of the last step, without those of setup."""
        return tuple(s for s in self.spans if s.step == self.steps - 1 and s.phase is not Phase.SETUP)

    @property
    def last_step_ops(self) -> tuple[OpCall, ...]:
        """The operators of the last step, without those of setup."""
        return tuple(op for op in self.ops if op.step == self.steps - 1 and op.phase is not Phase.SETUP)

    def live_at(self, clock: int) -> tuple[Allocation, ...]:
        """Return the allocations that are alive at ``clock``: one that begins then is, one that ends is
        not."""
        return tuple(a for a in self.allocations if a.start <= clock and (a.end is None or a.end > clock))

    def untraced_passes(self, phase: Phase) -> int:
        """Return how many passes of ``phase``, forward or backward, one step has besides the traced ones."""
        per_micro_step = sum(s.phase is phase for s in self.repeated_spans) or 1
        return per_micro_step * self.repeated_micro_steps


def _unpickled(values: dict[str, Any], allocations: dict[str, list[Any]], ops: dict[str, list[Any]]) -> Trace:
    return Trace(
        **values,
        allocations=rows_of(Allocation, allocations, len(allocations["step"])),
        ops=rows_of(OpCall, ops, len(ops["step"])),
    )
