"""Units, and how sizes and times are displayed.

Inside memfit everything is in SI units or bytes, and names say so: ``_bytes _s _j _w _usd _flops``.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024**2
GIB: Final = 1024**3


def format_bytes(size_bytes: float) -> str:
    """Return the size as text, in the largest binary unit that it reaches, with at most four significant
    digits, such as ``1.234 GiB``. Units are KiB, MiB, GiB and TiB; below 1 KiB it is in whole bytes, ``512
    B``.
    """
    value, sign = abs(size_bytes), "-" if size_bytes < 0 else ""
    for unit, scale in (("TiB", 2**40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if value >= scale:
            return f"{sign}{value / scale:.4g} {unit}"
    return f"{sign}{value:.0f} B"


def format_seconds(seconds: float) -> str:
    """Return the duration as text with at most three significant digits: ``12.3 ms``, ``4.56 s``, ``3.2 h``.

    It is in ms below 1 s, in s below 2 min, in min below 2 h, in h below 2 d, else in d. A negative duration
    has the unit of its absolute value.
    """
    if seconds < 0:
        return f"-{format_seconds(-seconds)}"
    for unit, scale in (("d", 86_400.0), ("h", 3_600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= scale * (2 if unit in ("d", "h", "min") else 1):
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"
