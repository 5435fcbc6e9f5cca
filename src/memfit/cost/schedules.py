"""Pipeline schedules: the order of work on every rank, and the dependencies between results."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

KINDS = ("gpipe", "1f1b", "interleaved", "zero-bubble")
_FORWARD, _BACKWARD, _WEIGHT = range(3)
_Work = tuple[int, int, int]  # (kind, chunk, micro-batch)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedPipeline:
    """Result of the simulation of one pipeline step, without the optimizer.

    ``step_s``: seconds until the last rank is done. ``busy_s``: seconds of work of each rank.
    ``bubble_ratio``: share of the time of all ranks together during which they are idle; 0 if ``step_s`` is
    0.
    """

    step_s: float
    busy_s: tuple[float, ...]

    @property
    def bubble_ratio(self) -> float:
        return 1 - sum(self.busy_s) / (len(self.busy_s) * self.step_s) if self.step_s else 0.0


def simulate(
    kind: str,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    micro_batches: int,
    *,
    weight_s: Sequence[float] | None = None,
    send_s: float = 0.0,
    virtual: int = 1,
) -> SimulatedPipeline:
    """Simulate one step of a pipeline, without the optimizer. ``kind``: the schedule, "gpipe", "1f1b",
    "interleaved" or "zero-bubble"; any other fails an assertion.

    ``forward_s`` and ``backward_s``: seconds of one micro-batch through each stage, in the order of the
    model. ``micro_batches``: their number in a step. ``virtual``: number of stages per rank, which divides
    the number of stages: there are ``len(forward_s) / virtual`` ranks, and rank r has stages r, r + ranks,
    r + 2 x ranks, ... ``weight_s``: the part of each stage's ``backward_s`` that no other work waits for (the
    gradients of weights); only "zero-bubble" splits it off. None: zero. ``send_s``: seconds to send from one
    stage to the next.
    """
    assert kind in KINDS, kind
    stages = len(forward_s)
    ranks = stages // virtual
    weight = list(weight_s) if weight_s is not None and kind == "zero-bubble" else [0.0] * stages
    seconds = (list(forward_s), [b - w for b, w in zip(backward_s, weight, strict=True)], weight)
    busy = tuple(
        micro_batches * sum(work_s[s] for work_s in seconds for s in range(r, stages, ranks))
        for r in range(ranks)
    )
    if ranks == 1:
        return SimulatedPipeline(step_s=busy[0], busy_s=busy)
    orders = [_order(kind, r, ranks, micro_batches, virtual) for r in range(ranks)]
    if kind == "zero-bubble":
        orders = [_with_weights(order, rank) for rank, order in enumerate(orders)]
    end_times = _rank_end_times(orders, seconds, send_s, ranks)
    return SimulatedPipeline(step_s=max(end_times), busy_s=busy)


def _order(kind: str, rank: int, ranks: int, micros: int, virtual: int) -> list[_Work]:
    forward, backward = _sequence(ranks, micros, virtual)
    if kind == "gpipe":
        warmup = len(forward)
    elif virtual > 1:
        warmup = min(len(forward), 2 * (ranks - rank - 1) + (virtual - 1) * _group(ranks, micros))
    else:
        warmup = min(len(forward), ranks - rank - 1)
    order: list[_Work] = [(_FORWARD, *f) for f in forward[:warmup]]
    for next_forward, next_backward in zip(forward[warmup:], backward, strict=False):
        order += [(_FORWARD, *next_forward), (_BACKWARD, *next_backward)]
    return order + [(_BACKWARD, *b) for b in backward[len(forward) - warmup :]]


def _with_weights(order: list[_Work], rank: int) -> list[_Work]:
    """Return a rank's order of work with its weight gradients inserted, as in the schedule ZB-H1. ``rank``:
    its index.

    Each backward leaves a weight gradient to be done. While forwards are left, ``rank`` of these are
    postponed; any more are done at once, the oldest first. After the last forward, one is done after each
    backward, where the rank would otherwise wait, and the rest at the end.
    """
    ordered_work: list[_Work] = []
    weight_queue: list[_Work] = []
    remaining_forwards = sum(kind == _FORWARD for kind, _, _ in order)
    for work in order:
        ordered_work.append(work)
        if work[0] == _FORWARD:
            remaining_forwards -= 1
            continue
        weight_queue.append((_WEIGHT, *work[1:]))
        if len(weight_queue) > rank or (not remaining_forwards and weight_queue):
            ordered_work.append(weight_queue.pop(0))
    return ordered_work + weight_queue


def _sequence(ranks: int, micros: int, virtual: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return two lists of the pairs (chunk, micro-batch) of a rank, in the order of forward and in that of
    backward. A chunk is one of the ``virtual`` stages of the rank, by its index.

    Both lists go through the micro-batches in groups (`_group`), and through each group chunk by chunk;
    backward begins with the last chunk.
    """
    forward, backward = [], []
    group_size = _group(ranks, micros)
    for start in range(0, micros, group_size):
        group = range(start, min(start + group_size, micros))
        forward += [(c, j) for c in range(virtual) for j in group]
        backward += [(c, j) for c in reversed(range(virtual)) for j in group]
    return forward, backward


def _group(ranks: int, micros: int) -> int:
    """Return how many micro-batches a rank runs through one chunk before the next: as many as there are
    ranks, or some more if ``micros`` is not a multiple of that; all if ``micros`` is less than twice the
    ranks. For 4 ranks: 4 of 8, 5 of 10, 7 of 7.
    """
    return -(-micros // max(1, micros // ranks))


def _rank_end_times(
    orders: list[list[_Work]], seconds: tuple[list[float], ...], send_s: float, ranks: int
) -> list[float]:
    """Return the seconds from the start at which each rank has done its order of work. ``seconds``: of a
    micro-batch's forward, backward and weight gradients, each by stage.
    """
    last_stage = len(seconds[0]) - 1
    end_times: dict[tuple[int, int, int], float] = {}  # (kind, stage, micro-batch) -> end
    free_times, positions = [0.0] * ranks, [0] * ranks
    active_ranks = list(range(ranks))
    while active_ranks:
        stuck = True
        for rank in active_ranks:
            order, position, time = orders[rank], positions[rank], free_times[rank]
            while position < len(order):
                kind, chunk, micro = order[position]
                stage = chunk * ranks + rank
                ready = _ready(kind, stage, micro, last_stage, end_times, send_s)
                if ready is None:
                    break
                time = max(time, ready) + seconds[kind][stage]
                end_times[kind, stage, micro] = time
                position += 1
                stuck = False
            positions[rank], free_times[rank] = position, time
        active_ranks = [r for r in active_ranks if positions[r] < len(orders[r])]
        assert not (stuck and active_ranks), "the schedule waits for itself"
    return free_times


def _ready(
    kind: int,
    stage: int,
    micro: int,
    last_stage: int,
    end_times: dict[tuple[int, int, int], float],
    send_s: float,
) -> float | None:
    """Return the time when a piece of work can start: when the work before it has ended, plus ``send_s`` if
    that is on another stage. None if the end of that work is not known yet. 0 for a forward of the first
    stage, and for a weight gradient, whose backward the rank does before it in any case. ``kind``:
    `_FORWARD`, `_BACKWARD` or `_WEIGHT`.
    """
    if kind == _WEIGHT or (kind == _FORWARD and stage == 0):
        return 0.0
    if kind == _FORWARD:
        end = end_times.get((_FORWARD, stage - 1, micro))
    elif stage == last_stage:
        return end_times.get((_FORWARD, stage, micro))
    else:
        end = end_times.get((_BACKWARD, stage + 1, micro))
    return None if end is None else end + send_s
