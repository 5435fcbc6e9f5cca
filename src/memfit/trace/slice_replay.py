"""Trace a few of the equal slices that a technique runs one after the other, and count the others.

Chunking cuts a module's call into up to some hundred slices of one size, whose operators and allocations are
equal in forward and in backward. `SliceReplay` runs the first three and the last four slices and leaves out
those between. It compares the events of slices that ran. Then one operator call stands for many
(`OpCall.times`), and one allocation for what the omitted slices leave behind (`Allocation.pieces`). What a
slice frees itself is not repeated: the live memory changes by the same bytes in each slice, so its highest
level is in one of the slices that ran.

If slices differ after some were left out, the trace runs again with all of them (`run_all_if_different`).
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor

from memfit.trace import operators
from memfit.trace.allocation_recorder import AllocationRecorder, Life
from memfit.trace.operators import NewTensors, storage_layout

P = ParamSpec("P")
T = TypeVar("T")
Slices = Sequence[tuple[torch.Tensor, ...]]
# Slices that run first and last. The very first and last may be special: casts of weights happen in the
# first, gradients begin in the last, which may also be shorter. The others are compared in pairs.
_FIRST, _LAST = 3, 4
_UNBIND: Any = torch.ops.aten.unbind.int
_RUNS_ALL: contextvars.ContextVar[bool] = contextvars.ContextVar("runs_all", default=False)


class SlicesDiffer(Exception):
    """Slices of which some were left out turned out to differ, so that the trace is wrong."""


def run_all_if_different(run: Callable[P, T]) -> Callable[P, T]:
    """Wrap ``run``: if it raises SlicesDiffer, run it again with all slices."""

    @functools.wraps(run)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return run(*args, **kwargs)
        except SlicesDiffer:
            token = _RUNS_ALL.set(True)
            try:
                return run(*args, **kwargs)
            finally:
                _RUNS_ALL.reset(token)

    return wrapper


@dataclasses.dataclass(frozen=True, slots=True)
class _Mark:
    """A moment of the recording: the clock, and the numbers so far of storages (``lives``), operator calls
    and values."""

    clock: int
    lives: int
    calls: int
    values: int  # that were asked for or drawn


class _Window:
    """What was recorded from the mark ``start`` to ``end``, while one slice ran forward or backward: the
    storages that were made (``lives``), the operator calls, and the frees of storages that this window or an
    ``earlier`` one made."""

    def __init__(
        self, recorder: AllocationRecorder, start: _Mark, end: _Mark, earlier: Sequence[_Window] = ()
    ) -> None:
        self.lives = recorder.lives[start.lives : end.lives]
        self.calls = range(start.calls, end.calls)
        lives = [(i, j, life) for i, w in enumerate((self, *earlier)) for j, life in enumerate(w.lives)]
        self._ends = sorted(
            (life.end - start.clock, i, j)
            for i, j, life in lives
            if life.end is not None and start.clock <= life.end < end.clock
        )
        calls = recorder.calls_between(start.calls, end.calls)
        # Every tick is the begin or end of a life that is known here, or a call on the model's stream.
        self._is_whole = (
            end.clock - start.clock == len(self.lives) + len(self._ends) + len(calls)
            and all(call.stream_use is None for call in calls)
            and end.values == start.values
        )
        self._begins = [
            (x.start - start.clock, x.size_bytes, x.pieces, x.module, x.op, x.memory_pool, x.category)
            for x in self.lives
        ]
        self._work = [(c.clock - start.clock, c.name, c.work, c.module, c.times) for c in calls]

    def equals(self, other: _Window) -> bool:
        """Return whether both windows have equal events. False if something else happened in one of them: a
        value was read or drawn, another storage was freed, or a call ran on another stream."""
        return (
            self._is_whole
            and other._is_whole
            and self._begins == other._begins
            and self._work == other._work
            and self._ends == other._ends
        )

    def ended(self, of: int) -> set[int]:
        """Return the indices of the storages that were freed here, among the ``lives`` of this window (``of``
        0) or of an earlier one (1, 2, ..., in the order of ``earlier``)."""
        return {j for _, i, j in self._ends if i == of}

    def remaining(self) -> list[int]:
        """Return the indices of ``lives``, the storages made in this window, that were not freed in it."""
        return [i for i in range(len(self.lives)) if i not in self.ended(0)]


class SliceReplay:
    """Takes the place of `Workbench.run_slices` while a trace is recorded: of at least eight slices of equal
    shapes it runs the first three and the last four, and counts those between; if the second and third
    differ, it runs all. A call returns the outputs of all slices. It raises SlicesDiffer if one of the last
    four but the very last differs from the third. So does backward through the outputs if slices differ
    there."""

    def __init__(self, recorder: AllocationRecorder) -> None:
        self._recorder = recorder

    def __call__(self, run: Callable[..., Any], slices: Slices) -> list[Any]:
        count = len(slices) - _FIRST - _LAST
        if count < 1 or _RUNS_ALL.get() or self._recorder.paused or not self._are_alike(slices):
            return [run(*tensors) for tensors in slices]
        first_node = torch._C._autograd._get_sequence_nr()
        outputs, windows = self._run(run, slices[:_FIRST])
        left_out = _LeftOut.after(self._recorder, windows, outputs[-1], count)
        if left_out is None:
            return outputs + [run(*tensors) for tensors in slices[_FIRST:]]
        if outputs[-1].requires_grad:
            inputs = itertools.chain.from_iterable(slices[_FIRST:-_LAST])
            outputs += _Slices.apply(left_out, left_out.leaf(), *inputs)  # type: ignore[no-untyped-call]
        else:
            outputs += left_out.outputs()
        last_outputs, last_windows = self._run(run, slices[-_LAST:])
        if not all(w.equals(windows[-1]) for w in last_windows[:-1]):
            raise SlicesDiffer
        if outputs[-1].requires_grad:
            ran = [*zip(outputs, windows, strict=False), *zip(last_outputs, last_windows, strict=True)]
            left_out.watch(ran, slices[-_LAST], first_node)
        return outputs + last_outputs

    def _run(self, run: Callable[..., Any], slices: Slices) -> tuple[list[Any], list[_Window]]:
        outputs, windows, start = [], [], _mark(self._recorder)
        for tensors in slices:
            outputs.append(run(*tensors))
            end = _mark(self._recorder)
            windows.append(_Window(self._recorder, start, end))
            start = end
        return outputs, windows

    def _are_alike(self, slices: Slices) -> bool:
        """Return whether all slices but the last are fake tensors of equal shapes. False if a sparse tensor,
        whose size depends on values, was recorded before. The values of the slices may differ: whether the
        step reads any is checked when slices have run (`_Window.equals`)."""
        return not self._recorder.sparse_seen and all(
            type(t) is FakeTensor and t.shape == tensors[0].shape
            for tensors in zip(*slices[:-1], strict=True)
            for t in tensors
        )


def _mark(recorder: AllocationRecorder) -> _Mark:
    values = recorder.guesses.questions + recorder.concrete_values.draws
    return _Mark(recorder.clock, len(recorder.lives), recorder.call_count, values)


class _LeftOut:
    """``count`` slices that do not run. ``forward``: the window of an equal slice that ran. ``output``: the
    output of that slice, whose storage has the record ``forward.lives[index]``; ``layout``: the output's."""

    def __init__(
        self,
        recorder: AllocationRecorder,
        forward: _Window,
        count: int,
        output: FakeTensor,
        layout: NewTensors,
        index: int,
    ) -> None:
        self._recorder, self._forward, self._count = recorder, forward, count
        self._mode, self._device = output.fake_mode, output.fake_device
        self._layout, self._index = layout, index
        # For each life that slices leave behind besides their output, what holds its record.
        self._kept: dict[int, FakeTensor] = {}
        self._forwards: list[_Window] = []  # of the slices that ran, in their order
        self._marks: list[_Mark] = []  # where the backward of each begins, the last slice first
        # Of each input of a slice, the gradients of the operators that read it.
        self._gradients: list[list[tuple[NewTensors | None, Life | None]]] = []
        self._after = self._forward  # window of the backward that ran before the omitted ones

    @classmethod
    def after(
        cls, recorder: AllocationRecorder, windows: Sequence[_Window], output: Any, count: int
    ) -> _LeftOut | None:
        """Return what stands for ``count`` slices after those of ``windows``, of which the last has this
        output. Return None if they must run: if the last two windows differ; if the output is not a fake
        tensor of unknown values in a storage that the slice made; or if the output does not require gradients
        and the slice leaves other storages behind."""
        if not windows[-1].equals(windows[-2]) or type(output) is not FakeTensor:
            return None
        layout, life, remaining = storage_layout(output), recorder.life_of(output), windows[-1].remaining()
        index = next((i for i in remaining if windows[-1].lives[i] is life), None)
        if layout is None or index is None or recorder.concrete_values.of(output) is not None:
            return None
        if len(remaining) > 1 and not output.requires_grad:
            return None
        return cls(recorder, windows[-1], count, output, layout, index)

    def leaf(self) -> torch.Tensor:
        """Return an empty tensor that requires gradients. As an input of `_Slices`, it lets the outputs
        require gradients even if no input of the slices does."""
        return self._new(torch.Size([0]), (1,), torch.float32).requires_grad_()

    def outputs(self) -> list[FakeTensor]:
        """Record the forward of the omitted slices, which do not run, and return a fake output for each."""
        self._recorder.multiply_calls(self._forward.calls, 1 + self._count)
        outputs: list[FakeTensor] = []
        for i in self._forward.remaining():
            life = self._recorder.repeat_life(self._forward.lives[i], self._count)
            if i == self._index:
                outputs = self._stacked(self._layout, life)
            else:
                self._kept[i] = self._new(torch.Size([0]), (1,), torch.uint8)
                self._recorder.adopt(self._kept[i], life)
        return outputs

    def _new(self, size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> FakeTensor:
        fake: FakeTensor = NewTensors(((size, stride, dtype, self._device),), None).make(self._mode)
        return fake

    def _stacked(self, layout: NewTensors, life: Life) -> list[FakeTensor]:
        """Return a fake tensor of this layout for each slice, all in one storage with the record ``life``."""
        ((size, stride, dtype, _),) = layout.layouts
        elements = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        base = self._new(torch.Size((self._count, *size)), (elements, *stride), dtype)
        self._recorder.adopt(base, life)
        stacked = operators.view(_UNBIND, (base, 0), {})
        assert isinstance(stacked, list)
        return stacked

    def watch(
        self,
        ran: Sequence[tuple[Any, _Window]],
        inputs: tuple[torch.Tensor, ...],
        first_node: int,
    ) -> None:
        """Follow the backward of the slices that ``ran``, each given as (output, window of its forward).
        ``inputs``: those of the first slice after the omitted ones. ``first_node``: number of the first
        autograd node of the slices."""
        self._forwards = [forward for _, forward in ran]
        for output, _ in ran:
            output.grad_fn.register_prehook(self._begin)
        self._gradients = [[] for _ in inputs]
        sources = {_edge(t.grad_fn, t.output_nr): i for i, t in enumerate(inputs) if t.grad_fn is not None}
        for node in _nodes(ran[-_LAST][0].grad_fn, first_node):
            for place, (source, number) in enumerate(node.next_functions):
                if source is not None and (index := sources.get(_edge(source, number))) is not None:
                    node.register_hook(functools.partial(self._note_gradient, index, place))

    def _note_gradient(self, index: int, place: int, gradients: Any, _: Any) -> None:
        gradient = gradients[place]
        if gradient is not None:
            self._gradients[index].append((storage_layout(gradient), self._recorder.life_of(gradient)))

    def _begin(self, _: Any) -> None:
        """Note that the backward of the next slice begins. When that of the first slice begins, which is the
        last to run backward, compare the backward of the second and third with that of the slice that ran
        backward just before the omitted ones. Raises SlicesDiffer if they are not equal."""
        self._marks.append(_mark(self._recorder))
        if len(self._marks) == _LAST + _FIRST:
            marks, previous = self._marks[_LAST:], self._after
            for start, end, forward in zip(
                marks, marks[1:], self._forwards[_FIRST - 1 : 0 : -1], strict=False
            ):
                window = _Window(self._recorder, start, end, (previous, forward))
                if not window.equals(self._after):
                    raise SlicesDiffer
                previous = window
            self._marks.clear()  # for another backward through the same graph

    def backward(self) -> list[FakeTensor | None]:
        """Record the backward of the omitted slices and return the gradients of their inputs, slice by slice;
        None for an input without one. Raises SlicesDiffer unless the last four slices have run backward, the
        last two of these equally, and as `_match_gradients` does."""
        if len(self._marks) != _LAST:
            raise SlicesDiffer
        marks = [*self._marks, _mark(self._recorder)]
        windows: list[_Window] = []
        for start, end, forward in zip(marks, marks[1:], self._forwards[::-1], strict=False):
            windows.append(_Window(self._recorder, start, end, (*windows[-1:], forward)))
        *_, before, self._after = windows
        if not self._after.equals(before):
            raise SlicesDiffer
        self._recorder.multiply_calls(self._after.calls, 1 + self._count)
        for i in self._after.ended(2):
            self._kept.pop(i, None)
        stacks: list[list[Any]] = [[None] * self._count for _ in self._gradients]
        for life, index, layout in self._match_gradients():
            stacks[index] = self._stacked(layout, self._recorder.repeat_life(life, self._count))
        return list(itertools.chain.from_iterable(zip(*stacks, strict=True)))

    def _match_gradients(self) -> list[tuple[Life, int, NewTensors]]:
        """Return (record of the gradient's storage, index of the input, layout) for each input of a slice
        that has a gradient, in the order in which the storages are made. Raises SlicesDiffer if a storage
        that a slice leaves behind, and that the next slice does not free, is no such gradient, or if the
        storage of a gradient is not known."""
        passed_on = self._after.ended(1)
        lives = [self._after.lives[i] for i in self._after.remaining() if i not in passed_on]
        matches: list[tuple[Life, int, NewTensors]] = []
        sums = []  # inputs that several operators read: autograd adds up their gradients
        for index, gradients in enumerate(self._gradients):
            life = next((x for x in lives if any(x is gradient for _, gradient in gradients)), None)
            if not gradients:
                continue
            layout = gradients[0][0]
            if layout is None:
                raise SlicesDiffer
            if life is None:
                sums.append((index, layout))
            else:
                matches.append((life, index, layout))
                lives = [x for x in lives if x is not life]
        for index, layout in sums:
            life = next((x for x in lives if x.size_bytes == _size_bytes(layout)), None)
            if life is None:
                raise SlicesDiffer
            matches.append((life, index, layout))
            lives = [x for x in lives if x is not life]
        if lives:
            raise SlicesDiffer
        return sorted(matches, key=lambda match: match[0].start)


class _Slices(torch.autograd.Function):
    """Autograd function that stands for the omitted slices (`_LeftOut`) in the graph: it takes a leaf and all
    inputs of these slices, and returns their outputs."""

    @staticmethod
    def forward(
        ctx: Any, left_out: _LeftOut, leaf: torch.Tensor, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.left_out = left_out
        ctx.save_for_backward(*inputs)  # as their checkpoints do
        return tuple(left_out.outputs())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _inputs = ctx.saved_tensors
        return None, None, *ctx.left_out.backward()


def _edge(node: Any, number: int) -> tuple[int, int]:
    return int(node._sequence_nr()), number


def _size_bytes(layout: NewTensors) -> int:
    ((size, _, dtype, _),) = layout.layouts
    return size.numel() * dtype.itemsize


def _nodes(root: Any, first_node: int) -> Iterator[Any]:
    """Yield ``root`` and the autograd nodes whose results it uses, directly or not, that have a sequence
    number of at least ``first_node``, one for each number. All AccumulateGrad nodes have one number."""
    seen, stack = set(), [root]
    while stack:
        node = stack.pop()
        number = int(node._sequence_nr())
        if number < first_node or number in seen:
            continue
        seen.add(number)
        yield node
        stack += [following for following, _ in node.next_functions if following is not None]
