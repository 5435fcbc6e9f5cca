"""Predict an existing plan, and plans that would be better.

For a plan of one rank, the better plan is the search's recommendation. A plan of several ranks, or one that
trains something else than plain training, such as LoRA, is varied in one change at a time instead, and the
variants that need less memory are reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter

from memfit.engines.registry import supporting_engine
from memfit.lint.neighbours import neighbours
from memfit.model.blocks import find_blocks
from memfit.planner.capacity import fits_under, needed_bytes
from memfit.planner.request import Progress, Request, make_predictor
from memfit.planner.search import search
from memfit.runtime import local_machine
from memfit.techniques.rank_mesh import split_batch
from memfit.techniques.registry import check, effect_of
from memfit.trace.tracer import fake_model
from memfit.types.errors import NothingFits, UserError
from memfit.types.plan import EffectClass, Plan
from memfit.types.result import Choice, Estimate, SearchExtent


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConfigReview:
    """The prediction for an ``existing`` plan, and better plans.

    ``needed_bytes``: memory of one device that the existing plan needs. ``fits``: whether that is at most
    ``cap_bytes`` and the host has enough memory. On a CPU without a cap asked for, ``fits`` and ``cap_bytes``
    are None.

    For a plan of one rank, ``recommended`` is the plan that a search recommends, and ``extent`` says how far
    the search got; if no plan fits, both are None and ``nothing`` is the text of the error. For a plan of
    several ranks, or with an effect that no plan of the search may have, ``better`` has its variants with a
    lower peak, lowest first; empty if there are none.
    ``better_fits``: for each of them, as ``fits``.
    """

    existing: Estimate
    fits: bool | None
    needed_bytes: int
    cap_bytes: int | None
    better: tuple[Estimate, ...] = ()
    better_fits: tuple[bool | None, ...] = ()
    recommended: Choice | None = None
    extent: SearchExtent | None = None
    nothing: str | None = None

    @property
    def nothing_fits(self) -> bool:
        """Whether neither the existing plan nor a better one fits."""
        return self.fits is False and self.recommended is None and not any(self.better_fits)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobSize:
    """Size of a job.

    ``batch_size``: samples of one step on all ranks together. ``layers``: number of the model's repeated
    blocks; None if it has none. ``width``: the most frequent size of the one-dimensional parameters of
    normalizations (recognized by their names) in the first block; None if there are none.
    """

    batch_size: int
    parameter_count: int
    layers: int | None
    width: int | None


def job_size(request: Request) -> JobSize:
    """Return the size of the request's job. Raises UserError if the job cannot be built, or if its batch has
    fewer samples than the request has ranks."""
    job, _ = make_predictor(request)
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


def find_alternatives(request: Request, plan: Plan, progress: Progress, *, parameters: int) -> ConfigReview:
    """Predict the existing ``plan``, and find better ones.

    For a plan of one rank, a search under the request's cap finds the better plan; on a CPU without a cap,
    the cap is what ``plan`` needs. If no plan fits, the result says so. For a plan of several ranks, and for
    one with a technique that changes the training (E3) and that the request's accuracy keeps out of the
    search, the better ones are variants with one change (see `neighbours`) that need less memory. They change
    the results by no more than ``plan`` does, or by no more than lower precision does (E2), whichever is
    more; variants that the job or the request's engine does not support are skipped.

    ``parameters``: number of the model's parameters; larger ZeRO buckets are reduced to it. Raises UserError
    if the job does not support ``plan``, or if its batch cannot be split equally; and the errors of
    `planner.search.search`, except NothingFits.
    """
    job, predictor = make_predictor(request)
    split_batch(plan, job.batch_size)
    progress("trace", 0, 0, plan.label)
    existing_estimate = predictor.whole(check(plan, request.machine))
    cap_bytes = request.cap_bytes
    if cap_bytes is None and not request.machine.device.is_host:
        cap_bytes = (
            local_machine.free_device_bytes(request.device_kind)
            if request.is_here
            else int(request.machine.device.memory_bytes.value)
        )
    need_bytes = needed_bytes(existing_estimate, request.machine)

    def fits(estimate: Estimate) -> bool | None:
        return None if cap_bytes is None else fits_under(cap_bytes, request.machine)(estimate)

    comparison = ConfigReview(
        existing=existing_estimate,
        needed_bytes=need_bytes,
        cap_bytes=cap_bytes,
        fits=fits(existing_estimate),
    )
    if plan.ranks == 1 and effect_of(plan) <= max(request.accuracy.highest, EffectClass.E2):
        if cap_bytes is None:  # on a CPU, the cap is what the existing plan needs
            request = dataclasses.replace(request, cap_bytes=need_bytes)
        try:
            result = search(request, progress).result
        except NothingFits as error:
            return dataclasses.replace(comparison, nothing=str(error))
        return dataclasses.replace(comparison, recommended=result.recommended, extent=result.extent)
    better = []
    for neighbour in neighbours(plan, parameters=parameters):
        progress("trace", 0, 0, neighbour.label)
        with contextlib.suppress(UserError):  # engine or job do not support it, for example half a sample
            supporting_engine(request.engine, neighbour)
            split_batch(neighbour, job.batch_size)
            neighbour_estimate = predictor.whole(check(neighbour))
            if effect_of(neighbour, neighbour_estimate.dependence) <= max(
                effect_of(plan, existing_estimate.dependence), EffectClass.E2
            ):
                better.append(neighbour_estimate)
    smaller = [e for e in better if e.allocated_bytes.value < existing_estimate.allocated_bytes.value]
    smaller.sort(key=lambda e: e.allocated_bytes.value)
    return dataclasses.replace(comparison, better=tuple(smaller), better_fits=tuple(fits(e) for e in smaller))
