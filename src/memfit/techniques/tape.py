"""Tensors that forward makes and lets go of, and that backward makes again from what was kept.

The storages that forward's operators make are numbered in their order. Of those that a choice drops, autograd
gets a handle in the place of the tensor; the call that made it is remembered with its arguments: tensors
that are kept themselves, dropped ones by their place. What backward asks for is made again once, and stays
until nobody needs it any more. Writes in place are part of how a storage was made; random operators start
from the generator's state of the first time. Every call is the same kernel on the same numbers, so no bit
changes. (Chen et al. 2016; which to drop: Jain et al. 2020.)
"""

from __future__ import annotations

import dataclasses
import functools
import re
import weakref
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.types.errors import MemfitError

_ATEN: Any = torch.ops.aten
_UNSEEN = frozenset({_ATEN.lift_fresh.default, torch.ops.prim.device.default})
# They update running statistics that their schemas do not call written: position of the first of two.
_STATISTICS = {_ATEN.native_batch_norm.default: 3, _ATEN.cudnn_batch_norm.default: 3}
Fresh = list[tuple[int, torch.Tensor]]
"""New storages: (place among the outputs, tensor)."""

_CONSTANTS = re.compile(r"::(new_)?(full|empty|zeros|ones|arange|scalar_tensor)")


class Geometry(NamedTuple):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: torch.Tensor) -> Geometry:
        return Geometry(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """``written``: names or positions of arguments it writes to. ``checked``: its part of the checksum;
    makers of constants have none, as code that runs on fake tensors may use another."""

    checked: bytes
    random: bool
    written: tuple[int | str, ...]
    statistics: int | None


@functools.cache
def fact(func: Any) -> Fact:
    written: list[int | str] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(argument.name if argument.kwarg_only else i)
    random = torch.Tag.nondeterministic_seeded in func.tags
    checked = b"" if _CONSTANTS.search(func.name()) else func.name().encode()
    return Fact(checked, random, tuple(written), _STATISTICS.get(func))


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
    spare = args[0].detach() if func is _ATEN.add.Tensor and isinstance(args[0], torch.Tensor) else None
    out = func(*args, **kwargs)
    del spare
    return out


class Numbered(TorchDispatchMode):
    """Numbers the storages that operators make; ``key`` is a checksum of who made them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count, self.key, self.busy = 0, 0, False

    def before(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What `after` is given as ``state``."""

    def after(
        self, func: Any, args: Any, kwargs: Any, made: list[tuple[int, torch.Tensor]], state: Any
    ) -> None:
        """``made`` is numbered from ``count``."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.busy or func in _UNSEEN:
            return func(*args, **kwargs)
        state = self.before(func, args, kwargs)
        out = called(func, args, kwargs)
        known = {storage_key(t) for t in flat((args, tuple(kwargs.values())))}
        made = []
        for i, tensor in enumerate(flat((out,))):
            key = storage_key(tensor)
            if key not in known:
                known.add(key)
                made.append((i, tensor))
        self.after(func, args, kwargs, made, state)
        if made:
            self.count += len(made)
            self.key = zlib.crc32(fact(func).checked, self.key)
        return out

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


class Ref(NamedTuple):
    """A dropped value as it was given to an operator."""

    value: Value
    geometry: Geometry


class Own(NamedTuple):
    """The value that the call writes to, as it was given; no reference, which would be a circle."""

    geometry: Geometry


class Held(NamedTuple):
    """A kept tensor as it was given to an operator. ``version``: of a parameter, which an optimizer may step
    during backward; other writes happen in forward and are seen."""

    tensor: torch.Tensor
    version: int | None


class Value:
    """A storage that is let go of. ``pending``: the calls that make it and write to it, not yet run again."""

    __slots__ = ("__weakref__", "dtype", "pending", "tensor")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.pending: list[Call] = []
        self.tensor: torch.Tensor | None = None  # once it is made again


class Handle(NamedTuple):
    """What autograd keeps in the place of a dropped tensor."""

    value: Value
    geometry: Geometry


class Call:
    """An operator's call that can be repeated. ``outputs``: (place among its outputs, value that it makes),
    or (-1, value that it writes to)."""

    __slots__ = ("__weakref__", "args", "func", "kwargs", "outputs", "state")

    def __init__(self, func: Any, given: tuple[Any, Any], state: Any) -> None:
        self.func, self.state = func, state
        self.args, self.kwargs = given
        self.outputs: list[tuple[int, weakref.ref[Value]]] = []

    def sources(self) -> Iterator[Value]:
        leaves = _pytree.tree_leaves((self.args, self.kwargs), is_leaf=_is_source)
        return (leaf.value for leaf in leaves if isinstance(leaf, Ref))

    def run(self, own: Value) -> None:
        """Fill the values that it makes, or write to ``own``. Raises MemfitError where a kept tensor has been
        written to since."""
        given = functools.partial(_given, own)
        args, kwargs = _pytree.tree_map(given, (self.args, self.kwargs), is_leaf=_is_source)
        self.args = self.kwargs = None  # what was kept for this call alone goes with the arguments
        # As in forward, where autograd and autocast had done their part; some kernels ask for the mode.
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
            outs = list(flat((_repeated(self.func, args, kwargs, self.state),)))
        own.pending.remove(self)
        for place, reference in self.outputs:
            value = reference()
            if value is not None and place >= 0:
                value.tensor = outs[place]
                if value is not own:
                    value.pending.remove(self)


def _is_source(leaf: Any) -> bool:
    return isinstance(leaf, Ref | Held | Own)


def _given(own: Value, leaf: Any) -> Any:
    if isinstance(leaf, Held):
        if leaf.version is not None and leaf.tensor._version != leaf.version:
            raise MemfitError("a parameter was changed in backward before recomputation had read it")
        return leaf.tensor
    if isinstance(leaf, Ref):
        return seen(leaf.value, leaf.geometry)
    return seen(own, leaf.geometry) if isinstance(leaf, Own) else leaf


def seen(value: Value, geometry: Geometry) -> torch.Tensor:
    tensor = value.tensor
    assert tensor is not None
    return tensor if Geometry.of(tensor) == geometry else tensor.as_strided(*geometry)


def _repeated(func: Any, args: Any, kwargs: Any, state: Any) -> Any:
    first = fact(func).statistics
    if first is not None and args[first] is not None:  # they were updated the first time
        args = [*args[:first], args[first].clone(), args[first + 1].clone(), *args[first + 2 :]]
    if state is None:
        return called(func, args, kwargs)
    device, before = state
    now = rng_state(device)
    set_rng_state(device, before)
    try:
        return func(*args, **kwargs)
    finally:
        set_rng_state(device, now)


def rng_state(device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)  # type: ignore[no-any-return]


def set_rng_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def device_of(args: Any, kwargs: Any) -> torch.device:
    given = next(flat((args, tuple(kwargs.values()))), None)
    return given.device if given is not None else torch.device(kwargs.get("device") or "cpu")


class Tape(Numbered):
    """One forward pass without the storages of ``dropped``; use it as context together with its `pack` and
    `unpack`."""

    def __init__(self, dropped: frozenset[int]) -> None:
        super().__init__()
        self.dropped, self.packed = dropped, 0
        self.values: dict[int, tuple[weakref.ref[Any], Value]] = {}  # by storage, while it lives
        self.readers: dict[int, weakref.WeakSet[Call]] = {}  # of each storage, kept or dropped

    def value(self, tensor: torch.Tensor) -> Value | None:
        found = self.values.get(storage_key(tensor))
        return found[1] if found is not None else None

    # -- forward

    def before(self, func: Any, args: Any, kwargs: Any) -> Any:
        targets = written(func, args, kwargs)
        for tensor in targets:
            for reader in list(self.readers.get(storage_key(tensor), ())):
                self._run_now(reader, self.value(tensor))
        if any(self._is_odd(t, targets, kwargs) for t in targets):
            for tensor in targets:
                self._keep(tensor)
        known = fact(func)
        if known.random and (self.count in self.dropped or any(map(self.value, targets))):
            device = device_of(args, kwargs)
            return device, rng_state(device)
        return None

    def after(
        self, func: Any, args: Any, kwargs: Any, made: list[tuple[int, torch.Tensor]], state: Any
    ) -> None:
        goals = written(func, args, kwargs)
        targets = [v for v in map(self.value, goals) if v is not None]
        ours = [pair for i, pair in enumerate(made, self.count) if i in self.dropped]
        if not (targets or ours) or not repeatable(kwargs, len(goals) - len(targets)):
            return
        call = Call(func, self._sources(args, kwargs, targets), state)
        for tensor in flat((args, tuple(kwargs.values()))):
            self.readers.setdefault(storage_key(tensor), weakref.WeakSet()).add(call)
        for value in targets:
            value.pending.append(call)
            call.outputs.append((-1, weakref.ref(value)))
        for place, tensor in ours:
            value = Value(tensor.dtype)
            value.pending.append(call)
            call.outputs.append((place, weakref.ref(value)))
            self._remember(tensor, value)

    def _is_odd(self, tensor: torch.Tensor, targets: list[torch.Tensor], kwargs: Any) -> bool:
        """Whether a write to a dropped storage cannot be repeated on another."""
        value = self.value(tensor)
        strange = len(targets) > 1 or not repeatable(kwargs, 0)
        return value is not None and (strange or not plain_view(tensor, value.dtype))

    def _keep(self, tensor: torch.Tensor) -> None:
        """From now on; who has seen it before gets what it was then."""
        found = self.values.pop(storage_key(tensor), None)
        if found is not None:
            before = weakref.ref(found[1])
            del found
            if (value := before()) is not None:
                self._make(value)

    def _remember(self, tensor: torch.Tensor, value: Value) -> None:
        key, values, readers = storage_key(tensor), self.values, self.readers

        def died(reference: Any) -> None:
            if key in values and values[key][0] is reference:
                del values[key]
                readers.pop(key, None)

        values[key] = (weakref.ref(tensor.untyped_storage(), died), value)

    def _sources(self, args: Any, kwargs: Any, targets: list[Value]) -> Any:
        """The arguments with dropped tensors by their place, and kept ones without their graph."""

        def source(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            value = self.value(leaf) if leaf.layout is torch.strided else None
            if value is not None and plain_view(leaf, value.dtype):
                return Own(Geometry.of(leaf)) if value in targets else Ref(value, Geometry.of(leaf))
            if leaf.is_leaf and leaf.requires_grad:
                return Held(leaf, leaf._version)
            return Held(leaf.detach(), None)

        return _pytree.tree_map(source, (args, kwargs))

    def _run_now(self, reader: Call, target: Value | None) -> None:
        """Before ``target``, which it reads, is written to. Writes to the target itself are repeated in
        their order."""
        for _, reference in reader.outputs:
            value = reference()
            if value is not None and value is not target and reader in value.pending:
                self._make(value)

    # -- autograd

    def pack(self, tensor: torch.Tensor) -> Any:
        self.packed += 1
        value = self.value(tensor) if tensor.layout is torch.strided else None
        if value is None or not plain_view(tensor, value.dtype):
            return tensor
        return Handle(value, Geometry.of(tensor))

    def unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, Handle):
            return packed  # type: ignore[no-any-return]
        self._make(packed.value)
        return seen(packed.value, packed.geometry)

    def _make(self, value: Value) -> None:
        """Run what is pending, sources first."""
        before, self.busy = self.busy, True
        stack = [value]
        try:
            while stack:
                top = stack[-1]
                if not top.pending:
                    stack.pop()
                    continue
                call = top.pending[0]
                missing = [v for v in call.sources() if v.pending]
                if missing:
                    stack += missing
                else:
                    call.run(top)
        finally:
            self.busy = before
