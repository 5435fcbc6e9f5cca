"""Which tensors lie in memory that torch's CPU allocator did not make: numpy arrays, and mapped files."""

from __future__ import annotations

import bisect
import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

_MAPS = Path("/proc/self/maps")
_SHARING = ("from_numpy", "frombuffer", "as_tensor", "asarray", "from_dlpack")  # functions that may not copy


class ForeignMemory:
    """Tells whether torch's CPU allocator made the memory of a tensor."""

    def __init__(self) -> None:
        self._shared: dict[int, weakref.ref[Any]] = {}  # storages that share memory with other libraries
        self._starts: list[int] = []  # of mapped regions, in order
        self._regions: list[tuple[int, int, bool]] = []  # start, end, whether it is a file

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether the tensor's memory is not torch's. Where that cannot be found out, it is taken to
        be torch's."""
        storage = tensor.untyped_storage()
        if storage.resizable():
            return False
        entry = self._shared.get(storage._cdata)
        return (entry is not None and entry() is storage) or self._is_file(storage.data_ptr())

    def _is_file(self, address: int) -> bool:
        region = self._region(address)
        if region is None:
            self._read_regions()
            region = self._region(address)
        return region is not None and region[2]

    def _region(self, address: int) -> tuple[int, int, bool] | None:
        index = bisect.bisect_right(self._starts, address) - 1
        if index >= 0 and self._regions[index][0] <= address < self._regions[index][1]:
            return self._regions[index]
        return None

    def _read_regions(self) -> None:
        with contextlib.suppress(OSError):
            regions = []
            for line in _MAPS.read_text().splitlines():
                fields = line.split(maxsplit=5)
                start, end = (int(text, 16) for text in fields[0].split("-"))
                regions.append((start, end, len(fields) > 5 and fields[5].startswith("/")))
            self._regions, self._starts = regions, [r[0] for r in regions]

    @contextlib.contextmanager
    def notice_shared(self) -> Iterator[None]:
        """Inside this context, notice tensors that share memory with arrays of other libraries."""
        with contextlib.ExitStack() as stack:
            for name in _SHARING:
                stack.enter_context(mock.patch.object(torch, name, self._noticing(getattr(torch, name))))
            yield

    def _noticing(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def noticing(*args: Any, **kwargs: Any) -> Any:
            out = inner(*args, **kwargs)
            if type(out) is torch.Tensor and out.device.type == "cpu":
                storage = out.untyped_storage()
                if not storage.resizable():
                    self._shared[storage._cdata] = weakref.ref(storage)
            return out

        return noticing
