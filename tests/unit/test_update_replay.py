"""An optimizer's update is run for one parameter of each layout and repeated for the others."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import regression, words
from torch.nn import functional

from memfit.trace import operators, tracer, update_replay
from memfit.trace.data_dependent import Guesses
from memfit.trace.tracer import trace
from memfit.types.job import Job
from memfit.types.plan import Plan, use

STOCHASTIC = use("bf16-parameters", rounding="stochastic")
PLANS = (
    Plan(),
    Plan(uses=(use("optimizer-in-backward"),)),
    Plan(uses=(use("sgd"), use("gradient-accumulation", micro_batches=2))),
    Plan(uses=(STOCHASTIC,)),
    Plan(uses=(STOCHASTIC, use("optimizer-in-backward"), use("activation-checkpointing", every=1))),
)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sizes of the parameter in each update that runs."""
    found: list[Any] = []
    run = update_replay.UpdateReplay._run

    def noted(self: Any, call: Any, module: str, func: Any, args: Any, kwargs: Any) -> None:
        found.append(args[0].shape if isinstance(args[0], torch.Tensor) else [p.shape for p in args[0]])
        run(self, call, module, func, args, kwargs)

    monkeypatch.setattr(update_replay.UpdateReplay, "_run", noted)
    return found


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.label)
def test_repeated_updates_equal_those_that_run(
    plan: Plan, device: str, lines: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "bf16-parameters" in plan:
        pytest.importorskip("torchao")
    traces = []
    for updates in (update_replay._UPDATES, ()):
        monkeypatch.setattr(update_replay, "_UPDATES", updates)
        traces.append(trace(words(), plan, device=device, lines=lines))
    assert traces[0] == traces[1]


def test_one_parameter_of_each_layout_is_updated(runs: list[Any]) -> None:
    parameters = sum(1 for _ in words().build_model().parameters())
    trace(words(), Plan(uses=(use("optimizer-in-backward"),)), device="cuda")
    assert len(runs) < parameters, "in two steps"


def test_updates_of_the_users_optimizer_run_each_time(runs: list[Any]) -> None:
    path = use("optimizer", path="torch.optim:AdamW", arguments="", matrices="", others="adamw")
    trace(words(), Plan(uses=(path,)), device="cuda")
    assert not runs


def test_maps_of_8_bit_optimizers_need_no_assumed_values() -> None:
    pytest.importorskip("bitsandbytes")
    traced = trace(words(), Plan(uses=(use("adamw-8bit"),)), device="cuda")
    assert not traced.assumed
    assert not traced.assumptions
    assert not [op for op in traced.ops if op.op == "aten.linspace.default"]


def test_forked_traces_import_packages_without_compiling_what_they_define(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compilers = []
    compiler = torch.compile
    monkeypatch.setattr(tracer.importlib, "import_module", lambda name: compilers.append(torch.compile))
    for is_forked in (False, True):
        process = SimpleNamespace(daemon=is_forked)
        monkeypatch.setattr(tracer.multiprocessing, "current_process", lambda process=process: process)
        tracer._import_needed(Plan(uses=(use("adamw-8bit"),)))
    assert compilers[0] is compiler
    assert compilers[1](len) is len
    assert torch.compile is compiler


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("plan", [Plan(), Plan(uses=(use("adafactor"),))], ids=lambda p: p.label)
def test_counters_converted_the_short_way_are_those_that_torch_converts(
    plan: Plan, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_way = trace(words(), plan, device=device)
    monkeypatch.setattr(operators.Results, "lifted", lambda self, real: None)
    assert short_way == trace(words(), plan, device=device)


class Attending(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maps = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.maps:
            heads = part(x).view(1, -1, 2, 4).transpose(1, 2)
            x = functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(x.shape)
        return x[:, :4]


def _computed(job: Job, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often torch computes the result of each call in a trace of the plan: by its `call_key`."""
    counts, run = Counter[Any](), Guesses.call

    def noted(self: Guesses, func: Any, args: Any, kwargs: Any, values: Any = None) -> Any:
        counts[operators.call_key(func, args, kwargs)] += 1
        return run(self, func, args, kwargs, values)

    monkeypatch.setattr(Guesses, "call", noted)
    monkeypatch.setattr(operators, "_RESULTS", {})
    trace(job, plan, device="cuda:sm_80")
    return counts


def test_equal_updates_of_8_bit_optimizers_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    plan = Plan(uses=(use("adamw-8bit"), use("optimizer-in-backward")))
    counts = _computed(words(), plan, monkeypatch)
    updates = [count for call, count in counts.items() if call[0].namespace == "bitsandbytes"]
    assert updates
    assert set(updates) == {1}


def test_equal_calls_that_return_none_beside_tensors_are_computed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = _computed(regression(Attending), Plan(), monkeypatch)
    name = "aten._scaled_dot_product_efficient_attention_backward.default"
    backward = [count for call, count in counts.items() if str(call[0]) == name]
    assert backward == [1], "of two layers"
