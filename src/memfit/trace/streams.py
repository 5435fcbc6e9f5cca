"""Which stream every call runs on, over which process group, and which stream waits for which."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

Flow = tuple[str, str, tuple[str, int] | None]

_COLLECTIVES = ("c10d", "_c10d_functional")
_TWO_ALONE = ("c10d::send", "c10d::recv_", "c10d::recv_any_source_")
_WAITS = ("_c10d_functional.wait_tensor.default",)


def group_of(func: Any, args: Any) -> str:
    """Name of the process group over which it is a collective; "" where it is none."""
    if func.namespace not in _COLLECTIVES or func.name() in _TWO_ALONE:
        return ""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return str(torch.distributed.ProcessGroup.unbox(arg).group_name)
    return next((a for a in args[1:] if isinstance(a, str) and a.isdigit()), "")


class Flows:
    """Calls counted by stream. A functional collective, and one of c10d that is asked for without waiting,
    runs on a stream of its group's; others on the stream that is current."""

    def __init__(self) -> None:
        self.calls = Counter[str]()
        self._coming: dict[int, tuple[str, int]] = {}  # by storage: what a functional collective makes
        self._under_way: list[tuple[str, int, int]] = []  # of c10d: stream, calls of it, calls in all

    def of(self, func: Any, name: str, args: Any, out: Any, place: str) -> Flow | None:
        if name in _WAITS:
            awaited = self._coming.pop(_storage(args[0]), None)
            return self.wait(place, *awaited) if awaited else None
        group = group_of(func, args)
        stream = place
        if group and _apart(func, args):
            stream = f"group {group}"
        self.calls[stream] += 1
        if group and func.namespace == "c10d":
            self._under_way.append((stream, self.calls[stream], self.calls.total()))
        elif group:
            self._note_coming(stream, out)
        return (stream, group, None) if stream or group else None

    def _note_coming(self, stream: str, out: Any) -> None:
        for tensor in out if isinstance(out, list | tuple) else [out]:
            self._coming[_storage(tensor)] = (stream, self.calls[stream])

    def next_under_way(self) -> tuple[str, int] | None:
        """What a c10d collective's ``wait`` waits for: for the one just asked for, or in the order in which
        they were."""
        if not self._under_way:
            return None
        newest = self._under_way[-1][2] == self.calls.total()
        return self._under_way.pop(-1 if newest else 0)[:2]

    def wait(self, stream: str, awaited: str, calls: int) -> Flow | None:
        """None where a stream would wait for itself."""
        return None if stream == awaited else (stream, "", (awaited, self.calls[awaited] - calls))


def _apart(func: Any, args: Any) -> bool:
    if func.namespace != "c10d":
        return True
    at = next((i for i, a in enumerate(func._schema.arguments) if a.name in ("asyncOp", "async_op")), None)
    return at is not None and (args[at] if at < len(args) else True) is True


def _storage(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata) if isinstance(tensor, torch.Tensor) else 0
