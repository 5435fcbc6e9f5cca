"""Student's t for integer degrees of freedom, and the power of two one-sided tests. Standard library only."""

from __future__ import annotations

import math
import statistics

_NORMAL = statistics.NormalDist()
_PANELS = 64  # panels of Simpson's rule; the integrand is smooth, so this gives about seven digits


def central_probability(t: float, freedom: int) -> float:
    """Return P(abs(T) <= t) of a Student variable T with `freedom` degrees of freedom, by the finite sums of
    Abramowitz & Stegun (1964), 26.7.3 and 26.7.4.
    """
    theta = math.atan2(t, math.sqrt(freedom))
    cos2 = math.cos(theta) ** 2
    odd = freedom % 2
    term = total = (math.cos(theta) if odd else 1.0) if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cos2
        total += term
    inner = math.sin(theta) * total
    return 2 / math.pi * (theta + inner) if odd else inner


def critical_t(freedom: int, *, alpha: float) -> float:
    """Return the t that a Student variable with `freedom` degrees of freedom exceeds with probability `alpha`
    (one-sided), found by bisection.
    """
    low, high = 0.0, 1.0
    while central_probability(high, freedom) < 1 - 2 * alpha:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        inside = central_probability(middle, freedom) < 1 - 2 * alpha
        low, high = (middle, high) if inside else (low, middle)
    return high


def tost_power(*, margin: float, sd: float, pairs: int, alpha: float) -> float:
    """Return the probability that a paired TOST (two one-sided tests) shows equivalence within ``margin`` if
    the true difference is zero.

    `sd` is the true standard deviation of a pair's difference; with 0 the power is 1. `pairs` is n below.
    `alpha` is the level of each one-sided test. The mean of the n pairs is normal and the observed sd is `c *
    sd` with c chi-distributed and independent of the mean (Schuirmann 1987). Hence, with z = sqrt(n) margin /
    sd, t the critical value at `alpha`, f the density of c and Phi the normal distribution, power = integral
    of f(c) (2 Phi(z - t c) - 1) over 0 <= c <= z / t.
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
