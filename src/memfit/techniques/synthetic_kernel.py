"""Kernels that a prediction stands in for: what a compiler fuses, what a library's own kernel does inside.
Their tensors are made by hand; ``kernel`` tells whoever watches (trace/allocation_recorder.py) what the work
was."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_TAKES = "Tensor(a!)[] writes, int read_bytes, int flops, str kind, int[] shape, str dtype"


@functools.cache
def _library() -> Any:
    """Kept, as torch forgets operators whose library is gone."""
    import torch

    library = torch.library.Library("memfit", "DEF")
    library.define(f"kernel({_TAKES}) -> ()")
    library.impl("kernel", lambda *args, **kwargs: None, "CompositeExplicitAutograd")
    return library


def read_bytes(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in map(_here, tensors) if hasattr(t, "element_size"))


def _here(tensor: Any) -> Any:
    """This rank's part of a distributed tensor."""
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
    """One kernel that reads so many bytes and writes these tensors.

    ``kind`` "mm" with ``shape`` (batch, rows, columns, inner); "attention" or "attention_backward" with
    (batch x heads, queries, keys, head dim, causal). ``dtype``: of the arithmetic; else of the first write.
    """
    import torch

    _library()
    torch.ops.memfit.kernel([_here(t) for t in writes], reads, flops, kind, list(shape), dtype)
