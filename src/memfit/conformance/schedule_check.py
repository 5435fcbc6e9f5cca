"""Check the micro-batches of a step, and the schedule of a pipeline by the order in which its stages run
forwards and backwards.

Schedules differ in how many micro-batches are in flight at once (forwards whose backward has not run), and in
whether gradients of weights are computed separately, later (zero-bubble).
"""

from __future__ import annotations

from collections.abc import Iterator

from memfit.conformance.findings import Checked, CheckFinding, NotChecked, join_values
from memfit.conformance.observation import Observations
from memfit.techniques.rank_mesh import layout
from memfit.types.plan import Plan


def micro_batches(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check how many micro-batches the step runs. With a pipeline, as many as planned, on each of this rank's
    stages. Else a multiple of the number that is planned, which is 1 without gradient-accumulation. The
    caller of the monitor may have given another number (``observed.micro_batches``), as for a short batch.

    Yields `NotChecked` if the plan has gradient-accumulation or a pipeline and no forward or backward pass
    was observed. Yields nothing if one micro-batch is planned without a pipeline and passes were observed, or
    if the plan has neither technique and no passes were observed."""
    pipeline = plan.get("pipeline")
    planned_count = observed.micro_batches or plan.micro_batches
    if pipeline is not None:  # every stage on this rank runs each micro-batch
        planned_count *= int(pipeline.settings["micro_batches"]) * int(pipeline.settings["virtual"])
        order = observed.this_rank.order
        # torch's stages may run one to infer shapes.
        found_count = (order.letters.count("F") if order.is_staged else 0) or observed.forwards
        feature = "pipeline: micro-batches"
    else:  # a loss may call the model several times, and read other data in between
        found_count, feature = observed.saved.backwards or observed.forwards, "gradient-accumulation"
    if found_count and (pipeline is not None or planned_count > 1):
        # LBFGS and sharpness-aware steps run their micro-batches several times.
        if pipeline is None and not found_count % planned_count:
            found_count = max(observed.passes, default=0) or found_count
        wrong = found_count != planned_count if pipeline is not None else bool(found_count % planned_count)
        yield Checked(feature, f"{planned_count} micro-batches", str(found_count), wrong=wrong)
    elif not found_count and ("gradient-accumulation" in plan or pipeline is not None):
        yield NotChecked(f"{feature}: no forward or backward pass was observed")


def schedule(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, with a pipeline, the order of forwards and backwards. Yields nothing without a pipeline.

    First, how many micro-batches are in flight (forwards whose backward has not run): on each stage at most
    as many as the planned schedule allows, with gpipe exactly as many. Second, whether gradients of weights
    are computed separately from those of inputs: exactly with a zero-bubble schedule.

    Yields one `NotChecked` instead of both if some rank was not observed to run forwards and backwards, and
    one instead of the second if some rank does not run torch's pipeline stages."""
    use = plan.get("pipeline")
    if use is None:
        return
    name, virtual = str(use.settings["schedule"]), int(use.settings["virtual"])
    stage_count, count = layout(plan).pipeline, int(use.settings["micro_batches"])
    orders = [(r.coordinate["pipeline"], r.order) for r in observed.ranks]
    if not all({"F", "B"} <= set(order.letters) for _, order in orders):
        yield NotChecked("pipeline: schedule: no forward and backward passes of stages were observed")
        return
    limits = [_under_way(name, virtual, stage_count, count, stage) for stage in range(stage_count)]
    peaks = [
        max(_most(order.letters) for order_stage, order in orders if order_stage == stage)
        for stage in range(stage_count)
    ]
    is_wrong = peaks != limits if name == "gpipe" else any(f > n for f, n in zip(peaks, limits, strict=True))
    yield Checked(
        "pipeline: schedule",
        f"{name}, {join_values(limits)} micro-batches in flight on its ranks",
        join_values(peaks),
        wrong=is_wrong,
    )
    if not all(order.is_staged for _, order in orders):
        yield NotChecked(
            "pipeline: schedule: whether gradients of weights are computed separately: "
            "no stages of torch's pipelining were observed"
        )
        return
    is_separate, planned_separate = any("W" in o.letters for _, o in orders), name.startswith("zero-bubble")
    texts = {True: "computed separately, later", False: "computed with gradients of inputs"}
    yield Checked(
        "pipeline: schedule: gradients of weights",
        texts[planned_separate],
        texts[is_separate],
        wrong=is_separate != planned_separate,
    )


def _under_way(name: str, virtual: int, stages: int, micro_batches: int, stage: int) -> int:
    """Return the largest number of forwards whose backward has not run that a schedule allows on the rank at
    ``stage`` (from 0), of ``stages`` ranks with ``virtual`` stages each. It is at most ``micro_batches`` *
    ``virtual``. ``name``: "gpipe" (Huang et al. 2019), "1f1b" (Narayanan et al. 2019), "interleaved"
    (Narayanan et al. 2021), or "zero-bubble" or "zero-bubble-v" (Qi et al. 2023; the second holds on every
    rank what 1F1B holds on its first rank)."""
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
