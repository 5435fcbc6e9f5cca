"""How much better than the best traced plan a plan could be that is known only by its sketch.

The bound rests on the plans of the search that were both sketched and traced. Their ratios of trace to sketch
have a lowest and a highest value. A plan that was not traced may lie below the lowest one; of ``n`` evenly
spread ratios the next lies below it by about a step, (highest - lowest) / (n - 1). Two steps are granted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from memfit.planner.selection import Objective, score
from memfit.types.deadline import Deadline
from memfit.types.result import Estimate, SearchExtent
from memfit.types.units import format_seconds

ENOUGH = 4  # plans both sketched and traced; with fewer their spread says too little
_STEPS = 2  # below the lowest ratio seen that the ratio of another plan may lie


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SearchProgress:
    """How far a search got.

    ``predicted``, ``unpredicted``: numbers of plans that were sketched, and that there was no time to sketch.
    ``limit_s``: the time limit in seconds; None: none; 0: the search answered from what an earlier one had
    kept on disk. ``unknown``: why there is no bound, whatever was traced: "goal" (the fewest devices) or
    "not_searched" (there was no time for some numbers of devices); "" if there may be one.
    """

    predicted: int
    deadline: Deadline
    limit_s: float | None
    unpredicted: int = 0
    unknown: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UntracedPlans:
    """The plans that were not traced and may fit.

    ``lowest``: the lowest score that one of them may have. ``contenders``: number of those that may be better
    than the best traced one. ``first``: one with that score, for callers that trace it. ``unknown``: why
    there is no such score, such as "few_pairs" (too few plans both sketched and traced) or "no_score" (the
    score of a sketch is unknown); "" if there is.
    """

    lowest: float = math.inf
    contenders: int = 0
    first: object = None
    unknown: str = ""


def least_ratio(ratios: Sequence[float]) -> float:
    """Return the lowest ratio of the score by a whole trace to that by the sketch (the estimate from traces
    of parts) that a plan which was not traced is assumed to have, at least 0. ``ratios``: those of the traced
    plans, at least two."""
    lowest, highest = min(ratios), max(ratios)
    return max(0.0, lowest - _STEPS * (highest - lowest) / (len(ratios) - 1))


def score_ratios(pairs: Iterable[tuple[Estimate, Estimate]], goal: Objective) -> list[float]:
    """Return the score by the whole trace divided by the score by the sketch for each pair (sketch, trace) of
    estimates. Pairs are left out if a score is infinite or the sketch's is 0."""
    scores = [(score(sketch, goal), score(trace, goal)) for sketch, trace in pairs]
    return [t / s for s, t in scores if 0 < s < math.inf and t < math.inf]


def extent(
    pairs: Sequence[tuple[Estimate, Estimate]],
    best_score: float,
    *,
    goal: Objective,
    chosen: Estimate | None,
    untraced: Callable[[], UntracedPlans],
    reached: SearchProgress,
) -> SearchExtent:
    """Return how far a search got, with the bound on what the plans could gain that it did not trace.

    ``pairs``: (estimate by the sketch, estimate by the whole trace) of each plan that has both.
    ``best_score``: the lowest of a traced plan that may be recommended; infinite if there is none.
    ``chosen``: the one that is recommended. ``untraced`` returns the other plans; it is called only if a
    bound is possible.
    """
    ratios, is_scored = score_ratios(pairs, goal), 0 < best_score < math.inf
    search_extent = SearchExtent(
        priced_count=reached.predicted,
        traced_count=len(pairs),
        unpriced_count=reached.unpredicted,
        limit_s=reached.limit_s,
        time_up=reached.deadline.hit_time_limit,
        pairs=len(ratios),
        low_ratio=min(ratios, default=None),
        high_ratio=max(ratios, default=None),
        chosen_ratio=score(chosen, goal) / best_score - 1 if chosen and is_scored else 0.0,
    )
    unknown = reached.unknown or ("unpriced" if reached.unpredicted else "" if is_scored else "no_score")
    others = UntracedPlans(unknown=unknown) if unknown else untraced()
    if others.unknown:
        return dataclasses.replace(search_extent, gain_unknown=others.unknown)
    gain_ratio = max(0.0, 1 - others.lowest / best_score)
    return dataclasses.replace(search_extent, gain_ratio=gain_ratio, contender_count=others.contenders)


def untraced_plans(
    sketches: Sequence[Estimate], goal: Objective, ratios: Sequence[float], best_score: float
) -> UntracedPlans:
    """Return what is known of the plans of these sketches (estimates from traces of parts), which were not
    traced whole. ``ratios``: score of trace over score of sketch, of all plans that have both. The result has
    no lowest score if there are fewer than four ratios ("few_pairs") or a sketch has no finite score
    ("no_score")."""
    scores = [score(s, goal) for s in sketches]
    if not scores:
        return UntracedPlans()
    if not all(0 < s < math.inf for s in scores):
        return UntracedPlans(unknown="no_score")
    if len(ratios) < ENOUGH:
        return UntracedPlans(unknown="few_pairs")
    least = least_ratio(ratios)
    return UntracedPlans(lowest=least * min(scores), contenders=sum(least * s < best_score for s in scores))


def unfinished_text(reached: SearchExtent) -> str:
    """Return the text that says that the time limit ended the search; "" if it did not."""
    if not reached.time_up or reached.limit_s is None:
        return ""
    count = reached.left_count + reached.unpriced_count
    return (
        f"the time limit of {format_seconds(reached.limit_s)} ended the search when "
        f"{count:,} plans were not traced, some of which may fit; --within "
        "allows more time"
    )
