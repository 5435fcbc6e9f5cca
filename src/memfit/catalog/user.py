"""A user's own machine file: strict, every problem told at once.

::

    name = "lab box"
    device_count = 2
    place = "japan"            # or a [place] table with usd_per_kwh, co2_g_per_kwh and pue_ratio
    device = "RTX-4090"        # or a [device] table:

    [device]
    name = "Custom 48GB"
    kind = "cuda"
    memory_bytes = {value = 50e9, source = "torch total_memory", date = "2025-06-01", kind = "measured"}
    peak_flops.bfloat16 = {value = 180e12, source = "data sheet", date = "2024-03"}
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memfit.catalog import load
from memfit.types.errors import UserError
from memfit.types.machine import Device, Fact, Machine


def from_toml(path: str | Path) -> Machine:
    """Read a machine file. Raises UserError: no file, no TOML, unknown or missing keys, odd values."""
    data = _read(Path(path))
    for key, lookup in (("device", load.device), ("place", load.place)):
        if isinstance(data.get(key), str):
            data[key] = lookup(data[key])
    unknown = list(_unknown_keys(Machine, data))
    made, wrong = _build(data)
    problems = unknown + (wrong if made is None else list(_odd_values(made)))
    if problems or made is None:
        raise UserError(f"machine file {path}: {'; '.join(problems)}")
    return made


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"machine file {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"machine file {path} is not TOML: {error}") from error


def _build(data: dict[str, Any]) -> tuple[Machine | None, list[str]]:
    import pydantic

    try:
        return pydantic.TypeAdapter(Machine).validate_python(data), []
    except pydantic.ValidationError as error:
        return None, [f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()]


def _unknown_keys(noun: Any, data: Any, where: str = "") -> Iterator[str]:
    """Keys that no field of the dataclass `noun` takes, all the way down, each with the nearest field."""
    if not isinstance(data, Mapping):
        return
    hints = typing.get_type_hints(noun)
    for key, value in data.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            yield f"{where}{key}: unknown key" + (f" (did you mean {near[0]}?)" if near else "")
        elif typing.get_origin(hints[key]) is Mapping and isinstance(value, Mapping):
            for inner, row in value.items():
                yield from _unknown_keys(Fact, row, f"{where}{key}.{inner}.")
        elif (inner_noun := _dataclass_in(hints[key])) is not None:
            yield from _unknown_keys(inner_noun, value, f"{where}{key}.")


def _dataclass_in(hint: Any) -> Any:
    """``Place`` out of ``Place | None``; None for ``str`` and the like."""
    return next((t for t in typing.get_args(hint) or (hint,) if dataclasses.is_dataclass(t)), None)


def _odd_values(made: Machine) -> Iterator[str]:
    """What is well formed and cannot be true."""
    if made.device_count < 1:
        yield f"device_count: {made.device_count}, but at least 1 is needed"
    if made.device.kind not in ("cpu", "cuda"):
        yield f"device.kind: {made.device.kind!r}, but cpu or cuda is needed"
    if made.place is not None and made.place.pue_ratio.value < 1:
        yield "place.pue_ratio: below 1, but a site draws at least what its computers draw"
    for name, fact in _device_facts(made.device):
        if not fact.value > 0:
            yield f"device.{name}: {fact.value:g}, but a positive number is needed"


def _device_facts(one: Device) -> Iterator[tuple[str, Fact]]:
    for field in dataclasses.fields(one):
        if isinstance(value := getattr(one, field.name), Fact):
            yield field.name, value
    yield from ((f"peak_flops.{dtype}", fact) for dtype, fact in one.peak_flops.items())
