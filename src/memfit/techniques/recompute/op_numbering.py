"""Observe operators below autograd, and number the storages that they make in order."""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN: Any = torch.ops.aten
_UNSEEN = frozenset({_ATEN.lift_fresh.default, torch.ops.prim.device.default})
# These update running statistics, which their schemas do not declare as written. The value is the position
# of the first of the two arguments.
_STATISTICS = {_ATEN.native_batch_norm.default: 3, _ATEN.cudnn_batch_norm.default: 3}
NewStorages = list[tuple[int, torch.Tensor]]
"""New storages: (index among the outputs, tensor)."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_CONSTANTS = re.compile(r"::(new_)?(full|empty|zeros|ones|arange|scalar_tensor)")


@dataclasses.dataclass(frozen=True, slots=True)
class RecomputeFacts:
    """What recomputation must know about an operator.

    - ``checked`` is its contribution to the checksum of `StorageNumbering`: its name as bytes. Operators that
      make constants contribute nothing, because code may use other ones of these on fake tensors.
    - ``views``: True if all its outputs are views of arguments and it writes to nothing, None if only some of
      its outputs are declared to be views or if it has none, False otherwise.
    - ``random`` says whether it draws random numbers.
    - ``written`` holds (position, name) of each argument that it writes to.
    - ``statistics`` is None for most operators. Some update running statistics without declaring it, in two
      adjacent arguments: it is then the position of the first.
    """

    checked: bytes
    views: bool | None
    random: bool
    written: tuple[tuple[int, str], ...]
    statistics: int | None


@functools.cache
def recompute_facts(func: Any) -> RecomputeFacts:
    """Return the `RecomputeFacts` of the operator ``func``, an overload such as torch.ops.aten.add.Tensor."""
    arguments = enumerate(func._schema.arguments)
    written = tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)
    random = torch.Tag.nondeterministic_seeded in func.tags
    aliases = [r.alias_info is not None for r in func._schema.returns]
    views: bool | None = all(aliases) and not written if all(aliases) == any(aliases) else None
    if func is _ATEN._unsafe_view.default:
        views = True
    checked = b"" if _CONSTANTS.search(func.name()) else func.name().encode()
    return RecomputeFacts(checked, views, random, written, _STATISTICS.get(func))


def strided_tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yield the strided tensors among ``values``, and those in lists and tuples in them at any depth. Such a
    tensor has exactly one storage."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.layout is torch.strided:
                yield value
        elif isinstance(value, list | tuple):
            yield from strided_tensors(value)


def storage_key(tensor: torch.Tensor) -> int:
    """Return a key of the tensor's storage, unique while the storage is alive."""
    return int(tensor.untyped_storage()._cdata)


def call_operator(func: Any, args: Any, kwargs: Any) -> Any:
    """Call an operator and return its result.

    Torch does some additions in place, such as that of a linear layer's bias
    (aten/src/ATen/native/Linear.cpp), but out of place under a dispatch mode, such as the caller. A trace
    assumes that such an addition is in place if nothing else refers to its first argument. So while an
    addition runs whose first argument is not a plain tensor (in a trace it is a fake one), an alias of that
    argument exists, and the trace sees that the addition is out of place."""
    if func is not _ATEN.add.Tensor or type(args[0]) in _PLAIN:
        return func(*args, **kwargs)
    alias = args[0].detach()
    out = func(*args, **kwargs)
    del alias
    return out


class StorageNumbering(TorchDispatchMode):
    """Base class of modes that number the storages that operators make, in their order.

    ``count`` is the number of the next storage, beginning with 0. ``key`` is a checksum of the operators that
    have made storages so far. While ``busy`` is set, operators run unobserved.
    """

    sees_views = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count, self.key, self.busy = 0, 0, False

    def before(self, facts: RecomputeFacts, func: Any, args: Any, kwargs: Any) -> Any:
        """Called before each operator, with its ``facts``. What it returns is passed to `after` as ``state``;
        this one returns None. It is not called for operators that only make views unless ``sees_views`` is
        set."""

    def after(self, func: Any, args: Any, kwargs: Any, new_storages: NewStorages, state: Any) -> None:
        """Called after each operator. Subclasses define it. ``new_storages`` holds the storages that the
        operator made, as (index among the tensors that it returned, tensor). They are numbered from ``count``
        on. ``state``: what `before` returned. It is not called for operators that only make views unless
        ``sees_views`` is set."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.busy or func in _UNSEEN:
            return func(*args, **kwargs)
        facts = recompute_facts(func)
        if facts.views and not self.sees_views:
            return func(*args, **kwargs)
        state = self.before(facts, func, args, kwargs)
        out = call_operator(func, args, kwargs)
        outputs = self._new_storages(facts, args, kwargs, out)
        self.after(func, args, kwargs, outputs, state)
        if outputs:
            self.count += len(outputs)
            self.key = zlib.crc32(facts.checked, self.key)
        return out

    def _new_storages(self, facts: RecomputeFacts, args: Any, kwargs: Any, out: Any) -> NewStorages:
        if facts.views:
            return []
        if facts.views is False and not facts.written:
            return [(0, out)] if isinstance(out, torch.Tensor) else list(enumerate(strided_tensors((out,))))
        input_keys = {storage_key(t) for t in strided_tensors((args, tuple(kwargs.values())))}
        return [(i, t) for i, t in enumerate(strided_tensors((out,))) if storage_key(t) not in input_keys]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the check costs more than the bookkeeping


def plain_view(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether size, stride and offset fully describe how the tensor reads its storage, taken as
    elements of ``dtype``: it has that dtype, and neither a conjugate nor a negative bit."""
    return tensor.dtype == dtype and not tensor.is_conj() and not tensor.is_neg()


def written_tensors(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the strided tensors that a call of ``func`` with these arguments writes to, according to the
    operator's schema."""
    places = recompute_facts(func).written
    return list(strided_tensors(args[i] if i < len(args) else kwargs.get(name) for i, name in places))


def is_repeatable(kwargs: Any, written_elsewhere: int) -> bool:
    """Return whether a call with these keyword arguments can be repeated: whether no random generator is
    passed to it, and it writes to no kept tensor (``written_elsewhere``, their number, is 0)."""
    return kwargs.get("generator") is None and not written_elsewhere
