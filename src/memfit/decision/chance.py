"""How sure the saving is: draws over the ranges of what it rests on, and what each does alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from memfit.decision.money import saved_percent, sheet
from memfit.types.decision import DRAWS, Amount, Swing, Term, Terms, Way
from memfit.types.result import Interval


def interval(
    best: Way, reference: Way, terms: Terms, told: Sequence[Term], *, draws: int = DRAWS
) -> tuple[Interval, float] | None:
    """The 5th to the 95th percentile of the percent that is saved, widened to contain the point, and the
    share of draws (percent) in which anything is saved. None where nothing can be saved."""
    import numpy

    point = _saved(best, reference, terms)
    ranged = _ranged(told)
    if point is None:
        return None
    if not ranged or best == reference:
        return Interval(value=point, low=point, high=point), 100.0 * (point > 0)
    random = numpy.random.default_rng(0)
    columns = [random.triangular(span.low, span.value, span.high, size=draws) for span in ranged.values()]
    found = []
    for row in zip(*columns, strict=True):
        drawn = {name: float(value) for name, value in zip(ranged, row, strict=True)}
        saved = _saved(best, reference, moved(terms, drawn))
        found.append(point if saved is None else saved)
    low, high = (float(numpy.percentile(found, at)) for at in (5, 95))
    chance = 100.0 * float(numpy.mean([f > 0 for f in found]))
    return Interval(value=point, low=min(low, point), high=max(high, point)), chance


def tornado(best: Way, reference: Way, terms: Terms, told: Sequence[Term]) -> tuple[Swing, ...]:
    """The terms with a range, the widest swing first; those that change nothing are left out."""
    found = []
    for name, span in _ranged(told).items():
        low, high = (_saved(best, reference, moved(terms, {name: end})) for end in (span.low, span.high))
        if low is not None and high is not None and low != high:
            found.append(Swing(name=name, low_percent=low, high_percent=high))
    return tuple(sorted(found, key=lambda s: -abs(s.high_percent - s.low_percent)))


def moved(terms: Terms, values: Mapping[str, Any]) -> Terms:
    """`terms` with some of them at other values; an Amount keeps its currency."""
    changes: dict[str, Any] = {}
    for name, value in values.items():
        now = getattr(terms, name)
        if isinstance(now, Amount):
            whole = now.at(terms.per_usd)
            ratio = value / whole if whole else 0.0
            changes[name] = Amount(usd=now.usd * ratio, own=now.own * ratio if whole else value)
        else:
            changes[name] = value
    return dataclasses.replace(terms, **changes)


def _ranged(told: Sequence[Term]) -> dict[str, Interval]:
    """Those of the terms that all ways share and that have a range."""
    fields = {f.name for f in dataclasses.fields(Terms)}
    return {
        t.name: Interval(value=t.value, low=t.low, high=t.high)
        for t in told
        if t.name in fields and t.value is not None and t.low is not None and t.high is not None
        if t.low < t.high
    }


def _saved(best: Way, reference: Way, terms: Terms) -> float | None:
    return saved_percent(sheet(best, terms), sheet(reference, terms))
