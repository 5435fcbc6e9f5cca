"""The Evoformer (Jumper et al. 2021, supplementary algorithms 6 to 19).

Shapes: ``m`` (batch, rows, residues, c_m) is the MSA representation, ``z`` (batch, residues, residues, c_z)
the pair representation. Masks are 1 where there is a residue, 0 at padding: ``rows`` (batch, rows, residues),
``pairs`` (batch, residues, residues). What can be cut into independent slices (attention rows, transitions,
parts of an outer product) is a separate module, so that chunking finds it.

Several ranks may share a sample (techniques/axial.py): ``m`` and ``z`` are then this rank's part along
dimension 1, masks are whole.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from memfit.techniques.axial import Axial

MASKED: Final = -1e9  # AlphaFold's; larger than float16 can hold
_COUNT_EPS: Final = 1e-3  # of algorithm 10, where a pair of residues shares no row


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Channels and heads of a stack of blocks of AlphaFold 2. ``c_m``, ``c_z``: channels of the MSA and of
    the pair representation. ``msa_heads``, ``pair_heads``: attention heads of each; ``msa_head_width``,
    ``pair_head_width``: channels of one head. ``triangle``, ``outer``: hidden channels of a triangle
    multiplication and of an outer product. ``transition``: how many times as wide as its input the hidden
    layer of a transition is. ``dropout``: probabilities for (updates of the MSA, updates of the pairs).
    ``global_columns``: whether attention along columns has one query per column (algorithm 19 of AlphaFold
    2), as in the extra-MSA stack."""

    c_m: int
    c_z: int
    msa_heads: int
    msa_head_width: int
    pair_heads: int = 4
    pair_head_width: int = 32
    triangle: int = 128
    outer: int = 32
    transition: int = 4
    dropout: tuple[float, float] = (0.15, 0.25)
    global_columns: bool = False


class Attention(nn.Module):
    """Gated multi-head attention of x (..., n, width) along n, which is layer-normalized first. Returns a
    tensor of the shape of x. ``biases``, any number of tensors, must broadcast to (..., heads, n, n); each is
    added to the logits."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads, self.scale = heads, head_width**-0.5
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.gate, self.out = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor, *biases: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        query, key, value = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3) for p in (self.query, self.key, self.value)
        )
        logits = (query * self.scale) @ key.transpose(-1, -2)
        del query, key
        for bias in biases:
            logits += bias  # in place: a product's result is not kept for backward
        context = logits.softmax(-1) @ value
        del logits, value
        context = context.transpose(-2, -3).flatten(-2)
        return self.out(torch.sigmoid(self.gate(x)) * context)  # type: ignore[no-any-return]


class GlobalAttention(nn.Module):
    """Gated multi-head attention of x (..., n, width) along n, which is layer-normalized first (algorithm 19
    of AlphaFold 2). Each head has a single query, computed from the mean of x over the places where ``mask``
    (..., n) is 1; places where it is 0 are not attended to. Returns a tensor of the shape of x: each place
    has a gate of its own."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads, self.scale = heads, head_width**-0.5
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key, self.value = (nn.Linear(width, head_width, bias=False) for _ in range(2))
        self.gate, self.out = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        weights = mask.unsqueeze(-1)
        mean = (x * weights).sum(-2) / (weights.sum(-2) + 1e-5)
        query = (self.query(mean) * self.scale).unflatten(-1, (self.heads, -1))
        logits = query @ self.key(x).transpose(-1, -2) + ((mask - 1) * -MASKED).unsqueeze(-2)
        context = logits.softmax(-1) @ self.value(x)
        gate = torch.sigmoid(self.gate(x)).unflatten(-1, (self.heads, -1))
        return self.out((gate * context.unsqueeze(-3)).flatten(-2))  # type: ignore[no-any-return]


class PairBias(nn.Module):
    """Computes the bias (batch, 1, heads, residues, residues) of an attention from the pair representation z
    (batch, residues, residues, width): a linear layer of ``norm(z)``. The layer norm ``norm`` may be shared
    with an attention whose input is z."""

    def __init__(self, norm: nn.LayerNorm, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.weight = norm, nn.Linear(width, heads, bias=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.weight(self.norm(z)).permute(0, 3, 1, 2).unsqueeze(1)  # type: ignore[no-any-return]


class RowAttention(Axial):
    """Algorithm 7 of AlphaFold 2: returns the update of the MSA ``m`` (batch, rows, residues, c_m). Every row
    attends along residues, with a bias from the pair representation ``z``. The mask ``rows`` (batch, rows,
    residues) is 0 at padding. If ranks share a sample, ``m`` holds this rank's rows, ``z`` its slice of
    dimension 1, and ``rows`` must hold only the rows that ``m`` has."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.attention = Attention(widths.c_m, widths.msa_heads, widths.msa_head_width)
        self.bias = PairBias(nn.LayerNorm(widths.c_z), widths.c_z, widths.msa_heads)

    def forward(self, m: torch.Tensor, z: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        mask_bias = ((rows - 1) * -MASKED)[:, :, None, None, :]
        return self.attention(m, mask_bias, self.across.gathered(self.bias(z), 3, z.shape[2]))  # type: ignore[no-any-return]


class ColumnAttention(nn.Module):
    """Algorithm 8 of AlphaFold 2, or 19 if ``widths.global_columns``: returns the update of the MSA ``m``
    (batch, rows, residues, c_m). Every column, which belongs to one residue, attends along rows. The mask
    ``rows`` (batch, rows, residues) is 0 at padding. If ranks share a sample, both hold this rank's residues.
    """

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.one_query = widths.global_columns
        kind = GlobalAttention if self.one_query else Attention
        self.attention = kind(widths.c_m, widths.msa_heads, widths.msa_head_width)

    def forward(self, m: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        columns, column_mask = m.transpose(1, 2), rows.transpose(1, 2)
        if not self.one_query:
            column_mask = ((column_mask - 1) * -MASKED)[:, :, None, None, :]
        return self.attention(columns, column_mask).transpose(1, 2)  # type: ignore[no-any-return]


class Transition(nn.Module):
    """Algorithms 9 and 15 of AlphaFold 2: a layer norm and a two-layer perceptron with ReLU at each position
    of x (..., width). Its hidden layer is ``factor`` times as wide. Returns the update of x, without the
    residual."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, factor * width), nn.Linear(factor * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class OuterProduct(Axial):
    """The outer products of left (batch, rows, i, c) and right (batch, rows, j, c), summed over rows, and
    mapped by a linear layer to (batch, i, j, c_z). ``length``: number of residues. If ranks share a sample,
    left and right hold only this rank's residues; the result then has this rank's i and all ``length`` j."""

    def __init__(self, width: int, c_z: int) -> None:
        super().__init__()
        self.out = nn.Linear(width * width, c_z)

    def forward(self, left: torch.Tensor, right: torch.Tensor, length: int) -> torch.Tensor:
        return self.out(self.across.product("bsic,bsjd->bijcd", left, right, 2, length).flatten(-2))  # type: ignore[no-any-return]


class OuterProductMean(Axial):
    """Algorithm 10 of AlphaFold 2: returns the update of the pair representation from the MSA ``m`` (batch,
    rows, residues, c_m): for each two residues, the outer products of their left and right channels are
    summed over the rows, mapped to c_z channels, and divided by the number of rows that have both residues.
    The mask ``rows`` (batch, rows, residues) is 0 at padding. If ranks share a sample, ``m`` holds this
    rank's residues; the mask always has all residues.
    """

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(widths.c_m)
        self.left, self.right = (nn.Linear(widths.c_m, widths.outer) for _ in range(2))
        self.product = OuterProduct(widths.outer, widths.c_z)

    def forward(self, m: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        m, own_rows = self.norm(m), self.across.own(rows, 2)
        weights = own_rows.unsqueeze(-1)
        product = self.product(self.left(m) * weights, self.right(m) * weights, rows.shape[2])
        count = torch.einsum("bsi,bsj->bij", own_rows, rows).unsqueeze(-1)
        return product / (count + _COUNT_EPS)  # type: ignore[no-any-return]


class Gated(nn.Module):
    """A linear layer of x (..., width) to ``to`` channels, multiplied by the sigmoid of a second one and by
    the ``mask`` (..., 1), which is 0 at padding."""

    def __init__(self, width: int, to: int) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(width, to), nn.Linear(width, to)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return mask * torch.sigmoid(self.gate(x)) * self.value(x)  # type: ignore[no-any-return]


class TriangleMultiplication(Axial):
    """Triangle multiplication of AlphaFold 2: returns the update of the pair representation z (batch,
    residues, residues, c_z) by algorithm 11 (``outgoing`` edges) or 12 (incoming edges). The mask ``pairs``
    (batch, residues, residues) is 0 at padding. If ranks share a sample, z is this rank's slice of dimension
    1; the mask is always whole."""

    def __init__(self, widths: Widths, *, outgoing: bool) -> None:
        super().__init__()
        self.outgoing = outgoing
        self.norm, self.norm_out = nn.LayerNorm(widths.c_z), nn.LayerNorm(widths.triangle)
        self.left, self.right = (Gated(widths.c_z, widths.triangle) for _ in range(2))
        self.gate, self.out = nn.Linear(widths.c_z, widths.c_z), nn.Linear(widths.triangle, widths.c_z)

    def forward(self, z: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        z, pair_mask = self.norm(z), self.across.own(pairs, 1).unsqueeze(-1)
        if self.outgoing:
            product = self.across.product(
                "bikc,bjkc->bijc", self.left(z, pair_mask), self.right(z, pair_mask), 1, z.shape[2]
            )
        else:  # each rank has a part of what is summed over
            product = torch.einsum("bkic,bkjc->bijc", self.left(z, pair_mask), self.right(z, pair_mask))
            product = self.across.summed(product, 1)
        return torch.sigmoid(self.gate(z)) * self.out(self.norm_out(product))  # type: ignore[no-any-return]


class TriangleAttention(Axial):
    """Triangle attention of AlphaFold 2: returns the update of the pair representation z (batch, residues,
    residues, c_z) by algorithm 13 (around the ``starting`` node) or 14 (around the ending node: the same on z
    with its residue dimensions swapped). The mask ``pairs`` (batch, residues, residues) is 0 at padding. If
    ranks share a sample, z is this rank's slice of dimension 1; the mask is always whole."""

    def __init__(self, widths: Widths, *, starting: bool) -> None:
        super().__init__()
        self.starting = starting
        self.attention = Attention(widths.c_z, widths.pair_heads, widths.pair_head_width)
        self.bias = PairBias(self.attention.norm, widths.c_z, widths.pair_heads)

    def forward(self, z: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        length = z.shape[2]
        if not self.starting:
            z, pairs = self.across.turned(z, 1, 2, length).transpose(1, 2), pairs.transpose(1, 2)
        mask_bias = ((self.across.own(pairs, 1) - 1) * -MASKED)[:, :, None, None, :]
        out = self.attention(z, mask_bias, self.across.gathered(self.bias(z), 3, length))
        return out if self.starting else self.across.turned(out.transpose(1, 2), 2, 1, length)


class SharedDropout(Axial):
    """Dropout with probability ``p`` whose mask is the same at all places along dimension ``dim`` (supplement
    1.11.6 of AlphaFold 2). In evaluation mode, or if ``p`` is 0, the input is returned.

    Ranks that share a sample each hold a slice of dimension 1 of the input. All draw the same mask, that of
    the whole input, and each applies its slice of it. A rank takes the length of dimension 1 from dimension
    2, so the whole input must have the same length along both, unless ``dim`` is 1.
    """

    def __init__(self, p: float, dim: int) -> None:
        super().__init__()
        self.p, self.dim = p, dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        shape = [x.shape[0], x.shape[2] if self.across.cuts else x.shape[1], *x.shape[2:]]
        shape[self.dim] = 1
        mask = functional.dropout(x.new_ones(shape), self.p)  # the same on every rank
        return x * (mask if self.dim == 1 else self.across.own(mask, 1))


class PairStack(nn.Module):
    """Returns the updated pair representation z (batch, residues, residues, c_z). The updates are added one
    after another: triangle multiplication by outgoing and by incoming edges, triangle attention around the
    starting and around the ending node, transition. All but the transition have dropout. The mask ``pairs``
    (batch, residues, residues) is 0 at padding."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.outgoing = TriangleMultiplication(widths, outgoing=True)
        self.incoming = TriangleMultiplication(widths, outgoing=False)
        self.starting = TriangleAttention(widths, starting=True)
        self.ending = TriangleAttention(widths, starting=False)
        self.transition = Transition(widths.c_z, widths.transition)
        self.by_row, self.by_column = (SharedDropout(widths.dropout[1], dim) for dim in (1, 2))

    def forward(self, z: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        z = z + self.by_row(self.outgoing(z, pairs))
        z = z + self.by_row(self.incoming(z, pairs))
        z = z + self.by_row(self.starting(z, pairs))
        z = z + self.by_column(self.ending(z, pairs))
        return z + self.transition(z)  # type: ignore[no-any-return]


class TemplateBlock(PairStack):
    """A block of algorithm 16 of AlphaFold 2: a `PairStack` in which both triangle attentions come before
    both triangle multiplications."""

    def forward(self, z: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        z = z + self.by_row(self.starting(z, pairs))
        z = z + self.by_column(self.ending(z, pairs))
        z = z + self.by_row(self.outgoing(z, pairs))
        z = z + self.by_row(self.incoming(z, pairs))
        return z + self.transition(z)  # type: ignore[no-any-return]


class EvoformerBlock(Axial):
    """A block of the Evoformer (algorithm 6 of AlphaFold 2), or, if ``widths.global_columns``, of the
    extra-MSA stack (algorithm 18). Returns the updated MSA and pair representation (m, z). The masks ``rows``
    (batch, rows, residues) and ``pairs`` (batch, residues, residues) are 0 at padding."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.row, self.column = RowAttention(widths), ColumnAttention(widths)
        self.transition = Transition(widths.c_m, widths.transition)
        self.outer, self.pairs = OuterProductMean(widths), PairStack(widths)
        self.dropout = SharedDropout(widths.dropout[0], 1)

    def forward(
        self, m: torch.Tensor, z: torch.Tensor, rows: torch.Tensor, pairs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        across, (_, count, length) = self.across, rows.shape
        m = m + self.dropout(self.row(m, z, across.own(rows, 1)))
        m = across.turned(m, 1, 2, count)
        m = m + self.column(m, across.own(rows, 2))
        m = m + self.transition(m)
        z = z + self.outer(m, rows)
        return across.turned(m, 2, 1, length), self.pairs(z, pairs)


class Templates(Axial):
    """Algorithms 16 and 17 of AlphaFold 2: returns the update of the pair representation z from attention of
    each pair of residues to the same pair in ``templates`` (batch, templates, residues, residues, features).
    ``real`` (batch, templates) is 1 for a template and 0 where there is none; the update of a sample without
    any is zero. The mask ``pairs`` (batch, residues, residues) is 0 at padding."""

    def __init__(self, widths: Widths, features: int, c_z: int, blocks: int, head_width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features, widths.c_z)
        self.blocks = nn.ModuleList(TemplateBlock(widths) for _ in range(blocks))
        self.norm, self.heads = nn.LayerNorm(widths.c_z), widths.pair_heads
        inner = self.heads * head_width
        self.query = nn.Linear(c_z, inner, bias=False)
        self.key, self.value = (nn.Linear(widths.c_z, inner, bias=False) for _ in range(2))
        self.out, self.scale = nn.Linear(inner, c_z), head_width**-0.5

    def forward(
        self, z: torch.Tensor, pairs: torch.Tensor, templates: torch.Tensor, real: torch.Tensor
    ) -> torch.Tensor:
        template_embeddings: list[torch.Tensor] = []
        for template in templates.unbind(1):
            t = self.embed(self.across.own(template, 1))
            for block in self.blocks:
                t = block(t, pairs)
            template_embeddings.append(self.norm(t))
        t = torch.stack(template_embeddings, dim=-2)  # (batch, i, j, templates, c_t)
        query = self.query(z).unflatten(-1, (self.heads, -1)).unsqueeze(-2) * self.scale
        key, value = (p(t).unflatten(-1, (self.heads, -1)).transpose(-2, -3) for p in (self.key, self.value))
        logits = query @ key.transpose(-1, -2) + ((real - 1) * -MASKED)[:, None, None, None, None, :]
        context = (logits.softmax(-1) @ value).squeeze(-2).flatten(-2)
        return self.out(context) * real.amax(-1)[:, None, None, None]  # type: ignore[no-any-return]


def relative_positions(own: torch.Tensor, index: torch.Tensor, reach: int) -> torch.Tensor:
    """Return the one-hot, float32 (batch, k, residues, 2 reach + 1), of ``own`` minus ``index``, clipped to
    -reach to reach (algorithm 4 of AlphaFold 2). ``index`` (batch, residues): numbers of all residues.
    ``own`` (batch, k): those of the residues that this rank holds, all of them if ranks do not share a
    sample."""
    offsets = (own[:, :, None] - index[:, None, :]).clamp(-reach, reach) + reach
    return functional.one_hot(offsets, 2 * reach + 1).float()


def one_hot_distances(squared: torch.Tensor, least: float, most: float, bins: int) -> torch.Tensor:
    """Return, for squared distances in Angstrom^2, the one-hot, float32 (..., bins), of the nearest of
    ``bins`` evenly spaced distances from ``least`` to ``most`` Angstrom (algorithms 32 and 5 of AlphaFold 2).
    Distances outside this range belong to the first or the last bin. AlphaFold's published code spaces the
    bins otherwise and has none for distances below the first."""
    centres = torch.linspace(least, most, bins, device=squared.device)
    edges, infinity = ((centres[1:] + centres[:-1]) / 2) ** 2, centres.new_full((1,), torch.inf)
    lower_edges: Any = torch.cat([-infinity, edges])
    upper_edges: Any = torch.cat([edges, infinity])
    return ((squared[..., None] > lower_edges) & (squared[..., None] <= upper_edges)).float()  # type: ignore[no-any-return]
