"""Gradient clipping: compare the norm of the gradients that the update receives with the planned limit.

Any clipping is visible by its effect on that norm, whether torch, an engine or the user's own loop does it.
"""

from __future__ import annotations

import math

from memfit.conformance.observation import Observation
from memfit.conformance.sharding import from_all

FEATURE = "gradient clipping"
_TOLERANCE_RATIO = 0.01  # relative to the limit; gradients may be bf16
_SEVERAL = {"tensor-parallel", "context-parallel", "axial-parallel", "pipeline", "expert-parallel"}


def clipped(step: Observation) -> None:
    """Record whether the norm of the gradients at the update is at most ``step.clip`` or, if that is 0,
    whether gradients are not clipped. Does nothing if it is None (unknown).

    A limit is recorded as not checked if no update was observed, or if the gradients are smaller than it and
    torch's clipping was not called with it. That there is no clipping is recorded as not checked if torch's
    clipping was not called, and the norm of all gradients is unknown before clipping or at the update, as it
    is under tensor, pipeline and other parallelism (`_SEVERAL`). If no update was observed, nothing is
    recorded then."""
    if step.clip is None:
        return
    if not any(from_all(bool(step.clipping.squares))):
        if step.clip:
            step.unseen(f"{FEATURE}: no update of a torch optimizer was observed")
        return
    knows_whole = not any(u.technique in _SEVERAL for u in step.plan.uses)
    norm = step.clipping.norm() if knows_whole else step.clipping.largest()
    if step.clip:
        _limited(step, norm, whole=knows_whole)
    else:
        _never(step, norm, whole=knows_whole)


def _limited(step: Observation, norm: float, *, whole: bool) -> None:
    limit = step.clip or 0.0
    prefix = "" if whole else "at least "
    clipping_called = any(from_all(any(math.isclose(n, limit) for n in step.clipping.limits)))
    too_large = norm > limit * (1 + _TOLERANCE_RATIO)
    if too_large or clipping_called or (whole and norm > limit * (1 - _TOLERANCE_RATIO)):
        limit_text = f"gradients of norm at most {limit:g} at the update"
        step.differs(FEATURE, limit_text, f"{prefix}{norm:.4g}", wrong=too_large)
    else:
        step.unseen(f"{FEATURE}: the norm, {prefix}{norm:.4g}, did not reach {limit:g}")


def _never(step: Observation, norm: float, *, whole: bool) -> None:
    limits = sorted(
        {n for rank_limits in from_all(tuple(step.clipping.limits)) for n in rank_limits if n < math.inf}
    )
    norm_before = step.clipping.before
    if limits:
        step.differs(
            FEATURE, "none", f"clipping to a norm of {', '.join(f'{n:g}' for n in limits)}", wrong=True
        )
    elif norm_before is not None and whole:
        wrong = norm < norm_before * (1 - _TOLERANCE_RATIO)
        step.differs(
            FEATURE, "none", f"a norm of {norm:.4g} at the update, {norm_before:.4g} before", wrong=wrong
        )
    else:
        step.unseen(f"{FEATURE}: whether code other than torch's clips gradients")
