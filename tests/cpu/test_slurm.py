"""Exported files and sweeps on a real Slurm of one node, which scripts/slurm.sh starts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memfit.cli import main
from memfit.types.result import OutcomeKind, Run
from memfit.workflows.exported_run import read_exported_run

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm.sh"
STEPS = 20
JOB = f"""
import time
import torch
from torch import nn
from memfit import Job

def make_batch(step, seed):
    time.sleep(PAUSE_S)
    if step == 6:
        EVENT
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(1000 * seed + step))

job = Job(
    name="small", make_batch=make_batch, loss=lambda m, b: (m(b) - b).square().mean(), batch_size=8,
    build_model=lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 4)), steps={STEPS},
)
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a Slurm, and yield how it limits memory: "cgroup" or "polling"."""
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run(
        ["bash", SCRIPT, "start", folder], capture_output=True, text=True, timeout=300, check=False
    )
    if started.returncode == 3:
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stderr
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield started.stdout.split()[-1]
    finally:
        subprocess.run(["bash", SCRIPT, "stop", folder], check=False, timeout=120)
        if before is None:
            del os.environ["SLURM_CONF"]


def exported(folder: Path, *, pause_s: float = 0.0, event: str = "pass", options: str = "") -> Path:
    folder.mkdir()
    (folder / "job.py").write_text(JOB.replace("PAUSE_S", str(pause_s)).replace("EVENT", event))
    (folder / "plan.yaml").write_text("ranks: 2\ntechniques:\n  ddp: {}\n")
    words = f"--plan {folder}/plan.yaml --to slurm --out {folder}/out --threads 1 {options}"
    assert main(["export", f"{folder}/job.py:job", *words.split()]) == 0
    return folder / "out"


def submit(folder: Path, *options: str) -> str:
    """Submit the folder's job and return its ID."""
    submitted = ["sbatch", "--parsable", *options, "job.sbatch"]
    return subprocess.run(submitted, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def job_field(job_id: str, field: str) -> str:
    text = subprocess.run(
        ["scontrol", "show", "job", "--oneliner", job_id], check=True, capture_output=True, text=True
    ).stdout
    match = re.search(rf"\b{field}=(\S+)", text)
    assert match is not None
    return match[1]


def await_state(job_id: str, *states: str, limit_s: float = 200.0) -> str:
    until_s = time.monotonic() + limit_s
    while (state := job_field(job_id, "JobState")) not in states:
        assert time.monotonic() < until_s, f"job {job_id} is {state}"
        time.sleep(0.3)
    return state


ENDS = ("COMPLETED", "FAILED", "OUT_OF_MEMORY", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def run_to_end(folder: Path, *options: str) -> tuple[str, Run]:
    state = await_state(submit(folder, *options), *ENDS)
    return state, read_exported_run(folder).run


def test_a_requeued_job_resumes_with_the_losses_of_an_undisturbed_one(slurm: str, tmp_path: Path) -> None:
    state, whole = run_to_end(exported(tmp_path / "whole", pause_s=0.01))
    assert (state, whole.measurement.outcome) == ("COMPLETED", OutcomeKind.OK)
    ranks = whole.measurement.ranks
    assert ranks is not None
    assert (ranks.nodes, ranks.per_node, ranks.collectives) == (1, 2, "gloo")

    out = exported(tmp_path / "requeued", pause_s=0.5, options="--save kept --save-every 4")
    job_id = submit(out)
    until_s = time.monotonic() + 100
    while not (out / "kept" / "step-00000004").exists() and time.monotonic() < until_s:
        time.sleep(0.2)
    subprocess.run(["scontrol", "requeue", job_id], check=True)
    assert await_state(job_id, *ENDS) == "COMPLETED"
    assert job_field(job_id, "Restarts") == "1"
    requeued = read_exported_run(out).run.measurement
    assert requeued.losses == whole.measurement.losses
    assert requeued.weights_digest == whole.measurement.weights_digest
    (restart,) = requeued.restarts
    assert restart.reason.startswith("stopped by SIGTERM after")
    assert restart.first_step == restart.step >= 4


def test_a_job_that_its_scheduler_kills_at_its_memory_is_told_as_out_of_memory(
    slurm: str, tmp_path: Path
) -> None:
    event = "import os; x = torch.ones(2**30) if os.environ['RANK'] == '1' else None"
    out = exported(tmp_path / "job", event=event, options="--max-restarts 0")
    state, run = run_to_end(out, "--mem=2500M")
    assert run.measurement.outcome is OutcomeKind.OOM
    assert "oom_kill event" in run.measurement.reason or "memory limit" in run.measurement.reason
    assert run.measurement.steps_done == 6
    assert state in ("OUT_OF_MEMORY", "FAILED")


def test_a_training_whose_loss_is_not_finite_fails_the_job(slurm: str, tmp_path: Path) -> None:
    event = "return torch.full((8, 4), float('nan'))"
    state, run = run_to_end(exported(tmp_path / "job", event=event, options="--max-restarts 0"))
    assert (state, run.measurement.outcome) == ("FAILED", OutcomeKind.FAILED)
    assert run.measurement.reason == "rank 0: loss is nan at step 6"


SWEEP_JOB = """
import os
import time
from pathlib import Path

import torch
from torch import nn
from memfit import Job

MARKS = Path("FOLDER")

def make_batch(step, seed):
    if step == 4 and seed == 1 and "SLURM_ARRAY_TASK_ID" in os.environ:
        # Named when it is written: the process of memfit run.
        (MARKS / f"pid-{os.getpid()}").write_text(str(os.getppid()))
        (MARKS / f"pid-{os.getpid()}").rename(MARKS / f"reached-{os.environ['SLURM_ARRAY_TASK_ID']}")
        while not (MARKS / "go").exists():
            time.sleep(0.1)
    if step == 4 and seed == 2:
        try:
            (MARKS / "oom").unlink()  # one trial only
            torch.ones(2**29)
        except FileNotFoundError:
            pass
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(1000 * seed + step))

job = Job(
    name="small", make_batch=make_batch, loss=lambda m, b: (m(b) - b).square().mean(), batch_size=8,
    build_model=lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 4)), steps=8,
)
"""
KILLED, REQUEUED = 2, 3  # places in the array of the trials with seed 1


def test_a_sweep_of_12_trials_survives_a_kill_a_preemption_and_running_out_of_memory(
    slurm: str, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    (marks / "oom").touch()
    (tmp_path / "job.py").write_text(SWEEP_JOB.replace("FOLDER", str(marks)))
    (tmp_path / "early.yaml").write_text("ranks: 1\ntechniques:\n  optimizer-in-backward: {}\n")
    process = _sweep(tmp_path, "slurm:mem=1500M,time=30,cpus_per_task=1", seeds=6)
    reached = [marks / f"reached-{place}" for place in (KILLED, REQUEUED)]
    until_s = time.monotonic() + 600
    while not all(mark.exists() for mark in reached):
        assert time.monotonic() < until_s
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    array = subprocess.run(
        ["squeue", "--noheader", "--format=%F"], check=True, capture_output=True, text=True
    ).stdout.split()[0]
    os.kill(int(reached[0].read_text()), signal.SIGKILL)
    subprocess.run(["scontrol", "requeue", f"{array}_{REQUEUED}"], check=True)
    (marks / "go").touch()
    code, first = _results(process)
    assert code == 1
    states = [trial["state"] for trial in first]
    assert states.count("done") == 10
    assert (states[KILLED], first[KILLED]["reason"]) == ("failed", "killed by SIGKILL")
    assert (states[REQUEUED], first[REQUEUED]["starts"]) == ("done", 2)
    (short,) = [trial for trial in first if trial["seed"] == 2 and trial["state"] == "failed"]
    said = "its group or the machine ran out of memory" if slurm == "cgroup" else "memory"
    assert said in short["reason"], short["reason"]
    assert not _jobs_and_folders(tmp_path)

    code, second = _results(_sweep(tmp_path, "slurm:mem=1500M,time=30,cpus_per_task=1", seeds=6))
    assert code == 0
    assert [trial["before"] for trial in second] == [state == "done" for state in states]

    code, local = _results(_sweep(tmp_path, "local:parallel=2", seeds=2))
    assert code == 0
    for here, there in zip(local, second, strict=False):
        assert _without_times(here) == _without_times(there)
    assert not _jobs_and_folders(tmp_path)


def _sweep(folder: Path, executor: str, *, seeds: int) -> subprocess.Popen[str]:
    words = f"sweep job.py:job plain early.yaml --executor {executor} --seeds {seeds} --budget 9h --threads 1"
    command = [sys.executable, "-m", "memfit", *words.split(), "--json", "--store", str(folder / "store.db")]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _results(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]]]:
    out, errors = process.communicate(timeout=900)
    assert out, errors
    return process.returncode, json.loads(out)["trials"]


def _jobs_and_folders(folder: Path) -> list[str]:
    jobs = subprocess.run(["squeue", "--noheader"], check=True, capture_output=True, text=True).stdout
    return [*jobs.splitlines(), *(str(path) for path in folder.glob("sweeps/*"))]


TIMES = (
    "step_s",
    "batch_s",
    "wall_s",
    "predicted_step_s",
    "energy_j",
    "resident",
    "overhead_ratio",
    "alarms",
)


def _without_times(trial: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in trial["run"].items() if key not in TIMES}
