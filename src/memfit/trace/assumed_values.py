"""Assumed values for tensors whose values are known only at run time.

Values are drawn from the range that the operator allows and are the same in every trace. Examples are a
router's choices, proposals that survive suppression and random crops: the trace continues with a plausible
case. If the step reads such a value, or if it decides a size, the step is also traced with two other cases
(`AssumedCase`), and the reported interval covers all of them.
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree

_ASSUMED = "_memfit_assumed"
_ATEN: Any = torch.ops.aten


class AssumedCase(enum.StrEnum):
    """Which values are assumed for tensors whose values are not known.

    ``USUAL``: numbers are random and uniform between 0 and 1, so that a router's choices are balanced. A
    random operator gives what it draws; if this is a single number, the median of 17 draws. All elements of a
    mask (bool) are True.

    ``LOW`` and ``HIGH``: numbers fall from 0.9 to 0.1 (LOW) or rise from 0.1 to 0.9 (HIGH) along the last
    dimension, so that all rows make the same choice; a scalar is random as in the usual case. All numbers of
    a random operator are the lowest (LOW) or the highest (HIGH) number in 17 calls. The first element of a
    mask is True; the others are False (LOW), or True at random for about half of them (HIGH).
    """

    USUAL = "usual"
    LOW = "low"
    HIGH = "high"


_CASE: contextvars.ContextVar[AssumedCase] = contextvars.ContextVar("case", default=AssumedCase.USUAL)


def current_case() -> AssumedCase:
    """Return the case that is assumed in the current context: ``USUAL`` outside `assume_case`."""
    return _CASE.get()


@contextlib.contextmanager
def assume_case(case: AssumedCase) -> Iterator[None]:
    """Assume the values of ``case`` in traces made inside this context."""
    token = _CASE.set(case)
    try:
        yield
    finally:
        _CASE.reset(token)


# Operators that give indices or counts by comparing unknown numbers.
CHOICES = frozenset(
    {
        _ATEN.topk.default,
        _ATEN.sort.default,
        _ATEN.sort.stable,
        _ATEN.argsort.default,
        _ATEN.argmax.default,
        _ATEN.argmin.default,
        _ATEN.max.dim,
        _ATEN.min.dim,
        _ATEN.kthvalue.default,
        _ATEN.median.dim,
        _ATEN.mode.default,
        _ATEN.multinomial.default,
        _ATEN.bucketize.Tensor,
        _ATEN.searchsorted.Tensor,
        _ATEN.cummax.default,
    }
)
# Operators that give the positions or the number of the True elements of an unknown mask.
COUNTS = frozenset(
    {
        _ATEN.nonzero.default,
        _ATEN.sum.default,
        _ATEN.sum.dim_IntList,
        _ATEN.count_nonzero.default,
        _ATEN.count_nonzero.dim_IntList,
        _ATEN.cumsum.default,
    }
)
# Operators whose result depends on the shape and dtype of a tensor only.
CONSTANTS = frozenset(
    {
        _ATEN.zeros_like.default,
        _ATEN.ones_like.default,
        _ATEN.full_like.default,
        _ATEN.new_zeros.default,
        _ATEN.new_ones.default,
        _ATEN.new_full.default,
    }
)
# Operators that fill a tensor with random numbers. They are followed for small tensors only.
FILLS = frozenset(
    {
        _ATEN.uniform_.default,
        _ATEN.normal_.default,
        _ATEN.random_.default,
        _ATEN.random_.to,
        _ATEN.random_.__getattr__("from"),
        _ATEN.bernoulli_.float,
        _ATEN.exponential_.default,
    }
)


def is_assumed(value: Any) -> bool:
    """Return whether ``value`` is a tensor that `mark_assumed` has marked. False for anything else."""
    return isinstance(value, torch.Tensor) and hasattr(_mark_holder(value), _ASSUMED)


def mark_assumed(values: Any) -> Any:
    """Mark the tensors in ``values``, also in nested lists, tuples and dicts, and all tensors that share a
    storage with them, as assumed. Return ``values``."""
    for value in _pytree.tree_leaves(values):
        if isinstance(value, torch.Tensor):
            setattr(_mark_holder(value), _ASSUMED, True)
    return values


def _mark_holder(tensor: torch.Tensor) -> Any:
    """Return the object that carries the mark of ``tensor``: its storage, because a value written into a view
    is also in the tensor that it is a view of. A sparse tensor has no storage and carries the mark itself."""
    return tensor.untyped_storage() if tensor.layout is torch.strided else tensor


def assume_values(tensor: torch.Tensor, case: AssumedCase, seed: int) -> torch.Tensor | None:
    """Return assumed values of the tensor's shape and dtype, marked as assumed: for a floating-point or bool
    tensor those that `AssumedCase` says. ``seed`` decides the random ones. Return None for integers and
    complex numbers, whose range is not known."""
    shape, dtype = tuple(tensor.shape), tensor.dtype
    with unset_fake_temporarily(), torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        if dtype is torch.bool:
            values = torch.ones(shape, dtype=dtype)
            if case is not AssumedCase.USUAL:
                half = torch.randint(0, 2, (tensor.numel(),), generator=generator).bool()
                values.view(-1)[1:] = half[1:] if case is AssumedCase.HIGH else False
            return mark_assumed(values)  # type: ignore[no-any-return]
        if not dtype.is_floating_point:
            return None
        if case is AssumedCase.USUAL or not shape:
            values = torch.rand(shape, generator=generator)
        else:  # all rows are equal, with rising or falling values
            row = torch.linspace(0.1, 0.9, shape[-1])
            values = (row if case is AssumedCase.HIGH else row.flip(0)).expand(shape).contiguous()
        return mark_assumed(values.to(dtype))  # type: ignore[no-any-return]


_OF_DRAWS: dict[AssumedCase, Any] = {
    AssumedCase.USUAL: torch.median,
    AssumedCase.LOW: torch.min,
    AssumedCase.HIGH: torch.max,
}


def draw_values(func: Any, args: Any, kwargs: Any, case: AssumedCase, seed: int) -> Any:
    """Return what the random operator ``func`` gives for real arguments with torch's generator seeded by
    ``seed``, marked as assumed. The generator's state is restored.

    In the cases LOW and HIGH, all its numbers are replaced by the lowest or the highest number in 17 such
    calls. In the usual case this is done only for a single number, which may be compared with a threshold: it
    becomes the median of 17 draws. Permutations (``randperm``), complex numbers, empty tensors and results
    that are not one tensor are never replaced.
    """
    with _own_random_numbers(seed):
        numbers = func(*args, **kwargs)
        is_plain = isinstance(numbers, torch.Tensor) and numbers.numel() and not numbers.is_complex()
        if not is_plain or func is _ATEN.randperm.default:
            return mark_assumed(numbers)
        if case is not AssumedCase.USUAL or numbers.numel() == 1:
            # Copies, because an operator in place returns the same tensor each time.
            draws = [numbers.flatten().clone()]
            draws += [func(*args, **kwargs).flatten().clone() for _ in range(16)]
            numbers.fill_(_OF_DRAWS[case](torch.cat(draws).double()))
    return mark_assumed(numbers)


def fill_values(
    func: Any, tensor: torch.Tensor, args: Any, kwargs: Any, case: AssumedCase, seed: int
) -> torch.Tensor:
    """Return a real tensor of the shape and dtype of ``tensor`` that the random in-place operator has filled,
    marked as assumed, with numbers as `draw_values` gives them. ``args`` are its arguments without the
    tensor. The tensor itself stays as it is."""
    with unset_fake_temporarily(), torch.no_grad():
        target = torch.empty(tensor.shape, dtype=tensor.dtype)
        return draw_values(lambda: func(target.clone(), *args, **kwargs), (), {}, case, seed)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _own_random_numbers(seed: int) -> Iterator[None]:
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
