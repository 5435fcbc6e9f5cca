"""Stand-ins for kernels that a prediction does not run: those that a compiler fuses, or that run inside a
library. Their tensors are allocated explicitly, and ``kernel`` reports the work to the trace
(trace/allocation_recorder.py)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_TAKES = "Tensor(a!)[] writes, int read_bytes, int flops, str kind, int[] shape, str dtype"


@functools.cache
def _library() -> Any:
    """Return torch's operator library "memfit". It defines one operator, ``memfit::kernel``, which does
    nothing. The library is cached, because torch unregisters the operators of a deleted library."""
    import torch

    library = torch.library.Library("memfit", "DEF")
    library.define(f"kernel({_TAKES}) -> ()")
    library.impl("kernel", lambda *args, **kwargs: None, "CompositeExplicitAutograd")
    return library


def read_bytes(tensors: Iterable[Any]) -> int:
    """Return the total bytes of the elements of the tensors. Of a distributed tensor, only this rank's part
    counts. Values that are not tensors count as zero."""
    return sum(t.numel() * t.element_size() for t in map(_local_part, tensors) if hasattr(t, "element_size"))


def _local_part(tensor: Any) -> Any:
    """Return this rank's part if the value is a distributed tensor, else the value itself."""
    return getattr(tensor, "_local_tensor", tensor)


def kernel(
    writes: Sequence[torch.Tensor],
    reads: int,
    *,
    flops: int = 0,
    kind: str = "",
    shape: Sequence[int] = (),
    dtype: str = "",
) -> None:
    """Report to the trace one kernel that reads ``reads`` bytes, does ``flops`` floating-point operations and
    writes the tensors ``writes`` (of distributed ones, this rank's parts). Nothing is computed.

    ``kind`` is "mm" with ``shape`` (batch, rows, columns, inner); or "attention" or "attention_backward" with
    ``shape`` (batch x heads, queries, keys, head dim, causal: 0 or 1); or "" with an empty ``shape`` for any
    other kernel. ``dtype`` is the name of the dtype of the arithmetic, "" for that of the first written
    tensor.
    """
    import torch

    _library()
    torch.ops.memfit.kernel([_local_part(t) for t in writes], reads, flops, kind, list(shape), dtype)
