"""The second step of a trace is a copy of the first where that makes no difference, and runs where it may."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from tiny import regression, words
from torch import nn

from memfit.trace.op_recording import record
from memfit.trace.pass_replay import PassReplay
from memfit.trace.tracer import trace
from memfit.trace.unroll import normalize_clocks
from memfit.types.job import Job
from memfit.types.plan import Plan, use
from memfit.types.trace import Trace

PLANS = (
    Plan(),
    Plan(uses=(use("activation-checkpointing", every=1), use("bf16-autocast"))),
    Plan(uses=(use("bf16-parameters", rounding="master"),)),
    Plan(uses=(use("activation-offload", minimum_kib=64, to="host"),)),
    Plan(uses=(use("adafactor"), use("selective-checkpointing", keep="matmul"))),
    Plan(uses=(use("fp16-autocast"),)),
    Plan(uses=(use("gradient-accumulation", micro_batches=4),)),
    Plan(
        uses=(
            use("gradient-accumulation", micro_batches=4),
            use("activation-offload", minimum_kib=64, to="host"),
            use("bf16-parameters", rounding="master"),
        )
    ),
)


def passes_run(job: Job, plan: Plan | None = None, device: str = "cuda") -> tuple[int, Trace]:
    """Return (how often the trace of two steps runs the job's loss, the trace)."""
    calls: list[int] = []

    def counted(model: Any, part: Any) -> torch.Tensor:
        calls.append(1)
        return job.loss(model, part)

    found = trace(dataclasses.replace(job, loss=counted), plan or Plan(), device=device)
    return len(calls), found


class Changing(nn.Module):
    """A linear layer that calls ``change`` in its forward."""

    def __init__(self, change: Callable[[Changing], Any]) -> None:
        super().__init__()
        self.layer, self.change, self.calls = nn.Linear(8, 4), change, 0
        self.cache: torch.Tensor | None = None
        self.notes: list[str] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.change(self)
        return self.layer(x)


def changing(change: Callable[[Changing], Any]) -> Job:
    return dataclasses.replace(regression(), build_model=lambda: Changing(change))


def count(model: Changing) -> None:
    model.calls += 1


def note(model: Changing) -> None:
    model.notes.append("called")


def keep(model: Changing) -> None:
    if model.cache is None:
        model.cache = torch.zeros(1000)


def read(model: Changing) -> None:
    float(model.layer.weight.detach().sum())


def draw(model: Changing) -> None:
    random.random()


def draw_by_numpy(model: Changing) -> None:
    numpy.random.rand()  # noqa: NPY002  the generator that all share


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.label)
def test_a_copied_pass_equals_one_that_runs(plan: Plan, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copied_runs, copied = passes_run(words(), plan, device)
    monkeypatch.setattr(PassReplay, "micro_step", lambda self, run, *arguments: run(*arguments))
    runs, run = passes_run(words(), plan, device)
    # The first without gradients and the first with them.
    assert (copied_runs, runs) == ((2, 4) if plan.micro_batches > 1 else (1, 2))
    assert normalize_clocks(copied) == normalize_clocks(run)


@pytest.mark.parametrize(
    "change",
    [count, note, keep, read, draw, draw_by_numpy],
    ids=[
        "counts its calls",
        "notes its calls",
        "keeps a tensor",
        "reads a value",
        "draws from random",
        "draws from numpy",
    ],
)
def test_a_pass_that_leaves_something_behind_runs_again(change: Callable[[Changing], Any]) -> None:
    assert passes_run(changing(lambda model: None))[0] == 1
    assert passes_run(changing(change))[0] >= 2


def test_a_pass_whose_gradients_a_hook_keeps_until_the_next_one_runs_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def keeping() -> nn.Module:
        model, kept = Changing(lambda model: None), dict[nn.Parameter, torch.Tensor | None]()
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: kept.update({p: p.grad}))
        return model

    job = dataclasses.replace(regression(), build_model=keeping)
    found = trace(job, Plan(), device="cuda")
    monkeypatch.setattr(PassReplay, "micro_step", lambda self, run, *arguments: run(*arguments))
    assert normalize_clocks(found) == normalize_clocks(trace(job, Plan(), device="cuda"))


def test_a_pass_on_a_batch_of_another_layout_runs() -> None:
    job = regression()
    growing = dataclasses.replace(
        job,
        make_batch=lambda step, seed: tuple(t[: 4 + 20 * step].clone() for t in job.make_batch(step, seed)),
    )
    runs, found = passes_run(growing)
    assert runs == 2
    rows = [
        sum(a.requested_bytes for a in found.allocations if a.category == "input" and a.step == s) // 48
        for s in (0, 1)
    ]
    assert rows == [4, 24]


@pytest.mark.parametrize(("factor", "runs"), [(3.0, 2), (0.5, 3)])
def test_passes_are_told_apart_by_share_where_the_loss_has_a_factor_equal_to_it(
    factor: float, runs: int
) -> None:
    job, terms = words(), iter((4, 2, 1, 1, 2, 4, 1, 1))  # of the micro-batches of two steps
    whole = len(job.make_batch(0, 0)["tokens"])
    scaled = dataclasses.replace(
        job,
        loss=lambda model, part: job.loss(model, part) * factor,
        loss_terms=lambda part: 8 if len(part["tokens"]) == whole else next(terms),
    )
    assert passes_run(scaled, Plan(uses=(use("gradient-accumulation", micro_batches=4),)))[0] == runs


def test_optimizers_that_step_in_backward_run_in_each_step() -> None:
    assert passes_run(words(), Plan(uses=(use("optimizer-in-backward"),)))[0] == 2


def test_traces_for_two_devices_in_one_process_do_not_mix_the_work_of_operators() -> None:
    # Layer norm keeps its statistics in float32 on CUDA only.
    plan = Plan(uses=(use("bf16-parameters", rounding="master"),))
    alone = trace(words(), plan, device="cpu")
    trace(words(), plan, device="cuda")
    assert trace(words(), plan, device="cpu").ops == alone.ops


def test_a_recording_of_operators_runs_the_last_step() -> None:
    recording = record(words(), Plan())
    spans = [s for s in recording.trace.spans if s.phase == "forward"]
    assert spans[-1].start <= recording.start < spans[-1].end
