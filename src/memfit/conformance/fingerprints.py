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


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """Return a complex tensor as a view of its real and imaginary parts, with a further, last dimension of 2.
    Return other tensors unchanged."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def fingerprint(values: torch.Tensor, start: int = 0, columns: int | None = None) -> torch.Tensor:
    """Return the fingerprint of ``values``: len(TURNS) float64 numbers, each a sum of the elements with other
    weights, which depend on row and column. Fingerprints of the parts of a tensor add up to that of the
    tensor.

    ``values`` are consecutive elements of a tensor, from index ``start`` of the flattened tensor on. Its rows
    (the elements of one index along dimension 0) have ``columns`` elements, by default those of ``values``. A
    sparse ``values`` is taken for a whole tensor whose other elements are zero; ``start`` and ``columns`` are
    ignored then."""
    values = as_real(values.detach())
    columns = columns or math.prod(values.shape[1:]) or 1  # a tensor without elements
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
    """Yield the sum, then the norm of each tensor in ``args``, so that ranks with the same inputs yield the
    same numbers. Only floating-point tensors with at least two dimensions are used whose elements on this
    rank are not all equal; of a DTensor, the elements on this rank."""
    for value in args:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1:
            local = getattr(value, "_local_tensor", value).detach()
            if local.numel() and local.min() != local.max():
                yield from (float(local.sum(dtype=torch.float64)), float(torch.linalg.vector_norm(local)))


def of_output(out: Any) -> list[tuple[float, float]]:
    """Return [(first number of the fingerprint, norm)] of the first floating-point tensor with at least two
    dimensions in ``out``, the output of a block. Return [] if there is none, or if it is a DTensor that is
    not replicated over its whole mesh."""
    for value in _pytree.tree_leaves(out):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
            continue
        if any(not p.is_replicate() for p in getattr(value, "placements", ())):
            return []
        local = getattr(value, "_local_tensor", value).detach()
        return [(float(fingerprint(local)[0]), float(torch.linalg.vector_norm(local, dtype=torch.float64)))]
    return []


def _of_rows(sparse: torch.Tensor) -> torch.Tensor:
    """Return the fingerprint of a coalesced sparse tensor that stores some of its rows, as gradients of
    embeddings do."""
    values = sparse.values().reshape(sparse.values().shape[0], -1).float()
    column_weights = _waves(torch.arange(values.shape[1], device=values.device), 1)
    totals: torch.Tensor = ((values @ column_weights) * _waves(sparse.indices()[0], 0)).sum(
        0, dtype=torch.float64
    )
    return totals


def _waves(places: torch.Tensor, axis: int) -> torch.Tensor:
    """Return a weight between -1 and 1 for each of ``places``, indices of rows (``axis`` 0) or of columns
    (``axis`` 1), and for each number of a fingerprint. The shape is (number of places, len(TURNS)). An
    element's weight is the product of the weights of its row and its column."""
    turns = torch.tensor([pair[axis] for pair in TURNS], dtype=torch.float64, device=places.device)
    return (places.double()[:, None] * turns + 0.5).cos().float()
