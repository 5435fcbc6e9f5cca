"""Checks of tensor parallelism: what is sharded, and whether sums over its ranks are made."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from memfit.conformance.distributed_checks import near, norms
from memfit.conformance.fingerprints import figures
from memfit.conformance.gradient_mean_check import cut_names
from memfit.conformance.observation import Observation
from memfit.conformance.sharding import from_all, placed, whole
from memfit.conformance.technique_checks import join_values

_ALIKE_RATIO = 1e-3  # relative to a norm: sums over ranks are bitwise equal on all of them, or nearly
_WHOLE_RATIO = 1e-5  # relative difference of norms


def tensor_parallel(step: Observation) -> None:
    """Record whether layers are sharded over the planned number of tensor-parallel ranks, by the elements
    that this rank holds, and, for DTensors, whether each block is sharded (if all blocks have the same size).
    Does nothing with expert-parallel or one tensor-parallel rank.

    If there are no DTensors and the model's size is unknown, this is recorded as not checked, or as a
    difference if all matrices have the same norms on all ranks after a backward pass."""
    degree = step.layout.tensor
    if degree == 1 or step.plan.get("expert-parallel") is not None:
        return
    params = list(step.model.parameters())
    part_elements, has_pipeline = step.part(params), step.layout.pipeline > 1
    # DTensors know their whole size.
    has_dtensors = any(placed(p) for p in params)
    if not has_dtensors and not step.whole_elements:
        matrix_norms = norms(p for p in params if p.dim() > 1)
        has_step = bool(step.graph.backwards)  # before a step, slices may be equal
        if (
            has_step
            and matrix_norms
            and all(near(matrix_norms, rank_norms) for rank_norms in from_all(matrix_norms))
        ):
            step.differs(
                "tensor-parallel",
                f"layers sharded over {degree} ranks",
                "the same matrices on every rank",
                wrong=True,
            )
        else:
            step.unseen(
                "tensor-parallel: how much is sharded: there are no DTensors, "
                "and the size of the whole model is unknown"
            )
        return
    total = (not has_pipeline and step.whole_elements) or sum(p.numel() for p in params)
    max_elements = total * (1 + 1 / degree) / 2  # norms, and sometimes the vocabulary, stay whole
    step.differs(
        "tensor-parallel",
        f"layers sharded over {degree} ranks",
        f"{part_elements:,} of {total:,} elements on a rank",
        wrong=part_elements > max_elements,
    )
    blocks = [list(b.parameters()) for b in step.blocks] if has_dtensors else []
    sizes = [(sum(p.numel() for p in b), sum(map(whole, b))) for b in blocks]
    whole_blocks = [
        i for i, (full_elements, local_elements) in enumerate(sizes) if local_elements == full_elements
    ]
    if sizes and len({full_elements for full_elements, _ in sizes}) == 1:
        step.differs(
            "tensor-parallel: blocks",
            "each is sharded",
            f"blocks {join_values(whole_blocks)} not sharded",
            wrong=bool(whole_blocks),
        )


def summed(step: Observation) -> None:
    """Record whether tensor-parallel ranks get the same output of their last block, which they do if partial
    sums are summed, and whether parameters that are not sharded are equal on them (`_whole_alike`). Does
    nothing with expert-parallel or one tensor-parallel rank. The first is recorded as not checked with
    sequence parallelism or compile, if the output was not observed, or if dropout may explain a
    difference."""
    use = step.plan.get("tensor-parallel")
    if use is None or step.layout.tensor == 1 or step.plan.get("expert-parallel") is not None:
        return
    _whole_alike(step)
    feature = "tensor-parallel: sums over ranks"
    if use.settings["sequence"] or step.plan.get("compile") is not None:
        step.unseen(
            f"{feature}: each rank holds only its part of the blocks' output, or the blocks are compiled"
        )
        return
    group = step.other_coordinates("tensor")
    entries: list[tuple[Any, list[tuple[float, float]]]] = from_all((group, step.left))
    if not all(outputs for _, outputs in entries):  # the same on every rank
        step.unseen(f"{feature}: the output of the last block was not observed")
        return
    own_outputs = next(outputs for entry_group, outputs in entries if entry_group == group)
    deviation = max(
        abs(a - b) / max(size, 1e-300)
        for entry_group, outputs in entries
        if entry_group == group
        for (a, size), (b, _) in zip(own_outputs, outputs, strict=False)
    )
    if deviation > _ALIKE_RATIO and any(_drops(m) for m in step.model.modules()):
        step.unseen(f"{feature}: they differ, but dropout may explain it")
        return
    step.differs(
        feature,
        f"the same output of the last block on {step.layout.tensor} ranks",
        f"{deviation:.1e} apart, relative to the norm",
        wrong=deviation > _ALIKE_RATIO,
    )


def _whole_alike(step: Observation) -> None:
    """Record whether trained parameters that are not sharded have equal norms on all tensor-parallel ranks
    after a step. If not, sums in backward are missing. Recorded as not checked if it is unknown which
    parameters are sharded, if all are, or if dropout may explain a difference."""
    feature = "tensor-parallel: parameters that are not cut"
    params = dict(step.model.named_parameters())
    cut_params = cut_names(step)
    cut_known = any(hasattr(p, "tensor_model_parallel") or placed(p) for p in params.values())
    own_norms = (
        {n: norms([p])[0] for n, p in params.items() if n not in cut_params and p.requires_grad}
        if cut_known
        else {}
    )
    group = step.other_coordinates("tensor")
    entries: list[tuple[Any, dict[str, float]]] = from_all((group, own_norms))
    if not all(rank_norms for _, rank_norms in entries):
        step.unseen(f"{feature}: it is unknown which parameters are sharded")
        return
    differing_names = [
        n
        for entry_group, rank_norms in entries
        if entry_group == group
        for n, value in rank_norms.items()
        if not math.isclose(value, own_norms.get(n, value), rel_tol=_WHOLE_RATIO)
    ]
    if differing_names and any(_drops(m) for m in step.model.modules()):
        step.unseen(f"{feature}: they differ, but dropout may explain it")
        return
    step.differs(
        feature,
        "the same on every rank after a step",
        f"{join_values(differing_names[:3])} differ: sums in backward are missing",
        wrong=bool(differing_names),
    )


def _drops(module: nn.Module) -> bool:
    return bool(module.training and isinstance(p := getattr(module, "p", 0.0), float) and p > 0)


def leaving(out: Any) -> list[tuple[float, float]]:
    """Return a list of one pair, (first fingerprint number, norm), of the first floating-point tensor of at
    least two dimensions in ``out``, what a block returns. Return an empty list if that tensor is sharded or
    there is none."""
    for value in _pytree.tree_leaves(out):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
            continue
        if any(not p.is_replicate() for p in getattr(value, "placements", ())):
            return []
        local = getattr(value, "_local_tensor", value).detach()
        return [(float(figures(local)[0]), float(torch.linalg.vector_norm(local, dtype=torch.float64)))]
    return []
