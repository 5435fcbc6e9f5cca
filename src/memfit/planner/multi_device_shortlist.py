"""Choose which plans of a search for many devices are traced whole: trace the best ones (finalists) until
none of the rest could be better.

A sketch is the estimate of a plan that was composed from traces of parts.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from memfit.planner.parallelism_grid import DIVIDING_TECHNIQUES, QUICK_BLOCKS
from memfit.planner.plan_kinds import doublings, kind
from memfit.planner.plan_space import effect_then_size_key
from memfit.planner.selection import TIE_RATIO, Objective, best, score, within_bounds
from memfit.planner.shortlist import most_promising
from memfit.planner.sketch_errors import BestCaseEstimates
from memfit.techniques.registry import short_label, technique
from memfit.types.deadline import TimeUp
from memfit.types.plan import Plan
from memfit.types.result import Estimate

if TYPE_CHECKING:
    from memfit.planner.multi_device_predictor import MultiDevicePredictor

# more finalists for small models, whose traces are quick
_FINALISTS, _MOST_FINALISTS, _TRACED_BLOCKS = 3, 12, 48
_TOO_SLOW = 0.85  # sketches of plans of up to 8 ranks were up to 25 % off, most of them less than this
# the same for memory: in short pipelines, what is gathered at the ends is half of all memory
_TOO_LARGE = 0.5
# most traces near the best plan of a small model; highest score of a sketch over the best one's to be tried
_CLIMBED, _MAY_BE_BETTER = 16, 1.25
_LATE = 2  # traces that are begun after the deadline, while no plan fits
_CLOSING = 24  # most traces of plans that may be better than the best plan of a small model after that
_NEAR = 0.97  # factor by which ratios of trace to sketch differed per doubling of a degree

Fits = Callable[[Estimate], bool]


def is_quick(predictor: MultiDevicePredictor) -> bool:
    """Return whether the model has at most 12 blocks, so that whole traces are quick."""
    return predictor.traced.blocks <= QUICK_BLOCKS


class FinalistTracer:
    """Traces finalists, the plans with the most promising sketches (estimates from traces of parts), one by
    one, until no other plan may be better than the best traced one or enough traced plans fit: 3, or 4 to 12
    of a model of at most 12 blocks.

    How good a plan may be follows from its sketch and from the errors of the sketches of plans that were
    traced (see `hoped_score`). If a traced plan does not fit the
    device, the factor by which it needs more than its sketch is noted; other plans whose sketches would
    exceed the cap after multiplication by the largest such factor are not traced. For a model of at least 13
    blocks, no plan is traced for a gain of 3 % or less.

    ``meets_limits`` tells whether an estimate's plan fits and keeps to the other limits of the search.
    ``goal``: None means that of the search.
    """

    def __init__(
        self, predictor: MultiDevicePredictor, meets_limits: Fits, goal: Objective | None = None
    ) -> None:
        self.predictor, self.meets_limits, self.goal = predictor, meets_limits, goal or predictor.request.goal
        self.traced: list[Estimate] = []
        self._ratios: dict[Plan, float] = {}  # score of the whole trace over that of the sketch
        self._unknown = _TOO_LARGE if self.goal is Objective.SMALLEST else _TOO_SLOW
        self._heaviest = 1.0
        self._late = 0  # traces begun after the deadline
        self._most = (
            min(_MOST_FINALISTS, _TRACED_BLOCKS // predictor.traced.blocks)
            if is_quick(predictor)
            else _FINALISTS
        )
        self._equal = 1 + TIE_RATIO * (self._most == _FINALISTS)

    def run(self, estimates: Sequence[Estimate], basis: Plan) -> list[Estimate]:
        """Trace finalists among the sketches ``estimates`` and return the estimates of all traced plans, in
        the order in which they were traced.

        If the first two finalists can be named before any is traced, and the search has no time limit, they
        and ``basis``, a plan that the caller needs later, are traced in parallel; the trace of ``basis`` is
        only cached, not returned. If no traced plan fits, the plans with the three lowest peaks are tried
        until one can be traced. If one fits and the model has at most 12 blocks, plans near the best one are
        traced too.

        If the search's time is up, it ends as soon as a traced plan fits, or after two more traces and that
        of the plan with the lowest peak.
        """
        with contextlib.suppress(TimeUp):
            self._finalists([e for e in estimates if self.meets_limits(e)], basis)
        if not any(map(self.meets_limits, self.traced)):
            with self.predictor.deadline.overtime():
                self._smallest(estimates)
        elif self._most > _FINALISTS:
            with contextlib.suppress(TimeUp):
                self._climb()
        return self.traced

    def _finalists(self, candidates: list[Estimate], basis: Plan) -> None:
        sketch, rival = self._first_two(candidates)
        if sketch is not None and rival is not None and self.predictor.request.limit_s is None:
            self.predictor.progress(
                "finalists", 0, self._most, f"{short_label(sketch.plan)}, {short_label(rival.plan)}"
            )
            self.predictor.trace_ahead([sketch.plan, rival.plan, basis])
        for attempt in range(3 * self._most):
            if sketch is None:
                break
            candidates.remove(sketch)
            self.predictor.progress("finalists", attempt, self._most, short_label(sketch.plan))
            traced_estimate = self._trace(sketch)
            if traced_estimate is None:
                candidates = [e for e in candidates if _family(e.plan) != _family(sketch.plan)]
            else:
                self._learn(sketch, traced_estimate)
                candidates = [e for e in candidates if self._may_fit_device(e)]
            sketch = rival if rival in candidates else self._next(candidates)

    def _trace(self, sketch: Estimate) -> Estimate | None:
        """Return the plan's estimate by its whole trace, None if it cannot be traced. While no traced plan
        fits, the deadline ends no trace, and two may begin after it; then, and once one fits, TimeUp is
        raised after the deadline."""
        deadline = self.predictor.deadline
        if any(map(self.meets_limits, self.traced)):
            return self.predictor.trace_or_refuse(sketch)
        if deadline.left_s <= 0:
            if self._late == _LATE:
                deadline.check()
            self._late += 1
        with deadline.overtime():
            return self.predictor.trace_or_refuse(sketch)

    def close(self, estimates: Sequence[Estimate]) -> None:
        """Trace more plans of a model of at most 12 blocks: those of ``estimates`` that may fit and be better
        than the best traced plan, or less than 3 % worse, by the errors of the sketches seen so far
        (`BestCaseEstimates`); at most 24. Nothing is traced if no traced plan fits or after the deadline.

        Sketches that do not fit count, too: they may be too high.
        """
        if is_quick(self.predictor) and any(map(self.meets_limits, self.traced)):
            with contextlib.suppress(TimeUp):
                self._close(estimates)

    def _close(self, estimates: Sequence[Estimate]) -> None:
        predictor = self.predictor
        cap = predictor.request.cap
        tried = {e.plan for e in self.traced} | predictor.refused.keys()
        for attempt in range(_CLOSING):
            best_score = min(score(e, self.goal) for e in self.traced if self.meets_limits(e))
            best_cases = BestCaseEstimates(
                [s for s, _ in predictor.pairs], [t for _, t in predictor.pairs], cap, self.goal
            )
            candidates = [e for e in estimates if e.plan not in tried and within_bounds(predictor.bounds, e)]
            promising = most_promising(candidates, best_cases, best_score * (1 + TIE_RATIO))
            if not promising:
                return
            sketch = promising[0]
            tried.add(sketch.plan)
            predictor.progress("finalists", attempt, _CLOSING, short_label(sketch.plan))
            traced_estimate = predictor.trace_or_refuse(sketch)
            if traced_estimate is not None:
                self.traced.append(traced_estimate)

    def _climb(self) -> None:
        """Trace plans near the best traced plan of a small model, whose traces are quick.

        A plan is near if it differs from the best one along one axis of its grid. If one of them is better,
        those near this one follow, and so on; at most 16 plans in all. The selection of sketches may have
        left out such a plan because of an error of its sketch. Raises TimeUp if a trace would have to be made
        after the deadline.
        """
        traced_plans, neighbours = {e.plan for e in self.traced}, dict[Plan, list[Estimate]]()
        for attempt in range(_CLIMBED):
            best_traced = best([e for e in self.traced if self.meets_limits(e)], self.goal)
            if best_traced is None:
                return
            if best_traced.plan not in neighbours:
                neighbours[best_traced.plan] = self._neighbours(best_traced.plan)
            next_sketch = best(
                [e for e in neighbours[best_traced.plan] if e.plan not in traced_plans], self.goal
            )
            if next_sketch is None:
                return
            traced_plans.add(next_sketch.plan)
            self.predictor.progress("finalists", attempt, _CLIMBED, short_label(next_sketch.plan))
            traced_estimate = self.predictor.trace_or_refuse(next_sketch)
            if traced_estimate is not None:
                self.traced.append(traced_estimate)

    def _neighbours(self, plan: Plan) -> list[Estimate]:
        """Return the sketches of the fitting plans that differ from ``plan`` along one axis of its grid and
        whose score is at most 1.25 times that of the sketch of ``plan``. Empty if ``plan`` has no sketch.
        """
        sketch = self.predictor.sketch_of(plan)
        if sketch is None:
            return []
        limit = score(self.predictor.estimate(sketch), self.goal) * _MAY_BE_BETTER
        return [
            e
            for e in self.predictor.neighbours(sketch)
            if self.meets_limits(e) and score(e, self.goal) <= limit
        ]

    def hoped_score(self, e: Estimate) -> float:
        """Return the best (lowest) score that a whole trace of the plan may be hoped to have. ``e``: its
        sketch (estimate from traces of parts).

        It is the sketch's score, times the ratio of trace to sketch of the traced plan of the same kind with
        the nearest degrees, times 0.97 for each doubling between the degrees of the two plans. If no plan of
        the kind was traced, the ratio is an assumed one: 0.5 for the goal of least memory, else 0.85.
        """
        plan_kind, degrees = kind(e.plan)
        ratios_by_distance = [
            (doublings(kind(p)[1], degrees), r) for p, r in self._ratios.items() if kind(p)[0] == plan_kind
        ]
        nearest = min(reversed(ratios_by_distance), key=lambda entry: entry[0], default=(0.0, self._unknown))
        return float(score(e, self.goal) * nearest[1] * _NEAR ** nearest[0])

    def _first_two(self, candidates: Sequence[Estimate]) -> tuple[Estimate | None, Estimate | None]:
        """Return (the best sketch by the goal, the sketch of another kind or other degrees (see `kind`) that
        would be traced next if the trace of the best one gave the score of its sketch). The second is None if
        none would be traced then. Both are None if there are no candidates."""
        best_sketch = best(candidates, self.goal)
        if best_sketch is None:
            return None, None
        rival = self._closest([e for e in candidates if kind(e.plan) != kind(best_sketch.plan)])
        is_worth_tracing = rival is not None and self.hoped_score(rival) * self._equal < score(
            best_sketch, self.goal
        )
        return best_sketch, rival if is_worth_tracing else None

    def _next(self, candidates: Sequence[Estimate]) -> Estimate | None:
        fitting = [e for e in self.traced if self.meets_limits(e)]
        best_traced = best(fitting, self.goal)
        if best_traced is None and not self.traced:
            return best(candidates, self.goal)
        sketch = self._closest(candidates)
        if sketch is None or len(fitting) >= self._most:
            return None
        is_beaten = (
            best_traced is not None
            and score(best_traced, self.goal) <= self.hoped_score(sketch) * self._equal
        )
        return None if is_beaten else sketch

    def _closest(self, candidates: Sequence[Estimate]) -> Estimate | None:
        """Return, of the sketches with the lowest `hoped_score`, the one with the mildest and simplest plan
        (lowest effect class, then fewest techniques); None if there are no candidates. For a model of at
        least 13 blocks, scores up to 3 % above the lowest count as equal to it."""
        hoped_scores = [self.hoped_score(e) for e in candidates]
        contenders = [
            (e, h)
            for e, h in zip(candidates, hoped_scores, strict=True)
            if h <= min(hoped_scores) * self._equal
        ]

        def preference(contender: tuple[Estimate, float]) -> tuple[Any, ...]:
            e, h = contender
            return (
                effect_then_size_key(e.plan, e.dependence),
                _unusual(e.plan),
                self.predictor.needs(e),
                h,
                e.plan.fingerprint,
            )

        return min(contenders, key=preference, default=(None, 0.0))[0]

    def _may_fit_device(self, e: Estimate) -> bool:
        return (
            self.predictor.request.cap.host(e)
            and self.predictor.needs(e) * self._heaviest <= self.predictor.request.cap.bytes
        )

    def _learn(self, sketch: Estimate, traced_estimate: Estimate) -> None:
        self.traced.append(traced_estimate)
        self._ratios[sketch.plan] = score(traced_estimate, self.goal) / score(sketch, self.goal)
        if self.predictor.needs(traced_estimate) > self.predictor.request.cap.bytes:
            self._heaviest = max(
                self._heaviest, self.predictor.needs(traced_estimate) / self.predictor.needs(sketch)
            )

    def _smallest(self, estimates: Sequence[Estimate]) -> None:
        ordered = sorted(
            estimates, key=lambda e: (e.allocated_bytes.value, effect_then_size_key(e.plan, e.dependence))
        )
        traced_estimates = (self.predictor.trace_or_refuse(e) for e in ordered[:_FINALISTS])
        self.traced += list(itertools.islice(filter(None, traced_estimates), 1))


def _unusual(plan: Plan) -> int:
    """Return how many settings of the plan's techniques differ from their defaults, not counting those of
    techniques that divide the model.
    """
    defaults = {(u.technique, k.name): k.default for u in plan.uses for k in technique(u.technique).knobs}
    return sum(
        defaults[u.technique, k] != v
        for u in plan.uses
        if u.technique not in DIVIDING_TECHNIQUES
        for k, v in u.knobs
    )


def _family(plan: Plan) -> tuple[object, ...]:
    """Return the names of the plan's techniques, and its data-parallel technique with settings. If a plan
    cannot be traced, other plans with an equal result are expected to fail, too.
    """
    data = [u for u in plan.uses if technique(u.technique).slot == "data-parallel"]
    return tuple(u.technique for u in plan.uses), tuple(data)
