"""Shorten long series in one common way, so that two of them can be overlaid."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def thin_phases(stretches: Sequence[Sequence[int]], points: int) -> tuple[int, ...]:
    """Reduce each stretch to ``points // len(stretches)`` values (at least two), each the maximum of its bin,
    and join them. Empty stretches are left out; of shorter stretches values are repeated."""
    count = max(2, points // max(1, len(stretches)))
    out: list[int] = []
    for values in (s for s in stretches if s):
        edges = [round(i * len(values) / count) for i in range(count + 1)]
        out += [max(values[min(a, len(values) - 1) : max(b, a + 1)]) for a, b in pairwise(edges)]
    return tuple(out)
