"""Every sensible plan for one device, or for several that divide the batch.

These are all combinations of techniques and settings without conflicts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

from memfit.techniques.base import JobFacts, Technique
from memfit.techniques.registry import (
    TECHNIQUES,
    changes_training,
    effect_of,
    make_use,
    proposable,
    splits_batch,
    technique,
)
from memfit.types.dependence import DependenceCause, DependenceKind, SampleDependence
from memfit.types.plan import Accuracy, EffectClass, Plan, Use
from memfit.types.result import Reason, ReasonKind


def usable(
    facts: JobFacts,
    accuracy: Accuracy,
    *,
    negligible_state_bytes: int | None = None,
    dependence: SampleDependence | None = None,
) -> tuple[list[Technique], tuple[Reason, ...]]:
    """Return (the techniques that a search may use, reasons why others are left out).

    A technique is left out in the first of these cases that applies, with one reason in all but the third:

    - its packages are not installed
    - it is gradient-accumulation, and the batch may not be split into micro-batches (`may_split`)
    - it does not support the device or the job, or proposes no setting for the job
    - it changes the numbers by more than ``accuracy`` allows, unless it is data parallelism, which is asked
      for explicitly
    - it is another optimizer, and ``negligible_state_bytes`` is given

    ``negligible_state_bytes``: size of parameters, gradients and optimizer state if that is too little to be
    worth saving, else None. ``dependence``: whether the job's samples depend on each other; None if it does
    not matter.
    """
    allowed, reasons = [], []
    for candidate in TECHNIQUES.values():
        is_applicable = candidate.runs_on(facts.device_kind) and not candidate.excluded(facts)
        is_applicable = is_applicable and any(True for _ in candidate.settings(facts))
        if missing_packages := candidate.missing:
            reasons.append(
                Reason(
                    kind=ReasonKind.LEFT_OUT_UNAVAILABLE,
                    technique=candidate.name,
                    detail=", ".join(missing_packages),
                )
            )
        elif candidate.name == "gradient-accumulation" and dependence and not may_split(dependence, accuracy):
            reasons.append(
                Reason(kind=ReasonKind.LEFT_OUT_CHANGES, technique=candidate.name, detail=dependence.changes)
            )
        elif not is_applicable:
            continue
        # data parallelism is requested explicitly
        elif candidate.effect > accuracy.highest and candidate.slot != "data-parallel":
            reasons.append(
                Reason(kind=ReasonKind.LEFT_OUT_ACCURACY, technique=candidate.name, detail=accuracy.value)
            )
        elif negligible_state_bytes is not None and candidate.slot == "optimizer":
            reasons.append(
                Reason(
                    kind=ReasonKind.LEFT_OUT_SMALL,
                    technique=candidate.name,
                    saved_bytes=negligible_state_bytes,
                )
            )
        else:
            allowed.append(candidate)
    return allowed, tuple(reasons)


def may_split(dependence: SampleDependence, accuracy: Accuracy) -> bool:
    """Return whether a search may split the batch into micro-batches. It may if the samples are not known to
    depend on each other. Else it may if ``accuracy`` allows a changed algorithm (E3), splitting does not
    weight the terms of the loss wrongly, and the step can be computed for a part of the batch.
    """
    if dependence.kind is not DependenceKind.DEPENDENT:
        return True
    is_impossible = dependence.cause in (DependenceCause.WEIGHTS, DependenceCause.SIZE)
    return not is_impossible and accuracy.highest >= EffectClass.E3


def may_share(dependence: SampleDependence, accuracy: Accuracy) -> bool:
    """Return whether a search may divide the batch over data-parallel ranks: if this is known not to change
    the training (``dependence.across_ranks`` is false), or if `may_split` is true.
    """
    return not dependence.across_ranks or may_split(dependence, accuracy)


def dependence_reasons(plan: Plan, dependence: SampleDependence) -> tuple[Reason, ...]:
    """Return what to report about a recommended plan because its batch's samples may depend on each other; at
    most one reason, of one of these kinds:

    - CHANGES: samples depend on each other, and the plan changes the training by splitting the batch
    - LEFT_OUT_CHANGES: samples depend on each other, and plans that change the training so were left out
    - NOT_TESTED: dependence was not tested, and the plan splits the batch
    """
    if dependence.kind is DependenceKind.DEPENDENT:
        changes = changes_training(plan, dependence)
        kind = ReasonKind.CHANGES if changes else ReasonKind.LEFT_OUT_CHANGES
        return (
            Reason(kind=kind, technique="" if changes else "splitting the batch", detail=dependence.changes),
        )
    if dependence.kind is DependenceKind.NOT_TESTED and splits_batch(plan):
        return (Reason(kind=ReasonKind.NOT_TESTED, technique="", detail=dependence.reason),)
    return ()


def plans(facts: JobFacts, techniques: Iterable[Technique]) -> Iterator[Plan]:
    """Yield all plans with some of ``techniques`` that a search may propose (`proposable`), in a fixed order.
    Each technique has one of the settings that it proposes for ``facts``; at most one technique of each slot
    is used. On one device plain training comes first; on several, every plan has a data-parallel technique.
    Settings whose packages are not installed are left out.
    """
    slots: dict[str, list[Use]] = {}
    for candidate in techniques:
        slots.setdefault(candidate.slot or candidate.name, []).extend(_uses(candidate, facts))
    choices = [[None, *uses] for uses in slots.values()]
    for combination in itertools.product(*choices):
        plan = Plan(uses=tuple(u for u in combination if u is not None), ranks=facts.ranks)
        shares_work = any(technique(name).slot == "data-parallel" for name in plan.techniques)
        if proposable(plan) and (facts.ranks == 1 or shares_work):
            yield plan


def _uses(definition: Technique, facts: JobFacts) -> list[Use]:
    settings: Iterable[Mapping[str, object]] = definition.settings(facts)
    uses = [make_use(definition.name, s) for s in settings]
    return [u for u in uses if not definition.lacks(u.settings)]


_POSITIONS = {name: position for position, name in enumerate(TECHNIQUES)}


def effect_then_size_key(plan: Plan, dependence: SampleDependence | None = None) -> tuple[int, int, int]:
    """Return a sort key of the plan: of equally good plans, the one with the lowest key is preferred.

    It is (effect class from 0 to 3, number of techniques, sum of the techniques' positions in `TECHNIQUES`,
    where the customary ones come first). ``dependence``: whether the job's samples depend on each other; if
    they do, and the plan changes the training by splitting the batch, the effect class is 3. None: not known,
    and the effect class is that of the techniques.
    """
    return int(effect_of(plan, dependence)), len(plan.uses), sum(_POSITIONS[u.technique] for u in plan.uses)
