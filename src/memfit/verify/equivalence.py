"""Paired two one-sided tests (TOST): evidence for equality, not just a lack of evidence against it."""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
from collections.abc import Sequence

from memfit.types.result import VerdictKind
from memfit.verify.student import critical_t, tost_power

ALPHA = 0.05  # of each one-sided test; the matching interval is 1 - 2 alpha = 90 %
MIN_PAIRS = 3  # with two, a single number would determine the whole spread
GOOD_POWER = 0.8  # target power of `pairs_needed`
_MOST_PAIRS = 200


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tost:
    """The result of paired two one-sided tests (TOST) against ``margin``.

    ``difference``: mean of the paired differences. ``low`` and ``high``: the 90 % interval of that mean.
    ``sd``: standard deviation of the paired differences. ``pairs``: their number. ``power``: probability that
    such tests show equivalence if there is no true difference and ``sd`` is the true standard deviation.
    """

    difference: float
    low: float
    high: float
    sd: float
    pairs: int
    power: float
    margin: float

    @property
    def kind(self) -> VerdictKind:
        """The `interval_kind` of ``low`` and ``high``."""
        return interval_kind(self.low, self.high, margin=self.margin)


def interval_kind(low: float, high: float, *, margin: float) -> VerdictKind:
    """Return "equivalent" if the interval lies inside (-margin, margin), "different" if entirely outside,
    else "undecided"."""
    if -margin < low and high < margin:
        return VerdictKind.EQUIVALENT
    if low >= margin or high <= -margin:
        return VerdictKind.DIFFERENT
    return VerdictKind.UNDECIDED


def tost(differences: Sequence[float], *, margin: float) -> Tost:
    """Run two one-sided tests (Schuirmann 1987) on paired differences. There must be at least `MIN_PAIRS` (3)
    of them, all finite.

    Equivalence at the level `ALPHA` (5 % for each test) is the same as the 90 % interval lying inside
    (-margin, margin).
    """
    n = len(differences)
    assert n >= MIN_PAIRS, f"{n} pairs are too few for the test"
    ordered = sorted(differences)  # sorted, so that the order of the seeds cannot change the last bit
    mean, sd = statistics.fmean(ordered), statistics.stdev(ordered)
    half_width = critical_t(n - 1, alpha=ALPHA) * sd / math.sqrt(n)
    power = tost_power(margin=margin, sd=sd, pairs=n, alpha=ALPHA)
    return Tost(
        difference=mean,
        low=mean - half_width,
        high=mean + half_width,
        sd=sd,
        pairs=n,
        power=power,
        margin=margin,
    )


def pairs_needed(*, margin: float, sd: float) -> int | None:
    """Return the smallest number of pairs, at least `MIN_PAIRS` (3), with which the test shows equivalence
    with a probability of `GOOD_POWER` (80 %), if there is no true difference and the paired differences have
    the standard deviation ``sd``. None if more than 200 are needed.
    """
    choices = range(MIN_PAIRS, _MOST_PAIRS + 1)
    index = bisect.bisect_left(
        choices, GOOD_POWER, key=lambda n: tost_power(margin=margin, sd=sd, pairs=n, alpha=ALPHA)
    )
    return choices[index] if index < len(choices) else None
