"""Optimal recomputation: dropped tensors are recomputed bit for bit, and the memory budget is respected."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import words
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from memfit.catalog import machine
from memfit.cost.memory import memory_profile
from memfit.cost.recompute_ilp import smallest, solve
from memfit.cost.recompute_replay import Replay, replay
from memfit.jobs.training_step import TrainingStep
from memfit.planner import recompute_budget
from memfit.planner.capacity import needed_bytes
from memfit.planner.evaluate import Predictor
from memfit.planner.recompute_budget import choose_tensors, nominal_s
from memfit.planner.request import Request, job_facts, make_predictor
from memfit.planner.search import search
from memfit.planner.selection import Objective, score
from memfit.techniques.plan_file import plan_text, read_plan
from memfit.techniques.recompute.checkpointing import recompute
from memfit.techniques.recompute.optimal import encode_dropped, read_dropped
from memfit.techniques.recompute.selective_recompute import DroppedStorage, RecomputedCall, SelectiveRecompute
from memfit.techniques.registry import make_use
from memfit.trace.op_recording import record
from memfit.trace.tracer import trace
from memfit.types.errors import MemfitError, UserError
from memfit.types.job import Job, JobRef
from memfit.types.machine import Calibration
from memfit.types.plan import Accuracy, Bounds, Plan, use

EVERYTHING = frozenset(range(10_000))


def job_of(model: Callable[[], nn.Module], *, rows: int = 64, width: int = 32) -> Job:
    def batch(step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(1000 * seed + step)
        return torch.randn(rows, width, generator=g), torch.randn(rows, width, generator=g)

    return Job(
        name="one",
        build_model=model,
        make_batch=batch,
        batch_size=rows,
        loss=lambda net, b: functional.mse_loss(net(b[0]), b[1]),
    )


class Inplace(nn.Module):
    """Writes in place: to the result of a normalisation, to a slice, to a tensor that was already read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.norm, self.dropout = nn.BatchNorm1d(32), nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norm(self.first(x)), inplace=True)
        z = y * 2
        y2 = torch.zeros_like(y)
        y2[:, :16] = z[:, 16:]
        scaled = y2 * 3
        y2.add_(1.0)
        with torch.no_grad():
            self.seen.add_(z.mean(0))
        a, b = self.dropout(self.second(scaled + y2)).chunk(2, -1)
        return torch.cat([b.sigmoid() * a, a.exp()], -1) + self.seen + torch.rand_like(z)


class Penalised(nn.Module):
    """Computes a gradient in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        (grad,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return grad.tanh() * x


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        gate = x.sigmoid()
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        x, gate = ctx.saved_tensors
        return grad * gate * (1 + x * (1 - gate))


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(32, 32, batch_first=True), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.lstm(x[:, None].expand(-1, 3, -1))
        top, place = hidden.max(1)
        return self.out(Swish.apply(top)) + place


JOBS = {
    "words": words,
    "in place": lambda: job_of(Inplace),
    "double backward": lambda: job_of(Penalised),
    "own function, several outputs": lambda: job_of(Custom),
}


def _has_lstm_in_bf16() -> bool:
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(8, 8)(torch.randn(3, 1, 8))
    except RuntimeError:
        return False
    return True


def trained(job: Job, *uses: Any, dropped: frozenset[int] | None = None) -> Any:
    """Losses, weights and buffers after three steps."""
    torch.manual_seed(0)
    step = TrainingStep(job, Plan(uses=uses))
    if dropped is not None:

        @contextlib.contextmanager
        def without() -> Iterator[None]:
            recompute_mode = SelectiveRecompute(dropped)
            with saved_tensors_hooks(recompute_mode.pack, recompute_mode.unpack), recompute_mode:
                yield

        step.bench.forward_contexts.append(without)
    losses = [[float(v) for v in step.run(job.make_batch(i, 0))] for i in range(3)]
    state = {n: t.clone() for n, t in step.model.state_dict().items()}
    step.close()
    return losses, state


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize(
    "uses",
    [(), (use("bf16-autocast"),), (use("gradient-accumulation", micro_batches=2),)],
    ids=["plain", "autocast", "accumulated"],
)
def test_recomputing_every_tensor_leaves_losses_and_weights_bitwise_equal(
    name: str, uses: tuple[Any, ...]
) -> None:
    if "own function" in name and use("bf16-autocast") in uses and not _has_lstm_in_bf16():
        pytest.skip("oneDNN has no LSTM in bfloat16 for this processor (no AVX-512)")
    expected, given_up = trained(JOBS[name](), *uses), trained(JOBS[name](), *uses, dropped=EVERYTHING)
    assert given_up[0] == expected[0]
    assert all(torch.equal(given_up[1][n], expected[1][n]) for n in expected[1])


@given(st.sets(st.integers(0, 60)))
def test_recomputing_any_set_of_tensors_leaves_losses_bitwise_equal(dropped: set[int]) -> None:
    expected, given_up = trained(job_of(Inplace)), trained(job_of(Inplace), dropped=frozenset(dropped))
    assert given_up[0] == expected[0]


@pytest.mark.parametrize("name", JOBS)
def test_real_and_fake_steps_give_the_same_tensor_numbering(name: str) -> None:
    job = JOBS[name]()
    step, seen = TrainingStep(job, Plan()), []

    @contextlib.contextmanager
    def watching() -> Iterator[None]:
        recompute_mode = SelectiveRecompute(frozenset())
        with recompute_mode:
            yield
        seen.append((recompute_mode.key, recompute_mode.count))

    step.bench.forward_contexts.append(watching)
    step.run(job.make_batch(0, 0))
    recording = record(job, Plan())
    assert seen == [(recording.key, len(recording.storages))]


def test_a_tensor_written_in_place_after_a_read_is_pinned() -> None:
    recording = record(job_of(Inplace), Plan())
    assert any(m.pinned for m in recording.storages)


# --- the solver


@pytest.fixture(scope="module")
def wide() -> Job:
    """Several blocks of a few hundred KiB."""

    def model() -> nn.Module:
        return nn.Sequential(
            *(
                nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Dropout(0.1))
                for _ in range(6)
            )
        )

    return job_of(model, rows=2048, width=64)


@pytest.fixture(scope="module")
def played(wide: Job) -> Replay:
    return replay(record(wide, Plan()), nominal_s, Calibration(), least_bytes=4096)


@pytest.fixture(scope="module")
def least(played: Replay) -> int:
    return smallest(played).peak_bytes


def test_the_replayed_peak_of_a_choice_equals_its_traced_peak(wide: Job, played: Replay, least: int) -> None:
    plain = played.peak_bytes(frozenset())
    for share in (0.3, 0.6, 0.9):
        choice = solve(played, int(least + share * (plain - least)))
        assert choice is not None
        text = encode_dropped(played.recording.key, played.closure(choice.dropped))
        plan = Plan(uses=(make_use("optimal-checkpointing", {"dropped": text}),))
        found = memory_profile(trace(wide, plan), Calibration()).peak_bytes
        assert found == pytest.approx(choice.peak_bytes, rel=0.002)


def test_a_looser_budget_never_costs_more(played: Replay, least: int) -> None:
    plain = played.peak_bytes(frozenset())
    choices = [solve(played, least + (plain - least) * i // 8) for i in range(9)]
    costs = [c.cost_s for c in choices if c is not None]
    assert all(b <= a * 1.004 for a, b in pairwise(costs))  # the solver's optimality gap
    assert costs[-1] == 0


def test_the_solver_is_optimal_on_a_step_small_enough_to_enumerate() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))

    small = replay(record(job_of(model, rows=512), Plan()), nominal_s, Calibration(), least_bytes=1024)
    numbers = [c.number for c in small.candidates]
    subsets = [
        frozenset(n for i, n in enumerate(numbers) if mask >> i & 1) for mask in range(2 ** len(numbers))
    ]
    priced = [(small.peak_bytes(s), small.cost_s(s)) for s in subsets]
    plain, least = small.peak_bytes(frozenset()), min(p for p, _ in priced)
    for budget in (least, (least + plain) // 2, plain):
        best = min(cost for peak, cost in priced if peak <= budget)
        found = solve(small, budget)
        assert found is not None
        assert found.peak_bytes <= budget
        assert found.cost_s <= best * 1.004 + 1e-12


# --- plans


def asked(budget_mib: int) -> Plan:
    return Plan(uses=(make_use("optimal-checkpointing", {"budget_mib": budget_mib}),))


def test_a_budget_is_respected_and_always_gives_the_same_plan(wide: Job, tmp_path: Path) -> None:
    plain = memory_profile(trace(wide, Plan()), Calibration()).peak_bytes
    budget_mib = int(0.7 * plain / 2**20)
    plan = choose_tensors(wide, asked(budget_mib))
    assert memory_profile(trace(wide, plan), Calibration()).peak_bytes <= budget_mib * 2**20
    assert choose_tensors(wide, asked(budget_mib)) == plan
    assert choose_tensors(wide, plan) == plan
    path = tmp_path / "plan.yaml"
    path.write_text(plan_text(plan))
    assert read_plan(path) == plan
    assert trained(wide, *plan.uses)[0] == trained(wide)[0]


def test_a_budget_above_the_plain_peak_drops_nothing(wide: Job) -> None:
    (used,) = choose_tensors(wide, asked(1000)).uses
    assert used.settings["dropped"] == "none"


def test_a_budget_below_the_minimum_is_refused_with_the_minimum(wide: Job) -> None:
    with pytest.raises(UserError, match=r"a budget of 1 MiB; allowed: at least \d+ MiB") as told:
        choose_tensors(wide, asked(1))
    least = int(str(told.value).partition("at least ")[2].split()[0])
    assert choose_tensors(wide, asked(least)).uses[0].settings["dropped"] != "none"


def test_the_smallest_choice_found_is_used_where_the_solver_returns_none(
    wide: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as told:
        choose_tensors(wide, asked(1))
    least_mib = int(str(told.value).partition("at least ")[2].split()[0])
    monkeypatch.setattr(recompute_budget, "solve", lambda *given, **how: None)
    plan = choose_tensors(wide, asked(least_mib + 1))
    found = memory_profile(trace(wide, plan), Calibration()).peak_bytes
    assert found <= (least_mib + 1) * 2**20
    with pytest.raises(UserError, match=f"at least {least_mib} MiB"):
        choose_tensors(wide, asked(least_mib - 1))


def test_a_quick_choice_is_within_the_budget_and_does_not_look_for_the_smallest_one(
    wide: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = memory_profile(trace(wide, Plan()), Calibration()).peak_bytes
    budget_mib = int(0.7 * plain / 2**20)
    plan = choose_tensors(wide, asked(budget_mib), quickly=True)
    assert memory_profile(trace(wide, plan), Calibration()).peak_bytes <= budget_mib * 2**20
    monkeypatch.setattr(recompute_budget, "smallest", None)  # calling it would fail
    with pytest.raises(UserError, match="a budget of 1 MiB; `memfit estimate`"):
        choose_tensors(wide, asked(1), quickly=True)


def test_in_a_search_forked_processes_choose_tensors_quickly(wide: Job) -> None:
    predictor = Predictor(job=wide, machine=machine("A100-80GB-SXM"), job_facts=job_facts(wide, "cuda"))
    predictor.trace_all([Plan(), Plan(uses=(make_use("adamw-fused", {}),))])  # forks the processes
    predictor.is_searching = True
    with pytest.raises(UserError, match="a budget of 1 MiB; `memfit estimate`"):
        predictor.resolve(asked(1))


def test_what_the_solver_prints_is_not_in_the_output(
    wide: Job, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = scipy.optimize.milp

    def prints(*given: Any, **how: Any) -> Any:
        ctypes.CDLL(None).puts(b"a line of the solver")
        return solved(*given, **how)

    monkeypatch.setattr(scipy.optimize, "milp", prints)
    plain = memory_profile(trace(wide, Plan()), Calibration()).peak_bytes
    choose_tensors(wide, asked(int(0.7 * plain / 2**20)))
    print("afterwards", flush=True)
    assert capfd.readouterr().out == "afterwards\n"


def test_training_refuses_a_plan_whose_tensors_are_not_chosen_yet() -> None:
    with pytest.raises(UserError, match="no tensors to drop have been chosen"):
        TrainingStep(words(), asked(100))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, debug: int = 1, scale: float = 1.0) -> torch.Tensor:
        return debug * scale * torch.relu(self.up(x))


def test_a_recomputed_block_gets_arguments_that_are_called_as_those_of_checkpoint() -> None:
    block, x = Scaled(), torch.ones(2, 4)
    plain = block(x, debug=3, scale=2.0)
    plain.sum().backward()
    gradient, block.up.weight.grad = block.up.weight.grad, None
    recompute(block)
    again = block(x, debug=3, scale=2.0)
    again.sum().backward()
    assert torch.equal(again, plain)
    assert torch.equal(block.up.weight.grad, gradient)


def test_a_choice_for_another_model_is_refused() -> None:
    used = make_use("optimal-checkpointing", {"dropped": "00000000:3-5"})
    step = TrainingStep(words(), Plan(uses=(used,)))
    with pytest.raises(UserError, match="other operators than those the plan was made for"):
        step.run(step.job.make_batch(0, 0))


def test_a_parameter_changed_before_recomputation_is_an_error() -> None:
    weight = nn.Parameter(torch.ones(4))
    recompute_mode = SelectiveRecompute(EVERYTHING)
    with saved_tensors_hooks(recompute_mode.pack, recompute_mode.unpack), recompute_mode:
        out = (weight * 2).detach().requires_grad_().exp().exp()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(MemfitError, match="backward changed a parameter"):
        out.sum().backward()


@given(st.sets(st.integers(0, 300), min_size=1), st.integers(0, 2**32 - 1))
def test_a_choice_of_tensors_survives_writing_and_reading(numbers: set[int], key: int) -> None:
    text = encode_dropped(key, numbers)
    assert read_dropped(text) == (key, frozenset(numbers))
    assert make_use("optimal-checkpointing", {"dropped": text}).settings["dropped"] == text


def test_an_invalid_choice_of_tensors_is_refused() -> None:
    with pytest.raises(UserError, match="dropped is 'all'"):
        make_use("optimal-checkpointing", {"dropped": "all"})


def test_a_budget_is_respected_across_micro_batches(wide: Job) -> None:
    twice = use("gradient-accumulation", micro_batches=2)
    job = dataclasses.replace(wide, batch_size=2048)
    plain = memory_profile(trace(job, Plan(uses=(twice,))), Calibration()).peak_bytes
    budget_mib = int(0.85 * plain / 2**20)
    plan = choose_tensors(job, asked(budget_mib).with_use(twice))
    assert memory_profile(trace(job, plan), Calibration()).peak_bytes <= budget_mib * 2**20


@pytest.mark.parametrize("name", JOBS)
def test_recomputation_leaves_no_objects_for_the_garbage_collector(name: str) -> None:
    def alive() -> set[int]:
        return {id(o) for o in gc.get_objects() if type(o) in (DroppedStorage, RecomputedCall)}

    gc.collect()
    gc.disable()
    before = alive()
    try:
        trained(JOBS[name](), dropped=EVERYTHING)
        assert not alive() - before
    finally:
        gc.enable()


@pytest.mark.long
def test_a_search_proposes_a_budget_where_it_beats_every_other_plan() -> None:
    on = machine("L4")
    asked = Request(job_ref=JobRef(spec="char-lm"), machine=on, accuracy=Accuracy.EXACT)
    basis = make_predictor(asked)[1].whole(Plan())
    tight = dataclasses.replace(asked, cap_bytes=needed_bytes(basis, on) - 20 * 2**20)
    without = dataclasses.replace(tight, bounds=Bounds(without=("optimal-checkpointing",)))
    proposed, other = (search(r, lambda *told: None).result.recommended for r in (tight, without))
    assert proposed is not None
    assert other is not None
    assert proposed.estimate.plan.get("optimal-checkpointing") is not None
    assert other.estimate.plan.get("optimal-checkpointing") is None
    assert needed_bytes(proposed.estimate, on) <= (tight.cap_bytes or 0)
    assert score(proposed.estimate, Objective.FASTEST) < score(other.estimate, Objective.FASTEST)
