"""Real values of those fake tensors that depend on the batch alone, such as masks, positions and routes.

A model reads its padding mask to choose a kernel, or finds the edges within a radius. Such tensors are
computed from the batch without any parameter, so they are also computed for real while they are small.
Results that depend on a parameter stay fake. Only the indices, counts and random numbers among them get
assumed values (`assumed_values`), which are followed in the same way but are marked as assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree

from memfit.model.batch_objects import batch_tensors
from memfit.model.tensors import tensor_leaves
from memfit.techniques.recompute.op_numbering import written_tensors
from memfit.trace.assumed_values import (
    CHOICES,
    CONSTANTS,
    COUNTS,
    FILLS,
    assume_values,
    current_case,
    draw_values,
    fill_values,
    is_assumed,
    mark_assumed,
)
from memfit.trace.deferred_values import DeferredValue, PendingValues, can_defer
from memfit.types.errors import UserError

MOST_ELEMENTS = 2**20
_MOST_FILLED = 64  # most elements of a tensor whose random numbers are kept
_NAME = "_memfit_shadow"
_LIFT: Any = torch.ops.aten.lift_fresh.default
_CAST: Any = torch.ops.aten._to_copy.default
_ITEM: Any = torch.ops.aten._local_scalar_dense.default
_EMBEDDING: Any = torch.ops.aten.embedding.default


class ConcreteValues:
    """Attach real values to fake tensors and compute with them.

    The real tensor is stored as an attribute of the fake one. To follow an operator is to compute its result
    from real values, too. ``on``: operators are followed now. ``seeded``: the values of a batch have been
    attached. ``draws``: how often values were drawn or assumed. ``max_elements``: tensors with more elements
    are not followed. It is infinite if the whole step is computed on real tensors (`real_weights`); then the
    result of an operator that fails has unknown values, while otherwise the error is raised. ``_stale`` holds
    the real storages that are no longer valid, because unknown values have been written into their fake
    tensors. Values of large tensors are computed when they are read (`deferred_values`).
    """

    def __init__(self) -> None:
        self.on = self.seeded = False
        self.max_elements: float = MOST_ELEMENTS
        self.case = current_case()
        self.draws = 0
        self._stale: dict[int, torch.UntypedStorage] = {}
        self._pending = PendingValues()

    @property
    def follows_all(self) -> bool:
        """Whether the whole step is computed on real tensors."""
        return self.max_elements == math.inf

    def seed(self, fakes: Any, reals: Any) -> None:
        """Attach copies of the values of the batch ``reals`` to the tensors of its fake copy ``fakes``, and
        follow operators from now on. Tensors of more than ``max_elements`` elements get no values."""
        self.on = self.seeded = True
        for fake, real in zip(batch_tensors(fakes), batch_tensors(reals), strict=True):
            if isinstance(fake, FakeTensor) and real.numel() <= self.max_elements:
                setattr(fake, _NAME, real.detach().clone())  # an operator may write into it

    def seed_constants(self, buffers: Iterable[torch.Tensor]) -> None:
        """Attach their values to those ``buffers`` of a model whose values torch knows: single numbers that
        the model makes of Python numbers, such as a stride or a padding."""
        for buffer in buffers:
            if self.of(buffer) is None and (constant := getattr(buffer, "constant", None)) is not None:
                keep_value(buffer, constant)

    def set_assumed(self, fake: torch.Tensor, real: torch.Tensor) -> None:
        """Attach the values ``real`` to ``fake`` and mark them as assumed, also if unknown values were
        written into ``fake`` before."""
        self._stale.pop(real.untyped_storage()._cdata, None)
        setattr(fake, _NAME, mark_assumed(real))

    def of(self, tensor: Any) -> torch.Tensor | None:
        """Return the known or assumed values that are attached to the tensor. Return None if there are none
        or unknown values have been written into the tensor since. A real tensor is its own values."""
        if type(tensor) is torch.Tensor:
            return tensor  # a real tensor among fake ones
        real = attached_value(tensor)
        if real is None or (self._stale and real.untyped_storage()._cdata in self._stale):
            return None
        return real

    def _known(self, tensor: Any) -> torch.Tensor | DeferredValue | None:
        """Return the tensor's values that wait to be computed, if there are any, else what `of` returns."""
        value = getattr(tensor, _NAME, None)
        return value if isinstance(value, DeferredValue) and value.waits else self.of(tensor)

    def values(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Return the operator's result on its arguments' known or assumed values; for ``.item()``, the
        number. Return None if values are missing or the operator is not followed (`may_follow`, `compute`).

        If the first argument has no values: for an operator that gives indices or counts they are assumed
        (`_choose`), and for one such as ``zeros_like`` they are not needed (`_constant`). A random operator
        that fills a whole tensor of at most 64 elements in place has its numbers attached to the tensor, and
        None is returned. If the whole step is computed, such an operator draws into the real values of its
        tensor, whatever their size, and None is returned. Raises UserError if an embedding is looked up at a
        row that it does not have, and what `compute` raises.
        """
        if func is _ITEM:
            return self._item(args[0])
        if func is _EMBEDDING and self.on:
            self._check_rows(args[0], args[1])
        if self.follows_all and self.on and func in FILLS and (real := self.of(args[0])) is not None:
            with torch.no_grad(), unset_fake_temporarily():
                draw_values(func, (real, *args[1:]), kwargs, self.case, self._seed())
            return None
        if self.on and args and isinstance(args[0], FakeTensor) and not hasattr(args[0], _NAME):
            if func in FILLS:
                return self._attach_fill(func, args, kwargs)
            if func in CHOICES or (args[0].dtype is torch.bool and _counts(func, kwargs)):
                return self._choose(func, args, kwargs)
            if func in CONSTANTS and args[0].numel() <= self.max_elements:
                return self._constant(func, args, kwargs)
        if self.may_follow(args):
            return self.compute(func, args, kwargs)
        if kwargs:  # such as ``out``, where the first argument is not written to
            self._forget(func, args, kwargs)
        return None

    def _item(self, tensor: torch.Tensor) -> Any:
        real = self.of(tensor) if self.may_follow((tensor,)) else None
        if real is None:
            return None
        with unset_fake_temporarily():
            return real.item()

    def _check_rows(self, table: torch.Tensor, indices: torch.Tensor) -> None:
        """Raise UserError if a known index, such as that of a position, is not a row of the table: less than
        0, or at least the number of rows. Fake tensors accept any index, and a step would be predicted that
        cannot run."""
        rows, known = table.shape[0], self.of(indices)
        if known is None or is_assumed(known) or not known.numel():
            return
        with unset_fake_temporarily():
            smallest, largest = int(known.min()), int(known.max())
        if smallest < 0 or largest >= rows:
            index = smallest if smallest < 0 else largest
            raise UserError(
                f"an embedding of {rows} rows is looked up at row {index}, which it does not have",
                allowed=f"rows 0 to {rows - 1}",
                hint="if the row is a position, shorten the samples or build the model for longer ones; if "
                "it is a token, build the model with a larger vocabulary; a negative one, such as -100, "
                "marks labels to ignore and is no input",
            )

    def _choose(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Return the operator's indices and counts for assumed values of its first argument, with None for
        the floating-point numbers among its results. Return None if no values can be assumed (`assume`), or
        if the operator is not followed (`may_follow`, `compute`). Afterwards the values of the first argument
        are forgotten, except those of a mask. Raises what `compute` raises."""
        has_values = self.assume(args[0]) is not None
        result = self.compute(func, args, kwargs) if has_values and self.may_follow(args) else None
        if has_values and args[0].dtype is not torch.bool:
            self.forget(args[0])
        return None if result is None else _pytree.tree_map(_whole_numbers, result)

    def _constant(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Return the real result of an operator such as ``zeros_like``, which fills a tensor with one number
        whatever the values of its argument. Return None if the result holds floating-point or complex
        numbers, or if a shape among the arguments has more than ``max_elements`` elements."""
        dtype = kwargs.get("dtype") or args[0].dtype
        if dtype.is_floating_point or dtype.is_complex or _large(args, self.max_elements):
            return None
        with torch.no_grad(), unset_fake_temporarily():
            return func(torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:], **kwargs)

    def assume(self, tensor: Any) -> torch.Tensor | None:
        """Return the tensor's values. If it has none, assume values, attach them to the tensor and return
        them. Return None if none can be assumed: for integers, complex numbers, empty tensors and those of
        more than ``max_elements`` elements."""
        real = self.of(tensor)
        if real is None and isinstance(tensor, FakeTensor) and 0 < tensor.numel() <= self.max_elements:
            real = assume_values(tensor, self.case, self._seed())
            if real is not None:
                setattr(tensor, _NAME, real)
        return real

    def forget(self, tensor: Any) -> None:
        """Remove the values that are attached to the tensor, if there are any."""
        if hasattr(tensor, _NAME):
            delattr(tensor, _NAME)

    def _seed(self) -> int:
        self.draws += 1
        return self.draws

    def _attach_fill(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        tensor = args[0]
        is_whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
        if is_whole and 0 < tensor.numel() <= _MOST_FILLED:
            setattr(tensor, _NAME, fill_values(func, tensor, args[1:], kwargs, self.case, self._seed()))

    def may_follow(self, args: Any) -> bool:
        """Return whether an operator with these arguments may be followed, by a quick look at the first
        argument (at its first element if it is a list): values are attached to it, it is a plain real
        tensor, or it is no tensor. False while ``on`` is False, and inside torch.func's transforms, whose
        tensors wrap others."""
        argument = args[0] if args else None
        while isinstance(argument, list | tuple) and argument:
            argument = argument[0]
        if not self.on or torch._C._functorch.peek_interpreter_stack() is not None:
            return False
        return (
            not isinstance(argument, torch.Tensor)
            or type(argument) is torch.Tensor
            or hasattr(argument, _NAME)
        )

    def compute(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Return the operator's result on real values, marked as assumed if an argument is assumed or if the
        operator is random. It is a `DeferredValue` if it can wait (`can_defer`).

        Return None if an argument has no values, if the arguments ask for more than ``max_elements``
        (`_large`), if the operator writes random numbers into an argument, if the host lacks its kernel
        (NotImplementedError), or if it raises another RuntimeError while the whole step is computed
        (`follows_all`). Other errors of the operator are raised. Where None is returned, the values of a
        tensor that the operator writes into are no longer known. A tensor made from Python numbers counts as
        known, wherever the numbers come from.
        """
        if func is _LIFT:  # a tensor made from Python numbers
            with unset_fake_temporarily():
                return args[0].clone()
        leaves = tensor_leaves((args, kwargs))
        values: dict[int, Any] = {id(x): self._known(x) for x in leaves}
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        is_random_write = is_random and func._schema.is_mutable
        if not (is_random or func._schema.is_mutable or self.follows_all or None in values.values()):
            has_deferred = any(isinstance(x, DeferredValue) for x in values.values())
            if leaves and can_defer(
                func, leaves, has_deferred=has_deferred, has_device=kwargs.get("device") is not None
            ):
                return self._defer(func, args, kwargs, values)
        if func._schema.is_mutable:
            self._compute_before_write(written_tensors(func, args, kwargs))
        values = {id(x): self.of(x) for x in leaves}
        if is_random_write or None in values.values() or _large(args, self.max_elements):
            self._forget(func, args, kwargs)
            return None
        real_arguments = _pytree.tree_map_only(torch.Tensor, lambda x: values[id(x)], (args, dict(kwargs)))
        with torch.no_grad(), unset_fake_temporarily():
            try:
                if is_random:
                    return draw_values(func, real_arguments[0], real_arguments[1], self.case, self._seed())
                out = func(*real_arguments[0], **real_arguments[1])
            except RuntimeError as error:
                if not self.follows_all and not isinstance(error, NotImplementedError):
                    raise
                self._forget(func, args, kwargs)  # a kernel that the host lacks, for example
                return None
        if any(map(is_assumed, values.values())):
            mark_assumed((out, written_tensors(func, *real_arguments)))
        return out

    def _defer(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], values: Mapping[int, Any]
    ) -> DeferredValue:
        arguments = _pytree.tree_map_only(torch.Tensor, lambda x: values[id(x)], (args, dict(kwargs)))
        assumed = any(
            x.is_assumed if isinstance(x, DeferredValue) else is_assumed(x) for x in values.values()
        )
        deferred = DeferredValue(func, *arguments, is_assumed=assumed)
        self._pending.add(deferred)
        return deferred

    def _compute_before_write(self, written: Iterable[torch.Tensor]) -> None:
        """Compute the values that wait and are made of one of the ``written`` tensors, while it still has the
        values that they are made of."""
        known = [self._known(tensor) for tensor in written]
        if any(isinstance(value, DeferredValue) for value in known):
            self._pending.compute()
        elif storages := frozenset(x.untyped_storage()._cdata for x in known if isinstance(x, torch.Tensor)):
            self._pending.compute(storages)

    def attach(self, out: Any, real: Any) -> None:
        """Attach the values ``real`` to the fake tensors ``out``, one by one. Both have the same structure.
        Tensors of more than ``max_elements``, and pairs whose shapes differ or of which one is no tensor, are
        left out. ``real`` may be the `DeferredValue` of one tensor."""
        if isinstance(real, DeferredValue):
            if isinstance(out, FakeTensor) and out.numel() <= self.max_elements:
                setattr(out, _NAME, real)
            return
        for fake, value in zip(_pytree.tree_leaves(out), _pytree.tree_leaves(real), strict=True):
            has_same_shape = (
                isinstance(fake, FakeTensor) and isinstance(value, torch.Tensor) and fake.shape == value.shape
            )
            if has_same_shape and value.numel() <= self.max_elements:
                setattr(fake, _NAME, value)

    def _forget(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Treat the values of the tensors that the operator writes to as unknown from now on."""
        written = written_tensors(func, args, kwargs)
        self._compute_before_write(written)
        for tensor in written:
            if (real := self.of(tensor)) is not None:
                storage = real.untyped_storage()
                self._stale[storage._cdata] = storage


def attached_value(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the values attached to a tensor, or None. They may be older than what was written into it."""
    value: torch.Tensor | DeferredValue | None = getattr(tensor, _NAME, None)
    if isinstance(value, DeferredValue):
        value = value.result()
        if value is None:
            delattr(tensor, _NAME)
        else:
            setattr(tensor, _NAME, value)
    return value


def keep_value(fake: torch.Tensor, real: torch.Tensor) -> None:
    """Attach a copy of ``real`` to ``fake``, as its known values."""
    with unset_fake_temporarily():
        setattr(fake, _NAME, real.detach().clone())


def _large(args: Any, max_elements: float) -> bool:
    """Return whether an argument asks for more than ``max_elements`` elements: a list of integers, taken as a
    shape, or an integer that is the only argument. Such are the arguments of factory functions."""
    if len(args) == 1 and isinstance(args[0], int):
        return args[0] > max_elements
    lists = [a for a in args if isinstance(a, list | tuple) and all(isinstance(n, int) for n in a)]
    return any(math.prod(sizes) > max_elements for sizes in lists)


def _counts(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operator that is called on a mask turns it into integers: positions, counts, or a
    cast to a dtype that is not floating-point."""
    kind = kwargs.get("dtype")
    return func in COUNTS or (func is _CAST and kind is not None and not kind.is_floating_point)


def _whole_numbers(value: Any) -> Any:
    """Return ``value``, or None if it is a tensor of floating-point numbers, such as the values that ``topk``
    returns with its indices."""
    return None if isinstance(value, torch.Tensor) and value.dtype.is_floating_point else value
