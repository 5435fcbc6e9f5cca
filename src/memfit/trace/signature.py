"""Operator calls as JSON text, sufficient to run the operator alone on real tensors of the same shapes."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import torch


def describe(name: str, args: Any, kwargs: Mapping[str, Any]) -> str:
    """Return an operator call as JSON text: ``[name, arguments, keyword arguments]``.

    Tensors become ``{"t": [shape, stride, dtype]}``, with "conj" appended for conjugates. Dtypes, layouts and
    memory formats become ``{"torch": name}``, devices ``{"device": name}``, and objects of other types
    ``{"other": text}``. Lists and mappings keep their structure, and numbers, texts and None stay.
    """
    return json.dumps([name, _plain(args), _plain(kwargs)], separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        sizes = [list(value.shape), list(value.stride())]
        return {"t": [*sizes, dtype_name(value.dtype), *(["conj"] if value.is_conj() else [])]}
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


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def moved_bytes(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of all elements of ``tensors``, which a call reads or writes. A tensor with more
    elements than its storage has, as after broadcasting, counts the bytes of its storage."""
    total = 0
    for tensor in tensors:
        size_bytes = tensor.numel() * tensor.element_size()
        total += min(size_bytes, tensor.untyped_storage().nbytes())
    return total
