"""Paired two one-sided tests (TOST): evidence for equality, not just a lack of evidence against it."""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
from collections.abc import Sequence

from memfit.types.result import VerdictKind

ALPHA = 0.05  # of each one-sided test; the matching interval is 1 - 2 alpha = 90 %
MIN_PAIRS = 3  # with two, a single number would determine the whole spread
GOOD_POWER = 0.8  # target power of `pairs_needed`
_MOST_PAIRS = 200
_NORMAL = statistics.NormalDist()
_PANELS = 64  # panels of Simpson's rule; the integrand is smooth, so this gives about seven digits


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
    """Return "equivalent" if the interval from ``low`` to ``high`` lies inside (-margin, margin), "different"
    if it lies entirely outside, else "undecided". A bound at the margin is outside."""
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


def critical_t(freedom: int, *, alpha: float) -> float:
    """Return the t that a Student variable with `freedom` degrees of freedom exceeds with probability `alpha`
    (one-sided).
    """
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1 - alpha))


def tost_power(*, margin: float, sd: float, pairs: int, alpha: float) -> float:
    """Return the probability that a paired TOST (two one-sided tests) shows equivalence within ``margin`` if
    the true difference is zero.

    `sd` is the true standard deviation of a pair's difference; with 0 the power is 1. `pairs` is n below, at
    least 2. `alpha` is the level of each one-sided test. The mean of the n pairs is normal and the observed
    sd is `c * sd` with c chi-distributed and independent of the mean (Schuirmann 1987). Hence, with z =
    sqrt(n) margin / sd, t the critical value at `alpha`, f the density of c and Phi the normal distribution,
    power = integral of f(c) (2 Phi(z - t c) - 1) over 0 <= c <= z / t.
    """
    if sd == 0:
        return 1.0
    freedom = pairs - 1
    z, t = math.sqrt(pairs) * margin / sd, critical_t(freedom, alpha=alpha)
    reach = 10 / math.sqrt(2 * freedom)  # ten standard deviations of c; the density beyond is negligible
    low, high = max(0.0, 1 - reach), min(z / t, 1 + reach)
    if high <= low:
        return 0.0
    step = (high - low) / (2 * _PANELS)
    nodes = (low + step * i for i in range(2 * _PANELS + 1))
    heights = [_chi_density(c, freedom) * (2 * _NORMAL.cdf(z - t * c) - 1) for c in nodes]
    simpson = heights[0] + heights[-1] + 4 * sum(heights[1::2]) + 2 * sum(heights[2:-1:2])
    return min(1.0, step / 3 * simpson)


def _chi_density(c: float, freedom: int) -> float:
    """Return the density at ``c`` of (observed standard deviation / true one): a chi-distributed variable
    with ``freedom`` degrees of freedom, divided by the square root of ``freedom``.
    """
    if c == 0:
        return math.sqrt(2 / math.pi) if freedom == 1 else 0.0
    half = freedom / 2
    log = half * math.log(half) + (freedom - 1) * math.log(c) - half * c * c - math.lgamma(half)
    return 2 * math.exp(log)
