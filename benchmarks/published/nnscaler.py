"""AlphaFold 2's stacks as nnScaler's example trains them (msrasys/nnscaler, 2b03d359, examples/alphafold2).

A simplified Evoformer: no masks, no dropout, one product for queries, keys and values, the pair bias after
the softmax. Shapes: m (batch, rows, residues, c_m), z (batch, residues, residues, c_z). Its peaks are
``torch.cuda.max_memory_allocated`` in MiB, of a step with SGD and momentum. Three policies of recomputation:
"large" the whole block, "small" each of its nine parts, and in the extra-MSA stack all but row attention,
whose rows are cut into chunks of four, each recomputed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from memfit.types.errors import UserError
from memfit.types.job import Job
from published.evoformer import Fold, fold_of
from published.rows import Setup

_HEAD = 32
_CHUNK = 4  # rows of the extra MSA

_again: Callable[..., Any] = functools.partial(checkpoint, use_reentrant=False)


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


class Attention(nn.Module):
    """Of every row of x (batch, rows, n, width) along n; ``bias`` (batch, 1, heads, n, n) is added to the
    weights, after the softmax, as the example does."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.gate, self.qkv, self.out = (
            _weight(width, inner),
            _weight(width, 3 * inner),
            _weight(inner, width),
        )

    def projected(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gate = torch.sigmoid(x @ self.gate)
        q, k, v = (x @ self.qkv).chunk(3, dim=-1)
        return tuple(t.unflatten(-1, (self.heads, -1)).transpose(2, 3) for t in (q, k, v, gate))

    def mixed(self, parts: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> torch.Tensor:
        shape = parts[0].shape  # batch, rows, heads, n, head
        q, k, v, gate = (t.reshape(-1, *shape[-2:]) for t in parts)
        weights = torch.bmm(q, k.transpose(1, 2)) * _HEAD**-0.5
        weights = functional.softmax(weights, dim=-1)
        if bias is not None:
            weights = (weights.view(*shape[:3], shape[3], shape[3]) + bias).flatten(0, 2)
        return (torch.bmm(weights, v) * gate).view(shape).transpose(2, 3).flatten(-2)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.mixed(self.projected(x), bias) @ self.out

    def in_chunks(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        parts: tuple[torch.Tensor, ...] = _again(self.projected, x)

        def chunk(start: int, *given: torch.Tensor) -> torch.Tensor:
            return self.mixed(tuple(t[:, start : start + _CHUNK] for t in given[:4]), given[4])

        chunks = [_again(chunk, start, *parts, bias) for start in range(0, x.shape[1], _CHUNK)]
        return torch.cat(chunks, dim=1) @ self.out


class Global(nn.Module):
    """The extra-MSA stack's columns: one query for all rows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.q, self.gate, self.out = (_weight(width, width) for _ in range(3))
        self.k, self.v = _weight(width, 8), _weight(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = ((x.sum(dim=-2) @ self.q) * _HEAD**-0.5).unflatten(-1, (self.heads, -1))
        weights = functional.softmax(q @ (x @ self.k).transpose(-1, -2), dim=-1)
        gate = torch.sigmoid(x @ self.gate).unflatten(-1, (self.heads, -1))
        return ((weights @ (x @ self.v)).unsqueeze(-3) * gate).flatten(-2) @ self.out


class Transition(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = _weight(width, 4 * width), _weight(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(x) @ self.up) @ self.down


class Outer(nn.Module):
    def __init__(self, fold: Fold) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(fold.c_m)
        self.left, self.right = _weight(fold.c_m, fold.outer), _weight(fold.c_m, fold.outer)
        self.out = _weight(fold.outer**2, fold.c_z)

    def forward(self, m: torch.Tensor) -> torch.Tensor:
        m = self.norm(m)
        a, b = ((m @ w).transpose(-2, -3) for w in (self.left, self.right))
        return torch.einsum("...bac,...dae->...bdce", a, b).flatten(-2) @ self.out


class Triangle(nn.Module):
    """Multiplication; the residual goes on from the normalised pairs, as in the example."""

    def __init__(self, width: int, outgoing: bool) -> None:
        super().__init__()
        self.outgoing, self.norm, self.norm_out = outgoing, nn.LayerNorm(width), nn.LayerNorm(width)
        self.weights = nn.ParameterList(_weight(width, width) for _ in range(6))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        z = self.norm(z)
        gate_a, a, gate_b, b, out, gate = self.weights
        left, right = torch.sigmoid(z @ gate_a) * (z @ a), torch.sigmoid(z @ gate_b) * (z @ b)
        opened = torch.sigmoid(z @ gate)
        if self.outgoing:
            left, right = left.permute(0, 3, 1, 2), right.permute(0, 3, 2, 1)
        else:
            left, right = left.permute(0, 3, 2, 1), right.permute(0, 3, 1, 2)
        product = self.norm_out((left @ right).permute(0, 2, 3, 1)) @ out
        return z + (product if self.outgoing else product.permute(0, 2, 1, 3)) * opened


class Block(nn.Module):
    """``policy``: "" leaves recomputation to a plan; "parts"; "extra"."""

    def __init__(self, fold: Fold, policy: str) -> None:
        super().__init__()
        self.policy, c_m, c_z = policy, fold.c_m, fold.c_z
        self.row, self.norm_bias = Attention(c_m, fold.msa_heads, c_m), nn.LayerNorm(c_z)
        self.bias = _weight(c_z, fold.msa_heads)
        self.column: nn.Module = (
            Global(c_m, fold.msa_heads)
            if fold.global_columns
            else Attention(c_m, fold.msa_heads, fold.msa_heads * _HEAD)
        )
        self.transition, self.outer = Transition(c_m), Outer(fold)
        self.multiply = nn.ModuleList(Triangle(c_z, outgoing) for outgoing in (True, False))
        inner = fold.pair_heads * _HEAD
        self.attend = nn.ModuleList(Attention(c_z, fold.pair_heads, inner) for _ in range(2))
        self.biases = nn.ParameterList(_weight(c_z, fold.pair_heads) for _ in range(2))
        self.pair_transition = Transition(c_z)

    def _rows(self, m: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        bias = (z @ self.bias).permute(0, 3, 1, 2).unsqueeze(1)
        row = self.row.in_chunks if self.policy == "extra" else self.row
        return m + row(self.row.norm(m), bias)

    def _columns(self, m: torch.Tensor) -> torch.Tensor:
        return m + self.column(self.column.norm(m).transpose(1, 2)).transpose(1, 2)  # type: ignore[operator]

    def _triangle(self, index: int, z: torch.Tensor) -> torch.Tensor:
        attend = self.attend[index]
        z = attend.norm(z)  # type: ignore[operator]
        bias = z @ self.biases[index]
        if index == 0:
            return z + attend(z, bias.permute(0, 3, 1, 2).unsqueeze(1))
        turned = attend(z.transpose(1, 2), bias.permute(0, 3, 2, 1).unsqueeze(1))
        return z + turned.transpose(1, 2)

    def _rest(self, run: Callable[..., Any], m: torch.Tensor, z: torch.Tensor) -> tuple[Any, Any]:
        m = run(self._columns, m)
        m = run(lambda t: t + self.transition(t), m)
        z = run(lambda t, p: p + self.outer(t), m, z)
        for multiply in self.multiply:
            z = run(multiply, z)
        for index in range(2):
            z = run(functools.partial(self._triangle, index), z)
        return m, run(lambda t: t + self.pair_transition(t), z)

    def forward(self, m: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def plainly(part: Callable[..., Any], *given: torch.Tensor) -> Any:
            return part(*given)

        if self.policy == "extra":
            return _again(functools.partial(self._rest, plainly), self._rows(m, self.norm_bias(z)), z)  # type: ignore[no-any-return]
        run = _again if self.policy == "parts" else plainly
        return self._rest(run, run(lambda t, p: self._rows(t, self.norm_bias(p)), m, z), z)


class _Gathered(torch.autograd.Function):
    """What all devices have of an axis, on one: forward makes the whole, backward a part."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: int, devices: int) -> torch.Tensor:
        ctx.axis, ctx.length = axis, x.shape[axis]
        return torch.cat([x] * devices, dim=axis)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0].narrow(ctx.axis, 0, ctx.length).contiguous(), None, None


class SharedBlock(Block):
    """One device's part where several share a sample (the example's PASDAP): rows of the MSA or columns,
    first or second residues of pairs, exchanged between parts; what a part needs whole is gathered. Numbers
    are not those of the model, shapes are."""

    devices = 2

    def _turn(self, x: torch.Tensor, whole: int, cut: int) -> torch.Tensor:
        """All to all: whole along one axis, cut along another."""
        return torch.cat(x.chunk(self.devices, dim=cut), dim=whole)

    def _whole(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        return _Gathered.apply(x, axis, self.devices)  # type: ignore[no-any-return]

    def _rows(self, m: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return super()._rows(self._turn(m, 2, 1), self._whole(z, 1))

    def _product(self, m: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        outer = self.outer
        m = outer.norm(m)
        a, b = (m @ outer.left).transpose(-2, -3), self._whole(m @ outer.right, 2).transpose(-2, -3)
        return z + torch.einsum("...bac,...dae->...bdce", a, b).flatten(-2) @ outer.out

    def _multiplied(self, index: int, z: torch.Tensor) -> torch.Tensor:
        multiply: Any = self.multiply[index]
        z = multiply.norm(z)
        gate_a, a, gate_b, b, out, gate = multiply.weights
        left, right = torch.sigmoid(z @ gate_a) * (z @ a), torch.sigmoid(z @ gate_b) * (z @ b)
        opened, right = torch.sigmoid(z @ gate), self._whole(right, 2 if index else 1)
        if index == 0:
            left, right = left.permute(0, 3, 1, 2), right.permute(0, 3, 2, 1)
        else:
            left, right = left.permute(0, 3, 2, 1), right.permute(0, 3, 1, 2)
        product = multiply.norm_out((left @ right).permute(0, 2, 3, 1)) @ out
        return z + (product.permute(0, 2, 1, 3) if index else product) * opened

    def _triangle(self, index: int, z: torch.Tensor) -> torch.Tensor:
        attend: Any = self.attend[index]
        z = attend.norm(z)
        bias = self._whole(z @ self.biases[index], 2 if index else 1)
        if index == 0:
            return z + attend(z, bias.permute(0, 3, 1, 2).unsqueeze(1))
        turned = attend(z.transpose(1, 2), bias.permute(0, 3, 2, 1).unsqueeze(1))
        return z + turned.transpose(1, 2)

    def _rest(self, run: Callable[..., Any], m: torch.Tensor, z: torch.Tensor) -> tuple[Any, Any]:
        m = run(lambda t: self._columns(self._turn(t, 1, 2)), m)
        m = run(lambda t: t + self.transition(t), m)
        z = run(self._product, m, z)
        z = run(lambda t: self._multiplied(0, t), z)
        z = run(lambda t: self._multiplied(1, self._turn(t, 1, 2)), z)
        z = run(lambda t: self._triangle(0, self._turn(t, 2, 1)), z)
        z = run(lambda t: self._triangle(1, self._turn(t, 1, 2)), z)
        z = run(lambda t: (t := self._turn(t, 2, 1)) + self.pair_transition(t), z)
        return m, z


class Stack(nn.Module):
    def __init__(self, fold: Fold, policy: str, devices: int = 1) -> None:
        super().__init__()
        self.norm_m, self.norm_z = nn.LayerNorm(fold.c_m), nn.LayerNorm(fold.c_z)
        kind = Block if devices == 1 else SharedBlock
        self.devices, self.blocks = devices, nn.ModuleList(kind(fold, policy) for _ in range(fold.blocks))

    def forward(self, m: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        m, z = self.norm_m(m), self.norm_z(z)  # on every device whole
        if self.devices > 1:
            m, z = (t.chunk(self.devices, dim=d)[0].contiguous() for t, d in ((m, 2), (z, 1)))
        for block in self.blocks:
            m, z = block(m, z)
        return m.sum() * z.sum()


def nnscaler_job(setup: Setup) -> Job:
    """A step of the stack, on the first of the devices that share it. Raises UserError without the sizes."""
    from published.models import default_dtype, keeping_gradients

    fold, devices = fold_of(setup), setup.device_count
    if fold.global_columns and setup.recompute != "chunks":
        raise UserError("the extra-MSA stack is expressed with its chunks only")
    if devices > SharedBlock.devices or (devices > 1 and fold.global_columns):
        raise UserError(f"{devices} devices that share a sample are not expressed")
    policy = "extra" if fold.global_columns else "parts" if setup.recompute == "parts" else ""

    def build() -> nn.Module:
        with default_dtype(setup.compute):
            model = Stack(fold, policy, devices)
        return keeping_gradients(model) if setup.keeps_gradients else model

    def batch(step: int, seed: int) -> dict[str, Any]:
        dtype = getattr(torch, setup.compute)
        return {
            "m": torch.zeros(1, fold.sequences, fold.residues, fold.c_m, dtype=dtype),
            "z": torch.zeros(1, fold.residues, fold.residues, fold.c_z, dtype=dtype),
        }

    return Job(
        name=setup.id,
        build_model=build,
        make_batch=batch,
        batch_size=1,
        blocks="blocks",
        loss=lambda model, part: model(part["m"], part["z"]),
    )
