"""Why the recommended plan of a search for one device, or for several that divide the batch, has its
techniques, and why it lacks those of other plans. `multi_device_explanations.py` does the same for many
devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from memfit.planner.plan_space import dependence_reasons, effect_then_size_key
from memfit.planner.selection import TIE_RATIO, TIMED, EqualityBand, Objective, by_goal, score
from memfit.techniques.registry import short_label, without
from memfit.types.deadline import TimeUp
from memfit.types.errors import UserError
from memfit.types.plan import Plan
from memfit.types.result import Estimate, Reason, ReasonKind


@dataclasses.dataclass(frozen=True, slots=True)
class ReasonInputs:
    """What the reasons for a recommendation rest on beside the traced plans.

    ``whole`` returns the estimate of one plan; it is called for the plans that lack one technique of the
    recommended plan. ``prepare`` is called beforehand with all of these, for example to trace them in
    parallel. ``needs`` returns the bytes of an estimate that are compared with the cap. ``sketches``: the
    estimates of all searched plans that were composed from traces of parts. ``may_fit_by_traces``, called
    with all traced estimates, returns a function that tells whether the plan of a sketch may fit when it is
    traced; None: it may if its sketch fits.
    """

    whole: Callable[[Plan], Estimate]
    prepare: Callable[[Sequence[Plan]], None] = lambda plans: None
    band: EqualityBand = TIMED  # step times within it count as equal
    needs: Callable[[Estimate], int] = lambda e: int(e.allocated_bytes.value)
    sketches: Sequence[Estimate] = ()
    may_fit_by_traces: Callable[[Sequence[Estimate]], Callable[[Estimate], bool]] | None = None


def reasons_for(
    winner: Estimate,
    estimates: Sequence[Estimate],
    meets_limits: Callable[[Estimate], bool],
    goal: Objective,
    inputs: ReasonInputs,
    cap_bytes: int,
) -> tuple[Reason, ...]:
    """Return the reasons for the recommended plan ``winner``, in this order: what splitting the batch does to
    the training, what each of its techniques saves, and why techniques of other plans are not in it.

    ``estimates`` were traced. ``meets_limits`` tells whether a plan fits the memory and keeps to the other
    limits.
    """
    splitting = dependence_reasons(winner.plan, winner.dependence) if winner.dependence else ()
    left_out = _left_out_reasons(winner, estimates, inputs, meets_limits, goal, cap_bytes)
    return (*splitting, *saved_by(winner, inputs.whole), *left_out)


def saved_by(estimate: Estimate, whole: Callable[[Plan], Estimate]) -> tuple[Reason, ...]:
    """Return one reason for each technique of the plan, largest saving first. It gives the bytes of peak that
    the technique saves and the ratio of step times, with the technique to without it. If the plan without it
    is impossible, because a memory budget for recomputation cannot be met, the reason says that the technique
    is needed. A technique has no reason if ``whole`` raises TimeUp, because the search has no time left.

    ``whole`` returns the estimate of a plan. On several ranks, a data-parallel technique other than ddp is
    compared with ddp; ddp with default settings gets no reason.
    """
    reasons = []
    for use in estimate.plan.uses:
        try:
            reduced = whole(without(estimate.plan, use.technique))
        except UserError:  # a budget that cannot be met without it
            reasons.append(Reason(kind=ReasonKind.NEEDED, technique=use.technique))
            continue
        except TimeUp:
            continue  # a reason that rests on no estimate is not given
        if reduced.plan == estimate.plan:
            continue  # DDP is the fallback of several ranks
        reasons.append(
            Reason(
                kind=ReasonKind.SAVES,
                technique=use.technique,
                saved_bytes=int(reduced.allocated_bytes.value - estimate.allocated_bytes.value),
                time_ratio=_ratio(estimate, reduced),
            )
        )
    return tuple(sorted(reasons, key=lambda r: -(r.saved_bytes or 0)))


def _ratio(estimate: Estimate, reference: Estimate) -> float | None:
    if estimate.step_s is None or reference.step_s is None or not reference.step_s.value:
        return None
    return estimate.step_s.value / reference.step_s.value


def _left_out_reasons(
    winner: Estimate,
    estimates: Sequence[Estimate],
    inputs: ReasonInputs,
    meets_limits: Callable[[Estimate], bool],
    goal: Objective,
    cap_bytes: int,
) -> tuple[Reason, ...]:
    """Return one reason for each technique that the winner lacks and a plan of ``estimates`` (all traced) or
    of the sketches has. It is the first of these that applies:

    - If a traced plan with the technique meets the limits, the winner is compared with the best of these by
      the goal (`_comparison_reason`), unless an untraced plan with it may change that (`may_overturn`).
    - If plans with it may fit that were not traced, their number is given (LEFT_OUT_NOT_LOOKED_AT).
    - No plan with it fits (`none_fits`).
    """
    may_fit = inputs.may_fit_by_traces(estimates) if inputs.may_fit_by_traces else meets_limits
    traced_plans = {e.plan for e in estimates}
    reasons = []
    for name in missing_techniques(winner, [*estimates, *inputs.sketches]):
        traced = [e for e in estimates if e.plan.get(name)]
        rivals = [e for e in traced if meets_limits(e)]
        sketched = [e for e in inputs.sketches if e.plan.get(name) and e.plan not in traced_plans]
        possible = list(filter(may_fit, sketched))
        if rivals and not may_overturn(possible, rivals, winner, inputs.sketches, goal):
            reasons.append(
                _comparison_reason(winner, min(rivals, key=lambda e: by_goal(e, goal)), name, goal)
            )
        elif possible:
            kind = ReasonKind.LEFT_OUT_NOT_LOOKED_AT
            reasons.append(Reason(kind=kind, technique=name, plan_count=len(possible)))
        else:
            with_it = [*traced, *sketched]
            reasons.append(none_fits(name, with_it, inputs.needs, cap_bytes, winner_has_it=False))
    return tuple(reasons)


def may_overturn(
    untraced: Sequence[Estimate],
    traced: Sequence[Estimate],
    winner: Estimate,
    sketches: Sequence[Estimate],
    goal: Objective,
) -> list[Estimate]:
    """Return the sketches (estimates from traces of parts) of ``untraced`` that are better by the goal than
    those of all ``traced`` plans and say something else of the winner: that a plan is as good as it, or
    better. A comparison with the best traced plan may then be false. A traced plan without a sketch counts by
    its trace."""
    scores = {e.plan: score(e, goal) for e in sketches}
    best_traced, winners = (
        min(scores.get(e.plan, score(e, goal)) for e in estimates) for estimates in (traced, [winner])
    )
    same = _comparison(best_traced / winners if winners else 1.0)
    return [
        e
        for e in untraced
        if score(e, goal) < best_traced
        and (same is ReasonKind.LEFT_OUT_UNCERTAIN or _comparison(score(e, goal) / winners) is not same)
    ]


def missing_techniques(winner: Estimate, estimates: Iterable[Estimate]) -> list[str]:
    """Return the sorted names of the techniques that plans of ``estimates`` have and the winner does not."""
    used = frozenset[str]().union(*(e.plan.techniques for e in estimates))
    return sorted(used - winner.plan.techniques)


def none_fits(
    name: str,
    estimates: Sequence[Estimate],
    needs: Callable[[Estimate], int],
    cap_bytes: int,
    *,
    winner_has_it: bool,
) -> Reason:
    """Return the reason why the technique ``name`` is in the winner, or is not, when no plan of ``estimates``
    fits: they lack the technique if ``winner_has_it``, and have it otherwise.

    The reason gives the number of these plans and the bytes of the one that needs the least, of those traced
    whole if there are any. Its kind says whether that is more than ``cap_bytes`` (NEEDED_FOR_DEVICE,
    LEFT_OUT_TOO_LARGE), or another limit is not met (NEEDED_FOR_LIMITS, LEFT_OUT_LATE). Without estimates,
    the kind is NEEDED.
    """
    of_traces = [e for e in estimates if e.traced] or estimates
    smallest = min(of_traces, key=lambda e: (needs(e), effect_then_size_key(e.plan)), default=None)
    if smallest is None:
        return Reason(kind=ReasonKind.NEEDED, technique=name)
    exceeds_cap = needs(smallest) > cap_bytes
    if winner_has_it:
        kind = ReasonKind.NEEDED_FOR_DEVICE if exceeds_cap else ReasonKind.NEEDED_FOR_LIMITS
    else:
        kind = ReasonKind.LEFT_OUT_TOO_LARGE if exceeds_cap else ReasonKind.LEFT_OUT_LATE
    return Reason(
        kind=kind,
        technique=name,
        plan_count=len(estimates),
        least_bytes=needs(smallest),
        detail=short_label(smallest.plan) if exceeds_cap else "",
    )


def _comparison_reason(winner: Estimate, rival: Estimate, name: str, goal: Objective) -> Reason:
    """Return why the technique ``name`` is not in the winner, by comparison with ``rival``, the best plan
    that has it. Its kind is LEFT_OUT_SLOWER if the rival's score by the goal is more than 3 % above the
    winner's, LEFT_OUT_NOT_NEEDED if the two are within 3 % of each other, and LEFT_OUT_UNCERTAIN if the
    rival's is lower by more. A rival of the last kind was not recommended because the difference is less than
    the error of predicted times.
    """
    kind = _comparison(score(rival, goal) / score(winner, goal) if score(winner, goal) else 1.0)
    return Reason(
        kind=kind,
        technique=name,
        saved_bytes=int(winner.allocated_bytes.value - rival.allocated_bytes.value),
        time_ratio=_ratio(rival, winner),
        detail=rival.plan.label,
    )


def _comparison(ratio: float) -> ReasonKind:
    """Return what the ratio of a plan's score to the winner's says of the technique that only it has."""
    if ratio > 1 + TIE_RATIO:
        return ReasonKind.LEFT_OUT_SLOWER
    return ReasonKind.LEFT_OUT_UNCERTAIN if ratio < 1 / (1 + TIE_RATIO) else ReasonKind.LEFT_OUT_NOT_NEEDED
