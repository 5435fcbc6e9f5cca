"""The memory of data whose samples have two sizes, such as nodes and edges: the peaks of random batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from memfit.cost.lengths import Ints, SizePair, fit
from memfit.files.read import parse_json
from memfit.jobs.builtin.fasta import read_text
from memfit.jobs.registry import load
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job, JobRef
from memfit.types.machine import Machine
from memfit.types.plan import Plan
from memfit.workflows.sequence_lengths import QUANTILES, read_csv, traced_peak

COMBINATIONS = ("sum", "largest")
_DRAWS = 2000
_MOST_DIGITS = 4000  # of a number that Python converts
_GRID = 4  # values of each size that are traced: 16 traces for ten terms


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutPair:
    """A step of two sizes that was traced to test the prediction, not to fit it."""

    sizes: tuple[int, int]
    predicted_bytes: int
    traced_bytes: int

    @property
    def error_ratio(self) -> float:
        return self.predicted_bytes / self.traced_bytes - 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PairReport:
    """What the sizes of data mean for the memory of a step that combines ``batch`` random samples.

    ``quantile_bytes``: "p50", "p90", "p99" and "max" -> peak of tensors that this share of the drawn steps
    does not exceed; ``quantile_sizes``: the two sizes of the step that has this peak. ``oom_per_step``: share
    of the drawn steps whose peak plus ``margin_bytes`` is above ``cap_bytes``. ``margin_bytes``: what the
    largest step needs beside its tensors. ``held_out``: traced steps that the fit did not use. ``draws``:
    number of steps drawn.
    """

    names: tuple[str, str]
    samples: int
    batch: int
    combination: str
    draws: int
    cap_bytes: int
    margin_bytes: int
    oom_per_step: float
    quantile_bytes: Mapping[str, int]
    quantile_sizes: Mapping[str, tuple[int, int]]
    held_out: tuple[HeldOutPair, ...]


def read_pairs(path: str, names: tuple[str, str]) -> Ints:
    """Return the two sizes of each sample, of the shape (samples, 2): the columns ``names`` of a .csv file
    with a header line, or these keys of each line of a .jsonl file, empty lines left out. Raises UserError
    for a file with another suffix, and if the file cannot be read, lacks one of them, has no samples, or has
    a value that is not a whole number from 1 to 2,147,483,647."""
    rows = list(_rows(path))
    pairs = [tuple(_size(row, name, f"{path} sample {n}") for name in names) for n, row in enumerate(rows, 1)]
    if not pairs:
        raise UserError(f"{path} has no samples", allowed="at least one line with two sizes")
    return np.array(pairs, np.int64)


def _rows(path: str) -> Iterator[Mapping[str, object]]:
    if path.endswith(".csv"):
        yield from (row for _, row in read_csv(path)[1])
        return
    if not path.endswith(".jsonl"):
        raise UserError(f"--columns cannot read {path}", allowed="a file whose name ends in .csv or .jsonl")
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, what=path)
        except UserError:
            row = None
        if not isinstance(row, dict):
            raise UserError(
                f"{path} line {number} is not a JSON object",
                allowed='one JSON object per line, such as {"nodes": 12, "edges": 30}',
            )
        yield row


def _size(row: Mapping[str, object], name: str, where: str) -> int:
    if name not in row:
        raise UserError(
            f"{where} has no column or key {name!r}", allowed=", ".join(map(str, row)) or "none: it is empty"
        )
    text = "" if row[name] is None else str(row[name]).strip()
    if not text.isdecimal() or len(text) > _MOST_DIGITS or not 1 <= int(text) < 2**31:
        raise UserError(f"{where}: {name} is {text[:40]!r}", allowed="a whole number from 1 to 2,147,483,647")
    return int(text)


def draw_steps(pairs: Ints, batch: int, combination: str) -> Ints:
    """Return the sizes of 2,000 random steps as an array of the shape (2000, 2). ``pairs``: the sizes of all
    samples, at least one, (samples, 2). Each step has ``batch`` samples (all, if there are fewer), drawn
    without replacement. Its two sizes are combined from those of its samples: with "sum" they are added, as
    for graphs in one batch; with "largest" the largest counts, as for padded samples. The same arguments give
    the same steps."""
    rng = np.random.default_rng(0)
    batch = min(batch, len(pairs))
    chosen = np.stack([rng.choice(len(pairs), batch, replace=False) for _ in range(_DRAWS)])
    samples = pairs[chosen]
    steps: Ints = samples.sum(axis=1) if combination == "sum" else samples.max(axis=1)
    return steps


def report_pairs(
    ref: JobRef,
    names: tuple[str, str],
    pairs: Ints,
    *,
    batch: int,
    combination: str,
    plan: Plan,
    machine: Machine,
    cap_bytes: int,
) -> PairReport:
    """Return what ``pairs``, the two sizes of each sample, mean for the memory of the job under ``plan`` on
    ``machine``: its sizes ``names`` are set for each step. ``batch`` and ``combination`` are as in
    `draw_steps`. ``cap_bytes``: memory of one device.

    The peak is fitted, allocation by allocation, to 16 traces that span the drawn steps, and tested on up to
    three more. Raises UserError if the job has no such sizes, or if which operators a step runs depends on
    them.
    """
    steps = draw_steps(pairs, batch, combination)

    def job_at(first: int, second: int) -> Job:
        return load(ref.with_sizes(dict(zip(names, (first, second), strict=True))))

    points = [SizePair(first=a, second=b) for a in _grid(steps[:, 0]) for b in _grid(steps[:, 1])]
    model = fit(
        points, [trace(job_at(p.first, p.second), plan, device=machine.device.trace_kind) for p in points]
    )
    peaks = np.array([model.peak_bytes(SizePair(first=int(a), second=int(b))) for a, b in steps])
    order = np.argsort(peaks, kind="stable")
    places = {name: order[int(np.ceil(share * len(order))) - 1] for name, share in QUANTILES.items()}
    held_out, margin = [], 0
    for place in dict.fromkeys(int(places[name]) for name in ("p50", "p90", "max")):
        first, second = (int(n) for n in steps[place])
        traced_bytes, margin = traced_peak(job_at(first, second), plan, machine)
        held_out.append(
            HeldOutPair(sizes=(first, second), predicted_bytes=int(peaks[place]), traced_bytes=traced_bytes)
        )
    return PairReport(
        names=names,
        samples=len(pairs),
        batch=min(batch, len(pairs)),
        combination=combination,
        draws=len(steps),
        cap_bytes=cap_bytes,
        margin_bytes=margin,
        oom_per_step=float((peaks + margin > cap_bytes).mean()),
        quantile_bytes={name: int(peaks[place]) for name, place in places.items()},
        quantile_sizes={name: (int(steps[p, 0]), int(steps[p, 1])) for name, p in places.items()},
        held_out=tuple(held_out),
    )


def _grid(values: Ints) -> list[int]:
    """Return four sizes, equally spaced from the smallest value to the largest. If these are less than three
    apart, return the four consecutive sizes from the smallest value on."""
    low, high = int(values.min()), int(values.max())
    return [int(v) for v in np.linspace(low, max(high, low + _GRID - 1), _GRID)]
