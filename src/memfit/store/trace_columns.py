"""A trace as bytes: columns of numbers, and tables of what repeats.

A whole trace has some hundred thousand allocations and operator calls, which differ in few operators and
modules. As columns it takes a tenth of the bytes and of the time that pickled dataclasses take.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy

from memfit.types.serialization import restore, to_plain
from memfit.types.trace import Allocation, Category, OpCall, Phase, Trace, rows_of

_PLACE: Final = ("phase", "step", "module")  # fields of both kinds of rows
_ROWS: Final[Mapping[str, tuple[Any, tuple[str, ...], tuple[str, ...]]]] = {
    # field of Trace -> (class of a row, fields as columns, fields in a table)
    "allocations": (
        Allocation,
        ("start", "end", "size_bytes", "requested_bytes", "pieces"),
        ("category", "op", "line", "file", "stream"),
    ),
    "ops": (
        OpCall,
        ("clock", "times"),
        ("op", "signature", "dtype", "flops", "moved_bytes", "stream", "group", "waits"),
    ),
}
_NONE: Final = -1  # in a column; clocks and sizes are not negative
_ENUMS: Final = {"phase": Phase, "category": Category}


def to_bytes(trace: Trace) -> bytes:
    """Return the trace as bytes, which `from_bytes` reads."""
    header: dict[str, Any] = {"columns": []}
    arrays: list[numpy.ndarray] = []

    def add(name: str, values: Iterable[int]) -> None:
        array = numpy.fromiter(values, dtype=numpy.int64)
        array = numpy.diff(array, prepend=0)  # clocks mostly rise by little, and equal neighbours become 0
        array = array.astype(_narrowest(array))
        header["columns"].append((name, array.dtype.str, len(array)))
        arrays.append(array)

    for name, (_, numbers, repeated) in _ROWS.items():
        rows = getattr(trace, name)
        for number in numbers:
            values = map(operator.attrgetter(number), rows)
            has_none = number == "end"
            add(f"{name}.{number}", (_NONE if v is None else v for v in values) if has_none else values)
        for label, fields in (("place", _PLACE), ("work", repeated)):
            table: dict[tuple[Any, ...], int] = {}
            entries = map(operator.attrgetter(*fields), rows)
            add(f"{name}.{label}", [table.setdefault(entry, len(table)) for entry in entries])
            header[f"{name}.{label}"] = [to_plain(entry) for entry in table]
    header["fields"] = {
        f.name: to_plain(getattr(trace, f.name)) for f in dataclasses.fields(trace) if f.name not in _ROWS
    }
    text = json.dumps(header).encode()
    return b"".join((len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in arrays)))


def from_bytes(data: bytes) -> Trace:
    """Return the trace that `to_bytes` was given. Raises ValueError, KeyError, TypeError or IndexError if
    ``data`` is something else."""
    begin = 8 + int.from_bytes(data[:8], "little")
    header, columns = json.loads(data[8:begin]), dict[str, numpy.ndarray]()
    for name, dtype, count in header["columns"]:
        array = numpy.frombuffer(data, numpy.dtype(dtype), count, begin)
        begin += array.nbytes
        columns[name] = numpy.cumsum(array, dtype=numpy.int64)
    hints = typing.get_type_hints(Trace)
    fields = {name: restore(hints[name], value) for name, value in header["fields"].items()}
    for name, (kind, numbers, repeated) in _ROWS.items():
        values: dict[str, Iterable[Any]] = {n: columns[f"{name}.{n}"].tolist() for n in numbers}
        if "end" in values:
            values["end"] = [None if v == _NONE else v for v in values["end"]]
        for label, names in (("place", _PLACE), ("work", repeated)):
            values |= _repeated_values(names, header[f"{name}.{label}"], columns[f"{name}.{label}"])
        fields[name] = rows_of(kind, values, len(columns[f"{name}.place"]))
    return Trace(**fields)


def _narrowest(array: numpy.ndarray) -> Any:
    low, high = (int(array.min()), int(array.max())) if len(array) else (0, 0)
    return next(
        kind
        for kind in (numpy.int8, numpy.int16, numpy.int32, numpy.int64)
        if numpy.iinfo(kind).min <= low and high <= numpy.iinfo(kind).max
    )


def _repeated_values(
    names: Sequence[str], table: Sequence[Sequence[Any]], indices: numpy.ndarray
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for place, name in enumerate(names):
        objects = numpy.empty(len(table), dtype=object)
        for index, entry in enumerate(table):
            value = entry[place]
            value = _ENUMS[name](value) if name in _ENUMS else value
            objects[index] = tuple(value) if isinstance(value, list) else value
        columns[name] = objects[indices].tolist()
    return columns
