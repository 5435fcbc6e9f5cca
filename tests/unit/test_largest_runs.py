"""The largest value that runs under a cap, by short runs: `memfit plan --largest --measure`."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import memfit
from memfit.cli.largest import _measured_remarks
from memfit.planner.largest import LargestValue, MeasuredSize, TracedSize
from memfit.planner.largest_runs import MOST_RUNS, find_boundary
from memfit.planner.request import Request
from memfit.runtime import local_machine
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.plan import Plan
from memfit.types.result import OutcomeKind
from memfit.workflows.largest import largest

CAP = 1_000_000
MIB = 2**20


def traced(
    safe: int, expected: int, *, step: int = 1, limit: str = "memory", each: int = 100
) -> LargestValue:
    """Sizes that are expected to need ``each`` bytes per unit of the value."""

    def size(value: int) -> TracedSize:
        return TracedSize(value=value, needed_bytes=each * value, expected_bytes=each * value, fits=True)

    sizes = [size(v) for v in sorted({safe, safe + step, expected, expected + step})]
    return LargestValue(
        dimension="batch",
        plan=Plan(),
        cap_bytes=CAP,
        step=step,
        safe=size(safe),
        safe_next=size(safe + step),
        expected=size(expected),
        expected_next=size(expected + step),
        limit=limit,
        traced=tuple(sizes),
    )


class Machine:
    """Runs a value in ``each`` bytes per unit; above the cap it runs out of memory."""

    def __init__(self, each: float) -> None:
        self.each, self.values = each, list[int]()

    def run(self, value: int) -> MeasuredSize:
        assert value > 0
        self.values.append(value)
        used = int(self.each * value)
        outcome = OutcomeKind.OK if used <= CAP else OutcomeKind.OOM
        return MeasuredSize(value=value, outcome=outcome, process_bytes=min(used, CAP))


@given(
    each=st.floats(min_value=85, max_value=115),
    step=st.sampled_from([1, 4, 100]),
    margin=st.floats(min_value=0.8, max_value=1.0),
)
def test_the_largest_that_runs_three_times_is_next_to_one_that_dies_three_times(
    each: float, step: int, margin: float
) -> None:
    machine = Machine(each)
    expected = CAP // 100 // step * step
    safe = max(step, int(expected * margin) // step * step)
    result = find_boundary(machine.run, traced(safe, expected, step=step), most_runs=40)
    assert result.ran is not None
    assert result.died is not None
    assert result.died.value - result.ran.value <= max(step, result.ran.value / 1000)
    assert result.ran.value % step == 0
    assert int(each * result.ran.value) <= CAP < int(each * result.died.value)
    assert len(machine.values) <= MOST_RUNS
    both = (result.ran.value, result.died.value)
    assert all(machine.values.count(v) == (3 if v in both else 1) for v in machine.values)
    assert not result.uncertain


@pytest.mark.parametrize("ran", [(True, False, True), (False, True, True)])
def test_a_value_that_runs_in_some_runs_only_is_neither_the_largest_nor_the_next(
    ran: tuple[bool, ...],
) -> None:
    near = 10_000
    machine = Machine(100.0)
    seen: list[int] = []

    def run(value: int) -> MeasuredSize:
        size = machine.run(value)
        seen.append(value)
        if value == near and not ran[seen.count(near) - 1]:
            return dataclasses.replace(size, outcome=OutcomeKind.OOM)
        return size

    result = find_boundary(run, traced(near, near + 1))
    assert result.ran is not None
    assert result.died is not None
    assert result.uncertain == (near,)
    assert result.ran.value < near < result.died.value
    assert seen.count(result.ran.value) == seen.count(result.died.value) == 3
    both = dataclasses.replace(traced(near, near + 1), measured=result)
    assert f", {near} ran in some runs only, {result.died.value} ran out of memory" in str(both)
    assert any(f"{near} ran in {seen.count(near) - 1} of " in text for text in _measured_remarks(both))


@given(each=st.floats(min_value=90, max_value=110), noise=st.integers(0, 3000), seed=st.integers(0, 2**16))
def test_with_noise_near_the_cap_both_ends_hold_in_all_runs(each: float, noise: int, seed: int) -> None:
    draw, machine = random.Random(seed), Machine(each)

    def run(value: int) -> MeasuredSize:
        size = machine.run(value)
        over = int(each * value) + draw.randint(-noise, noise) > CAP
        return dataclasses.replace(size, outcome=OutcomeKind.OOM if over else OutcomeKind.OK)

    result = find_boundary(run, traced(9000, 10_000), most_runs=100)
    assert result.ran is not None
    assert result.died is not None
    for end, outcome in ((result.ran, OutcomeKind.OK), (result.died, OutcomeKind.OOM)):
        outcomes = [r.outcome for r in result.runs if r.value == end.value]
        assert outcomes == [outcome] * 3
    assert all(r.value < result.died.value for r in result.runs if r.outcome is OutcomeKind.OK)


def test_if_the_safe_value_dies_a_smaller_one_is_sought() -> None:
    machine = Machine(130.0)
    result = find_boundary(machine.run, traced(9000, 10000))
    assert result.ran is not None
    assert result.ran.value < 9000
    assert result.died is not None
    assert 0 < result.died.value - result.ran.value <= 9


def test_if_nothing_runs_that_is_said() -> None:
    result = find_boundary(Machine(2e6).run, traced(3, 4))
    assert result.ran is None
    assert result.died is not None
    assert result.died.value == 1


def test_a_limit_that_is_not_memory_is_run_once() -> None:
    machine = Machine(1.0)
    result = find_boundary(machine.run, traced(64, 64, limit="job"))
    assert machine.values == [64]
    assert result.ran is not None
    assert result.died is None


def test_a_run_that_fails_otherwise_ends_the_search() -> None:
    def run(value: int) -> MeasuredSize:
        return MeasuredSize(value=value, outcome=OutcomeKind.FAILED, reason="loss is nan")

    result = find_boundary(run, traced(8, 9))
    assert result.ran is None
    assert result.failed is not None
    assert result.failed.reason == "loss is nan"


def test_the_value_of_a_measured_answer_is_the_one_that_ran() -> None:
    answer = traced(8000, 9000)
    measured = find_boundary(Machine(101.0).run, answer)
    assert measured.ran is not None
    both = dataclasses.replace(answer, measured=measured)
    assert both.value == measured.ran.value > 8000
    assert f"measured: {measured.ran.value} ran" in str(both)


def mean_square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(batch).square().mean()
    return loss


IN_A_PROCESS_OF_ITS_OWN = """
import torch
from torch import nn
import memfit

def mean_square(model, batch):
    return model(batch).square().mean()

model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64))
mean_square(model, torch.randn(8, 64)).backward()  # torch has worked in this process before
result = memfit.largest(
    model, torch.randn(512, 64), loss=mean_square, memory="32MiB", step=64, measure=True
)
measured = result.measured
assert measured.died.value - measured.ran.value == 64, measured
assert result.value == measured.ran.value >= result.safe.value
assert {run.limit for run in measured.runs} <= {"RLIMIT_DATA", "cgroup"}
assert all(p.grad is not None for p in model.parameters())  # this process is as it was
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_objects_of_this_process_are_run_under_the_cap() -> None:
    """In a fresh process: memory that earlier tests have freed would count for nothing under the cap."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_A_PROCESS_OF_ITS_OWN],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_measuring_needs_a_cap_and_this_machine() -> None:
    model = nn.Linear(4, 4)
    for machine, memory in ((None, None), ("H100-SXM", "1GiB")):
        with pytest.raises(UserError, match="measure=True needs the argument memory"):
            memfit.largest(
                model, torch.randn(2, 4), loss=mean_square, measure=True, memory=memory, machine=machine
            )


def test_the_question_to_measure_another_machine_or_a_fixed_job_is_refused(tmp_path: Path) -> None:
    here = local_machine.this_machine("world", "cpu")
    without_cap = Request(job_ref=JobRef(spec="char-lm"), machine=here)
    with pytest.raises(UserError, match="needs a memory cap below"):
        largest(without_cap, "batch", measure=True)
    (tmp_path / "my.py").write_text(
        "import torch\nfrom memfit import Job\n"
        "job = Job(name='x', build_model=lambda: torch.nn.Linear(4, 4), batch_size=2,\n"
        "    make_batch=lambda step, seed: torch.ones(2, 4), loss=lambda m, b: m(b).sum())\n"
    )
    fixed = Request(job_ref=JobRef(spec=f"{tmp_path / 'my.py'}:job"), machine=here, cap_bytes=MIB)
    with pytest.raises(UserError, match="takes no sizes"):
        largest(fixed, "batch", measure=True)
