"""(baseline runs, candidate runs, effect class, metric) -> Verdict.

Doubt gives `undecided`: a run that did not finish, seeds that do not pair, too few pairs, too large a spread.
`equivalent` and `different` both require evidence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from memfit.types.job import Metric
from memfit.types.plan import EffectClass
from memfit.types.result import Cause, EndpointDifference, OutcomeKind, Run, Verdict, VerdictKind
from memfit.verify import float32
from memfit.verify.bits import first_difference
from memfit.verify.equivalence import MIN_PAIRS, Tost, pairs_needed, tost
from memfit.verify.sensitivity import endpoint_difference, overall

Pairs = list[tuple[Run, Run]]
_TOST = "paired two one-sided t tests, 5 % each"
_TESTS = {
    EffectClass.E0: "bitwise equality",
    EffectClass.E1: f"float32 tolerance over the first {float32.STEPS} steps, then {_TOST}",
    EffectClass.E2: _TOST,
    EffectClass.E3: _TOST,
}
_E3_NOTE = "a changed algorithm is judged by its metric alone and is not ranked with E0 to E2"


def verdict(
    baseline: Sequence[Run],
    candidate: Sequence[Run],
    *,
    effect: EffectClass,
    metric: Metric | None,
    surrogates: Sequence[Metric] = (),
) -> Verdict:
    """Judge the runs of a plan, `candidate`, against those of plain training, `baseline`, on the same seeds.

    `effect` is the plan's effect class, which decides the test:

    - E0: losses and trained weights must be bitwise equal on every seed.
    - E1: the losses of the first steps must be within float32 tolerance (see `float32`), else the verdict is
      different; then as E2.
    - E2 and E3: the metric must be equivalent within its fixed margin, and so must each of the `surrogates`.
      The verdict is different if one of them is. As all must be equivalent, the level of the test stays 5 %.

    The verdict is undecided if the seeds do not pair one to one, a run did not complete with finite losses,
    or the numbers of steps differ. For E0 it is also undecided if a digest of the weights is missing; for E1
    to E3 if ``metric`` is None, a value of it or of a surrogate is missing or not finite, there are fewer
    than 3 pairs, or an interval is neither inside nor outside its margin. The order of the runs does not
    matter.
    """
    pairs = _pair_by_seed(baseline, candidate)
    if problem := _pairing_problem(baseline, candidate):
        return _undecided(effect, problem, Cause(kind="unpaired"), pairs=len(pairs))
    if problem := _completion_problem(pairs):
        return _undecided(effect, problem, Cause(kind="unfinished", detail=problem), pairs=len(pairs))
    if effect is EffectClass.E0:
        return _judge_bits(pairs)
    if effect is EffectClass.E1:
        for a, b in pairs:
            losses = a.measurement.losses, b.measurement.losses
            if cause := float32.difference_beyond_rounding(*losses, seed=a.spec.seed):
                return _different_losses(cause, pairs=len(pairs))
    return _judge_metric(pairs, effect, metric, surrogates)


def _pair_by_seed(baseline: Sequence[Run], candidate: Sequence[Run]) -> Pairs:
    candidate_by_seed = {run.spec.seed: run for run in candidate}
    baseline_runs = sorted(baseline, key=lambda run: run.spec.seed)
    return [
        (run, candidate_by_seed[run.spec.seed]) for run in baseline_runs if run.spec.seed in candidate_by_seed
    ]


def _pairing_problem(baseline: Sequence[Run], candidate: Sequence[Run]) -> str:
    baseline_seeds, candidate_seeds = (
        sorted(run.spec.seed for run in runs) for runs in (baseline, candidate)
    )
    if not baseline_seeds or not candidate_seeds:
        return "there are no runs to compare"
    if baseline_seeds != candidate_seeds or len(set(baseline_seeds)) < len(baseline_seeds):
        return f"seeds do not pair one to one: baseline {baseline_seeds}, candidate {candidate_seeds}"
    return ""


def _completion_problem(pairs: Pairs) -> str:
    for run in (run for pair in pairs for run in pair):
        m = run.measurement
        if m.outcome is not OutcomeKind.OK:
            return f"{_name(run)} ended {m.outcome.value}: {m.reason}"
        if not m.losses or not all(map(math.isfinite, m.losses)):
            return f"{_name(run)} recorded no finite losses"
    for a, b in pairs:
        if (baseline_steps := len(a.measurement.losses)) != (candidate_steps := len(b.measurement.losses)):
            return f"{_name(a)} took {baseline_steps} steps and {_name(b)} {candidate_steps}"
    return ""


def _name(run: Run) -> str:
    return f"{run.spec.name} (seed {run.spec.seed})"


def _undecided(effect: EffectClass, reason: str, cause: Cause, *, pairs: int) -> Verdict:
    return Verdict(
        kind=VerdictKind.UNDECIDED,
        effect=effect,
        test=_TESTS[effect],
        reason=reason,
        pairs=pairs,
        cause=cause,
    )


def _judge_bits(pairs: Pairs) -> Verdict:
    if any(not run.measurement.weights_digest for pair in pairs for run in pair):
        cause = Cause(kind="no_digest")
        return _undecided(EffectClass.E0, "a run recorded no digest of its weights", cause, pairs=len(pairs))
    difference = next(
        (pair_difference for pair in pairs if (pair_difference := _differing_bits(*pair))), None
    )
    equal_reason = f"losses and trained weights are bitwise equal on {len(pairs)} seed(s)"
    return Verdict(
        kind=VerdictKind.DIFFERENT if difference else VerdictKind.EQUIVALENT,
        effect=EffectClass.E0,
        test=_TESTS[EffectClass.E0],
        reason=_bits_reason(difference) if difference else equal_reason,
        pairs=len(pairs),
        cause=difference or Cause(kind="equal_bits"),
    )


def _differing_bits(a: Run, b: Run) -> Cause | None:
    step = first_difference(a.measurement.losses, b.measurement.losses)
    if step is not None:
        return Cause(kind="loss_differs", seed=a.spec.seed, step=step)
    if a.measurement.weights_digest != b.measurement.weights_digest:
        return Cause(kind="weights_differ", seed=a.spec.seed, step=len(a.measurement.losses) - 1)
    return None


def _bits_reason(cause: Cause) -> str:
    if cause.kind == "loss_differs":
        return f"seed {cause.seed}: the loss first differs at step {cause.step} (counted from 0)"
    return f"seed {cause.seed}: equal losses, but the weights differ after step {cause.step} (the last)"


def _different_losses(cause: Cause, *, pairs: int) -> Verdict:
    return Verdict(
        kind=VerdictKind.DIFFERENT,
        effect=EffectClass.E1,
        test=_TESTS[EffectClass.E1],
        reason=f"seed {cause.seed}: losses differ by {cause.difference:.1e} at step {cause.step} (counted "
        f"from 0), more than reordered float32 sums explain ({cause.limit_ratio:.1e})",
        pairs=pairs,
        cause=cause,
    )


def _judge_metric(
    pairs: Pairs, effect: EffectClass, metric: Metric | None, surrogates: Sequence[Metric]
) -> Verdict:
    if metric is None:
        no_metric = "the job has no metric with a margin"
        return _undecided(effect, no_metric, Cause(kind="no_metric"), pairs=len(pairs))
    differences = {}
    for endpoint in (metric, *surrogates):
        differences[endpoint.name] = _differences(pairs, endpoint.name, is_metric=endpoint is metric)
        if len(differences[endpoint.name]) < len(pairs):
            cause = Cause(kind="not_finite", detail=endpoint.name)
            return _undecided(effect, f"a run has no finite {endpoint.name}", cause, pairs=len(pairs))
    if len(pairs) < MIN_PAIRS:
        too_few = f"{len(pairs)} pair(s) of seeds; equivalence needs at least {MIN_PAIRS}"
        return _undecided(effect, too_few, Cause(kind="few_pairs", needed_count=MIN_PAIRS), pairs=len(pairs))
    tests = [tost(differences[e.name], margin=e.margin) for e in (metric, *surrogates)]
    others = tuple(endpoint_difference(t, e) for t, e in zip(tests[1:], surrogates, strict=True))
    return _with_surrogates(_from_tost(tests[0], effect, metric), others)


def _differences(pairs: Pairs, name: str, *, is_metric: bool) -> list[float]:
    """Return the differences of the pairs in the endpoint ``name``, without those that are not finite."""
    differences = []
    for pair in pairs:
        a, b = (run.measurement.metric if is_metric else run.measurement.surrogates.get(name) for run in pair)
        if a is not None and b is not None and math.isfinite(b - a):
            differences.append(b - a)
    return differences


def _with_surrogates(verdict: Verdict, surrogates: Sequence[EndpointDifference]) -> Verdict:
    """Return the verdict on the metric, extended to the surrogates: different if one is, else undecided if
    one is."""
    kind = overall([verdict.kind, *(s.kind for s in surrogates)])
    verdict = dataclasses.replace(verdict, surrogates=tuple(surrogates))
    if kind is verdict.kind:
        return verdict
    decisive = next(s for s in surrogates if s.kind is kind)
    interval = f"90 % interval {decisive.low:+.4g} to {decisive.high:+.4g}, margin {decisive.margin:.4g}"
    difference = f"{decisive.name} differs by {decisive.difference:+.4g} {decisive.unit}"
    return dataclasses.replace(
        verdict,
        kind=kind,
        reason=f"{verdict.reason}; but {difference} ({interval}): {kind}",
        cause=Cause(kind=f"surrogate_{kind}", detail=decisive.name),
    )


def _from_tost(test: Tost, effect: EffectClass, metric: Metric) -> Verdict:
    cause = _tost_cause(test, metric)
    reason = _tost_reason(test, metric, cause)
    return Verdict(
        kind=test.kind,
        effect=effect,
        test=_TESTS[effect],
        reason=f"{reason}; {_E3_NOTE}" if effect is EffectClass.E3 else reason,
        metric=metric.name,
        margin=test.margin,
        difference=test.difference,
        low=test.low,
        high=test.high,
        pairs=test.pairs,
        power=test.power,
        cause=cause,
    )


def _tost_cause(test: Tost, metric: Metric) -> Cause:
    if test.kind is VerdictKind.EQUIVALENT:
        return Cause(kind="inside")
    if test.kind is VerdictKind.DIFFERENT:
        return Cause(kind="better" if (test.difference > 0) == metric.higher_is_better else "worse")
    needed = pairs_needed(margin=test.margin, sd=test.sd)
    if needed is None:
        return Cause(kind="neither_ever")
    return (
        Cause(kind="neither_near") if needed <= test.pairs else Cause(kind="neither_yet", needed_count=needed)
    )


_WOULD_DECIDE = {
    "neither_ever": "at this spread no sensible number of seeds would decide",
    "neither_near": "the difference itself lies near the margin",
}


def _tost_reason(test: Tost, metric: Metric, cause: Cause) -> str:
    summary = (
        f"{metric.name} differs by {test.difference:+.4g} {metric.unit} (90 % interval {test.low:+.4g} to "
        f"{test.high:+.4g}, margin {test.margin:.4g}, {test.pairs} pairs, power {test.power:.0%})"
    )
    if cause.kind == "inside":
        return f"{summary}: inside the margin"
    if cause.kind in ("better", "worse"):
        return f"{summary}: beyond the margin, for the {cause.kind}"
    needed_text = f"about {cause.needed_count} pairs would be enough if there is no true difference"
    return f"{summary}: neither inside nor outside the margin; {_WOULD_DECIDE.get(cause.kind, needed_text)}"
