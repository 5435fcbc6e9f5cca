"""A PoC's record in the format that is shared, its schema, and what two such records may be compared in.

The schema is JSON Schema (2020-12), made from the classes below; `docs/record.schema.json` is its text. They
are the reader too, and strict: nothing is turned into another type. What a schema cannot say is in `claims`.
Units are in the names: bytes, seconds, joules. Memory is the peak of live tensors; a run's energy has the
boundary that it was measured in, without which no two figures are the same quantity.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from memfit import wire
from memfit.shared.claims import faults
from memfit.types.errors import UserError
from memfit.types.text import escaped

FORMAT, VERSION = "memfit-record", 1
_MOST_BYTES = 16 * 2**20

_LARGEST = 2**63 - 1

Count = Annotated[int, pydantic.Field(ge=0, le=_LARGEST)]
Whole = Annotated[int, pydantic.Field(gt=0, le=_LARGEST)]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Effect = Literal["E0", "E1", "E2", "E3"]
Outcome = Literal["", "ok", "oom", "timeout", "failed"]
Told = Annotated[str, pydantic.Field(pattern=r"\S")]  # not blank


def _dated(given: str) -> str:
    try:
        moment = datetime.datetime.fromisoformat(given)
    except ValueError as error:
        raise ValueError(f"{given} is no date: {error}") from error
    if moment > datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1):  # clocks differ
        raise ValueError(f"{given} is in the future")
    return given


_MOMENT = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})$"
Moment = Annotated[str, pydantic.Field(pattern=_MOMENT), pydantic.AfterValidator(_dated)]


class Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(Part):
    job: Told
    size: str
    parameters: Whole


class Data(Part):
    source: str
    batch_size: Whole
    steps_per_run: Whole


class Energy(Part):
    """Mean of a run, inside ``boundary``."""

    joules: Positive
    boundary: Told


class Side(Part):
    """One plan: every run of it that finished, and what became of it under the cap ("ok", "oom", ...;
    "" where it was not tried). ``metric_by_seed``: the science's own measure."""

    plan: Mapping[str, Mapping[str, bool | int | str]]
    ranks: Whole
    engine: Told
    effect: Effect
    under_cap: Outcome
    predicted_peak_bytes: Whole | None
    measured_peak_bytes: Whole | None
    peak_source: str
    predicted_step_s: Positive | None
    step_s: Positive | None
    energy: Energy | None
    metric_by_seed: Mapping[str, Finite]


class Judgement(Part):
    kind: Literal["equivalent", "different", "undecided"]
    effect: Effect
    test: str
    margin: Positive | None
    difference: Finite | None
    low: Finite | None
    high: Finite | None
    pairs: Count

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Judgement:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError("low is above high")
        return self


class Trouble(Part):
    """What adopting the plan took; ``attended_minutes`` null: nobody counted."""

    commands: Count
    changed_lines: Count
    packages: Count
    installed_mib: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
    attended_minutes: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] | None
    failed_attempts: Count


class Shared(Part):
    """One proof of concept. ``step_time_ratio``: the recommended plan's step by plain training's, median of
    the pairs that ran one after the other; absent from records older than it."""

    format: Literal["memfit-record"]
    version: Literal[1]
    poc_id: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9._-]{1,80}$")]
    created: Moment
    command: str
    model: Model
    data: Data
    hardware: Mapping[str, str]
    software: Mapping[str, str]
    place: str
    cap_bytes: Whole
    cap_reason: str
    metric: str
    metric_unit: str
    metric_naive: Finite | None
    baseline: Side
    recommended: Side
    step_time_ratio: Positive | None = None
    verdict: Judgement | None
    reproducible: bool | None
    effort: Trouble
    notes: Sequence[str]

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Shared:
        """A claim that the record's own numbers do not carry is none."""
        for fault in faults(self):
            raise ValueError(fault)
        return self


def schema() -> Mapping[str, Any]:
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"{FORMAT} {VERSION}"}
    return {**Shared.model_json_schema(), **head}


def text(record: Shared) -> str:
    """The one way to write it: equal records are equal bytes."""
    told = record.model_dump(mode="json")
    if told["step_time_ratio"] is None:
        del told["step_time_ratio"]  # a record from before it was written stays as it was
    return escaped(json.dumps(told, indent=2, sort_keys=True, ensure_ascii=False)) + "\n"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a field that is there twice: which one counts is up to the reader."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def parsed(raw: str, *, what: str) -> Shared:
    """Raises UserError with the first fault: its place, what was given, what is allowed."""
    try:
        found = json.loads(raw, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise UserError(f"{what} is not JSON: {error.msg} in line {error.lineno}") from error
    except RecursionError:
        raise UserError(f"{what} is nested deeper than a record") from None
    except ValueError as error:  # a number with thousands of digits
        raise UserError(f"{what} is no record: {error}") from error
    if isinstance(found, dict) and found.get("format") == FORMAT:
        version = found.get("version")
        if isinstance(version, bool) or version != VERSION:
            told = ascii(version)[:40]
            raise UserError(f"{what} has version {told} of the format", allowed=str(VERSION))
    return checked(found, what=what)


def checked(found: object, *, what: str) -> Shared:
    """Raises UserError as `parsed` does."""
    try:
        record = Shared.model_validate(found)
    except pydantic.ValidationError as error:
        raise wire.fault(error, what) from error
    for place, told in _texts(record.model_dump(mode="python")):
        if any("\ud800" <= c <= "\udfff" for c in told):
            raise UserError(f"{what} is broken at {place}: {told!a} has half a character (a lone surrogate)")
    return record


def _texts(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in it, keys too, with its place."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield place, key
            yield from _texts(inner, f"{place}.{key}".lstrip("."))
    elif isinstance(value, Sequence):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{place}.{index}")


def read(path: Path) -> Shared:
    """Raises UserError."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path} is larger than a record", allowed=f"{_MOST_BYTES} bytes")
        return parsed(path.read_text(encoding="utf-8"), what=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
