"""A 4-bit Linear. This module imports torch, so it is loaded when QLoRA is applied."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes


class Nf4Linear(torch.nn.Module):
    """A frozen Linear whose weight is stored in 4-bit NormalFloat with one float32 scale per 64 weights.

    The weight is dequantised for each product, in forward and again in backward. The bias is kept as it is.
    With ``double``, the scales are stored in 8 bits, with one float32 per 256 of them (Dettmers et al. 2023).
    This uses the kernels of bitsandbytes but not its Linear4bit, whose class of parameters does not work on
    fake tensors.
    """

    absmax: torch.Tensor | None
    packed: torch.Tensor

    def __init__(self, linear: torch.nn.Linear, *, double: bool = False) -> None:
        import bitsandbytes as bnb

        super().__init__()
        packed, self.state = bnb.functional.quantize_4bit(linear.weight.detach(), quant_type="nf4")
        self.scales: Any = None
        if double:
            with _disable_current_modes():  # a table of 256 real numbers
                code = bnb.functional.create_dynamic_map()
            self.scales = bnb.functional.quantize_blockwise(self.state.absmax, code=code, blocksize=256)
            self.state.absmax = None
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", self.state.absmax, persistent=False)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def _apply(self, fn: Any, recurse: bool = True) -> Nf4Linear:
        """Apply ``fn`` to the parameters and buffers, as ``Module.to`` does. The scales and the table of the
        4-bit format are only moved to the device of the weight, and keep their dtype."""
        absmax: torch.Tensor | None = self.absmax
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.packed.device
        self.absmax = None if absmax is None else absmax.to(device)
        self.state.absmax, self.state.code = self.absmax, self.state.code.to(device)
        if self.scales is not None:
            self.scales[1].to(device)
            self.scales = (self.scales[0].to(device), self.scales[1])
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, of shape (..., out_features), for ``x`` of shape (..., in_features).
        Under autocast, ``x`` is first cast to autocast's dtype."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out: torch.Tensor = _Nf4Product.apply(x, self.packed, self.state, self.scales)  # type: ignore[no-untyped-call]
        bias: torch.Tensor | None = self.bias
        return out if bias is None else out + bias.to(out.dtype)


class _Nf4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, state: Any, scales: Any) -> torch.Tensor:
        ctx.packed, ctx.state, ctx.scales = packed, state, scales
        return torch.nn.functional.linear(x, _widen(packed, state, scales, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        wide = _widen(ctx.packed, ctx.state, ctx.scales, grads[0].dtype)
        return grads[0] @ wide, None, None, None


def _widen(packed: torch.Tensor, state: Any, scales: Any, dtype: torch.dtype) -> torch.Tensor:
    import bitsandbytes as bnb

    if scales is None:
        return bnb.functional.dequantize_4bit(packed, state).to(dtype)  # type: ignore[no-any-return]
    absmax = bnb.functional.dequantize_blockwise(*scales)
    quant_state = bnb.functional.QuantState(
        absmax,
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type="nf4",
        dtype=state.dtype,
    )
    return bnb.functional.dequantize_4bit(packed, quant_state).to(dtype)  # type: ignore[no-any-return]
