"""Whether a script keeps more memory after each step, such as graphs, outputs or losses that it collects."""

from __future__ import annotations

import gc
import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy
import torch

from memfit.cost.memory import levels
from memfit.trace.allocation_recorder import AllocationRecorder, Life
from memfit.trace.source_location import newest_node
from memfit.types.trace import Category, Phase, Trace, rounded

NOWHERE = "nowhere"  # the memory pool of tensors that are not counted
ON_HOST = "host"  # the memory pool of tensors that are copied from the device to its host
NOT_ON_DEVICE = frozenset({NOWHERE, ON_HOST})
_Kind = TypeVar("_Kind")
_LEAST_BYTES = 4096  # of growth per step; numbers that are collected take less
_ENDS, _MOST_ENDS = 4, 12  # ends of steps that are compared, after the first, and that are looked at
_ALIKE_RATIO = 0.25
_MODEL = frozenset({Category.PARAMETER, Category.GRADIENT, Category.OPTIMIZER_STATE, Category.EMA})


class KeptMemory:
    """What of earlier steps is still alive at the end of each step. A tensor may rightly live until the next
    step. The script collects what has grown from step to step at four ends of steps in a row, after the
    first."""

    def __init__(self, recorder: AllocationRecorder) -> None:
        self._recorder, self._begin_clock = recorder, recorder.clock
        self._sizes: list[Counter[str]] = []  # bytes by line, at each end of a step
        self._nodes: list[int] = []  # of the graphs of earlier steps, at each end of a step
        self._first_node = newest_node() + 1  # of the step that runs
        self.holders: list[str] = []  # lines that made the tensors which hold these graphs

    def close_step(self) -> None:
        """Note what is alive at the end of a step. After 12 steps, do nothing."""
        if len(self._sizes) == _MOST_ENDS:
            return
        kept, sizes, recent = list[Life](), Counter[str](), set[str | int]()
        for life in self._recorder.lives:
            if life.end is not None or life.category in _MODEL or life.memory_pool in NOT_ON_DEVICE:
                continue
            if life.step == self._recorder.step:
                recent |= {life.line, life.size_bytes}
            else:
                kept.append(life)
        for life in kept:
            # What is made once, such as a table, is not collected. Lines of older tensors are not known.
            mark = life.line if life.start >= self._begin_clock else life.size_bytes
            if len(self._sizes) != 1 or mark in recent:
                sizes[life.line] += life.pieces * rounded(life.size_bytes, self._recorder.device)
        self._sizes.append(sizes)
        self._nodes.append(self._old_nodes())
        self._first_node = newest_node() + 1

    def rates(self) -> Counter[str]:
        """Return line -> bytes per step by which the live tensors that this line made have grown so far.
        Lines with less than 4 KiB per step are left out."""
        ends = self._sizes[1:][-_ENDS:]
        rates = {line: _rise([sizes[line] for sizes in ends]) for line in ends[-1]} if ends else {}
        return Counter({line: rate for line, rate in rates.items() if rate >= _LEAST_BYTES})

    @property
    def nodes(self) -> int:
        """By how many nodes per step the live autograd graphs of earlier steps have grown so far."""
        return _rise(self._nodes[1:][-_ENDS:])

    @property
    def needs_steps(self) -> bool:
        """Whether something grows, but too few steps were made to know that the script collects it."""
        return 1 < len(self._sizes) <= _ENDS and bool(self.rates() or self.nodes)

    @property
    def grows(self) -> bool:
        """Whether the script collects something, as far as the steps show."""
        return len(self._sizes) > _ENDS and bool(self.rates() or self.nodes)

    def _old_nodes(self) -> int:
        """Return how many nodes of earlier steps can be reached from tensors that are alive, and note which
        lines made those tensors."""
        self.holders = []
        seen: set[Any] = set()
        count = 0
        with torch._C.DisableTorchFunction():
            tensors = [t for t in existing(torch.Tensor) if t.requires_grad and not t.is_leaf]
            for tensor in tensors:
                old_nodes = self._count_old(tensor.grad_fn, seen)
                count += old_nodes
                if old_nodes and (life := self._recorder.life_of(tensor)) is not None and life.line:
                    self.holders.append(life.line)
        self.holders = list(dict.fromkeys(self.holders))
        return count

    def _count_old(self, root: Any, seen: set[Any]) -> int:
        """Return the number of nodes of earlier steps that can be reached from ``root`` and are not in
        ``seen``; add them there."""
        stack, count = [root], 0
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            count += node._sequence_nr() < self._first_node
            stack += [parent for parent, _ in node.next_functions]
        return count


def peak_growth_bytes(trace: Trace) -> int:
    """Return by how many bytes the peak of the last traced steps, after the first, grows with each step
    (`_rise`); 0 for fewer than three steps. If the script computes with what it collects, this is more than
    what it keeps per step."""
    clock, live_bytes = levels(trace)
    peaks = []
    for step in range(1, trace.steps):
        spans = [s for s in trace.spans if s.step == step and s.phase is not Phase.SETUP]
        first, last = numpy.searchsorted(clock, (spans[0].start, spans[-1].end)) if spans else (0, 0)
        peaks.append(int(live_bytes[first:last].max(initial=0)))
    return _rise(peaks[-_ENDS:]) if len(peaks) > 1 else 0


def _rise(values: Sequence[int]) -> int:
    """Return the median difference of successive values, rounded down. Return 0 unless the smallest
    difference is above 0 and at least a quarter of the largest: otherwise they may have risen by chance. A
    single value counts as a rise from 0."""
    rises = [b - a for a, b in itertools.pairwise(values)] or list(values)
    return int(statistics.median(rises)) if rises and min(rises) >= max(rises) * _ALIKE_RATIO > 0 else 0


def existing(kind: type[_Kind]) -> list[_Kind]:
    """Return all objects of this class and of its subclasses that exist in the process."""
    # type() does not run code of the object, which isinstance may do for proxies
    return [value for value in gc.get_objects() if issubclass(type(value), kind)]
