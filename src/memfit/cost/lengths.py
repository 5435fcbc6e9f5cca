"""Variable sequence lengths: peak memory by rows and padded length, chances of running out, and ways to
batch.

Every allocation of a step is a polynomial in rows b and length l: 1, l, l^2 (shared by all rows) and b, b l,
b l^2 (per row; l^2 is attention's). The polynomials are fitted allocation by allocation from a few traces.
The peak at any shape is the maximum over all instants, so it has kinks where that instant changes.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from memfit.types.errors import UserError
from memfit.types.trace import Trace

Ints = npt.NDArray[np.int64]
_POOL_BATCHES = 50  # length buckets are sorted within pools of this many batches, as in fairseq-like samplers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A batch as memory sees it.

    ``attended``: sum over rows of the squares of the lengths that attend to each other. None: every row
    attends to its whole padded length.
    """

    rows: int
    length: int
    attended: float | None = None

    @property
    def terms(self) -> tuple[float, ...]:
        rows, length = self.rows, self.length
        squares = rows * length**2 if self.attended is None else self.attended
        return (1.0, length, squares / rows, rows, rows * length, squares)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PeakModel:
    """Peak memory as a function of a batch's shape.

    ``instants``: polynomial coefficients of the live bytes after each allocation, shape (instants, 6).
    """

    instants: npt.NDArray[np.float64]

    def peak_bytes(self, shape: Shape) -> int:
        return round(float((self.instants @ np.array(shape.terms)).max()))


def fit(shapes: Sequence[Shape], traces: Sequence[Trace]) -> PeakModel:
    """Fit the peak model to traces of these shapes.

    Raises UserError if the traces are not the same sequence of allocations, so that no polynomial fits.
    """
    clocks = [_clocks(t) for t in traces]
    if any(not np.array_equal(c, clocks[0]) for c in clocks):
        raise UserError(
            "the step's operators change with the length of its batch, so its peaks are no polynomial of it",
            hint="predict the lengths you need one by one",
        )
    terms = np.array([s.terms for s in shapes])
    scale = terms.max(axis=0)
    sizes = np.array([[a.size_bytes for a in t.allocations] for t in traces], dtype=float)
    solved = np.linalg.lstsq(terms / scale, sizes, rcond=None)[0].T / scale
    count = len(solved)
    live = np.zeros((count + 1, len(terms[0])))
    live[:count] += solved
    np.subtract.at(live, clocks[0], solved)
    return PeakModel(instants=np.unique(np.cumsum(live[:count], axis=0), axis=0))


def _clocks(trace: Trace) -> Ints:
    """Return how many allocations were made before each was freed.

    Frees between two allocations may come in any order, as those of autocast's cache do.
    """
    starts = [a.start for a in trace.allocations]
    ends = [math.inf if a.end is None else a.end for a in trace.allocations]
    return np.searchsorted(np.array(starts), np.array(ends)).astype(np.int64)


# -- chances --------------------------------------------------------------------------------------


def all_among(chosen: int, good: int, total: int) -> float:
    """Return the chance that ``chosen`` draws without replacement from ``total`` are all among ``good``."""
    return math.prod(max(0, good - i) / (total - i) for i in range(chosen))


def oom_per_step(lengths: Ints, batch: int, limit: int) -> float:
    """Return the chance that a random batch contains a sequence longer than ``limit``."""
    return 1.0 - all_among(batch, int((lengths <= limit).sum()), len(lengths))


def oom_per_epoch(lengths: Ints, batch: int, limit: int, last_limit: int) -> float:
    """Return the chance that some batch of a shuffled epoch contains a sequence longer than ``limit``.

    The last batch holds the remainder in fewer rows, so it can take lengths up to ``last_limit``. The epoch
    is safe only if every longer sequence falls into it.
    """
    long = int((lengths > limit).sum())
    left_over = len(lengths) % batch
    if long == 0:
        return 0.0
    if long > left_over or int(lengths.max()) > last_limit:
        return 1.0
    return 1.0 - all_among(long, left_over, len(lengths))


def quantile_length(lengths: Ints, batch: int, share: float) -> int:
    """Return the padded length that ``share`` of random batches do not exceed: a quantile of the maximum of
    ``batch`` draws.
    """
    ordered = np.unique(lengths)
    ranks = np.searchsorted(np.sort(lengths), ordered, side="right")
    at = bisect.bisect_left(ranks, share, key=lambda k: all_among(batch, int(k), len(lengths)))
    return int(ordered[min(at, len(ordered) - 1)])


# -- ways to batch --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """One way to make an epoch's batches, all with about the same number of real tokens per step.

    ``wasted_ratio``: share of computed tokens that are padding. ``attention_wasted_ratio``: share of the
    computed query-key pairs that are padding or belong to two different sequences. ``worst``: indices of the
    sequences of the batch with the highest peak.
    """

    name: str
    peak_bytes: int
    fits: bool
    steps: int
    padded_tokens: int
    wasted_ratio: float
    attention_wasted_ratio: float
    worst: tuple[int, ...]


_Batch = tuple[Ints, Shape]


def batchings(
    lengths: Ints, batch: int, model: PeakModel, *, fits: Callable[[int], bool], seed: int = 0
) -> tuple[Batching, ...]:
    """Return the ways to batch.

    They are: padding to the longest in random, length-bucketed and sorted batches of ``batch`` rows; sorted
    batches of about equal tokens; and packing into rows of the longest length with full or block-diagonal
    attention.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(lengths))
    pools = [shuffled[i : i + batch * _POOL_BATCHES] for i in range(0, len(lengths), batch * _POOL_BATCHES)]
    bucketed = np.concatenate([p[np.argsort(-lengths[p], kind="stable")] for p in pools])
    longest_first = np.argsort(-lengths, kind="stable")
    budget = batch * float(lengths.mean())
    ways: Mapping[str, list[_Batch]] = {
        "random": _chunks(lengths, shuffled, batch),
        "length-bucketed": _chunks(lengths, bucketed, batch),
        "sorted": _chunks(lengths, longest_first, batch),
        "max-tokens": _by_tokens(lengths, longest_first, budget),
        "packed": _packed(lengths, longest_first, budget, block_diagonal=False),
        "packed-block-diagonal": _packed(lengths, longest_first, budget, block_diagonal=True),
    }
    # However an epoch is shuffled, its longest sequence is in some batch, and in some epoch that batch is
    # full.
    first = longest_first[:batch]
    whole: _Batch = (first, Shape(rows=len(first), length=int(lengths.max())))
    return tuple(
        _judged(
            name,
            made,
            [whole, *made] if name in ("random", "length-bucketed") else made,
            lengths,
            model,
            fits,
        )
        for name, made in ways.items()
    )


def _judged(
    name: str,
    made: list[_Batch],
    possible: list[_Batch],
    lengths: Ints,
    model: PeakModel,
    fits: Callable[[int], bool],
) -> Batching:
    peaks = {shape: model.peak_bytes(shape) for _, shape in dict.fromkeys((0, s) for _, s in possible)}
    worst, shape = max(possible, key=lambda pair: peaks[pair[1]])
    padded = sum(s.rows * s.length for _, s in made)
    pairs = sum(s.terms[-1] for _, s in made)
    real = int(lengths.sum())
    return Batching(
        name=name,
        peak_bytes=peaks[shape],
        fits=fits(peaks[shape]),
        steps=len(made),
        padded_tokens=padded,
        wasted_ratio=1 - real / padded,
        attention_wasted_ratio=max(0.0, 1 - float((lengths.astype(float) ** 2).sum()) / pairs),
        worst=tuple(int(i) for i in worst),
    )


def _chunks(lengths: Ints, order: Ints, batch: int) -> list[_Batch]:
    parts = [order[i : i + batch] for i in range(0, len(order), batch)]
    return [(p, Shape(rows=len(p), length=int(lengths[p].max()))) for p in parts]


def _by_tokens(lengths: Ints, longest_first: Ints, budget: float) -> list[_Batch]:
    """Take as many rows per batch as the budget of padded tokens allows, but at least one."""
    made, at = [], 0
    while at < len(longest_first):
        length = int(lengths[longest_first[at]])
        part = longest_first[at : at + max(1, int(budget // length))]
        made.append((part, Shape(rows=len(part), length=length)))
        at += len(part)
    return made


def _packed(lengths: Ints, longest_first: Ints, budget: float, *, block_diagonal: bool) -> list[_Batch]:
    """Pack by best fit, longest first (Johnson 1974), into rows of the longest length."""
    length = int(lengths.max())
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free length, row), sorted
    for index in longest_first:
        need = int(lengths[index])
        at = bisect.bisect_left(room, (need, -1))
        left, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(int(index))
        bisect.insort(room, (left - need, row))
    together = max(1, round(budget / length))
    made = []
    for i in range(0, len(rows), together):
        part = np.array([x for row in rows[i : i + together] for x in row])
        squares = float((lengths[part].astype(float) ** 2).sum()) if block_diagonal else None
        made.append((part, Shape(rows=len(rows[i : i + together]), length=length, attended=squares)))
    return made
