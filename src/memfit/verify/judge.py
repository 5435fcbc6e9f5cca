"""(baseline runs, candidate runs, effect class, metric) -> Verdict.

Doubt is `undecided`: a run that did not finish, seeds that do not pair, too few pairs, too wide a spread.
`equivalent` and `different` both need evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from memfit.types.job import Metric
from memfit.types.plan import EffectClass
from memfit.types.result import OutcomeKind, Run, Verdict, VerdictKind
from memfit.verify import float32
from memfit.verify.bits import first_difference
from memfit.verify.equivalence import MIN_PAIRS, Tost, pairs_needed, tost

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
    baseline: Sequence[Run], candidate: Sequence[Run], *, effect: EffectClass, metric: Metric | None
) -> Verdict:
    """Judge `candidate` against `baseline`, run on equal seeds; the order of the runs does not matter.

    E0: losses and trained weights bitwise equal on every seed. E1: the first losses within float32
    tolerance (see `float32`), then as E2. E2 and E3: equivalence of the metric within its fixed margin.
    """
    pairs = _paired(baseline, candidate)
    trouble = _unpaired(baseline, candidate) or _unfinished(pairs)
    if trouble:
        return _undecided(effect, trouble, pairs=len(pairs))
    if effect is EffectClass.E0:
        return _bitwise(pairs)
    if effect is EffectClass.E1 and (beyond := _beyond_tolerance(pairs)):
        return Verdict(
            kind=VerdictKind.DIFFERENT, effect=effect, test=_TESTS[effect], reason=beyond, pairs=len(pairs)
        )
    return _by_metric(pairs, effect, metric)


def _paired(baseline: Sequence[Run], candidate: Sequence[Run]) -> Pairs:
    other = {run.spec.seed: run for run in candidate}
    ours = sorted(baseline, key=lambda run: run.spec.seed)
    return [(run, other[run.spec.seed]) for run in ours if run.spec.seed in other]


def _unpaired(baseline: Sequence[Run], candidate: Sequence[Run]) -> str:
    ours, theirs = (sorted(run.spec.seed for run in runs) for runs in (baseline, candidate))
    if not ours or not theirs:
        return "there are no runs to compare"
    if ours != theirs or len(set(ours)) < len(ours):
        return f"seeds do not pair one to one: baseline {ours}, candidate {theirs}"
    return ""


def _unfinished(pairs: Pairs) -> str:
    for run in (run for pair in pairs for run in pair):
        m = run.measurement
        if m.outcome is not OutcomeKind.OK:
            return f"{_name(run)} ended {m.outcome.value}: {m.reason}"
        if not m.losses or not all(map(math.isfinite, m.losses)):
            return f"{_name(run)} recorded no finite losses"
    for a, b in pairs:
        if len(a.measurement.losses) != len(b.measurement.losses):
            return f"{_name(a)} and {_name(b)} took a different number of steps"
    return ""


def _name(run: Run) -> str:
    return f"{run.spec.name} (seed {run.spec.seed})"


def _undecided(effect: EffectClass, reason: str, *, pairs: int) -> Verdict:
    return Verdict(kind=VerdictKind.UNDECIDED, effect=effect, test=_TESTS[effect], reason=reason, pairs=pairs)


def _bitwise(pairs: Pairs) -> Verdict:
    if any(not run.measurement.weights_digest for pair in pairs for run in pair):
        return _undecided(EffectClass.E0, "a run recorded no digest of its weights", pairs=len(pairs))
    differing = next((text for pair in pairs if (text := _differing_bits(*pair))), "")
    equal = f"losses and trained weights are bitwise equal on {len(pairs)} seed(s)"
    return Verdict(
        kind=VerdictKind.DIFFERENT if differing else VerdictKind.EQUIVALENT,
        effect=EffectClass.E0,
        test=_TESTS[EffectClass.E0],
        reason=differing or equal,
        pairs=len(pairs),
    )


def _differing_bits(a: Run, b: Run) -> str:
    step = first_difference(a.measurement.losses, b.measurement.losses)
    if step is not None:
        return f"seed {a.spec.seed}: the loss first differs at step {step} (counted from 0)"
    if a.measurement.weights_digest != b.measurement.weights_digest:
        last = len(a.measurement.losses) - 1
        return f"seed {a.spec.seed}: equal losses, but the weights differ after step {last} (the last)"
    return ""


def _beyond_tolerance(pairs: Pairs) -> str:
    for a, b in pairs:
        if beyond := float32.first_beyond(a.measurement.losses, b.measurement.losses):
            step, difference = beyond
            return (
                f"seed {a.spec.seed}: losses differ by {difference:.1e} at step {step} (counted from 0), "
                f"more than reordered float32 sums explain ({float32.tolerance(step):.1e})"
            )
    return ""


def _by_metric(pairs: Pairs, effect: EffectClass, metric: Metric | None) -> Verdict:
    if metric is None:
        return _undecided(effect, "the job has no metric with a margin", pairs=len(pairs))
    differences = [d for a, b in pairs if (d := _difference(a, b)) is not None]
    if len(differences) < len(pairs):
        return _undecided(effect, f"a run has no finite {metric.name}", pairs=len(pairs))
    if len(differences) < MIN_PAIRS:
        few = f"{len(pairs)} pair(s) of seeds; equivalence needs at least {MIN_PAIRS}"
        return _undecided(effect, few, pairs=len(pairs))
    return _from_tost(tost(differences, margin=metric.margin), effect, metric)


def _difference(a: Run, b: Run) -> float | None:
    before, after = a.measurement.metric, b.measurement.metric
    if before is None or after is None or not math.isfinite(after - before):
        return None
    return after - before


def _from_tost(t: Tost, effect: EffectClass, metric: Metric) -> Verdict:
    reason = _tost_reason(t, metric)
    return Verdict(
        kind=t.kind,
        effect=effect,
        test=_TESTS[effect],
        reason=f"{reason}; {_E3_NOTE}" if effect is EffectClass.E3 else reason,
        metric=metric.name,
        margin=t.margin,
        difference=t.difference,
        low=t.low,
        high=t.high,
        pairs=t.pairs,
        power=t.power,
    )


def _tost_reason(t: Tost, metric: Metric) -> str:
    found = (
        f"{metric.name} differs by {t.difference:+.4g} {metric.unit} (90 % interval {t.low:+.4g} to "
        f"{t.high:+.4g}, margin {t.margin:.4g}, {t.pairs} pairs, power {t.power:.0%})"
    )
    if t.kind is VerdictKind.EQUIVALENT:
        return f"{found}: inside the margin"
    if t.kind is VerdictKind.DIFFERENT:
        better = (t.difference > 0) == metric.higher_is_better
        return f"{found}: beyond the margin, for the {'better' if better else 'worse'}"
    return f"{found}: neither inside nor outside the margin; {_what_would_decide(t)}"


def _what_would_decide(t: Tost) -> str:
    needed = pairs_needed(margin=t.margin, sd=t.sd)
    if needed is None:
        return "at this spread no sensible number of seeds would decide"
    if needed <= t.pairs:
        return "the difference itself lies near the margin"
    return f"about {needed} pairs would do if there is no true difference"
