"""A rank dies or hangs in training: the run resumes from its last checkpoint and ends like an undisturbed
one. On SIGTERM it saves and ends."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from memfit.jobs import checkpoints
from memfit.runtime import child_process
from memfit.runtime.child_process import Event
from memfit.techniques.registry import make_use
from memfit.types.job import JobRef
from memfit.types.launch import CheckpointSettings, RunSpec
from memfit.types.plan import Plan
from memfit.types.result import Estimate, Interval, OutcomeKind
from memfit.workflows.single_run import run_spec

pytestmark = pytest.mark.usefixtures("forked_workers")
STEPS = 9
SOURCE = """
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

from memfit import Job

TARGET, IN_STEP, PAUSE_S = os.getpid(), bool(IS_IN_STEP), 0
DEATHS = Path(__file__).parent / "deaths"


STEP = -1


def disturb():
    left = int(DEATHS.read_text())
    if STEP == 5 and left and os.environ.get("RANK", "0") == "LAST":
        DEATHS.write_text(str(left - 1))
        os.kill(TARGET, signal.SIGNAL)


def make_batch(step, seed):
    global STEP
    STEP = step
    time.sleep(PAUSE_S if step > 5 else 0)
    if not IN_STEP:
        disturb()
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return torch.randn(8, 4, generator=generator)


def loss(model, batch):
    if IN_STEP:
        disturb()
    return (model(batch) - batch).square().mean()


job = Job(
    name="mortal", make_batch=make_batch, loss=loss, batch_size=8,
    build_model=lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 4)),
)
"""

SLOW = """
fsync = os.fsync


def slow_fsync(file):
    if STEP >= 3 and (Path(__file__).parent / "kept" / "step-00000004.partial").exists():
        time.sleep(1.0)
    fsync(file)


os.fsync = slow_fsync
"""


def _run(
    folder: Path,
    plan: Plan,
    deaths: int,
    *,
    save: bool = True,
    signal: str = "SIGKILL",
    in_step: bool = False,
    asynchronous: bool = False,
    restarts: int = 3,
) -> tuple[Any, list[str]]:
    """Train with ``deaths`` times a signal in step 5: to the last rank, or if it is SIGTERM, to this
    process. ``in_step``: while the step runs, and not while its batch is made. ``asynchronous``: saves are,
    and the second one takes longer than the step that follows."""
    folder.mkdir()
    target = str(os.getpid()) if signal == "SIGTERM" else "os.getpid()"
    source = SOURCE.replace('"LAST"', f'"{plan.ranks - 1}"').replace("SIGNAL", signal)
    source = source.replace(
        "os.getpid(), bool(IS_IN_STEP), 0", f"{target}, {in_step}, {0.5 * (signal == 'SIGTERM')}"
    )
    (folder / "job.py").write_text(source + (SLOW if asynchronous else ""))
    (folder / "deaths").write_text(str(deaths))
    keep = CheckpointSettings(
        save=str(folder / "kept"), every_steps=2, asynchronous=asynchronous, restarts=restarts
    )
    keep = keep if save else CheckpointSettings()
    spec = RunSpec(
        name="x",
        role="run",
        job=JobRef(spec=f"{folder / 'job.py'}:job"),
        plan=plan,
        seed=0,
        steps=STEPS,
        threads=1,
        evaluate=False,
        batch_size=8,
        keep=keep,
        cap_bytes=64 * 2**20,
        stall_s=6.0 if signal == "SIGSTOP" else None,
    )
    told: list[str] = []

    def progress(stage: str, done: int, total: int, text: str) -> None:
        told.extend([text] if "started again" in text else [])

    def on_notice(event: Event) -> None:
        told.extend([str(event["text"])] if event["event"] == "stalled" else [])

    none = Interval(value=0.0, low=0.0, high=0.0)
    estimate = Estimate(
        plan=plan,
        allocated_bytes=none,
        phase_peak_bytes={},
        at_peak_bytes={},
        by_module_bytes={},
        step_s=None,
        flops_per_step=0,
        traced=False,
    )
    return run_spec(spec, estimate, progress, "x", strict=True, on_notice=on_notice).measurement, told


ALONE, TWO = Plan(), Plan(ranks=2, uses=(make_use("fsdp2", {}),))


@pytest.fixture(scope="module")
def undisturbed_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Plan], tuple[Any, Path]]:
    """What an undisturbed run of a plan measured, and the folder of its checkpoints; each plan runs once."""

    @functools.cache
    def of(plan: Plan) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp("undisturbed") / "whole"
        measured, told = _run(folder, plan, 0)
        assert measured.outcome is OutcomeKind.OK, measured.reason
        assert not told
        return measured, folder / "kept"

    return of


@pytest.mark.quick_cases("one rank", "in a step")
@pytest.mark.parametrize(
    ("plan", "in_step"),
    [(ALONE, False), (TWO, False), (TWO, True)],
    ids=["one rank", "two ranks", "in a step"],
)
def test_a_restarted_run_ends_with_the_losses_of_an_undisturbed_run(
    plan: Plan, in_step: bool, tmp_path: Path, undisturbed_run: Callable[[Plan], tuple[Any, Path]]
) -> None:
    undisturbed, _ = undisturbed_run(plan)
    disturbed, told = _run(tmp_path / "died", plan, 1, in_step=in_step)
    assert disturbed.outcome is OutcomeKind.OK, disturbed.reason
    assert len(undisturbed.losses) == STEPS
    assert disturbed.losses == undisturbed.losses
    assert disturbed.weights_digest == undisturbed.weights_digest
    assert disturbed.limit_kind == undisturbed.limit_kind != ""
    assert len(disturbed.step_s) == STEPS - 4  # it resumed from the checkpoint of four steps
    assert told == [f"x: started again, {'rank 1: ' if plan.ranks > 1 else ''}killed by SIGKILL"]
    (restart,) = disturbed.restarts
    assert (restart.rank, restart.step, restart.first_step) == (plan.ranks - 1, 5, 4)


def test_a_run_killed_while_it_saves_asynchronously_resumes_from_the_older_checkpoint(
    tmp_path: Path, undisturbed_run: Callable[[Plan], tuple[Any, Path]]
) -> None:
    undisturbed, kept = undisturbed_run(ALONE)
    disturbed, _ = _run(tmp_path / "died", ALONE, 1, asynchronous=True)
    assert disturbed.outcome is OutcomeKind.OK, disturbed.reason
    (restart,) = disturbed.restarts
    assert (restart.step, restart.first_step) == (5, 2)  # training went on while step 4 was being saved
    assert disturbed.losses == undisturbed.losses
    assert disturbed.weights_digest == undisturbed.weights_digest
    saved, same = (checkpoints.find(folder)[1] for folder in (tmp_path / "died" / "kept", kept))
    assert saved.files_sha256["__0_0.distcp"] == same.files_sha256["__0_0.distcp"]
    elements = 4 * 8 + 8 + 8 * 4 + 4
    assert disturbed.save_copy_bytes == 3 * 4 * elements + 4 * 4 + 5056  # AdamW, its steps, random state


def test_a_rank_that_hangs_is_named_and_the_run_restarts(tmp_path: Path) -> None:
    disturbed, told = _run(tmp_path / "hung", TWO, 1, signal="SIGSTOP", in_step=True)
    assert disturbed.outcome is OutcomeKind.OK, disturbed.reason
    assert "rank 1 in forward of step 5, stopped by a signal" in told[0]
    assert disturbed.restarts[0].reason.startswith("ended after no progress for ")
    assert len(disturbed.losses) == STEPS


def test_on_sigterm_the_ranks_save_after_the_same_step_and_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        child_process, "subprocess", subprocess
    )  # started anew, as schedulers signal processes
    stopped, told = _run(tmp_path / "stopped", TWO, 1, signal="SIGTERM", in_step=True)
    assert (stopped.outcome, told) == (OutcomeKind.INTERRUPTED, []), stopped.reason
    assert stopped.reason.startswith(f"stopped by SIGTERM after {stopped.steps_done} steps, which are saved")
    assert 6 < stopped.steps_done < STEPS
    assert len(stopped.losses) == stopped.steps_done
    assert checkpoints.find(tmp_path / "stopped" / "kept")[1].step == stopped.steps_done


def _ends(found: tuple[Any, Sequence[str]]) -> tuple[OutcomeKind, int]:
    return found[0].outcome, len(found[1])


def test_restarts_are_limited_and_need_checkpoints(tmp_path: Path) -> None:
    assert _ends(_run(tmp_path / "always", ALONE, 99, restarts=1)) == (OutcomeKind.FAILED, 1)
    assert _ends(_run(tmp_path / "unsaved", ALONE, 1, save=False)) == (OutcomeKind.FAILED, 0)
