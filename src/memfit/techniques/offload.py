"""Saved-tensor offload: what backward needs is written to disk (or host memory) and read back (E0)."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from memfit.techniques.base import Knob, Space, Technique, Workbench
from memfit.types.plan import EffectClass, KnobValue


def _apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    minimum = int(settings["minimum_kib"]) * 1024
    if settings["to"] == "host":
        if bench.device == "cpu":
            return  # saved tensors are in host memory already
        bench.forward_contexts.append(HostCopies(bench, minimum).hooks)
        return
    spool = DiskSpool(bench, minimum)
    bench.forward_contexts.append(spool.hooks)


class _Away:
    """Keeps saved tensors of at least ``minimum_bytes`` elsewhere; parameters are in memory
    anyway."""

    def __init__(self, bench: Workbench, minimum_bytes: int) -> None:
        self.bench, self.minimum_bytes = bench, minimum_bytes
        self.resident: dict[int, Any] = {}  # by the address of the storage: the parameter

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        from torch.autograd.graph import saved_tensors_hooks

        self.resident = {p.untyped_storage()._cdata: p for p in self.bench.model.parameters()}
        with saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.nbytes() < self.minimum_bytes or self._is_resident(storage) or not self._can(tensor):
            return tensor
        if self.bench.on_offload is not None:
            self.bench.on_offload(tensor.numel() * tensor.element_size())
        return self._put(tensor)

    def _is_resident(self, storage: Any) -> bool:
        """ZeRO 3 gives parameters other storages in forward; what had theirs may then have the address."""
        param = self.resident.get(storage._cdata)
        return param is not None and param.untyped_storage()._cdata == storage._cdata

    def _can(self, tensor: Any) -> bool:
        return True

    def _put(self, tensor: Any) -> Any:
        raise NotImplementedError

    def _unpack(self, packed: Any) -> Any:
        raise NotImplementedError


class HostCopies(_Away):
    """In host memory."""

    def _put(self, tensor: Any) -> Any:
        with self.bench.place("host"):  # a fake tensor of either place is on the CPU
            return tensor.device, tensor.detach().to("cpu", copy=True)

    def _unpack(self, packed: Any) -> Any:
        if not isinstance(packed, tuple):
            return packed
        device, copy = packed
        return copy.to(device, copy=True)


class DiskSpool(_Away):
    """In files of a temporary folder. Under fake tensors nothing is written, but storages come and go in the
    same order."""

    def __init__(self, bench: Workbench, minimum_bytes: int) -> None:
        super().__init__(bench, minimum_bytes)
        self.count = 0
        self.folder = tempfile.TemporaryDirectory(prefix="memfit-offload-")
        bench.closers.append(self.folder.cleanup)

    def _can(self, tensor: Any) -> bool:
        return bool(tensor.is_contiguous())

    def _put(self, tensor: Any) -> Any:
        self.count += 1
        return Parked(tensor, Path(self.folder.name) / str(self.count))

    def _unpack(self, packed: Any) -> Any:
        return packed.restore() if isinstance(packed, Parked) else packed


class Parked:
    """A tensor on disk: raw bytes, shape and dtype."""

    def __init__(self, tensor: Any, path: Path) -> None:
        from torch._subclasses.fake_tensor import FakeTensor

        self.shape, self.dtype, self.path = tensor.shape, tensor.dtype, path
        self.fake = isinstance(tensor, FakeTensor)
        if not self.fake:
            import torch

            tensor.detach().view(-1).view(torch.uint8).numpy().tofile(path)

    def restore(self) -> Any:
        import torch

        tensor = torch.empty(self.shape, dtype=self.dtype)
        if not self.fake:
            flat: Any = tensor.view(-1).view(torch.uint8).numpy()
            with self.path.open("rb") as file:
                file.readinto(memoryview(flat))
        return tensor

    def __del__(self) -> None:
        if not self.fake:
            self.path.unlink(missing_ok=True)


def _settings(space: Space) -> Iterable[Mapping[str, KnobValue]]:
    where = "disk" if space.device == "cpu" else "host"
    return [{"to": where, "minimum_kib": 64}]


TECHNIQUE = Technique(
    name="activation-offload",
    summary="move what backward needs out of memory after forward and back when it is its turn",
    effect=EffectClass.E0,
    apply=_apply,
    settings=_settings,
    order=90,
    knobs=(
        Knob(name="to", default="disk", doc="where saved tensors wait", choices=("disk", "host")),
        Knob(name="minimum_kib", default=64, doc="smaller tensors stay"),
    ),
)
