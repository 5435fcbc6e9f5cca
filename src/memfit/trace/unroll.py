"""Build the trace of a deep model from two shallow traces by repeating the events of one middle block.

Every allocation, free and operator of a trace belongs to the running block, or to none. A trace with ``k``
blocks becomes one with ``n`` blocks by repeating the events of its middle block wherever that block occurs
(construction, forward, backward, each optimizer operator), with the storages it refers to renumbered. If a
plan or the model treats only every p-th block alike, a block means such a period of p adjacent blocks here.

That this is valid for the model, plan and rank is checked: the trace with ``k`` blocks, unrolled to ``k`` +
1, must equal the trace with that many blocks, event for event. Quantities that depend on the depth are
extrapolated linearly from the two traces: some sizes (a stack of all gradient norms, a flat buffer), the work
of operators on all parameters, and how far back a stream is waited for.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from memfit.model.blocks import child_prefix
from memfit.types.trace import Allocation, Category, OpCall, Phase, PhaseSpan, Trace, copied_rows, rounded

_ALLOCATE, _FREE, _OPERATE = range(3)
_APART = 10**6  # between the numbers of the blocks of two stacks, more than a stack has


class _Event(NamedTuple):
    clock: int
    kind: int
    block: int | None  # the running period of blocks; None outside the blocks
    row: int  # of the trace's allocations or ops


_Runs = list[tuple[int | None, list[_Event]]]
_RunKey = tuple[int, int | None, int]  # the fields of a `_EventPosition` but the last
_Item = TypeVar("_Item", Allocation, OpCall)


@dataclasses.dataclass(slots=True)
class _Chapter:
    """The events (allocations, frees and operator calls) of one phase span, grouped into runs of consecutive
    events that belong to one block, or to none."""

    span: PhaseSpan
    runs: _Runs


class _EventPosition(NamedTuple):
    """Where an event, such as an allocation, is in a trace. The positions of corresponding events of two
    blocks differ only in ``block``. ``chapter`` is the index of the phase span, ``block`` the period of
    blocks that ran (None outside the blocks), ``occurrence`` the index of the run among those of that block
    in the chapter, and ``offset`` the index of the event within the run."""

    chapter: int
    block: int | None
    occurrence: int
    offset: int


class _Work(NamedTuple):
    """By how much the work of an operator call grows with each additional period of blocks (`Blocks`): the
    floating-point operations, the bytes moved, and ``waited_calls``, the number of last calls of another
    stream for which a call that waits for that stream does not wait (0 for other calls)."""

    flops: int
    moved_bytes: int
    waited_calls: int

    @staticmethod
    def between(one: OpCall, other: OpCall) -> _Work:
        calls = other.waits[1] - one.waits[1] if one.waits and other.waits else 0
        return _Work(other.flops - one.flops, other.moved_bytes - one.moved_bytes, calls)

    def add_to(self, op: OpCall, times: int) -> OpCall:
        waits = (op.waits[0], op.waits[1] + times * self.waited_calls) if op.waits else None
        flops, moved_bytes = op.flops + times * self.flops, op.moved_bytes + times * self.moved_bytes
        return dataclasses.replace(op, flops=flops, moved_bytes=moved_bytes, waits=waits)


class Mismatch(Exception):
    """A trace cannot be built from other ones: two shallow traces do not differ by exactly one repeated
    period of blocks, the micro-batches of a pipeline receive different sizes, or traces with and without
    recomputation do not match. The message says where."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """``count`` blocks of the model in the container at the module path ``path``, starting at index
    ``first``. They repeat in units of ``period`` adjacent blocks, which are also called periods."""

    path: str
    first: int
    count: int
    period: int = 1

    def period_of(self, module: str) -> int | None:
        """Return the index of the period of blocks that the module path ``module`` lies in: 0 for the period
        that begins at ``first``, and negative for blocks before it. Return None for a path outside the
        container's blocks."""
        prefix = child_prefix(self.path)
        if not module.startswith(prefix):
            return None
        number = module.removeprefix(prefix).partition(".")[0]
        return (int(number) - self.first) // self.period if number.isdecimal() else None

    def moved(self, module: str, first: int, periods: int) -> str:
        """Return the path of a module in another trace, whose blocks start at index ``first`` instead of
        ``self.first``: of the module that corresponds to ``module`` in the block that comes ``periods``
        periods after the corresponding block. ``module`` must lie in a block. With ``self.first`` 0,
        ``first`` 4, ``periods`` 2 and ``period`` 1, "layers.1.mlp" becomes "layers.7.mlp"."""
        prefix = child_prefix(self.path)
        number, dot, rest = module.removeprefix(prefix).partition(".")
        return f"{prefix}{int(number) - self.first + first + periods * self.period}{dot}{rest}"


_ON_A_LINE = (
    "parameter_count",
    "trainable_count",
    "offloaded_bytes",
    "restored_bytes",
    "offloaded_tensors",
    "storage_written_bytes",
    "storage_read_bytes",
    "storage_bytes",
    "host_peak_bytes",
    "host_step_bytes",
    "host_optimizer_bytes",
    "model_bytes",
)


def unroll(shallow: Trace, deeper: Trace, shallow_blocks: Blocks, target_blocks: Blocks) -> Trace:
    """Return the trace with ``target_blocks``, from the trace ``shallow`` with ``shallow_blocks`` and the
    trace ``deeper`` with one period more.

    ``target_blocks`` must have a whole number of periods more than ``shallow_blocks`` (else AssertionError is
    raised). Raises Mismatch if ``shallow_blocks`` has fewer than three periods, or if unrolling ``shallow``
    by one period does not give ``deeper``. These may differ, and are extrapolated linearly: sizes of
    allocations outside the blocks, the work of operators, how far back a stream is waited for, and totals
    such as the number of parameters.
    """
    assert (target_blocks.count - shallow_blocks.count) % shallow_blocks.period == 0, (
        shallow_blocks,
        target_blocks,
    )
    middle, growth, extra_work = _middle(shallow, deeper, shallow_blocks)
    deep = _Unrolled(shallow, shallow_blocks, target_blocks, middle)
    extra_periods = deep.extra
    ops = tuple(_with_extra_work(deep, extra_work))
    allocations = [
        _grown(a, extra_periods * growth[o], shallow.device) if o in growth else a
        for a, o in zip(deep.trace.allocations, deep.origin, strict=True)
    ]
    totals = {
        name: getattr(shallow, name) + extra_periods * (getattr(deeper, name) - getattr(shallow, name))
        for name in _ON_A_LINE
    }
    return dataclasses.replace(
        deep.trace,
        allocations=tuple(allocations),
        ops=ops,
        host_blocks_bytes=_blocks_on_a_line(
            shallow.host_blocks_bytes, deeper.host_blocks_bytes, extra_periods
        ),
        **totals,
    )


def _blocks_on_a_line(
    shallow: Sequence[tuple[int, int]], deeper: Sequence[tuple[int, int]], extra_periods: int
) -> tuple[tuple[int, int], ...]:
    """Return `Trace.host_blocks_bytes` after ``extra_periods`` more periods of blocks, of which the first
    gives ``deeper``. The sizes of both, which are sorted, correspond to each other in this order: the model's
    blocks have more tensors of the same sizes, and flat buffers grow. Return () if there are not as many
    sizes in both."""
    if len(shallow) != len(deeper):
        return ()
    return tuple(
        (size + extra_periods * (more - size), count + extra_periods * (times - count))
        for (size, count), (more, times) in zip(shallow, deeper, strict=True)
    )


def add_periods(trace: Trace, blocks: Blocks, periods: int = 1) -> Trace:
    """Return ``trace``, whose blocks are ``blocks``, with ``periods`` more periods of blocks: its middle
    period is repeated. Unlike `unroll`, nothing shows that a model of this depth has this trace, and what
    grows with the depth outside the blocks does not grow here. Raises Mismatch if the blocks are fewer than
    three periods or do not repeat."""
    present = -(-blocks.count // blocks.period)
    if present < 3:
        raise Mismatch("the trace has fewer than three periods of blocks, so none lies between two others")
    longer_blocks = dataclasses.replace(blocks, count=blocks.count + periods * blocks.period)
    return _Unrolled(trace, blocks, longer_blocks, present // 2).trace


def mix_recomputed(kept: Trace, recomputed: Trace, stacks: Sequence[str], every: int) -> Trace:
    """Return the trace of a model in which every ``every``-th block of each stack, beginning with the first,
    is recomputed in backward, from the trace ``kept``, in which none is, and ``recomputed``, in which all
    are. ``stacks``: paths of the modules whose children are the blocks. Both traces are of one process and
    have the same blocks.

    A block's allocations and operator calls are those of the trace in which it is as it should be. Where its
    allocations are freed by another block, the trace decides in which that one is as it should be. Nothing
    but their outputs, and the gradients of these, may pass between blocks. Raises Mismatch if the traces
    differ outside the blocks, or if blocks do not pass on allocations of the same sizes."""
    prefixes = [child_prefix(path) for path in stacks]

    def block_of(module: str) -> int | None:
        for stack, prefix in enumerate(prefixes):
            number = module.removeprefix(prefix).partition(".")[0]
            if module.startswith(prefix) and number.isdecimal():
                return stack * _APART + int(number)
        return None

    return _Mixed(_Script(kept, block_of), _Script(recomputed, block_of), every).trace


def renumber_blocks(trace: Trace, path: str, numbers: Mapping[int, int]) -> Trace:
    """Return the trace with the numbers of the blocks in the container at ``path`` replaced in module paths:
    each key of ``numbers`` by its value. Blocks whose number is no key keep it."""

    prefix = child_prefix(path)

    def moved(item: _Item) -> _Item:
        if not item.module.startswith(prefix):
            return item
        number, dot, rest = item.module.removeprefix(prefix).partition(".")
        if not number.isdecimal():
            return item
        # A missing number is that of another rank's block, which is built and then dropped.
        new_number = numbers.get(int(number), number)
        return dataclasses.replace(item, module=f"{prefix}{new_number}{dot}{rest}")

    return dataclasses.replace(
        trace, allocations=tuple(map(moved, trace.allocations)), ops=tuple(map(moved, trace.ops))
    )


def _middle(
    shallow: Trace, deeper: Trace, blocks: Blocks
) -> tuple[int, dict[int, int], dict[int, tuple[_Work, _Work]]]:
    """Return (``middle``, the index of a period of ``blocks`` whose repetition gives the deeper trace; what
    `_growth` returns for it; what `_more_work` returns for it). The index nearest to the middle is tried
    first, because the first and last periods, and those that prefetch them, may differ. Raises Mismatch if
    there is none."""
    reason = "the shallow trace has fewer than three periods of blocks, so none lies between two others"
    expected, periods = normalize_clocks(deeper), -(-blocks.count // blocks.period)
    deeper_blocks = dataclasses.replace(blocks, count=blocks.count + blocks.period)
    for middle in sorted(range(1, periods - 1), key=lambda m: abs(2 * m - periods)):
        try:
            candidate = _Unrolled(shallow, blocks, deeper_blocks, middle)
            return middle, _growth(candidate, expected), _more_work(candidate, expected)
        except Mismatch as mismatch:
            reason = str(mismatch)
    raise Mismatch(reason)


def _grown(a: Allocation, extra_bytes: int, device: str) -> Allocation:
    requested = a.requested_bytes + extra_bytes
    return dataclasses.replace(a, requested_bytes=requested, size_bytes=rounded(requested, device))


def _growth(candidate: _Unrolled, expected: Trace) -> dict[int, int]:
    """Compare a shallow trace unrolled by one period (``candidate``) with the deeper trace ``expected``.
    Return the bytes by which allocations outside the blocks grow per period, by their index in the shallow
    trace; those that do not grow are left out. Raises Mismatch if the number of allocations differs, or a
    size inside the blocks, a lifetime, the operator that made an allocation, or the clock, name or ``times``
    of an operator call."""
    actual = candidate.trace
    if len(actual.allocations) != len(expected.allocations):
        raise Mismatch(
            f"{len(expected.allocations)} allocations in the deeper trace, but {len(actual.allocations)} in "
            "the unrolled one"
        )
    if [(o.clock, o.op, o.times) for o in actual.ops] != [(o.clock, o.op, o.times) for o in expected.ops]:
        raise Mismatch("the deeper and the unrolled trace have different operators, or in another order")
    growth = {}
    for origin, allocation, reference in zip(
        candidate.origin, actual.allocations, expected.allocations, strict=True
    ):
        if (allocation.start, allocation.end, allocation.op) != (
            reference.start,
            reference.end,
            reference.op,
        ):
            raise Mismatch(
                f"{reference.op} in {reference.module or 'the model'} makes an allocation of the deeper "
                "trace whose counterpart in the unrolled one has another lifetime or operator"
            )
        if allocation.requested_bytes != reference.requested_bytes:
            if candidate.born[origin].block is not None:
                raise Mismatch(
                    f"{reference.op} in {reference.module} makes an allocation of the deeper trace whose "
                    "counterpart in the unrolled one has another size"
                )
            growth[origin] = reference.requested_bytes - allocation.requested_bytes
    return growth


def _more_work(candidate: _Unrolled, expected: Trace) -> dict[int, tuple[_Work, _Work]]:
    """Compare a shallow trace unrolled by one period (``candidate``) with the deeper trace ``expected``.
    Return the work that operator calls do in ``expected`` beyond that in ``candidate``, as (that of the
    first, of the last copy of the call), by the call's index in the shallow trace, for calls that do more."""
    work_by_origin: dict[int, list[_Work]] = defaultdict(list)
    for origin, op, reference in zip(candidate.op_origin, candidate.trace.ops, expected.ops, strict=True):
        work_by_origin[origin].append(_Work.between(op, reference))
    return {origin: (works[0], works[-1]) for origin, works in work_by_origin.items() if any(map(any, works))}


def _with_extra_work(candidate: _Unrolled, extra_work: dict[int, tuple[_Work, _Work]]) -> Iterator[OpCall]:
    copies: dict[int, int] = defaultdict(int)
    for origin, op in zip(candidate.op_origin, candidate.trace.ops, strict=True):
        if origin not in extra_work:
            yield op
            continue
        first_work, last_work = extra_work[origin]
        yield last_work.add_to(first_work.add_to(op, candidate.extra - copies[origin]), copies[origin])
        copies[origin] += 1


def _events(trace: Trace, period_of: Callable[[str], int | None]) -> list[_Event]:
    period_of = functools.cache(period_of)
    events: list[tuple[int, int, int | None, int]] = []
    for i, a in enumerate(trace.allocations):
        block = period_of(a.module)
        events.append((a.start, _ALLOCATE, block, i))
        if a.end is not None:
            events.append((a.end, _FREE, block, i))
    events += [(o.clock, _OPERATE, period_of(o.module), i) for i, o in enumerate(trace.ops)]
    return list(map(_Event._make, sorted(events, key=operator.itemgetter(0))))


def _spanned(events: list[_Event], spans: tuple[PhaseSpan, ...]) -> Iterator[tuple[PhaseSpan, list[_Event]]]:
    start = 0
    for span in spans:
        end = start
        while end < len(events) and events[end].clock < span.end:
            end += 1
        yield span, events[start:end]
        start = end


def normalize_clocks(trace: Trace) -> Trace:
    """Return the same trace with clocks that count its events from 0, phase span by phase span. Frees that
    follow one another directly in a span are put in the order of their allocations."""
    starts, ends, clocks = dict[int, int](), dict[int, int](), dict[int, int]()
    tables = {_ALLOCATE: starts, _FREE: ends, _OPERATE: clocks}
    spans, clock = [], 0
    for span, events in _spanned(_events(trace, lambda module: None), trace.spans):
        start = clock
        for event in (e for group in _groups(events) for e in group):
            tables[event.kind][event.row] = clock
            clock += 1
        spans.append(dataclasses.replace(span, start=start, end=clock))
    allocation_indices, op_indices = range(len(starts)), range(len(clocks))
    return dataclasses.replace(
        trace,
        spans=tuple(spans),
        allocations=copied_rows(
            trace.allocations,
            allocation_indices,
            start=map(starts.get, allocation_indices),
            end=map(ends.get, allocation_indices),
        ),
        ops=copied_rows(trace.ops, op_indices, clock=map(clocks.get, op_indices)),
    )


class _Unrolled:
    """The trace ``trace`` with ``target_blocks``, made from ``shallow`` with ``shallow_blocks`` by
    repeating period ``middle``. ``origin[i]`` is the index in ``shallow`` of the allocation that the
    allocation ``i`` of ``trace`` copies, and ``op_origin[i]`` that of the operator call that its call ``i``
    copies. Raises Mismatch if a copy would free an allocation that does not exist or is freed already."""

    def __init__(self, shallow: Trace, shallow_blocks: Blocks, target_blocks: Blocks, middle: int) -> None:
        self.shallow, self.shallow_blocks, self.middle = shallow, shallow_blocks, middle
        self.first = target_blocks.first
        self.periods = -(-shallow_blocks.count // shallow_blocks.period)
        self.extra = (target_blocks.count - shallow_blocks.count) // shallow_blocks.period
        events = _spanned(_events(shallow, shallow_blocks.period_of), shallow.spans)
        self.chapters: list[_Chapter] = []
        self.born: dict[int, _EventPosition] = {}
        for span, span_events in events:
            runs = self._runs(span_events, span.phase)
            self.born |= _births(len(self.chapters), runs)
            self.chapters.append(_Chapter(span, runs))
        self.origin: list[int] = []
        self.op_origin: list[int] = []
        self._names: dict[tuple[str, int | None, int | None], str] = {}
        self.trace = self._write()

    # -- reading ------------------------------------------------------------------------------------

    def _runs(self, events: list[_Event], phase: Phase) -> _Runs:
        """Group the events of a span into runs (`_Chapter`). A free belongs to the block that runs before it,
        or to none. If allocations of several blocks are freed at once, outside the blocks or outside forward
        and backward, each free belongs to the block that made what is freed, or in whose run in an earlier
        span it was made, as the norms of gradients that a hook of the optimizer takes."""

        def maker(event: _Event) -> int | None:
            if event.block is not None or event.row not in self.born:
                return event.block
            return self.born[event.row].block

        positional = phase in (Phase.FORWARD, Phase.BACKWARD)
        runs: _Runs = []
        for group in _groups(events):
            running_block = runs[-1][0] if runs else None
            is_outside = running_block is None or not positional
            is_list = len({maker(e) for e in group} - {None}) > 1 and is_outside
            for event in group:
                block = running_block if event.kind == _FREE else event.block
                block = maker(event) if event.kind == _FREE and is_list else block
                if not runs or block != runs[-1][0]:
                    runs.append((block, []))
                runs[-1][1].append(event)
        return _join_adjacent(runs)

    # -- writing ------------------------------------------------------------------------------------

    def _write(self) -> Trace:
        starts, modules, clocks, op_modules = list[int](), list[str](), list[int](), list[str]()
        ends: list[int | None] = []
        spans: list[PhaseSpan] = []
        indices: dict[tuple[int, int | None, int, int], int] = {}  # new `_EventPosition` -> new index
        clock = 0
        for c, chapter in enumerate(self.chapters):
            start = clock
            occurrences: dict[int | None, int] = {}
            for template, block, events in self._expand(chapter):
                occurrence = occurrences[block] = occurrences.get(block, -1) + 1
                for offset, event in enumerate(events):
                    if event.kind == _ALLOCATE:
                        indices[c, block, occurrence, offset] = len(starts)
                        module = self.shallow.allocations[event.row].module
                        starts.append(clock)
                        ends.append(None)
                        modules.append(self._renamed(module, template, block))
                        self.origin.append(event.row)
                    elif event.kind == _FREE:
                        target = indices.get(self._like(self.born[event.row], template, block))
                        if target is None or ends[target] is not None:
                            raise Mismatch(
                                "a block frees an allocation whose counterpart in the unrolled trace does "
                                "not exist or is freed already"
                            )
                        ends[target] = clock
                    else:
                        clocks.append(clock)
                        op_modules.append(self._renamed(self.shallow.ops[event.row].module, template, block))
                        self.op_origin.append(event.row)
                    clock += 1
            spans.append(dataclasses.replace(chapter.span, start=start, end=clock))
        return dataclasses.replace(
            self.shallow,
            allocations=copied_rows(
                self.shallow.allocations, self.origin, start=starts, end=ends, module=modules
            ),
            ops=copied_rows(self.shallow.ops, self.op_origin, clock=clocks, module=op_modules),
            spans=tuple(spans),
        )

    def _expand(self, chapter: _Chapter) -> Iterator[tuple[int | None, int | None, list[_Event]]]:
        """Yield the chapter's runs as (block in the shallow trace, block in the deep one, events). Both
        blocks are None for events outside the blocks. The runs of the middle block are repeated, with deep
        numbers that rise or fall in the direction in which the chapter visits blocks."""
        order = [b for b, _ in chapter.runs if b is not None]
        position = 0
        for block, events in chapter.runs:
            if block is None:
                yield None, None, events
                continue
            copies = [block]
            if block > self.middle:
                copies = [block + self.extra]
            elif block == self.middle:
                next_block = order[position + 1] if position + 1 < len(order) else None
                previous_block = order[position - 1] if position else None
                ascending = next_block == block + 1 or previous_block == block - 1
                copies = list(range(block, block + self.extra + 1))[:: 1 if ascending else -1]
            position += 1
            for copy in copies:
                yield block, copy, events

    def _like(
        self, position: _EventPosition, template: int | None, block: int | None
    ) -> tuple[int, int | None, int, int]:
        """Return the `_EventPosition`, in the deep trace, of the allocation that relates to ``block`` there
        as the one made at ``position`` in the shallow trace relates to its block ``template``, which is None
        for events outside the blocks. An allocation that is more than half of the blocks away from
        ``template``, or all if that is None, keeps its distance from the nearer end of the blocks. Places
        outside the blocks stay as they are."""
        if position.block is None:
            return position
        is_far = template is not None and 2 * abs(position.block - template) > self.periods - 1
        if template is None or block is None or is_far:  # from one end to the other
            new_block = position.block + (self.extra if position.block > self.middle else 0)
        else:
            new_block = position.block + block - template
        return position.chapter, new_block, position.occurrence, position.offset

    def _renamed(self, module: str, template: int | None, block: int | None) -> str:
        key = module, template, block
        if key not in self._names:
            self._names[key] = self._rename(module, template, block)
        return self._names[key]

    def _rename(self, module: str, template: int | None, block: int | None) -> str:
        period = self.shallow_blocks.period_of(module)
        if period is None:
            return module
        if template is None or block is None:
            shift = self.extra if period > self.middle else 0
        else:
            shift = block - template
        return self.shallow_blocks.moved(module, self.first, shift)


class _Script:
    """A trace whose chapters have runs of allocations and operator calls only. A free is noted as the
    position of the event that it follows, because another block may decide when an allocation is freed.

    ``births``, ``deaths``: position of each allocation, and of the event before its free, by its index.
    ``made``: the index of the allocation at a position. ``passed``: for a run of a block and another block,
    the allocations made in the run that are freed while the other block runs, in the order in which they are
    made. ``alike``: for a run, an operator, a module and a size, the allocations of this size that the
    operator makes in the run for the module, in order."""

    def __init__(self, trace: Trace, block_of: Callable[[str], int | None]) -> None:
        self.trace = trace
        self.chapters: list[_Chapter] = []
        self.births: dict[int, _EventPosition] = {}
        self.deaths: dict[int, _EventPosition] = {}
        self.order: dict[_RunKey, int] = {}  # of the runs of all chapters
        for c, (span, events) in enumerate(_spanned(_events(trace, block_of), trace.spans)):
            runs: _Runs = []
            for event in events:
                if event.kind != _FREE and runs and runs[-1][0] == event.block:
                    runs[-1][1].append(event)
                elif event.kind != _FREE:
                    runs.append((event.block, [event]))
            self.chapters.append(_Chapter(span, _join_adjacent(runs)))
            self._read(c, events)
        self.made = {position: index for index, position in self.births.items()}
        self.passed: dict[tuple[_RunKey, int | None], list[int]] = defaultdict(list)
        self.alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for index, birth in self.births.items():
            death, allocation = self.deaths.get(index), trace.allocations[index]
            self.alike[birth[:3], allocation.op, allocation.module, allocation.requested_bytes].append(index)
            if birth.block is not None and death is not None and death.block not in (None, birth.block):
                self.passed[birth[:3], death.block].append(index)

    def _read(self, chapter: int, events: list[_Event]) -> None:
        positions: dict[tuple[int, int], _EventPosition] = {}
        occurrences: dict[int | None, int] = {}
        begin = _begin(chapter)
        self.order[begin[:3]] = len(self.order)
        for block, run in self.chapters[chapter].runs:
            occurrence = occurrences[block] = occurrences.get(block, -1) + 1
            self.order[chapter, block, occurrence] = len(self.order)
            for offset, event in enumerate(run):
                positions[event.kind, event.row] = _EventPosition(chapter, block, occurrence, offset)
        position = begin
        for event in events:
            if event.kind == _FREE:
                self.deaths[event.row] = position
                continue
            position = positions[event.kind, event.row]
            if event.kind == _ALLOCATE:
                self.births[event.row] = position

    def facts(self, event: _Event) -> tuple[object, ...]:
        """Return what must be equal in two traces for an event outside the blocks: operator, bytes, module,
        stream and pieces of an allocation; signature, module, stream and times of an operator call."""
        if event.kind == _ALLOCATE:
            a = self.trace.allocations[event.row]
            return a.op, a.requested_bytes, a.module, a.stream, a.pieces
        op = self.trace.ops[event.row]
        return op.signature, op.module, op.stream, op.times

    def sizes(self, passed: tuple[_RunKey, int | None]) -> list[int]:
        return [self.trace.allocations[index].requested_bytes for index in self.passed.get(passed, ())]

    def counterpart(self, index: int, other: _Script) -> int | None:
        """Return the index in ``other`` of the allocation that corresponds to the allocation ``index`` here:
        of the same run, operator, module and size, and in the same order among these. Return None if
        ``other`` has none of these, and raise Mismatch if it has another number of them."""
        allocation = self.trace.allocations[index]
        key = self.births[index][:3], allocation.op, allocation.module, allocation.requested_bytes
        own, others = self.alike[key], other.alike.get(key, [])
        if others and len(own) != len(others):
            raise Mismatch("a block makes another number of allocations if it is recomputed")
        return others[own.index(index)] if others else None

    def release(self, block: int, size_bytes: int) -> _EventPosition:
        """Return the position in backward after which ``block`` frees an input of this size, if it frees the
        input before the block that made it does. The first block of the stack shows where that is: the one
        position at which it frees an input of this size and ``block`` frees none. Positions are counted from
        the end of the blocks' work, because its beginning depends on which outputs are used. Raises Mismatch
        if there is no such position or several, or if the work of the two blocks from there on differs."""
        first = block - block % _APART
        work = {b: self._work(b, Phase.BACKWARD) for b in (first, block)}
        positions = {b: self._releases(b, size_bytes) for b in (first, block)}
        known = {len(work[block]) - position.offset for position in positions[block]}
        unmatched = [
            position for position in positions[first] if len(work[first]) - position.offset not in known
        ]
        if len(unmatched) == 1:
            pairs = zip(reversed(work[first]), reversed(work[block]), strict=False)
            equal = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            if equal > len(work[first]) - unmatched[0].offset:
                offset = unmatched[0].offset + len(work[block]) - len(work[first])
                return unmatched[0]._replace(block=block, offset=offset)
        raise Mismatch("where a block frees its inputs is not known")

    def _releases(self, block: int, size_bytes: int) -> list[_EventPosition]:
        """Return the positions after which ``block`` frees, in backward, allocations of this size that other
        blocks, or none, have made in forward."""
        return [
            death
            for index, death in self.deaths.items()
            if death.block == block
            and self.births[index].block != block
            and self.trace.allocations[index].requested_bytes == size_bytes
            and self.trace.allocations[index].phase is Phase.FORWARD
            and self.chapters[death.chapter].span.phase is Phase.BACKWARD
        ]

    def _work(self, block: int, phase: Phase) -> list[tuple[object, ...]]:
        """Return what a block does in its only run of a phase, in order: (operator, bytes) of each allocation
        and (signature,) of each operator call. Raises Mismatch if it has no run or several."""
        runs = [run for c in self.chapters if c.span.phase is phase for b, run in c.runs if b == block]
        if len(runs) != 1:
            raise Mismatch(f"a block runs {len(runs)} times in {phase}")
        return [
            (self.trace.allocations[e.row].op, self.trace.allocations[e.row].requested_bytes)
            if e.kind == _ALLOCATE
            else (self.trace.ops[e.row].signature,)
            for e in runs[0]
        ]


def _begin(chapter: int) -> _EventPosition:
    return _EventPosition(chapter, None, -1, -1)


class _Mixed:
    """Makes ``trace``, the trace that `mix_recomputed` returns. Raises Mismatch as it does."""

    def __init__(self, kept: _Script, recomputed: _Script, every: int) -> None:
        self._kept, self._recomputed, self._every = kept, recomputed, every
        self._compare()
        # Position -> indices of what is freed there.
        self._frees: dict[_EventPosition, list[int]] = defaultdict(list)
        self.trace = self._write()

    def _script(self, block: int | None) -> _Script:
        is_recomputed = block is not None and block % _APART % self._every == 0
        return self._recomputed if is_recomputed else self._kept

    def _compare(self) -> None:
        kept, recomputed = self._kept, self._recomputed
        for field in dataclasses.fields(Trace):
            values = (getattr(script.trace, field.name) for script in (kept, recomputed))
            if field.name not in ("allocations", "ops", "spans") and len({repr(v) for v in values}) > 1:
                raise Mismatch(f"the traces without and with recomputation differ in {field.name}")
        if len(kept.chapters) != len(recomputed.chapters):
            raise Mismatch("the traces without and with recomputation have different phases")
        for one, other in zip(kept.chapters, recomputed.chapters, strict=True):
            is_same = (one.span.phase, one.span.step) == (other.span.phase, other.span.step)
            if not is_same or [block for block, _ in one.runs] != [block for block, _ in other.runs]:
                raise Mismatch("the traces without and with recomputation run their blocks in another order")
            for (block, run), (_, other_run) in zip(one.runs, other.runs, strict=True):
                if block is None and [*map(kept.facts, run)] != [*map(recomputed.facts, other_run)]:
                    raise Mismatch("the traces without and with recomputation differ outside the blocks")
        for run_key, block in {*kept.passed, *recomputed.passed}:
            is_mixed = self._script(run_key[1]) is not self._script(block)
            is_forward = kept.chapters[run_key[0]].span.phase is Phase.FORWARD
            sizes = [script.sizes((run_key, block)) for script in (kept, recomputed)]
            if is_mixed and not is_forward and sizes[0] != sizes[1]:
                raise Mismatch("a recomputed block passes on other allocations than one that is kept")

    def _write(self) -> Trace:
        allocations, births, ends = list[Allocation](), list[int](), list[int | None]()
        ops, clocks, spans, clock = list[OpCall](), list[int](), list[PhaseSpan](), 0

        def free_at(position: _EventPosition) -> int:
            indices = self._frees.pop(position, [])
            for offset, index in enumerate(indices):
                ends[index] = clock + offset
            return clock + len(indices)

        for c, chapter in enumerate(self._kept.chapters):
            start, clock = clock, free_at(_begin(c))
            occurrences: dict[int | None, int] = {}
            for number, (block, _) in enumerate(chapter.runs):
                script = self._script(block)
                occurrence = occurrences[block] = occurrences.get(block, -1) + 1
                for offset, event in enumerate(script.chapters[c].runs[number][1]):
                    position = _EventPosition(c, block, occurrence, offset)
                    if event.kind == _ALLOCATE:
                        death = self._death(script, event.row, position)
                        if death is not None:
                            self._frees[death].append(len(allocations))
                        allocations.append(script.trace.allocations[event.row])
                        births.append(clock)
                        ends.append(None)
                    else:
                        ops.append(script.trace.ops[event.row])
                        clocks.append(clock)
                    clock += 1
                    clock = free_at(position)
            spans.append(dataclasses.replace(chapter.span, start=start, end=clock))
        if self._frees:
            raise Mismatch("an allocation would be freed before it is made")
        return dataclasses.replace(
            self._kept.trace,
            allocations=tuple(
                _categorized(a, spans)
                for a in copied_rows(allocations, range(len(births)), start=births, end=ends)
            ),
            ops=copied_rows(ops, range(len(ops)), clock=clocks),
            spans=tuple(spans),
        )

    def _death(self, script: _Script, index: int, birth: _EventPosition) -> _EventPosition | None:
        """Return the position after which the allocation ``index`` of ``script``, made at ``birth``, is freed
        in the mixed trace; None if it never is. Raises Mismatch if that is not clear."""
        death = script.deaths.get(index)
        if birth.block is None:
            return self._last(death, self._recomputed.deaths.get(self._recomputed.made[birth]))
        other = self._recomputed if script is self._kept else self._kept
        is_forward = script.chapters[birth.chapter].span.phase is Phase.FORWARD
        counterpart = script.counterpart(index, other) if is_forward else None
        other_death = other.deaths.get(counterpart) if counterpart is not None else None
        is_passed_on = (
            other_death is not None
            and other_death.block not in (None, birth.block)
            and self._script(other_death.block) is other
        )
        if death is None or death.block is None or self._script(death.block) is script:
            # A block of the other kind may release it later, if it is an output.
            return self._later(death, other_death) if is_passed_on and death is not None else death
        if is_passed_on and other_death is not None and other_death.block == death.block:
            return other_death
        if is_forward:  # the other kind of the block that made it keeps it for longer
            return other.release(death.block, script.trace.allocations[index].requested_bytes)
        passed = birth[:3], death.block
        return other.deaths[other.passed[passed][script.passed[passed].index(index)]]

    def _later(self, one: _EventPosition, other: _EventPosition | None) -> _EventPosition:
        return max(one, other or one, key=lambda position: (self._kept.order[position[:3]], position.offset))

    def _last(self, kept: _EventPosition | None, recomputed: _EventPosition | None) -> _EventPosition | None:
        """Return where an allocation from outside the blocks is freed, given where it is if no block is
        recomputed (``kept``) and if all are (``recomputed``); None if it never is. All blocks release it, so
        that the last release decides: if it is by a block that is as in the trace where it is the last, no
        block of the other kind releases it later. Raises Mismatch if the last block is not so, or if only one
        of the two traces frees the allocation."""
        if kept is None or recomputed is None:
            if kept is not recomputed:
                raise Mismatch("an allocation outside the blocks is freed only with or without recomputation")
            return None
        if (kept.chapter, kept.block) == (recomputed.chapter, recomputed.block) and kept.block is not None:
            return kept if self._script(kept.block) is self._kept else recomputed
        last = self._later(kept, recomputed)
        script = self._kept if last is kept else self._recomputed
        if last.block is not None and self._script(last.block) is not script:
            raise Mismatch("which block frees an allocation last depends on which blocks are recomputed")
        return last


def _categorized(allocation: Allocation, spans: Sequence[PhaseSpan]) -> Allocation:
    """Return the allocation; an activation or temporary one that was made in forward gets the category that
    its end gives it: activation if it outlives its phase span, else temporary."""
    free_categories = (Category.ACTIVATION, Category.TEMPORARY)
    if allocation.phase is not Phase.FORWARD or allocation.category not in free_categories:
        return allocation
    phase_end = next(span.end for span in spans if span.start <= allocation.start < span.end)
    outlives = allocation.end is None or allocation.end >= phase_end
    category = Category.ACTIVATION if outlives else Category.TEMPORARY
    return (
        allocation if allocation.category is category else dataclasses.replace(allocation, category=category)
    )


def _births(chapter: int, runs: _Runs) -> dict[int, _EventPosition]:
    """Return the position of each allocation that is made in these runs, those of the chapter ``chapter``, by
    its index."""
    positions = {}
    occurrences: dict[int | None, int] = {}
    for block, events in runs:
        occurrence = occurrences[block] = occurrences.get(block, -1) + 1
        for offset, event in enumerate(events):
            if event.kind == _ALLOCATE:
                positions[event.row] = _EventPosition(chapter, block, occurrence, offset)
    return positions


def _groups(events: list[_Event]) -> Iterator[list[_Event]]:
    """Yield each run of consecutive frees as one group, in the order of their allocations, because a cache
    may be emptied in any order. Every other event is a group of its own."""
    frees: list[_Event] = []
    for event in events:
        if event.kind == _FREE:
            frees.append(event)
            continue
        if frees:
            yield sorted(frees, key=lambda e: e.row)
            frees = []
        yield [event]
    if frees:
        yield sorted(frees, key=lambda e: e.row)


def _join_adjacent(runs: _Runs) -> _Runs:
    """Return the runs with adjacent runs of one block joined. Events without a block that lie within a block,
    or between two blocks whose numbers differ by 1, join the run before them."""
    result: _Runs = []
    for i, (run_block, events) in enumerate(runs):
        is_between = run_block is None and 0 < i < len(runs) - 1
        previous_block, next_block = (runs[i - 1][0], runs[i + 1][0]) if is_between else (None, None)
        are_neighbours = (
            previous_block is not None and next_block is not None and abs(previous_block - next_block) <= 1
        )
        block = previous_block if are_neighbours else run_block
        if result and result[-1][0] == block and block is not None:
            result[-1][1].extend(events)
        else:
            result.append((block, events))
    return result
