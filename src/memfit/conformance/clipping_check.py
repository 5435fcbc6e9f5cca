"""Gradient clipping: compare the norm of the gradients that the update receives with the planned limit.

Any clipping is visible by its effect on that norm, whether torch, an engine or the user's own loop does it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from memfit.conformance.findings import Checked, CheckFinding, NotChecked
from memfit.conformance.observation import Observations
from memfit.types.plan import Plan

FEATURE = "gradient clipping"
_TOLERANCE_RATIO = 0.01  # relative to the limit; gradients may be bf16
_SEVERAL = {"tensor-parallel", "context-parallel", "axial-parallel", "pipeline", "expert-parallel"}


def gradient_clipping(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check the norm of all ranks' gradients at the update against ``observed.clip``. Yields nothing if that
    is None (unknown).

    If it is a limit (above 0), the norm must be at most this, within 1 %. Yields `NotChecked` if no update
    was observed, or if the norm is more than 1 % below the limit and torch's clipping was not called with it.

    If it is 0, gradients must not be clipped: torch's clipping was not called with a finite norm, and the
    norm at the update is at least 99 % of that before clipping. Yields `NotChecked` if torch's clipping was
    not called with a finite norm and the norm before clipping is unknown. Yields nothing if no update was
    observed.

    With tensor-, context-, axial- or expert-parallel or a pipeline (`_SEVERAL`), the norm of all ranks'
    gradients is unknown. The largest norm on a single rank, a lower bound, replaces it at the update: one of
    at most 101 % of the limit counts as below it. The norm before clipping counts as unknown."""
    if observed.clip is None:
        return
    updates = [r.update for r in observed.ranks]
    if not any(u.is_observed for u in updates):
        if observed.clip:
            yield NotChecked(f"{FEATURE}: no update of a torch optimizer was observed")
        return
    knows_whole = not any(u.technique in _SEVERAL for u in plan.uses)
    # The largest norm on a single rank is a lower bound of the norm of all.
    squared_norm = (
        sum(u.squared_norm_share for u in updates) if knows_whole else max(u.squared_norm for u in updates)
    )
    limits = {n for u in updates for n in u.limits}
    if observed.clip:
        yield _check_limit(observed.clip, math.sqrt(squared_norm), limits, whole=knows_whole)
    else:
        norm_before = observed.norm_before_clipping if knows_whole else None
        yield _check_unclipped(math.sqrt(squared_norm), limits, norm_before)


def _check_limit(limit: float, norm: float, limits: set[float], *, whole: bool) -> CheckFinding:
    prefix = "" if whole else "at least "
    clipping_called = any(math.isclose(n, limit) for n in limits)
    too_large = norm > limit * (1 + _TOLERANCE_RATIO)
    if too_large or clipping_called or (whole and norm > limit * (1 - _TOLERANCE_RATIO)):
        limit_text = f"gradients of norm at most {limit:g} at the update"
        return Checked(FEATURE, limit_text, f"{prefix}{norm:.4g}", wrong=too_large)
    return NotChecked(f"{FEATURE}: the norm, {prefix}{norm:.4g}, did not reach {limit:g}")


def _check_unclipped(norm: float, limits: set[float], norm_before: float | None) -> CheckFinding:
    if finite_limits := sorted(n for n in limits if n < math.inf):
        limits_text = ", ".join(f"{n:g}" for n in finite_limits)
        return Checked(FEATURE, "none", f"clipping to a norm of {limits_text}", wrong=True)
    if norm_before is None:
        return NotChecked(f"{FEATURE}: whether code other than torch's clips gradients")
    return Checked(
        FEATURE,
        "none",
        f"a norm of {norm:.4g} at the update, {norm_before:.4g} before",
        wrong=norm < norm_before * (1 - _TOLERANCE_RATIO),
    )
