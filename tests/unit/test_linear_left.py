"""Whatever ends a traced step, torch's linear layer is its own again."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from memfit.techniques.registry import make_use
from memfit.techniques.zero.zero_stage3_autograd import LinearPatch
from memfit.trace.tracer import trace
from memfit.types.job import Job
from memfit.types.plan import Plan


class _Interrupted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first(x).shape[0]:
            raise KeyboardInterrupt
        return self.last(x)  # type: ignore[no-any-return]


def test_an_interrupted_step_with_zero_3_leaves_nothing() -> None:
    job = Job(
        name="stops",
        build_model=_Interrupted,
        make_batch=lambda step, seed: {"x": torch.ones(4, 8)},
        loss=lambda model, batch: model(batch["x"]).sum(),
        batch_size=4,
    )
    before = functional.linear
    try:
        trace(job, Plan(uses=(make_use("zero", {"stage": 3}),), ranks=2), device="cuda")
    except KeyboardInterrupt:
        assert functional.linear is before
    else:
        raise AssertionError("the step was not interrupted")


def test_a_step_that_is_closed_inside_a_module_leaves_nothing() -> None:
    module, before = nn.Linear(2, 2), functional.linear
    patch = LinearPatch()
    ends = patch.during(module)
    patch._turn(1)
    assert functional.linear is not before
    for end in ends:
        end()
    assert functional.linear is before
