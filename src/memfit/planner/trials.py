"""Trials: plans whose predicted times lie within the error of the best are trained for a few steps on this
machine, under the cap, before one of them is recommended.

Plans take turns in rounds. What slows all plans of a round alike, such as other work on the machine, is
divided out (`comparable_times`), and a plan counts by the median of its rounds. The measurements correct the
predicted times of the other plans (cost/step_time_calibration.py). The simplest of the plans that are as fast
as the fastest is recommended.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from memfit.cost.estimate import interval_around
from memfit.cost.step_time_calibration import correct_calibration, factor
from memfit.engines.registry import engine, render
from memfit.planner.capacity import memory_cap
from memfit.planner.plan_space import plans, usable
from memfit.planner.reasons import ReasonInputs, reasons_for
from memfit.planner.request import Planning, Progress, model_sizes
from memfit.planner.selection import EqualityBand, Objective, best, score, simplest_first
from memfit.planner.sketch_errors import may_fit_under
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
# Most plans of the first round, of the second, of each round of neighbours, and of the final rounds.
FIRST, SECOND, NEIGHBOURS, LAST = 14, 8, 6, 5
CLIMBS = 2  # rounds of plans one change away from the fastest
_ROUNDS, _MORE_ROUNDS = 2, 2  # final rounds, and as many more while rounds of one plan differ too much
_SCREENING, _FINAL = (3, 1), (5, 2)  # steps of a run, and how many of them warm up
_WITHIN = 1.6  # times the best predicted step: two predictions with +-25 % error may differ that much
_SECOND_WITHIN = 1.6  # times the fastest: a single round of a plan may be that much too slow
_LAST_WITHIN = 1.18  # times the fastest: two rounds of a plan may be that much too slow by other work
_MEASURED = EqualityBand(0.015, 0.035)  # spread between rounds of one plan on an otherwise idle machine
_POLISHING_ROUNDS = 20
_CLEAR = 0.045  # a band up to this decides; a wider one asks for more rounds


def choose_by_trials(planning: Planning, progress: Progress, *, measure_s: float) -> Planning:
    """Train the recommended plan, and plans that may be faster, for a few steps each under the cap. Return
    ``planning`` with the trials in its result, with predicted times corrected by the measured ones, and with
    the simplest of the plans that count as fast as the fastest as its recommendation.

    No run starts after ``measure_s`` seconds, unless fewer than two plans ran successfully. If every run
    failed, only the trials are added. Raises UserError for a goal that is not calculated from step time
    ("smallest", "fewest").
    """
    if planning.request.goal not in BY_TIME:
        goal = planning.request.goal.value
        raise UserError(
            f"the goal {goal} is not calculated from step time, so that measured step times cannot decide",
            allowed=f"the goals {', '.join(BY_TIME)}",
            hint="for other goals, search without measuring: predictions then decide",
        )
    trials = _Trials(planning, progress, measure_s)
    trials.run_round(_shortlist(planning), _SCREENING)
    trials.run_round(trials.contenders(SECOND, _SECOND_WITHIN), _SCREENING)
    for _ in range(CLIMBS):
        fastest = trials.fastest(2)
        tried = [*trials.times, *trials.failed]
        neighbours = _neighbours(planning, fastest, tried, trials.measured_ratios())
        if neighbours:  # the fastest runs with them, so that this round can be compared with the others
            trials.run_round([*fastest[:1], *neighbours], _SCREENING)
        if trials.fastest(1) == fastest[:1]:
            break
    for done in range(_ROUNDS + _MORE_ROUNDS):
        if done < _ROUNDS or trials.band().high > _CLEAR:
            trials.run_round(trials.contenders(LAST, _LAST_WITHIN), _FINAL)
    return trials.conclude()


class _Trials:
    """The runs so far. For each plan that was run: its predicted seconds of a step (``predicted``); if a run
    succeeded, measured step times (``times``), in which round each of these was measured (``rounds``), and
    highest peak (``peaks``); else a text that says why its run failed (``failed``).
    """

    def __init__(self, planning: Planning, progress: Progress, measure_s: float) -> None:
        self.planning, self.progress = planning, progress
        self.ends_s = time.monotonic() + measure_s
        self.predicted: dict[Plan, float | None] = {}
        self.times: dict[Plan, list[float]] = {}
        self.rounds: dict[Plan, list[int]] = {}
        self._round = 0
        self.peaks: dict[Plan, int | None] = {}
        self.failed: dict[Plan, str] = {}

    def run_round(self, plans: Sequence[Plan], steps: tuple[int, int]) -> None:
        """Run each plan once, in this order. ``steps``: (steps of a run, how many of them are only to warm
        up). When the time of the trials is over, no run starts unless fewer than two plans ran successfully.
        """
        self._round += 1
        for done, plan in enumerate(plans):
            self.progress("trial", done, len(plans), plan.label)
            if time.monotonic() < self.ends_s or len(self.times) < 2:
                self._run(plan, *steps)

    def _run(self, plan: Plan, steps: int, warm_up: int) -> None:
        step_s = self.planning.predictor.whole(plan).step_s
        self.predicted.setdefault(plan, step_s.value if step_s else None)
        measurement = few_steps(self.planning, plan, steps, expected_s=step_s.value if step_s else 1.0)
        if measurement.outcome is OutcomeKind.OK and measurement.step_s:
            self.times.setdefault(plan, []).append(_step_s(measurement, warm_up))
            self.rounds.setdefault(plan, []).append(self._round)
            self.peaks[plan] = max(measurement.peak_bytes or 0, self.peaks.get(plan) or 0) or None
        elif plan not in self.times:
            self.failed[plan] = measurement.reason or measurement.outcome.value

    def step_s(self) -> dict[Plan, float]:
        """Return the step time, in seconds, of each plan that ran successfully: the median of its times after
        `comparable_times` (of an even number of times, the lower of the middle two)."""
        comparable = comparable_times(self.times, self.rounds)
        return {plan: statistics.median_low(times) for plan, times in comparable.items()}

    def band(self) -> EqualityBand:
        return measured_band(list(comparable_times(self.times, self.rounds).values()))

    def ordered(self) -> list[Plan]:
        """Return the plans that ran successfully, the fastest first."""
        step_s = self.step_s()
        return sorted(step_s, key=lambda p: (step_s[p], p.fingerprint))

    def fastest(self, count: int) -> list[Plan]:
        """Return the fastest plan of each of the ``count`` fastest sets of techniques, the fastest first.
        Plans with the same techniques in other settings are of the same set.
        """
        sets = {p.techniques: p for p in reversed(self.ordered())}
        return sorted(sets.values(), key=self.ordered().index)[:count]

    def contenders(self, count: int, within: float) -> list[Plan]:
        """Return the plans that should run again: those whose step takes at most ``within`` times as long as
        that of the fastest plan, the fastest first, but no more than ``count``.

        A single run may have been slowed by other work on the machine. A plan that ran once therefore counts
        as the faster of its measured and its expected time: its predicted time multiplied by the median ratio
        of measured over predicted times.
        """
        step_s = self.step_s()
        limit = min(step_s.values(), default=0.0) * within
        ratios = [step_s[p] / predicted for p in step_s if (predicted := self.predicted[p])]
        for plan, predicted_s in self.predicted.items():
            if predicted_s and len(self.times.get(plan, ())) == 1:
                step_s[plan] = min(step_s[plan], predicted_s * statistics.median(ratios))
        again = [p for p in step_s if step_s[p] <= limit]
        return sorted(again, key=lambda p: (step_s[p], p.fingerprint))[:count]

    def measured_ratios(self) -> list[tuple[Plan, float]]:
        """Return (plan, measured over predicted step time) for each plan that ran successfully and has a
        predicted time. The predicted time is that without the corrections by earlier runs.
        """
        calibration = self.planning.predictor.calibration
        pairs = [(plan, step_s, self.predicted[plan]) for plan, step_s in self.step_s().items()]
        return [
            (plan, measured_s * factor(calibration, plan) / predicted_s)
            for plan, measured_s, predicted_s in pairs
            if predicted_s
        ]

    def conclude(self) -> Planning:
        """Return the planning with the trials in its result. Unless every run failed, predicted times are
        corrected by the measured ones, and the recommended plan is the simplest of those whose measured step
        times count as equal to the fastest.
        """
        planning, predictor = self.planning, self.planning.predictor
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
        predictor.recalibrate(correct_calibration(predictor.calibration, self.measured_ratios(), source=""))
        estimates = {plan: predictor.whole(plan) for plan in self.times}
        fastest = best(
            (
                dataclasses.replace(estimates[p], step_s=interval_around(step_s, 0.0))
                for p, step_s in self.step_s().items()
            ),
            Objective.FASTEST,
            self.band(),
        )
        assert fastest is not None
        winner = estimates[fastest.plan]
        request = planning.request
        cap = memory_cap(planning.cap_bytes, request.machine, request.engine)
        reasons = reasons_for(
            winner,
            [*estimates.values(), *(predictor.whole(e.plan) for e in planning.estimates)],
            planning.meets_limits,
            request.goal,
            ReasonInputs(
                predictor.whole,
                sketches=planning.sketches,
                needs=cap.needs,
                may_fit_by_traces=lambda traced: may_fit_under(
                    cap, request.bounds, planning.sketches, traced
                ),
            ),
            planning.cap_bytes,
        )
        recommended = Choice(
            estimate=winner,
            fits=True,
            effect=effect_of(winner.plan, winner.dependence),
            reasons=(*reasons, *planning.left_out),
        )
        choices = {c.estimate.plan: self._estimate_again(c) for c in (*result.frontier, result.baseline)}
        choices[winner.plan] = recommended
        result = dataclasses.replace(
            result,
            recommended=recommended,
            baseline=choices[result.baseline.estimate.plan],
            trials=trials,
            smallest=self._estimate_again(result.smallest),
            frontier=tuple(sorted(choices.values(), key=lambda c: c.estimate.allocated_bytes.value)),
        )
        return dataclasses.replace(planning, result=result)

    def _estimate_again(self, choice: Choice) -> Choice:
        estimate = choice.estimate
        again = self.planning.predictor.whole(estimate.plan) if estimate.traced else estimate
        return dataclasses.replace(choice, estimate=again)


def comparable_times(
    times: Mapping[Plan, Sequence[float]], rounds: Mapping[Plan, Sequence[int]]
) -> dict[Plan, list[float]]:
    """Return, for each plan, its step times as they would be if every round were as fast as the fastest one.

    ``rounds``: for each plan, in which round each of its ``times`` was measured. The logarithm of a time is
    modelled as the sum of the plan's and the round's level, which are fitted by medians in turn (median
    polish; Tukey, Exploratory Data Analysis, 1977). What the level of a round is above the lowest one is
    subtracted. Rounds without a common plan count as equally fast.
    """
    logs = {
        plan: [(r, math.log(t)) for r, t in zip(rounds[plan], times[plan], strict=True)] for plan in times
    }
    levels = dict.fromkeys((r for plan_rounds in rounds.values() for r in plan_rounds), 0.0)
    for _ in range(_POLISHING_ROUNDS):
        residuals: dict[int, list[float]] = {r: [] for r in levels}
        for measured in logs.values():
            plan_level = statistics.median(value - levels[r] for r, value in measured)
            for r, value in measured:
                residuals[r].append(value - plan_level)
        levels = {r: statistics.median(values) for r, values in residuals.items()}
    fastest = min(levels.values(), default=0.0)
    return {plan: [math.exp(v - levels[r] + fastest) for r, v in measured] for plan, measured in logs.items()}


def measured_band(rounds: Sequence[Sequence[float]]) -> EqualityBand:
    """Return how close the measured step times of two plans must be to count as equal.

    ``rounds``: for each plan, its comparable step times. The band is 1.5 % to 3.5 %, the spread between
    rounds of one plan on an otherwise idle machine, widened at the low end by the ratio by which the two
    fastest rounds of a plan differ here, and at the high end by twice this ratio. The ratio is the median
    over the plans with at least two rounds; 0 if there are none.
    """
    pairs = [sorted(times)[:2] for times in rounds if len(times) > 1]
    spread_ratio = statistics.median(second / first - 1 for first, second in pairs) if pairs else 0.0
    return EqualityBand(_MEASURED.low + spread_ratio, _MEASURED.high + 2 * spread_ratio)


def few_steps(planning: Planning, plan: Plan, steps: int, *, expected_s: float) -> Measurement:
    """Run ``steps`` optimizer steps of ``plan`` in child processes, one per rank, without evaluation, and
    return the measurement.

    ``expected_s``: predicted seconds of a step. A run is stopped after 120 s plus ten times the predicted
    time of its steps. Memory is limited to the cap of the search. The plan runs on the request's engine, or
    on native, memfit's own engine, if that does not support it. For several ranks, the measurement is that of
    the first failed rank, or, if none failed, of the rank with the highest peak. A run that fails is not an
    error; UserError is raised only if Megatron-LM, as the engine, cannot build the job's model.
    """
    request, job = planning.request, planning.job
    name = "native" if engine(request.engine).refusals(plan) else request.engine
    spec = RunSpec(
        name=plan.label,
        role="trial",
        job=request.job_ref,
        plan=plan,
        engine=name,
        seed=0,
        steps=steps,
        batch_size=job.batch_size,
        sizes=model_sizes(name, job),
        evaluate=False,
        cap_bytes=planning.cap_bytes,
        timeout_s=120.0 + 10 * steps * expected_s,
        device=request.device_kind,
        threads=request.threads or max(1, local_machine.threads() // request.ranks),
    )
    if plan.ranks == 1:
        return run(render(spec), on_event=lambda event: None)
    measurements = run_ranks(render(spec))
    failed = [m for m in measurements if m.outcome is not OutcomeKind.OK]
    return failed[0] if failed else max(measurements, key=lambda m: m.peak_bytes or 0)


def _step_s(measurement: Measurement, warm_up: int) -> float:
    """Return the median step time of the steps after the first ``warm_up``, or of all steps if there are no
    others. Of an even number of times, it is the lower of the middle two.
    """
    return statistics.median_low(measurement.step_s[warm_up:] or measurement.step_s)


# -- which plans ----------------------------------------------------------------------------------


def _shortlist(planning: Planning) -> list[Plan]:
    """Return at most 14 (`FIRST`) plans for the first round, without repetitions. All fit when they are
    traced whole.

    They are the first that fit in this order. "Near" are the plans whose score is at most 1.6 times the best
    one, because two predictions may differ by as much through their errors. They are grouped by their set of
    techniques.

    - the recommended plan
    - the best near plan of each of the three best groups
    - the two plans of lowest effect class and fewest techniques (`simplest_first`), however slow they are
      predicted to be
    - the near plan with the fewest micro-batches of each of 7 groups, those with the fewest techniques first
    - the best near plan of each other group
    - the near plan with the fewest micro-batches of each other group
    """
    goal, recommended = planning.request.goal, planning.result.recommended
    assert recommended is not None, "search raises NothingFits otherwise"
    traced = {e.plan: e for e in planning.estimates}
    fitting = [
        e for e in ({e.plan: e for e in planning.sketches} | traced).values() if planning.meets_limits(e)
    ]
    best_score = min((score(e, goal) for e in fitting), default=score(recommended.estimate, goal))
    near = [e for e in fitting if score(e, goal) <= best_score * _WITHIN]
    near.sort(key=lambda e: (score(e, goal), e.plan.label))
    sets: dict[frozenset[str], list[Estimate]] = {}
    for e in near:
        sets.setdefault(e.plan.techniques, []).append(e)
    leaders = [members[0] for members in sets.values()]
    fewest = [min(members, key=lambda e: e.plan.micro_batches) for members in sets.values()]
    fewest.sort(key=lambda e: len(e.plan.uses))
    estimates = [recommended.estimate, *leaders[:3], *simplest_first(fitting, goal)[:2]]
    estimates += [*fewest[: FIRST // 2], *leaders[3:], *fewest[FIRST // 2 :]]
    return list(_fitting_plans(planning, [e.plan for e in estimates], FIRST))


def _neighbours(
    planning: Planning,
    fastest: Sequence[Plan],
    tried: Iterable[Plan],
    measured_ratios: Sequence[tuple[Plan, float]],
) -> list[Plan]:
    """Return at most 6 (`NEIGHBOURS`) plans that `one_change_away` yields for one of the ``fastest`` and that
    are not in ``tried``. They are the first that fit when they are traced whole, of the 18 with the best
    predicted scores, best first.

    ``measured_ratios``: (plan, measured over predicted step time) by which the predictions are corrected.
    """
    calibration = correct_calibration(planning.predictor.calibration, measured_ratios, source="")
    goal, excluded = planning.request.goal, set(tried)
    changed = dict.fromkeys(p for plan in fastest for p in one_change_away(planning, plan))
    candidates = [p for p in changed if p not in excluded]

    def expected(e: Estimate) -> float:
        return score(e, goal) * factor(calibration, e.plan) / factor(planning.predictor.calibration, e.plan)

    planning.predictor.prepare(candidates)
    sketches = sorted(map(planning.predictor.sketch, candidates), key=lambda e: (expected(e), e.plan.label))
    return list(_fitting_plans(planning, [e.plan for e in sketches[: 3 * NEIGHBOURS]], NEIGHBOURS))


def one_change_away(planning: Planning, plan: Plan) -> Iterator[Plan]:
    """Yield the plans that differ from ``plan`` in one technique (removed, added, or in another setting) and
    that the search may propose: accuracy, excluded techniques and the engine allow them.
    """
    request, facts = planning.request, planning.predictor.job_facts
    allowed = [t for t in usable(facts, request.accuracy)[0] if t.name not in request.bounds.without]
    by_uses = {frozenset(p.uses): p for p in plans(facts, allowed)}
    options: list[Use] = [make_use(t.name, s) for t in allowed for s in t.settings(facts)]
    changed = [*(without(plan, u.technique) for u in plan.uses), *map(plan.with_use, options)]
    for changed_plan in changed:
        neighbour = by_uses.get(frozenset(changed_plan.uses))
        if neighbour is not None and neighbour != plan and not engine(request.engine).refusals(neighbour):
            yield neighbour


def _fitting_plans(planning: Planning, candidates: Sequence[Plan], count: int) -> Iterator[Plan]:
    """Yield the first ``count`` distinct plans of ``candidates`` that fit when they are traced whole. If a
    plan has a memory budget for recomputation, the tensors to recompute are chosen in the plan that is
    yielded.
    """
    distinct = list(dict.fromkeys(candidates))
    if planning.request.ranks == 1:
        planning.predictor.trace_all(distinct[: count + 2])
    for plan in distinct:
        if count and planning.meets_limits(planning.predictor.whole(plan)):
            count -= 1
            yield planning.predictor.resolve(plan)
