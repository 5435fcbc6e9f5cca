"""Select among estimated plans: which of them are best, which are on the frontier, and which keep to the
limits."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from collections.abc import Iterable, Sequence

from memfit.planner.plan_space import effect_then_size_key
from memfit.techniques.registry import short_label
from memfit.types.dependence import SampleDependence
from memfit.types.errors import UserError
from memfit.types.plan import Bounds, Plan
from memfit.types.result import Estimate
from memfit.types.units import format_seconds

# Plans whose objective differs by less than this ratio are equally good; the milder and simpler one is taken.
TIE_RATIO = 0.03


@dataclasses.dataclass(frozen=True, slots=True)
class EqualityBand:
    """How far a score, such as a step time, may lie above the best (the lowest) and still count as equal to
    it.

    Up to ``low`` it always does, above ``high`` never. Of the scores in between, those below the widest gap
    between two successive scores do, so that a small change of a timing does not move a plan across the line.
    Both are relative to the best score: 0.05 is 5 % above it.
    """

    low: float
    high: float


EXACT = EqualityBand(TIE_RATIO, TIE_RATIO)
# The ratio of two predicted step times on one device was off by 6 % in the median, and by at most 13 % in 90
# % of the pairs of fast plans (benchmarks/records/regret.jsonl).
TIMED = EqualityBand(0.07, 0.14)
# Nothing is timed for a device of the catalog, so no noise moves a plan across the line. Two plans share most
# of their error (97.7 % of published pairs are ordered correctly, benchmarks/published.md).
MODELLED = EqualityBand(0.05, 0.05)
_USUAL_SPREAD_RATIO = 0.05  # usual spread of an operator's repeated calls in the measurements behind TIMED
_WIDEST = 0.18  # largest addition: up to 25 %, the error of a predicted step, then always counts as equal


def timed_band(spread_ratio: float) -> EqualityBand:
    """Return `TIMED`, 0.07 to 0.14, widened by how much more than usual repeated operator calls differ on
    this machine.

    ``spread_ratio``: by how much they differ (`Calibration.spread_ratio`); up to 0.05 is usual. The widening
    is at most 0.18 at the low end, and twice that at the high end, so that noise never makes a plan count as
    equal that is predicted to take far longer.
    """
    widening = min(_WIDEST, max(0.0, spread_ratio - _USUAL_SPREAD_RATIO))
    return EqualityBand(TIMED.low + widening, TIMED.high + 2 * widening)


class Objective(enum.StrEnum):
    """What a search minimises: step time ("fastest"), peak of live tensors ("smallest"), cost ("cheapest"),
    carbon emissions ("greenest") or number of devices ("fewest").
    """

    FASTEST = "fastest"
    SMALLEST = "smallest"
    CHEAPEST = "cheapest"
    GREENEST = "greenest"
    FEWEST = "fewest"


def within_bounds(bounds: Bounds, estimate: Estimate) -> bool:
    """Return whether the whole training, of ``bounds.steps`` steps, meets the deadline and the budget of
    money. A limit that is not set is met; an unknown step time meets no deadline, an unknown cost no budget.
    """
    step_s = estimate.step_s.value if estimate.step_s else math.inf
    usd = estimate.usd if estimate.usd is not None else math.inf
    late = bounds.deadline_s is not None and step_s * bounds.steps > bounds.deadline_s
    return not late and (bounds.budget_usd is None or usd * bounds.steps <= bounds.budget_usd)


def respects_micro_batch(plan: Plan, bounds: Bounds, batch: int) -> bool:
    """Return whether the plan splits the ``batch`` samples of a rank into micro-batches of the size that the
    user requested (``bounds.micro_batch``); True if none was requested.

    Raises UserError if the batch is not a multiple of that size.
    """
    size = bounds.micro_batch
    if not size:
        return True
    if batch % size:
        divisors_of_these_samples = ", ".join(str(d) for d in range(1, batch + 1) if batch % d == 0)
        raise UserError(
            f"a micro-batch of {size} does not divide the {batch} samples of a rank",
            allowed=divisors_of_these_samples,
            hint="or leave out --micro-batch",
        )
    return size * plan.micro_batches == batch


def missed_bounds(bounds: Bounds, fitting: Sequence[Estimate]) -> str:
    """Return a text that says how the deadline and the budget of money are missed. For the deadline it names
    what the fastest plan of ``fitting``, those that fit the memory, takes in time and money; for the budget,
    what the cheapest takes. A limit that is not set is not mentioned.

    Returns "" if ``fitting`` is empty, or if neither limit is set. That a set limit is missed is not checked.
    """
    limits = (
        (bounds.deadline_s, Objective.FASTEST, "a deadline of {} (the quickest", format_seconds),
        (bounds.budget_usd, Objective.CHEAPEST, "a budget of {} (the cheapest", "{:g} USD".format),
    )
    misses = []
    for limit, goal, template, formatter in limits:
        if limit is not None and fitting:
            e = min(fitting, key=lambda e: by_goal(e, goal))
            time = format_seconds(e.step_s.value * bounds.steps) if e.step_s else "unknown time"
            summary = f"{time} and {_usd(e.usd, bounds.steps)}, with {short_label(e.plan)}"
            misses.append(f"{template.format(formatter(limit))} that fits takes {summary})")
    return f"no allowed plan keeps to {' and '.join(misses)}, for {bounds.steps:,} steps" if misses else ""


def _usd(step_usd: float | None, steps: int) -> str:
    return "an unknown price" if step_usd is None else f"{step_usd * steps:.3g} USD"


def score(estimate: Estimate, goal: Objective) -> float:
    """Return the score of an estimate by the goal; smaller is better. It is seconds per step, peak bytes, US
    dollars per step, grams of CO2 per step, or the number of devices.

    If money or carbon is unknown, the step time is used, to which both are proportional on one device. An
    unknown step time counts as infinite. To the number of devices, at most 0.1 % is added for the step time,
    so that of equal numbers the fastest plan has the lowest score.
    """
    time_s = estimate.step_s.value if estimate.step_s else math.inf
    if goal is Objective.SMALLEST:
        return estimate.allocated_bytes.value
    if goal is Objective.FEWEST:  # by number of devices, then by time
        return estimate.plan.ranks * (1 + 1e-3 * (1.0 if math.isinf(time_s) else time_s / (1 + time_s)))
    if goal is Objective.CHEAPEST:
        return estimate.usd if estimate.usd is not None else time_s
    if goal is Objective.GREENEST:
        return estimate.co2_g if estimate.co2_g is not None else time_s
    return time_s


def lowest_score_first(estimates: Iterable[Estimate], goal: Objective) -> list[Estimate]:
    """Return the estimates sorted by their score by the goal; equal ones by their plan's fingerprint."""
    return sorted(estimates, key=lambda e: (score(e, goal), e.plan.fingerprint))


def by_goal(e: Estimate, goal: Objective) -> tuple[float, tuple[int, int, int]]:
    """Return the sort key of an estimate, lowest first: its score by the goal, then `effect_then_size_key` of
    its plan."""
    return score(e, goal), effect_then_size_key(e.plan, e.dependence)


def best(estimates: Iterable[Estimate], goal: Objective, band: EqualityBand = EXACT) -> Estimate | None:
    """Return the estimate with the mildest and simplest plan (the lowest `preference_key`: lowest effect
    class, then fewest techniques) among those whose score by the goal counts as equal to the lowest score.
    None if there are no estimates. If all scores are infinite, it is the mildest and simplest of all.

    ``band``: which scores count as equal; for memory and for the number of devices it is always `EXACT`, 3 %.
    """
    candidates = simplest_first(estimates, goal)
    if not candidates or math.isinf(score(candidates[-1], goal)):
        return candidates[0] if candidates else None
    scores = [score(e, goal) for e in candidates]
    limit = _equal_up_to(scores, EXACT if goal in (Objective.SMALLEST, Objective.FEWEST) else band)
    return next(e for e, e_score in zip(candidates, scores, strict=True) if e_score <= limit)


def simplest_first(estimates: Iterable[Estimate], goal: Objective) -> list[Estimate]:
    """Return the estimates with the mildest and simplest plan first (lowest effect class, then fewest
    techniques; see `preference_key`), each with a better score by the goal than all before it.

    An estimate is left out if one with a milder or simpler plan has at least as good a score.
    """
    ordered: list[Estimate] = []
    for e in sorted(estimates, key=lambda e: (preference_key(e.plan, e.dependence), score(e, goal))):
        if not ordered or score(e, goal) < score(ordered[-1], goal):
            ordered.append(e)
    return ordered


def _equal_up_to(scores: Sequence[float], band: EqualityBand) -> float:
    """Return the highest of ``scores`` that counts as equal to the lowest, which is the last of them, by the
    rule of `EqualityBand`."""
    lowest = scores[-1]
    equal_low = max(s for s in scores if s <= lowest * (1 + band.low))
    candidates = sorted(s for s in scores if equal_low < s <= lowest * (1 + band.high))
    steps = [
        equal_low,
        *candidates,
        min((s for s in scores if s > lowest * (1 + band.high)), default=math.inf),
    ]
    far_score = lowest * (1 + 2 * band.high - band.low)  # a plan above this is far enough away
    gaps = [min(above, far_score) - below for below, above in itertools.pairwise(steps)]
    return steps[gaps.index(max(gaps))]


def preference_key(
    plan: Plan, dependence: SampleDependence | None = None
) -> tuple[tuple[int, int, int], str]:
    """Return a sort key of the plan: of equally good plans, the one with the lowest key is preferred. It is
    (`effect_then_size_key`, a text). The text has the values of the settings, so that small ones come first,
    and the plan's fingerprint, so that no two plans have the same key. ``dependence``: as there.
    """
    settings = [(u.technique, name, value) for u in plan.uses for name, value in sorted(u.settings.items())]
    return effect_then_size_key(plan, dependence), ";".join(
        f"{t}.{n}={_padded(v)}" for t, n, v in settings
    ) + plan.fingerprint


def _padded(value: object) -> str:
    return f"{value:020.3f}" if isinstance(value, int | float) else str(value)


def frontier(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Return the estimates that no other one beats, by increasing peak. One beats another if it is at least
    as good in peak, step time and effect class, and better in one of them. Of estimates equal in all three,
    only that of the simplest plan (see `effect_then_size_key`) is returned. An unknown step time counts as
    infinite.
    """
    merits: list[_Merits] = [
        (
            e.allocated_bytes.value,
            score(e, Objective.FASTEST),
            *effect_then_size_key(e.plan, e.dependence),
            e.plan.fingerprint,
        )
        for e in estimates
    ]
    undominated = [
        e for e, own in zip(estimates, merits, strict=True) if not any(_beats(m, own) for m in merits)
    ]
    return sorted(
        undominated, key=lambda e: (e.allocated_bytes.value, score(e, Objective.FASTEST), e.plan.fingerprint)
    )


_Merits = tuple[float, float, int, int, int, str]


def _beats(a: _Merits, b: _Merits) -> bool:
    no_worse = a[0] <= b[0] and a[1] <= b[1] and a[2] <= b[2]
    return no_worse and (a[:3] != b[:3] or a[3:] < b[3:])
