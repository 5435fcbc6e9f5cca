"""Trials: plans whose predicted times lie within the error of the best are trained for a few steps on this
machine, under the cap, before one of them is recommended.

Rounds are interleaved, so that all plans see the same noise. A plan counts by its fastest round, because
other work on the machine only ever adds time. The measurements correct the predicted times of the other plans
(cost/step_time_calibration.py). The simplest of the plans that are as fast as the fastest is recommended.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence

from memfit.cost.estimate import around
from memfit.cost.step_time_calibration import corrected, factor
from memfit.engines.registry import engine, render
from memfit.planner.plan_space import plans, usable
from memfit.planner.selection import Band, Objective, Prices, best, reasons_for, score, simplest_first
from memfit.planner.single_device import Planning, Progress, model_sizes, needed_bytes
from memfit.runtime import local_machine
from memfit.runtime.child_process import run
from memfit.runtime.ranks import run_ranks
from memfit.techniques.registry import effect_of, make_use, without
from memfit.types.errors import UserError
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan, Use
from memfit.types.result import Choice, Estimate, Measurement, OutcomeKind, Trial

# proportional to each other on one machine
BY_TIME = (Objective.FASTEST, Objective.CHEAPEST, Objective.GREENEST)
FIRST, NEIGHBOURS, LAST = 14, 6, 4  # most plans of the first round, of each next one, and of the final rounds
CLIMBS = 2  # rounds of plans one change away from the fastest
_ROUNDS, _MORE_ROUNDS = 2, 2  # final rounds, and as many more while rounds of one plan differ too much
_SCREENING, _FINAL = (3, 1), (5, 2)  # steps of a run, and how many of them warm up
_WITHIN = 1.6  # times the best predicted step: two predictions with +-25 % error may differ that much
_LAST_WITHIN = 1.12  # times the fastest round
_MEASURED = Band(0.015, 0.035)  # spread between rounds of one plan on an otherwise idle machine
_CLEAR = 0.045  # a band up to this decides; a wider one asks for more rounds
_ACCUMULATION, _CHECKPOINTING = "gradient-accumulation", "activation-checkpointing"


def measured(planning: Planning, progress: Progress, *, budget_s: float) -> Planning:
    """Return `planning` with the recommendation revised by measuring its rivals.

    No run starts after ``budget_s`` seconds, except the first two. Raises UserError for a goal that does not
    depend on time.
    """
    if planning.request.goal not in BY_TIME:
        raise UserError(
            f"measuring for the goal {planning.request.goal.value}",
            allowed=", ".join(BY_TIME),
            hint="memory is predicted exactly",
        )
    found = _Trials(planning, progress, budget_s)
    found.turn(_shortlist(planning), _SCREENING)
    for _ in range(CLIMBS):
        quickest = found.quickest(2)
        tried = [*found.times, *found.failed]
        found.turn(_neighbours(planning, quickest, tried, found.known()), _SCREENING)
        if found.quickest(1) == quickest[:1]:
            break
    for done in range(_ROUNDS + _MORE_ROUNDS):
        if done < _ROUNDS or measured_band(list(found.times.values())).high > _CLEAR:
            found.turn(found.close(LAST), _FINAL)
    return found.concluded()


class _Trials:
    """The runs so far."""

    def __init__(self, planning: Planning, progress: Progress, budget_s: float) -> None:
        self.planning, self.progress = planning, progress
        self.ends_s = time.monotonic() + budget_s
        self.predicted: dict[Plan, float | None] = {}
        self.times: dict[Plan, list[float]] = {}
        self.peaks: dict[Plan, int | None] = {}
        self.failed: dict[Plan, str] = {}

    def turn(self, chosen: Sequence[Plan], steps: tuple[int, int]) -> None:
        """Run one more round of these plans, in order: ``steps`` each, of which the second number warm up."""
        for done, plan in enumerate(chosen):
            self.progress("trial", done, len(chosen), plan.label)
            if time.monotonic() < self.ends_s or len(self.times) < 2:
                self._run(plan, *steps)

    def _run(self, plan: Plan, steps: int, warm_up: int) -> None:
        step_s = self.planning.pricer.whole(plan).step_s
        self.predicted.setdefault(plan, step_s.value if step_s else None)
        seen = few_steps(self.planning, plan, steps, expected_s=step_s.value if step_s else 1.0)
        if seen.outcome is OutcomeKind.OK and seen.step_s:
            self.times.setdefault(plan, []).append(_step_s(seen, warm_up))
            self.peaks[plan] = max(seen.peak_bytes or 0, self.peaks.get(plan) or 0) or None
        elif plan not in self.times:
            self.failed[plan] = seen.reason or seen.outcome.value

    def ordered(self) -> list[Plan]:
        """Return the plans that ran, the fastest first."""
        return sorted(self.times, key=lambda p: (min(self.times[p]), p.fingerprint))

    def quickest(self, count: int) -> list[Plan]:
        """Return the fastest plans of ``count`` different sets of techniques."""
        sets = {_techniques(p): p for p in reversed(self.ordered())}
        return sorted(sets.values(), key=self.ordered().index)[:count]

    def close(self, count: int) -> list[Plan]:
        """Return the fastest plans, as far as another round could change their order."""
        limit = min(map(min, self.times.values()), default=0.0) * _LAST_WITHIN
        return [p for p in self.ordered() if min(self.times[p]) <= limit][:count]

    def known(self) -> list[tuple[Plan, float]]:
        """Return (plan, measured time over the time predicted without correction by runs)."""
        calibration = self.planning.pricer.calibration
        pairs = [(plan, min(times), self.predicted[plan]) for plan, times in self.times.items()]
        return [(plan, s * factor(calibration, plan) / guess) for plan, s, guess in pairs if guess]

    def concluded(self) -> Planning:
        planning, pricer = self.planning, self.planning.pricer
        trials = tuple(
            Trial(
                plan=plan,
                predicted_s=self.predicted[plan],
                step_s=tuple(self.times.get(plan, ())),
                peak_bytes=self.peaks.get(plan),
                reason=self.failed.get(plan, ""),
            )
            for plan in self.predicted
        )
        result = planning.result
        if not self.times:
            return dataclasses.replace(planning, result=dataclasses.replace(result, trials=trials))
        pricer.recalibrate(corrected(pricer.calibration, self.known(), source=""))
        priced = {plan: pricer.whole(plan) for plan in self.times}
        fastest = best(
            (_with_time(priced[p], min(t)) for p, t in self.times.items()),
            Objective.FASTEST,
            measured_band(list(self.times.values())),
        )
        assert fastest is not None
        winner = priced[fastest.plan]
        why = reasons_for(
            winner,
            [*priced.values(), *(pricer.whole(e.plan) for e in planning.estimates)],
            planning.fits,
            planning.request.goal,
            Prices(
                pricer.whole,
                sketches=planning.sketches,
                needs=lambda e: needed_bytes(e, planning.request.machine),
            ),
            planning.cap_bytes,
        )
        chosen = Choice(
            estimate=winner,
            fits=True,
            effect=effect_of(winner.plan, winner.dependence),
            reasons=(*why, *planning.left_out),
        )
        again = {c.estimate.plan: self._priced_again(c) for c in (*result.frontier, result.baseline)}
        again[winner.plan] = chosen
        result = dataclasses.replace(
            result,
            recommended=chosen,
            baseline=again[result.baseline.estimate.plan],
            trials=trials,
            smallest=self._priced_again(result.smallest),
            frontier=tuple(sorted(again.values(), key=lambda c: c.estimate.allocated_bytes.value)),
        )
        return dataclasses.replace(planning, result=result)

    def _priced_again(self, choice: Choice) -> Choice:
        estimate = choice.estimate
        found = self.planning.pricer.whole(estimate.plan) if estimate.traced else estimate
        return dataclasses.replace(choice, estimate=found)


def measured_band(rounds: Sequence[Sequence[float]]) -> Band:
    """Return how close the fastest rounds of two plans must be to count as equal.

    It is the spread between rounds of one plan on a quiet machine, plus what the two fastest ``rounds`` of a
    plan differ by here.
    """
    quickest = [sorted(times)[:2] for times in rounds if len(times) > 1]
    here_ratio = statistics.median(more / least - 1 for least, more in quickest) if quickest else 0.0
    return Band(_MEASURED.low + here_ratio, _MEASURED.high + 2 * here_ratio)


def _with_time(estimate: Estimate, seconds: float) -> Estimate:
    return dataclasses.replace(estimate, step_s=around(seconds, 0.0))


def few_steps(
    planning: Planning, plan: Plan, steps: int, *, expected_s: float, capped: bool = True
) -> Measurement:
    """Run a few steps of ``plan`` in child processes, under the cap of the search.

    For several ranks, returns the measurement of a failed rank, or else of the rank with the highest peak.
    """
    request, job = planning.request, planning.job
    name = "native" if engine(request.engine).supports(plan) else request.engine
    spec = RunSpec(
        name=plan.label,
        role="trial",
        job=request.job,
        plan=plan,
        engine=name,
        seed=0,
        steps=steps,
        batch_size=job.batch_size,
        sizes=model_sizes(name, job),
        evaluate=False,
        cap_bytes=planning.cap_bytes if capped else None,
        timeout_s=120.0 + 10 * steps * expected_s,
        threads=request.threads or max(1, local_machine.threads() // request.ranks),
    )
    if plan.ranks == 1:
        return run(render(spec), on_event=lambda event: None)
    every = run_ranks(render(spec))
    bad = [m for m in every if m.outcome is not OutcomeKind.OK]
    return bad[0] if bad else max(every, key=lambda m: m.peak_bytes or 0)


def _step_s(seen: Measurement, warm_up: int) -> float:
    """Return the median step time after the warm-up steps (of two steps, the faster)."""
    return statistics.median_low(seen.step_s[warm_up:] or seen.step_s)


# -- which plans ----------------------------------------------------------------------------------


def _techniques(plan: Plan) -> frozenset[str]:
    return frozenset(u.technique for u in plan.uses)


def _shortlist(planning: Planning) -> list[Plan]:
    """Return the plans of the first round.

    These are the recommended plan; of each set of techniques, if prediction error may hide that it is the
    fastest of all, the plan predicted fastest and the one with the fewest micro-batches, small sets first;
    and the simplest plans that fit, however slow they are predicted to be.
    """
    goal, recommended = planning.request.goal, planning.result.recommended
    assert recommended is not None, "search raises NothingFits otherwise"
    chosen = recommended.estimate
    traced = {e.plan: e for e in planning.estimates}
    pool = [e for e in ({e.plan: e for e in planning.sketches} | traced).values() if planning.fits(e)]
    limit = min((score(e, goal) for e in pool), default=score(chosen, goal)) * _WITHIN
    near = sorted((e for e in pool if score(e, goal) <= limit), key=lambda e: (score(e, goal), e.plan.label))
    sets: dict[frozenset[str], list[Estimate]] = {}
    for e in near:
        sets.setdefault(_techniques(e.plan), []).append(e)
    leaders = [members[0] for members in sets.values()]
    fewest = [min(members, key=_micro_batches) for members in sets.values()]
    fewest.sort(key=lambda e: len(e.plan.uses))
    simple = simplest_first(pool, goal)[:2]
    wanted = [chosen, *leaders[:3], *simple, *fewest[: FIRST // 2], *leaders[3:], *fewest[FIRST // 2 :]]
    return list(_that_fit(planning, [e.plan for e in wanted], FIRST))


def _micro_batches(e: Estimate) -> int:
    used = e.plan.get(_ACCUMULATION)
    return int(used.settings["micro_batches"]) if used else 1


def _neighbours(
    planning: Planning, fastest: Sequence[Plan], tried: Iterable[Plan], known: Sequence[tuple[Plan, float]]
) -> list[Plan]:
    """Return untried plans one change away from the ``fastest``, by their times as corrected by the trials.

    A change removes a technique, changes its setting, or adds one.
    """
    calibration = corrected(planning.pricer.calibration, known, source="")
    goal, seen = planning.request.goal, set(tried)
    changed = (other for plan in fastest for other in one_change_away(planning, plan))
    wanted = [p for p in dict.fromkeys(changed) if p not in seen]

    def expected(e: Estimate) -> float:
        return score(e, goal) * factor(calibration, e.plan) / factor(planning.pricer.calibration, e.plan)

    planning.pricer.prepare(wanted)
    sketches = sorted(map(planning.pricer.sketch, wanted), key=lambda e: (expected(e), e.plan.label))
    return list(_that_fit(planning, [e.plan for e in sketches[: 3 * NEIGHBOURS]], NEIGHBOURS))


def one_change_away(planning: Planning, plan: Plan) -> Iterator[Plan]:
    """Yield the allowed plans that differ from ``plan`` in one technique or its settings."""
    request, space = planning.request, planning.pricer.space
    allowed = [t for t in usable(space, request.accuracy)[0] if t.name not in request.bounds.without]
    every = {frozenset(p.uses): p for p in plans(space, allowed)}
    options: list[Use] = [make_use(t.name, s) for t in allowed for s in t.settings(space)]
    changed = [*(without(plan, u.technique) for u in plan.uses), *map(plan.with_use, options)]
    refuses = engine(request.engine).supports
    for other in changed:
        known = every.get(frozenset(other.uses))
        if known is not None and known != plan and not refuses(known):
            yield known


def _that_fit(planning: Planning, wanted: Sequence[Plan], count: int) -> Iterator[Plan]:
    """Yield the first ``count`` distinct plans that fit when they are traced whole."""
    distinct = list(dict.fromkeys(wanted))
    if planning.request.ranks == 1:
        planning.pricer.trace_all(distinct[: count + 2])
    for plan in distinct:
        if count and planning.fits(planning.pricer.whole(plan)):
            count -= 1
            yield planning.pricer.settled(plan)
