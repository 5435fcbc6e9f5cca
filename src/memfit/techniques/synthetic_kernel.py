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
    """Return torch's operator library "memfit", in which the operator ``kernel`` is defined and does nothing.
    It is cached, because torch unregisters the operators of a deleted library."""
    import torch

    library = torch.library.Library("memfit", "DEF")
    library.define(f"kernel({_TAKES}) -> ()")
    library.impl("kernel", lambda *args, **kwargs: None, "CompositeExplicitAutograd")
    return library


def read_bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of the tensors, counting only this rank's part of distributed ones. Other values count
    as zero."""
    return sum(t.numel() * t.element_size() for t in map(_here, tensors) if hasattr(t, "element_size"))


def _here(tensor: Any) -> Any:
    """Return this rank's part of a distributed tensor, and any other value as it is."""
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
    """Report to the trace one kernel that reads ``reads`` bytes, computes ``flops`` operations and writes the
    tensors ``writes`` (this rank's parts of distributed ones). Nothing is computed.

    ``kind`` is "mm" with ``shape`` (batch, rows, columns, inner), or "attention" or "attention_backward" with
    ``shape`` (batch x heads, queries, keys, head dim, causal). ``dtype`` is the dtype of the arithmetic, by
    default that of the first written tensor.
    """
    import torch

    _library()
    torch.ops.memfit.kernel([_here(t) for t in writes], reads, flops, kind, list(shape), dtype)
