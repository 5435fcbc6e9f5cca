"""Check the schedule of a pipeline by the order in which its stages run forwards and backwards.

Schedules differ in how many micro-batches are in flight at once (forwards whose backward has not run), and in
whether gradients of weights are computed separately, later (zero-bubble).
"""

from __future__ import annotations

import torch.distributed as dist

from memfit.conformance.observation import Observation
from memfit.conformance.sharding import from_all
from memfit.conformance.technique_checks import join_values


def schedule(step: Observation) -> None:
    """Record, if the plan has a pipeline, whether on each stage at most as many micro-batches are in flight
    as its schedule allows (with gpipe, exactly as many), and whether gradients of weights are computed
    separately exactly if the schedule is a zero-bubble one. Both are recorded as not checked if some rank was
    not observed to run forwards and backwards, the second also if some rank does not run torch's pipeline
    stages."""
    use = step.plan.get("pipeline")
    if use is None:
        return
    name, virtual = str(use.settings["schedule"]), int(use.settings["virtual"])
    stages, micro_batches = step.layout.pipeline, int(use.settings["micro_batches"])
    stage = step.layout.coordinate(dist.get_rank())["pipeline"]
    order = step.order.staged or step.order.plain
    entries: list[tuple[int, str, bool]] = from_all((stage, order, bool(step.order.staged)))
    if not all({"F", "B"} <= set(o) for _, o, _ in entries):
        step.unseen("pipeline: schedule: no forward and backward passes of stages were observed")
        return
    limits = [_under_way(name, virtual, stages, micro_batches, p) for p in range(stages)]
    peaks = [max(_most(o) for entry_stage, o, _ in entries if entry_stage == p) for p in range(stages)]
    is_wrong = peaks != limits if name == "gpipe" else any(f > n for f, n in zip(peaks, limits, strict=True))
    step.differs(
        "pipeline: schedule",
        f"{name}, {join_values(limits)} micro-batches in flight on its ranks",
        join_values(peaks),
        wrong=is_wrong,
    )
    if not all(is_staged for *_, is_staged in entries):
        step.unseen(
            "pipeline: schedule: whether gradients of weights are computed separately: "
            "no stages of torch's pipelining were observed"
        )
        return
    is_separate, planned_separate = any("W" in o for _, o, _ in entries), name.startswith("zero-bubble")
    texts = {True: "computed separately, later", False: "computed with gradients of inputs"}
    step.differs(
        "pipeline: schedule: gradients of weights",
        texts[planned_separate],
        texts[is_separate],
        wrong=is_separate != planned_separate,
    )


def _under_way(name: str, virtual: int, stages: int, micro_batches: int, stage: int) -> int:
    """Return the largest number of forwards whose backward has not run that the schedule ``name`` allows on
    the rank at ``stage``, of ``stages`` ranks with ``virtual`` stages each (Huang et al. 2019; Narayanan et
    al. 2019 and 2021; Qi et al. 2023, whose V schedule holds on every rank what 1F1B holds on its first
    rank)."""
    # Interleaved: micro-batches of a stage before the rank's next stage runs.
    at_once = micro_batches // max(1, micro_batches // stages)
    later_stages = stages - 1 - stage
    limits = {
        "gpipe": micro_batches * virtual,
        "1f1b": later_stages + 1,
        "interleaved": (virtual - 1) * at_once + 2 * later_stages + 1,
        "zero-bubble": (virtual - 1) * at_once + later_stages + 1,
        "zero-bubble-v": 2 * stages,
    }
    return min(limits[name], micro_batches * virtual)


def _most(order: str) -> int:
    in_flight = maximum = 0
    for letter in order:
        in_flight += {"F": 1, "B": -1}.get(letter, 0)
        maximum = max(maximum, in_flight)
    return maximum
