"""Parse sizes and times given by users. Units are converted only here and in `types.units`."""

from __future__ import annotations

import math
import re
from typing import Final

from memfit.types.errors import UserError
from memfit.types.units import MIB

_UNIT_BYTES: Final = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}
_MOST_BYTES: Final = 2**60
_SIZE: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Parse ``"24GiB"``, ``"80 GB"``, ``"512m"`` or plain bytes into a number of bytes.

    ``GB`` is 1e9 and ``GiB`` is 2**30; a bare ``g`` is read as ``GiB``, as in Docker and Slurm, and so are
    ``k``, ``m`` and ``t``. Case does not matter; fractions of a byte are cut off. Raises UserError if the
    text is not a size of at least 1 byte, if it is a number below 2**20 without a unit, which is too small to
    be meant in bytes, or if the size is above 2**60 bytes.
    """
    match = _SIZE.fullmatch(text)
    unit = match.group(2).lower() if match else None
    if match is None or unit not in _UNIT_BYTES or float(match.group(1)) * _UNIT_BYTES[unit] < 1:
        raise UserError(
            f"not a memory size: {text!r}",
            allowed="a positive number with B, with KiB, MiB, GiB, TiB (or K, M, G, T, which mean the same) "
            "or with kB, MB, GB, TB; or at least 1048576 without a unit, which are bytes",
            hint="for example 24GiB or 512MiB",
        )
    if not unit and float(match.group(1)) < MIB:
        raise UserError(
            f"{text} has no unit and is too small to be bytes",
            allowed="a unit after the number, such as MiB or GB; without a unit, at least 1048576 bytes",
            hint=f"did you mean {text}GiB?",
        )
    size = float(match.group(1)) * _UNIT_BYTES[unit]
    if size > _MOST_BYTES:
        raise UserError(
            f"{text[:40]} is too large for the memory size of a machine",
            allowed=f"at most {_MOST_BYTES} bytes (1 EiB)",
        )
    return int(size)


_DURATION_S = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_duration(text: str) -> float:
    """Return the seconds of a positive number with s, m or min (both minutes), h, d or w (weeks), such as
    ``90m`` or ``1.5d``. Case does not matter. Raises UserError for other text, also for a number without a
    unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    if match is None or match[2] not in _DURATION_S or not 0 < float(match[1]) < math.inf:
        raise UserError(
            f"not a time: {text!r}",
            allowed="a positive number with s, m or min (both minutes), h, d or w (weeks), such as 72h",
        )
    return float(match[1]) * _DURATION_S[match[2]]


def parse_time_limit(text: str) -> float:
    """Return the seconds of a time as `parse_duration` takes it, or of a positive number of seconds without a
    unit, such as ``30``. Raises UserError for other text.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*", text)
    try:
        return parse_duration(f"{match[1]}s" if match else text)
    except UserError:
        raise UserError(
            f"not a time limit: {text!r}",
            allowed="a positive number of seconds, or one with s, m or min (both minutes), h, d or w, such "
            "as 30, 30s or 2min",
        ) from None


def parse_percent(text: str) -> float:
    """Return the ratio of a percentage of at least 0 such as ``2%`` or ``0.5 %``: 0.02 and 0.005. Raises
    UserError for other text, also for a number without the sign.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match is None or float(match[1]) == math.inf:
        raise UserError(f"not a percentage: {text!r}", allowed="a number of at least 0 with a %, such as 2%")
    return float(match[1]) / 100
