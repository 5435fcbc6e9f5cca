"""What Megatron's and Transformer Engine's layers keep for backward and make in passing, one call at a time.

Read from megatron/core/tensor_parallel and transformer_engine/pytorch (layernorm_linear.py, attention).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What one rank works on. ``length``: of a sequence here, before sequence parallelism splits it.
    ``float8``: linear layers keep their inputs in one byte. ``recompute``: attention's insides run again in
    backward. ``plain``: without Megatron's own layers, where autograd keeps what it is given: inputs that
    were gathered, and both factors of a gated product."""

    length: int
    batch: int
    tensor: int
    sequence_parallel: bool
    context: int
    experts_here: int
    flash: bool
    dtype: torch.dtype
    float8: bool = False
    recompute: bool = False
    plain: bool = False

    @property
    def rows(self) -> int:
        """Rows of the tensors between tensor-parallel parts."""
        whole = self.length * self.batch
        return whole // self.tensor if self.sequence_parallel else whole

    @property
    def whole_rows(self) -> int:
        return self.length * self.batch


class Weight(nn.Module):
    """A weight, and the one scrap tensor of its shape that stands for its gradient (TE's get_dummy_wgrad)."""

    def __init__(self, outputs: int, inputs: int, *, norm: bool = False, scraps: dict[Any, Any]) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(outputs, inputs))
        self.norm, self.scraps = norm, scraps

    def scrap(self) -> None:
        key = tuple(self.weight.shape)
        if key not in self.scraps:
            self.scraps[key] = torch.empty_like(self.weight)  # type: ignore[arg-type]


class LinearCall(torch.autograd.Function):
    """(Normalise,) gather along the sequence, multiply; backward gathers again for the weight's gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: Weight, shape: Shape, gather: bool, scatter: bool
    ) -> torch.Tensor:
        ctx.layer, ctx.shape, ctx.gather, ctx.scatter = layer, shape, gather, scatter
        ctx.like = x.new_empty(0)
        kept = torch.uint8 if shape.float8 else x.dtype
        given = torch.empty_like(x, dtype=kept) if layer.norm or shape.float8 else x
        statistics = x.new_empty(x.shape[0], dtype=torch.float32) if layer.norm else None
        total = given.new_empty(shape.whole_rows, x.shape[1]) if gather else given
        kept_input = total if shape.plain else given
        ctx.save_for_backward(x if layer.norm else None, kept_input, statistics)
        ctx.given = given.shape
        out = product(total, layer.weight.t(), x.dtype)
        del total
        return out.new_empty(shape.rows, out.shape[1]) if scatter else out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        _, given, _ = ctx.saved_tensors
        layer, shape = ctx.layer, ctx.shape
        grad = grads[0].new_empty(shape.whole_rows, grads[0].shape[1]) if ctx.scatter else grads[0]
        if shape.float8:
            grad = torch.empty_like(grad, dtype=torch.uint8)
        again = ctx.gather and not shape.plain
        total = given.new_empty(shape.whole_rows, given.shape[1]) if again else given
        out = product(grad, layer.weight, ctx.like.dtype)
        layer.scrap()
        del total
        if ctx.gather:
            out = ctx.like.new_empty(ctx.given)
        return (torch.empty_like(out) if layer.norm else out), None, None, None, None


def product(x: torch.Tensor, weight: Any, dtype: torch.dtype) -> torch.Tensor:
    return x @ weight if x.dtype == dtype else x.new_empty(x.shape[0], weight.shape[1], dtype=dtype)


class AttentionCall(torch.autograd.Function):
    """Fused attention: query, key, value, output and one float32 per head and row are kept. ``apart``: the
    output is exchanged between context-parallel ranks, and kept from before as well. ``again``: it runs a
    second time in backward, and what it gives is not kept here."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        width: int,
        apart: bool,
        again: bool,
    ) -> torch.Tensor:
        out = q.new_empty(q.shape[0], width)
        statistics = q.new_empty(q.shape[0], heads, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, *(() if again else (out, statistics)))
        return torch.empty_like(out) if apart else out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, *kept = ctx.saved_tensors
        out = None if kept else torch.empty_like(grads[0])
        found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del out
        return *found, None, None, None, None


class SplitCall(torch.autograd.Function):
    """Rotated query and key and a contiguous value, all new; the fused projection is let go of."""

    @staticmethod
    def forward(ctx: Any, mixed: torch.Tensor, *widths: int) -> Any:
        ctx.width = mixed.shape[1]
        return tuple(mixed.new_empty(mixed.shape[0], w) for w in widths)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return (grads[0].new_empty(grads[0].shape[0], ctx.width), *[None] * len(grads))


class SwigluCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wide: torch.Tensor, plain: bool) -> torch.Tensor:
        half = wide.shape[0], wide.shape[1] // 2
        ctx.save_for_backward(wide, *([wide.new_empty(half)] if plain else []))
        return wide.new_empty(half)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return torch.empty_like(ctx.saved_tensors[0]), None


class GeluCall(SwigluCall):
    @staticmethod
    def forward(ctx: Any, wide: torch.Tensor, plain: bool) -> torch.Tensor:
        ctx.save_for_backward(wide)
        return torch.empty_like(wide)


class VocabularyCall(torch.autograd.Function):
    """Head and cross-entropy over this rank's part of the vocabulary. ``fused``: TE's kernel writes the
    gradient over the logits; otherwise a float32 copy becomes softmax and gradient in place."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, layer: Weight, shape: Shape, fused: bool) -> torch.Tensor:
        ctx.layer, ctx.shape = layer, shape
        gather = shape.sequence_parallel and shape.tensor > 1
        total = hidden.new_empty(shape.whole_rows, hidden.shape[1]) if gather else hidden
        logits = total @ layer.weight.t()
        kept = logits if fused else logits.float()
        ctx.kept = kept
        ctx.save_for_backward(hidden)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (hidden,) = ctx.saved_tensors
        shape, layer = ctx.shape, ctx.layer
        grad = ctx.kept.to(hidden.dtype)
        ctx.kept = None
        out = grad @ layer.weight
        wasted = torch.empty_like(layer.weight)  # Megatron's own linear makes this one each time
        if shape.sequence_parallel and shape.tensor > 1:
            out = torch.empty_like(hidden)
        del wasted
        return out, None, None, None


class EmbedCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, layer: Weight, shape: Shape) -> torch.Tensor:
        ctx.layer = layer
        whole = layer.weight.new_empty(shape.whole_rows, layer.weight.shape[1])
        return whole.new_empty(shape.rows, whole.shape[1]) if shape.rows != shape.whole_rows else whole

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        dense = torch.empty_like(ctx.layer.weight)  # then added to the float32 buffer
        del dense
        return grads[0].new_empty(1), None, None


class SentCall(torch.autograd.Function):
    """A stage's output goes to the next stage and is let go of; its gradient arrives in a new buffer."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor) -> torch.Tensor:
        ctx.shape, ctx.dtype = out.shape, out.dtype
        return out.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0].new_empty(ctx.shape, dtype=ctx.dtype)


class ReceivedCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, shape: Shape, width: int) -> torch.Tensor:
        return anchor.new_empty(shape.rows, width, dtype=shape.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0].new_empty(1, dtype=torch.float32), None, None


class ExpertsCall(torch.autograd.Function):
    """Tokens permuted and exchanged, grouped products of the local experts, and back: what the all-to-all
    dispatcher with fused permutation and TE's grouped linear keep."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, up: Weight, down: Weight, routed: int) -> torch.Tensor:
        ctx.up, ctx.down = up, down
        permuted = x.new_empty(routed, x.shape[1])
        arrived = torch.empty_like(permuted)
        del permuted
        wide = x.new_empty(routed, up.weight.shape[0])
        act = x.new_empty(routed, down.weight.shape[1])
        out = torch.empty_like(arrived)
        ctx.save_for_backward(arrived, wide, act, out)
        back = torch.empty_like(out)
        result = torch.empty_like(x)
        del back
        ctx.rows = x.shape
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        arrived, wide, act, out = ctx.saved_tensors
        grad = torch.empty_like(out)
        there = torch.empty_like(grad)
        del grad
        inner = torch.empty_like(act)
        ctx.down.scrap()
        del there
        outer = torch.empty_like(wide)
        del inner
        home = torch.empty_like(arrived)
        ctx.up.scrap()
        del outer, home
        return grads[0].new_empty(ctx.rows), None, None, None


class NormedCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[0], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return torch.empty_like(ctx.saved_tensors[0])
