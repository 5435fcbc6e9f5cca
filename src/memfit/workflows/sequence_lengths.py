"""The memory of real data: what the lengths of its sequences mean for the peaks of a job's batches, predicted
from a handful of traces.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from memfit.cost import lengths as cost
from memfit.cost.lengths import Batching, Ints, PeakModel, Shape
from memfit.cost.memory import levels
from memfit.files.read import read_bytes, unpacked_limit
from memfit.jobs.builtin.fasta import read_fasta, read_text
from memfit.planner.batch_shape import with_batch_shape
from memfit.planner.capacity import needed_bytes
from memfit.planner.evaluate import Predictor
from memfit.planner.request import job_facts
from memfit.trace.tracer import trace
from memfit.types.errors import UserError, first_line
from memfit.types.job import Job
from memfit.types.machine import Machine
from memfit.types.plan import Plan

QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_SHORTEST = 16
_MOST_NPZ_BYTES = 2**29
_MOST_NAMES, _NAME_LENGTH = 20, 40  # of columns in an error: how many, and characters of each
_LIMIT = 2**63  # lengths are 64-bit integers
_FASTA = (".fasta", ".fa", ".faa", ".fasta.gz", ".fa.gz", ".faa.gz")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """A batch shape that was traced to test the peak model, not to fit it: the peak that the model predicts
    for it, and the peak in the trace."""

    rows: int
    length: int
    predicted_bytes: int
    traced_bytes: int

    @property
    def error_ratio(self) -> float:
        return self.predicted_bytes / self.traced_bytes - 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LengthReport:
    """What a set of sequence lengths means for the memory of training.

    ``batch``: sequences per step. ``fits_up_to``: the longest of the lengths to which all sequences of a
    batch can be padded so that it fits; 0 if none. ``oom_per_step``: probability (0 to 1) that a random batch
    does not fit; ``oom_per_epoch``: that at least one batch of a shuffled epoch does not. ``quantile_bytes``:
    "p50", "p90", "p99" and "max" -> peak that this share of random batches, each padded to its longest
    sequence, does not exceed. ``first``: indices, from 0, of the ``batch`` longest sequences, which should be
    tried first. ``batchings``: ways to make batches; ``best``: name of the one with the lowest peak, and of
    several such the one with the least padding.

    All peaks are of live tensors; a batch fits if its peak plus ``margin_bytes`` is at most ``cap_bytes``.
    """

    sequences: int
    batch: int
    longest: int
    cap_bytes: int
    margin_bytes: int  # beside the tensors, at the longest batch
    fits_up_to: int
    oom_per_step: float
    oom_per_epoch: float
    quantile_bytes: Mapping[str, int]
    curve_bytes: Mapping[int, int]  # padded length -> peak of a whole batch
    held_out: tuple[HeldOut, ...]
    first: tuple[int, ...]
    batchings: tuple[Batching, ...]
    best: str


def read_lengths(path: str, *, column: str | None = None) -> Ints:
    """Return the lengths of sequences from the file ``path``, in its order.

    By the file's name, they are: the lengths of the sequences of a FASTA file (.fasta, .fa, .faa, also with
    .gz); a one-dimensional array of whole numbers in an .npz file; a column of a .csv file, whose first line
    has the names; in any other file, the whole number on each line, without empty lines. ``column``: name of
    the array or of the column, ignored for other files; None: the first array of whole numbers, or the first
    column whose first value is one.

    Raises UserError if the file cannot be read, has no such array or column, has no lengths, or has a length
    that is not a whole number of at least 1 and below 2**63, and for a .csv file without names. If a text is
    not a whole number, the error names its line.
    """
    if path.endswith(_FASTA):
        values = [len(p.sequence) for p in read_fasta(path)]
    elif path.endswith(".npz"):
        values = _from_npz(path, column)
    elif path.endswith(".csv"):
        values = _from_csv(path, column)
    else:
        lines = enumerate(read_text(path).splitlines(), start=1)
        values = [_whole(x.strip(), f"{path} line {n}") for n, x in lines if x.strip()]
    if not values or min(values) < 1 or max(values) >= _LIMIT:
        wrong_length = "a length below 1" if values and min(values) < 1 else "a length of 2**63 or more"
        raise UserError(
            f"{path} contains {wrong_length if values else 'no lengths'}",
            allowed="one or more lengths, each a whole number of at least 1 and below 2**63",
        )
    return np.array(values, np.int64)


def _whole(text: str, path_and_line: str) -> int:
    if not text.isdecimal() or len(text) > len(str(_LIMIT)):
        raise UserError(
            f"{path_and_line}: {text[:40]!r} is not a length",
            allowed="a whole number, at least 1 and below 2**63: how many tokens or residues a sequence has",
        )
    return int(text)


def _from_npz(path: str, column: str | None) -> list[int]:
    data = read_bytes(Path(path), most_bytes=_MOST_NPZ_BYTES)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked_bytes = sum(info.file_size for info in archive.infolist())
        if unpacked_bytes > (most_bytes := unpacked_limit(len(data), _MOST_NPZ_BYTES)):
            raise UserError(
                f"{path} is too large when unpacked",
                allowed=f"at most {most_bytes} bytes for a file of this size",
            )
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files if column in (None, k)}
    # Both libraries raise all of these for damaged files.
    except (
        ArithmeticError,
        LookupError,
        MemoryError,
        NotImplementedError,
        OSError,
        RuntimeError,
        SyntaxError,
        TypeError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(
            f"cannot read {path} as an .npz file of NumPy: {first_line(error)[:200]}",
            allowed="a file that numpy.savez wrote, without Python objects",
        ) from error
    length_arrays = [a for a in arrays.values() if a.ndim == 1 and np.issubdtype(a.dtype, np.integer)]
    if not length_arrays:
        with_the_name = f" with the name {column!r}" if column else ""
        raise UserError(
            f"the .npz file {path} has no one-dimensional array of whole numbers{with_the_name}",
            allowed="such an array with the lengths of the sequences",
            hint="--column names the array; without it, the first such array is used",
        )
    return [int(v) for v in length_arrays[0]]


def read_csv(path: str) -> tuple[Sequence[str], list[tuple[int, Mapping[str, Any]]]]:
    """Return (the names in the header line of a CSV file; for each further line that is not empty, its
    number and its values by name, None where the line is too short). Raises UserError if it cannot be
    read."""
    reader = csv.DictReader(io.StringIO(read_text(path)))
    try:
        rows: list[tuple[int, Mapping[str, Any]]] = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"cannot read {path} as CSV: {error}") from error
    return reader.fieldnames or [], rows


def _from_csv(path: str, column: str | None) -> list[int]:
    column_names, rows = read_csv(path)
    first = rows[0][1] if rows else {}
    column_name = column or next((n for n in column_names if (first.get(n) or "").strip().isdecimal()), None)
    if column_name is None or column_name not in column_names:
        named_or_of_whole_numbers = column or "whose first value is a whole number"
        names_text = ", ".join(name[:_NAME_LENGTH] for name in column_names[:_MOST_NAMES]) or "none"
        names_text += ", …" if len(column_names) > _MOST_NAMES else ""
        raise UserError(
            f"the CSV file {path} has no column {named_or_of_whole_numbers}",
            allowed=f"a column with the lengths; the columns of this file are {names_text}",
            hint="--column names the column",
        )
    if column is None and column_name.strip().isdecimal():
        raise UserError(
            f"the first line of the CSV file {path} has a number in the column of lengths",
            allowed="names of the columns in the first line",
        )
    return [_whole((row[column_name] or "").strip(), f"{path} line {number}") for number, row in rows]


def peak_model(job: Job, plan: Plan, longest: int, device: str) -> PeakModel:
    """Return a model of the peak of live tensors under ``plan``, by rows and length of a batch. ``device``:
    kind of device that is traced, such as "cpu" or "cuda".

    It is fitted to six traces: three lengths (a quarter, a half and all of ``longest``, rounded up to
    multiples of 16 but not above ``longest``, for which alone a model may have positions; 16, 32 and 64 if
    these are not distinct), each with one and with two rows per micro-batch. Raises UserError if which
    operators a step runs depends on the length, or if no tensor of the job's batch has a second dimension.
    """
    rows = plan.micro_batches
    lengths = sorted({max(_SHORTEST, min(longest, -(-longest * q // 64) * 16)) for q in (1, 2, 4)})
    if len(lengths) < 3:
        lengths = [_SHORTEST, 2 * _SHORTEST, 4 * _SHORTEST]
    shapes = [Shape(rows=r, length=n) for r in (rows, 2 * rows) for n in lengths]
    traces = [trace(with_batch_shape(job, s.rows, s.length), plan, device=device) for s in shapes]
    return cost.fit(shapes, traces)


def report(
    job: Job,
    lengths: Ints,
    *,
    batch: int,
    plan: Plan,
    machine: Machine,
    cap_bytes: int,
) -> LengthReport:
    """Return what the ``lengths`` mean for memory if each step trains ``batch`` sequences (all, if there are
    fewer) with ``plan``, and the memory of one device is limited to ``cap_bytes``.

    Raises UserError if no tensor of the job's batch has a second dimension, or if which operators a step runs
    depends on the length.
    """
    batch, longest = min(batch, len(lengths)), int(lengths.max())
    model = peak_model(job, plan, longest, machine.device.trace_kind)
    held_out, margin = _compare_with_traces(job, plan, machine, model, (batch, longest))

    def fits(peak_bytes: int) -> bool:
        return peak_bytes + margin <= cap_bytes

    distinct = np.unique(lengths)
    last_rows = len(lengths) % batch or batch
    limit, last_limit = (
        max((int(n) for n in distinct if fits(model.peak_bytes(Shape(rows=rows, length=int(n))))), default=0)
        for rows in (batch, last_rows)
    )
    eighths = sorted({max(1, longest * i // 8) for i in range(1, 9)})
    curve_bytes = {n: model.peak_bytes(Shape(rows=batch, length=n)) for n in eighths}
    batchings = cost.batchings(lengths, batch, model, fits=fits)
    return LengthReport(
        sequences=len(lengths),
        batch=batch,
        longest=longest,
        cap_bytes=cap_bytes,
        margin_bytes=margin,
        fits_up_to=limit,
        oom_per_step=cost.oom_per_step(lengths, batch, limit),
        oom_per_epoch=cost.oom_per_epoch(lengths, batch, limit, last_limit),
        quantile_bytes={
            name: model.peak_bytes(Shape(rows=batch, length=cost.quantile_length(lengths, batch, share)))
            for name, share in QUANTILES.items()
        },
        curve_bytes=curve_bytes,
        held_out=held_out,
        first=tuple(int(i) for i in np.argsort(-lengths, kind="stable")[:batch]),
        batchings=batchings,
        best=min(batchings, key=lambda w: (w.peak_bytes, w.padded_tokens)).name,
    )


def _compare_with_traces(
    job: Job, plan: Plan, machine: Machine, model: PeakModel, longest_batch: tuple[int, int]
) -> tuple[tuple[HeldOut, ...], int]:
    """Compare the peak model with traces of whole batches of two lengths: two thirds of the longest (at least
    16), and the longest. ``longest_batch``: (rows, longest length).

    Returns (the comparisons, the bytes that a batch of the longest length needs beside its live tensors; at
    least 0).
    """
    rows, longest = longest_batch
    held_out, margin = [], 0
    for length in dict.fromkeys((max(_SHORTEST, longest * 2 // 3), longest)):
        traced_bytes, margin = traced_peak(with_batch_shape(job, rows, length), plan, machine)
        predicted_bytes = model.peak_bytes(Shape(rows=rows, length=length))
        held_out.append(
            HeldOut(rows=rows, length=length, predicted_bytes=predicted_bytes, traced_bytes=traced_bytes)
        )
    return tuple(held_out), margin


def traced_peak(job: Job, plan: Plan, machine: Machine) -> tuple[int, int]:
    """Return (the peak of live tensors in the trace of a step of ``job`` under ``plan``, the bytes that the
    step needs on a device of ``machine`` beside them; at least 0)."""
    predictor = Predictor(job=job, machine=machine, job_facts=job_facts(job, machine.device.kind))
    traced_bytes = int(levels(predictor.trace(plan))[1].max())
    return traced_bytes, max(0, needed_bytes(predictor.whole(plan), machine) - traced_bytes)
