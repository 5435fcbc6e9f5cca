"""Law 8: what one block of AlphaFold 2's Evoformer takes while it is recomputed, and split over two devices.

Measured by nnscaler's AlphaFold example (README of examples/alphafold2: 48 blocks, fp16, each block
checkpointed, no dropout and no masks): peak less what is resident after forward, and peaks on two devices
that share the MSA's and the pair representation's axes (dynamic axial parallelism, Cheng et al. 2022).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from memfit.cost.memory import levels, memory_profile
from memfit.techniques.registry import make_use
from memfit.trace.tracer import trace
from memfit.types.job import Job
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.trace import Phase
from memfit.types.units import MIB

MSA, PAIR, MSA_HEADS, PAIR_HEADS, OUTER, BLOCKS = 256, 128, 8, 4, 32, 48


class Moved(torch.autograd.Function):
    """A collective by its memory alone: a new tensor of the other shape, and the same back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        ctx.shape = x.shape
        return x.new_empty(shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0].new_empty(ctx.shape), None


def gathered(x: torch.Tensor, dim: int, devices: int) -> torch.Tensor:
    if devices == 1:
        return x
    shape = list(x.shape)
    shape[dim] *= devices
    return Moved.apply(x, tuple(shape))  # type: ignore[no-any-return,no-untyped-call]


def turned(x: torch.Tensor, devices: int, *, rows: bool) -> torch.Tensor:
    """All-to-all: from whole rows of a share to a share of whole columns, or back."""
    if devices == 1:
        return x
    a, b, width = x.shape
    shape = (a // devices, b * devices, width) if rows else (a * devices, b // devices, width)
    return Moved.apply(x, shape)  # type: ignore[no-any-return,no-untyped-call]


class Gated(nn.Module):
    """Gated attention along the second axis of (rows, length, width); ``bias`` (heads, length, length) is
    added to the weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.gate, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows, length, width = x.shape

        def by_head(t: torch.Tensor) -> torch.Tensor:
            return (
                t.reshape(rows, length, self.heads, -1).transpose(1, 2).reshape(rows * self.heads, length, -1)
            )

        gate = by_head(torch.sigmoid(self.gate(x)))
        q, k, v = (by_head(t) for t in self.qkv(x).chunk(3, dim=-1))
        weights = functional.softmax(torch.bmm(q, k.mT) * 0.18, dim=-1)
        if bias is not None:
            weights = (weights.view(rows, self.heads, length, length) + bias).flatten(0, 1)
        mixed = torch.bmm(weights, v) * gate
        mixed = mixed.view(rows, self.heads, length, -1).transpose(1, 2).reshape(rows, length, width)
        return self.out(mixed)  # type: ignore[no-any-return]


class Triangle(nn.Module):
    """Multiplicative update along shared edges; one of the two sides is gathered."""

    def __init__(self, *, outgoing: bool) -> None:
        super().__init__()
        self.outgoing = outgoing
        self.gates = nn.ModuleList(nn.Linear(PAIR, PAIR, bias=False) for _ in range(3))
        self.values = nn.ModuleList(nn.Linear(PAIR, PAIR, bias=False) for _ in range(2))
        self.norm, self.out = nn.LayerNorm(PAIR), nn.Linear(PAIR, PAIR, bias=False)

    def forward(self, z: torch.Tensor, devices: int) -> torch.Tensor:
        sides = [torch.sigmoid(g(z)) * v(z) for g, v in zip(self.gates, self.values, strict=False)]
        gate = torch.sigmoid(self.gates[2](z))
        if self.outgoing:  # rows i of a, all rows j of b, over k
            other = gathered(sides[1], 0, devices).permute(2, 1, 0)
            product = torch.matmul(sides[0].permute(2, 0, 1), other).permute(1, 2, 0)
        else:  # all columns i of a, columns j of b, over k
            other = gathered(sides[0], 1, devices).permute(2, 1, 0)
            product = torch.matmul(other, sides[1].permute(2, 0, 1)).permute(1, 2, 0)
        return self.out(self.norm(product)) * gate  # type: ignore[no-any-return]


def transition(width: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width, bias=False),
        nn.ReLU(),
        nn.Linear(4 * width, width, bias=False),
    )


class Evoformer(nn.Module):
    """(sequences / devices, residues, MSA width) and (residues / devices, residues, pair width)."""

    def __init__(self, devices: int) -> None:
        super().__init__()
        self.devices = devices
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in (MSA, MSA, MSA, PAIR, PAIR, PAIR, PAIR))
        self.row, self.column = Gated(MSA, MSA_HEADS), Gated(MSA, MSA_HEADS)
        self.biases = nn.ModuleList(
            nn.Linear(PAIR, h, bias=False) for h in (MSA_HEADS, PAIR_HEADS, PAIR_HEADS)
        )
        self.msa_transition, self.pair_transition = transition(MSA), transition(PAIR)
        self.left, self.right = (nn.Linear(MSA, OUTER, bias=False) for _ in range(2))
        self.outer = nn.Linear(OUTER**2, PAIR, bias=False)
        self.outgoing, self.incoming = Triangle(outgoing=True), Triangle(outgoing=False)
        self.start, self.end = Gated(PAIR, PAIR_HEADS), Gated(PAIR, PAIR_HEADS)

    def forward(self, m: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n, norms = self.devices, self.norms
        m = m + self.row(norms[0](m), self._bias(0, z))
        m = turned(m, n, rows=False)
        m = m + self.column(norms[1](m).transpose(0, 1)).transpose(0, 1)
        m = m + self.msa_transition(m)
        z = z + self._outer_product(norms[2](m))
        m = turned(m, n, rows=True)
        z = norms[3](z)
        z = z + self.outgoing(z, n)
        z = norms[4](turned(z, n, rows=False))
        z = z + self.incoming(z, n)
        z = norms[5](turned(z, n, rows=True))
        z = z + self.start(z, self._bias(1, z))
        z = norms[6](turned(z, n, rows=False)).transpose(0, 1)
        z = (z + self.end(z, self._bias(2, z))).transpose(0, 1)
        return m, turned(z + self.pair_transition(z), n, rows=True)

    def _bias(self, index: int, z: torch.Tensor) -> torch.Tensor:
        return gathered(self.biases[index](z), 0, self.devices).permute(2, 0, 1)

    def _outer_product(self, m: torch.Tensor) -> torch.Tensor:
        left, right = self.left(m), gathered(self.right(m), 1, self.devices)
        products = torch.einsum("sic,sjd->ijcd", left, right).flatten(2)
        return self.outer(products)  # type: ignore[no-any-return]


class Stack(nn.Module):
    def __init__(self, blocks: int, devices: int) -> None:
        super().__init__()
        self.norm_m, self.norm_z = nn.LayerNorm(MSA), nn.LayerNorm(PAIR)
        self.blocks = nn.ModuleList(Evoformer(devices) for _ in range(blocks))

    def forward(self, m: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        m, z = self.norm_m(m), self.norm_z(z)
        for block in self.blocks:
            m, z = block(m, z)
        return m.sum() * z.sum()


def half(build: Callable[[], nn.Module]) -> nn.Module:
    torch.set_default_dtype(torch.float16)
    try:
        return build()
    finally:
        torch.set_default_dtype(torch.float32)


@functools.cache
def peak_and_resident(sequences: int, residues: int, devices: int, blocks: int) -> tuple[int, int]:
    """Bytes at the peak, and when backward begins."""
    m = torch.zeros(sequences // devices, residues, MSA, dtype=torch.float16)
    z = torch.zeros(residues // devices, residues, PAIR, dtype=torch.float16)
    job = Job(
        name="evoformer",
        build_model=lambda: half(lambda: Stack(blocks, devices)),
        batch_size=1,
        make_batch=lambda *_: [m, z],
        loss=lambda model, batch: model(*batch),
        blocks="blocks",
    )
    plan = Plan(uses=(make_use("activation-checkpointing", {}),))
    traced = trace(job, plan, device="cuda", steps=1, update=False)
    clock, live = levels(traced)
    begin = next(s.start for s in traced.spans if s.phase is Phase.BACKWARD)
    resident = int(live[int(clock.searchsorted(begin)) - 1])
    return memory_profile(traced, Calibration()).peak_bytes, resident


SIZES = [(128, 256), (512, 256), (512, 384)]


# The source's MB are MiB; it states no version of torch, and its code is generated, with frees of its own.
# Two sizes come out within 3 %; at 512 x 256 the difference of 1 GiB, 16 %, is one map of attention weights.
@pytest.mark.parametrize(("size", "measured_mib"), [*zip(SIZES, (2344, 6306, 10706), strict=True)])
def test_8_the_transient_of_one_block(size: tuple[int, int], measured_mib: int) -> None:
    peak, resident = peak_and_resident(*size, 1, 2)
    assert (peak - resident) / MIB == pytest.approx(measured_mib, rel=0.17)


@pytest.mark.parametrize(
    ("size", "measured"), [*zip(SIZES, (2531 / 4414, 5744 / 10729, 9416 / 17810), strict=True)]
)
def test_8_two_devices_take_little_more_than_half_each(size: tuple[int, int], measured: float) -> None:
    # Weights and what is gathered are not halved; 0.4 GB of the source's peaks is neither, and not explained.
    one, two = (_stack_peak(*size, devices) for devices in (1, 2))
    assert 0.5 < two / one == pytest.approx(measured, abs=0.05)


def _stack_peak(sequences: int, residues: int, devices: int) -> float:
    """Of all blocks: each adds as much to the peak as the third to that of two."""
    two, three = (peak_and_resident(sequences, residues, devices, blocks)[0] for blocks in (2, 3))
    return two + (BLOCKS - 2) * (three - two)
