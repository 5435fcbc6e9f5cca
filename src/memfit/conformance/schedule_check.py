"""Check the schedule of a pipeline by the order in which its stages run forwards and backwards.

Schedules differ in how many micro-batches are in flight at once (forwards whose backward has not run), and in
whether gradients of weights are computed separately, later (zero-bubble).
"""

from __future__ import annotations

import torch.distributed as dist

from memfit.conformance.observation import Observation
from memfit.conformance.sharding import from_all
from memfit.conformance.technique_checks import told


def schedule(step: Observation) -> None:
    """Check that as many micro-batches are in flight on each stage as the planned schedule allows."""
    used = step.plan.get("pipeline")
    if used is None:
        return
    name, virtual = str(used.settings["schedule"]), int(used.settings["virtual"])
    stages, micros = step.layout.pipeline, int(used.settings["micro_batches"])
    place = step.layout.coordinate(dist.get_rank())["pipeline"]
    order = step.order.staged or step.order.plain
    every: list[tuple[int, str, bool]] = from_all((place, order, bool(step.order.staged)))
    if not all({"F", "B"} <= set(o) for _, o, _ in every):
        step.unseen("pipeline: schedule: no forwards and backwards of stages were heard")
        return
    limits = [_under_way(name, virtual, stages, micros, p) for p in range(stages)]
    found = [max(_most(o) for at, o, _ in every if at == p) for p in range(stages)]
    other = found != limits if name == "gpipe" else any(f > n for f, n in zip(found, limits, strict=True))
    step.differs(
        "pipeline: schedule",
        f"{name}, {told(limits)} micro-batches under way on its ranks",
        told(found),
        wrong=other,
    )
    if not all(staged for *_, staged in every):
        step.unseen("pipeline: schedule: whether gradients of weights come apart")
        return
    apart, wanted = any("W" in o for _, o, _ in every), name.startswith("zero-bubble")
    when = {True: "apart, later", False: "with those of inputs"}
    step.differs("pipeline: schedule: gradients of weights", when[wanted], when[apart], wrong=apart != wanted)


def _under_way(name: str, virtual: int, stages: int, micros: int, place: int) -> int:
    """Return the largest number of forwards whose backward has not run, on the rank at ``place`` (Huang et
    al. 2019; Narayanan et al. 2019 and 2021; Qi et al. 2023, whose V schedule holds on every rank what 1F1B
    holds on its first rank)."""
    # Interleaved: micro-batches of a stage before the rank's next stage runs.
    at_once = micros // max(1, micros // stages)
    after = stages - 1 - place
    found = {
        "gpipe": micros * virtual,
        "1f1b": after + 1,
        "interleaved": (virtual - 1) * at_once + 2 * after + 1,
        "zero-bubble": (virtual - 1) * at_once + after + 1,
        "zero-bubble-v": 2 * stages,
    }
    return min(found[name], micros * virtual)


def _most(order: str) -> int:
    now = most = 0
    for letter in order:
        now += {"F": 1, "B": -1}.get(letter, 0)
        most = max(most, now)
    return most
