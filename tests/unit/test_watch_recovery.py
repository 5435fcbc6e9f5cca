"""`memfit.watch(on_oom=memfit.next_plan(...))`: a training of the user's own goes on under a safer plan."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import torch
from torch import nn

import memfit
from memfit.cli import main
from memfit.monitoring.record import OutOfMemory, read_records
from memfit.techniques.plan_file import read_plan
from memfit.types.errors import UserError

# A loop with checkpoints of its own. Samples get longer in the third epoch; memory runs out there unless the
# plan recomputes, as the device would say.
_SCRIPT = """
import sys
from pathlib import Path

import torch
from torch import nn

import memfit

PLAN, CHECKPOINT = "plan.yaml", Path("last.pt")
torch.manual_seed(0)
blocks = nn.Sequential(*[nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4)])
model = nn.Sequential(nn.Linear(16, 64), blocks, nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def batch_of(step):
    rows = 32 if step < 4 else 256
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(step))


result = memfit.estimate(
    model, batch_of(0), loss=lambda m, b: m(b).square().mean(), optimizer=optimizer, plan=PLAN,
    machine="this:cpu",
)
result = memfit.api.dataclasses.replace(result, cap_bytes=int(sys.argv[1]))
fit = memfit.apply(PLAN, model, optimizer, blocks="1")
first = 0
if CHECKPOINT.exists():
    saved = torch.load(CHECKPOINT)
    fit.model.load_state_dict(saved["model"])
    fit.optimizer.load_state_dict(saved["optimizer"])
    first = saved["step"]
on_oom = memfit.next_plan(result, PLAN, batch=lambda: batch)
with memfit.watch(file="run.jsonl", optimizer=False, on_oom=on_oom) as watch:
    for step in range(first, 6):
        batch = batch_of(step)
        if len(batch) > 32 and not result.plan.uses and sys.argv[2] == "capped":
            raise torch.OutOfMemoryError("out of memory: the samples are longer")
        for part in fit.split(batch):
            with fit.forward():
                loss = fit.model(part).square().mean()
            fit.backward(loss)
        fit.step()
        watch.step(loss=loss)
        torch.save(
            {"model": fit.model.state_dict(), "optimizer": fit.optimizer.state_dict(), "step": step + 1},
            CHECKPOINT,
        )
print("weights", sum(p.double().abs().sum().item() for p in model.parameters()).hex())
"""


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a script that `memfit watch` starts, in a folder. Its process and its workers are forked."""
    by = Path(__file__).with_name("watched_script.py")
    monkeypatch.setattr("memfit.monitoring.command.subprocess", forked.processes(".py", by=by))
    for name, value in forked.variables("memfit.worker ").items():
        monkeypatch.setenv(name, value)

    def run(folder: Path, *arguments: str, restarts: int) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(folder)
        (folder / "train.py").write_text(_SCRIPT)
        command = ["watch", "--restarts", str(restarts), "--", sys.executable, "train.py", *arguments]
        capfd.readouterr()
        return subprocess.CompletedProcess(command, main(command), *capfd.readouterr())

    return run


def test_a_training_that_runs_out_of_memory_ends_as_an_undisturbed_one(
    tmp_path: Path, run_script: Run
) -> None:
    capped, undisturbed = tmp_path / "capped", tmp_path / "undisturbed"
    for folder in (capped, undisturbed):
        folder.mkdir()
        (folder / "plan.yaml").write_text("techniques: {}\n")
    whole = run_script(undisturbed, "8000000", "free", restarts=0)
    assert whole.returncode == 0, whole.stderr
    recovered = run_script(capped, "8000000", "capped", restarts=2)
    assert recovered.returncode == 0, recovered.stderr
    assert recovered.stderr.count("memfit: out of memory; start 1 of 2 with") == 1
    plan = read_plan(capped / "plan.yaml")
    assert plan.uses
    assert "ran out of memory in step 5" in (capped / "plan.yaml").read_text()
    if not plan.get("gradient-accumulation"):
        assert recovered.stdout.split()[-1] == whole.stdout.split()[-1]  # bitwise, as the plan is of class E0
    else:
        weights = [float.fromhex(r.stdout.split()[-1]) for r in (recovered, whole)]
        assert weights[0] == pytest.approx(weights[1], rel=1e-5)


def test_without_restarts_the_command_ends_with_its_own_error_and_the_plan_is_there(
    tmp_path: Path, run_script: Run
) -> None:
    (tmp_path / "plan.yaml").write_text("techniques: {}\n")
    done = run_script(tmp_path, "8000000", "capped", restarts=0)
    assert done.returncode == 1
    assert "OutOfMemoryError" in done.stderr
    (rank,) = read_records(tmp_path / "run.jsonl").ranks
    assert rank.end is not None
    assert "plan.yaml" in rank.end.recovery


def _prediction(cap_bytes: int) -> memfit.Prediction:
    import dataclasses

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    found = memfit.estimate(model, torch.randn(4, 8), machine="this:cpu", probe=False)
    return dataclasses.replace(found, cap_bytes=cap_bytes)


def test_without_a_safer_plan_the_plan_file_stays_and_the_reason_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("techniques: {}\n")
    write = memfit.next_plan(_prediction(cap_bytes=1), file)
    with pytest.raises(UserError, match="there is no safer plan"):
        write(OutOfMemory(step=1, error=MemoryError()))
    with pytest.raises(MemoryError), memfit.watch(file=tmp_path / "run.jsonl", on_oom=write):
        raise MemoryError
    assert file.read_text() == "techniques: {}\n"
    assert "memfit: no recovery: there is no safer plan" in capsys.readouterr().err


def test_another_error_asks_for_no_plan(tmp_path: Path) -> None:
    def never(event: OutOfMemory) -> str:
        raise AssertionError(event)

    with pytest.raises(ValueError, match="labels"), memfit.watch(file=tmp_path / "run.jsonl", on_oom=never):
        raise ValueError("labels")


def test_a_watch_in_the_script_keeps_the_commands_file_prediction_and_limits(tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text("headroom_ratio = 0.125\n")
    (tmp_path / "predicted.json").write_text('{"allocated_bytes": 1000000}')
    (tmp_path / "train.py").write_text(
        "import torch, memfit\n"
        "model = torch.nn.Linear(4, 4)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "with memfit.watch(file='other.jsonl') as watch:\n"
        "    for _ in range(3):\n"
        "        model(torch.ones(2, 4)).sum().backward()\n"
        "        optimizer.step()\n"
    )
    command = [sys.executable, "-m", "memfit", "watch", "--limits", "limits.toml", "--prediction"]
    command += ["predicted.json", "--", sys.executable, "train.py"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (rank,) = read_records(tmp_path / "run.jsonl").ranks
    assert rank.start is not None
    assert rank.start.limits["headroom_ratio"] == 0.125
    assert rank.start.prediction["allocated_bytes"].value == 1_000_000
    assert len(rank.steps) == 3
    assert not (tmp_path / "other.jsonl").exists()
