"""Shorten long series in one common way, so that two of them can be overlaid."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def thin_phases(stretches: Sequence[Sequence[int]], points: int) -> tuple[int, ...]:
    """Shorten a series that is given in pieces (``stretches``, one per phase), and return it in one piece.

    Each stretch is divided into ``points // len(stretches)`` bins of equal length, but at least two, and each
    bin becomes the highest of its values. If a stretch has fewer values than bins, values are repeated. Empty
    stretches are left out.
    """
    count = max(2, points // max(1, len(stretches)))
    out: list[int] = []
    for values in (s for s in stretches if s):
        edges = [round(i * len(values) / count) for i in range(count + 1)]
        out += [max(values[min(a, len(values) - 1) : max(b, a + 1)]) for a, b in pairwise(edges)]
    return tuple(out)
