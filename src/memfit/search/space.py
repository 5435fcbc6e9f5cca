"""Every sensible plan for one device: techniques times settings, minus what clashes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

from memfit.techniques.base import Space, Technique
from memfit.techniques.registry import TECHNIQUES, conflict, effect_of, make_use
from memfit.types.plan import Accuracy, Plan, Use
from memfit.types.result import Reason


def usable(space: Space, accuracy: Accuracy) -> tuple[list[Technique], tuple[Reason, ...]]:
    """Techniques the goal and this machine allow, and why the others are out."""
    allowed, out = [], []
    for technique in TECHNIQUES.values():
        offered = space.device in technique.devices and any(True for _ in technique.settings(space))
        if missing := technique.missing:
            out.append(
                Reason(kind="left_out_unavailable", technique=technique.name, detail=", ".join(missing))
            )
        elif not offered:
            continue
        elif technique.effect > accuracy.highest:
            out.append(Reason(kind="left_out_accuracy", technique=technique.name, detail=accuracy.value))
        else:
            allowed.append(technique)
    return allowed, tuple(out)


def plans(space: Space, techniques: Iterable[Technique]) -> Iterator[Plan]:
    """All conflict-free combinations, plain first, in a fixed order."""
    slots: dict[str, list[Use]] = {}
    for technique in techniques:
        slots.setdefault(technique.slot or technique.name, []).extend(_uses(technique, space))
    choices = [[None, *uses] for uses in slots.values()]
    for picked in itertools.product(*choices):
        plan = Plan(uses=tuple(u for u in picked if u is not None))
        if conflict(plan) is None:
            yield plan


def _uses(technique: Technique, space: Space) -> list[Use]:
    settings: Iterable[Mapping[str, object]] = technique.settings(space)
    return [make_use(technique.name, s) for s in settings]


_PLACE = {name: place for place, name in enumerate(TECHNIQUES)}


def complexity(plan: Plan) -> tuple[int, int, int]:
    """Plans are preferred by this when they are otherwise as good: milder effect, fewer techniques, and
    those that come first in the table, where the customary ones stand."""
    return int(effect_of(plan)), len(plan.uses), sum(_PLACE[u.technique] for u in plan.uses)
