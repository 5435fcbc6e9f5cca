"""What a rank trains on: digests of what its model is given, and what its passes end in."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils import _pytree

from memfit.measure.held import from_all

if TYPE_CHECKING:
    from memfit.measure.conform import Watch

_LOOKS = 16  # forward passes of one step
_EQUAL_RATIO = 1e-6  # losses of the same samples
_DATA_PARALLEL = ("ddp", "fsdp2", "zero", "sharded-ddp")


@dataclasses.dataclass(slots=True)
class Samples:
    """``given``: one digest a forward pass. ``several``: whether more than one sample is among them: two
    ranks may be given the same one by chance, but not the same two."""

    given: list[str] = dataclasses.field(default_factory=list)
    several: bool = False

    def hear(self, args: Any, kwargs: Any) -> None:
        leaves = [t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        tensors = [getattr(t, "_local_tensor", t).detach() for t in leaves]
        tensors = [t for t in tensors if t.numel() and t.dim() and not t.is_meta]
        if not tensors or len(self.given) == _LOOKS:
            return
        count = tensors[0].shape[0]
        self.several |= any(t.shape[0] == count and bool((t != t[:1]).any()) for t in tensors)
        self.given.append(_digest(tensors))
        self.several |= len(set(self.given)) > 1


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@dataclasses.dataclass(frozen=True, slots=True)
class _Rank:
    rank: int
    group: tuple[int, ...]  # its place along all dimensions but those of data
    given: tuple[str, ...]
    several: bool
    ends: tuple[float, ...]


def different_samples(watch: Watch) -> None:
    """Ranks of data parallelism train on different samples."""
    if watch.layout.data == 1:
        return
    used = next((u.technique for u in watch.plan.uses if u.technique in _DATA_PARALLEL), "replicas")
    feature, group = f"{used}: samples", watch.beside("replicate", "shard")
    every: list[_Rank] = from_all(
        _Rank(
            dist.get_rank(), group, tuple(watch.samples.given), watch.samples.several, tuple(watch.graph.ends)
        )
    )
    if not all(r.given for r in every):  # the same on every rank
        watch.unseen(f"{feature}: nothing that the model is given was heard")
        return
    alike = collections.defaultdict[Any, list[_Rank]](list)
    for one in every:
        alike[one.group, one.given].append(one)
    pairs = [pair for ranks in alike.values() for pair in itertools.combinations(ranks, 2)]
    sure = [pair for pair in pairs if pair[0].several and _same_ends(*pair)]
    if pairs and not sure:
        watch.unseen(f"{feature}: some ranks are given the same: one sample, or other targets, or dropout")
        return
    ranks = sorted({r.rank for pair in sure for r in pair})
    watch.differs(
        feature, f"others on each of {watch.layout.data} data-parallel ranks",
        f"the same on ranks {', '.join(map(str, ranks[:8]))}", wrong=bool(sure),
    )  # fmt: skip


def _same_ends(a: _Rank, b: _Rank) -> bool:
    return bool(a.ends) and len(a.ends) == len(b.ends) and all(
        math.isclose(x, y, rel_tol=_EQUAL_RATIO) for x, y in zip(a.ends, b.ends, strict=True)
    )  # fmt: skip
