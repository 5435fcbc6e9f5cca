"""Check that data-parallel ranks train on different samples, and that ranks that share a sample read each
other's parts."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from memfit.conformance.findings import Checked, CheckFinding, NotChecked
from memfit.conformance.observation import Observations
from memfit.techniques.rank_mesh import layout
from memfit.types.plan import Plan

_EQUAL_RATIO = 1e-6  # of losses of the same samples
_DATA_PARALLEL = ("ddp", "fsdp2", "zero", "sharded-ddp")


def different_samples(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether all data-parallel ranks train on different samples, by digests of the inputs of their
    models. Two ranks of a group are a difference if their inputs are the same, contain more than one sample,
    and give the same losses.

    Yields `NotChecked` if no inputs were observed on some rank, or if ranks get the same inputs, but for each
    pair of them these are only one sample or the losses differ. Yields nothing with one data-parallel
    rank."""
    if (degree := layout(plan).data) == 1:
        return
    technique = next((u.technique for u in plan.uses if u.technique in _DATA_PARALLEL), "replicas")
    feature = f"{technique}: samples"
    if not all(r.inputs.digests for r in observed.ranks):  # the same on every rank
        yield NotChecked(f"{feature}: no inputs of the model were observed")
        return
    ranks_by_inputs = collections.defaultdict[Any, list[int]](list)
    for index, rank in enumerate(observed.ranks):
        group = rank.other_coordinates("replicate", "shard")
        ranks_by_inputs[group, rank.inputs.digests].append(index)
    pairs = [pair for ranks in ranks_by_inputs.values() for pair in itertools.combinations(ranks, 2)]
    certain_pairs = [
        (a, b)
        for a, b in pairs
        if observed.ranks[a].inputs.several and _equal(observed.ranks[a].losses, observed.ranks[b].losses)
    ]
    if pairs and not certain_pairs:
        yield NotChecked(
            f"{feature}: some ranks get the same inputs, but these are one sample only, or the losses differ"
        )
        return
    ranks = sorted({index for pair in certain_pairs for index in pair})
    yield Checked(
        feature,
        f"different samples on each of {degree} data-parallel ranks",
        f"the same samples on ranks {', '.join(map(str, ranks[:8]))}",
        wrong=bool(certain_pairs),
    )


def _equal(a: Sequence[float], b: Sequence[float]) -> bool:
    """Return whether ``a`` and ``b``, losses, are not empty, of equal length and pairwise equal within a
    relative 1e-6."""
    return (
        bool(a)
        and len(a) == len(b)
        and all(math.isclose(x, y, rel_tol=_EQUAL_RATIO) for x, y in zip(a, b, strict=True))
    )


def other_parts(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, with context-parallel or axial-parallel, whether some block reads the other ranks' parts of a
    sample. Yields `NotChecked` if no block was observed whose output at some positions depends on the input
    at others. Yields nothing if samples are not divided among ranks."""
    use = plan.get("context-parallel") or plan.get("axial-parallel")
    if use is None or layout(plan).context == 1:
        return
    feature, reads = f"{use.technique}: attention", observed.reads
    if not (reads.reached or reads.local_only):  # the same on every rank
        yield NotChecked(f"{feature}: no block was observed whose output mixes positions")
        return
    yield Checked(
        feature,
        "blocks whose output depends on the other ranks' part of a sample",
        f"none; {reads.local_only} depend only on the rank's own part",
        wrong=not reads.reached,
    )
