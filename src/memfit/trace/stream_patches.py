"""Patches of torch's CPU streams while tracing: named streams on which work is recorded."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from memfit.trace.allocation_recorder import AllocationRecorder


class _Event(torch.cpu.Event):
    """Event of a patched CPU stream. ``record`` sets ``at`` to (stream, number of its operator calls so far).
    ``wait`` lets the recorder record that a stream (None: the current one) waits for these calls."""

    def __init__(self, recorder: AllocationRecorder) -> None:
        self.recorder, self.at = recorder, ("", 0)

    def record(self, stream: Any = None) -> None:
        name = stream.name if isinstance(stream, _Stream) else self.recorder.memory_pool
        self.at = (name, self.recorder.stream_tracker.calls[name])

    def wait(self, stream: Any = None) -> None:
        self.recorder.wait(
            stream.name if isinstance(stream, _Stream) else self.recorder.memory_pool, *self.at
        )


class _Stream(torch.cpu.Stream):
    def __init__(self, recorder: AllocationRecorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def wait_stream(self, stream: Any) -> None:
        if isinstance(stream, _Stream):
            self.recorder.wait(self.name, stream.name, self.recorder.stream_tracker.calls[stream.name])

    def record_event(self) -> Any:
        event = _Event(self.recorder)
        event.record(self)
        return event

    def wait_event(self, event: Any) -> None:
        if isinstance(event, _Event):
            event.wait(self)


@contextlib.contextmanager
def streams(recorder: AllocationRecorder) -> Iterator[None]:
    """Inside this context, patch CPU streams so that the recorder records them. FSDP2 gathers and reduces on
    streams of its own, each of which has a memory pool of its own in the CUDA allocator. In a trace FSDP2
    gets CPU streams, which are named "stream 1" and so on in the order in which they are made. The recorder
    records storages that are made on a stream as lying in its pool, and it records waits for streams and for
    collectives."""
    numbers = itertools.count(1)

    def make_stream(priority: int = -1) -> _Stream:
        return _Stream(recorder, f"stream {next(numbers)}")

    def enter(stream: Any) -> Any:
        return (
            recorder.in_memory_pool(stream.name) if isinstance(stream, _Stream) else contextlib.nullcontext()
        )

    def current(device: Any = None) -> _Stream:
        return _Stream(recorder, recorder.memory_pool)

    def waited(self: Any, *args: Any, **kwargs: Any) -> bool:
        if (awaited := recorder.stream_tracker.next_under_way()) is not None:
            recorder.wait(recorder.memory_pool, *awaited)
        return True

    event = functools.partial(_Event, recorder)
    work = torch._C._distributed_c10d.Work
    with (
        mock.patch.multiple(torch.cpu, Stream=make_stream, Event=event, stream=enter, current_stream=current),
        # Called if a gathered parameter was not used.
        mock.patch.object(torch.accelerator, "current_stream", current),
        mock.patch.object(work, "wait", waited),
    ):
        yield
