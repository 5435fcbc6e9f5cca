"""Real values of large tensors that are computed only if something reads them.

Masks, distances and targets that a model makes of its batch have known values, but a trace reads few of them.
A pointwise operator, a sum or a matrix product on large tensors is therefore kept with its arguments, and
runs when its result is asked for.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes

from memfit.trace.assumed_values import mark_assumed

LARGE = 2**14  # elements from which on computing takes longer than keeping the operator
_ATEN: Any = torch.ops.aten
_COPIES = frozenset({_ATEN._to_copy.default, _ATEN.clone.default})
_SUMS = frozenset({_ATEN.sum.default, _ATEN.sum.dim_IntList, _ATEN.mean.default, _ATEN.mean.dim})
_PRODUCTS = frozenset({_ATEN.mm.default, _ATEN.bmm.default})


class DeferredValue:
    """The result, a tensor, of an operator on real tensors, computed at the first call of `result`.
    ``is_assumed``: whether an argument holds assumed values. ``reads``: the addresses of the real storages
    from which it is computed, directly or through other deferred values."""

    __slots__ = ("__weakref__", "_call", "_result", "is_assumed", "reads")

    def __init__(self, func: Any, args: Any, kwargs: Mapping[str, Any], *, is_assumed: bool) -> None:
        self._call: tuple[Any, Any, Any] | None = func, args, dict(kwargs)
        self._result: torch.Tensor | None = None
        self.is_assumed = is_assumed
        leaves = _pytree.tree_leaves((args, self._call[2]))
        self.reads: frozenset[int] = frozenset[int]().union(
            *(x.reads for x in leaves if isinstance(x, DeferredValue)),
            (x.untyped_storage()._cdata for x in leaves if isinstance(x, torch.Tensor)),
        )

    @property
    def waits(self) -> bool:
        """Whether it is not computed yet."""
        return self._call is not None

    def result(self) -> torch.Tensor | None:
        """Return the values; None if the host lacks a kernel for them. Raises what the operators raise."""
        waiting = [self]
        while waiting:  # no recursion: loops of a model can make long chains
            value = waiting[-1]
            missing = [a for a in value._arguments() if a.waits]
            waiting += missing
            if not missing:
                waiting.pop()._compute()
        return self._result

    def _arguments(self) -> list[DeferredValue]:
        if self._call is None:
            return []
        return [x for x in _pytree.tree_leaves(self._call[1:]) if isinstance(x, DeferredValue)]

    def _compute(self) -> None:
        if self._call is None:
            return
        func, args, kwargs = self._call
        results = {id(a): a._result for a in self._arguments()}
        if None not in results.values():
            args, kwargs = _pytree.tree_map_only(DeferredValue, lambda x: results[id(x)], (args, kwargs))
            with torch.no_grad(), torch._C.DisableTorchFunction(), _disable_current_modes():
                try:
                    self._result = func(*args, **kwargs)
                except NotImplementedError:  # the host lacks the kernel: the values are unknown
                    self._result = None
            if self.is_assumed:
                mark_assumed(self._result)
        self._call = None


class PendingValues:
    """The deferred values that still wait to be read."""

    def __init__(self) -> None:
        self._values: weakref.WeakSet[DeferredValue] = weakref.WeakSet()

    def add(self, value: DeferredValue) -> None:
        self._values.add(value)

    def compute(self, storages: frozenset[int] | None = None) -> None:
        """Compute those that read one of ``storages``, which are written next; all if it is None."""
        for value in list(self._values):
            if storages is None or value.reads & storages:
                value.result()
                self._values.discard(value)


def can_defer(func: Any, fakes: list[torch.Tensor], *, has_deferred: bool, has_device: bool) -> bool:
    """Return whether the operator, which writes to no argument and draws no random numbers, is one whose
    result can wait. ``fakes``: the tensors among its arguments; ``has_deferred``: whether the values of one
    of them wait; ``has_device``: whether it names a device, as a copy to one does.

    If no argument waits, the operator must work on `LARGE` tensors, and is no view: a view costs nothing,
    and must share its storage with its argument. False if a tensor is sparse."""
    if any(x.layout is not torch.strided for x in fakes):
        return False
    if has_deferred and func.is_view:
        return True
    if torch.Tag.pointwise in func.tags:
        return has_deferred or math.prod(torch.broadcast_shapes(*(x.shape for x in fakes))) >= LARGE
    if func in _SUMS or func in _PRODUCTS or (func in _COPIES and not has_device):
        return has_deferred or any(x.numel() >= LARGE for x in fakes)
    return False
