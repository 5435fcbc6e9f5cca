"""How far reordered float32 sums may differ: the tolerance of effect class E1.

Derivation. Each float32 rounding changes a number by a relative error of at most u = 2^-24. Over a chain of n
roundings that behave like independent errors of mean zero, the relative error exceeds lambda sqrt(n) u with
probability at most 2 exp(-lambda^2 / 2) (Higham & Mary 2019, SIAM J. Sci. Comput. 41, A2815, theorem 2.4; the
worst case, n u, never occurs in practice). Two orders of the same sum differ by two such errors, so by lambda
sqrt(2 n) u. At step 0 both runs have the same weights and the same data, so the losses can differ by no more
than this.

- n = 2^14: the number of consecutive additions in a forward pass of the sizes that a proof of concept runs
  (about ten blocks of about 1,500 terms). Kernels sum in blocks, which only makes the true n smaller.
- lambda = 4: rounding alone exceeds the tolerance with a probability of at most 7 in 10,000.

From step 1 on, the optimizer amplifies what rounding left in the gradients: Adam divides by their size, so a
gradient that is zero except for rounding moves its weight by a full learning rate. No theory bounds that
growth for a network. `GROWTH` = 2 per step is an assumption; docs/log.md lists the runs it was compared with.
After `STEPS` steps the losses say nothing about arithmetic any more, and the metric decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from memfit.types.result import Cause

UNIT_ROUNDOFF = 2.0**-24
TERMS = 2**14
LAMBDA = 4.0
GROWTH = 2.0
STEPS = 5


def tolerance(step: int) -> float:
    """Return the largest relative difference of two runs' losses at `step` (counted from 0) that reordered
    float32 sums explain: about 4.3e-5 at step 0, and twice as much with each further step.
    """
    return LAMBDA * math.sqrt(2 * TERMS) * UNIT_ROUNDOFF * GROWTH**step


def difference_beyond_rounding(
    a: Sequence[float], b: Sequence[float], *, seed: int, first_step: int = 0
) -> Cause | None:
    """Return the Cause "beyond_rounding" with the first step at which the losses ``a`` and ``b`` differ by
    more than `tolerance`, the relative difference there and the tolerance; None if there is no such step.

    Only the first `STEPS` (5) losses are compared. They must be finite, and as many in ``a`` as in ``b``.
    ``first_step``: number of the step of the first loss. ``seed``: of both runs, for the Cause.
    """
    for index, (x, y) in enumerate(zip(a[:STEPS], b[:STEPS], strict=True)):
        difference = abs(x - y) / max(abs(x), abs(y), UNIT_ROUNDOFF)
        if difference > tolerance(index):
            return Cause(
                kind="beyond_rounding",
                seed=seed,
                step=first_step + index,
                difference=difference,
                limit_ratio=tolerance(index),
            )
    return None
