"""Repeat the forward and backward pass of a traced step in the next one without running it again.

A trace of one process has two steps, because the optimizer makes its state in the first. The forward and
backward passes of both are equal event by event, unless something in them depends on what came before. Where
nothing is seen that does (`PassReplay.repeats`), the second is a copy of the first, and only the optimizer
runs.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memfit.jobs.training_step import OnPhase, TrainingStep
from memfit.trace.allocation_recorder import AllocationRecorder, Life
from memfit.trace.operators import NewTensors, fresh_layout
from memfit.types.trace import Phase

_PLAIN = (bool, int, float, str, type(None))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Gradient:
    """The gradient of ``param`` after a pass, on fake tensors of ``mode``. ``index``: of its storage among
    those made in the pass."""

    param: torch.nn.Parameter
    mode: FakeTensorMode
    layout: NewTensors
    index: int


class PassReplay:
    """The forward and backward pass of a step, from the recording of its batch to the optimizer.

    It is made before the batch is recorded. The step runs with ``watched(mark)`` in place of its ``mark``,
    and `end` is called when nothing holds its batch and results any more. Then `repeats` says whether the
    pass of a further step is equal, and `replay` takes the place of running it.
    """

    def __init__(self, recorder: AllocationRecorder, step: TrainingStep, batch: Any) -> None:
        self._recorder, self._step, self._batch = recorder, step, _layouts(batch)
        self._start, self._first_life, self._first_call = (
            recorder.clock,
            len(recorder.lives),
            recorder.call_count,
        )
        self._clocks: dict[Phase, int] = {}
        self._states: dict[Phase, Any] = {}
        self._gradients: list[_Gradient] | None = None
        self._lives: list[Life] = []
        self._last_ends: list[int] = []  # indices of the storages that end after the step, in their order
        self._open: list[Life] = []  # the copies of these in a step that is replayed
        self._offloaded = (0, 0, 0)

    def watched(self, mark: OnPhase) -> OnPhase:
        def marked(phase: Phase) -> None:
            if phase is Phase.OPTIMIZER:
                recorder = self._recorder
                self._last_life, self._last_call = len(recorder.lives), recorder.call_count
                self._gradients = self._find_gradients()
                self._offloaded = recorder.offloaded
            self._states[phase] = self._observe()
            self._clocks[phase] = self._recorder.clock
            mark(phase)

        return marked

    def end(self) -> None:
        """Record, after a step that was replayed, that its batch and results have ended. After the step that
        ran, find out whether its pass left only gradients behind."""
        if self._lives:
            for life in self._open:
                self._recorder.end(life)
            return
        lives, update = self._recorder.lives, self._clocks[Phase.OPTIMIZER]
        after_update = self._recorder.spans[-1].end
        self._lives = lives[self._first_life : self._last_life]
        gradients = {g.index for g in self._gradients or ()}
        ends = {i: life.end for i, life in enumerate(self._lives) if i not in gradients}
        late = {i: end for i, end in ends.items() if end is None or end >= update}
        self._last_ends = sorted(late, key=lambda i: late[i] or 0)
        frees_older = any(
            life.end is not None and self._start <= life.end < update for life in lives[: self._first_life]
        )
        if frees_older or any(end is None or end < after_update for end in late.values()):
            self._gradients = None

    def repeats(self, batch: Any) -> bool:
        """Return whether a pass on ``batch`` is equal to this one: the batch has the same layout; the pass
        left nothing behind but gradients, each in a storage of its own; it ran on one stream and read no
        values; and it changed no number, text, switch or length of a container of a module, nor the state of
        Python's or numpy's random numbers."""
        return (
            self._gradients is not None
            and self._states[Phase.FORWARD] == self._states[Phase.OPTIMIZER]
            and self._batch is not None
            and self._batch == _layouts(batch)
            and not self._recorder.uses_streams(self._first_call)
        )

    def replay(self, mark: OnPhase) -> None:
        """Record the pass again, at the recorder's present clock and step, and give the parameters their
        gradients."""
        recorder = self._recorder
        assert self._gradients is not None
        shift, update = recorder.clock - self._start, self._clocks[Phase.OPTIMIZER]
        copies = [
            dataclasses.replace(
                life,
                start=life.start + shift,
                end=life.end + shift if life.end is not None and life.end < update else None,
                step=recorder.step,
            )
            for life in self._lives
        ]
        recorder.lives += copies
        recorder.repeat_calls(recorder.calls_between(self._first_call, self._last_call), shift, {})
        recorder.offloaded = self._offloaded
        for phase in (Phase.FORWARD, Phase.BACKWARD):
            recorder.clock = self._clocks[phase] + shift
            recorder.phase(phase)
        recorder.clock = update + shift
        for gradient in self._gradients:
            grad = gradient.layout.make(gradient.mode)
            recorder.adopt(grad, copies[gradient.index])
            gradient.param.grad = grad
        self._open = [copies[i] for i in self._last_ends]
        mark(Phase.OPTIMIZER)

    def _find_gradients(self) -> list[_Gradient] | None:
        indices = {id(life): i for i, life in enumerate(self._recorder.lives[self._first_life :])}
        gradients: list[_Gradient] = []
        for param in self._step.bench.trainable():
            if (grad := param.grad) is None:
                continue
            layout = fresh_layout(grad)
            index = indices.pop(id(self._recorder.life_of(grad)), None) if layout is not None else None
            if layout is None or index is None or not isinstance(grad, FakeTensor):
                return None
            gradients.append(_Gradient(param=param, mode=grad.fake_mode, layout=layout, index=index))
        return gradients

    def _observe(self) -> Any:
        numpy = sys.modules.get("numpy.random")
        drawn = numpy.get_state()[1:3] if numpy is not None else (b"", 0)
        settings = [
            tuple((k, v if isinstance(v, _PLAIN) else len(v)) for k, v in vars(module).items() if _shows(v))
            for module in self._step.model.modules()
        ]
        return (
            settings,
            self._recorder.guesses.questions,
            random.getstate(),
            bytes(drawn[0]),
            drawn[1],
        )


def _shows(value: Any) -> bool:
    """Return whether a module's attribute is a plain value, or a container whose length is compared."""
    return isinstance(value, (*_PLAIN, list, dict, set, tuple))


def _layouts(batch: Any) -> Any:
    """Return a value that is equal for batches of equal layout: dicts, lists and tuples of tensors, numbers
    and texts. Return None for a batch that has other objects in it."""
    if isinstance(batch, torch.Tensor):
        is_dense = batch.layout is torch.strided
        return (tuple(batch.shape), batch.stride(), batch.dtype) if is_dense else None
    if isinstance(batch, _PLAIN):
        return (batch,)
    parts = None
    if type(batch) is dict:
        parts = [(key, _layouts(value)) for key, value in batch.items()]
        return None if any(part is None for _, part in parts) else ("dict", *parts)
    if type(batch) in (list, tuple):
        values = [_layouts(value) for value in batch]
        return None if None in values else (type(batch).__name__, *values)
    return None
