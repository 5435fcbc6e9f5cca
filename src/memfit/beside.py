"""A plan that somebody trains already, priced beside what would be better.

On one rank that is the search's recommendation. Plans of several ranks are not searched for yet; there it is
the plan with one thing changed, those that take less.
"""

from __future__ import annotations

import contextlib
import dataclasses

from memfit.configs.better import neighbours
from memfit.planning import Progress, Request, fits_under, make_pricer, needed_bytes, search
from memfit.techniques.registry import check
from memfit.trace.tracer import fake_model
from memfit.types.errors import NothingFits, UserError
from memfit.types.plan import Plan
from memfit.types.result import Choice, Estimate


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """``fits`` is None where nothing says how much memory there is. ``better``: least memory first.
    ``recommended`` is None on several ranks, and where nothing fits: ``nothing`` says what would."""

    given: Estimate
    fits: bool | None
    better: tuple[Estimate, ...] = ()
    recommended: Choice | None = None
    nothing: str | None = None


def parameters(request: Request) -> int:
    """Of the job's model."""
    job, _ = make_pricer(request)
    return sum(p.numel() for p in fake_model(job).parameters())


def beside(request: Request, plan: Plan, progress: Progress, *, parameters: int) -> Beside:
    """Raises UserError where the job cannot take the plan."""
    _, pricer = make_pricer(request)
    progress("trace", 0, 0, plan.label)
    given = pricer.whole(check(plan, request.machine))
    cap_bytes = request.cap_bytes
    if cap_bytes is None and request.machine.device.kind != "cpu":
        cap_bytes = int(request.machine.device.memory_bytes.value)
    fits = None if cap_bytes is None else fits_under(cap_bytes, request.machine)(given)
    if plan.ranks == 1:
        if cap_bytes is None:  # a CPU: as much as the given plan asks for
            request = dataclasses.replace(request, cap_bytes=needed_bytes(given, request.machine))
        try:
            recommended = search(request, progress).result.recommended
        except NothingFits as error:
            return Beside(given=given, fits=fits, nothing=str(error))
        return Beside(given=given, fits=fits, recommended=recommended)
    better = []
    for other in neighbours(plan, parameters=parameters):
        progress("trace", 0, 0, other.label)
        with contextlib.suppress(UserError):  # the job cannot take it, such as half a sample
            better.append(pricer.whole(check(other)))
    less = [e for e in better if e.allocated_bytes.value < given.allocated_bytes.value]
    return Beside(given=given, fits=fits, better=tuple(sorted(less, key=lambda e: e.allocated_bytes.value)))
