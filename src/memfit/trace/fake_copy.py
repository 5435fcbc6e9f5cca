"""Copies of a model that is already in memory, without allocating its bytes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from memfit.model.batch_objects import NESTED_ALLOWED, NESTED_GIVEN
from memfit.trace.concrete_values import keep_value
from memfit.types.errors import UserError


class FakeCopies(TorchFunctionMode):
    """Mode in which ``copy.deepcopy`` turns real tensors (on any device) into fake CPU tensors of the mode
    ``fake``, and clones fake tensors. Torch's own deepcopy would ask fake tensors for a data pointer. If
    ``fake`` is None, all tensors are cloned. A real CPU tensor of one element that requires no gradient keeps
    its value, which the model may read (`keep_value`)."""

    def __init__(self, fake: FakeTensorMode | None = None) -> None:
        self.fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self._copy(tensor)
            return memo[id(tensor)]
        if func is torch._C.TensorBase.clone:  # called by Parameter's own deepcopy
            return self._copy(args[0])
        return func(*args, **(kwargs or {}))

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if isinstance(tensor, FakeTensor) or self.fake is None:
                return tensor.clone()
            if tensor.device.type == "cpu":
                copied = self.fake.from_tensor(tensor.detach(), static_shapes=True)
                if tensor.numel() == 1 and not tensor.requires_grad:
                    keep_value(copied, tensor)  # a buffer such as a stride, which the model may read
                return copied
            with self.fake:
                return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)


@contextlib.contextmanager
def script_modules_loaded(fake: FakeTensorMode) -> Iterator[None]:
    """Let TorchScript read and write files inside this context. It does so in C++ on real tensors only, so
    ``torch.jit.load`` and ``save`` run outside all dispatch modes, and a loaded module is copied into the
    mode ``fake``."""
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


@contextlib.contextmanager
def unsupported_tensors_refused() -> Iterator[None]:
    """Let tensors of which no fake ones can be made raise UserError inside this context: parameters and
    buffers without a shape, as lazy modules have them before their first forward pass, and jagged tensors."""

    def refuse_lazy(cls: Any, *args: Any, **kwargs: Any) -> Any:
        raise UserError(
            "the model has a lazy module, such as nn.LazyLinear, whose parameters have no shape before its "
            "first forward pass",
            allowed="modules that are given all their sizes, such as nn.Linear(in_features, out_features) in "
            "place of nn.LazyLinear(out_features)",
        )

    def refuse_jagged(*args: Any, **kwargs: Any) -> Any:
        raise UserError(NESTED_GIVEN, allowed=NESTED_ALLOWED)

    with contextlib.ExitStack() as stack:
        for kind in (UninitializedParameter, UninitializedBuffer):
            stack.enter_context(mock.patch.object(kind, "__new__", refuse_lazy))
        stack.enter_context(mock.patch.object(FakeTensorMode, "create_symbolic_nested_int", refuse_jagged))
        yield


def copy_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of ``model``, on fake tensors inside a fake mode and on real ones outside. The model
    itself is only read. Gradients are not copied: a training step starts without them."""
    fake = torch._guards.active_fake_mode()
    if fake is None:
        return copy.deepcopy(model)
    with FakeCopies(fake):
        script_modules = [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
        return copy.deepcopy(model, {id(module): _script_copied(module, fake) for module in script_modules})


def _script_copied(module: Any, fake: FakeTensorMode) -> Any:
    """Return a copy of a TorchScript module on tensors of the mode ``fake``. C++ clones its tensors. This
    runs without autograd, under which clones would not be leaves, and with no mode active but ``fake``."""
    with _disable_current_modes(), fake, torch.no_grad():
        clone = copy.deepcopy(module)
    for source, target in zip(module.parameters(), clone.parameters(), strict=True):
        target.requires_grad_(source.requires_grad)
    return clone
