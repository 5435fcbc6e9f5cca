"""Copies of a model that is already in memory, without its bytes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode


class FakeCopies(TorchFunctionMode):
    """While open, ``copy.deepcopy`` makes fake CPU tensors of real ones (on whatever device they lie), and
    clones fake ones, which torch's own deepcopy asks for a data pointer."""

    def __init__(self, fake: FakeTensorMode | None = None) -> None:
        self.fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self._copy(tensor)
            return memo[id(tensor)]
        if func is torch._C.TensorBase.clone:  # what Parameter's own deepcopy calls
            return self._copy(args[0])
        return func(*args, **(kwargs or {}))

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if isinstance(tensor, FakeTensor) or self.fake is None:
                return tensor.clone()
            if tensor.device.type == "cpu":
                return self.fake.from_tensor(tensor.detach(), static_shapes=True)
            with self.fake:
                return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)


def copied(model: torch.nn.Module) -> torch.nn.Module:
    """A copy on fake tensors inside a fake mode, on real ones outside; the model itself is only read.
    Gradients are not copied: a training step begins without."""
    fake = torch._guards.active_fake_mode()
    if fake is None:
        return copy.deepcopy(model)
    with FakeCopies(fake):
        return copy.deepcopy(model)
