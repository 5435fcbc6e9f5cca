"""Caps of runs: what they hold for, and what passes them by ways that they do not stop."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from memfit.cli.app import main
from memfit.cli.run import lines
from memfit.monitoring.autopsy import diagnose_run
from memfit.monitoring.diagnosis import DeathCause
from memfit.monitoring.run_alarms import RunAlarms
from memfit.runtime.memory import data_bytes
from memfit.runtime.resident import ResidentMeter
from memfit.techniques.registry import make_use
from memfit.types.job import JobRef
from memfit.types.launch import CheckpointSettings, RunSpec
from memfit.types.plan import Plan
from memfit.types.result import Estimate, Interval, Measurement, OutcomeKind, ResidentMemory, Run
from memfit.worker.train import _oom_text
from memfit.workflows import single_run
from memfit.workflows.single_run import measure_spec

pytestmark = pytest.mark.usefixtures("forked_workers")
MIB = 2**20
LINUX = pytest.mark.skipif(data_bytes() is None, reason="the cap needs /proc")

JOB = """
import numpy, resource, torch
from memfit import Job
kept = []
{data}

def build():
    return torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])

def batch(step, seed):
    {batch}
    return torch.randn(4, 64)

def evaluate(model):
    with torch.no_grad():
        return float(model(torch.randn({rows}, 64)).square().mean())

job = Job(name="small", build_model=build, make_batch=batch, loss=lambda m, b: m(b).square().mean(),
          batch_size=4, evaluate=evaluate)
"""


def _run(
    folder: Path, *, data: str = "", batch: str = "pass", rows: int = 4, save: bool = False, **spec: Any
) -> Measurement:
    file = folder / "small.py"
    file.write_text(JOB.format(data=data, batch=batch, rows=rows))
    keep = CheckpointSettings(save=str(folder / "saved"), every_steps=1) if save else CheckpointSettings()
    defaults: dict[str, Any] = {"cap_bytes": 16 * MIB, "cap_scope": "run", "plan": Plan(), "steps": 3}
    return measure_spec(
        RunSpec(
            name="x",
            role="run",
            job=JobRef(spec=f"{file}:job"),
            seed=0,
            threads=1,
            keep=keep,
            **defaults | spec,
        )
    )


# -- ways past a cap --------------------------------------------------------------------------------------

SHARED = "kept.append(torch.ones(16 << 20).share_memory_()) if not kept else None"
RAISED = "resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))"


@LINUX
def test_shared_memory_fails_a_run_that_it_takes_past_its_cap(tmp_path: Path) -> None:
    measured = _run(tmp_path, batch=SHARED)
    assert measured.outcome is OutcomeKind.FAILED
    assert "passed the cap of 16 MiB: " in measured.reason
    assert "64 MiB shared" in measured.reason


@LINUX
def test_data_loaded_at_import_fails_a_run_whose_cap_it_exceeds(tmp_path: Path) -> None:
    measured = _run(tmp_path, data="DATA = numpy.ones(8 << 20)")
    assert measured.outcome is OutcomeKind.FAILED
    assert "that it loaded before the cap was set" in measured.reason
    assert measured.resident is not None
    assert 64 * MIB <= measured.resident.loaded_bytes < 80 * MIB


@LINUX
def test_a_limit_that_the_job_raises_fails_the_run(tmp_path: Path) -> None:
    assert _run(tmp_path, batch=RAISED).reason == "the job has raised the limit that caps its memory"


@LINUX
def test_a_file_that_is_mapped_counts(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(64 * MIB))
    batch = f"kept.append(numpy.memmap({str(path)!r}, mode='r').sum())"
    kept = f"kept.append(numpy.memmap({str(path)!r}, mode='r')); kept[-1].sum()"
    assert _run(tmp_path, batch=batch).outcome is OutcomeKind.OK  # unmapped again before the step
    assert "64 MiB of mapped files" in _run(tmp_path, batch=kept).reason


@LINUX
def test_memfits_own_files_do_not_count(tmp_path: Path) -> None:
    """A run that uses its cap to the last page had failed by the 40 bytes of its own heartbeat."""
    measured = _run(tmp_path)
    assert measured.resident is not None
    assert measured.resident.mapped_bytes == measured.resident.shared_bytes == 0


# -- what a cap holds for ---------------------------------------------------------------------------------


@LINUX
def test_memfits_own_bound_holds_for_evaluation_and_saves(tmp_path: Path) -> None:
    """It is 2 MiB above what training needs: the first save loads more than that."""
    bound = 5 * MIB // 2
    measured = _run(tmp_path, cap_bytes=bound, cap_scope="bound", rows=65536, save=True)
    assert measured.outcome is OutcomeKind.OK, measured.reason
    assert measured.cap_bytes is not None
    assert measured.cap_bytes > 32 * MIB  # two activations of 16 MiB in the evaluation
    assert measured.peak_bytes is not None
    assert measured.peak_bytes < 2 * MIB  # of training


@LINUX
def test_the_copy_of_an_asynchronous_save_is_predicted_and_within_the_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single_run, "calibrate", lambda *args, **options: None)  # no step time is tested here
    slow = "fsync = os.fsync; os.fsync = lambda file: (time.sleep(0.2), fsync(file))"  # until the next peak
    source = JOB.replace("import numpy", "import os, time, numpy").replace(
        "Linear(64, 64)", "Linear(512, 512)"
    )
    source = source.format(data=slow, batch="return torch.randn(4, 512)", rows=0).replace(
        "evaluate=evaluate", ""
    )
    (tmp_path / "wide.py").write_text(source)
    words = ["run", f"{tmp_path / 'wide.py'}:job", "--capped", "--steps", "4", "--json", "--threads", "1"]
    words += ["--store", str(tmp_path / "store"), "--save-every", "1", "--save", str(tmp_path / "saved")]
    assert main([*words, "--save-async"]) == 0
    run = json.loads(capsys.readouterr().out)
    elements = 4 * (512 * 512 + 512)
    assert run["save_copy_bytes"] == pytest.approx(12 * elements, rel=0.01)
    assert run["predicted_save_copy_bytes"] == pytest.approx(12 * elements, rel=0.05)
    assert run["cap_bytes"] > run["predicted_peak_bytes"] + 12 * elements
    assert run["measured_peak_bytes"] > run["predicted_peak_bytes"] + 6 * elements  # the copy was there


@LINUX
def test_out_of_memory_in_the_evaluation_is_named(tmp_path: Path) -> None:
    measured = _run(tmp_path, rows=65536)
    assert (measured.outcome, measured.reason) == (
        OutcomeKind.OOM,
        "out of memory in evaluation after 3 steps",
    )


@LINUX
def test_the_cap_of_a_proof_of_concept_is_for_training(tmp_path: Path) -> None:
    assert _run(tmp_path, rows=65536, cap_scope="training").outcome is OutcomeKind.OK


@LINUX
@pytest.mark.parametrize("what", ["torch.ones(1 << 40)", "numpy.ones(1 << 40)"])
def test_out_of_memory_in_make_batch_is_an_outcome(tmp_path: Path, what: str) -> None:
    measured = _run(tmp_path, batch=f"step == 2 and {what}")
    assert (measured.outcome, measured.reason) == (OutcomeKind.OOM, "out of memory in data of step 2")


def test_out_of_memory_while_a_job_is_predicted_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "small.py"
    file.write_text(JOB.format(data="", batch="torch.ones(1 << 40)", rows=4))
    assert main(["run", f"{file}:job", "--store", str(tmp_path / "store.db")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("memfit: memory ran out on this machine: ")


@pytest.mark.parametrize(
    ("phase", "cause"),
    [("evaluation", DeathCause.EVALUATION), ("save", DeathCause.CHECKPOINT)],
)
def test_the_autopsy_of_a_run_knows_what_ran(phase: str, cause: DeathCause) -> None:
    diagnosis = diagnose_run(_oom_text(phase, 5), 5)
    assert diagnosis.cause is cause
    assert diagnosis.phase == phase


# -- resident memory --------------------------------------------------------------------------------------


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(8 * MIB))
    return path


@LINUX
def test_the_meter_counts_shared_memory_and_mapped_files(data_file: Path) -> None:
    meter = ResidentMeter()
    meter.begin()
    meter.sample(whole=True)
    assert meter.observed().shared_bytes < MIB
    assert meter.observed().mapped_bytes < MIB
    shared = mmap.mmap(-1, 8 * MIB)
    shared.write(bytes(8 * MIB))
    with data_file.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert sum(mapped[:: os.sysconf("SC_PAGE_SIZE")]) == 0
    meter.sample(whole=True)
    assert 8 * MIB <= meter.observed().shared_bytes < 9 * MIB
    assert 8 * MIB <= meter.observed().mapped_bytes < 9 * MIB
    shared.close()
    mapped.close()


def test_a_run_shows_its_resident_memory_and_the_time_of_its_data() -> None:
    measurement = Measurement(
        outcome=OutcomeKind.OK,
        resident=ResidentMemory(
            peak_bytes=905 * MIB, start_bytes=230 * MIB, footprint_bytes=300 * MIB, shared_bytes=512 * MIB
        ),
        step_s=(0.5, 0.5, 0.5),
        batch_s=(1.5, 1.5, 1.5),
        cap_bytes=186 * MIB,
    )
    text = "\n".join(lines(_as_run(measurement, cap_bytes=120 * MIB)))
    assert "memory  905 MiB resident at most, 230 MiB of them before the job was loaded" in text
    assert "512 MiB shared" in text
    assert "data    1.5 s to make a batch, 3 times the step" in text
    assert "ok under 186 MiB" in text
    assert "cap     120 MiB for training alone" in text


def test_resident_memory_of_a_run_on_a_device_is_called_the_hosts_and_never_a_part_of_the_cap() -> None:
    resident = ResidentMemory(peak_bytes=905 * MIB, start_bytes=230 * MIB, footprint_bytes=300 * MIB)
    measurement = Measurement(outcome=OutcomeKind.OK, resident=resident, cap_bytes=186 * MIB)
    text = "\n".join(lines(_as_run(measurement, device="cuda")))
    assert "host    905 MiB of host memory resident at most, 230 MiB of them before the job" in text
    assert "a cap is on the device's memory; " in text
    assert "memory  905 MiB" not in text
    assert "not in a cap" not in text


def _as_run(measurement: Measurement, **spec: Any) -> Run:
    return Run(
        spec=RunSpec(name="x", role="run", job=JobRef(spec="x"), plan=Plan(), seed=0, steps=3, **spec),
        predicted_peak_bytes=None,
        predicted_phase_peak_bytes={},
        predicted_step_s=None,
        measurement=measurement,
    )


# -- alarms -----------------------------------------------------------------------------------------------


def _alarms(peaks: list[int], live: list[int]) -> tuple[str, ...]:
    estimate = Estimate(
        plan=Plan(),
        allocated_bytes=Interval(value=100 * MIB, low=100 * MIB, high=101 * MIB),
        phase_peak_bytes={},
        at_peak_bytes={},
        by_module_bytes={},
        step_s=None,
        flops_per_step=0.0,
    )
    alarms = RunAlarms(estimate)
    for step, (peak, allocated) in enumerate(zip(peaks, live, strict=True)):
        alarms.add(
            {"step": step, "step_peak_bytes": peak, "allocated_bytes": allocated, "step_s": 0.1, "loss": 1.0}
        )
    return alarms.conclude()


def test_a_steady_run_has_no_alarms() -> None:
    assert _alarms([100 * MIB] * 60, [40 * MIB] * 60) == ()


def test_a_leak_of_4_mib_a_step_is_an_alarm_also_in_a_short_run() -> None:
    short = _alarms([100 * MIB] * 16, [(40 + 4 * i) * MIB for i in range(16)])
    assert short == ("tensors after a step grew in each of the last 10 steps, by 4 MiB each",)
    long = _alarms([100 * MIB] * 60, [(40 + 4 * i) * MIB for i in range(60)])
    assert any("the memory of tensors after a step grows by 4 MiB per step" in text for text in long)


def test_a_batch_four_times_larger_from_step_5_on_is_an_alarm() -> None:
    alarms = _alarms([100 * MIB] * 5 + [300 * MIB] * 5, [40 * MIB] * 10)
    assert len(alarms) == 1
    assert alarms[0].startswith(
        "step 5: the peak of tensors is 300 MiB, above the upper end of its prediction"
    )


def test_a_run_shows_its_alarms() -> None:
    run = dataclasses.replace(_as_run(Measurement(outcome=OutcomeKind.OK)), alarms=("step 5: odd",))
    assert "  alarm   step 5: odd" in list(lines(run))


def test_a_plan_in_backward_saves_within_its_bound(tmp_path: Path) -> None:
    """Between steps it holds nearly as much as at its peak."""
    plan = Plan(uses=(make_use("optimizer-in-backward", {}),))
    measured = _run(tmp_path, cap_bytes=5 * MIB // 2, cap_scope="bound", save=True, plan=plan, evaluate=False)
    assert measured.outcome is OutcomeKind.OK, measured.reason
