"""Support grouped matrix products on fake tensors of any dtype. The kernels accept any dtype, but torch's
shape rule accepts bfloat16 only (torch/_meta_registrations.py)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import _meta_registrations

_NAME = "_meta_grouped_mm_common"
_TORCH_RULE: Any = getattr(_meta_registrations, _NAME)


def grouped_products() -> AbstractContextManager[Any]:
    """Return a context in which torch's shape rule of grouped matrix products accepts every dtype."""
    return mock.patch.object(_meta_registrations, _NAME, _of_any_dtype)


def _of_any_dtype(mat_a: torch.Tensor, mat_b: torch.Tensor, **options: Any) -> torch.Tensor:
    half = torch.bfloat16
    if options.get("scale_a") is not None or mat_a.dtype == half or mat_b.dtype != mat_a.dtype:
        return _TORCH_RULE(mat_a, mat_b, **options)  # type: ignore[no-any-return]
    out: torch.Tensor = _TORCH_RULE(mat_a.to(half), mat_b.to(half), **{**options, "out_dtype": None})
    return out.to(options.get("out_dtype") or mat_a.dtype)
