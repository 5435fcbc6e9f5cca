"""Variable sequence lengths: peak memory by rows and padded length, chances of running out of memory, and
ways to batch.

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
    """The shape of a batch, which decides its memory: ``rows``, the number of rows, and ``length``, the
    tokens of each row with its padding. ``terms``: the six terms of the peak, see `PeakModel`.

    ``attended``: number of pairs of a query and a key in attention, summed over the rows. A row in which
    several sequences are packed and attend only to themselves has the sum of the squares of their lengths.
    None: every row has ``length`` squared.
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
class SizePair:
    """Two sizes of a step that decide its memory together, such as nodes and edges, or residues and rows of
    an alignment. ``terms``: all products of them up to the third degree, ten in all."""

    first: int
    second: int

    @property
    def terms(self) -> tuple[float, ...]:
        a, b = float(self.first), float(self.second)
        return (1.0, a, b, a * a, a * b, b * b, a**3, a * a * b, a * b * b, b**3)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PeakModel:
    """Peak of the live tensor bytes of a step, as a function of the shape of its batch.

    ``instants``: an array of shape (instants, terms). Each row has the coefficients of the live bytes after
    one allocation, for the terms of the shape, such as the six of `Shape.terms`: 1, length, pairs of a query
    and a key per row, rows, rows x length, and pairs in all rows. The peak is the highest of these sums.
    """

    instants: npt.NDArray[np.float64]

    def peak_bytes(self, shape: Shape | SizePair) -> int:
        return round(float((self.instants @ np.array(shape.terms)).max()))


def fit(shapes: Sequence[Shape] | Sequence[SizePair], traces: Sequence[Trace]) -> PeakModel:
    """Return the peak model that fits ``traces`` of a step best, by least squares. ``shapes``: for each
    trace, in the same order, rows and length of its batch (`Shape`), or two sizes of its step (`SizePair`).

    Raises UserError if the traces differ in their sequence of allocations and frees, because no formula fits
    then.
    """
    free_positions = [_allocations_before_free(t) for t in traces]
    if any(not np.array_equal(c, free_positions[0]) for c in free_positions):
        if isinstance(shapes[0], SizePair):
            raise UserError(
                "memfit estimate --lengths --columns cannot predict this job: which operators a step runs "
                "depends on the two sizes of its samples, so no formula gives the peak memory of a step by "
                "these sizes",
                hint="run `memfit estimate JOB` for each pair of sizes that you need, with each size as "
                "--dim NAME=NUMBER",
            )
        raise UserError(
            "memfit estimate --lengths cannot predict this job: which operators a step runs depends on the "
            "length of the sequences, so no formula gives the peak memory of a step by that length",
            hint="run `memfit estimate JOB --length N` for each length N that you need; a memfit.Job takes "
            "no --length: make it a function with the argument length that returns the Job",
        )
    terms = np.array([s.terms for s in shapes])
    scale = terms.max(axis=0)
    sizes = np.array([[a.size_bytes for a in t.allocations] for t in traces], dtype=float)
    coefficients = np.linalg.lstsq(terms / scale, sizes, rcond=None)[0].T / scale
    count = len(coefficients)
    live = np.zeros((count + 1, len(terms[0])))
    live[:count] += coefficients
    np.subtract.at(live, free_positions[0], coefficients)
    return PeakModel(instants=np.unique(np.cumsum(live[:count], axis=0), axis=0))


def _allocations_before_free(trace: Trace) -> Ints:
    """Return for each allocation of the trace how many allocations start before it is freed; all of them if
    it is never freed.

    The frees between two allocations may come in any order, as those of autocast's cache do: the result is
    the same.
    """
    starts = [a.start for a in trace.allocations]
    ends = [math.inf if a.end is None else a.end for a in trace.allocations]
    return np.searchsorted(np.array(starts), np.array(ends)).astype(np.int64)


# -- chances --------------------------------------------------------------------------------------


def chance_all_good(chosen: int, good: int, total: int) -> float:
    """Return the chance, from 0 to 1, that ``chosen`` draws without replacement from ``total`` things, of
    which ``good`` are good, are all good. ``chosen``: at most ``total``.
    """
    return math.prod(max(0, good - i) / (total - i) for i in range(chosen))


def oom_per_step(lengths: Ints, batch: int, limit: int) -> float:
    """Return the chance, from 0 to 1, that a batch of ``batch`` sequences, drawn without replacement from
    those with these ``lengths``, contains one that is longer than ``limit``. ``batch``: at most the number of
    ``lengths``.
    """
    return 1.0 - chance_all_good(batch, int((lengths <= limit).sum()), len(lengths))


def oom_per_epoch(lengths: Ints, batch: int, limit: int, last_limit: int) -> float:
    """Return the chance, from 0 to 1, that at least one batch of a shuffled epoch does not fit.

    ``lengths``: the length of every sequence. A batch of ``batch`` sequences fits if none is longer than
    ``limit``. If the number of sequences is not a multiple of ``batch``, the last batch holds the remainder.
    It has fewer rows, so it fits if none is longer than ``last_limit``, which is at least ``limit``.
    """
    long_count = int((lengths > limit).sum())
    remainder = len(lengths) % batch
    if long_count == 0:
        return 0.0
    if long_count > remainder or int(lengths.max()) > last_limit:
        return 1.0
    return 1.0 - chance_all_good(long_count, remainder, len(lengths))


def quantile_length(lengths: Ints, batch: int, share: float) -> int:
    """Return the smallest of the ``lengths`` that is enough for at least the ``share`` (0 to 1) of random
    batches: none of their sequences is longer. A batch is ``batch`` sequences drawn without replacement, at
    most as many as there are.
    """
    distinct_lengths = np.unique(lengths)
    ranks = np.searchsorted(np.sort(lengths), distinct_lengths, side="right")
    index = bisect.bisect_left(ranks, share, key=lambda k: chance_all_good(batch, int(k), len(lengths)))
    return int(distinct_lengths[min(index, len(distinct_lengths) - 1)])


# -- ways to batch --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """One way to make the batches of an epoch. The ways that `batchings` compares have about the same number
    of real tokens per step.

    ``peak_bytes``: the highest predicted peak of all batches that can occur. ``fits``: whether that peak fits
    the memory. ``steps``: number of batches. ``padded_tokens``: computed tokens of the epoch, padding
    included. ``wasted_ratio``: share of them that are padding. ``attention_wasted_ratio``: share of the
    computed pairs of a query and a key that have padding or tokens of two different sequences. ``worst``:
    indices, in the list of lengths, of the sequences in the batch with the highest peak.
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
    lengths: Ints, batch: int, model: PeakModel, *, fits: Callable[[int], bool]
) -> tuple[Batching, ...]:
    """Return six ways to make the batches of an epoch from sequences of these ``lengths``, with the peak that
    ``model`` predicts for each, in this order:

    - "random": ``batch`` rows in random order, padded to the longest of the batch
    - "length-bucketed": the same, but sorted by length within random pools of 50 batches
    - "sorted": the same, but sorted by length over the whole epoch, longest first
    - "max-tokens": sorted by length, longest first; each batch has as many rows as have, with padding, at
      most ``batch`` times the mean length in tokens, but at least one
    - "packed": several sequences in one row, as long as the longest sequence, with attention over the whole
      row
    - "packed-block-diagonal": the same, with attention only within each sequence

    The peak of the first two holds for every order: it is at least that of a full batch with the longest
    sequence. ``fits``: returns whether a peak in bytes fits.
    """
    random_order = np.random.default_rng(0).permutation(len(lengths))
    pools = [
        random_order[i : i + batch * _POOL_BATCHES] for i in range(0, len(lengths), batch * _POOL_BATCHES)
    ]
    bucketed_order = np.concatenate([p[np.argsort(-lengths[p], kind="stable")] for p in pools])
    longest_first = np.argsort(-lengths, kind="stable")
    budget = batch * float(lengths.mean())
    batches_by_name: Mapping[str, list[_Batch]] = {
        "random": _chunks(lengths, random_order, batch),
        "length-bucketed": _chunks(lengths, bucketed_order, batch),
        "sorted": _chunks(lengths, longest_first, batch),
        "max-tokens": _by_tokens(lengths, longest_first, budget),
        "packed": _pack(lengths, longest_first, budget, block_diagonal=False),
        "packed-block-diagonal": _pack(lengths, longest_first, budget, block_diagonal=True),
    }
    # However an epoch is shuffled, its longest sequence is in some batch, and in some epoch that batch is
    # full.
    longest = longest_first[:batch]
    full_batch: _Batch = (longest, Shape(rows=len(longest), length=int(lengths.max())))
    return tuple(
        _judge(
            name,
            batches,
            [full_batch, *batches] if name in ("random", "length-bucketed") else batches,
            lengths,
            model,
            fits,
        )
        for name, batches in batches_by_name.items()
    )


def _judge(
    name: str,
    batches: list[_Batch],
    possible_batches: list[_Batch],
    lengths: Ints,
    model: PeakModel,
    fits: Callable[[int], bool],
) -> Batching:
    peaks = {
        shape: model.peak_bytes(shape) for _, shape in dict.fromkeys((0, s) for _, s in possible_batches)
    }
    worst, shape = max(possible_batches, key=lambda pair: peaks[pair[1]])
    padded_tokens = sum(s.rows * s.length for _, s in batches)
    pair_count = sum(s.terms[-1] for _, s in batches)
    real_tokens = int(lengths.sum())
    return Batching(
        name=name,
        peak_bytes=peaks[shape],
        fits=fits(peaks[shape]),
        steps=len(batches),
        padded_tokens=padded_tokens,
        wasted_ratio=1 - real_tokens / padded_tokens,
        attention_wasted_ratio=max(0.0, 1 - float((lengths.astype(float) ** 2).sum()) / pair_count),
        worst=tuple(int(i) for i in worst),
    )


def _chunks(lengths: Ints, order: Ints, batch: int) -> list[_Batch]:
    parts = [order[i : i + batch] for i in range(0, len(order), batch)]
    return [(p, Shape(rows=len(p), length=int(lengths[p].max()))) for p in parts]


def _by_tokens(lengths: Ints, longest_first: Ints, budget: float) -> list[_Batch]:
    """Return batches of the sequences in the order ``longest_first``. Each has as many rows, padded to its
    longest sequence, as have at most ``budget`` tokens together, but at least one.
    """
    batches, start = [], 0
    while start < len(longest_first):
        length = int(lengths[longest_first[start]])
        indices = longest_first[start : start + max(1, int(budget // length))]
        batches.append((indices, Shape(rows=len(indices), length=length)))
        start += len(indices)
    return batches


def _pack(lengths: Ints, longest_first: Ints, budget: float, *, block_diagonal: bool) -> list[_Batch]:
    """Return batches of rows that are as long as the longest sequence. Several sequences are packed into a
    row by best fit: in the order ``longest_first``, each goes into the row with the least free space that is
    enough (Johnson 1974). A batch has the number of rows that is nearest to ``budget`` tokens, padding
    included, but at least one; the last may have fewer.

    ``block_diagonal``: whether a token attends only to its own sequence, not to the whole row.
    """
    length = int(lengths.max())
    rows: list[list[int]] = []
    free_rows: list[tuple[int, int]] = []  # (free length, row), sorted
    for index in longest_first:
        sequence_length = int(lengths[index])
        position = bisect.bisect_left(free_rows, (sequence_length, -1))
        free_length, row = free_rows.pop(position) if position < len(free_rows) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(int(index))
        bisect.insort(free_rows, (free_length - sequence_length, row))
    rows_per_batch = max(1, round(budget / length))
    batches = []
    for i in range(0, len(rows), rows_per_batch):
        indices = np.array([x for row in rows[i : i + rows_per_batch] for x in row])
        squares = float((lengths[indices].astype(float) ** 2).sum()) if block_diagonal else None
        batches.append(
            (indices, Shape(rows=len(rows[i : i + rows_per_batch]), length=length, attended=squares))
        )
    return batches
