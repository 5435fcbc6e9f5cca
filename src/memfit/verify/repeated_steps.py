"""The verdict on steps that were trained twice, under two plans, from one checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from memfit.types.plan import EffectClass
from memfit.types.result import Cause, Verdict, VerdictKind
from memfit.verify import float32
from memfit.verify.bits import first_difference

_TESTS = {
    EffectClass.E0: "bitwise equality of the losses of repeated steps",
    EffectClass.E1: f"float32 tolerance of the losses of the first {float32.STEPS} repeated steps",
}


def repeated_steps_verdict(
    before: Sequence[float], after: Sequence[float], *, effect: EffectClass, first_step: int, seed: int
) -> Verdict:
    """Judge the losses of the same steps under two plans, ``before`` and ``after``, which began with the same
    state, at the step ``first_step``. ``effect``: the higher of the effect classes of the two plans.

    For E0 the losses must be bitwise equal, for E1 those of the first steps within float32 tolerance (see
    `float32`). The verdict is undecided without repeated steps, and for E2 and E3, which losses alone do not
    decide. Only losses are compared, not weights: the last update is seen in no loss.
    """
    steps = f"{len(before)} repeated step{'s' * (len(before) != 1)}"
    if not before or effect > EffectClass.E1:
        why = f"losses alone do not decide {effect.label}" if before else "no step was repeated"
        return Verdict(kind=VerdictKind.UNDECIDED, effect=effect, test="none", reason=why)
    if effect is EffectClass.E0:
        index = first_difference(before, after)
        cause = None if index is None else Cause(kind="loss_differs", seed=seed, step=first_step + index)
        equal = f"the losses of {steps} are bitwise equal"
    else:
        cause = float32.difference_beyond_rounding(before, after, seed=seed, first_step=first_step)
        compared = min(len(before), float32.STEPS)
        of = steps if compared == len(before) else f"the first {compared} of {steps}"
        equal = f"the losses of {of} are equal within float32 tolerance"
    return Verdict(
        kind=VerdictKind.DIFFERENT if cause else VerdictKind.EQUIVALENT,
        effect=effect,
        test=_TESTS[effect],
        reason=_reason(cause) if cause else equal,
        pairs=1,
        cause=cause,
    )


def _reason(cause: Cause) -> str:
    differ = f"the losses differ at step {cause.step} (counted from 0)"
    if cause.difference is None:
        return differ
    return (
        f"{differ} by {cause.difference:.1e}, more than reordered float32 sums explain "
        f"({cause.limit_ratio:.1e}); random numbers, such as those of dropout, are others if the number of "
        "micro-batches changes"
    )
