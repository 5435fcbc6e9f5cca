"""What kind a tensor is while a script is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree

from memfit.model.tensors import plain_tensors

KEPT_BUFFERS = "_memfit_buffers"  # attribute of a module: its real buffers, which fake ones stand for


def is_real(tensor: Any) -> bool:
    """Return whether ``tensor`` is an ordinary tensor with data in host memory."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        and tensor.device.type == "cpu"
        and not isinstance(tensor, FakeTensor)
    )


def holds_real(tensor: torch.Tensor) -> bool:
    """Return whether ``tensor`` is a real tensor, or a wrapper such as DTensor around real ones."""
    return any(map(is_real, plain_tensors(tensor)))


def is_fake(value: Any) -> bool:
    """Return whether ``value`` is a fake tensor, or a wrapper such as DTensor around fake ones."""
    return isinstance(value, torch.Tensor) and any(isinstance(t, FakeTensor) for t in plain_tensors(value))


def has_fakes(value: Any) -> bool:
    """Return whether there is a fake tensor in nested lists, tuples and mappings."""
    return any(map(is_fake, _pytree.tree_leaves(value)))
