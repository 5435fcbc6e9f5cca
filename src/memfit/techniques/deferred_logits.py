"""Deferred logits and their chunked cross-entropy. This module imports torch, so it is loaded when the
technique chunked-cross-entropy is applied."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from memfit.types.errors import UserError

_RESHAPES = ("view", "reshape", "flatten", "contiguous", "float", "to", "type_as")


class LazyLogits:
    """Stands for the logits ``linear(hidden, head)``, of shape ``(..., vocabulary)``, until their values are
    needed. They are computed under the autocast of the head's call and then cast to ``cast`` if that is set.
    ``autocast`` is the dtype of that autocast, or None. It is the one of ``like``, other deferred logits of
    the same call of the head, or by default the current one.

    It is not a tensor subclass. Its shape, dtype and device are known without computing. Reshapes, indexing
    and casts that leave the last dimension, the vocabulary, whole return deferred logits again. A
    cross-entropy of two-dimensional logits with class indices, a mean or sum without other options than
    ``ignore_index``, is computed for at most ``chunks`` parts of the rows, one after the other. Every other
    use computes the real logits. Once computed they are kept, so that changes in place persist, and every
    later use is of them.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        head: torch.nn.Linear,
        chunks: int,
        *,
        cast: torch.dtype | None = None,
        like: LazyLogits | None = None,
    ) -> None:
        self.hidden, self.head, self.chunks, self.cast = hidden, head, chunks, cast
        kind = hidden.device.type
        current = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.autocast: torch.dtype | None = like.autocast if like is not None else current
        self.shape = torch.Size((*hidden.shape[:-1], head.out_features))
        self.dtype, self.device, self.requires_grad = cast or hidden.dtype, hidden.device, True
        self.real_logits: torch.Tensor | None = None

    def with_hidden(self, hidden: torch.Tensor) -> LazyLogits:
        """Return deferred logits of other hidden states with the same head, chunks, cast and autocast."""
        return LazyLogits(hidden, self.head, self.chunks, cast=self.cast, like=self)

    def make(self) -> torch.Tensor:
        """Return the real logits. The first call computes them, and later calls return the same tensor.
        Raises UserError as `weight` does."""
        if self.real_logits is None:
            kind = self.hidden.device.type
            with torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None):
                logits = functional.linear(self.hidden, self.weight, self.head.bias)
            self.real_logits = logits if self.cast is None else logits.to(self.cast)
        return self.real_logits

    @property
    def weight(self) -> torch.Tensor:
        """The head's weight. Raises UserError if fsdp2 or zero of stage 3 has freed the gathered weight
        before the loss uses it."""
        if hasattr(self.head.weight, "device_mesh"):
            raise UserError(
                "chunked-cross-entropy: fsdp2 has freed the head's weight before the loss uses it",
                hint='use fsdp2 with reshard=False or reshard="not-last", or leave out chunked-cross-entropy',
            )
        if not self.head.weight.numel():
            raise UserError(
                "chunked-cross-entropy: zero of stage 3 has freed the head's weight before the loss uses it",
                hint="use zero with stage=0, 1 or 2, or leave out chunked-cross-entropy",
            )
        return self.head.weight

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Any) -> Any:
        return self._moved("__getitem__", (index,), {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _RESHAPES:
            return lambda *args, **kwargs: self._moved(name, args, kwargs)
        return getattr(self.make(), name)

    def _moved(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        lazy = _reshape(self, name, args, kwargs) if self.real_logits is None else None
        return lazy if lazy is not None else getattr(self.make(), name)(*args, **kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        logits = args[0] if args else kwargs.get("input")
        if (
            func is functional.cross_entropy
            and isinstance(logits, LazyLogits)
            and _plain(logits, args, kwargs)
        ):
            options = {k: v for k, v in kwargs.items() if k not in ("input", *_NO_EFFECT)}
            return _cross_entropy(logits, *args[1:], **options)
        return func(*_materialize(args), **_materialize(kwargs))


def _on_real_logits(name: str) -> Any:
    def act(self: LazyLogits, *args: Any) -> Any:
        return getattr(self.make(), name)(*_materialize(args))

    return act


# Python looks up operators on the class and not through __getattr__.
_OPERATORS = """
add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv floordiv rfloordiv ifloordiv mod rmod imod
pow rpow ipow matmul rmatmul neg pos abs eq ne lt le gt ge contains bool setitem len
"""
for _name in _OPERATORS.split():
    setattr(LazyLogits, f"__{_name}__", _on_real_logits(f"__{_name}__"))


_NO_EFFECT = {"weight": None, "size_average": None, "reduce": None, "label_smoothing": 0.0}


def _plain(lazy: LazyLogits, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call of cross_entropy with these arguments can be computed in chunks, provided that
    its reduction, which is not looked at, is not "none". The logits must have two dimensions and not be
    computed yet; with more dimensions, the classes would be along the second one. The target must hold class
    indices. All options must be keyword arguments, and those other than ignore_index and reduction must have
    values of no effect, such as weight=None."""
    target = args[1] if len(args) > 1 else kwargs.get("target")
    has_rows = (
        lazy.real_logits is None and lazy.dim() == 2 and target is not None and not target.is_floating_point()
    )
    allowed_names = {"input", "target", "ignore_index", "reduction"}
    return (
        has_rows
        and len(args) <= 2
        and all(k in allowed_names or (k in _NO_EFFECT and v == _NO_EFFECT[k]) for k, v in kwargs.items())
    )


def _materialize(value: Any) -> Any:
    if isinstance(value, LazyLogits):
        return value.make()
    if isinstance(value, tuple | list):
        return type(value)(_materialize(v) for v in value)
    if isinstance(value, dict):
        return {k: _materialize(v) for k, v in value.items()}
    return value


def _reshape(lazy: LazyLogits, name: str, args: tuple[Any, ...], kwargs: Any) -> LazyLogits | None:
    """Return the deferred logits that the method ``name`` (a reshape, a cast, "contiguous" or "__getitem__")
    makes with these arguments, or None if it would or might change the last dimension, the vocabulary."""
    hidden, vocabulary = lazy.hidden, lazy.head.out_features
    if name in ("float", "to", "type_as", "contiguous"):
        return _cast(lazy, name, args, kwargs)
    if name == "__getitem__":
        index = args[0] if isinstance(args[0], tuple) else (args[0],)
        return lazy.with_hidden(hidden[index]) if _keeps_last(index, hidden.dim()) else None
    shape = args[0] if args and isinstance(args[0], tuple | list | torch.Size) else args
    if name == "flatten":
        start, end = (*args, *(kwargs.get(k, d) for k, d in (("start_dim", 0), ("end_dim", -1))[len(args) :]))
        flattens_last = end % hidden.dim() == hidden.dim() - 1
        return None if flattens_last else lazy.with_hidden(hidden.flatten(start, end))
    if not shape or shape[-1] not in (vocabulary, -1):
        return None
    rows = hidden.numel() // hidden.shape[-1]
    if shape[-1] == -1 and math.prod(map(int, shape[:-1])) != rows:
        return None
    return lazy.with_hidden(hidden.reshape(*shape[:-1], hidden.shape[-1]))


def _cast(lazy: LazyLogits, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LazyLogits:
    """Return deferred logits whose real logits will have the dtype that the method ``name`` is given
    ("float": float32; "type_as": that of its argument), or ``lazy`` itself if it is given no dtype. Other
    arguments of "to", such as a device or a tensor, have no effect. The cross-entropy of each chunk is
    computed in float32 in any case."""
    dtypes_by_method = {
        "float": (torch.float32,),
        "type_as": (getattr(args[0], "dtype", None) if args else None,),
    }
    dtypes = [d for d in dtypes_by_method.get(name, (*args, *kwargs.values())) if isinstance(d, torch.dtype)]
    if not dtypes:
        return lazy
    return LazyLogits(lazy.hidden, lazy.head, lazy.chunks, cast=dtypes[0], like=lazy)


def _keeps_last(index: tuple[Any, ...], dims: int) -> bool:
    """Return whether this index of logits with ``dims`` dimensions surely leaves the vocabulary dimension
    whole and last. Return False for every index that contains None."""
    if not index:
        return True
    if any(i is None for i in index):
        return False
    keeps_vocabulary = isinstance(index[-1], slice) and index[-1] == slice(None)
    if any(i is Ellipsis for i in index):
        return keeps_vocabulary
    masks = [i for i in index if isinstance(i, torch.Tensor) and i.dtype == torch.bool]
    covered_dims = len(index) + sum(m.dim() - 1 for m in masks)
    return covered_dims < dims or (keeps_vocabulary and covered_dims == dims)


def _cross_entropy(
    lazy: LazyLogits, target: torch.Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> torch.Tensor:
    if reduction not in ("mean", "sum"):
        return functional.cross_entropy(lazy.make(), target, ignore_index=ignore_index, reduction=reduction)
    hidden = lazy.hidden.reshape(-1, lazy.hidden.shape[-1])
    weight, bias = lazy.weight, lazy.head.bias
    if lazy.autocast is not None:
        hidden, weight = hidden.to(lazy.autocast), weight.to(lazy.autocast)
    return _ChunkedCrossEntropy.apply(  # type: ignore[no-any-return,no-untyped-call]
        hidden, weight, bias, target.reshape(-1), lazy.chunks, ignore_index, reduction
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of the logits ``hidden @ weight.T + bias``, computed for at most ``chunks`` parts of the
    rows. Shapes are (rows, width) of hidden, (vocabulary, width) of weight, (vocabulary,) of bias, which may
    be None, and (rows,) of target. The result is a float32 scalar: the mean, if ``reduction`` is "mean", or
    the sum over the rows whose target is not ``ignore``; 0 if there are no such rows. Forward also computes
    the gradients, which backward only scales."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, bias: Any, target: Any, chunks: int, ignore: int, reduction: str
    ) -> torch.Tensor:
        terms = (target != ignore).sum().clamp(min=1) if reduction == "mean" else None
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None
        total = hidden.new_zeros((), dtype=torch.float32)
        rows = max(1, -(-hidden.shape[0] // chunks))
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            loss, slope = _loss_and_slope(functional.linear(hidden[part], weight, bias), target[part], ignore)
            total += loss
            torch.mm(slope.to(weight.dtype), weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += slope.to(hidden.dtype).t() @ hidden[part]
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            del slope
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, terms)
        ctx.dtypes = (weight.dtype, bias.dtype if bias is not None else None)
        mean: torch.Tensor = total / terms if terms is not None else total
        return mean

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad_hidden, grad_weight, grad_bias, terms = ctx.saved_tensors
        scale = grads[0] / terms if terms is not None else grads[0]
        weight_dtype, bias_dtype = ctx.dtypes
        # In place: these buffers have no other user, and copies would double them.
        grad_hidden.mul_(scale)
        out_weight = grad_weight.mul_(scale).to(weight_dtype) if grad_weight is not None else None
        out_bias = grad_bias.mul_(scale).to(bias_dtype) if grad_bias is not None else None
        return grad_hidden, out_weight, out_bias, None, None, None, None


def _loss_and_slope(
    logits: torch.Tensor, target: torch.Tensor, ignore: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed cross-entropy of a chunk, and its derivative with respect to the logits, of shape
    (rows, vocabulary) in float32. For rows whose target is ``ignore``, both are zero."""
    valid = target != ignore
    index = target.where(valid, 0).unsqueeze(1)
    log_probability = functional.log_softmax(logits.float(), dim=-1)
    loss = -(log_probability.gather(1, index).squeeze(1) * valid).sum()
    slope = log_probability.exp_()
    slope.scatter_add_(1, index, slope.new_full((), -1.0).expand(index.shape))
    return loss, slope.mul_(valid.unsqueeze(1))
