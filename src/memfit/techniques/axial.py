"""Operations on tensors that are cut along one dimension across ranks, for stacks with a row and a pair
representation.

Between `Whole.own` and `Whole.whole`, a rank holds its part of a tensor along one dimension. All parts are as
long as the first; the last ones are padded with zeros if the length does not divide. In backward, gradients
are multiplied by the number of ranks at `whole` and divided by it at `own`. The gradient of a parameter is
therefore the mean over ranks both inside, where each rank sees its share, and outside, where all ranks see
the same. Gathered tensors are not saved for backward but gathered again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from memfit.techniques.parallel.sample_parallel_collectives import GroupCollectives


class Whole:
    """Operations for a single rank, which holds every tensor whole: `product` is a plain einsum, `size`
    returns ``length``, and all others return ``x``. The docstrings of the methods say what those of `Cut`,
    the version for several ranks, do.

    ``dim`` is the dimension along which ``x`` is cut or will be cut, ``length`` its length when whole. All
    ranks' parts have the same length, `size`; parts at the end are padded with zeros if ``length`` does not
    divide.
    """

    cuts = False

    def size(self, length: int) -> int:
        """Return the length, padding included, of each rank's part of a dimension of ``length``: ``length``
        divided by the number of ranks, rounded up."""
        return length

    def own(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's part, along ``dim``, of ``x``, which is whole and equal on every rank. In
        backward, the gradients of all ranks' parts are joined and divided by the number of ranks."""
        return x

    def whole(self, x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
        """Return the parts ``x`` of all ranks joined along ``dim``, without padding, for a computation that
        is then the same on every rank. In backward, a rank takes its part of its own gradient, times the
        number of ranks."""
        return x

    def gathered(self, x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
        """Return the parts ``x`` of all ranks joined along ``dim``, without padding, for a computation that
        each rank does for its own part of another tensor. In backward, the gradients are summed over ranks,
        and a rank gets its part of the sum."""
        return x

    def turned(self, x: torch.Tensor, dim: int, to: int, length: int) -> torch.Tensor:
        """Return the tensor ``x``, which is cut along ``dim`` and whole along ``to``, as whole along ``dim``,
        with ``length`` elements there, and cut along ``to``. In backward, the gradient is turned back."""
        return x

    def summed(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's part, along ``dim``, of the sum over ranks of ``x``, which is whole along
        ``dim`` and differs between ranks. In backward, the gradients of all parts are joined."""
        return x

    def product(
        self, sums: str, left: torch.Tensor, right: torch.Tensor, dim: int, length: int
    ) -> torch.Tensor:
        """Return the einsum ``sums`` of this rank's ``left`` and the parts ``right`` of all ranks, joined
        along dimension ``dim`` of ``right``, which then has ``length`` elements. The index of that dimension
        must be in the result and not in ``left``. In backward, the gradient of the joined ``right`` is summed
        over ranks, and a rank gets its part of the sum."""
        return torch.einsum(sums, left, right)


class Axial(nn.Module):
    """A module whose inputs may be cut across ranks. It calls the operations of ``across``, those of a single
    rank by default. The technique axial-parallel sets ``across`` to a `Cut`."""

    across: Whole = Whole()


class Cut(Whole):
    """The operations of `Whole` for several ranks, each of which holds a part of ``x``. ``together`` has the
    collectives of these ranks."""

    cuts = True

    def __init__(self, together: GroupCollectives) -> None:
        self.together = together

    def size(self, length: int) -> int:
        return -(-length // self.together.ranks)

    def own(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        if not x.requires_grad:
            return self.part(x, dim)
        return _RankPart.apply(x, self, dim)  # type: ignore[no-untyped-call, no-any-return]

    def whole(self, x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
        return _All.apply(x, self, dim, length)  # type: ignore[no-untyped-call, no-any-return]

    def gathered(self, x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
        return _Gathered.apply(x, self, dim, length)  # type: ignore[no-untyped-call, no-any-return]

    def turned(self, x: torch.Tensor, dim: int, to: int, length: int) -> torch.Tensor:
        return _Turned.apply(x, self, dim, to, length)  # type: ignore[no-untyped-call, no-any-return]

    def summed(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return _Summed.apply(x, self, dim)  # type: ignore[no-untyped-call, no-any-return]

    def product(
        self, sums: str, left: torch.Tensor, right: torch.Tensor, dim: int, length: int
    ) -> torch.Tensor:
        if torch.is_autocast_enabled(kind := left.device.type):
            left, right = (x.to(torch.get_autocast_dtype(kind)) for x in (left, right))
        return _Product.apply(left, right, self, sums, dim, length)  # type: ignore[no-untyped-call, no-any-return]

    # -- without gradients ------------------------------------------------------------------------------

    def part(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        length, size = x.shape[dim], self.size(x.shape[dim])
        begin = min(self.together.rank * size, length)
        own_part = x.narrow(dim, begin, min(size, length - begin))
        return _pad(own_part, dim, size)

    def all(self, x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
        return _join(self.together.stack(x), dim, length)

    def turn(self, x: torch.Tensor, dim: int, to: int, length: int) -> torch.Tensor:
        return _join(self.together.exchange(self.apart(x, to)), dim, length)

    def scattered(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return self.together.scatter_sum(self.apart(x, dim)).squeeze(0)

    def apart(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Return ``x``, padded with zeros, cut along ``dim`` into one part for each rank. The parts are
        stacked along a new first dimension, shape (ranks, ...)."""
        size, ranks = self.size(x.shape[dim]), self.together.ranks
        parts: torch.Tensor = _pad(x, dim, size * ranks).unflatten(dim, (ranks, size))
        return parts.movedim(dim, 0).contiguous()


def _pad(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Return ``x`` padded with zeros at the end of ``dim`` to the length ``size``, or ``x`` itself if it has
    this length."""
    missing = size - x.shape[dim]
    return functional.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing)) if missing else x


def _join(parts: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """Return the parts, which are stacked to shape (ranks, ...), joined along dimension ``dim`` of one part.
    The result has ``length`` elements there: padding at the end of the parts is left out. It is not a view,
    because a module that FSDP2 wraps must not return a view."""
    ranks, shape = parts.shape[0], list(parts.shape[1:])
    size = shape[dim]
    if size * ranks == length and math.prod(shape[:dim]) == 1:
        shape[dim] = length
        return torch.ops.aten._unsafe_view(parts, shape)  # type: ignore[no-any-return]
    padded_parts = zip(parts.unbind(), _lengths(length, size, ranks), strict=True)
    return torch.cat([part.narrow(dim, 0, part_length) for part, part_length in padded_parts], dim)


class _RankPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cut: Cut, dim: int) -> torch.Tensor:
        ctx.cut, ctx.dim, ctx.length = cut, dim, x.shape[dim]
        return cut.part(x, dim).clone()  # a view would keep the whole tensor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        whole_grad = ctx.cut.all(grad, ctx.dim, ctx.length)
        return whole_grad.div_(ctx.cut.together.ranks), None, None


class _All(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cut: Cut, dim: int, length: int) -> torch.Tensor:
        ctx.cut, ctx.dim = cut, dim
        return cut.all(x, dim, length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.cut.part(grad, ctx.dim) * ctx.cut.together.ranks, None, None, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cut: Cut, dim: int, length: int) -> torch.Tensor:
        ctx.cut, ctx.dim = cut, dim
        return cut.all(x, dim, length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.cut.scattered(grad, ctx.dim), None, None, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cut: Cut, dim: int) -> torch.Tensor:
        ctx.cut, ctx.dim, ctx.length = cut, dim, x.shape[dim]
        return cut.scattered(x, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.cut.all(grad, ctx.dim, ctx.length), None, None


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cut: Cut, dim: int, to: int, length: int) -> torch.Tensor:
        ctx.cut, ctx.dim, ctx.to, ctx.length = cut, dim, to, x.shape[to]
        return cut.turn(x, dim, to, length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.cut.turn(grad, ctx.to, ctx.dim, ctx.length), None, None, None, None


class _Product(torch.autograd.Function):
    """The autograd function of `Cut.product`. It multiplies with the part of one rank after the other, so
    that einsum's temporaries are only as large as for one part. Backward gathers the parts again."""

    @staticmethod
    def forward(
        ctx: Any, left: torch.Tensor, right: torch.Tensor, cut: Cut, sums: str, dim: int, length: int
    ) -> torch.Tensor:
        ctx.save_for_backward(left, right)
        ctx.cut, ctx.sums, ctx.dim, ctx.length = cut, sums, dim, length
        parts, out = cut.together.gather(right), list[torch.Tensor]()
        for part, size in zip(parts, _lengths(length, right.shape[dim], len(parts)), strict=True):
            out.append(torch.einsum(sums, left, part.narrow(dim, 0, size)))
        return torch.cat(out, _place(sums, dim))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        left, right = ctx.saved_tensors
        cut, dim, out_dim = ctx.cut, ctx.dim, _place(ctx.sums, ctx.dim)
        (left_dims, right_dims), out_dims = ctx.sums.split("->")[0].split(","), ctx.sums.split("->")[1]
        parts = cut.together.gather(right)
        grads = right.new_zeros(len(parts), *right.shape)
        grad_left, begin = torch.zeros_like(left), 0
        for index, size in enumerate(_lengths(ctx.length, right.shape[dim], len(parts))):
            grad_part, part = grad.narrow(out_dim, begin, size), parts[index].narrow(dim, 0, size)
            grad_left += torch.einsum(f"{out_dims},{right_dims}->{left_dims}", grad_part, part)
            grads[index].narrow(dim, 0, size).copy_(
                torch.einsum(f"{out_dims},{left_dims}->{right_dims}", grad_part, left)
            )
            begin += size
        del parts
        return grad_left, cut.together.scatter_sum(grads).squeeze(0), None, None, None, None


def _place(sums: str, dim: int) -> int:
    """Return which dimension of the result of the einsum ``sums`` is dimension ``dim`` of its second operand:
    1 for ("ab,cb->ac", 0). Raises ValueError if the result does not have it."""
    operands, result = sums.split("->")
    return result.index(operands.split(",")[1][dim])


def _lengths(length: int, size: int, ranks: int) -> list[int]:
    return [max(0, min(size, length - rank * size)) for rank in range(ranks)]
