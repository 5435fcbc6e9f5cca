"""Operators seen below autograd, and the storages that they make, numbered in their order."""

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
# They update running statistics that their schemas do not call written: position of the first of two.
_STATISTICS = {_ATEN.native_batch_norm.default: 3, _ATEN.cudnn_batch_norm.default: 3}
Fresh = list[tuple[int, torch.Tensor]]
"""New storages: (place among the outputs, tensor)."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_CONSTANTS = re.compile(r"::(new_)?(full|empty|zeros|ones|arange|scalar_tensor)")


@dataclasses.dataclass(frozen=True, slots=True)
class OperatorNumber:
    """``written``: names or positions of arguments it writes to. ``checked``: its part of the checksum;
    makers of constants have none, as code that runs on fake tensors may use another."""

    checked: bytes
    views: bool | None  # all outputs are views of arguments, and nothing is written; None: it has to be seen
    random: bool
    written: tuple[int | str, ...]
    statistics: int | None


@functools.cache
def fact(func: Any) -> OperatorNumber:
    written: list[int | str] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(argument.name if argument.kwarg_only else i)
    random = torch.Tag.nondeterministic_seeded in func.tags
    aliases = [r.alias_info is not None for r in func._schema.returns]
    views: bool | None = all(aliases) and not written if all(aliases) == any(aliases) else None
    if func is _ATEN._unsafe_view.default:
        views = True
    checked = b"" if _CONSTANTS.search(func.name()) else func.name().encode()
    return OperatorNumber(checked, views, random, tuple(written), _STATISTICS.get(func))


def flat(values: Any) -> Iterator[torch.Tensor]:
    """Tensors whose bytes are one storage."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.layout is torch.strided:
                yield value
        elif isinstance(value, list | tuple):
            yield from flat(value)


def storage_key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def called(func: Any, args: Any, kwargs: Any) -> Any:
    """What torch adds in place where nobody looks (aten/src/ATen/native/Linear.cpp), it adds out of place
    where a dispatch mode is at work; the alias keeps a trace from writing to the sum's argument."""
    if func is not _ATEN.add.Tensor or type(args[0]) in _PLAIN:
        return func(*args, **kwargs)
    spare = args[0].detach()
    out = func(*args, **kwargs)
    del spare
    return out


class Numbered(TorchDispatchMode):
    """Numbers the storages that operators make; ``key`` is a checksum of who made them."""

    sees_views = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count, self.key, self.busy = 0, 0, False

    def before(self, known: OperatorNumber, func: Any, args: Any, kwargs: Any) -> Any:
        """What `after` is given as ``state``."""

    def after(self, func: Any, args: Any, kwargs: Any, made: Fresh, state: Any) -> None:
        """``made`` is numbered from ``count``. Of views only those are told that ``sees_views``."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.busy or func in _UNSEEN:
            return func(*args, **kwargs)
        known = fact(func)
        if known.views and not self.sees_views:
            return func(*args, **kwargs)
        state = self.before(known, func, args, kwargs)
        out = called(func, args, kwargs)
        made = self._made(known, args, kwargs, out)
        self.after(func, args, kwargs, made, state)
        if made:
            self.count += len(made)
            self.key = zlib.crc32(known.checked, self.key)
        return out

    def _made(self, known: OperatorNumber, args: Any, kwargs: Any, out: Any) -> Fresh:
        if known.views:
            return []
        if known.views is False and not known.written:
            return [(0, out)] if isinstance(out, torch.Tensor) else list(enumerate(flat((out,))))
        seen = {storage_key(t) for t in flat((args, tuple(kwargs.values())))}
        return [(i, t) for i, t in enumerate(flat((out,))) if storage_key(t) not in seen]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard costs more than the bookkeeping


def plain_view(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether sizes and strides say all about how the tensor looks at its storage."""
    return tensor.dtype == dtype and not tensor.is_conj() and not tensor.is_neg()


def written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    places = fact(func).written
    if not places:
        return []
    return list(flat([args[p] if isinstance(p, int) and p < len(args) else kwargs.get(p) for p in places]))


def repeatable(kwargs: Any, written_elsewhere: int) -> bool:
    """Whether a call may run twice: it draws from no generator of its own, and writes to nothing that
    stays."""
    return kwargs.get("generator") is None and not written_elsewhere
