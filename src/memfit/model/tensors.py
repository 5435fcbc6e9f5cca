"""The tensors inside nested values and inside wrapper subclasses."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memfit.types.device_kind import HOST
from memfit.types.errors import UserError


def check_on_host(batch: Any) -> Any:
    """Return a job's batch unchanged. Raises UserError if it has tensors outside the host's memory. Those
    inside objects, such as a batch of graphs, are not checked."""
    devices = sorted({str(t.device) for t in tensor_leaves(batch) if t.device.type != HOST})
    if devices:
        raise UserError(
            f"make_batch returns tensors on {', '.join(devices)}",
            allowed="tensors in the host's memory: memfit moves each batch to the device itself",
            hint="leave .to(device) out of make_batch",
        )
    return batch


def tensor_leaves(value: Any) -> list[torch.Tensor]:
    """Return the tensors in ``value``, also those in nested containers, in the order of torch's pytree."""
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that hold the bytes of ``tensor``: the innermost ones if it is a wrapper subclass,
    such as a DTensor, else the tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [p for t in inner if isinstance(t, torch.Tensor) for p in plain_tensors(t)]
