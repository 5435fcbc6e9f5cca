"""Turn priced plans into an answer: the frontier, the recommendation, and the reasons for both."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from memfit.planner.plan_space import complexity, dependence_reasons
from memfit.techniques.registry import effect_of, make_plain_plan, short_label, without
from memfit.types.deadline import TimeUp
from memfit.types.dependence import SampleDependence
from memfit.types.errors import UserError
from memfit.types.plan import Bounds, Plan
from memfit.types.result import Choice, Estimate, Reason, SearchResult
from memfit.types.units import format_seconds

# Plans whose objective differs by less than this ratio are equally good; the milder and simpler one is taken.
TIE_RATIO = 0.03


@dataclasses.dataclass(frozen=True, slots=True)
class Band:
    """How far a score, such as a step time, may lie above the best (the lowest) and still count as equal to
    it.

    Up to ``low`` it always does, above ``high`` never. Of the scores in between, those below the widest gap
    between two successive scores do, so that a small change of a timing does not move a plan across the line.
    Both are relative to the best score: 0.05 is 5 % above it.
    """

    low: float
    high: float


EXACT = Band(TIE_RATIO, TIE_RATIO)
# The ratio of two predicted step times on one device was off by 6 % in the median, and by at most 13 % in 90
# % of the pairs of fast plans (benchmarks/records/regret.jsonl).
TIMED = Band(0.07, 0.14)
# Nothing is timed for a device of the catalog, so no noise moves a plan across the line. Two plans share most
# of their error (97.7 % of published pairs are ordered correctly, benchmarks/published.md).
MODELLED = Band(0.05, 0.05)
_USUAL_SPREAD_RATIO = 0.05  # usual spread of an operator's repeated calls in the measurements behind TIMED
_WIDEST = 0.18  # largest addition: up to 25 %, the error of a predicted step, then always counts as equal


def timed_band(spread_ratio: float) -> Band:
    """Return `TIMED`, widened by how much more than usual repeated operator calls differ on this machine.

    ``spread_ratio``: by how much they differ, as in `Calibration`; up to 0.05 is usual. The widening is at
    most 0.18 at the low end, and twice that at the high end, so that noise never makes a plan count as equal
    that is predicted to take far longer.
    """
    widening = min(_WIDEST, max(0.0, spread_ratio - _USUAL_SPREAD_RATIO))
    return Band(TIMED.low + widening, TIMED.high + 2 * widening)


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
        divisors = ", ".join(str(d) for d in range(1, batch + 1) if batch % d == 0)
        raise UserError(
            f"a micro-batch of {size} does not divide the {batch} samples of a rank", allowed=divisors
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
            e = min(fitting, key=lambda e: (score(e, goal), complexity(e.plan, e.dependence)))
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
        return estimate.plan.ranks * (1 + 1e-3 * time_s / (1 + time_s))
    if goal is Objective.CHEAPEST:
        return estimate.usd if estimate.usd is not None else time_s
    if goal is Objective.GREENEST:
        return estimate.co2_g if estimate.co2_g is not None else time_s
    return time_s


def best(estimates: Iterable[Estimate], goal: Objective, band: Band = EXACT) -> Estimate | None:
    """Return the estimate with the mildest and simplest plan (the lowest `mildness`) among those whose score
    by the goal counts as equal to the lowest score; None if there are no estimates. If all scores are
    infinite, it is the mildest and simplest of all.

    ``band``: which scores count as equal; for memory and for the number of devices it is always `EXACT`, 3 %.
    """
    candidates = simplest_first(estimates, goal)
    if not candidates or math.isinf(score(candidates[-1], goal)):
        return candidates[0] if candidates else None
    scores = [score(e, goal) for e in candidates]
    limit = _equal_up_to(scores, EXACT if goal in (Objective.SMALLEST, Objective.FEWEST) else band)
    return next(e for e, e_score in zip(candidates, scores, strict=True) if e_score <= limit)


def simplest_first(estimates: Iterable[Estimate], goal: Objective) -> list[Estimate]:
    """Return the estimates, with the mildest and simplest plan first (see `mildness`), each with a better
    score by the goal than all before it.

    An estimate is left out if one with a milder or simpler plan has at least as good a score.
    """
    ordered: list[Estimate] = []
    for e in sorted(estimates, key=lambda e: (mildness(e.plan, e.dependence), score(e, goal))):
        if not ordered or score(e, goal) < score(ordered[-1], goal):
            ordered.append(e)
    return ordered


def _equal_up_to(scores: Sequence[float], band: Band) -> float:
    """Return the highest of ``scores`` that counts as equal to the lowest, which is the last of them, as
    `Band` says.
    """
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


def mildness(plan: Plan, dependence: SampleDependence | None = None) -> tuple[tuple[int, int, int], str]:
    """Return a sort key of the plan: of equally good plans, the one with the lowest key is preferred. It is
    (`complexity`, a text). The text has the values of the settings, so that small ones come first, and the
    plan's fingerprint, so that no two plans have the same key.
    """
    settings = [(u.technique, name, value) for u in plan.uses for name, value in sorted(u.settings.items())]
    return complexity(plan, dependence), ";".join(
        f"{t}.{n}={_padded(v)}" for t, n, v in settings
    ) + plan.fingerprint


def _padded(value: object) -> str:
    return f"{value:020.3f}" if isinstance(value, int | float) else str(value)


def frontier(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Return the estimates that no other one beats, by increasing peak. One beats another if it is at least
    as good in peak, step time and effect class, and better in one of them. Of estimates equal in all three,
    only that of the simplest plan (see `complexity`) is returned. An unknown step time counts as infinite.
    """
    merits: list[_Merits] = [
        (
            e.allocated_bytes.value,
            score(e, Objective.FASTEST),
            *complexity(e.plan, e.dependence),
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


@dataclasses.dataclass(frozen=True, slots=True)
class Prices:
    """How `decide` estimates the plans that lack one technique of the recommended plan, and what else the
    reasons for the recommendation need.

    ``whole`` returns the estimate of one plan. ``prepare`` is called beforehand with all plans that ``whole``
    will be called with, for example to trace them in parallel. ``needs`` returns the bytes of an estimate
    that are compared with the cap. ``sketches``: the estimates of all searched plans that were composed from
    traces of parts. ``may_fit``, called with all traced estimates, returns a function that tells whether the
    plan of a sketch may fit when it is traced; None: it may if its sketch fits.
    """

    whole: Callable[[Plan], Estimate]
    prepare: Callable[[Sequence[Plan]], None] = lambda plans: None
    band: Band = TIMED  # step times within it count as equal
    needs: Callable[[Estimate], int] = lambda e: int(e.allocated_bytes.value)
    sketches: Sequence[Estimate] = ()
    may_fit: Callable[[Sequence[Estimate]], Callable[[Estimate], bool]] | None = None


def decide(
    estimates: Sequence[Estimate],
    *,
    goal: Objective,
    cap_bytes: int,
    considered: int,
    fits: Callable[[Estimate], bool],
    left_out: tuple[Reason, ...],
    price: Prices | Callable[[Plan], Estimate],
    inside: Callable[[Estimate], bool] | None = None,
) -> SearchResult:
    """Build the search result with the recommended plan and its reasons. If no estimate fits, the result's
    ``recommended`` is None.

    ``estimates`` were traced and include plain training. ``considered``: number of plans that were searched.
    ``left_out``: reasons to report after those of the recommended plan. ``price`` estimates the plans that
    lack one of its techniques, for the reasons. ``fits`` tells whether a plan may be recommended. ``inside``
    tells whether it fits the memory; it is given if ``fits`` checks more than that, and is what the ``fits``
    of each choice in the result says.

    The result's frontier has the estimates of `frontier` that fit, plain training and the recommended plan,
    and the plan with the lowest peak if it is in `frontier`; by increasing peak.
    """
    prices = price if isinstance(price, Prices) else Prices(price)
    baseline = next(e for e in estimates if e.plan == make_plain_plan(e.plan.ranks))
    winner = best([e for e in estimates if fits(e)], goal, prices.band)
    smallest = min(estimates, key=lambda e: (e.allocated_bytes.value, complexity(e.plan, e.dependence)))

    def choice(e: Estimate, reasons: tuple[Reason, ...] = ()) -> Choice:
        within_cap = (inside or fits)(e)
        return Choice(estimate=e, fits=within_cap, effect=effect_of(e.plan, e.dependence), reasons=reasons)

    shown = [e for e in frontier(estimates) if fits(e) or e is smallest] + [baseline]
    by_plan = {e.plan: e for e in ([winner] if winner else []) + shown}
    ordered = sorted(by_plan.values(), key=lambda e: e.allocated_bytes.value)
    recommended = None
    if winner is not None:
        with contextlib.suppress(TimeUp):
            prices.prepare([without(winner.plan, u.technique) for u in winner.plan.uses])
        winner_reasons = reasons_for(winner, estimates, fits, goal, prices, cap_bytes)
        recommended = choice(winner, (*winner_reasons, *left_out))
    return SearchResult(
        goal=goal.value,
        cap_bytes=cap_bytes,
        considered=considered,
        baseline=choice(baseline),
        frontier=tuple(recommended if recommended and e is winner else choice(e) for e in ordered),
        recommended=recommended,
        smallest=choice(smallest),
    )


def reasons_for(
    winner: Estimate,
    estimates: Sequence[Estimate],
    fits: Callable[[Estimate], bool],
    goal: Objective,
    prices: Prices,
    cap_bytes: int,
) -> tuple[Reason, ...]:
    """Return the reasons for the recommended plan ``winner``, in this order: what splitting the batch does to
    the training, what each of its techniques saves, and why techniques of other plans are not in it.
    """
    splitting = dependence_reasons(winner.plan, winner.dependence) if winner.dependence else ()
    why_not = _why_not(winner, estimates, prices, fits, goal, cap_bytes)
    return (*splitting, *saved_by(winner, prices.whole), *why_not)


def saved_by(estimate: Estimate, price: Callable[[Plan], Estimate]) -> tuple[Reason, ...]:
    """Return one reason for each technique of the plan, largest saving first. It gives the bytes of peak that
    the technique saves and the ratio of step times, with the technique to without it. If the plan without it
    is impossible, because a memory budget for recomputation cannot be met, the reason says that the technique
    is needed. A technique has no reason if ``price`` raises TimeUp, because the search has no time left.

    ``price`` returns the estimate of a plan. On several ranks, a data-parallel technique other than ddp is
    compared with ddp; ddp with default settings gets no reason.
    """
    reasons = []
    for use in estimate.plan.uses:
        try:
            reduced = price(without(estimate.plan, use.technique))
        except UserError:  # a budget that cannot be met without it
            reasons.append(Reason(kind="needed", technique=use.technique))
            continue
        except TimeUp:
            continue  # a reason that was not priced is not given
        if reduced.plan == estimate.plan:
            continue  # DDP is the fallback of several ranks
        reasons.append(
            Reason(
                kind="saves",
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


def _why_not(
    winner: Estimate,
    estimates: Sequence[Estimate],
    prices: Prices,
    fits: Callable[[Estimate], bool],
    goal: Objective,
    cap_bytes: int,
) -> tuple[Reason, ...]:
    """Return one reason for each technique that the winner lacks and a plan of ``estimates`` (all traced) or
    of the sketches has:

    - If a traced plan with the technique fits, the winner is compared with the best of these by the goal.
    - Else, if plans with it may fit that were not traced, their number is given ("left_out_not_looked_at").
    - Else no plan with it fits (`none_fits`).
    """
    may_fit = prices.may_fit(estimates) if prices.may_fit else fits
    traced_plans = {e.plan for e in estimates}
    reasons = []
    for name in missing_techniques(winner, [*estimates, *prices.sketches]):
        traced = [e for e in estimates if e.plan.get(name)]
        rivals = [e for e in traced if fits(e)]
        sketched = [e for e in prices.sketches if e.plan.get(name) and e.plan not in traced_plans]
        if rivals:
            reasons.append(_compared(winner, min(rivals, key=lambda e: by_goal(e, goal)), name, goal))
        elif possible := sum(map(may_fit, sketched)):
            reasons.append(Reason(kind="left_out_not_looked_at", technique=name, plan_count=possible))
        else:
            reasons.append(none_fits(name, [*traced, *sketched], prices.needs, cap_bytes, inside=False))
    return tuple(reasons)


def missing_techniques(winner: Estimate, estimates: Iterable[Estimate]) -> list[str]:
    """Return the sorted names of the techniques that plans of ``estimates`` have and the winner does not."""
    used = frozenset[str]().union(*(e.plan.techniques for e in estimates))
    return sorted(used - winner.plan.techniques)


def by_goal(e: Estimate, goal: Objective) -> tuple[float, tuple[int, int, int]]:
    """Return the sort key of an estimate: its score by the goal, then its complexity."""
    return score(e, goal), complexity(e.plan, e.dependence)


def none_fits(
    name: str, priced: Sequence[Estimate], needs: Callable[[Estimate], int], cap_bytes: int, *, inside: bool
) -> Reason:
    """Return the reason why the technique ``name`` is in the winner, or is not, when none of the ``priced``
    plans fits.

    ``inside``: True if the winner has the technique and the ``priced`` plans lack it; False if they have it
    and the winner lacks it. The reason gives the number of ``priced`` plans and the bytes of the one that
    needs the least, of those traced whole if there are any. Its kind says whether that is more than
    ``cap_bytes`` ("needed_priced", "left_out_too_large"), or another limit is not met ("needed_late",
    "left_out_late"). If ``priced`` is empty, the kind is "needed".
    """
    of_traces = [e for e in priced if e.traced] or priced
    smallest = min(of_traces, key=lambda e: (needs(e), complexity(e.plan)), default=None)
    if smallest is None:
        return Reason(kind="needed", technique=name)
    exceeds_cap = needs(smallest) > cap_bytes
    kinds = ("needed_late", "needed_priced") if inside else ("left_out_late", "left_out_too_large")
    return Reason(
        kind=kinds[exceeds_cap],
        technique=name,
        plan_count=len(priced),
        least_bytes=needs(smallest),
        detail=short_label(smallest.plan) if exceeds_cap else "",
    )


def _compared(winner: Estimate, rival: Estimate, name: str, goal: Objective) -> Reason:
    """Return why the technique ``name`` is not in the winner, by comparison with ``rival``, the best plan
    that has it. Its kind is "left_out_slower" if the rival's score by the goal is more than 3 % above the
    winner's, "left_out_not_needed" if the two are within 3 % of each other, and "left_out_uncertain" if the
    rival's is lower by more. A rival of the last kind was not recommended because the difference is less than
    the error of predicted times.
    """
    ratio = score(rival, goal) / score(winner, goal) if score(winner, goal) else 1.0
    if ratio > 1 + TIE_RATIO:
        kind = "left_out_slower"
    else:
        kind = "left_out_uncertain" if ratio < 1 / (1 + TIE_RATIO) else "left_out_not_needed"
    return Reason(
        kind=kind,
        technique=name,
        saved_bytes=int(winner.allocated_bytes.value - rival.allocated_bytes.value),
        time_ratio=_ratio(rival, winner),
        detail=rival.plan.label,
    )
