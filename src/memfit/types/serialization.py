"""Convert the data types to JSON and back: between processes, into the store, and for ``--json``.

Encoding is plain. Decoding goes through pydantic, so that a broken or foreign record is rejected with the
location of the fault instead of being partly read.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import re
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from memfit.types.errors import UserError

if TYPE_CHECKING:
    import pydantic

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Convert a value to what ``json`` accepts, also inside of it: dataclasses and mappings become dicts with
    text as keys, lists and tuples become lists, an enum becomes its value. Other objects are returned
    unchanged.
    """
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
    """Return JSON text of a value that `to_plain` can convert. ``indent`` is that of ``json.dumps``.

    Floats that are not finite become the strings "nan", "inf" and "-inf", which `loads` reads back.
    """
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
    """Parse JSON text into the dataclass `kind`. Raises UserError with the location of the first fault if the
    text is not JSON or does not conform to `kind`; `what` names the text in the message.
    """
    import pydantic

    try:
        return pydantic.TypeAdapter(kind).validate_json(text)
    except pydantic.ValidationError as error:
        raise to_user_error(error, what) from error


def restore(kind: Any, plain: Any) -> Any:
    """Return the value of type ``kind`` of which `to_plain` has returned ``plain``. Numbers keep their type:
    an integer in a field for floats stays one. Only for what memfit itself has written: types are not
    checked.

    ``kind``: a dataclass, an enum, ``tuple[...]``, ``list[...]``, a mapping with text as keys, a union of one
    of these with None, or a type of plain values.
    """
    if plain is None:
        return None
    if dataclasses.is_dataclass(kind):
        return _restore_dataclass(kind, plain)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(plain)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        branches = [a for a in arguments if a is not type(None)]
        return restore(branches[0], plain) if len(branches) == 1 else plain
    if origin is tuple and arguments[-1] is not Ellipsis:
        return tuple(restore(a, v) for a, v in zip(arguments, plain, strict=True))
    if origin in (tuple, list):
        return origin(restore(arguments[0], v) for v in plain)
    if isinstance(plain, dict):
        return {k: restore(arguments[1], v) for k, v in plain.items()}
    return plain


def _restore_dataclass(kind: Any, plain: Mapping[str, Any]) -> Any:
    hints = _hints(kind)
    return kind(**{name: restore(hints[name], value) for name, value in plain.items()})


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


_SHOULD = re.compile(r"(?:Input|String|Value|List|Tuple) should (?:be )?(.+)", re.DOTALL)
_OBJECT = re.compile(r"a valid dictionary( or (?:an )?instance of \w+)?")  # as it is called in JSON
_LONGEST = 80


def to_user_error(error: pydantic.ValidationError, what: str) -> UserError:
    """Return a UserError for the first fault of ``error``: its location, what was given and what is allowed.
    If pydantic does not say what is allowed, its message takes the place of the latter two. `what` names the
    text with the fault.
    """
    main_error, *other_errors = error.errors(include_url=False, include_context=False)
    branches = [e for e in other_errors if main_error["loc"] and e["loc"][:-1] == main_error["loc"][:-1]]
    # for a value with several allowed types
    branches = [e for e in branches if e["input"] is main_error["input"]]
    path = main_error["loc"][:-1] if branches else main_error["loc"]
    location = ".".join(map(str, path)) or ("the whole text" if main_error["type"] == "json_invalid" else "")
    at_field = f" at {_short(location)}" if location else ""
    matches = (_SHOULD.fullmatch(_OBJECT.sub("an object", e["msg"])) for e in (main_error, *branches))
    accepted = [m[1] for m in matches if m]
    accepted = accepted or (["a list"] if main_error["type"] == "sequence_str" else [])
    if not accepted:
        # pytest adds lines to the text of an assertion
        message = main_error["msg"].removeprefix("Value error, ").partition("\n")[0]
        why_it_is_invalid = _short(message, 6 * _LONGEST)
        return UserError(f"{what} is invalid{at_field}: {why_it_is_invalid}")
    given_value = _short(ascii(main_error["input"]))
    return UserError(f"{what} is invalid{at_field}: it is {given_value}", allowed=" or ".join(accepted))


def _short(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."
