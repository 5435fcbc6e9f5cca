"""Repeat the forward and backward pass of a micro-batch without running it again.

A trace of one process has two steps, because the optimizer makes its state in the first, and the last step
has up to three micro-batches, because gradients are made in the first and accumulated in the others. The
passes of the first micro-batches of both steps are equal event by event, and so are those of the others,
unless something in them depends on what came before. Where nothing is seen that does
(`PassReplay.micro_step`), a pass is a copy of an earlier one.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memfit.jobs.training_step import MicroBatch, OnPhase, TrainingStep
from memfit.trace.allocation_recorder import AllocationRecorder, Life
from memfit.trace.operators import NewTensors, OperatorCall, storage_layout
from memfit.types.trace import Phase

_PLAIN = (bool, int, float, str, type(None))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """A fake tensor of ``mode`` that a pass leaves behind: the loss (``param`` None) or the gradient of
    ``param``. ``index``: of its storage among those made in the pass. ``size_bytes``: of its storage."""

    param: torch.nn.Parameter | None
    mode: FakeTensorMode
    layout: NewTensors
    size_bytes: int
    index: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """The record of a pass, the forward and backward of a micro-batch, between the clocks ``start`` and
    ``end``. ``clocks``: phase -> clock of its beginning. ``share``: the factor by which the loss of the
    micro-batch is multiplied. ``shares``: the indices of the calls that multiply by it; empty if unknown."""

    start: int
    end: int
    clocks: dict[Phase, int]
    lives: list[Life]
    calls: list[OperatorCall]
    counts: Counter[str]
    offloaded: tuple[int, ...]
    results: list[_Result]
    share: float
    shares: tuple[int, ...]

    def has_gradients(self) -> bool:
        """Return whether a gradient that the pass made is still alive."""
        return any(self.lives[r.index].end is None for r in self.results if r.param is not None)


class PassReplay:
    """Runs the micro-batches of a traced step. If an equal one ran before, its record is repeated instead."""

    def __init__(self, recorder: AllocationRecorder, step: TrainingStep) -> None:
        self._recorder, self._step = recorder, step
        self._kept: dict[Any, _Pass | None] = {}

    def micro_step(
        self, run: Callable[[MicroBatch, OnPhase], torch.Tensor], micro_batch: MicroBatch, mark: OnPhase
    ) -> torch.Tensor:
        """Run the micro-batch, or repeat an earlier pass, and return the loss. ``mark`` is called with each
        phase in either case.

        The first pass of a micro-batch of the same layout, with gradients of the same parameters in place, is
        repeated if it

        - left nothing behind but the loss and gradients, each in a storage of its own, and freed nothing that
          was there before;
        - ran without collectives and read no values;
        - changed no number, text, switch or length of a container of a module, nor the state of Python's or
          numpy's random numbers.

        It is not repeated while gradients that it made are alive: something keeps them, such as a hook, that
        only another run would show. Nor is it for another factor of the loss (`_Pass.share`), unless the
        calls that multiply by it are known.
        """
        layout = _layouts(micro_batch.batch)
        if layout is None:
            return run(micro_batch, mark)
        gradients = tuple(p.grad is not None for p in self._step.bench.trainable())
        key = layout, micro_batch.share == 1.0, gradients
        if key not in self._kept:
            return self._run(key, run, micro_batch, mark)
        kept = self._kept[key]
        if kept is None or not (kept.shares or kept.share == micro_batch.share) or kept.has_gradients():
            return run(micro_batch, mark)
        return self._repeat(kept, micro_batch.share, mark)

    def _run(
        self,
        key: Any,
        run: Callable[[MicroBatch, OnPhase], torch.Tensor],
        micro_batch: MicroBatch,
        mark: OnPhase,
    ) -> torch.Tensor:
        recorder, clocks = self._recorder, dict[Phase, int]()

        def marked(phase: Phase) -> None:
            clocks[phase] = recorder.clock
            mark(phase)

        start, first_life, first_call = recorder.clock, len(recorder.lives), recorder.call_count
        counts, offloaded, state = recorder.counts(), recorder.offloaded, self._observe()
        with_gradients = {id(p) for p in self._step.bench.trainable() if p.grad is not None}
        loss = run(micro_batch, marked)
        self._kept[key] = None
        lives, calls = recorder.lives[first_life:], recorder.calls_between(first_call)
        results = self._results(lives, loss, with_gradients)
        frees_older = any(life.end is not None and life.end >= start for life in recorder.lives[:first_life])
        if results is None or frees_older or state != self._observe() or any(c.is_collective for c in calls):
            return loss
        self._kept[key] = _Pass(
            start=start,
            end=recorder.clock,
            clocks=clocks,
            lives=lives,
            calls=calls,
            counts=recorder.counts() - counts,
            offloaded=tuple(map(operator.sub, recorder.offloaded, offloaded)),
            results=results,
            share=micro_batch.share,
            shares=_multiplying(calls, micro_batch.share),
        )
        return loss

    def _results(
        self, lives: list[Life], loss: torch.Tensor, with_gradients: set[int]
    ) -> list[_Result] | None:
        """Return what a pass has left behind: ``loss``, and the gradients of parameters whose ids are not in
        ``with_gradients``. Return None if one of them does not begin at the start of a storage that was made
        in the pass (``lives``), if two share one, or if another storage made in the pass is alive."""
        open_lives = {id(life): i for i, life in enumerate(lives) if life.end is None}
        tensors: list[tuple[torch.nn.Parameter | None, Any]] = [(None, loss)]
        tensors += [
            (p, p.grad)
            for p in self._step.bench.trainable()
            if p.grad is not None and id(p) not in with_gradients
        ]
        results = []
        for param, tensor in tensors:
            layout = storage_layout(tensor)
            index = open_lives.pop(id(self._recorder.life_of(tensor)), None) if layout is not None else None
            if layout is None or index is None or not isinstance(tensor, FakeTensor):
                return None
            size_bytes = tensor.untyped_storage().nbytes()
            results.append(
                _Result(param=param, mode=tensor.fake_mode, layout=layout, size_bytes=size_bytes, index=index)
            )
        return None if open_lives else results

    def _repeat(self, kept: _Pass, share: float, mark: OnPhase) -> torch.Tensor:
        """Record the pass again, at the recorder's present clock and step, for a micro-batch whose loss is
        multiplied by ``share``. Call ``mark`` with each phase, and give the parameters their gradients.
        Return the loss, multiplied by ``share``, as a new fake tensor."""
        recorder = self._recorder
        shift = recorder.clock - kept.start
        copies = [
            dataclasses.replace(
                life,
                start=life.start + shift,
                end=None if life.end is None or life.end >= kept.end else life.end + shift,
                step=recorder.step,
            )
            for life in kept.lives
        ]
        recorder.lives += copies
        calls = list(kept.calls)
        for index in kept.shares:
            calls[index] = _with_share(calls[index], kept.share, share) or calls[index]
        recorder.repeat_calls(calls, shift, {})
        recorder.add_counts(kept.counts)
        recorder.offloaded = tuple(map(operator.add, recorder.offloaded, kept.offloaded))
        for phase, clock in kept.clocks.items():
            recorder.clock = clock + shift
            mark(phase)
        recorder.clock = kept.end + shift
        loss: torch.Tensor | None = None
        for result in kept.results:
            tensor = result.layout.make(result.mode)
            if tensor.untyped_storage().nbytes() != result.size_bytes:
                tensor.untyped_storage().resize_(result.size_bytes)
            recorder.adopt(tensor, copies[result.index])
            if result.param is None:
                loss = tensor
            else:
                result.param.grad = tensor
        assert loss is not None
        return loss

    def _observe(self) -> Any:
        numpy = sys.modules.get("numpy.random")
        drawn = numpy.get_state()[1:3] if numpy is not None else (b"", 0)
        settings = [
            tuple((k, v if isinstance(v, _PLAIN) else len(v)) for k, v in vars(module).items() if _shows(v))
            for module in self._step.model.modules()
        ]
        guesses = self._recorder.guesses
        return settings, guesses.questions, random.getstate(), bytes(drawn[0]), drawn[1]


def _multiplying(calls: list[OperatorCall], share: float) -> tuple[int, ...]:
    """Return the indices of the two calls that multiply a scalar by ``share``, if they weight the loss: the
    last call in forward, and one in backward. Return () if there is another number of such calls, or others.
    """
    indices = [i for i, call in enumerate(calls) if _with_share(call, share, share) is not None]
    forward = [i for i, call in enumerate(calls) if call.phase is Phase.FORWARD]
    is_clear = len(indices) == 2 and indices[0] == forward[-1] and calls[indices[1]].phase is Phase.BACKWARD
    return tuple(indices) if is_clear else ()


_SCALAR_TIMES = '["aten.mul.Tensor",[{"t":[[],[],'  # the beginning of such a call's signature


def _with_share(call: OperatorCall, share: float, other: float) -> OperatorCall | None:
    """Return a copy of the call, which multiplies a scalar by ``share``, that multiplies by ``other``. Return
    None if the call does something else."""
    text, end = call.work.signature, f"]}},{json.dumps(share)}],{{}}]"
    if not (text.startswith(_SCALAR_TIMES) and text.endswith(end)):
        return None
    signature = f"{text.removesuffix(end)}]}},{json.dumps(other)}],{{}}]"
    return dataclasses.replace(call, work=dataclasses.replace(call.work, signature=signature))


def _shows(value: Any) -> bool:
    """Return whether ``value``, an attribute of a module, is compared: a number, bool, text or None (by its
    value), or a list, dict, set or tuple (by its length)."""
    return isinstance(value, (*_PLAIN, list, dict, set, tuple))


def _layouts(batch: Any) -> Any:
    """Return a value that is equal for batches of equal layout: dicts, lists and tuples of dense tensors
    (equal in shape, stride and dtype), numbers, bools, texts and None (equal in value). Return None for a
    batch that has other objects in it."""
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
