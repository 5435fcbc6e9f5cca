"""Units, and how sizes and times are displayed.

Inside memfit everything is in SI units or bytes, and names say so: ``_bytes _s _j _w _usd _flops``.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024**2
GIB: Final = 1024**3


def format_bytes(size_bytes: float) -> str:
    """Format in binary units with at most four significant digits, ``1.234 GiB``, or in whole bytes below
    1 KiB."""
    value, sign = abs(size_bytes), "-" if size_bytes < 0 else ""
    for unit, scale in (("TiB", 2**40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if value >= scale:
            return f"{sign}{value / scale:.4g} {unit}"
    return f"{sign}{value:.0f} B"


def format_seconds(seconds: float) -> str:
    """Format a duration with at most three significant digits: ``12.3 ms``, ``4.56 s``, ``3.2 h``.

    Below 1 s it is in ms; min, h and d are used from two of them on.
    """
    for unit, scale in (("d", 86_400.0), ("h", 3_600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= scale * (2 if unit in ("d", "h", "min") else 1):
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"
