"""The device lens: kernels the target device would choose, while tensors are fake CPU ones.

For CUDA, attention goes to the flash kernel (half precision, no mask) or the memory-efficient one, as
torch's own dispatcher does (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp), instead of the CPU
kernels whose saved tensors differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_HALF = (torch.float16, torch.bfloat16)


class Lens(TorchFunctionMode):
    """Sends attention to the CUDA kernels' fake implementations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def device_lens(device: str) -> Iterator[None]:
    """The lens over forward and over what backward recomputes: torch takes function modes off before its
    autograd engine runs. Nothing for "cpu"."""
    if device == "cpu":
        yield
        return
    engine = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
    lens = Lens()

    def run_under_lens(*args: Any, **kwargs: Any) -> Any:
        with lens:
            return engine(*args, **kwargs)

    with lens, mock.patch.object(torch.autograd, "_engine_run_backward", run_under_lens):
        yield


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Shapes (batch, heads, length, head dim), as in scaled_dot_product_attention."""
    aten: Any = torch.ops.aten
    if enable_gqa and key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    if attn_mask is None and query.dtype in _HALF and query.shape[-1] <= 256:
        out = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
        return out[0]  # type: ignore[no-any-return]
    bias = _bias(attn_mask, query, key)
    out = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )
    return out[0]  # type: ignore[no-any-return]


def _bias(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """A boolean mask becomes an additive one of the query's dtype, as the kernel's front end does."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
