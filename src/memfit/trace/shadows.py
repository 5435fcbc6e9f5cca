"""Real values beside fake tensors, for the little that the batch alone decides: masks, positions, routes.

A model looks at its padding mask to choose a kernel, or finds edges within a radius. Such tensors are
computed from the batch without any parameter, so they are computed for real as well, as long as they are
small. Whatever a parameter touches stays fake.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree

from memfit.techniques.batch_objects import batch_tensors

_MOST_ELEMENTS = 2**20
_NAME = "_memfit_shadow"
_LIFT: Any = torch.ops.aten.lift_fresh.default


class Shadows:
    """The real tensor of a fake one is its attribute; ``stale`` are storages written with unknown values."""

    def __init__(self) -> None:
        self.on = self.seeded = False
        self._stale: dict[int, torch.UntypedStorage] = {}

    def seed(self, fakes: Any, reals: Any) -> None:
        """The batch's own values. From now on values are followed."""
        self.on = self.seeded = True
        for fake, real in zip(batch_tensors(fakes), batch_tensors(reals), strict=True):
            if isinstance(fake, FakeTensor) and real.numel() <= _MOST_ELEMENTS:
                setattr(fake, _NAME, real.detach())

    def of(self, tensor: Any) -> torch.Tensor | None:
        if type(tensor) is torch.Tensor:
            return tensor  # a real one beside fake ones
        real: torch.Tensor | None = getattr(tensor, _NAME, None)
        if real is None or (self._stale and real.untyped_storage()._cdata in self._stale):
            return None
        return real

    def may_follow(self, args: Any) -> bool:
        """Quick: whether the first argument, or the first in a list, has a value, is real or is no tensor.
        Not inside torch.func's transforms, whose tensors wrap others."""
        first = args[0] if args else None
        while isinstance(first, list | tuple) and first:
            first = first[0]
        if not self.on or torch._C._functorch.peek_interpreter_stack() is not None:
            return False
        return not isinstance(first, torch.Tensor) or type(first) is torch.Tensor or hasattr(first, _NAME)

    def compute(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The operator on real values; None where one is missing, large or random."""
        if func is _LIFT:  # a tensor of Python numbers
            with unset_fake_temporarily():
                return args[0].clone()
        leaves = [x for x in _pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        values = {id(x): self.of(x) for x in leaves}
        if torch.Tag.nondeterministic_seeded in func.tags or None in values.values() or _large(args):
            self._forget(func, leaves)
            return None
        real = _pytree.tree_map_only(torch.Tensor, lambda x: values[id(x)], (args, dict(kwargs)))
        with torch.no_grad(), unset_fake_temporarily():
            return func(*real[0], **real[1])

    def attach(self, out: Any, real: Any) -> None:
        for fake, value in zip(_pytree.tree_leaves(out), _pytree.tree_leaves(real), strict=True):
            same = (
                isinstance(fake, FakeTensor) and isinstance(value, torch.Tensor) and fake.shape == value.shape
            )
            if same and value.numel() <= _MOST_ELEMENTS:
                setattr(fake, _NAME, value)

    def _forget(self, func: Any, leaves: list[torch.Tensor]) -> None:
        if func._schema.is_mutable and leaves and (real := self.of(leaves[0])) is not None:
            storage = real.untyped_storage()
            self._stale[storage._cdata] = storage


def _large(args: Any) -> bool:
    """Whether a list of sizes among the arguments asks for many elements, as factories have it."""
    sizes = args[0] if args and isinstance(args[0], list | tuple) else ()
    count = 1
    for size in sizes:
        count *= size if isinstance(size, int) else 1
    return count > _MOST_ELEMENTS
