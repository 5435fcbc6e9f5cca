"""What autograd keeps at the moment that backward begins, read from the graph itself.

Nothing is unpacked, so nothing comes back from where it waits and nothing is computed again.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self
from unittest import mock

import torch
from torch import nn

from memfit.measure.held import fsdp_params, in_backward

_LOOKS = 16  # backward passes of one step
_DEEP = 4  # containers inside of what a hook packed


class Graph:
    """Listens to `torch.autograd.backward` between `__enter__` and `__exit__`.

    ``here``: bytes of each storage that is kept for backward where the loss was computed, parameters and
    buffers left out; ``away``: tensors that a saved-tensor hook left no copy of there; ``packed``: all that
    hooks have put something else in the place of, checkpoints left out; ``unread``: what this torch does not
    show. ``rows``: most rows kept, by their
    width. ``compiled``, ``eager``: addresses of parameters whose gradient comes out of a compiled graph, or
    out of an operator's own backward.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # who never leaves must not keep it alive
        self.backwards, self.device = 0, ""
        self.here: list[int] = []
        self.away = self.packed = self.unread = 0
        self.rows: dict[int, int] = {}
        self.compiled: set[int] = set()
        self.eager: set[int] = set()

    def __enter__(self) -> Self:
        inner = torch.autograd.backward

        @functools.wraps(inner)
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            if not in_backward():
                self.backwards += 1
                if self.backwards <= _LOOKS:
                    self._look([tensors] if isinstance(tensors, torch.Tensor) else list(tensors))
            inner(tensors, *args, **kwargs)

        self._patch = mock.patch.object(torch.autograd, "backward", backward)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()

    def _look(self, roots: list[Any]) -> None:
        tensors = [r for r in roots if isinstance(r, torch.Tensor)]
        self.device = tensors[0].device.type if tensors else self.device
        model = self._model()
        resident = {t.untyped_storage()._cdata for t in _resident(model)} if model is not None else set[int]()
        seen = set[int]()
        for node in _nodes(t.grad_fn for t in tensors):
            fused = node.name() == "CompiledFunctionBackward"
            for after, _ in node.next_functions:
                if (leaf := getattr(after, "variable", None)) is not None:
                    (self.compiled if fused else self.eager).add(id(leaf))
            for raw in _raw(node):
                self._one(raw, resident, seen)

    def _one(self, raw: Any, resident: set[int], seen: set[int]) -> None:
        try:
            kept = raw.data
        except RuntimeError:  # freed
            return
        except AttributeError:  # a torch that does not show it (2.5)
            self.unread += 1
            return
        if type(kept).__module__ == "torch.utils.checkpoint" or kept is None:
            return
        tensors = list(_tensors(kept))
        if not isinstance(kept, torch.Tensor):
            self.packed += 1
        near = [t for t in tensors if t.device.type == self.device]
        self.away += not near
        for tensor in near:
            local = getattr(tensor, "_local_tensor", tensor)
            storage = local.untyped_storage()
            if storage._cdata in resident:
                continue
            if local.dim() > 1:
                width = int(local.shape[-1])
                self.rows[width] = max(self.rows.get(width, 0), local.numel() // max(width, 1))
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                self.here.append(storage.nbytes())


def _resident(model: nn.Module) -> Iterator[torch.Tensor]:
    """Its parameters and buffers, of sharded ones what is gathered of them and what is local."""
    for tensor in (*model.parameters(), *model.buffers(), *(p for p, _ in gathered(model))):
        yield getattr(tensor, "_local_tensor", tensor)


def gathered(model: nn.Module) -> Iterator[tuple[torch.Tensor, nn.Parameter]]:
    """(parameter that layers compute with, the shard it is gathered from), with fsdp2."""
    for one in fsdp_params(model):
        if (whole := getattr(one, "_unsharded_param", None)) is not None:
            yield whole, one.sharded_param


def _nodes(roots: Iterable[Any]) -> Iterator[Any]:
    waiting, seen = [r for r in roots if r is not None], set[Any]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [after for after, _ in node.next_functions if after is not None]


def _raw(node: Any) -> Iterator[Any]:
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            try:
                found = getattr(node, name)
            except RuntimeError:  # freed
                continue
            yield from found if isinstance(found, tuple | list) else [found]


def _tensors(packed: Any, depth: int = _DEEP) -> Iterator[torch.Tensor]:
    """Tensors that live as long as ``packed``: itself, in containers, and in attributes."""
    if isinstance(packed, torch.Tensor):
        yield packed
    elif depth and isinstance(packed, tuple | list):
        for part in packed:
            yield from _tensors(part, depth - 1)
    elif depth and isinstance(packed, Mapping):
        yield from _tensors(list(packed.values()), depth - 1)
    elif depth and hasattr(packed, "__dict__") and not isinstance(packed, type):
        yield from _tensors(list(vars(packed).values()), depth - 1)
