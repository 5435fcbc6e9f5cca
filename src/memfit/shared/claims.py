"""What a record claims beyond its types: each claim must follow from the record's own numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from memfit.techniques.registry import conflict, effect_of, make_use, plain, splits_batch
from memfit.types.errors import UserError
from memfit.types.plan import EffectClass, Plan
from memfit.verify.equivalence import MIN_PAIRS, tost

if TYPE_CHECKING:
    from memfit.shared.record import Judgement, Shared, Side

# A score is computed under the plan, so that bitwise equal weights may differ by a sample near a threshold.
_SAME_SCORE: Final = 1e-3
_ROUNDING: Final = 1e-6
_PAIRED: Final = 1.6  # pairs on a machine whose speed changes between them
_SAME_PEAK: Final = 0.05
_SPARE, _SPARE_BYTES = 2, 2**30  # what a process may need beside its tensors


def faults(record: Shared) -> Iterator[str]:
    """What does not hold together, with its place; nothing for a record that does."""
    plans = []
    for name, side in (("baseline", record.baseline), ("recommended", record.recommended)):
        try:
            plan = _plan(side)
        except UserError as error:
            yield f"{name}.plan: {error}"
            return
        plans.append(plan)
        yield from _of_side(name, side, plan, record.cap_bytes)
    peaks = [s.measured_peak_bytes for s in (record.baseline, record.recommended)]
    if plans[0] == plans[1] and None not in peaks and not math.isclose(*peaks, rel_tol=_SAME_PEAK):  # type: ignore[arg-type]
        yield f"the plans are one, with peaks of {peaks[0]} B and {peaks[1]} B"
    if not record.metric.strip() and (record.baseline.metric_by_seed or record.recommended.metric_by_seed):
        yield "metric has no name, and plans have scores by it"
    if plans[0] != plain(plans[0].ranks):
        yield f"baseline.plan is {plans[0].label}, allowed: plain training"
    if record.step_time_ratio is not None:
        yield from _of_ratio(record.step_time_ratio, record.baseline.step_s, record.recommended.step_s)
    if record.verdict is not None:
        yield from _of_verdict(record, record.verdict, same=plans[0] == plans[1])


def _of_side(name: str, side: Side, plan: Plan, cap_bytes: int) -> Iterator[str]:
    effect, peak = effect_of(plan).label, side.measured_peak_bytes
    dependent = (
        splits_batch(plan) and side.effect == EffectClass.E3.label
    )  # where samples depend on each other
    if side.effect != effect and not dependent:
        yield f"{name}.effect is {side.effect}, that of its plan {plan.label} is {effect}"
    if side.under_cap == "ok" and peak is not None and peak > cap_bytes:
        yield f"{name}.under_cap is ok with a peak of {peak} B above the cap of {cap_bytes} B"
    if side.under_cap == "oom" and peak is not None and cap_bytes > _SPARE * peak + _SPARE_BYTES:
        yield f"{name}.under_cap is oom with a peak of {peak} B far below the cap of {cap_bytes} B"
    if odd := [seed for seed in side.metric_by_seed if not re.fullmatch(r"0|[1-9]\d*", seed)]:
        yield f"{name}.metric_by_seed has the seed {odd[0]!r}, allowed: whole numbers, each written once"


def _of_ratio(told: float, plain_s: float | None, chosen_s: float | None) -> Iterator[str]:
    if plain_s is None or chosen_s is None:
        yield "step_time_ratio is given, and step_s of a plan is not"
    elif not agrees_with_medians(told, plain_s, chosen_s):
        yield f"step_time_ratio is {told:g}, step_s of the plans give {chosen_s / plain_s:g}"


def agrees_with_medians(step_time_ratio: float, plain_s: float, chosen_s: float) -> bool:
    """Whether the median ratio of the pairs lies near the ratio of the plans' median step times."""
    return 1 / _PAIRED <= step_time_ratio * plain_s / chosen_s <= _PAIRED


def _plan(side: Side) -> Plan:
    plan = Plan(uses=tuple(make_use(n, knobs) for n, knobs in side.plan.items()), ranks=side.ranks)
    if (clash := conflict(plan)) is not None:
        raise UserError(clash)
    return plan


def _of_verdict(record: Shared, judged: Judgement, *, same: bool) -> Iterator[str]:
    """`same`: both plans are one, which needs no proof."""
    base, chosen = record.baseline.metric_by_seed, record.recommended.metric_by_seed
    equivalent = judged.kind == "equivalent"
    if judged.effect != record.recommended.effect:
        yield f"the verdict is on {judged.effect}, the plan is {record.recommended.effect}"
    if equivalent and not same:
        yield from _of_equivalence(judged, base, chosen)
    told = [n for n in ("difference", "low", "high") if getattr(judged, n) is not None]
    if judged.margin is None and told:
        yield f"verdict.{told[0]} is given, and verdict.margin is not"
    if judged.margin is not None:
        yield from _of_metric(judged, judged.margin, base, chosen)
    elif equivalent:
        for seed in base.keys() & chosen.keys():
            if not math.isclose(base[seed], chosen[seed], rel_tol=_SAME_SCORE):
                yield f"the verdict is bitwise equal, the scores of seed {seed} are not"


def _of_equivalence(
    judged: Judgement, base: Mapping[str, float], chosen: Mapping[str, float]
) -> Iterator[str]:
    """Of two plans: it needs pairs of runs, and their scores where it is not by their bits."""
    if judged.pairs == 0:
        yield "the verdict is equivalent on 0 pairs"
    if judged.margin is None and judged.effect != "E0":
        yield f"the verdict on {judged.effect} is equivalent without a margin"
    if base.keys() != chosen.keys():
        yield f"the verdict is equivalent on other seeds: {_seeds(base)} and {_seeds(chosen)}"
    if base and judged.pairs != len(base):
        yield f"the verdict has {judged.pairs} pairs, the runs {len(base)} seeds"


def _of_metric(
    judged: Judgement, margin: float, base: Mapping[str, float], chosen: Mapping[str, float]
) -> Iterator[str]:
    """A verdict with a margin is the paired test of the scores."""
    told = {"difference": judged.difference, "low": judged.low, "high": judged.high}
    for name, value in told.items():
        if value is None:
            yield f"verdict.{name} is null beside a margin"
            return
    low, high = judged.low or 0.0, judged.high or 0.0
    if judged.kind == "equivalent" and not -margin < low <= high < margin:
        yield f"the verdict is equivalent, its interval {low:g} to {high:g} not inside its margin {margin:g}"
    if base.keys() != chosen.keys() or judged.pairs != len(base) or judged.pairs < MIN_PAIRS:
        yield (
            f"the verdict has an interval of {judged.pairs} pairs, the scores are of seeds {_seeds(base)} "
            f"and {_seeds(chosen)}; allowed: the same seeds, at least {MIN_PAIRS}"
        )
        return
    found = tost([chosen[seed] - base[seed] for seed in base], margin=margin)
    for name, value in told.items():
        expected = getattr(found, name)
        if value is None or not math.isclose(value, expected, rel_tol=_ROUNDING, abs_tol=_ROUNDING * margin):
            yield f"verdict.{name} is {value:g}, the scores give {expected:g}"
    if judged.kind != found.kind.value:
        yield f"the verdict is {judged.kind}, the scores give {found.kind.value}"


def _seeds(scores: Mapping[str, float]) -> str:
    return ", ".join(sorted(scores)) or "none"
