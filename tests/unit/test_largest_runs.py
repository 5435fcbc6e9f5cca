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
from memfit.planner.largest_runs import MOST_RUNS, find_boundary, reserve_bytes
from memfit.planner.request import Request
from memfit.runtime import local_machine
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.plan import Plan
from memfit.types.result import OutcomeKind
from memfit.workflows.largest import largest

CAP = 400_000_000
UNIT = 40_000  # bytes per unit of the value: 10,000 units fill the cap
MIB = 2**20
REDUCED, RAISED = CAP - reserve_bytes(CAP), CAP + reserve_bytes(CAP)


def traced(
    safe: int, expected: int, *, step: int = 1, limit: str = "memory", each: int = UNIT
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
    """Runs a value in ``each`` bytes per unit, more or less by ``noise``, if the cap allows it."""

    def __init__(self, each: float, *, noise: int = 0, seed: int = 0) -> None:
        self.each, self.noise, self.random = each, noise, random.Random(seed)
        self.runs = list[tuple[int, int]]()

    def run(self, value: int, cap_bytes: int) -> MeasuredSize:
        assert value > 0
        self.runs.append((value, cap_bytes))
        used = int(self.each * value) + self.random.randint(-self.noise, self.noise)
        outcome = OutcomeKind.OK if used <= cap_bytes else OutcomeKind.OOM
        return MeasuredSize(
            value=value, cap_bytes=cap_bytes, outcome=outcome, process_bytes=min(used, cap_bytes)
        )


@given(
    each=st.floats(min_value=0.85 * UNIT, max_value=1.15 * UNIT),
    step=st.sampled_from([1, 4, 100, 2000]),
    margin=st.floats(min_value=0.8, max_value=1.0),
)
def test_the_largest_runs_with_less_than_the_cap_and_the_next_dies_under_it(
    each: float, step: int, margin: float
) -> None:
    machine = Machine(each)
    expected = CAP // UNIT // step * step
    safe = max(step, int(expected * margin) // step * step)
    result = find_boundary(machine.run, traced(safe, expected, step=step), most_runs=40)
    assert result.ran is not None
    assert result.died is not None
    assert result.ran.value % step == 0
    near = max(step * each, 0.6 * reserve_bytes(CAP))  # `each` differs from what is expected
    assert REDUCED - near < each * result.ran.value <= REDUCED
    assert RAISED < each * result.died.value < RAISED + 3 * near
    assert len(machine.runs) <= MOST_RUNS
    assert machine.runs.count((result.ran.value, REDUCED)) == 2
    assert machine.runs.count((result.died.value, RAISED)) == 2


@given(
    each=st.floats(min_value=0.9 * UNIT, max_value=1.1 * UNIT),
    noise=st.integers(0, reserve_bytes(CAP) // 2),
    seed=st.integers(0, 2**16),
)
def test_with_noise_below_the_reserve_both_ends_hold_in_every_further_run(
    each: float, noise: int, seed: int
) -> None:
    machine = Machine(each, noise=noise, seed=seed)
    result = find_boundary(machine.run, traced(9000, 10_000), most_runs=100)
    assert result.ran is not None
    assert result.died is not None
    assert all(machine.run(result.ran.value, CAP).outcome is OutcomeKind.OK for _ in range(20))
    assert all(machine.run(result.died.value, CAP).outcome is OutcomeKind.OOM for _ in range(20))
    assert not any(result.died.value <= r.value for r in result.runs if r.outcome is OutcomeKind.OK)


def test_values_between_the_two_are_named() -> None:
    near = (CAP + REDUCED) // 2 // UNIT
    result = find_boundary(Machine(UNIT).run, traced(near, near + 1))
    assert result.ran is not None
    assert result.died is not None
    assert result.ran.value < near < result.died.value
    assert result.uncertain
    both = dataclasses.replace(traced(near, near + 1), measured=result)
    between = ", ".join(map(str, result.uncertain))
    assert f"{between} too near the cap to tell, {result.died.value} ran out of memory" in str(both)
    assert all(
        any(f"{v} is too near the cap" in text for text in _measured_remarks(both)) for v in result.uncertain
    )


@pytest.mark.parametrize(("cap", "reserve"), [(128 * MIB, MIB / 2), (800 * MIB, 2 * MIB), (600_000, 300_000)])
def test_the_reserve_is_half_a_mib_or_a_quarter_percent_and_at_most_half(cap: int, reserve: float) -> None:
    assert reserve_bytes(cap) == reserve


def test_if_the_safe_value_dies_a_smaller_one_is_sought() -> None:
    machine = Machine(1.3 * UNIT)
    result = find_boundary(machine.run, traced(9000, 10000))
    assert result.ran is not None
    assert result.ran.value < 9000
    assert result.died is not None
    assert 0 < result.died.value - result.ran.value <= 0.01 * result.ran.value


def test_if_nothing_runs_that_is_said() -> None:
    result = find_boundary(Machine(2 * CAP).run, traced(3, 4))
    assert result.ran is None
    assert result.died is not None
    assert result.died.value == 1


def test_a_limit_that_is_not_memory_is_run_once() -> None:
    machine = Machine(1.0)
    result = find_boundary(machine.run, traced(64, 64, limit="job"))
    assert machine.runs == [(64, REDUCED)]
    assert result.ran is not None
    assert result.died is None


def test_a_run_that_fails_otherwise_ends_the_search() -> None:
    def run(value: int, cap_bytes: int) -> MeasuredSize:
        return MeasuredSize(
            value=value, cap_bytes=cap_bytes, outcome=OutcomeKind.FAILED, reason="loss is nan"
        )

    result = find_boundary(run, traced(8, 9))
    assert result.ran is None
    assert result.failed is not None
    assert result.failed.reason == "loss is nan"


def test_the_value_of_a_measured_answer_is_the_one_that_ran() -> None:
    answer = traced(8000, 9000)
    measured = find_boundary(Machine(1.01 * UNIT).run, answer)
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
assert 64 <= measured.died.value - measured.ran.value <= 5 * 64, measured  # 0.5 MiB are 80
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
