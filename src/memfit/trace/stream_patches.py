"""Patches of torch's CPU streams while tracing: named streams on which work is recorded."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from memfit.trace.allocation_recorder import Ledger


class _Event(torch.cpu.Event):
    """An event that stands for the calls of a stream before it was recorded: ``at`` is (stream, number of
    these calls). If a stream waits for the event, the ledger records that it waits for these calls."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.at = ledger, ("", 0)

    def record(self, stream: Any = None) -> None:
        name = stream.name if isinstance(stream, _Stream) else self.ledger.place
        self.at = (name, self.ledger.flows.calls[name])

    def wait(self, stream: Any = None) -> None:
        self.ledger.wait(stream.name if isinstance(stream, _Stream) else self.ledger.place, *self.at)


class _Stream(torch.cpu.Stream):
    def __init__(self, ledger: Ledger, name: str) -> None:
        self.ledger, self.name = ledger, name

    def wait_stream(self, stream: Any) -> None:
        if isinstance(stream, _Stream):
            self.ledger.wait(self.name, stream.name, self.ledger.flows.calls[stream.name])

    def record_event(self) -> Any:
        event = _Event(self.ledger)
        event.record(self)
        return event

    def wait_event(self, event: Any) -> None:
        if isinstance(event, _Event):
            event.wait(self)


@contextlib.contextmanager
def streams(ledger: Ledger) -> Iterator[None]:
    """Inside this context, patch CPU streams so that the ledger records them. FSDP2 gathers and reduces on
    streams of its own, each of which has a memory pool of its own in the CUDA allocator. In a trace FSDP2
    gets CPU streams. They are named "stream 1" and so on. The ledger records storages that are made on a
    stream as lying in its pool, and it records waits for streams and for collectives."""
    numbers = itertools.count(1)

    def made(priority: int = -1) -> _Stream:
        return _Stream(ledger, f"stream {next(numbers)}")

    def enter(stream: Any) -> Any:
        return ledger.placed(stream.name) if isinstance(stream, _Stream) else contextlib.nullcontext()

    def current(device: Any = None) -> _Stream:
        return _Stream(ledger, ledger.place)

    def waited(self: Any, *args: Any, **kwargs: Any) -> bool:
        if (awaited := ledger.flows.next_under_way()) is not None:
            ledger.wait(ledger.place, *awaited)
        return True

    event = functools.partial(_Event, ledger)
    work = torch._C._distributed_c10d.Work
    with (
        mock.patch.multiple(torch.cpu, Stream=made, Event=event, stream=enter, current_stream=current),
        # Called if a gathered parameter was not used.
        mock.patch.object(torch.accelerator, "current_stream", current),
        mock.patch.object(work, "wait", waited),
    ):
        yield
