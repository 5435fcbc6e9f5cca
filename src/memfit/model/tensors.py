"""The tensors inside nested values, such as the arguments of a module."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree


def tensor_leaves(value: Any) -> list[torch.Tensor]:
    """Return the tensors in ``value``, also those in nested containers, in the order of torch's pytree."""
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
