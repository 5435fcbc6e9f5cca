"""Copies of a model that is already in memory, without its bytes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes


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


@contextlib.contextmanager
def script_modules_loaded(fake: FakeTensorMode) -> Iterator[None]:
    """TorchScript reads and writes files in C++, on real tensors only: while this lasts, ``torch.jit.load``
    and ``save`` run outside the fake mode, and what is loaded is copied into it."""
    load, save = torch.jit.load, torch.jit.save

    def loaded(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            module = load(*args, **kwargs)  # type: ignore[no-untyped-call]
        return _script_copied(module, fake)

    def saved(*args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            save(*args, **kwargs)

    with mock.patch.object(torch.jit, "load", loaded), mock.patch.object(torch.jit, "save", saved):
        yield


def copied(model: torch.nn.Module) -> torch.nn.Module:
    """A copy on fake tensors inside a fake mode, on real ones outside; the model itself is only read.
    Gradients are not copied: a training step begins without."""
    fake = torch._guards.active_fake_mode()
    if fake is None:
        return copy.deepcopy(model)
    with FakeCopies(fake):
        compiled = [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
        return copy.deepcopy(model, {id(module): _script_copied(module, fake) for module in compiled})


def _script_copied(module: Any, fake: FakeTensorMode) -> Any:
    """C++ clones the tensors: outside of autograd, where they would be results, and where nothing but the
    fake mode sees it."""
    with _disable_current_modes(), fake, torch.no_grad():
        made = copy.deepcopy(module)
    for old, new in zip(module.parameters(), made.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return made
