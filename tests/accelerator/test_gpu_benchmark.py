"""The benchmark for whoever has a GPU: rehearsed here, so that it runs there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from child_ranks import run_script

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "all.py"
_ON_DEVICE = Path(__file__).with_name("on_the_device.py")
_LIMIT_S = 240.0


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def test_a_killed_run_continues_where_it_was_and_marks_what_is_simulated(
    device_environment: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    records = tmp_path / "records.jsonl"
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--only", "steps", "--records", str(records)]
    environment = device_environment(capacity_bytes=2**31)
    with subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        first = child.stdout.readline()  # the first measurement has been recorded
        child.send_signal(signal.SIGKILL)
    before = lines(records)
    assert first.startswith("steps: ")
    assert before
    # none of those that are left is begun
    again = run_script(_ON_DEVICE, *command[3:], "--minutes", "1e-9", env=environment, limit_s=_LIMIT_S)
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
