"""Compare a death from lack of memory with the prediction; find the nearest plan that would have fitted."""

from __future__ import annotations

import dataclasses

from memfit.monitoring.diagnosis import DeathCause, Diagnosis
from memfit.planner.capacity import needed_bytes
from memfit.planner.request import Progress, Request, make_predictor
from memfit.planner.safer_plans import safer_plan
from memfit.planner.search import search
from memfit.techniques.registry import check
from memfit.types.errors import NothingFits
from memfit.types.plan import Plan
from memfit.types.result import Estimate


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeathComparison:
    """The prediction of the plan under which memory ran out, and a plan that would have fitted.

    ``needed_bytes``: what the plan is predicted to need of the device. ``measured_bytes``: the least that its
    tensors needed: those that were allocated and the request that failed; None if the evidence does not say.
    ``limit_bytes``: the memory that it could use. ``nearest``: the plan that fits and differs least, as an
    estimate; None if there is none, and ``why_not`` then says why. ``nearest_bytes``: what the nearest plan
    is predicted to need.
    """

    predicted: Estimate
    needed_bytes: int
    measured_bytes: int | None
    limit_bytes: int
    nearest: Estimate | None
    nearest_bytes: int | None = None
    why_not: str = ""

    @property
    def excess_ratio(self) -> float | None:
        """``measured_bytes`` divided by the predicted peak of tensors, minus 1: the least share by which the
        tensors exceeded it. Negative if they did not. None if ``measured_bytes`` is."""
        if self.measured_bytes is None:
            return None
        return self.measured_bytes / self.predicted.allocated_bytes.value - 1

    @property
    def step_ratio(self) -> float | None:
        """The step time of the nearest plan divided by that of the plan under which memory ran out; None if
        unknown."""
        before, after = self.predicted.step_s, self.nearest.step_s if self.nearest else None
        return after.value / before.value if before is not None and after is not None else None


def compare_with_prediction(
    diagnosis: Diagnosis, request: Request, plan: Plan, progress: Progress
) -> DeathComparison:
    """Predict ``plan`` for the request's job and machine, and compare it with the figures of the diagnosis.

    The memory that it could use is the request's cap; without one, what the evidence says (`_limit_bytes`);
    or else the memory of the machine's device. The nearest plan differs in recomputation, micro-batches,
    offload and chunking only; if none of these fits, it is the one that a search recommends. Raises UserError
    if the job cannot be loaded, and if the machine or the job does not support the plan; and the errors of
    `planner.search.search`, except NothingFits.
    """
    _, predictor = make_predictor(request)
    progress("trace", 0, 0, plan.label)
    predicted = predictor.whole(check(plan, request.machine))
    figures = diagnosis.figures
    allocated, requested = figures.get("allocated_bytes"), figures.get("request_bytes")
    limit_bytes = (
        request.cap_bytes or _limit_bytes(diagnosis) or int(request.machine.device.memory_bytes.value)
    )
    choice = safer_plan(predictor, plan, limit_bytes=limit_bytes)
    if isinstance(choice, str):
        nearest, why_not = _by_search(request, limit_bytes, progress)
    else:
        nearest, why_not = choice.estimate, ""
    return DeathComparison(
        predicted=predicted,
        needed_bytes=needed_bytes(predicted, request.machine),
        measured_bytes=None if allocated is None else allocated + (requested or 0),
        limit_bytes=limit_bytes,
        nearest=nearest,
        nearest_bytes=needed_bytes(nearest, request.machine) if nearest is not None else None,
        why_not=why_not,
    )


def _limit_bytes(diagnosis: Diagnosis) -> int | None:
    """Return the memory that the training could use by the evidence: its own limit, or the device's capacity;
    less what was used outside torch's allocator if that was the cause. None if the evidence has neither, or
    if the host's memory ran out."""
    figures = diagnosis.figures
    limit = figures.get("allowed_bytes") or figures.get("capacity_bytes")
    if limit is None or diagnosis.memory == "host":
        return None
    is_outside = diagnosis.cause is DeathCause.OUTSIDE_TORCH
    return limit - figures.get("outside_bytes", 0) if is_outside else limit


def _by_search(request: Request, limit_bytes: int, progress: Progress) -> tuple[Estimate | None, str]:
    """Return (the estimate of the plan that a search recommends within ``limit_bytes``, ""), or (None, why
    nothing fits). Raises UserError and RunError as `search` does."""
    try:
        recommended = search(dataclasses.replace(request, cap_bytes=limit_bytes), progress).result.recommended
    except NothingFits as error:
        return None, str(error)
    assert recommended is not None, "search raises NothingFits otherwise"
    return recommended.estimate, ""
