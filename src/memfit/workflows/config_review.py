"""Price an existing plan beside plans that would be better.

On one rank, the better plan is the search's recommendation. Plans with several ranks are not searched here;
instead, the plan is varied in one setting at a time, and the variants with less memory are reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter

from memfit.lint.neighbours import neighbours
from memfit.model.blocks import find_blocks
from memfit.planner.single_device import Progress, Request, fits_under, make_pricer, needed_bytes, search
from memfit.techniques.registry import check, effect_of
from memfit.trace.tracer import fake_model
from memfit.types.errors import NothingFits, UserError
from memfit.types.plan import EffectClass, Plan
from memfit.types.result import Choice, Estimate


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """A given plan compared with better ones.

    ``fits`` compares ``needed_bytes`` with ``cap_bytes``; both ``fits`` and ``cap_bytes`` are None if the
    memory is unknown. ``better``: least memory first. ``recommended`` is None on several ranks, and if
    nothing fits; then ``nothing`` says what would fit.
    """

    given: Estimate
    fits: bool | None
    needed_bytes: int
    cap_bytes: int | None
    better: tuple[Estimate, ...] = ()
    recommended: Choice | None = None
    nothing: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobSize:
    """Size of a job.

    ``batch_size``: of a step on all ranks. ``layers``: number of repeated blocks. ``width``: size of their
    norms. Both are None if the model has none.
    """

    batch_size: int
    parameter_count: int
    layers: int | None
    width: int | None


def job_size(request: Request) -> JobSize:
    """Return the size of the request's job. Raises UserError if the job cannot be built."""
    job, _ = make_pricer(request)
    model = fake_model(job)
    count = sum(p.numel() for p in model.parameters())
    try:
        blocks = find_blocks(model, job.blocks)[1]
    except UserError:
        return JobSize(batch_size=job.batch_size, parameter_count=count, layers=None, width=None)
    block_parameters = blocks[0].named_parameters()
    widths = Counter(
        p.numel() for n, p in block_parameters if p.dim() == 1 and re.search(r"norm|ln_|_ln", n.lower())
    )
    width = widths.most_common(1)[0][0] if widths else None
    return JobSize(batch_size=job.batch_size, parameter_count=count, layers=len(blocks), width=width)


def beside(request: Request, plan: Plan, progress: Progress, *, parameters: int) -> Beside:
    """Price ``plan`` and find better ones. Raises UserError if the job does not support the plan."""
    _, pricer = make_pricer(request)
    progress("trace", 0, 0, plan.label)
    given_estimate = pricer.whole(check(plan, request.machine))
    cap_bytes = request.cap_bytes
    if cap_bytes is None and request.machine.device.kind != "cpu":
        cap_bytes = int(request.machine.device.memory_bytes.value)
    need_bytes = needed_bytes(given_estimate, request.machine)
    comparison = Beside(
        given=given_estimate,
        needed_bytes=need_bytes,
        cap_bytes=cap_bytes,
        fits=None if cap_bytes is None else fits_under(cap_bytes, request.machine)(given_estimate),
    )
    if plan.ranks == 1:
        if cap_bytes is None:  # on a CPU, the cap is what the given plan needs
            request = dataclasses.replace(request, cap_bytes=need_bytes)
        try:
            recommended = search(request, progress).result.recommended
        except NothingFits as error:
            return dataclasses.replace(comparison, nothing=str(error))
        return dataclasses.replace(comparison, recommended=recommended)
    better = []
    for neighbour in neighbours(plan, parameters=parameters):
        progress("trace", 0, 0, neighbour.label)
        with contextlib.suppress(UserError):  # the job does not support it, for example half a sample
            neighbour_estimate = pricer.whole(check(neighbour))
            if effect_of(neighbour, neighbour_estimate.dependence) <= max(
                effect_of(plan, given_estimate.dependence), EffectClass.E2
            ):
                better.append(neighbour_estimate)
    smaller = [e for e in better if e.allocated_bytes.value < given_estimate.allocated_bytes.value]
    return dataclasses.replace(
        comparison, better=tuple(sorted(smaller, key=lambda e: e.allocated_bytes.value))
    )
