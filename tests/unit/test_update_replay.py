"""An optimizer's update is run for one parameter of each layout and repeated for the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import words

from memfit.trace import operators, tracer, update_replay
from memfit.trace.tracer import trace
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
