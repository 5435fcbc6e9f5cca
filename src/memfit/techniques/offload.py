"""Offload of saved tensors: what backward needs is moved to disk or host memory and read back. Results are
bitwise equal (E0)."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from memfit.techniques.base import Knob, StepPart, Technique, Workbench
from memfit.types.device_kind import HOST, device_kind
from memfit.types.plan import EffectClass, KnobValue


def _apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    minimum = int(settings["minimum_kib"]) * 1024
    if settings["to"] == "host":
        if bench.device.is_host:
            return  # saved tensors are in host memory already
        bench.forward_contexts.append(HostCopies(bench, minimum).hooks)
        return
    spool = DiskSpool(bench, minimum)
    bench.forward_contexts.append(spool.hooks)


class _SavedTensorOffload:
    """Base class of `HostCopies` and `DiskSpool`, which keep tensors that autograd saves for backward in host
    memory or in a file. Inside the context `hooks`, a saved tensor whose storage has at least
    ``minimum_bytes`` is replaced by such a copy, which is read back when backward needs the tensor.
    Parameters stay, because they are in memory anyway, and so do tensors for which `_can` returns False. If
    several operators save the same elements of a storage, these are copied once, unless they have been
    changed in between, and read back for each operator."""

    def __init__(self, bench: Workbench, minimum_bytes: int) -> None:
        self.bench, self.minimum_bytes = bench, minimum_bytes
        self.resident: dict[int, Any] = {}  # storage address -> parameter
        # What is offloaded, keyed by what it is a copy of. The storage's weak reference keeps its address
        # from being reused.
        self.gone: dict[tuple[Any, ...], tuple[Any, weakref.ref[Any]]] = {}

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        from torch.autograd.graph import saved_tensors_hooks

        self.resident = {p.untyped_storage()._cdata: p for p in self.bench.model.parameters()}
        self.gone.clear()
        with saved_tensors_hooks(self._pack, self._unpack):
            yield
        self._finish()
        self.gone.clear()

    def _finish(self) -> None:
        """Called when forward ends. Wait for copies that are under way; by default there are none."""

    def _pack(self, tensor: Any) -> Any:
        from torch.multiprocessing.reductions import StorageWeakRef

        storage = tensor.untyped_storage()
        if storage.nbytes() < self.minimum_bytes or self._is_resident(storage) or not self._can(tensor):
            return tensor
        size_bytes = tensor.numel() * tensor.element_size()
        # Contiguous tensors have the same order of elements in memory whatever their shape.
        shape = tensor.numel() if tensor.is_contiguous() else (tensor.shape, tensor.stride())
        key = (storage._cdata, tensor._version, tensor.storage_offset(), shape, tensor.dtype)
        entry = self.gone.get(key)
        stored_copy = entry[1]() if entry is not None else None
        if self.bench.on_offload is not None:
            self.bench.on_offload(0 if stored_copy is not None else size_bytes, size_bytes)
        if stored_copy is None:
            stored_copy = self._put(tensor)
            self.gone[key] = StorageWeakRef(storage), weakref.ref(stored_copy)
        return _Saved(stored_copy, tensor.shape)

    def _unpack(self, packed: Any) -> Any:
        return packed.copy.back().view(packed.shape) if isinstance(packed, _Saved) else packed

    def _is_resident(self, storage: Any) -> bool:
        """Return whether the storage now belongs to a parameter. The address alone does not tell: ZeRO 3
        gives parameters new storages in forward, so that another tensor may get the address of the old
        one."""
        param = self.resident.get(storage._cdata)
        return param is not None and param.untyped_storage()._cdata == storage._cdata

    def _can(self, tensor: Any) -> bool:
        return True

    def _put(self, tensor: Any) -> Any:
        """Copy the tensor to host memory or the file. Return an object whose ``back()`` returns the copied
        elements in a new tensor, which may be one-dimensional."""
        raise NotImplementedError


class _Saved(NamedTuple):
    copy: Any
    shape: Any


class HostCopies(_SavedTensorOffload):
    """Keeps tensors that autograd saves for backward in host memory, and copies them back when backward needs
    them.

    On a device with streams, the host memory is pinned, and a copy to it runs on a stream of its own while
    the next operators run. The tensor is therefore kept on the device until the next one is offloaded or
    forward ends, and computing waits for the copy then. A device without streams (MPS) copies at once, to
    memory that is not pinned. In a trace, fake tensors of both places are on the CPU, and nothing is
    copied."""

    def __init__(self, bench: Workbench, minimum_bytes: int) -> None:
        super().__init__(bench, minimum_bytes)
        self.stream: Any = None  # made by the first copy of a real tensor
        self.underway: tuple[Any, HostCopy] | None = None  # tensor and its copy

    def _put(self, tensor: Any) -> Any:
        import torch

        self._finish()
        if self.bench.torch_device != HOST and self.bench.device.streams and self.stream is None:
            self.stream = torch.Stream(device=tensor.device)
        source = tensor.detach()
        with self.bench.memory_pool("host"):
            copy = HostCopy(source, self.stream)
        self.underway = source, copy
        return copy

    def _finish(self) -> None:
        if self.underway is not None:
            self.underway[1].wait()
            self.underway = None


class HostCopy:
    """A copy of ``tensor`` in host memory. With a ``stream``, it is in pinned memory and is made on that
    stream; the tensor must then be kept until `wait` has been called. If ``stream`` is None, it is made at
    once, in memory that is not pinned."""

    def __init__(self, tensor: Any, stream: Any) -> None:
        import torch

        self.device, self.event = tensor.device, None
        if stream is None:
            self.copy = tensor.to(HOST, copy=True)
            return
        self.copy = torch.empty_like(tensor, device=HOST, pin_memory=True)
        stream.wait_stream(torch.accelerator.current_stream(self.device))
        with stream:
            self.copy.copy_(tensor, non_blocking=True)
            self.event = stream.record_event()

    def wait(self) -> None:
        """Make operators that run on the device from now on wait for the copy. Do nothing if it was made at
        once."""
        import torch

        if self.event is not None:
            torch.accelerator.current_stream(self.device).wait_event(self.event)

    def back(self) -> Any:
        """Return a new tensor like the original, on the original's device."""
        self.wait()
        return self.copy.to(self.device, non_blocking=True, copy=True)


class DiskSpool(_SavedTensorOffload):
    """Keeps contiguous tensors that autograd saves for backward in a file, and reads them back when backward
    needs them. Other tensors stay in memory. The file has no name, so that it disappears however the process
    ends. With fake tensors nothing is written, but storages are allocated and freed in the same order."""

    def __init__(self, bench: Workbench, minimum_bytes: int) -> None:
        super().__init__(bench, minimum_bytes)
        self.spool = Spool()
        bench.closers.append(self.spool.close)

    def _can(self, tensor: Any) -> bool:
        return bool(tensor.is_contiguous())

    def _put(self, tensor: Any) -> Any:
        return SpooledTensor(tensor, self.spool)


class DiskFile:
    """A temporary file without a name, so that it disappears however the process ends. The first write
    creates it, in the folder of temporary files (TMPDIR)."""

    def __init__(self) -> None:
        self._file: Any = None
        self._lock = threading.Lock()  # backward may run on its own threads

    def write(self, data: memoryview, place: int) -> None:
        """Write ``data`` to the file at ``place``, an offset in bytes. Raises OSError if the disk is full."""
        with self._lock:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="memfit-offload-", buffering=0)  # noqa: SIM115
            self._file.seek(place)
            while data.nbytes:
                data = data[self._file.write(data) :]

    def read(self, data: memoryview, place: int) -> None:
        """Fill ``data`` with what the file holds at ``place``, an offset in bytes. Raises OSError if the file
        ends before ``data`` is full."""
        with self._lock:
            self._file.seek(place)
            while data.nbytes:
                if not (count := self._file.readinto(data)):
                    raise OSError("the file of offloaded tensors is truncated")
                data = data[count:]

    def close(self) -> None:
        """Close the file, which deletes it. Do nothing if nothing has been written."""
        if self._file is not None:
            self._file.close()


class Spool:
    """A temporary file that holds pieces of data, each at its place, an offset in bytes. A place that has
    been freed is reused for data of the same size before the file grows, because overwriting pages that the
    operating system has cached is several times faster than writing new ones."""

    def __init__(self) -> None:
        self._file = DiskFile()
        self._end = 0
        self._free: dict[int, list[int]] = {}
        self.read, self.close = self._file.read, self._file.close

    def write(self, data: memoryview) -> int:
        """Write ``data`` and return its place, an offset in bytes. Raises OSError if the disk is full."""
        free_places = self._free.get(data.nbytes)
        place = free_places.pop() if free_places else self._end
        self._end = max(self._end, place + data.nbytes)
        self._file.write(data, place)
        return place

    def free(self, place: int, size_bytes: int) -> None:
        """Mark a place, to which `write` wrote ``size_bytes`` bytes, as free for data of that size."""
        self._free.setdefault(size_bytes, []).append(place)


class SpooledTensor:
    """The elements of a contiguous tensor, written to a spool. Their place there is freed when this object is
    deleted. The elements of a fake tensor are not written."""

    def __init__(self, tensor: Any, spool: Spool) -> None:
        from torch._subclasses.fake_tensor import FakeTensor

        self.count, self.dtype, self.device = tensor.numel(), tensor.dtype, tensor.device
        self.spool = spool
        self.size_bytes = tensor.numel() * tensor.element_size()
        self.place: int | None = None
        if not isinstance(tensor, FakeTensor):
            self.place = spool.write(raw_bytes(tensor.detach().cpu()))

    def back(self) -> Any:
        """Return the elements as a new one-dimensional tensor on the device of the original (without values
        for a fake tensor)."""
        import torch

        if self.place is None:
            return torch.empty(self.count, dtype=self.dtype, device=self.device)
        tensor = torch.empty(self.count, dtype=self.dtype)
        self.spool.read(raw_bytes(tensor), self.place)
        return tensor.to(self.device)

    def __del__(self) -> None:
        if self.place is not None:
            self.spool.free(self.place, self.size_bytes)


def raw_bytes(tensor: Any) -> memoryview:
    """Return the bytes of ``tensor``, which must be contiguous and in host memory, as a one-dimensional view
    of its memory. Writing to the view changes the tensor."""
    import torch

    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


TECHNIQUE = Technique(
    name="activation-offload",
    summary="move what backward needs out of memory after forward, and back just before its use",
    script_call="torch.autograd.graph.save_on_cpu(pin_memory=True) around the forward pass",
    changes=StepPart.NONE,
    pins_host_memory=True,
    before_engine=True,
    effect=EffectClass.E0,
    apply=_apply,
    settings=lambda facts: [
        {"to": "disk" if device_kind(facts.device_kind).is_host else "host", "minimum_kib": 64}
    ],
    order=90,
    knobs=(
        Knob(
            name="to",
            default="disk",
            doc="where tensors saved for backward are kept; disk: in a temporary file; host: in host memory, "
            "which changes nothing on a CPU",
            choices=("disk", "host"),
        ),
        Knob(
            name="minimum_kib",
            default=64,
            doc="tensors whose storage is smaller than this many KiB stay in memory; parameters always do",
        ),
    ),
)
