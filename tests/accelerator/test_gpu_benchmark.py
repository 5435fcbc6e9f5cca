"""The benchmark for whoever has a GPU: rehearsed here, so that it runs there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import forked
import pytest
from child_ranks import run_script

from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.plan import Plan

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "all.py"
_ON_DEVICE = Path(__file__).with_name("on_the_device.py")
_LIMIT_S = 240.0


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def test_a_killed_run_continues_where_it_was_and_marks_what_is_simulated(
    device_environment: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    records = tmp_path / "records.jsonl"
    command = [_ON_DEVICE, SCRIPT, "--only", "steps", "--records", records]
    environment = device_environment(capacity_bytes=2**31)
    child = forked.Popen(["-W", "ignore", *command], env=os.environ | environment, stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child.stdout:
        first = child.stdout.readline()  # the first measurement has been recorded
        child.kill()
        child.wait()
    before = lines(records)
    assert first.startswith(b"steps: ")
    assert before
    # none of those that are left is begun
    again = run_script(*command, "--minutes", "1e-9", env=environment, limit_s=_LIMIT_S)
    assert again.returncode == 0, again.stderr[-2000:]
    after = lines(records)
    assert after[: len(before)] == before
    keys = [(line["piece"], line["name"]) for line in after]
    assert len(keys) == len(set(keys))
    assert all(line["simulated"] for line in after)
    assert "measurements are left" in again.stdout
    assert "No accuracy is claimed" in records.with_suffix(".md").read_text()


def test_a_rehearsed_step_has_predictions_beside_measurements(
    device_environment: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    script = tmp_path / "rehearsed.py"
    script.write_text(
        "import json, sys; sys.path.insert(0, sys.argv[1]); import importlib\n"
        "a = importlib.import_module('all')\n"
        "print(next(iter(a.cases(['engines'], simulated=True))).name)\n"
        "case = next(c for c in a.cases(['steps'], simulated=True) if 'char-lm' in c.name)\n"
        "print(json.dumps(case.measure()))\n"
    )
    environment = device_environment(capacity_bytes=2**31)
    done = run_script(_ON_DEVICE, script, SCRIPT.parent, env=environment, limit_s=_LIMIT_S)
    assert done.returncode == 0, done.stderr[-2000:]
    first_engine, *_, measured_step = done.stdout.splitlines()
    assert first_engine.startswith("native: protein-lm")
    values = json.loads(measured_step)["values"]
    predicted, measured = values["allocated"]
    assert predicted == pytest.approx(measured, rel=0.005)
    assert None not in values["time after calibration"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def benchmark(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script where it sees a device and has three cases, of which the first fails, the second runs into
    its time limit and the third succeeds."""
    module = script

    def fail() -> dict[str, Any]:
        raise RuntimeError("no kernel")

    def hang() -> dict[str, Any]:
        raise subprocess.TimeoutExpired("memfit poc", module.PIECE_LIMIT_S)

    measures = {"fails": fail, "hangs": hang, "succeeds": lambda: {"values": {}}}
    cases = [module.Case(piece="steps", name=n, measure=m) for n, m in measures.items()]
    monkeypatch.setattr(module, "accelerator_kind", lambda: "sim")
    monkeypatch.setattr(module, "cases", lambda only, simulated, plans=None: iter(cases))
    return module


def run(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, records: Path, *more: str) -> None:
    monkeypatch.setattr(sys, "argv", ["all.py", "--records", str(records), *more])
    assert benchmark.main() == 0


def test_what_failed_or_took_too_long_is_tried_again_after_the_others(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    records = tmp_path / "records.jsonl"
    run(benchmark, monkeypatch, records)
    assert ["error" in line for line in lines(records)] == [True, True, False]
    assert "TimeoutExpired" in lines(records)[1]["error"]
    records.write_text("".join(f"{text}\n" for text in records.read_text().splitlines()[:2]))
    run(benchmark, monkeypatch, records)
    assert [line["name"] for line in lines(records)[2:]] == ["succeeds", "fails", "hangs"]
    assert benchmark.PIECE_LIMIT_S <= 8 * 60


def test_an_incomplete_last_line_is_left_out_and_measured_again(
    benchmark: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = tmp_path / "records.jsonl"
    run(benchmark, monkeypatch, records)
    whole = records.read_text().splitlines()
    records.write_text("\n".join([*whole[:2], whole[2][:20]]))
    capsys.readouterr()
    run(benchmark, monkeypatch, records, "--page")
    assert capsys.readouterr().err == f"note: line 3 of {records} is incomplete and is left out\n"
    run(benchmark, monkeypatch, records)
    texts = records.read_text().splitlines()
    assert texts[:3] == [*whole[:2], whole[2][:20]]
    assert [json.loads(text)["name"] for text in texts[3:]] == ["succeeds", "fails", "hangs"]


def test_a_measured_step_computes_no_metric(script: ModuleType, tmp_path: Path) -> None:
    """That of alphafold2 first simulates alignments, for minutes."""
    job = tmp_path / "net.py"
    job.write_text(
        "import torch\n"
        "from memfit import Job, Metric\n"
        "METRIC = Metric(name='m', unit='', higher_is_better=True, margin=1.0, margin_source='', naive=0.0,\n"
        "    naive_name='')\n"
        "def evaluate(model): raise RuntimeError('evaluated')\n"
        "def job():\n"
        "    return Job(name='net', build_model=lambda: torch.nn.Linear(8, 8), batch_size=4,\n"
        "        make_batch=lambda step, seed: torch.zeros(4, 8), evaluate=evaluate,\n"
        "        loss=lambda model, batch: model(batch).sum(), metric=METRIC)\n"
    )
    measured = script.step(JobRef(spec=f"{job}:job"), Plan(), simulated=True)
    assert None not in measured["values"]["allocated"]


def test_what_is_refused_is_an_outcome_that_is_not_tried_again(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse() -> dict[str, Any]:
        raise UserError("engine megatron cannot train on devices of the kind 'sim'")

    cases = [benchmark.Case(piece="engines", name="megatron", measure=refuse)]
    monkeypatch.setattr(benchmark, "cases", lambda only, simulated, plans=None: iter(cases))
    for _ in range(2):
        run(benchmark, monkeypatch, tmp_path / "records.jsonl")
    (line,) = lines(tmp_path / "records.jsonl")
    assert line["outcome"].startswith("refused: engine megatron cannot train")


def test_a_shorter_rehearsal_has_every_job_and_says_what_it_leaves_out(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "accelerator_kind", lambda: "sim")
    monkeypatch.setattr(script, "step", lambda *args, **options: {"values": {}})
    run(script, monkeypatch, tmp_path / "records.jsonl", "--only", "steps", "--plans", "1")
    names = [line["name"] for line in lines(tmp_path / "records.jsonl")]
    all_names = {case.name for case in script.cases(["steps"], simulated=True)}
    assert {name.removesuffix(" plain") for name in names} == {name.split()[0] for name in all_names}
    left_out = len(all_names) - len(names)
    assert f"--plans 1 leaves out {left_out} measurements of further plans" in capsys.readouterr().out


def test_no_two_measurements_have_one_name(script: ModuleType) -> None:
    names = [(c.piece, c.name) for c in script.cases(["steps", "poc"], simulated=False)]
    assert len(names) == len(set(names))
    rehearsed = {c.name for c in script.cases(["steps"], simulated=True)}
    assert {
        f"evoformer.py:{stage}_rehearsal plain" for stage in ("fine_tuning", "initial_training")
    } <= rehearsed
