"""Check that data-parallel ranks train on different samples, and that ranks that share a sample read each
other's parts."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from typing import Any

import torch.distributed as dist

from memfit.conformance.observation import Observation
from memfit.conformance.sharding import from_all

_EQUAL_RATIO = 1e-6  # of losses of the same samples
_DATA_PARALLEL = ("ddp", "fsdp2", "zero", "sharded-ddp")


@dataclasses.dataclass(frozen=True, slots=True)
class _Rank:
    rank: int
    group: tuple[int, ...]  # its coordinates along all dimensions except those of data
    given: tuple[str, ...]
    several: bool
    ends: tuple[float, ...]


def different_samples(step: Observation) -> None:
    """Record whether all data-parallel ranks train on different samples, by the inputs of their models. Two
    ranks with the same inputs and losses are a difference if the inputs contain more than one sample.
    Recorded as not checked if no inputs were observed on some rank, or if ranks get the same inputs, but
    these are only one sample or the losses differ. Does nothing with one data-parallel rank."""
    if step.layout.data == 1:
        return
    technique = next((u.technique for u in step.plan.uses if u.technique in _DATA_PARALLEL), "replicas")
    feature, group = f"{technique}: samples", step.other_coordinates("replicate", "shard")
    all_ranks: list[_Rank] = from_all(
        _Rank(dist.get_rank(), group, tuple(step.samples.given), step.samples.several, tuple(step.graph.ends))
    )
    if not all(r.given for r in all_ranks):  # the same on every rank
        step.unseen(f"{feature}: no inputs of the model were observed")
        return
    ranks_by_inputs = collections.defaultdict[Any, list[_Rank]](list)
    for rank in all_ranks:
        ranks_by_inputs[rank.group, rank.given].append(rank)
    pairs = [pair for ranks in ranks_by_inputs.values() for pair in itertools.combinations(ranks, 2)]
    certain_pairs = [pair for pair in pairs if pair[0].several and _same_ends(*pair)]
    if pairs and not certain_pairs:
        step.unseen(
            f"{feature}: some ranks get the same inputs, but these are one sample only, or the losses differ"
        )
        return
    ranks = sorted({r.rank for pair in certain_pairs for r in pair})
    step.differs(
        feature,
        f"different samples on each of {step.layout.data} data-parallel ranks",
        f"the same samples on ranks {', '.join(map(str, ranks[:8]))}",
        wrong=bool(certain_pairs),
    )


def _same_ends(a: _Rank, b: _Rank) -> bool:
    return (
        bool(a.ends)
        and len(a.ends) == len(b.ends)
        and all(math.isclose(x, y, rel_tol=_EQUAL_RATIO) for x, y in zip(a.ends, b.ends, strict=True))
    )


def other_parts(step: Observation) -> None:
    """Record, with context or axial parallelism, whether some block reads the other ranks' parts of a sample.
    Recorded as not checked if no block was observed in which the output at some positions depends on the
    input at others."""
    use = step.plan.get("context-parallel") or step.plan.get("axial-parallel")
    if use is None or step.layout.context == 1:
        return
    feature = f"{use.technique}: attention"
    if not (step.reach.reached or step.reach.own):  # the same on every rank
        step.unseen(f"{feature}: no block was observed whose output mixes positions")
        return
    step.differs(
        feature,
        "blocks whose output depends on the other ranks' part of a sample",
        f"none; {step.reach.own} depend only on the rank's own part",
        wrong=not step.reach.reached,
    )
