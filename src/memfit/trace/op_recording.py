"""Record the last forward pass of a trace, operator by operator, to choose what to recompute in backward."""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from memfit.jobs.training_step import TrainingStep
from memfit.techniques.recompute.op_numbering import (
    RecomputeFacts,
    StorageNumbering,
    is_repeatable,
    plain_view,
    storage_key,
    strided_tensors,
    written_tensors,
)
from memfit.trace.allocation_recorder import AllocationRecorder
from memfit.trace.tracer import trace, use_step
from memfit.types.job import Job
from memfit.types.plan import Plan
from memfit.types.recording import ForwardCall, ForwardStorage, Recording
from memfit.types.trace import rounded


def record(job: Job, plan: Plan, *, device: str = "cpu") -> Recording:
    """Trace the job and return a `Recording`: the trace, and the storages and operator calls of its last
    forward pass (of the last micro-batch of the last step). Raises what `trace` raises."""
    last: list[_Recorder] = []

    @contextlib.contextmanager
    def recording() -> Iterator[None]:
        recorder = _Recorder()
        last[:] = [recorder]
        with saved_tensors_hooks(recorder.pack, recorder.unpack), recorder:
            yield

    def make_step(*args: Any, **kwargs: Any) -> TrainingStep:
        step = TrainingStep(*args, **kwargs)
        step.bench.forward_contexts.append(recording)
        return step

    with use_step(make_step):
        job_trace = trace(job, plan, device=device)
    (recorder,) = last
    return Recording(
        trace=job_trace,
        key=recorder.key,
        start=recorder.start,
        storages=recorder.storages(),
        calls=tuple(recorder.calls),
    )


class _Recorder(StorageNumbering):
    """Dispatch mode that records the operators of a forward pass and, as hooks of saved tensors, what
    backward reads. All clocks are those of the AllocationRecorder, which is ``recorder``.

    A result is a storage that an operator makes. All results stay as they are: none is dropped to be
    recomputed. ``of`` (the calls that make or write the result), ``lives`` (the records of its storage),
    ``dtypes`` and ``last_read`` (a clock) are indexed by a result's number (`StorageNumbering`). ``needs``
    maps the number to the clocks at which backward reads the result; ``pinned`` holds the numbers of results
    that cannot be recomputed.
    """

    def __init__(self) -> None:
        super().__init__()
        modes = _get_current_dispatch_mode_stack()
        self.recorder: AllocationRecorder = next(m for m in modes if isinstance(m, AllocationRecorder))
        self.start = self.recorder.clock
        self.calls: list[ForwardCall] = []
        self.of: list[list[int]] = []  # indices of the calls that make or write each result
        self.lives: list[Any] = []
        self.dtypes: list[torch.dtype] = []
        self.last_read: list[int] = []
        self.needs: defaultdict[int, list[int]] = defaultdict(list)
        self.pinned: set[int] = set()
        self._numbers: dict[int, tuple[weakref.ref[Any], int]] = {}  # by storage, while the storage is alive
        self._readers: defaultdict[int, set[int]] = defaultdict(set)  # storage -> results made from it

    def number(self, tensor: torch.Tensor) -> int | None:
        entry = self._numbers.get(storage_key(tensor))
        return entry[1] if entry is not None else None

    sees_views = True

    def before(self, facts: RecomputeFacts, func: Any, args: Any, kwargs: Any) -> Any:
        return self.recorder.clock

    def after(
        self, func: Any, args: Any, kwargs: Any, new_storages: list[tuple[int, torch.Tensor]], state: Any
    ) -> None:
        inputs = list(strided_tensors((args, tuple(kwargs.values()))))
        write_targets = written_tensors(func, args, kwargs)
        reads = dict.fromkeys(n for n in map(self.number, inputs) if n is not None)
        for number in reads:
            self.last_read[number] = self.recorder.clock
        target_numbers = [n for n in map(self.number, write_targets) if n is not None]
        if not (new_storages or target_numbers):
            return
        index = len(self.calls)
        self.calls.append(ForwardCall(clock=state, reads=tuple(reads)))
        new_numbers = range(self.count, self.count + len(new_storages))
        for target in target_numbers:
            self.of[target].append(index)
        keys = {storage_key(t) for t in inputs}
        for number, (_, tensor) in zip(new_numbers, new_storages, strict=True):
            self._born(number, tensor, index, shared=storage_key(tensor) in keys)
        self._pin(write_targets, target_numbers, new_numbers, kwargs)
        self.pinned.update(n for t in inputs if (n := self.number(t)) is not None and not self._plain(n, t))
        for tensor in inputs:
            self._readers[storage_key(tensor)].update((*new_numbers, *target_numbers))

    def _pin(
        self, write_targets: list[torch.Tensor], target_numbers: list[int], new_numbers: range, kwargs: Any
    ) -> None:
        """Add to ``pinned`` the results that cannot be recomputed because of a call with these ``kwargs``. A
        result made from a tensor that the call overwrites would have to be recomputed before that write. The
        results that the call makes (``new_numbers``) or writes to (``target_numbers``) are pinned if it
        cannot be repeated, writes to several tensors, or writes through a view whose size, stride and offset
        do not fully describe it. ``write_targets``: all tensors that it writes to."""
        for tensor in write_targets:
            readers = self._readers[storage_key(tensor)]
            self.pinned |= readers - {self.number(tensor)}
        has_odd_view = any(not self._plain(n, t) for t in write_targets if (n := self.number(t)) is not None)
        if (
            not is_repeatable(kwargs, len(write_targets) - len(target_numbers))
            or len(write_targets) > 1
            or has_odd_view
        ):
            self.pinned.update((*new_numbers, *target_numbers))

    def _plain(self, number: int, tensor: torch.Tensor) -> bool:
        return plain_view(tensor, self.dtypes[number])

    def _born(self, number: int, tensor: torch.Tensor, call: int, *, shared: bool) -> None:
        storage, key, numbers = tensor.untyped_storage(), storage_key(tensor), self._numbers
        self.of.append([call])
        self.lives.append(self.recorder.note_real(tensor, ""))
        self.dtypes.append(tensor.dtype)
        self.last_read.append(self.recorder.clock)
        if shared or key in numbers:  # the storage is that of an argument or of an earlier output
            self.pinned.add(number)
            return
        self._readers.pop(key, None)  # they belong to a freed storage that had the same address

        def died(reference: Any) -> None:
            if key in numbers and numbers[key][0] is reference:
                del numbers[key]

        numbers[key] = (weakref.ref(storage, died), number)

    def pack(self, tensor: torch.Tensor) -> Any:
        number = self.number(tensor) if tensor.layout is torch.strided else None
        if number is None:
            return tensor
        if not self._plain(number, tensor):
            self.pinned.add(number)
        return number, tensor

    def unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, tuple):
            number, packed = packed
            self.needs[number].append(self.recorder.clock)
        return packed  # type: ignore[no-any-return]

    def storages(self) -> tuple[ForwardStorage, ...]:
        return tuple(
            ForwardStorage(
                size_bytes=rounded(life.size_bytes, self.recorder.device),
                start=life.start,
                end=life.end,
                last_read=self.last_read[number],
                calls=tuple(self.of[number]),
                needs=tuple(self.needs[number]),
                pinned=number in self.pinned,
            )
            for number, life in enumerate(self.lives)
        )
