"""A 4-bit Linear. This module imports torch, so it is loaded when QLoRA is applied."""

from __future__ import annotations

from typing import Any

import torch


class Nf4Linear(torch.nn.Module):
    """A frozen Linear whose weight is stored in 4-bit NormalFloat with one float32 scale per 64 weights.

    The weight is dequantised for each product, in forward and again in backward. The bias is kept as it is.
    This uses the kernels of bitsandbytes but not its layer, because its parameter class does not work on fake
    tensors.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        import bitsandbytes as bnb

        super().__init__()
        packed, self.state = bnb.functional.quantize_4bit(linear.weight.detach(), quant_type="nf4")
        self.register_buffer("packed", packed)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, of shape (..., out_features), for ``x`` of shape (..., in_features).
        Under autocast, ``x`` is first cast to autocast's dtype."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out: torch.Tensor = _Nf4Product.apply(x, self.packed, self.state)  # type: ignore[no-untyped-call]
        bias: torch.Tensor | None = self.bias
        return out if bias is None else out + bias.to(out.dtype)


class _Nf4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, state: Any) -> torch.Tensor:
        ctx.packed, ctx.state = packed, state
        return torch.nn.functional.linear(x, _widen(packed, state, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] @ _widen(ctx.packed, ctx.state, grads[0].dtype), None, None


def _widen(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(packed, state).to(dtype)  # type: ignore[no-any-return]
