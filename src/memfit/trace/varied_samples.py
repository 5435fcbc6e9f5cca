"""Choose a few samples of a job's first batches that differ from each other as much as possible.

A loss may give some samples another weight: those of a rare class, rows that are mostly padding. Whether it
does shows only if such samples are among those that a trial compares.
"""

from __future__ import annotations

import collections
import math
import time
from typing import Any

import torch

from memfit.model.batch_objects import batch_length, batch_tensors, join, select, split
from memfit.types.job import Job

# Where to stop reading batches: samples, batches, bytes, seconds.
_MOST_SAMPLES, _MOST_BATCHES, _MOST_BYTES, _MOST_S = 256, 32, 2**28, 3.0
_MOST_CLASSES = 64  # a tensor with more distinct values holds no classes
_MOST_VALUES = 2**16  # of a tensor that are looked at, at equal distances
_PADDING_SHARE = 0.02  # a value that is less frequent is no padding
# How much it counts that a property is shown: of values below 0, which often mark what a loss ignores, of
# classes and paddings, and of extreme means.
_IGNORED_WEIGHT, _CLASS_WEIGHT, _MEAN_WEIGHT = 2.0, 1.0, 0.1


def varied_samples(job: Job, count: int) -> Any:
    """Return a batch of ``count`` samples (at least 1) from the job's first batches (seed 0), or of as many
    as its first batch has if these are fewer. Further batches are read only as far as they can be joined to
    the first one, up to 256 samples, 32 batches, 256 MiB or 3 s.

    The samples are chosen one by one, so that each shows most of what those before it do not: a class (a
    value of a tensor with at most 64 distinct ones), the most and the fewest negative integers, the most and
    the least padding (the most frequent value), the largest and the smallest mean. What few samples show
    counts more. Chosen samples keep their order. Raises what `batch_length` raises.
    """
    first = job.make_batch(0, 0)
    length = batch_length(first)
    if length < 2:
        return first
    pool = _pool(job, first)
    properties = _properties(pool)
    frequency = collections.Counter(name for shown in properties for name in shown)
    missing = set(frequency)

    def news(sample: int) -> float:
        shown = properties[sample]
        return sum(weight + 1 / frequency[name] for name, weight in shown.items() if name in missing)

    chosen: list[int] = []
    while len(chosen) < min(count, length):
        best = max((i for i in range(len(properties)) if i not in chosen), key=news)
        chosen.append(best)
        missing -= properties[best].keys()
    return select(pool, sorted(chosen))


def _pool(job: Job, first: Any) -> Any:
    """Return the first batches joined into one, cut to 256 samples. ``first``: the first of them. Raises what
    `batch_length` raises."""
    batches, length, start = [first], batch_length(first), time.monotonic()
    size_bytes = sum(t.numel() * t.element_size() for t in batch_tensors(first))
    while len(batches) < _MOST_BATCHES and length < _MOST_SAMPLES:
        is_large = size_bytes * (len(batches) + 1) > _MOST_BYTES
        if is_large or time.monotonic() - start > _MOST_S:
            break
        batch = job.make_batch(len(batches), 0)
        if batch is first or join(first, batch) is None:
            break
        batches.append(batch)
        length += batch_length(batch)
    pool = join(*batches) if len(batches) > 1 else first
    return select(pool, range(min(length, _MOST_SAMPLES)))


def _properties(pool: Any) -> list[dict[Any, float]]:
    """Return, for each sample of ``pool``, {property that it shows: how much this counts}."""
    length = batch_length(pool)
    rows = [batch_tensors(part) for part in split(pool, length)]
    properties: list[dict[Any, float]] = [{} for _ in range(length)]
    for place, tensors in enumerate(zip(*rows, strict=True)):
        if tensors[0] is tensors[1] or tensors[0].is_complex() or not all(t.numel() for t in tensors):
            continue  # a tensor of the whole batch, or one without properties
        few = [t.detach().flatten()[:: 1 + t.numel() // _MOST_VALUES] for t in tensors]
        for shown, added in zip(properties, _of_tensors(few), strict=True):
            shown.update({(place, name): weight for name, weight in added.items()})
    return properties


def _of_tensors(tensors: list[torch.Tensor]) -> list[dict[Any, float]]:
    """Return, for each of ``tensors`` (one per sample, of equal meaning), {property that it shows: how much
    this counts}: its classes, and whether it has the lowest or the highest mean, padding or (of integers)
    share of values below 0."""
    properties: list[dict[Any, float]] = [{} for _ in tensors]
    values = torch.cat(tensors)
    distinct, counts = values[:: 1 + len(values) // _MOST_VALUES].unique(return_counts=True)
    if len(distinct) <= _MOST_CLASSES:
        for shown, tensor in zip(properties, tensors, strict=True):
            for value in tensor.unique().tolist():
                shown["class", value] = _IGNORED_WEIGHT if value < 0 else _CLASS_WEIGHT
    measures = {"mean": (_MEAN_WEIGHT, [t.double().mean() for t in tensors])}
    if counts.max() > _PADDING_SHARE * counts.sum():
        padding = distinct[counts.argmax()]
        measures["padding"] = _CLASS_WEIGHT, [(t == padding).double().mean() for t in tensors]
    if not values.is_floating_point():
        measures["ignored"] = _IGNORED_WEIGHT, [(t < 0).double().mean() for t in tensors]
    for name, (weight, means) in measures.items():
        numbers = [float(m) for m in means]
        if all(map(math.isfinite, numbers)) and min(numbers) < max(numbers):
            for extreme in (min(numbers), max(numbers)):
                properties[numbers.index(extreme)][name, extreme] = weight
    return properties
