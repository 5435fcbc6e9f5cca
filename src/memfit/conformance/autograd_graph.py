"""What autograd keeps for backward when backward begins, read from the graph itself.

Saved tensors are not unpacked, so nothing is read back from offload and nothing is recomputed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self
from unittest import mock

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from memfit.conformance.observation import SavedTensors
from memfit.conformance.sharding import fsdp_params, in_backward

_LOOKS = 16  # backward passes of one step that are inspected
_DEEP = 4  # depth of containers inside what a hook packed


class GraphProbe:
    """Inspects the autograd graph at the beginning of the first 16 calls of `torch.autograd.backward` between
    `__enter__` and `__exit__`. Calls from inside a backward pass are ignored. Numbers and lists are added up
    over the inspected calls. The attributes have the names and meanings of those of `SavedTensors`, and
    further:

    - ``ends``: the sum of the elements of each tensor at which a backward starts: a loss, or what a pipeline
      stage passes on.
    - ``compiled``, ``eager``: ids of parameters whose gradient comes from a compiled graph, or from an
      operator's own backward.
    """

    def __init__(
        self, model: nn.Module, on_backward: Callable[[], None] = lambda: None, *, weighs: bool = False
    ) -> None:
        """``on_backward`` is called at the beginning of each counted backward. ``weighs``: whether to measure
        the bytes of the tensors that saved-tensor hooks receive. Without it, ``offloaded_bytes`` stays 0, and
        ``unsized`` equals ``offloaded``."""
        self._model = weakref.ref(model)  # a listener that is never exited must not keep the model alive
        self._on_backward, self._weighs = on_backward, weighs
        self.backwards, self.device = 0, ""
        self.ends: list[float] = []
        self.resident_bytes: list[int] = []
        self.contiguous_bytes: list[int] = []
        self.offloaded = self.offloaded_bytes = self.unsized = self.packed = self.unread = 0
        self._sizes: dict[int, int] = {}  # address of what a hook returned -> bytes that it was given
        self._known: dict[Any, StorageWeakRef] = {}
        self.rows: dict[int, int] = {}
        self.compiled: set[int] = set()
        self.eager: set[int] = set()

    def __enter__(self) -> Self:
        inner = torch.autograd.backward

        @functools.wraps(inner)
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            if not in_backward():
                self.backwards += 1
                self._on_backward()
                if self.backwards <= _LOOKS:
                    self._inspect([tensors] if isinstance(tensors, torch.Tensor) else list(tensors))
            inner(tensors, *args, **kwargs)

        hooks: Any = torch._C._autograd
        push = hooks._push_saved_tensors_default_hooks
        self._patches: list[Any] = [mock.patch.object(torch.autograd, "backward", backward)]
        if self._weighs:
            measuring_push = functools.partial(self._push, push)
            self._patches += [mock.patch.object(hooks, "_push_saved_tensors_default_hooks", measuring_push)]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()
        self._sizes.clear()
        self._known.clear()

    def observed(self) -> SavedTensors:
        """Return what was recorded so far, as a value. ``ends``, ``compiled`` and ``eager`` are not in it."""
        return SavedTensors(
            backwards=self.backwards,
            device=self.device,
            resident_bytes=tuple(self.resident_bytes),
            contiguous_bytes=tuple(self.contiguous_bytes),
            offloaded=self.offloaded,
            offloaded_bytes=self.offloaded_bytes,
            unsized=self.unsized,
            packed=self.packed,
            unread=self.unread,
            rows=dict(self.rows),
        )

    def _push(self, push: Any, pack: Callable[[torch.Tensor], Any], unpack: Any) -> None:
        def pack_and_weigh(tensor: torch.Tensor) -> Any:
            packed, storage = pack(tensor), tensor.untyped_storage()
            key = (storage._cdata, tensor._version, tensor.storage_offset(), tensor.numel(), tensor.dtype)
            previous = self._known.get(key)
            repeated = previous is not None and not previous.expired()
            self._known[key] = StorageWeakRef(storage)
            self._sizes[id(packed)] = 0 if repeated else tensor.numel() * tensor.element_size()
            return packed

        push(pack_and_weigh, unpack)

    def _inspect(self, roots: list[Any]) -> None:
        tensors = [r for r in roots if isinstance(r, torch.Tensor)]
        self.device = tensors[0].device.type if tensors else self.device
        local_tensors = (getattr(t, "_local_tensor", t).detach() for t in tensors)
        self.ends += [float(t.sum(dtype=torch.float64)) for t in local_tensors if not t.is_meta]
        model = self._model()
        resident_ids = (
            {t.untyped_storage()._cdata for t in _resident(model)} if model is not None else set[int]()
        )
        storage_keys = set[Any]()
        for node in _nodes(t.grad_fn for t in tensors):
            is_compiled = node.name() == "CompiledFunctionBackward"
            for next_node, _ in node.next_functions:
                if (leaf := getattr(next_node, "variable", None)) is not None:
                    (self.compiled if is_compiled else self.eager).add(id(leaf))
            for raw in _raw(node):
                self._count_saved(raw, resident_ids, storage_keys)

    def _count_saved(self, raw: Any, resident_ids: set[int], storage_keys: set[Any]) -> None:
        try:
            saved_value = raw.data
        except RuntimeError:  # freed
            return
        except AttributeError:  # torch 2.5 does not expose saved tensors
            self.unread += 1
            return
        if type(saved_value).__module__ == "torch.utils.checkpoint" or saved_value is None:
            return
        tensors = list(_tensors(saved_value))
        if not isinstance(saved_value, torch.Tensor):
            self.packed += 1
        device_tensors = [getattr(t, "_local_tensor", t) for t in tensors if t.device.type == self.device]
        if not device_tensors:
            self.offloaded += 1
            self.unsized += id(saved_value) not in self._sizes
            self.offloaded_bytes += self._sizes.get(id(saved_value), 0)
        for local in device_tensors:
            if local.untyped_storage()._cdata not in resident_ids:
                self._count_resident(local, storage_keys)

    def _count_resident(self, local: torch.Tensor, storage_keys: set[Any]) -> None:
        if local.dim() > 1:
            width = int(local.shape[-1])
            self.rows[width] = max(self.rows.get(width, 0), local.numel() // max(width, 1))
        storage = local.untyped_storage()
        kinds = ((self.resident_bytes, True), (self.contiguous_bytes, local.is_contiguous()))
        for sizes, applies in kinds:
            if applies and (key := (storage._cdata, sizes is self.resident_bytes)) not in storage_keys:
                storage_keys.add(key)
                sizes.append(storage.nbytes())


def _resident(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensor on this rank of each parameter and buffer of the model (of a sharded one, its local
    shard), then of each full parameter that FSDP2 has gathered (`gathered_parameters`)."""
    for tensor in (*model.parameters(), *model.buffers(), *(p for p, _ in gathered_parameters(model))):
        yield getattr(tensor, "_local_tensor", tensor)


def gathered_parameters(model: nn.Module) -> Iterator[tuple[torch.Tensor, nn.Parameter]]:
    """Yield (parameter that layers compute with, shard that it is gathered from) for each parameter that
    FSDP2 has gathered at least once, also if its memory is freed now."""
    for fsdp_param in fsdp_params(model):
        if (full_param := getattr(fsdp_param, "_unsharded_param", None)) is not None:
            yield full_param, fsdp_param.sharded_param


def _nodes(roots: Iterable[Any]) -> Iterator[Any]:
    pending, visited = [r for r in roots if r is not None], set[Any]()
    while pending:
        node = pending.pop()
        if node in visited:
            continue
        visited.add(node)
        yield node
        pending += [next_node for next_node, _ in node.next_functions if next_node is not None]


def _raw(node: Any) -> Iterator[Any]:
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            try:
                value = getattr(node, name)
            except RuntimeError:  # freed
                continue
            yield from value if isinstance(value, tuple | list) else [value]


def _tensors(packed: Any, depth: int = _DEEP) -> Iterator[torch.Tensor]:
    """Yield the tensors that ``packed`` keeps alive: ``packed`` itself if it is a tensor, else the tensors in
    its elements, values and attributes. Containers are entered down to ``depth`` levels, of which a tuple or
    list takes one, a mapping or an object two."""
    if isinstance(packed, torch.Tensor):
        yield packed
    elif depth and isinstance(packed, tuple | list):
        for part in packed:
            yield from _tensors(part, depth - 1)
    elif depth and isinstance(packed, Mapping):
        yield from _tensors(list(packed.values()), depth - 1)
    elif depth and hasattr(packed, "__dict__") and not isinstance(packed, type):
        yield from _tensors(list(vars(packed).values()), depth - 1)
