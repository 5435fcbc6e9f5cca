"""Operator calls as JSON text: enough to run the operator alone on real tensors of the same shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree


def describe(name: str, args: Any, kwargs: Mapping[str, Any]) -> str:
    """Tensors become ``{"t": [shape, stride, dtype]}``; lists stay lists; dtypes, devices and memory
    formats are named; plain values stay."""
    return json.dumps([name, _plain(args), _plain(kwargs)], separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"t": [list(value.shape), list(value.stride()), str(value.dtype)[6:]]}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": str(value)[6:]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    return {"other": str(value)}


def moved_bytes(args: Any, kwargs: Any, out: Any) -> int:
    """Bytes of the tensors read and written, each argument once; broadcast ones by their storage."""
    total = 0
    for tensor in _pytree.tree_leaves((args, kwargs, out)):
        if isinstance(tensor, torch.Tensor):
            size_bytes = tensor.numel() * tensor.element_size()
            total += min(size_bytes, tensor.untyped_storage().nbytes())
    return total
