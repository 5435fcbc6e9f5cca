"""Make autograd take the same path for fake tensors as for plain ones.

The derivative formulas of ``prod`` and ``cumprod`` check for zeros and have a short path if there are none.
For tensors whose values cannot be read they take the long path (torch/csrc/autograd/FunctionsManual.cpp).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor

from memfit.model.grouped_mm import grouped_products


@contextlib.contextmanager
def patch_formulas() -> Iterator[None]:
    """Inside this context, replace ``prod`` and ``cumprod`` by versions whose derivatives are computed as for
    tensors without zeros. These act on fake tensors with dimensions that require a gradient, outside autocast
    and without a result dtype; other calls run torch's own. Fake grouped matrix products may have any dtype.
    When the context ends, ``torch.nn.functional.linear`` is again the function that it was at the beginning,
    even if code in the context replaced it."""
    with contextlib.ExitStack() as stack:
        for home in (torch, torch.Tensor):
            for name, function in (("prod", _Product), ("cumprod", _Cumulated)):
                patched = _given_to(function, getattr(home, name))
                stack.enter_context(mock.patch.object(home, name, patched))
        stack.enter_context(grouped_products())
        # ZeRO replaces this function inside a module, and would leave its own in place if a traced step fails
        # there.
        stack.enter_context(mock.patch.object(torch.nn.functional, "linear", torch.nn.functional.linear))
        yield


def _given_to(function: Any, inner: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        tensor: Any = args[0] if args else None
        needs_grad = type(tensor) is FakeTensor and tensor.requires_grad and torch.is_grad_enabled()
        has_known_options = kwargs.keys() <= {"dim", "keepdim"}
        if not needs_grad or not has_known_options or tensor.dim() == 0 or torch.is_autocast_enabled("cpu"):
            return inner(*args, **kwargs)
        arguments = [*args[1:], *(kwargs[name] for name in ("dim", "keepdim") if name in kwargs)]
        return function.apply(tensor, inner, *arguments)

    return called


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, inner: Any, dim: int | None = None, keep: bool = False
    ) -> torch.Tensor:
        out: torch.Tensor = inner(tensor) if dim is None else inner(tensor, dim, keep)
        ctx.save_for_backward(tensor, out)
        ctx.dim = (dim, keep)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (tensor, out), (dim, keep), grad = ctx.saved_tensors, ctx.dim, grads[0]
        if dim is not None and not keep:
            grad, out = grad.unsqueeze(dim), out.unsqueeze(dim)
        zeros = tensor == 0
        if dim is not None:
            zeros.sum(dim, keepdim=True).sum()
        else:
            del zeros
        return grad * (out / tensor).conj(), None, None, None


class _Cumulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, inner: Any, dim: int) -> torch.Tensor:
        out: torch.Tensor = inner(tensor, dim)
        ctx.save_for_backward(tensor, out)
        ctx.dim = dim
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (tensor, out), dim = ctx.saved_tensors, ctx.dim
        if tensor.shape[dim] == 1:
            return grads[0], None, None
        product = out.conj() * grads[0]
        zeros = tensor == 0
        zeros.any()
        reverse = product.flip(dim)
        sums = reverse.cumsum(dim)
        result = sums.flip(dim)
        del reverse, sums  # freed together, as at the end of a C++ expression
        return result.div(tensor.conj()), None, None
