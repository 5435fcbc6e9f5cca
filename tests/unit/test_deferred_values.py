"""Values of the batch that are computed only if the step reads them are those that a real step has."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memfit.trace import deferred_values, tracer
from memfit.types.job import Job
from memfit.types.plan import Plan

SIDE = 8
Pool = list[torch.Tensor]
Program = Callable[[torch.Tensor, torch.Tensor], list[int]]
WEIGHT = torch.ones(SIDE)


class Reader(nn.Module):
    """Runs ``program`` on the batch and the weight, and keeps the numbers that it returns."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program, self.read = program, list[list[int]]()
        self.weight = nn.Parameter(torch.ones(SIDE))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.read.append(self.program(batch, self.weight.detach()))
        return (self.weight * 2).sum()


def batch_of(step: int, seed: int) -> torch.Tensor:
    del step, seed
    return torch.arange(SIDE * SIDE, dtype=torch.float32).view(SIDE, SIDE) % 5


def traced(program: Program) -> list[int]:
    """Return what the program reads in a trace that keeps every operator that can wait."""
    models: list[Reader] = []

    def build() -> Reader:
        models.append(Reader(program))
        return models[-1]

    job = Job(
        name="reader",
        build_model=build,
        batch_size=SIDE,
        make_batch=batch_of,
        loss=lambda model, batch: model(batch),
    )
    with mock.patch.object(deferred_values, "LARGE", 1):
        tracer.trace(job, Plan())
    return next(model.read[-1] for model in models if model.read)


def write_into_a_row(x: torch.Tensor, y: torch.Tensor, j: int) -> None:
    x[j % SIDE].copy_(y[j // SIDE % SIDE].clone())


# Each makes a tensor (or None) of two tensors and a number.
STEPS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor | None]] = {
    "add": lambda x, y, j: (x + y) % 7,
    "compare": lambda x, y, j: (x > y).float(),
    "matmul": lambda x, y, j: (x @ y) % 7,
    "sum": lambda x, y, j: (y - x.sum(0, keepdim=True)) % 7,
    "transpose": lambda x, y, j: x.t(),
    "reshape": lambda x, y, j: x.reshape(SIDE * SIDE).view(SIDE, SIDE),
    "fill": lambda x, y, j: x.fill_(j % 7),
    "add in place": lambda x, y, j: x.add_(y.clone()).remainder_(7),
    "write into a row": write_into_a_row,
}
READS: dict[str, Callable[[torch.Tensor], int]] = {
    "read": lambda x: int(x.sum()),
    "count": lambda x: len((x > 2).nonzero()),
}


@settings(max_examples=15, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from([*STEPS, *READS]), st.integers(0, 40), st.integers(0, 40)),
        min_size=3,
        max_size=25,
    )
)
def test_what_a_trace_reads_is_what_a_real_step_reads(steps: list[tuple[str, int, int]]) -> None:
    def program(batch: torch.Tensor, weight: torch.Tensor) -> list[int]:
        pool, read = [batch], list[int]()
        for name, i, j in steps:
            x, y = pool[i % len(pool)], pool[j % len(pool)]
            if name in READS:
                read.append(READS[name](x))
            elif (made := STEPS[name](x, y, j)) is not None:
                pool.append(made)
        return [*read, *(int(x.sum()) for x in pool)]

    assert traced(program) == program(batch_of(0, 0), WEIGHT)


def test_nothing_is_computed_that_is_not_read() -> None:
    computed: list[int] = []

    def program(batch: torch.Tensor, weight: torch.Tensor) -> list[int]:
        pairs = (batch[:, None] - batch[None]).square()
        near = (pairs < 4).float()
        computed.append(_calls[0])
        return [int(near.sum())]

    _calls = [0]
    compute = deferred_values.DeferredValue._compute

    def counted(self: deferred_values.DeferredValue) -> None:
        _calls[0] += 1
        compute(self)

    with mock.patch.object(deferred_values.DeferredValue, "_compute", counted):
        read = traced(program)
    assert computed[0] == 0
    assert _calls[0] >= 4
    assert read == program(batch_of(0, 0), WEIGHT)


def test_a_tensor_with_an_unknown_write_is_unknown_through_its_views_too() -> None:
    """What is read of it is then assumed: a mask has only True elements."""

    def program(batch: torch.Tensor, weight: torch.Tensor) -> list[int]:
        base = batch + 1
        view = base.t()
        before = view * 2
        base.mul_(weight)
        return [len((view > 100).nonzero()), int(before.sum())]

    assert traced(program) == [SIDE * SIDE, int(2 * (batch_of(0, 0) + 1).sum())]


def test_a_long_chain_is_computed_without_recursion() -> None:
    def program(batch: torch.Tensor, weight: torch.Tensor) -> list[int]:
        x = batch
        for _ in range(3000):
            x = x + 1
        return [int(x.sum())]

    assert traced(program) == program(batch_of(0, 0), WEIGHT)


@pytest.mark.parametrize("is_random", [True, False])
def test_a_value_made_of_assumed_ones_is_assumed(is_random: bool) -> None:
    kept: list[bool] = []

    def program(batch: torch.Tensor, weight: torch.Tensor) -> list[int]:
        other = torch.rand(SIDE, SIDE) if is_random else batch
        result = (other + 1) * 2
        kept.append(vars(result)["_memfit_shadow"].is_assumed)
        return []

    traced(program)
    assert set(kept) == {is_random}
