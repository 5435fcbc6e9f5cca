"""Check how many elements of parameters, gradients and optimizer state this rank holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from memfit.conformance.findings import Checked, CheckFinding, NotChecked
from memfit.conformance.observation import Observations, ObservedParameter
from memfit.conformance.planned_shards import persists, shard_degree
from memfit.techniques.rank_mesh import layout
from memfit.types.plan import Plan

_PADDING = 64  # elements per rank, of flat buffers
_IGNORED_RATIO = 0.05  # fraction of elements that FSDP2 may leave whole


def parameters(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check how many elements of parameters this rank holds: at most its shard if the plan shards parameters,
    else at least 99 % of its part of the model (before data-parallel sharding). Yields `NotChecked` if they
    should be sharded and this rank holds none. Yields nothing with expert-parallel, or if they should not be
    sharded and the model has no parameters."""
    if "expert-parallel" in plan:
        return
    params = observed.parameters
    held_elements, whole_part = sum(p.local_elements for p in params), observed.part_elements(params)
    degree, feature = shard_degree(plan, "parameters")
    if degree > 1 and not held_elements:
        yield NotChecked(f"{feature}: no shards were found")
    elif degree > 1:
        persistent = [p for p in params if persists(plan, p.whole_elements)]
        sharded = [p for p in params if not persists(plan, p.whole_elements)]
        max_elements = sum(p.whole_elements for p in persistent) + _shard(plan, observed, sharded, degree)
        yield Checked(
            feature,
            f"1/{degree} of {whole_part:,} elements on a rank",
            f"{held_elements:,}",
            wrong=held_elements > max_elements,
        )
    elif whole_part:
        yield Checked(
            "parameters",
            "whole",
            f"{held_elements:,} of {whole_part:,} elements on a rank",
            wrong=held_elements < 0.99 * whole_part,
        )


def gradients(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, if the plan shards gradients, how many elements of them this rank holds. Before the update, at
    most its shard (with sharded-ddp, its reduce buckets in addition), and with fsdp2 not none (then gradients
    were not reduced). In backward, with ZeRO stage 2, at most its shard (rounded up to whole parameters), one
    reduce bucket and the largest parameter.

    Yields `NotChecked` for the second if this limit is not below the size of all gradients. Yields nothing
    with expert-parallel, if the plan does not shard gradients, or if no update was observed."""
    params = observed.trained
    degree, feature = shard_degree(plan, "gradients")
    held_elements = observed.gradient_elements
    if "expert-parallel" in plan or degree == 1 or held_elements is None:
        return
    whole_part = observed.part_elements(params)
    max_elements = _shard(plan, observed, params, degree)
    # Gradients were not reduced to shards.
    unreduced = "fsdp2" in plan and not held_elements
    yield Checked(
        feature,
        f"1/{degree} of {whole_part:,} elements on a rank before the update",
        f"{held_elements:,}",
        wrong=unreduced or held_elements > max_elements + _bucket_elements(plan),
    )
    zero, backward_elements = plan.get("zero"), observed.backward_gradient_elements
    if zero is None or int(zero.settings["stage"]) != 2 or not backward_elements:
        return
    bucket = int(zero.settings["reduce_bucket_elements"])
    # The last one may be in progress.
    largest = max(p.whole_elements for p in params)
    max_elements = _overlapping(params, degree, observed.rank) + bucket + largest
    if max_elements >= whole_part:
        yield NotChecked(f"{feature} in backward: all gradients fit in one reduce bucket")
    else:
        yield Checked(
            feature,
            f"at most {int(max_elements):,} of {whole_part:,} elements in backward",
            f"{backward_elements:,}",
            wrong=backward_elements > max_elements,
        )


def optimizer_state(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, if the plan shards the optimizer's state, that this rank has state for at most its shard of the
    trained parameters. Yields one `Checked`, whose ``wrong`` is whether it has state for more. Yields
    `NotChecked` instead if there is no state, whether the plan shards it or not. Yields nothing with
    expert-parallel, or if there is state and the plan does not shard it."""
    if "expert-parallel" in plan:
        return
    state_elements = sum(max((t.elements for t in s.tensors), default=0) for s in observed.states)
    degree, feature = shard_degree(plan, "optimizer state")
    if not state_elements:
        yield NotChecked("optimizer state: none was found")
    elif degree > 1:
        yield Checked(
            feature,
            f"state for 1/{degree} of {observed.part_elements(observed.trained):,} elements",
            f"state for {state_elements:,}",
            wrong=state_elements > _shard(plan, observed, observed.trained, degree),
        )


def _shard(plan: Plan, observed: Observations, params: Sequence[ObservedParameter], degree: int) -> float:
    """Return the most elements of ``params`` that one of ``degree`` ranks may hold.

    With fsdp2, these are the rank's rows of each parameter, rounded up to whole rows, and parameters that
    FSDP2 ignores (if they have at most 5 % of the elements) as a whole. With sharded-ddp, 1/degree of all and
    (degree - 1)/degree of the largest parameter. Else 1/degree of each, rounded up. If sizes of freed
    parameters are unknown, it is 1/degree of the whole model with any technique. 64 * degree elements are
    added for padding, except with sharded-ddp and known sizes."""
    sizes = [p.whole_elements for p in params]
    if (whole_part := observed.part_elements(params)) > sum(sizes):
        return whole_part / degree + _PADDING * degree
    if "sharded-ddp" in plan:
        return sum(sizes) / degree + max(sizes, default=0) * (degree - 1) / degree
    by_rows = "fsdp2" in plan
    # Parameters that the user lets FSDP2 ignore.
    ignored_names = {p.name for p in params if by_rows and not p.has_mesh}
    if sum(p.whole_elements for p in params if p.name in ignored_names) > _IGNORED_RATIO * sum(sizes):
        ignored_names = set()
    rows = [p.shape[0] if by_rows and p.shape else n for p, n in zip(params, sizes, strict=True)]
    parts = (
        n if p.name in ignored_names else math.ceil(r / degree) * n / max(r, 1)
        for p, r, n in zip(params, rows, sizes, strict=True)
    )
    return sum(parts) + _PADDING * degree


def _overlapping(params: Sequence[ObservedParameter], degree: int, rank: int) -> int:
    """Return the elements of those ``params`` that lie at least partly in one rank's part, if all are
    concatenated and divided evenly among ``degree`` ranks. The part is the one with index ``rank`` modulo
    ``degree``."""
    size = math.ceil(sum(p.whole_elements for p in params) / degree)
    first = size * (rank % degree)
    ends = list(itertools.accumulate(p.whole_elements for p in params))
    return sum(
        end - start for start, end in itertools.pairwise([0, *ends]) if start < first + size and end > first
    )


def _bucket_elements(plan: Plan) -> int:
    """Return the elements of gradients that sharded-ddp keeps on every rank in buckets, one bucket of
    ``reduce_buffer_elements`` for each rank of a shard group; 0 without sharded-ddp."""
    use = plan.get("sharded-ddp")
    return int(use.settings["reduce_buffer_elements"]) * layout(plan).shard if use is not None else 0
