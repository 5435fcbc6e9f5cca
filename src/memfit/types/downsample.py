"""Long series made short the same way wherever they come from, so that one can lie over another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def thin_phases(stretches: Sequence[Sequence[int]], points: int) -> tuple[int, ...]:
    """Each stretch as ``points // len(stretches)`` values (at least two), keeping maxima."""
    each = max(2, points // max(1, len(stretches)))
    out: list[int] = []
    for values in (s for s in stretches if s):
        edges = [round(i * len(values) / each) for i in range(each + 1)]
        out += [max(values[min(a, len(values) - 1) : max(b, a + 1)]) for a, b in pairwise(edges)]
    return tuple(out)
