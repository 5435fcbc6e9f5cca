"""Kinds of plans, and the distance between plans of one kind.

The predictions of plans of one kind that are composed from traces of parts (sketches) have similar errors.
"""

from __future__ import annotations

import math

from memfit.planner.parallelism_grid import DIVIDING_TECHNIQUES
from memfit.techniques.registry import technique
from memfit.types.plan import Plan

Degrees = dict[tuple[str, str], int]

_DEGREES = ("stages", "virtual", "degree")
_SIZES = ("micro_batches", "first_fewer", "last_fewer")


def kind(plan: Plan) -> tuple[object, Degrees]:
    """Return (kind, degrees) of a plan. The predictions for plans that agree in both have similar errors if
    they are sketches, composed from traces of parts.

    Plans are of the same kind if they have the same techniques that divide the model (tensor-, context-,
    axial- or expert-parallel, pipeline) and the same data-parallel technique, all with the same settings,
    except degrees, numbers of micro-batches and sizes of stages of the dividing ones. Degrees: (technique,
    setting) -> number of ranks, pipeline stages or virtual stages.
    """
    dividing_settings = [
        (u.technique, k, v) for u in plan.uses if u.technique in DIVIDING_TECHNIQUES for k, v in u.knobs
    ]
    degrees = {(name, k): int(v) for name, k, v in dividing_settings if k in _DEGREES}
    dividing_kind = tuple(setting for setting in dividing_settings if setting[1] not in (*_DEGREES, *_SIZES))
    data = (u for u in plan.uses if technique(u.technique).slot == "data-parallel")
    return (tuple(dict.fromkeys(name for name, _, _ in dividing_settings)), dividing_kind, *data), degrees


def doublings(one: Degrees, other: Degrees) -> float:
    """Return how many doublings two sets of degrees are apart, summed over all degrees. A degree that is in
    only one of the sets counts as 1 in the other.
    """
    return sum(abs(math.log2(one.get(k, 1) / other.get(k, 1))) for k in one.keys() | other.keys())
