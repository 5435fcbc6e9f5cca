"""What CUDA's kernels allocate inside operators is in the predicted peak of a GPU."""

from __future__ import annotations

import json
from typing import Any

import cuda_workspaces
import pytest
import torch
from torch import nn

import memfit
from memfit.cost.cuda_workspaces import inside_cuda
from memfit.cost.workspaces import bound_bytes
from memfit.trace.signature import describe

MEASURED: dict[str, Any] = json.loads(cuda_workspaces.RECORD.read_text(encoding="utf-8"))["bytes"]
WORST_RATIO = 0.02
# The allocator leaves up to 1 MiB of a large block unused; CUB adds a few KiB, which count for small sizes.
LARGE_BYTES, UNUSED_BYTES, SMALL_BYTES = 2**20, 2**20, 24 * 1024


@pytest.mark.parametrize("name", cuda_workspaces.calls("meta"))
def test_the_peak_inside_an_operator_is_what_the_allocator_counts(name: str) -> None:
    operator, *args = cuda_workspaces.calls("meta")[name]()
    packet = operator._qualified_op_name.replace("::", ".")
    inside = inside_cuda(describe(f"{packet}.default", args, {}))
    assert inside is not None
    peak_bytes, output_bytes = MEASURED[name]
    predicted_bytes = max(inside.beside_bytes + output_bytes, inside.alone_bytes)
    rounding_bytes = UNUSED_BYTES if peak_bytes > LARGE_BYTES else SMALL_BYTES
    difference_bytes = predicted_bytes - peak_bytes
    assert abs(difference_bytes) <= WORST_RATIO * peak_bytes + rounding_bytes


# Sums over rows of (rows, columns) float32, and what torch 2.15 allocates beside their result on a card with
# 132 multiprocessors of 2,048 threads, measured like the file above. The bound is for 148.
SUMS = {
    (16384, 768): 100663808,
    (100000, 768): 138412544,
    (2048, 16384): 142606848,
    (4096, 1024): 33554944,
    (512, 65536): 0,
    (1000, 2400): 0,
}


@pytest.mark.parametrize("shape", SUMS)
def test_the_bound_of_a_sum_over_rows_contains_its_partial_results(shape: tuple[int, int]) -> None:
    signature = describe("aten.sum.dim_IntList", [torch.empty(shape, device="meta"), [0], True], {})
    bound = bound_bytes(signature, "cuda", 1)
    assert SUMS[shape] - 1024 <= bound <= 1.13 * SUMS[shape]
    assert bound_bytes(signature, "cpu", 1) == 0


class _Edges(nn.Module):
    """Attention over the edges of a graph, by plain indexing."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(nodes)), nn.Parameter(torch.randn(nodes))

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        e = torch.exp(self.a[source] + self.b[target])
        sums = torch.zeros_like(self.a).index_add(0, target, e)
        return torch.zeros_like(self.a).index_add(0, target, e / sums[target])


# Peaks of the second step in MiB, by the allocator of torch 2.15, measured like the file.
@pytest.mark.parametrize(
    ("name", "peak_mib"), [("edges", 153.79), ("distances", 296.31), ("sorted", 60.2), ("chosen", 80.23)]
)
def test_the_peak_of_a_training_contains_what_its_operators_allocate(name: str, peak_mib: float) -> None:
    count = 2**20
    values = {"y": torch.rand(count)}
    model, batch, loss = {
        "edges": (
            _Edges(50_000),
            {key: torch.randint(0, 50_000, (2**21,)) for key in ("s", "d")},
            lambda m, b: m(b["s"], b["d"]).square().mean(),
        ),
        "distances": (
            nn.ParameterList([torch.rand(2048, 8)]),
            {"y": torch.rand(2048, 8)},
            lambda m, b: torch.cdist(m[0], b["y"], p=1).mean(),
        ),
        "sorted": (
            nn.ParameterList([torch.rand(count)]),
            values,
            lambda m, b: (m[0].view(64, -1).sort(1).values - b["y"].view(64, -1)).abs().mean(),
        ),
        "chosen": (
            nn.ParameterList([torch.rand(count)]),
            values,
            lambda m, b: m[0][b["y"].argsort()].square().mean(),
        ),
    }[name]
    peak = memfit.estimate(model, batch, loss=loss, optimizer="adamw", machine="H100-SXM").allocated_bytes
    assert peak.low <= peak_mib * 2**20 <= peak.high, (peak.value / 2**20, peak.high / 2**20)


def test_masks_count_their_positions_in_the_upper_end() -> None:
    values, mask = (
        torch.empty(1000, 64, device="meta"),
        torch.empty(1000, 64, dtype=torch.bool, device="meta"),
    )
    signature = describe("aten.masked_select.default", [values, mask], {})
    assert bound_bytes(signature, "cuda", 1) == 2 * 8 * mask.numel()
