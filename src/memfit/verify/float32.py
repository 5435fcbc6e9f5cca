"""How far reordered float32 sums may drift: the tolerance of effect class E1.

Derivation. Each float32 rounding changes a number by at most u = 2^-24, relatively. Over a chain of n
roundings that behave like independent errors of mean zero, the relative error exceeds lambda sqrt(n) u
with probability at most 2 exp(-lambda^2 / 2) (Higham & Mary 2019, SIAM J. Sci. Comput. 41, A2815,
theorem 2.4; the worst case, n u, is never met in practice). Two orders of the same sum differ by two such
errors, so by lambda sqrt(2 n) u. At step 0 both runs hold the same weights and see the same data, so the
losses can differ by no more than this.

- n = 2^14: the additions one after another in a forward pass of the sizes that a proof of concept runs
  (about ten blocks of about 1,500 terms). Kernels sum in blocks, which only makes the true n smaller.
- lambda = 4: at most 7 chances in 10,000 that rounding alone goes beyond.

From step 1 on the optimizer amplifies what rounding left in the gradients: Adam divides by their size, so
a gradient that is zero but for rounding moves its weight by a full learning rate. No theory bounds that
growth for a network. `GROWTH` = 2 a step is an assumption; docs/log.md has the runs it was held against.
After `STEPS` steps the losses say nothing of arithmetic any more, and the metric decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

UNIT_ROUNDOFF = 2.0**-24
TERMS = 2**14
LAMBDA = 4.0
GROWTH = 2.0
STEPS = 5


def tolerance(step: int) -> float:
    """Largest relative difference of two losses at `step` (from 0) that reordering explains."""
    return LAMBDA * math.sqrt(2 * TERMS) * UNIT_ROUNDOFF * GROWTH**step


def first_beyond(a: Sequence[float], b: Sequence[float]) -> tuple[int, float] | None:
    """The first of the checked steps whose relative difference is beyond `tolerance`, and that difference."""
    for step, (x, y) in enumerate(zip(a[:STEPS], b[:STEPS], strict=True)):
        difference = abs(x - y) / max(abs(x), abs(y), UNIT_ROUNDOFF)
        if difference > tolerance(step):
            return step, difference
    return None
