"""The nouns as JSON and back: between processes, into the store, out to ``--json``.

Encoding is plain; decoding goes through pydantic, so that a broken or foreign record is refused with
the place where it is wrong instead of half-read.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from memfit.types.errors import UserError

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Dataclasses, enums, tuples and mappings to what ``json`` takes. An IntEnum stays its number."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    return value


def dumps(value: Any, *, indent: int | None = None) -> str:
    """JSON text. Not-a-number and infinity become the strings "nan" and "inf", which `loads` reads back."""
    return json.dumps(_finite(to_plain(value)), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value


def loads(kind: type[T], text: str, *, what: str = "record") -> T:
    """Parse JSON text into the dataclass `kind`. Raises UserError naming the place of the fault."""
    import pydantic

    try:
        return pydantic.TypeAdapter(kind).validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"]) or "the whole text"
        raise UserError(f"{what} is broken at {place}: {first['msg']}") from error
