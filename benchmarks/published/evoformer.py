"""AlphaFold 2's Evoformer stack as OpenFold writes it, and with the fused kernels of FastFold and Uni-Fold.

Shapes: MSA representation (batch, sequences, residues, c_m), pair (batch, residues, residues, c_z).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from memfit.techniques.synthetic_kernel import kernel, read_bytes
from memfit.types.errors import UserError
from memfit.types.job import Job
from published.rows import Setup


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    sequences: int
    residues: int
    c_m: int
    c_z: int
    msa_heads: int
    pair_heads: int
    outer: int
    blocks: int
    fused: bool  # softmax in place, sigmoid gate and product in one kernel
    global_columns: bool = False  # the extra-MSA stack's column attention


class _InPlaceSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scores)
        kernel([], 2 * read_bytes([scores]))
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        kernel([], 3 * read_bytes(grads))
        return grads[0]  # written over the gradient that comes in


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, x)
        out = torch.empty_like(x)
        kernel([out], read_bytes([gate, x]))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        made = tuple(torch.empty_like(t) for t in ctx.saved_tensors)
        kernel(made, read_bytes([*ctx.saved_tensors, *grads]))
        return made


class GatedAttention(nn.Module):
    def __init__(self, width: int, head: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused, self.scale = heads, fused, head**-0.5
        inner = head * heads
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.gate, self.out = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor, biases: list[torch.Tensor]) -> torch.Tensor:
        gate = self.gate(x) if self.fused else None
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3) for p in (self.q, self.k, self.v))
        q = q * self.scale if not self.fused else q.mul_(self.scale)
        scores = torch.matmul(q, k.transpose(-1, -2))
        del q, k
        if self.fused:
            weights = _InPlaceSoftmax.apply(scores)
        else:
            for bias in biases:
                scores += bias
            weights = functional.softmax(scores, dim=-1)
        del scores
        mixed = torch.matmul(weights, v).transpose(-2, -3)
        del weights, v
        if gate is not None:
            mixed = _Gate.apply(gate, mixed.flatten(-2))
        else:
            opened = torch.sigmoid(self.gate(x)).unflatten(-1, (self.heads, -1))
            mixed = (mixed * opened).flatten(-2)
        return self.out(mixed)  # type: ignore[no-any-return]


class GlobalAttention(nn.Module):
    """One query for a whole column, one key and value head."""

    def __init__(self, width: int, head: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, head**-0.5
        self.q = nn.Linear(width, head * heads, bias=False)
        self.k, self.v = (nn.Linear(width, head, bias=False) for _ in range(2))
        self.gate, self.out = nn.Linear(width, head * heads), nn.Linear(head * heads, width)

    def forward(self, x: torch.Tensor, biases: list[torch.Tensor]) -> torch.Tensor:
        q = (self.q(x.mean(dim=-2)) * self.scale).unflatten(-1, (self.heads, -1))
        weights = functional.softmax(torch.matmul(q, self.k(x).transpose(-1, -2)), dim=-1)
        mixed = torch.matmul(weights, self.v(x)).unsqueeze(-3)
        opened = torch.sigmoid(self.gate(x)).unflatten(-1, (self.heads, -1))
        return self.out((mixed * opened).flatten(-2))  # type: ignore[no-any-return]


class Transition(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.down(functional.relu(self.up(self.norm(x)))) * mask.unsqueeze(-1)  # type: ignore[no-any-return]


class OuterProductMean(nn.Module):
    def __init__(self, fold: Fold) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(fold.c_m)
        self.left, self.right = nn.Linear(fold.c_m, fold.outer), nn.Linear(fold.c_m, fold.outer)
        self.out = nn.Linear(fold.outer**2, fold.c_z)

    def forward(self, m: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        m = self.norm(m)
        a, b = ((p(m) * mask.unsqueeze(-1)).transpose(-2, -3) for p in (self.left, self.right))
        outer = self.out(torch.einsum("...bac,...dae->...bdce", a, b).flatten(-2))
        count = torch.einsum("...ab,...ad->...bd", mask, mask).unsqueeze(-1)
        return outer / (1e-3 + count)  # type: ignore[no-any-return]


class TriangleMultiplication(nn.Module):
    def __init__(self, fold: Fold, outgoing: bool) -> None:
        super().__init__()
        self.outgoing, self.fused, width = outgoing, fold.fused, fold.c_z
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        sides = (2 * width,) if fold.fused else (width, width)
        self.values = nn.ModuleList(nn.Linear(width, s) for s in sides)
        self.gates = nn.ModuleList(nn.Linear(width, s) for s in sides)
        self.gate, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        z = self.norm_in(z)
        gate = self.gate(z) if self.fused else None
        parts = []
        for value, opening in zip(self.values, self.gates, strict=True):
            if self.fused:
                parts.append(value(z) * mask.unsqueeze(-1) * torch.sigmoid(opening(z)))
            else:
                parts.append(value(z) * torch.sigmoid(opening(z)) * mask.unsqueeze(-1))
        a, b = parts[0].chunk(2, dim=-1) if self.fused else parts
        del parts
        order = (0, 3, 1, 2)
        a, b = a.permute(*order), b.permute(*order)
        x = torch.matmul(a, b.transpose(-1, -2)) if self.outgoing else torch.matmul(a.transpose(-1, -2), b)
        del a, b
        x = self.out(self.norm_out(x.permute(0, 2, 3, 1)))
        return _Gate.apply(gate, x) if gate is not None else x * torch.sigmoid(self.gate(z))  # type: ignore[no-any-return]


class EvoformerBlock(nn.Module):
    def __init__(self, fold: Fold) -> None:
        super().__init__()
        c_m, c_z = fold.c_m, fold.c_z
        head_m, head_z = max(8, c_m // fold.msa_heads), max(8, c_z // fold.pair_heads)
        self.norm_row, self.norm_column, self.norm_pair = (
            nn.LayerNorm(c_m),
            nn.LayerNorm(c_m),
            nn.LayerNorm(c_z),
        )
        self.row_bias = nn.Linear(c_z, fold.msa_heads, bias=False)
        self.row = GatedAttention(c_m, head_m, fold.msa_heads, fold.fused)
        self.column: nn.Module = (
            GlobalAttention(c_m, head_m, fold.msa_heads)
            if fold.global_columns
            else GatedAttention(c_m, head_m, fold.msa_heads, fold.fused)
        )
        self.msa_transition, self.pair_transition = Transition(c_m), Transition(c_z)
        self.outer = OuterProductMean(fold)
        self.multiply = nn.ModuleList(TriangleMultiplication(fold, outgoing) for outgoing in (True, False))
        self.norms = nn.ModuleList(nn.LayerNorm(c_z) for _ in range(2))
        self.biases = nn.ModuleList(nn.Linear(c_z, fold.pair_heads, bias=False) for _ in range(2))
        self.attend = nn.ModuleList(
            GatedAttention(c_z, head_z, fold.pair_heads, fold.fused) for _ in range(2)
        )

    def forward(
        self, m: torch.Tensor, z: torch.Tensor, msa_mask: torch.Tensor, pair_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bias = self.row_bias(self.norm_pair(z)).permute(0, 3, 1, 2).unsqueeze(-4)
        m = m + _dropped(self.row(self.norm_row(m), [_large(msa_mask), bias]), 0.15, 1)
        turned = self.norm_column(m.transpose(-2, -3))
        m = m + self.column(turned, [_large(msa_mask.transpose(-1, -2))]).transpose(-2, -3)
        m = m + self.msa_transition(m, msa_mask)
        z = z + self.outer(m, msa_mask)
        for multiply in self.multiply:
            z = z + _dropped(multiply(z, pair_mask), 0.25, 1)
        z = z + _dropped(self._triangle(0, z, pair_mask), 0.25, 1)
        ending = self._triangle(1, z.transpose(-2, -3), pair_mask.transpose(-1, -2))
        z = z + _dropped(ending.transpose(-2, -3), 0.25, 2)
        return m, z + self.pair_transition(z, pair_mask)

    def _triangle(self, index: int, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.norms[index](z)
        bias = self.biases[index](x).permute(0, 3, 1, 2).unsqueeze(-4)
        return self.attend[index](x, [_large(mask), bias])  # type: ignore[no-any-return]


def _large(mask: torch.Tensor) -> torch.Tensor:
    return (1e4 * (mask - 1))[..., :, None, None, :]


def _dropped(x: torch.Tensor, p: float, shared: int) -> torch.Tensor:
    shape = list(x.shape)
    shape[shared] = 1
    return x * functional.dropout(x.new_ones(shape), p)


class Stack(nn.Module):
    def __init__(self, fold: Fold) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EvoformerBlock(fold) for _ in range(fold.blocks))

    def forward(self, m: torch.Tensor, z: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
        for block in self.blocks:
            m, z = block(m, z, *masks)
        return m.mean() + z.mean()


def stack_job(setup: Setup) -> Job:
    """Forward and backward of a stack. UserError without the sizes, or for what is not expressed."""
    from published.models import default_dtype

    fold = fold_of(setup)

    def build() -> nn.Module:
        with default_dtype(setup.compute):
            return Stack(fold)

    def batch(step: int, seed: int) -> dict[str, Any]:
        dtype = getattr(torch, setup.compute)
        m = torch.zeros(1, fold.sequences, fold.residues, fold.c_m, dtype=dtype)
        z = torch.zeros(1, fold.residues, fold.residues, fold.c_z, dtype=dtype)
        masks = [torch.zeros(t.shape[:3], dtype=dtype) for t in (m, z)]
        return {"m": m, "z": z, "masks": masks}

    def loss(model: nn.Module, part: Any) -> torch.Tensor:
        out: torch.Tensor = model(part["m"].requires_grad_(), part["z"].requires_grad_(), part["masks"])
        return out

    return Job(name=setup.id, build_model=build, make_batch=batch, loss=loss, batch_size=1, blocks="blocks")


def fold_of(setup: Setup) -> Fold:
    given = setup.fold
    wanted = ("sequences", "residues", "c_m", "c_z")
    missing = [k for k in wanted if k not in given] + ["layers"] * (not setup.layers)
    if missing:
        raise UserError(f"the row gives no {', '.join(missing)}")
    own = setup.code == "nnscaler"  # its code says what a row does not of chunks and segments
    if not own and setup.recompute in ("chunks", "parts"):
        raise UserError(f"how {setup.code} recomputes {setup.recompute} is not expressed")
    if not own and setup.device_count > 1 and setup.ranks["dp"] == 1:
        raise UserError("how the devices split the stack's axes is not expressed")
    return Fold(
        **{k: int(given[k]) for k in wanted},
        blocks=setup.layers,
        msa_heads=int(given.get("msa_heads", 8)),
        pair_heads=int(given.get("pair_heads", 4)),
        outer=int(given.get("outer", 32)),
        fused=setup.code == "fastfold",
        global_columns=given.get("global_columns") == "y",
    )
