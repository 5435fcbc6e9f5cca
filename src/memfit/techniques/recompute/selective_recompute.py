"""Drop tensors that forward makes, and recompute them in backward from tensors that are kept.

The storages that forward's operators make are numbered in order. For storages that are to be dropped,
autograd gets a handle instead of the tensor. The call that made such a storage is remembered with its
arguments: kept tensors themselves, and dropped tensors by reference. A storage that backward needs is
recomputed once and stays until it is not needed any more. Writes in place are part of how a storage is made.
Random operators start from the random state of the first time. Every call runs the same kernel on the same
numbers, so results are bitwise equal. (Chen et al. 2016; which tensors to drop: Jain et al. 2020.)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from memfit.techniques.recompute.op_numbering import (
    RecomputeFacts,
    StorageNumbering,
    call_operator,
    is_repeatable,
    plain_view,
    recompute_facts,
    storage_key,
    strided_tensors,
    written_tensors,
)
from memfit.types.device_kind import HOST
from memfit.types.errors import MemfitError


class StorageGeometry(NamedTuple):
    """Size, stride and offset of a tensor in its storage, in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: torch.Tensor) -> StorageGeometry:
        return StorageGeometry(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


class Ref(NamedTuple):
    """A dropped tensor as an argument of a recorded call: the storage that it is in, and size, stride and
    offset of the tensor there."""

    value: DroppedStorage
    geometry: StorageGeometry


class WrittenStorage(NamedTuple):
    """An argument of a recorded call: a tensor in the dropped storage to which the call writes. It does not
    refer to the storage, because the storage refers to the call."""

    geometry: StorageGeometry


class KeptTensor(NamedTuple):
    """An argument of a recorded call (an operator's call in forward that backward can repeat): a tensor that
    stays in memory until then. For a parameter, which an optimizer may update during backward, ``version`` is
    torch's counter of writes to it at the time of the call. For other tensors it is None: these are written
    to in forward only, where `SelectiveRecompute` sees it."""

    tensor: torch.Tensor
    version: int | None


class DroppedStorage:
    """A dropped storage. ``pending`` holds, in their order, the recorded calls that made it or wrote to it
    and that have not been repeated yet. ``dtype`` is that of the tensor that was made with it. ``tensor`` is
    the recomputed tensor, None until then."""

    __slots__ = ("__weakref__", "dtype", "pending", "tensor")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.pending: list[RecomputedCall] = []
        self.tensor: torch.Tensor | None = None  # set once it is recomputed


class Handle(NamedTuple):
    """What autograd keeps instead of a dropped tensor: the storage that the tensor is in, and its size,
    stride and offset there."""

    value: DroppedStorage
    geometry: StorageGeometry


class RecomputedCall:
    """A recorded call of an operator, which can be repeated once. ``arguments`` is (positional arguments,
    keyword arguments). ``state`` is (device, random state before the call), or None if the operator draws no
    random numbers. ``outputs`` holds (index among the call's outputs, weak reference to the dropped storage
    that the call makes) and (-1, weak reference to the dropped storage that it writes to)."""

    __slots__ = ("__weakref__", "args", "func", "kwargs", "outputs", "sources", "state")

    def __init__(self, func: Any, arguments: tuple[Any, Any], state: Any) -> None:
        self.func, self.state = func, state
        self.args, self.kwargs = arguments
        self.outputs: list[tuple[int, weakref.ref[DroppedStorage]]] = []
        self.sources = [r.value for r in self._references() if isinstance(r, Ref)]

    def _references(self) -> Iterator[Ref | KeptTensor]:
        return _references((*self.args, *self.kwargs.values()))

    def reads(self, tensor: torch.Tensor, value: DroppedStorage | None) -> bool:
        """Return whether the call reads the storage of ``tensor``: whether one of its arguments is a kept
        tensor in that storage, or refers to ``value``. ``value`` is the dropped storage of ``tensor``, None
        if it is not dropped."""
        key = storage_key(tensor)
        return any(
            r.value is value if isinstance(r, Ref) else storage_key(r.tensor) == key
            for r in self._references()
        )

    def run(self, target: DroppedStorage) -> None:
        """Repeat the call for ``target``, a dropped storage that it makes or writes to. All dropped storages
        that the call makes, and that are still referred to, get their tensors. The dropped storages that it
        reads must have been recomputed. The call can be repeated only once, because its arguments are given
        up. Raises MemfitError if a parameter among them has been changed since the call was recorded."""
        args = [_argument(target, a) for a in self.args]
        kwargs = {k: _argument(target, a) for k, a in self.kwargs.items()}
        # Tensors that are kept for this call alone are freed with the arguments.
        self.args, self.kwargs, self.sources = (), {}, []
        outs = list(strided_tensors((_repeat(self.func, args, kwargs, self.state),)))
        target.pending.remove(self)
        for place, reference in self.outputs:
            value = reference()
            if value is not None and place >= 0:
                value.tensor = outs[place]
                if value is not target:
                    value.pending.remove(self)


def _references(arguments: Any) -> Iterator[Ref | KeptTensor]:
    for value in arguments:
        if isinstance(value, Ref | KeptTensor):
            yield value
        elif isinstance(value, list):
            yield from _references(value)


def _argument(target: DroppedStorage, leaf: Any) -> Any:
    if isinstance(leaf, KeptTensor):
        if leaf.version is not None and leaf.tensor._version != leaf.version:
            raise MemfitError(
                "optimal-checkpointing: backward changed a parameter before a recomputation had read it"
            )
        return leaf.tensor
    if isinstance(leaf, Ref):
        return view_of(leaf.value, leaf.geometry)
    if isinstance(leaf, WrittenStorage):
        return view_of(target, leaf.geometry)
    return [_argument(target, part) for part in leaf] if isinstance(leaf, list) else leaf


def view_of(value: DroppedStorage, geometry: StorageGeometry) -> torch.Tensor:
    """Return a tensor with this size, stride and offset in the storage of ``value``. That storage must have
    been recomputed."""
    tensor = value.tensor
    assert tensor is not None
    return tensor if StorageGeometry.of(tensor) == geometry else tensor.as_strided(*geometry)


def _repeat(func: Any, args: Any, kwargs: Any, state: Any) -> Any:
    index = recompute_facts(func).statistics
    if index is not None and args[index] is not None:  # the first run has updated them
        args = [*args[:index], args[index].clone(), args[index + 1].clone(), *args[index + 2 :]]
    if state is None:
        return call_operator(func, args, kwargs)
    device, start_state = state
    current_state = rng_state(device)
    set_rng_state(device, start_state)
    try:
        return func(*args, **kwargs)
    finally:
        set_rng_state(device, current_state)


def rng_state(device: torch.device) -> torch.Tensor:
    """Return the state of the device's default random generator."""
    if device.type == HOST:
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)  # type: ignore[no-any-return]


def set_rng_state(device: torch.device, state: torch.Tensor) -> None:
    """Set the state of the device's default random generator."""
    if device.type == HOST:
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def device_of(args: Any, kwargs: Any) -> torch.device:
    """Return the device on which a call runs: that of its first tensor argument, else its argument
    ``device``, else the CPU."""
    tensor = next(strided_tensors((args, tuple(kwargs.values()))), None)
    return tensor.device if tensor is not None else torch.device(kwargs.get("device") or HOST)


class SelectiveRecompute(StorageNumbering):
    """Mode for one forward pass, in which autograd does not keep the storages whose numbers are in
    ``dropped``. They are recomputed in backward. A storage is kept all the same if a call that makes it or
    writes to it cannot be repeated. Enter the mode together with saved-tensor hooks of its `pack` and
    `unpack`. ``packed`` counts the tensors that autograd has asked to save, including those that are kept."""

    def __init__(self, dropped: frozenset[int]) -> None:
        super().__init__()
        self.dropped, self.packed = dropped, 0
        # By storage, while the storage is alive.
        self.values: dict[int, tuple[weakref.ref[Any], DroppedStorage]] = {}
        self.calls: weakref.WeakSet[RecomputedCall] = weakref.WeakSet()
        self.read: set[int] = set()  # storages, some already freed, that recorded calls read

    def value(self, tensor: torch.Tensor) -> DroppedStorage | None:
        entry = self.values.get(storage_key(tensor))
        return entry[1] if entry is not None else None

    # -- forward

    def before(self, facts: RecomputeFacts, func: Any, args: Any, kwargs: Any) -> Any:
        if not (facts.written or facts.random):
            return None
        targets = written_tensors(func, args, kwargs)
        for tensor in targets:
            if storage_key(tensor) in self.read:
                self._run_readers(tensor)
        if any(self._cannot_repeat_on(t, targets, kwargs) for t in targets):
            for tensor in targets:
                self._keep(tensor)
        if facts.random and (self.count in self.dropped or any(map(self.value, targets))):
            device = device_of(args, kwargs)
            return device, rng_state(device)
        return None

    def after(
        self, func: Any, args: Any, kwargs: Any, new_storages: list[tuple[int, torch.Tensor]], state: Any
    ) -> None:
        write_targets = written_tensors(func, args, kwargs)
        if not write_targets and self.dropped.isdisjoint(range(self.count, self.count + len(new_storages))):
            return
        targets = [v for v in map(self.value, write_targets) if v is not None]
        dropped_outputs = [pair for i, pair in enumerate(new_storages, self.count) if i in self.dropped]
        if not (targets or dropped_outputs) or not is_repeatable(kwargs, len(write_targets) - len(targets)):
            return
        call = RecomputedCall(func, self._sources(args, kwargs, targets), state)
        self.calls.add(call)
        for value in targets:
            value.pending.append(call)
            call.outputs.append((-1, weakref.ref(value)))
        for place, tensor in dropped_outputs:
            value = DroppedStorage(tensor.dtype)
            value.pending.append(call)
            call.outputs.append((place, weakref.ref(value)))
            self._remember(tensor, value)

    def _cannot_repeat_on(self, tensor: torch.Tensor, targets: list[torch.Tensor], kwargs: Any) -> bool:
        """Return whether ``tensor``, one of the tensors ``targets`` that a call writes to, is in a dropped
        storage and the call cannot be repeated on the recomputed storage."""
        value = self.value(tensor)
        unrepeatable = len(targets) > 1 or not is_repeatable(kwargs, 0)
        return value is not None and (unrepeatable or not plain_view(tensor, value.dtype))

    def _keep(self, tensor: torch.Tensor) -> None:
        """Treat the storage of ``tensor`` as kept from now on, if it is a dropped one. If autograd or a
        recorded call still refers to it as dropped, recompute it now, before it changes, for their use."""
        entry = self.values.pop(storage_key(tensor), None)
        if entry is not None:
            value_reference = weakref.ref(entry[1])
            del entry
            if (value := value_reference()) is not None:
                self._make(value)

    def _remember(self, tensor: torch.Tensor, value: DroppedStorage) -> None:
        key, values = storage_key(tensor), self.values

        def died(reference: Any) -> None:
            if key in values and values[key][0] is reference:
                del values[key]

        values[key] = (weakref.ref(tensor.untyped_storage(), died), value)

    def _sources(self, args: Any, kwargs: Any, targets: list[DroppedStorage]) -> Any:
        """Return (positional, keyword) arguments of a call in the form that `RecomputedCall` takes. A tensor
        in one of the dropped storages ``targets``, to which the call writes, becomes a `WrittenStorage`.
        Other dropped tensors become a `Ref`. Kept tensors become a `KeptTensor`, detached unless they are
        parameters. Other values stay as they are, except that tuples become lists."""
        positional = [self._source(leaf, targets) for leaf in args]
        return positional, {name: self._source(leaf, targets) for name, leaf in kwargs.items()}

    def _source(self, leaf: Any, targets: list[DroppedStorage]) -> Any:
        if isinstance(leaf, list | tuple):
            return [self._source(part, targets) for part in leaf]
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.layout is not torch.strided:
            return KeptTensor(leaf.detach(), None)
        key = storage_key(leaf)
        entry = self.values.get(key)
        is_dropped = entry is not None and plain_view(leaf, entry[1].dtype)
        if entry is not None and is_dropped and entry[1] in targets:
            return WrittenStorage(StorageGeometry.of(leaf))
        self.read.add(key)
        if entry is not None and is_dropped:
            return Ref(entry[1], StorageGeometry.of(leaf))
        if leaf.is_leaf and leaf.requires_grad:
            return KeptTensor(leaf, leaf._version)
        return KeptTensor(leaf.detach(), None)

    def _run_readers(self, tensor: torch.Tensor) -> None:
        """Repeat the recorded calls that read the storage of ``tensor``, because it is about to be
        overwritten. Calls that write to that storage are left out: they are repeated in their order
        anyway."""
        target = self.value(tensor)
        for reader in [c for c in self.calls if c.reads(tensor, target)]:
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
        return Handle(value, StorageGeometry.of(tensor))

    def unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, Handle):
            return packed  # type: ignore[no-any-return]
        self._make(packed.value)
        return view_of(packed.value, packed.geometry)

    def _make(self, value: DroppedStorage) -> None:
        """Recompute a dropped storage: repeat its pending calls, in order, each after those of the dropped
        storages that it reads. Do nothing if it has no pending calls."""
        if not value.pending:
            return
        was_busy, self.busy = self.busy, True
        stack = [value]
        try:
            # The state is as in forward below autograd and autocast; some kernels check the gradient mode.
            with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
                while stack:
                    top = stack[-1]
                    if not top.pending:
                        stack.pop()
                        continue
                    call = top.pending[0]
                    pending_sources = [v for v in call.sources if v.pending]
                    if pending_sources:
                        stack += pending_sources
                    else:
                        call.run(top)
        finally:
            self.busy = was_busy
