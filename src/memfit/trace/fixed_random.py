"""A mode with random operators that return the same numbers for every sample, and arithmetic in float64.

They are used to compare a batch with its parts: dropout, stochastic depth and noise must be the same in both,
whichever dimension holds the batch in the model.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from memfit.model.tensors import tensor_leaves

_GOLDEN = 0.6180339887498949  # its multiples are evenly distributed modulo 1
# Used where numbers must not depend on the position. The second is for dropout: it keeps every element.
_SAME, _SAME_KEPT = 0.6, 0.05
_MEAN = 1  # the number by which torch's operators of losses are told to average
_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


class TimeLimitExceeded(Exception):
    """A computation under `FixedRandom` has used more processor time than its ``deadline_s`` allows."""


class FixedRandom(TorchDispatchMode):
    """Mode in which random operators give numbers that depend only on the index in the last dimension, and
    dtypes of lower precision become float64 (complex128).

    The random operators are dropout and those of `_FILLS`, such as rand, randn, randint, bernoulli, randperm
    and multinomial (which takes the largest weights); others, such as poisson, stay as they are. The dtypes
    that change are those that an operator asks for, and those of arguments together with a float64 one,
    except for operators that write in place.

    ``counts`` holds the numbers of samples in the batches that are compared. If the last dimension has one of
    these lengths it may be the batch, and all numbers along it are equal. After `draw_for_each_sample`, the
    calls of random operators in ``batch_dims`` (number of the call in a pass: dimension of the samples) give
    numbers that depend on the sample, too. ``weighs_classes`` is True once a loss was averaged with weights
    that differ from class to class. Raises TimeLimitExceeded at the first operator after ``deadline_s``, a
    reading of this thread's processor time (`time.thread_time`).
    """

    def __init__(self, counts: Collection[int], deadline_s: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts, self.deadline_s = frozenset(counts), deadline_s
        self.weighs_classes = False
        self.batch_dims: dict[int, int] = {}
        self._first_sample = 0
        self._shapes: list[tuple[int, ...]] = []  # of what random operators returned in this pass
        self._shapes_by_length: dict[int, list[tuple[int, ...]]] = {}

    def start_pass(self, length: int, first_sample: int = 0) -> None:
        """Begin a computation of ``length`` samples, of which the first is number ``first_sample`` of the
        whole batch."""
        self._first_sample, self._shapes = first_sample, []
        self._shapes_by_length[length] = self._shapes

    def draw_for_each_sample(self) -> bool:
        """Set ``batch_dims`` from the shapes of the random numbers in two passes so far: the last one of the
        most samples, and the last one of half as many (rounded up). The dimension of the samples is the only
        one that differs, by these numbers. Return whether ``batch_dims`` has an entry. Call it after at least
        one `start_pass`."""
        whole = max(self._shapes_by_length)
        half = whole - whole // 2
        shapes, others = (self._shapes_by_length.get(n, []) for n in (whole, half))
        if len(shapes) == len(others):
            for number, (shape, other) in enumerate(zip(shapes, others, strict=True)):
                changed = [d for d, (a, b) in enumerate(zip(shape, other, strict=False)) if a != b]
                if len(shape) == len(other) and [(shape[d], other[d]) for d in changed] == [(whole, half)]:
                    self.batch_dims[number] = changed[0]
        return bool(self.batch_dims)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.thread_time() > self.deadline_s:
            raise TimeLimitExceeded
        name = func._schema.name.removeprefix("aten::")
        options = {k: _WIDE.get(v, v) if k == "dtype" else v for k, v in (kwargs or {}).items()}
        if not func._schema.is_mutable:
            args, options = _widened(args, options)
        if name in ("nll_loss_forward", "nll_loss2d_forward") and args[3] == _MEAN:
            self.weighs_classes |= args[2] is not None and args[2].unique().numel() > 1
        if name == "native_dropout" and args[2] is not False:
            return self._dropout(*args[:2])
        out = func(*args, **options)
        if (fill := _FILLS.get(name)) is not None:
            values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | options
            out.copy_(fill(self, out, values))
        return out

    @staticmethod
    @contextlib.contextmanager
    def paused() -> Iterator[None]:
        """Inside this context, disable all dispatch modes that are active, not only this one."""
        with _disable_current_modes():
            yield

    def _dropout(self, x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
        mask = self.uniform(x, _SAME_KEPT) < 1 - p
        return x * mask / max(1 - p, 1e-9), mask

    def uniform(self, like: torch.Tensor, same: float = _SAME) -> torch.Tensor:
        """Return float64 numbers in [0, 1) in the shape of ``like`` for the next call of a random operator
        since `start_pass`. They depend on the index in the last dimension only. All are ``same`` (default
        0.6) if ``like`` has no dimension, or if its last one has at most one element or a length in
        ``counts``, so that it may be the batch. If ``batch_dims`` has the dimension of the samples for this
        call, they depend on the sample and the index in the last dimension, whatever its length."""
        length = like.shape[-1] if like.dim() else 1
        dim = self.batch_dims.get(len(self._shapes))
        self._shapes.append(tuple(like.shape))
        if length <= 1 or length in self.counts:
            numbers = torch.full(like.shape, same, dtype=torch.float64, device=like.device)
        else:
            positions = torch.arange(1, length + 1, dtype=torch.float64, device=like.device)
            numbers = (positions * _GOLDEN).frac().expand(like.shape)
        if dim is None:
            return numbers
        samples = torch.arange(like.shape[dim], device=like.device) + self._first_sample
        places = torch.arange(1 if dim == like.dim() - 1 else length, device=like.device)
        samples = samples.reshape(-1, *[1] * (like.dim() - 1 - dim))
        return _scrambled(samples * 1_000_003 + places).expand(like.shape)


def _scrambled(integers: torch.Tensor) -> torch.Tensor:
    """Return a pseudo-random float64 number in [0, 1) for each integer; equal integers give equal numbers."""
    mixed = integers * 2_862_933_555_777_941_757 + 3_037_000_493
    mixed = (mixed ^ (mixed >> 29)) * 6_364_136_223_846_793_005
    return ((mixed >> 20) & (2**40 - 1)).double() / 2**40


def _widened(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments with tensors of lower precision converted to float64 (or complex128), if another
    argument is float64 or complex128. Return them unchanged otherwise."""
    tensors = tensor_leaves((args, kwargs))
    kinds = {t.dtype for t in tensors}
    if not kinds & {torch.float64, torch.complex128} or kinds.isdisjoint(_WIDE):
        return args, kwargs
    return _pytree.tree_map_only(  # type: ignore[no-any-return]
        torch.Tensor, lambda t: t.to(_WIDE.get(t.dtype, t.dtype)), (args, kwargs)
    )


def _bernoulli(mode: FixedRandom, out: torch.Tensor, values: dict[str, Any]) -> Any:
    return mode.uniform(out, _SAME_KEPT) < values.get("p", values["self"])


def _bernoulli_in_place(mode: FixedRandom, out: torch.Tensor, values: dict[str, Any]) -> Any:
    return mode.uniform(out, _SAME_KEPT) < values.get("p", 0.5)


def _uniform(mode: FixedRandom, out: torch.Tensor, values: dict[str, Any]) -> Any:
    low, high = values.get("from", 0.0), values.get("to", 1.0)
    return low + mode.uniform(out) * (high - low)


def _normal(mode: FixedRandom, out: torch.Tensor, values: dict[str, Any]) -> Any:
    return values.get("mean", 0.0) + values.get("std", 1.0) * torch.special.ndtri(mode.uniform(out))


def _standard_normal(mode: FixedRandom, out: torch.Tensor, values: dict[str, Any]) -> Any:
    return torch.special.ndtri(mode.uniform(out))


def _integers(mode: FixedRandom, out: torch.Tensor, values: dict[str, Any]) -> Any:
    low = values.get("low", values.get("from", 0))
    high = values.get("high", values.get("to"))
    high = 2 if high is None else high
    return low + (mode.uniform(out) * (high - low)).floor()


def _exponential(mode: FixedRandom, out: torch.Tensor, values: dict[str, Any]) -> Any:
    return -mode.uniform(out).log() / values.get("lambd", 1.0)


def _permutation(mode: FixedRandom, out: torch.Tensor, values: dict[str, Any]) -> Any:
    return torch.arange(out.numel(), device=out.device).roll(-1)


def _multinomial(mode: FixedRandom, out: torch.Tensor, values: dict[str, Any]) -> Any:
    order = values["self"].argsort(dim=-1, descending=True, stable=True)
    positions = torch.arange(out.shape[-1], device=out.device) % order.shape[-1]
    return order.index_select(-1, positions)


_FILLS: dict[str, Callable[[FixedRandom, torch.Tensor, dict[str, Any]], Any]] = {
    "bernoulli": _bernoulli,
    "bernoulli_": _bernoulli_in_place,
    "rand": _uniform,
    "rand_like": _uniform,
    "uniform_": _uniform,
    "normal": _normal,
    "normal_": _normal,
    "randn": _standard_normal,
    "randn_like": _standard_normal,
    "randint": _integers,
    "randint_like": _integers,
    "random_": _integers,
    "exponential_": _exponential,
    "randperm": _permutation,
    "multinomial": _multinomial,
}
