"""Reductions with a narrow accumulator: the loss of accuracy in a kernel that does not keep its sums in
float32 as torch's kernels do (Micikevicius et al. 2018, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_MOST: Final = 512  # most consecutive additions; with more elements, each addition adds a group


class NarrowSums(TorchDispatchMode):
    """Mode that replaces sums, means, softmax and layer norms of bfloat16 and float16 tensors by ones whose
    sums are rounded to that dtype after every addition (`add_narrow`).

    Sums and means over a list of several dimensions or with a given result dtype, and calls on scalars, are
    not replaced. ``used``: whether anything was replaced."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = _OWN.get(func.overloadpacket.__name__)
        x = args[0] if args else None
        if replacement is None or not isinstance(x, torch.Tensor) or x.dtype not in _NARROW or not x.dim():
            return func(*args, **(kwargs or {}))
        result = replacement(*args, **(kwargs or {}))
        self.used = self.used or result is not NotImplemented
        return func(*args, **(kwargs or {})) if result is NotImplemented else result


_NARROW: Final = (torch.bfloat16, torch.float16)


def add_narrow(x: torch.Tensor) -> torch.Tensor:
    """Return the sum over the last dimension, (..., n) to (...), rounded to the dtype of ``x`` after every
    addition. If n is above 512, groups of n / 512 elements, rounded up (the last may be smaller), are first
    summed in float32 and rounded, so that at most 512 values are added."""
    if not x.shape[-1]:
        return x.new_zeros(x.shape[:-1])
    groups = -(-x.shape[-1] // _MOST)
    parts = [p.float().sum(-1).to(x.dtype) if groups > 1 else p.squeeze(-1) for p in x.split(groups, -1)]
    total = torch.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return total


def _layer_norm(
    x: torch.Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> tuple[torch.Tensor, ...]:
    flat = x.flatten(x.dim() - len(shape))
    mean = add_narrow(flat).unsqueeze(-1) / flat.shape[-1]
    centred = flat - mean
    scale = (add_narrow(centred * centred).unsqueeze(-1) / flat.shape[-1] + eps).rsqrt()
    result = (centred * scale).view_as(x)
    result = result if weight is None else result * weight
    statistics = (x.shape[: x.dim() - len(shape)] + (1,) * len(shape),) * 2
    return (
        result if bias is None else result + bias,
        *(t.view(s).float() for t, s in zip((mean, scale), statistics, strict=True)),
    )


def _softmax(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    exponentials = (x - x.amax(dim, keepdim=True)).exp()
    return exponentials / add_narrow(exponentials.transpose(dim, -1)).unsqueeze(-1).transpose(dim, -1)


def _sum(x: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if dtype is not None or (isinstance(dim, list | tuple) and len(dim) != 1):
        return NotImplemented
    if dim is None:
        return add_narrow(x.flatten())
    result = add_narrow(x.transpose(dim[0], -1)).unsqueeze(-1).transpose(dim[0], -1)
    return result if keepdim else result.squeeze(dim[0])


def _mean(x: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    result = _sum(x, dim, keepdim, dtype=dtype)
    return result if result is NotImplemented else result / (x.numel() / max(1, result.numel()))


_OWN: Final[dict[str, Callable[..., Any]]] = {
    "native_layer_norm": _layer_norm,
    "_softmax": _softmax,
    "sum": _sum,
    "mean": _mean,
}
