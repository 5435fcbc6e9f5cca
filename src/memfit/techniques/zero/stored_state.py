"""Optimizer state of ZeRO stage 3 on local storage, as DeepSpeed's ZeRO-Infinity keeps it (Rajbhandari et al.
2021; deepspeed/runtime/swap_tensor)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memfit.techniques.offload import DiskFile, raw_bytes
from memfit.techniques.zero import BUFFER_COUNT

if TYPE_CHECKING:
    from memfit.techniques.base import Workbench

_MASTER, _GRADIENT = "master", "gradient"


class StoredState:
    """The fp32 master copy of a rank's shard, its gradient and the optimizer's state, in a file.

    The shard is cut into sub-groups. `load_sub_groups` brings one sub-group after the other into host memory,
    where the optimizer updates it. ``masters`` are the parameters of the optimizer, one per sub-group;
    outside `load_sub_groups` they are empty and have no gradient. Host memory for one sub-group,
    ``BUFFER_COUNT`` buffers of the size of the largest, is kept from step to step. States that have another
    shape than their parameter, such as step counters, more bytes per element, or a tensor subclass stay in
    memory.

    With fake tensors nothing is written, but storages are allocated and freed in the same order. All methods
    but `state` raise OSError if the disk is full.
    """

    def __init__(self, bench: Workbench, shard: torch.Tensor, piece_sizes: Sequence[int], most: int) -> None:
        """Write the elements of ``shard`` to the file, in float32, as the master copy. ``piece_sizes``:
        numbers of elements of the pieces of parameters that make up the shard, in order. A sub-group takes
        whole pieces until it has at least ``most`` elements (``_create_fp16_sub_groups`` of
        deepspeed/runtime/zero/stage3.py)."""
        self.bench, self.host = bench, bench.device_of("host")
        self.sizes = sub_group_sizes(piece_sizes, most)
        self.elements = sum(self.sizes)
        self.starts = [0, *itertools.accumulate(self.sizes)][:-1]
        self.file = DiskFile()
        bench.closers.append(self.file.close)
        self.offsets: dict[str, int] = {}  # of the array of each name in the file
        self.end = 0
        self.kept: dict[torch.nn.Parameter, dict[str, torch.dtype]] = {}  # states in the file
        self.buffers: list[torch.Tensor] = []
        with bench.memory_pool("host"):
            self._buffer(BUFFER_COUNT - 1, 0, torch.float32)
            self.masters = [
                torch.nn.Parameter(torch.empty(0, dtype=torch.float32, device=self.host)) for _ in self.sizes
            ]
            for start, size in zip(self.starts, self.sizes, strict=True):
                values = self._buffer(0, size, torch.float32)
                values.copy_(shard.narrow(0, start, size))
                self._write(_MASTER, start, values)

    def write_gradient(self, start: int, grad: torch.Tensor) -> None:
        """Write the fp32 gradient of the elements from ``start`` on, through a buffer in host memory."""
        with self.bench.memory_pool("host"):
            buffer = self._buffer(0, grad.numel(), torch.float32)
            buffer.copy_(grad)
            self._write(_GRADIENT, start, buffer)

    def load_sub_groups(
        self, states: Mapping[torch.nn.Parameter, dict[str, Any]]
    ) -> Iterator[tuple[int, torch.nn.Parameter]]:
        """Yield (first element in the shard, master) of each sub-group. While the caller works with it, the
        master and its gradient have their values, and so have its states in ``states``, those of the
        optimizer, which do not exist before the first step. Afterwards, master and states are written to the
        file, and all three are freed."""
        for start, size, master in zip(self.starts, self.sizes, self.masters, strict=True):
            with self.bench.memory_pool("host"):
                master.data = self._read(_MASTER, start, self._buffer(0, size, torch.float32))
                master.grad = self._read(_GRADIENT, start, self._buffer(1, size, torch.float32))
                for index, (name, dtype) in enumerate(self.kept.get(master, {}).items()):
                    states[master][name].data = self._read(name, start, self._buffer(2 + index, size, dtype))
            yield start, master
            self._put_back(start, master, states.get(master, {}))

    def _put_back(self, start: int, master: torch.nn.Parameter, state: dict[str, Any]) -> None:
        with self.bench.memory_pool("host"):
            kept = {name: value for name, value in state.items() if _is_stored(value, master)}
            self.kept[master] = {name: value.dtype for name, value in kept.items()}
            self._write(_MASTER, start, master)
            for name, value in kept.items():
                self._write(name, start, value)
                value.data = torch.empty(0, dtype=value.dtype, device=self.host)
            master.grad = None
            master.data = torch.empty(0, dtype=master.dtype, device=self.host)

    def state(self, states: Mapping[Any, dict[str, Any]]) -> dict[Any, Any]:
        """Return a copy of ``states``, those of the optimizer, to which is added what this object keeps in
        memory: for each sub-group's parameter that parameter itself as "master", and for the first one also
        the host's buffers as "buffers"."""
        merged: dict[Any, Any] = {m: {_MASTER: m, **states.get(m, {})} for m in self.masters}
        merged[self.masters[0]]["buffers"] = self.buffers
        return merged

    def _buffer(self, index: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the first ``size`` elements of buffer ``index`` in host memory, as elements of ``dtype``.
        Buffers up to this one are made if they do not exist; in a real run on an accelerator, they are
        pinned."""
        pins = self.bench.torch_device != self.host
        while len(self.buffers) <= index:
            size_bytes = 4 * max(self.sizes)
            self.buffers.append(torch.empty(size_bytes, dtype=torch.uint8, device=self.host, pin_memory=pins))
        return self.buffers[index].narrow(0, 0, size * dtype.itemsize).view(dtype)

    def _write(self, name: str, start: int, values: torch.Tensor) -> None:
        if name not in self.offsets:
            self.offsets[name], self.end = self.end, self.end + self.elements * values.element_size()
        if self.bench.on_storage is not None:
            self.bench.on_storage(values.numel() * values.element_size(), 0, self.end)
        if not isinstance(values, FakeTensor):
            self.file.write(raw_bytes(values.detach()), self._place(name, start, values))

    def _read(self, name: str, start: int, values: torch.Tensor) -> torch.Tensor:
        """Fill ``values`` from the file with elements ``start`` and following of the array ``name``, and
        return it. With fake tensors nothing is read."""
        if self.bench.on_storage is not None:
            self.bench.on_storage(0, values.numel() * values.element_size(), self.end)
        if not isinstance(values, FakeTensor):
            self.file.read(raw_bytes(values), self._place(name, start, values))
        return values

    def _place(self, name: str, start: int, values: torch.Tensor) -> int:
        return self.offsets[name] + start * values.element_size()


def sub_group_sizes(piece_sizes: Sequence[int], most: int) -> list[int]:
    """Return the numbers of elements of the sub-groups into which pieces of these sizes are grouped, in
    order. A sub-group takes whole pieces until it has at least ``most`` elements; the last one may have
    fewer. Return [0] if there are no elements."""
    sizes, size = list[int](), 0
    for piece_size in piece_sizes:
        size += piece_size
        if size >= most:
            sizes.append(size)
            size = 0
    return [*sizes, size] if size or not sizes else sizes


def _is_stored(value: Any, master: torch.nn.Parameter) -> bool:
    is_plain = isinstance(value, torch.Tensor) and not is_traceable_wrapper_subclass(value)
    return is_plain and value.shape == master.shape and value.element_size() <= master.element_size()
