"""Read files that nobody vouches for: regular files only, of bounded size, depth and number lengths. Whatever
is wrong with one is a UserError of one short line.

Every reader of memfit starts here. Files that memfit itself wrote into its cache, or ships, are read as they
are.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import stat
import tomllib
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from memfit.types.errors import UserError

MOST_BYTES: Final = 64 * 2**20
_MOST_JSON_BYTES: Final = 16 * 2**20  # the list of the tensors of the largest models has 9 MB
MOST_TOML_BYTES: Final = 256 * 2**10  # the parsers of TOML and YAML take seconds for more
MOST_YAML_BYTES: Final = 256 * 2**10
MOST_SOURCE_BYTES: Final = 2 * 2**20  # of a Python file
_MOST_DOTS: Final = 200  # in a line of TOML: the parser's memory grows with the square of the parts of a key
_MOST_VALUES: Final = 1_000_000
_DEEPEST: Final = 64
_MOST_BITS: Final = 400  # of a whole number: about 120 digits
_LARGEST_RATIO: Final = 200  # of a compressed file
_KINDS: Final[Mapping[Callable[[int], bool], str]] = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
_CHUNK_BYTES: Final = 2**16
_SHOWN: Final = 200  # characters of a parser's message


def read_bytes(path: Path, *, most_bytes: int = MOST_BYTES, hint: str = "") -> bytes:
    """Return the content of a regular file; a symbolic link to one is followed. Raises UserError if it cannot
    be read, if it is no regular file (a named pipe is refused at once, not waited for), and if it has more
    than ``most_bytes``. ``hint``: the hint of the error for a file that is too large."""
    with open_regular(path) as file:
        data, expected_bytes = b"", max(os.fstat(file.fileno()).st_size, _CHUNK_BYTES) + 1
        try:
            # Not all at once: the read would allocate most_bytes, also under the memory cap of a run.
            while chunk := file.read(min(expected_bytes, most_bytes + 1 - len(data))):
                data += chunk
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > most_bytes:
        raise UserError(f"{path} is too large to be read", allowed=f"at most {most_bytes} bytes", hint=hint)
    return data


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read its bytes; a symbolic link to one is followed. Raises UserError if it
    cannot be opened or is no regular file. A named pipe is refused at once, not waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # a zero byte in the name
        raise UserError(f"cannot read {str(path)!r}: {error}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((name for is_kind, name in _KINDS.items() if is_kind(mode)), "no regular file")
        raise UserError(f"{path} is {kind}, not a file that can be read")
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, *, most_bytes: int = MOST_BYTES, encoding: str = "utf-8") -> str:
    """Return the text of a regular file, with its line ends as "\\n". Raises UserError as `read_bytes` does,
    and if the file is no text in ``encoding``."""
    data = read_bytes(path, most_bytes=most_bytes)
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding=encoding).read()
    except UnicodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {_short(error)}") from error


def read_data_text(path: Path, *, most_bytes: int) -> str:
    """Return the text of a UTF-8 file of at most ``most_bytes``, decompressed by gzip if its name ends in
    ``.gz``, with its line ends as "\\n". Raises UserError as `read_text` does, and if it cannot be
    decompressed or unpacks to more than `unpacked_limit`."""
    if path.suffix != ".gz":
        return read_text(path, most_bytes=most_bytes)
    data = read_bytes(path, most_bytes=most_bytes)
    limit_bytes = unpacked_limit(len(data), most_bytes)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            unpacked = bytearray()
            while len(unpacked) <= limit_bytes and (chunk := file.read(_CHUNK_BYTES)):
                unpacked += chunk
        if len(unpacked) > limit_bytes:
            raise UserError(
                f"{path} is too large when unpacked", allowed=f"at most {limit_bytes} bytes from this file"
            )
        return io.TextIOWrapper(io.BytesIO(unpacked), encoding="utf-8").read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: it cannot be unpacked: {_short(error)}") from error
    except UnicodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {_short(error)}") from error


def unpacked_limit(packed_bytes: int, most_bytes: int = MOST_BYTES) -> int:
    """Return the number of bytes to which a file of ``packed_bytes`` may unpack: 200 times as many, but at
    least 64 MiB, and at most the larger of 64 MiB and ``most_bytes``."""
    return min(max(most_bytes, MOST_BYTES), max(MOST_BYTES, _LARGEST_RATIO * packed_bytes))


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of at most 16 MiB. Raises UserError as `read_text` and `parse_json`
    do."""
    return parse_json(read_text(path, most_bytes=_MOST_JSON_BYTES), what=str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file of at most 256 KiB. Raises UserError as `read_text` and `parse_toml`
    do."""
    return parse_toml(read_text(path, most_bytes=MOST_TOML_BYTES), what=str(path))


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file of at most 256 KiB. Raises UserError as `read_text` and `parse_yaml`
    do."""
    return parse_yaml(read_text(path, most_bytes=MOST_YAML_BYTES), what=str(path))


def parse_json(
    text: str, *, what: str, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Return the value of JSON text; NaN and Infinity are allowed. ``what`` names the text in messages.
    ``pairs_hook``: the argument object_pairs_hook of `json.loads`. Raises UserError if the text is not JSON,
    if ``pairs_hook`` raises ValueError, and as `bounded` does."""
    try:
        return bounded(json.loads(text, object_pairs_hook=pairs_hook), what=what)
    except json.JSONDecodeError as error:
        raise UserError(f"{what} is not JSON: {error.msg} in line {error.lineno}") from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(what, "JSON", error) from error


def parse_toml(text: str, *, what: str) -> dict[str, Any]:
    """Return the content of TOML text. ``what`` names the text in messages. Raises UserError if it has more
    than 262,144 characters, has a line with more than 200 dots, or is not TOML, and as `bounded` does."""
    if len(text) > MOST_TOML_BYTES:
        raise UserError(f"{what} is too large to be read", allowed=f"at most {MOST_TOML_BYTES} characters")
    if any(line.count(".") > _MOST_DOTS for line in text.splitlines()):
        raise UserError(f"{what} has a line with more than {_MOST_DOTS} dots, too many for TOML")
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        unreadable = _unreadable(what, "TOML", error)
        if (line := _toml_line(text, str(error))) is None:
            raise unreadable from error
        raise UserError(
            f"{unreadable.given}, in {_short(line)}",
            allowed='text in straight quotation marks, as in name = "RTX-4090", and numbers without commas '
            "and units, as in price = 4500000",
        ) from error
    bounded(data, what=what)
    return data


def parse_yaml(text: str, *, what: str) -> Any:
    """Return the value of YAML text; None if it is empty. ``what`` names the text in messages. Raises
    UserError if the text has more than 262,144 characters, is not one YAML document of plain values, or has
    more than 100,000 values and keys, of which each alias counts as many as what it stands for; and as
    `bounded` does."""
    import yaml

    from memfit.files.yaml_loader import BoundedLoader

    if len(text) > MOST_YAML_BYTES:
        raise UserError(f"{what} is too large to be read", allowed=f"at most {MOST_YAML_BYTES} characters")
    try:
        return bounded(yaml.load(text, BoundedLoader), what=what)
    # The constructors of the safe loader raise all of these, for example for `!!int ''`.
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise _unreadable(what, "YAML", error) from error


def bounded(value: Any, *, what: str) -> Any:
    """Return ``value``, parsed from a file, if it has at most a million values and keys, at most 64 levels,
    and only whole numbers of at most 400 bits (about 120 digits). Raises UserError otherwise. ``what`` names
    the file in messages."""
    count, level = 0, [value]
    for _ in range(_DEEPEST):
        count += len(level)
        if count > _MOST_VALUES:
            raise UserError(f"{what} has too many values", allowed=f"at most {_MOST_VALUES}")
        if any(isinstance(v, int) and v.bit_length() > _MOST_BITS for v in level):
            raise UserError(
                f"{what} has a whole number that is too large",
                allowed=f"at most {_MOST_BITS} bits, about 120 digits",
            )
        level = [inner for v in level for inner in _inner_values(v)]
        if not level:
            return value
    raise UserError(f"{what} is nested too deeply", allowed=f"at most {_DEEPEST} levels")


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (``prefix`` and the keys joined by dots, value) for each value in nested dictionaries that is no
    dictionary: ("a.b", 1) for {"a": {"b": 1}}."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _inner_values(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list | tuple | set) else ()


def _toml_line(text: str, error: str) -> str | None:
    """Return the line of the TOML text that an error of tomllib names, if it has a value that may have been
    misspelt: an assignment. Return None for another line, and if the error names none."""
    match, lines = re.search(r"\(at line (\d+), ", error), text.splitlines()
    number = int(match[1]) if match else 0
    line = lines[number - 1].strip() if 0 < number <= len(lines) else ""
    return line if re.match(r"[\w.-]+\s*=", line) else None


def _unreadable(what: str, form: str, error: Exception) -> UserError:
    if isinstance(error, RecursionError):
        return UserError(f"{what} is nested too deeply", allowed=f"at most {_DEEPEST} levels")
    return UserError(f"{what} is not valid {form}: {_short(error)}")


def _short(error: BaseException | str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
