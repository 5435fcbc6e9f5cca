"""Choose which sketches are traced whole: trace finalists until none of the rest could be better."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from memfit.planner.parallelism_grid import CUTTING
from memfit.planner.plan_kinds import doublings, kind
from memfit.planner.plan_space import complexity
from memfit.planner.selection import TIE_RATIO, Objective, best, score
from memfit.techniques.registry import brief, technique
from memfit.types.plan import Plan
from memfit.types.result import Estimate

if TYPE_CHECKING:
    from memfit.planner.device_pricing import Scale

# more finalists for small models, whose traces are quick
_FINALISTS, _MOST_FINALISTS, _TRACED_BLOCKS = 3, 12, 48
_TOO_SLOW = 0.85  # sketches of plans of up to 8 ranks were up to 25 % off, most of them less than this
# the same for memory: in short pipelines, what is gathered at the ends is half of all memory
_TOO_LARGE = 0.5
# most traces near the best plan of a small model; highest score of a sketch over the best one's to be tried
_CLIMBED, _MAY_BE_BETTER = 16, 1.25
_NEAR = 0.97  # factor by which ratios of trace to sketch differed per doubling of a degree

Fits = Callable[[Estimate], bool]


class Race:
    """Traces finalists one by one.

    The remaining sketches are assumed to be as far from their trace as the last traced plan of their kind,
    roughly as far as the nearest plan with other degrees, or faster by as much as a sketch may be too slow.
    They are assumed to need more memory by the factor of the heaviest plan that did not fit. A large model is
    not traced again for a gain that counts as equal.
    """

    def __init__(self, scale: Scale, fits: Fits, goal: Objective | None = None) -> None:
        self.scale, self.fits, self.goal = scale, fits, goal or scale.aim.goal
        self.traced: list[Estimate] = []
        self._ratios: dict[Plan, float] = {}  # score of the whole trace over that of the sketch
        self._unknown = _TOO_LARGE if self.goal is Objective.SMALLEST else _TOO_SLOW
        self._heaviest = 1.0
        self._most = max(_FINALISTS, min(_MOST_FINALISTS, _TRACED_BLOCKS // scale.traced.blocks))
        self._equal = 1 + TIE_RATIO * (self._most == _FINALISTS)

    def run(self, estimates: Sequence[Estimate], basis: Plan) -> list[Estimate]:
        """Return all estimates that were traced.

        ``basis`` is always traced, in parallel with the first two finalists.
        """
        waiting = [e for e in estimates if self.fits(e)]
        sketch, rival = self._two(waiting)
        if sketch is not None and rival is not None:
            self.scale.tell("finalists", 0, self._most, f"{brief(sketch.plan)}, {brief(rival.plan)}")
            self.scale.ahead([sketch.plan, rival.plan, basis])
        for tries in range(3 * self._most):
            if sketch is None:
                break
            waiting.remove(sketch)
            self.scale.tell("finalists", tries, self._most, brief(sketch.plan))
            whole = self.scale.traced_or_refused(sketch)
            if whole is None:
                waiting = [e for e in waiting if _family(e.plan) != _family(sketch.plan)]
            else:
                self._learn(sketch, whole)
                waiting = [e for e in waiting if self._light(e)]
            sketch = rival if rival in waiting else self._next(waiting)
        if not any(map(self.fits, self.traced)):
            self._smallest(estimates)
        elif self._most > _FINALISTS:
            self._climb()
        return self.traced

    def _climb(self) -> None:
        """Improve on the best traced plan of a small model, whose traces are quick.

        Plans that differ from the best one in one thing are traced, and so on from any better plan. Sketches
        may have excluded such a plan by less than their error.
        """
        tried, near = {e.plan for e in self.traced}, dict[Plan, list[Estimate]]()
        for done in range(_CLIMBED):
            top = best([e for e in self.traced if self.fits(e)], self.goal)
            if top is None:
                return
            if top.plan not in near:
                near[top.plan] = self._beside(top.plan)
            following = best([e for e in near[top.plan] if e.plan not in tried], self.goal)
            if following is None:
                return
            tried.add(following.plan)
            self.scale.tell("finalists", done, _CLIMBED, brief(following.plan))
            whole = self.scale.traced_or_refused(following)
            if whole is not None:
                self.traced.append(whole)

    def _beside(self, plan: Plan) -> list[Estimate]:
        """Return the fitting plans that differ from ``plan`` in one thing and by their sketch may be
        better.
        """
        sketch = self.scale.sketch_of(plan)
        if sketch is None:
            return []
        limit = score(self.scale.estimate(sketch), self.goal) * _MAY_BE_BETTER
        return [e for e in self.scale.beside(sketch) if self.fits(e) and score(e, self.goal) <= limit]

    def hoped(self, e: Estimate) -> float:
        """Return the best score that a trace of this plan may have."""
        alike, degrees = kind(e.plan)
        known = [(doublings(kind(p)[1], degrees), r) for p, r in self._ratios.items() if kind(p)[0] == alike]
        nearest = min(reversed(known), key=lambda one: one[0], default=(0.0, self._unknown))
        return float(score(e, self.goal) * nearest[1] * _NEAR ** nearest[0])

    def _two(self, waiting: Sequence[Estimate]) -> tuple[Estimate | None, Estimate | None]:
        """Return the best plan, and the plan of another kind that would come next if sketches are right, or
        None.
        """
        first = best(waiting, self.goal)
        if first is None:
            return None, None
        rival = self._closest([e for e in waiting if kind(e.plan) != kind(first.plan)])
        worth = rival is not None and self.hoped(rival) * self._equal < score(first, self.goal)
        return first, rival if worth else None

    def _next(self, waiting: Sequence[Estimate]) -> Estimate | None:
        fitting = [e for e in self.traced if self.fits(e)]
        top = best(fitting, self.goal)
        if top is None and not self.traced:
            return best(waiting, self.goal)
        sketch = self._closest(waiting)
        if sketch is None or len(fitting) >= self._most:
            return None
        beaten = top is not None and score(top, self.goal) <= self.hoped(sketch) * self._equal
        return None if beaten else sketch

    def _closest(self, waiting: Sequence[Estimate]) -> Estimate | None:
        """Return the mildest and simplest of the plans that may be as good as any."""
        hoped = [self.hoped(e) for e in waiting]
        near = [(e, h) for e, h in zip(waiting, hoped, strict=True) if h <= min(hoped) * self._equal]

        def preferred(found: tuple[Estimate, float]) -> tuple[Any, ...]:
            e, h = found
            return (
                complexity(e.plan, e.dependence),
                _unusual(e.plan),
                self.scale.needs(e),
                h,
                e.plan.fingerprint,
            )

        return min(near, key=preferred, default=(None, 0.0))[0]

    def _light(self, e: Estimate) -> bool:
        return self.scale.aim.host(e) and self.scale.needs(e) * self._heaviest <= self.scale.aim.cap_bytes

    def _learn(self, sketch: Estimate, whole: Estimate) -> None:
        self.traced.append(whole)
        self._ratios[sketch.plan] = score(whole, self.goal) / score(sketch, self.goal)
        if self.scale.needs(whole) > self.scale.aim.cap_bytes:
            self._heaviest = max(self._heaviest, self.scale.needs(whole) / self.scale.needs(sketch))

    def _smallest(self, estimates: Sequence[Estimate]) -> None:
        ordered = sorted(estimates, key=lambda e: (e.allocated_bytes.value, complexity(e.plan, e.dependence)))
        found = (self.scale.traced_or_refused(e) for e in ordered[:_FINALISTS])
        self.traced += list(itertools.islice(filter(None, found), 1))


def _unusual(plan: Plan) -> int:
    """Return how many settings differ from the technique's default, not counting degrees."""
    usual = {(u.technique, k.name): k.default for u in plan.uses for k in technique(u.technique).knobs}
    return sum(
        usual[u.technique, k] != v for u in plan.uses if u.technique not in CUTTING for k, v in u.knobs
    )


def _family(plan: Plan) -> tuple[object, ...]:
    """Return what plans that fail together have in common: the techniques and the data-parallel settings."""
    data = [u for u in plan.uses if technique(u.technique).slot == "data-parallel"]
    return tuple(u.technique for u in plan.uses), tuple(data)
