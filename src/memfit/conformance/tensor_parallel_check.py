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
from memfit.conformance.technique_checks import told

_ALIKE_RATIO = 1e-3  # relative to a norm: sums over ranks are bitwise equal on all of them, or nearly
_WHOLE_RATIO = 1e-5  # relative difference of norms


def tensor_parallel(step: Observation) -> None:
    """Check that layers are sharded over the planned number of ranks."""
    degree = step.layout.tensor
    if degree == 1 or step.plan.get("expert-parallel") is not None:
        return
    params = list(step.model.parameters())
    part, staged = step.part(params), step.layout.pipeline > 1
    # DTensors know their whole size.
    known = any(placed(p) for p in params)
    if not known and not step.whole_elements:
        matrices = norms(p for p in params if p.dim() > 1)
        stepped = bool(step.graph.backwards)  # before a step, slices may be equal
        if stepped and matrices and all(near(matrices, other) for other in from_all(matrices)):
            step.differs(
                "tensor-parallel",
                f"layers cut over {degree} ranks",
                "the same matrices on every rank",
                wrong=True,
            )
        else:
            step.unseen("tensor-parallel: how much is cut: neither DTensors nor the whole model are known")
        return
    total = (not staged and step.whole_elements) or sum(p.numel() for p in params)
    most = total * (1 + 1 / degree) / 2  # norms, and sometimes the vocabulary, stay whole
    step.differs(
        "tensor-parallel",
        f"layers cut over {degree} ranks",
        f"{part:,} of {total:,} elements on a rank",
        wrong=part > most,
    )
    blocks = [list(b.parameters()) for b in step.blocks] if known else []
    sizes = [(sum(p.numel() for p in b), sum(map(whole, b))) for b in blocks]
    left = [i for i, (of, here) in enumerate(sizes) if here == of]
    if sizes and len({of for of, _ in sizes}) == 1:
        step.differs("tensor-parallel: blocks", "each is cut", f"blocks {told(left)} whole", wrong=bool(left))


def summed(step: Observation) -> None:
    """Check that tensor-parallel ranks get the same output of their last block, so that partial sums are
    summed."""
    used = step.plan.get("tensor-parallel")
    if used is None or step.layout.tensor == 1 or step.plan.get("expert-parallel") is not None:
        return
    _whole_alike(step)
    feature = "tensor-parallel: sums over ranks"
    if used.settings["sequence"] or step.plan.get("compile") is not None:
        step.unseen(f"{feature}: ranks hold other parts of what blocks give out, or blocks are compiled")
        return
    group = step.beside("tensor")
    every: list[tuple[Any, list[tuple[float, float]]]] = from_all((group, step.left))
    if not all(left for _, left in every):  # the same on every rank
        step.unseen(f"{feature}: what the last block gives out was not seen")
        return
    own = next(left for other, left in every if other == group)
    apart = max(
        abs(a - b) / max(size, 1e-300)
        for other, left in every
        if other == group
        for (a, size), (b, _) in zip(own, left, strict=False)
    )
    if apart > _ALIKE_RATIO and any(_drops(m) for m in step.model.modules()):
        step.unseen(f"{feature}: dropout may differ")
        return
    step.differs(
        feature,
        f"the same output of the last block on {step.layout.tensor} ranks",
        f"{apart:.1e} apart",
        wrong=apart > _ALIKE_RATIO,
    )


def _whole_alike(step: Observation) -> None:
    """Check that parameters that are not sharded are equal on all tensor-parallel ranks after a step. If not,
    sums in backward are missing."""
    feature = "tensor-parallel: parameters that are not cut"
    params = dict(step.model.named_parameters())
    cut = cut_names(step)
    named = any(hasattr(p, "tensor_model_parallel") or placed(p) for p in params.values())
    own = {n: norms([p])[0] for n, p in params.items() if n not in cut and p.requires_grad} if named else {}
    group = step.beside("tensor")
    every: list[tuple[Any, dict[str, float]]] = from_all((group, own))
    if not all(of_rank for _, of_rank in every):
        step.unseen(f"{feature}: which they are is not known")
        return
    apart = [
        n
        for other, of_rank in every
        if other == group
        for n, value in of_rank.items()
        if not math.isclose(value, own.get(n, value), rel_tol=_WHOLE_RATIO)
    ]
    if apart and any(_drops(m) for m in step.model.modules()):
        step.unseen(f"{feature}: dropout may differ")
        return
    step.differs(
        feature,
        "the same on every rank after a step",
        f"{told(apart[:3])} apart: sums in backward",
        wrong=bool(apart),
    )


def _drops(module: nn.Module) -> bool:
    return bool(module.training and isinstance(p := getattr(module, "p", 0.0), float) and p > 0)


def leaving(out: Any) -> list[tuple[float, float]]:
    """Return (first fingerprint number, norm) of the first tensor that a block returns, or nothing if it is
    sharded."""
    for value in _pytree.tree_leaves(out):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
            continue
        if any(not p.is_replicate() for p in getattr(value, "placements", ())):
            return []
        local = getattr(value, "_local_tensor", value).detach()
        return [(float(figures(local)[0]), float(torch.linalg.vector_norm(local, dtype=torch.float64)))]
    return []
