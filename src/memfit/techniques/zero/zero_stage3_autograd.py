"""Autograd hooks of ZeRO stage 3: they report when backward passes a module, and linear layers save no view
of a weight, which would keep the whole of it (deepspeed/runtime/zero/linear.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.utils import _pytree


def watch_reads(module: torch.nn.Module, read: Callable[[Any], None]) -> Callable[[], None]:
    """From now on, call ``read`` with a parameter whenever code reads it as an attribute of ``module``.
    Parameters of submodules are not watched. Return a function that stops the calls."""
    original = module._parameters
    module._parameters = _Parameters(original, read)

    def end() -> None:
        module._parameters = original

    return end


class _Parameters(dict[str, Any]):
    def __init__(self, parameters: Any, read: Callable[[Any], None]) -> None:
        super().__init__(parameters)
        self.read = read

    def __getitem__(self, name: str) -> Any:
        param = super().__getitem__(name)
        if param is not None:
            self.read(param)
        return param


_PLAIN = functional.linear


class LinearPatch:
    """Replaces torch.nn.functional.linear while a module given to `during` runs, also when backward
    recomputes the module. The replacement, `_linear`, saves the weight itself for backward and not a view of
    it, which would keep the whole gathered weight in memory."""

    def __init__(self) -> None:
        self.depth = 0

    def during(self, module: torch.nn.Module) -> list[Callable[[], None]]:
        """From now on, replace torch.nn.functional.linear whenever ``module`` runs. Return functions to call
        to end this. The last of them puts torch's own function back."""
        enter = module.register_forward_pre_hook(lambda *_: self._turn(1))
        leave = module.register_forward_hook(lambda *_: self._turn(-1), always_call=True)
        return [enter.remove, leave.remove, self._end]

    def _end(self) -> None:
        """Put torch's own linear function back, even if a step failed inside a module, whose end was then not
        reported."""
        self.depth = 0
        functional.linear = _PLAIN

    def _turn(self, by: int) -> None:
        self.depth += by
        functional.linear = _linear if self.depth else _PLAIN  # type: ignore[assignment]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        if x.dim() == 2 and bias is not None:
            return torch.addmm(bias, x, weight.t())
        out = x.matmul(weight.t())
        if bias is not None:
            out += bias
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        return (
            grad.matmul(weight) if to_x else None,
            flat.t().matmul(x.reshape(-1, x.shape[-1])) if to_weight else None,
            flat.sum(0) if to_bias and bias is not None else None,
        )


def call_on_gradient(values: Any, call: Callable[[], None], *, once: bool = False) -> Any:
    """Return the same structure of values, in which each tensor that requires a gradient is replaced by an
    alias. In backward, ``call`` is called for each alias, when its gradient is ready. With ``once``, it is
    called once, when the gradients of all aliases are ready, and so never if one of them gets none. If no
    tensor requires a gradient or gradients are disabled, return ``values`` itself, and ``call`` is never
    called."""
    leaves, shape = _pytree.tree_flatten(values)
    places = [i for i, v in enumerate(leaves) if isinstance(v, torch.Tensor) and v.requires_grad]
    if not places or not torch.is_grad_enabled():
        return values
    waiting = len(places) if once else 1

    def report_use() -> None:
        nonlocal waiting
        waiting -= once
        if not once or waiting == 0:
            call()

    for i in places:
        leaves[i] = _GradientCall.apply(report_use, leaves[i])  # type: ignore[no-untyped-call]
    return _pytree.tree_unflatten(leaves, shape)


class _GradientCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], tensor: torch.Tensor) -> torch.Tensor:
        ctx.call = call
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.call()
        return None, grad
