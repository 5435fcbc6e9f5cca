"""A job with its own batch cut or repeated to another number of samples or another length."""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch
from torch.utils import _pytree

from memfit.model.batch_objects import batch_length
from memfit.model.tensors import tensor_leaves
from memfit.types.errors import UserError
from memfit.types.job import Job


def with_batch_shape(job: Job, rows: int | None = None, length: int | None = None) -> Job:
    """Return the job with a batch of ``rows`` samples of the length ``length``, made from the job's first
    batch by repeating or leaving out samples and positions. None keeps the number of samples or the length.
    Every step gets this batch. The result has neither ``loss_terms`` nor ``tokens_per_batch``, which belong
    to the job's own batches.

    The old length is the most frequent size of dimensions other than the first (`length_of`); each such
    dimension of this size is a length. Raises UserError if a length is given and no tensor has a second
    dimension; if the samples cannot be repeated, because the batch has an object or a list with an element
    for each sample; and if it has no tensor with dimensions, or a nested one.
    """
    batch = job.make_batch(0, 0)
    old_rows = batch_length(batch)
    old_length = 0 if length is None else length_of(job)
    rows = rows or old_rows

    def resized(tensor: torch.Tensor) -> torch.Tensor:
        for dim, size in enumerate(tensor.shape):
            if dim == 0 and size == old_rows:
                tensor = tensor[torch.arange(rows) % old_rows]
            elif dim > 0 and length is not None and size == old_length:
                tensor = tensor.index_select(dim, torch.arange(length) * old_length // length)
        return tensor.contiguous()

    resized_batch = _pytree.tree_map_only(torch.Tensor, resized, batch)
    if batch_length(resized_batch) != rows:
        raise UserError(
            f"the batch of {job.name}, a {type(batch).__name__}, cannot be repeated or cut to {rows} samples "
            "because it is or contains an object, or a list with an element for each sample",
            allowed="tensors whose first dimension is the samples, also in mappings, tuples and lists",
            hint="to find the largest batch, let a function make the job: FILE.py:NAME with the argument "
            "batch, or memfit.largest(lambda n: (model, a batch of n samples))",
        )
    return dataclasses.replace(
        job, make_batch=lambda step, seed: resized_batch, batch_size=rows, loss_terms=None, tokens_per_batch=0
    )


def length_of(job: Job) -> int:
    """Return the length of the samples of the job's first batch: of the sizes of all dimensions but the
    first, over all tensors, the most frequent one; of equally frequent sizes, the largest. Raises UserError
    if no tensor has a second dimension. Tensors in attributes of objects do not count."""
    tensors = tensor_leaves(job.make_batch(0, 0))
    sizes = Counter(size for t in tensors for size in t.shape[1:])
    if not sizes:
        raise UserError(
            f"the batches of {job.name} have no length dimension: none of their tensors has more than one "
            "dimension",
            allowed="tensors of shape (samples, length, ...), also in mappings, tuples and lists, but not in "
            "attributes of objects",
        )
    return max(sizes, key=lambda size: (sizes[size], size))
