"""Device memory beside tensors: BLAS workspaces inside the caching allocator; the CUDA context and NCCL's
buffers outside it.

Sizes and channel counts are Facts of the catalog, with ranges. The size of an NCCL buffer is NCCL's default.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
from collections.abc import Iterable, Mapping
from typing import Final

from memfit.types.machine import Device, Fact
from memfit.types.result import Interval
from memfit.types.trace import Allocation, Category, OpCall, Phase, Trace, base_name
from memfit.types.units import KIB, MIB

# One NCCL connection with the default sizes of src/transport/p2p.cc and src/init.cc (nccl@5067397). The
# receiver has a buffer per protocol (Simple 4 MiB; LL 8 x 512 x 8 lines of 16 B; LL128 120 x 640 x 8 words of
# 8 B) and 8 KiB of flags; the sender has its flags. Both are rounded up to CUDA's pages of 2 MiB, giving 10
# and 2 MiB, the two sizes that nccl#1685 counts on an H100.
_PAGE_BYTES: Final = 2 * MIB
_BUFFERS_BYTES: Final = 4 * MIB + 8 * 512 * 8 * 16 + 120 * 640 * 8 * 8 + 8 * KIB
CONNECTION_BYTES: Final = -(-_BUFFERS_BYTES // _PAGE_BYTES) * _PAGE_BYTES + _PAGE_BYTES
# NVLink SHARP (src/transport/nvls.cc): 8 steps of 128 KiB, up and down, per channel and rank of the node.
_MULTICAST_BYTES: Final = 2 * 8 * 128 * KIB
_NODE_RANKS: Final = 8

_BLAS_OPS: Final = frozenset(
    ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "_grouped_mm", "_scaled_mm", "linear")
)
_BLASLT_OPS: Final = frozenset(("linear", "_scaled_mm"))  # and addmm, often
_BLASLT_WORKSPACE_BYTES: Final = 1 * MIB  # default of CUBLASLT_WORKSPACE_SIZE
_FREES_WORKSPACES: Final = (2, 15)  # first version of torch that frees a workspace after its product
BLAS_WORKSPACE: Final = "BLAS workspace"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOverhead:
    """Device memory of one process outside PyTorch's caching allocator, in bytes.

    ``parts_bytes``: the known parts by name: "context" (CUDA's context), "kernels" (code of kernels; absent
    if it is included in the context) and "nccl" (NCCL's buffers; absent if no communicator has several
    ranks). ``total_bytes``: the sum of all parts with its range, or None if a part is unknown.
    """

    total_bytes: Interval | None
    parts_bytes: Mapping[str, int]


def with_workspaces(trace: Trace, device: Device, *, keeps: bool | None = None) -> Trace:
    """Return the trace with PyTorch's BLAS workspaces added as allocations. It is unchanged if it has no
    matrix product or if ``device.blas_workspace_bytes`` is None.

    Up to torch 2.14, and for devices that are not NVIDIA's, a workspace is allocated at the first matrix
    product of each thread and kept. Forward and optimizer run in the caller's thread, backward in
    autograd's; each has one BLAS handle. From 2.15 on, each product has a workspace, which is freed after
    it; products by cuBLASLt have one of 1 MiB (aten/src/ATen/cuda/CublasHandlePool.cpp). All go through the
    caching allocator.

    ``keeps``: whether workspaces are kept; None: as the installed torch does.
    """
    workspace_size = device.blas_workspace_bytes
    if workspace_size is None:
        return trace
    products = [op for op in trace.ops if base_name(op.op) in _BLAS_OPS]
    if not products:
        return trace
    size_bytes = int(workspace_size.value)
    if keeps if keeps is not None else not (_frees_workspaces() and device.gpu_target.startswith("sm_")):
        first_products: dict[bool, OpCall] = {}
        for op in products:
            first_products.setdefault(op.phase is Phase.BACKWARD, op)
        added = [_workspace(op, size_bytes, keeps=True) for op in first_products.values()]
    else:
        added = [
            _workspace(
                op,
                _BLASLT_WORKSPACE_BYTES
                if _is_blaslt(base_name(op.op), op.dtype, op.signature)
                else size_bytes,
                keeps=False,
            )
            for op in products
        ]
    return dataclasses.replace(trace, allocations=(*trace.allocations, *added))


@functools.cache
def _frees_workspaces() -> bool:
    """Return whether the installed torch frees the workspace of a matrix product after it."""
    major, minor = importlib.metadata.version("torch").split(".")[:2]
    return (int(major), int(minor)) >= _FREES_WORKSPACES


@functools.lru_cache(maxsize=100_000)
def _is_blaslt(base: str, dtype: str, signature: str) -> bool:
    """Return whether cuBLASLt computes the product ``base`` and not cuBLAS: always for "linear" and
    "_scaled_mm"; for "addmm" with beta = 1 if the second matrix has several rows and columns and what is
    added is a contiguous row, or contiguous rows in a dtype below float32 (isInputCompliesAddmmCudaLt in
    aten/src/ATen/native/cuda/Blas.cpp). False for all others."""
    if base != "addmm":
        return base in _BLASLT_OPS
    _, args, kwargs = json.loads(signature)
    (shape, strides, *_), (columns_shape, *_) = args[0]["t"], args[2]["t"]
    rows = math.prod(shape[:-1])
    fits = min(columns_shape) > 1 and shape[-1:] == columns_shape[1:] and strides[-1] == 1
    is_narrow = dtype not in ("float32", "float64")
    return fits and kwargs.get("beta", 1) == 1 and (rows == 1 or is_narrow)


def _workspace(op: OpCall, size_bytes: int, *, keeps: bool) -> Allocation:
    """Return a BLAS workspace as an allocation that is made in the operator ``op``, and never freed if
    ``keeps``, else at once. It starts at the same clock as the operator's output, which comes before it in
    the trace; frees come after allocations of that clock.
    """
    return Allocation(
        start=op.clock + 1,
        end=None if keeps else op.clock + 1,
        size_bytes=size_bytes,
        category=Category.WORKSPACE,
        phase=op.phase,
        step=op.step,
        module="",
        op=BLAS_WORKSPACE,
    )


def device_overhead(device: Device, communicators: Iterable[tuple[str, int]] = ()) -> DeviceOverhead:
    """Return the device memory that one process takes on ``device`` for the CUDA context, the code of kernels
    and NCCL's buffers.

    ``communicators``: (name, number of ranks) of each NCCL communicator of the process; those of one rank
    have no buffers. The total is None if the size of the device's context is unknown, or if there are buffers
    and the device's number of NCCL channels is unknown.
    """
    parts: dict[str, Interval | None] = {"context": interval_of(device.context_bytes)}
    if device.kernels_bytes is not None:
        parts["kernels"] = interval_of(device.kernels_bytes)
    groups = [ranks for _, ranks in communicators if ranks > 1]
    if groups:
        parts["nccl"] = total_interval(nccl_bytes(device, ranks) for ranks in groups)
    known_bytes = {name: int(part.value) for name, part in parts.items() if part is not None}
    return DeviceOverhead(total_bytes=total_interval(parts.values()), parts_bytes=known_bytes)


def nccl_bytes(device: Device, ranks: int) -> Interval | None:
    """Return the bytes of device memory that NCCL's buffers of one process take for a communicator of
    ``ranks`` ranks; None if ``device.nccl_channels`` is None.

    NCCL allocates the buffers of an algorithm at its first use (since 2.22), so the interval covers several
    cases. Low: rings only. Value: rings and a second algorithm, which is NVLink SHARP if the device has it,
    else a tree with one neighbour. High: rings, trees with two neighbours and, if the device has it, NVLink
    SHARP.
    """
    channels = interval_of(device.nccl_channels)
    if channels is None:
        return None
    multicast_channels = device.nccl_multicast_channels.value if device.nccl_multicast_channels else 0.0
    multicast = _MULTICAST_BYTES * min(ranks, _NODE_RANKS) * multicast_channels
    second_algorithm = multicast or channels.value * CONNECTION_BYTES
    return Interval(
        value=channels.value * CONNECTION_BYTES + second_algorithm,
        low=channels.low * CONNECTION_BYTES,
        high=channels.high * CONNECTION_BYTES * 3 + multicast,
    )


def interval_of(fact: Fact | None) -> Interval | None:
    """Return a Fact as an interval; None for None. An end that the Fact does not have is its value."""
    if fact is None:
        return None
    low, high = fact.bounds
    return Interval(value=fact.value, low=low, high=high)


def total_interval(parts: Iterable[Interval | None]) -> Interval | None:
    """Return the sum of the intervals: of the values, of the low ends and of the high ends, because what
    makes one part large may make another large too. None if a part is None (unknown); 0 if there are no
    parts.
    """
    intervals = list(parts)
    if any(part is None for part in intervals):
        return None
    return Interval(
        value=sum(p.value for p in intervals if p),
        low=sum(p.low for p in intervals if p),
        high=sum(p.high for p in intervals if p),
    )


def exceeds_probability(amount: Interval, limit: float) -> float:
    """Return the probability, from 0 to 1, that the amount is greater than ``limit``.

    The interval is read as the central 95 % of a split normal distribution: its mode is the value, and each
    side has its own spread and is weighted by its width (Wallis 2014). If low and high are equal, the result
    is 1 if the value is greater than ``limit``, else 0.
    """
    below, above = ((amount.value - amount.low) / 1.96, (amount.high - amount.value) / 1.96)
    if below + above == 0:
        return float(amount.value > limit)
    spread = below if limit < amount.value else above
    if spread == 0:
        return 0.0 if limit >= amount.value else 1.0
    tail = math.erfc(abs(limit - amount.value) / spread / math.sqrt(2)) / 2
    probability = 2 * spread / (below + above) * tail
    return probability if limit >= amount.value else 1 - probability
