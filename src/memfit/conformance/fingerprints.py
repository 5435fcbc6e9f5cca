"""Linear fingerprints of a tensor: the fingerprint of a concatenation is the sum of its parts'
fingerprints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils import _pytree

_AT_ONCE = 2**20  # elements
# Radians per row and per column, for each number of the fingerprint.
TURNS = ((2.4, 1.9), (1.1, 0.83), (0.37, 2.65), (2.9, 0.29))


def real(tensor: torch.Tensor) -> torch.Tensor:
    """Return a complex tensor as a real view with a further, last dimension of 2, other tensors unchanged."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def figures(values: torch.Tensor, start: int = 0, columns: int | None = None) -> torch.Tensor:
    """Return the fingerprint of ``values``, consecutive elements of a tensor, as len(TURNS) float64 numbers.
    The elements begin at index ``start`` of a tensor whose rows (dimension 0) have ``columns`` elements, by
    default as many as those of ``values``. A sparse tensor is a whole one, whose other elements are zero."""
    values = real(values.detach())
    columns = columns or math.prod(values.shape[1:])
    if values.is_sparse:
        return _of_rows(values.coalesce())
    flat = values.reshape(-1)
    head = min(-start % columns, flat.numel())
    body = head + (flat.numel() - head) // columns * columns
    row, first = divmod(start, columns)
    next_row = row + bool(head)
    blocks = (
        (flat[:head].view(1, -1), row, first),
        (flat[head:body].view(-1, columns), next_row, 0),
        (flat[body:].view(1, -1), next_row + (body - head) // columns, 0),
    )
    totals = flat.new_zeros(len(TURNS), dtype=torch.float64)
    for block, block_row, column in blocks:
        if not block.numel():
            continue
        row_weights = _waves(torch.arange(block_row, block_row + block.shape[0], device=block.device), 0)
        column_weights = _waves(torch.arange(column, column + block.shape[1], device=block.device), 1)
        size = max(1, _AT_ONCE // block.shape[1])  # limits the rows of a part, so that copies stay small
        for part, row_part in zip(block.split(size), row_weights.split(size), strict=True):
            totals += ((part.float() @ column_weights) * row_part).sum(0, dtype=torch.float64)
    return totals


def of_inputs(args: Iterable[Any]) -> Iterator[float]:
    """Yield numbers that are equal if two ranks receive the same tensors: sum and norm of this rank's part of
    each floating-point tensor in ``args`` that has at least two dimensions and elements that differ."""
    for value in args:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1:
            local = getattr(value, "_local_tensor", value).detach()
            if local.numel() and local.min() != local.max():
                yield from (float(local.sum(dtype=torch.float64)), float(torch.linalg.vector_norm(local)))


def of_output(out: Any) -> list[tuple[float, float]]:
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


def _of_rows(sparse: torch.Tensor) -> torch.Tensor:
    """Return the fingerprint of a sparse gradient that has only some rows, as embeddings produce."""
    values = sparse.values().reshape(sparse.values().shape[0], -1).float()
    column_weights = _waves(torch.arange(values.shape[1], device=values.device), 1)
    totals: torch.Tensor = ((values @ column_weights) * _waves(sparse.indices()[0], 0)).sum(
        0, dtype=torch.float64
    )
    return totals


def _waves(places: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the weights of row indices (``axis`` 0) or column indices (1) for each number of a fingerprint,
    with shape (places, len(TURNS)). An element's weight is the product of those of its row and column."""
    turns = torch.tensor([pair[axis] for pair in TURNS], dtype=torch.float64, device=places.device)
    return (places.double()[:, None] * turns + 0.5).cos().float()
