"""Which stream each call runs on, over which process group, and which stream waits for which."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

StreamUse = tuple[str, str, tuple[str, int] | None]

_COLLECTIVES = ("c10d", "_c10d_functional")
_TWO_ALONE = (
    *("c10d::send", "c10d::recv_", "c10d::recv_any_source_"),
    *("_c10d_functional::isend", "_c10d_functional::irecv", "_c10d_functional::batch_p2p_ops"),
)
_WAITS = ("_c10d_functional.wait_tensor.default",)


def group_of(func: Any, args: Any) -> str:
    """Return the name of the process group of a collective. Return "" for other operators, which include
    sends and receives between two ranks."""
    if func.namespace not in _COLLECTIVES or func.name() in _TWO_ALONE:
        return ""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return str(torch.distributed.ProcessGroup.unbox(arg).group_name)
    named = zip(func._schema.arguments, args, strict=False)
    return next((str(value) for argument, value in named if argument.name == "group_name"), "")


class StreamTracker:
    """Counts the operator calls of each stream, in ``calls``, and keeps track of collectives that are not yet
    waited for. A functional collective, and a c10d collective called asynchronously, runs on the stream
    "group NAME" of its process group. Other operators run on the current stream."""

    def __init__(self) -> None:
        self.calls = Counter[str]()
        # Storage of a functional collective's result -> (stream, calls).
        self._coming: dict[int, tuple[str, int]] = {}
        # c10d collectives: (stream, calls on it, calls in total).
        self._under_way: list[tuple[str, int, int]] = []

    def note_call(self, func: Any, name: str, args: Any, out: Any, place: str) -> StreamUse | None:
        """Count a call of ``func`` (whose name is ``name``), made while the current stream is ``place`` (""
        for the model's). Return (stream on which it runs, process group or "" if it is no collective, None).
        Return None for a call on the model's stream that is not a collective. If the call waits for a
        functional collective, it is not counted: return what `wait` returns, or None if the collective was
        waited for already."""
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
        """Return (stream, number of its first calls) that the ``wait`` of a c10d collective waits for: up to
        the collective just called, or else up to the oldest one not yet waited for. From then on that
        collective counts as waited for. Return None if all are waited for."""
        if not self._under_way:
            return None
        newest = self._under_way[-1][2] == self.calls.total()
        return self._under_way.pop(-1 if newest else 0)[:2]

    def wait(self, stream: str, awaited: str, calls: int) -> StreamUse | None:
        """Return (``stream``, "", (``awaited``, number of its last calls that are not waited for)) if
        ``stream`` waits for the first ``calls`` calls of the stream ``awaited``, counted from the start.
        Return None if both are the same stream."""
        return None if stream == awaited else (stream, "", (awaited, self.calls[awaited] - calls))


def _apart(func: Any, args: Any) -> bool:
    if func.namespace != "c10d":
        return True
    index = next((i for i, a in enumerate(func._schema.arguments) if a.name in ("asyncOp", "async_op")), None)
    return index is not None and (args[index] if index < len(args) else True) is True


def _storage(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata) if isinstance(tensor, torch.Tensor) else 0
