"""A rank dies in training: the run resumes from its last checkpoint and ends like an undisturbed one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from memfit.runtime.restart import RESTARTS
from memfit.techniques.registry import make_use
from memfit.types.job import JobRef
from memfit.types.launch import CheckpointSettings, RunSpec
from memfit.types.plan import Plan
from memfit.types.result import Estimate, Interval, OutcomeKind
from memfit.workflows.single_run import run_spec

STEPS = 7
SOURCE = """
import os
import signal
from pathlib import Path

import torch
from torch import nn

from memfit import Job

DEATHS = Path(__file__).parent / "deaths"


def make_batch(step, seed):
    left = int(DEATHS.read_text())
    if step == 5 and left and os.environ.get("RANK", "0") == os.environ.get("LAST", "1"):
        DEATHS.write_text(str(left - 1))
        os.kill(os.getpid(), signal.SIGKILL)
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return torch.randn(8, 4, generator=generator)


def loss(model, batch):
    return (model(batch) - batch).square().mean()


job = Job(
    name="mortal", make_batch=make_batch, loss=loss, batch_size=8,
    build_model=lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 4)),
)
"""


def _run(folder: Path, plan: Plan, deaths: int, *, save: bool = True) -> tuple[Any, list[str]]:
    folder.mkdir()
    (folder / "job.py").write_text(SOURCE.replace('"LAST", "1"', f'"LAST", "{plan.ranks - 1}"'))
    (folder / "deaths").write_text(str(deaths))
    keep = CheckpointSettings(save=str(folder / "kept"), every_steps=2) if save else CheckpointSettings()
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
    )
    told: list[str] = []

    def progress(stage: str, done: int, total: int, text: str) -> None:
        told.extend([text] if "started again" in text else [])

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
    return run_spec(spec, estimate, progress, "x").measurement, told


ALONE, TWO = Plan(), Plan(ranks=2, uses=(make_use("fsdp2", {}),))


@pytest.mark.parametrize("plan", [ALONE, TWO], ids=["one rank", "two ranks"])
def test_a_restarted_run_ends_with_the_losses_of_an_undisturbed_run(plan: Plan, tmp_path: Path) -> None:
    undisturbed, nothing = _run(tmp_path / "whole", plan, 0)
    disturbed, told = _run(tmp_path / "died", plan, 1)
    assert (undisturbed.outcome, disturbed.outcome) == (OutcomeKind.OK, OutcomeKind.OK), disturbed.reason
    assert len(undisturbed.losses) == STEPS
    assert disturbed.losses == undisturbed.losses
    assert disturbed.weights_digest == undisturbed.weights_digest
    assert disturbed.limit_kind == undisturbed.limit_kind != ""
    assert len(disturbed.step_s) == STEPS - 4  # it resumed from the checkpoint of four steps
    assert not nothing
    assert told == ["x: started again, killed by SIGKILL"]


def _ends(found: tuple[Any, Sequence[str]]) -> tuple[OutcomeKind, int]:
    return found[0].outcome, len(found[1])


def test_restarts_are_limited_and_need_checkpoints(tmp_path: Path) -> None:
    assert _ends(_run(tmp_path / "always", ALONE, 99)) == (OutcomeKind.FAILED, RESTARTS)
    assert _ends(_run(tmp_path / "unsaved", ALONE, 1, save=False)) == (OutcomeKind.FAILED, 0)
