"""Checks of tensor parallelism: what is sharded, and whether sums over its ranks are made."""

from __future__ import annotations

import math
from collections.abc import Iterator

from memfit.conformance.distributed_checks import near
from memfit.conformance.findings import Checked, CheckFinding, NotChecked, join_values
from memfit.conformance.observation import Observations, RankObservation
from memfit.techniques.rank_mesh import layout
from memfit.types.plan import Plan

_ALIKE_RATIO = 1e-3  # relative to a norm: sums over ranks are bitwise equal on all of them, or nearly
_WHOLE_RATIO = 1e-5  # relative difference of norms


def tensor_parallel(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether layers are sharded over the planned number n of tensor-parallel ranks: this rank holds at
    most (1 + 1/n)/2 of the model's elements, as some parameters stay whole. With DTensors and blocks of equal
    size, also check that each block is sharded. Yields nothing with expert-parallel or one tensor-parallel
    rank.

    If there are no DTensors and the size of the whole model is unknown, yields `NotChecked`; but a difference
    if all matrices have the same norms on all ranks after a backward pass."""
    mesh = layout(plan)
    if mesh.tensor == 1 or "expert-parallel" in plan:
        return
    # DTensors know their whole size.
    has_dtensors = any(p.has_mesh for p in observed.parameters)
    if not has_dtensors and not observed.model_elements:
        yield _by_matrices(observed, mesh.tensor)
        return
    part_elements = observed.part_elements(observed.parameters)
    has_pipeline = mesh.pipeline > 1
    total = (not has_pipeline and observed.model_elements) or sum(p.elements for p in observed.parameters)
    max_elements = total * (1 + 1 / mesh.tensor) / 2  # norms, and sometimes the vocabulary, stay whole
    yield Checked(
        "tensor-parallel",
        f"layers sharded over {mesh.tensor} ranks",
        f"{part_elements:,} of {total:,} elements on a rank",
        wrong=part_elements > max_elements,
    )
    blocks = observed.block_parameters if has_dtensors else ()
    sizes = [(sum(p.elements for p in b), sum(p.whole_elements for p in b)) for b in blocks]
    whole_blocks = [
        i for i, (full_elements, local_elements) in enumerate(sizes) if local_elements == full_elements
    ]
    if sizes and len({full_elements for full_elements, _ in sizes}) == 1:
        yield Checked(
            "tensor-parallel: blocks",
            "each is sharded",
            f"blocks {join_values(whole_blocks)} not sharded",
            wrong=bool(whole_blocks),
        )


def _by_matrices(observed: Observations, degree: int) -> CheckFinding:
    """Return a difference if a backward pass was observed and all matrices have the same norms on all ranks,
    which means that they are whole. Else return `NotChecked`: before a step, shards may have equal norms,
    too."""
    norms = observed.this_rank.matrix_norms
    has_step = bool(observed.saved.backwards)
    if has_step and norms and all(near(norms, r.matrix_norms) for r in observed.ranks):
        return Checked(
            "tensor-parallel",
            f"layers sharded over {degree} ranks",
            "the same matrices on every rank",
            wrong=True,
        )
    return NotChecked(
        "tensor-parallel: how much is sharded: there are no DTensors, "
        "and the size of the whole model is unknown"
    )


def sums_over_ranks(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether tensor-parallel ranks have equal parameters that are not sharded (`_whole_alike`), and
    whether their last blocks have the same output, which they have if partial sums are summed over the ranks.

    The second yields `NotChecked` with sequence parallelism or compile, if the output was not observed, or if
    outputs differ and dropout may explain it. Yields nothing without tensor-parallel, with expert-parallel,
    or with one tensor-parallel rank."""
    use, degree = plan.get("tensor-parallel"), layout(plan).tensor
    if use is None or degree == 1 or "expert-parallel" in plan:
        return
    yield _whole_alike(observed)
    feature = "tensor-parallel: sums over ranks"
    if use.settings["sequence"] or "compile" in plan:
        yield NotChecked(
            f"{feature}: each rank holds only its part of the blocks' output, or the blocks are compiled"
        )
        return
    if not all(r.block_outputs for r in observed.ranks):  # the same on every rank
        yield NotChecked(f"{feature}: the output of the last block was not observed")
        return
    partners = _tensor_partners(observed)
    deviation = max(
        abs(a - b) / max(size, 1e-300)
        for rank in partners
        for (a, size), (b, _) in zip(partners[0].block_outputs, rank.block_outputs, strict=False)
    )
    if deviation > _ALIKE_RATIO and observed.has_dropout:
        yield NotChecked(f"{feature}: they differ, but dropout may explain it")
        return
    yield Checked(
        feature,
        f"the same output of the last block on {degree} ranks",
        f"{deviation:.1e} apart, relative to the norm",
        wrong=deviation > _ALIKE_RATIO,
    )


def _tensor_partners(observed: Observations) -> list[RankObservation]:
    """Return the observations of the ranks of this rank's tensor-parallel group, its own included."""
    group = observed.this_rank.other_coordinates("tensor")
    return [r for r in observed.ranks if r.other_coordinates("tensor") == group]


def _whole_alike(observed: Observations) -> CheckFinding:
    """Check whether trained parameters that are not sharded have equal norms on all ranks of the
    tensor-parallel group after a step, within a relative 1e-5. If not, sums in backward are missing. Return
    `NotChecked` if on some rank it is unknown which parameters are sharded, all are, or no norm was measured,
    and if norms differ and dropout may explain it."""
    feature = "tensor-parallel: parameters that are not cut"
    if not all(map(_whole_norms, observed.ranks)):
        return NotChecked(f"{feature}: it is unknown which parameters are sharded")
    norms = _whole_norms(observed.this_rank)
    differing_names = [
        n
        for rank in _tensor_partners(observed)
        for n, value in _whole_norms(rank).items()
        if not math.isclose(value, norms.get(n, value), rel_tol=_WHOLE_RATIO)
    ]
    if differing_names and observed.has_dropout:
        return NotChecked(f"{feature}: they differ, but dropout may explain it")
    return Checked(
        feature,
        "the same on every rank after a step",
        f"{join_values(differing_names[:3])} differ: sums in backward are missing",
        wrong=bool(differing_names),
    )


def _whole_norms(rank: RankObservation) -> dict[str, float]:
    """Return name -> norm of the trained parameters that tensor parallelism does not shard, as far as it was
    measured. It is empty if it is unknown which parameters these are."""
    if rank.tensor_sharded is None:
        return {}
    return {n: norm for n, norm in rank.norms.items() if n not in rank.tensor_sharded}
