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

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "all.py"
_LIMIT_S = 240.0


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def test_a_killed_run_continues_where_it_was_and_marks_what_is_simulated(
    device_environment: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    records = tmp_path / "records.jsonl"
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--only", "steps", "--records", str(records)]
    environment = {**os.environ, **device_environment(capacity_bytes=2**31)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        first = child.stdout.readline()  # the first measurement has been recorded
        child.send_signal(signal.SIGKILL)
    before = lines(records)
    assert first.startswith("steps: ")
    assert before
    again = subprocess.run(
        [*command, "--minutes", "1e-9"],  # none of those that are left is begun
        env=environment,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=True,
    )
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
    script = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import importlib;"
        "a = importlib.import_module('all');"
        "print(next(iter(a.cases(['engines'], simulated=True))).name);"
        "case = next(c for c in a.cases(['steps'], simulated=True) if 'char-lm' in c.name);"
        "print(json.dumps(case.measure()))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(SCRIPT.parent)],
        env={**os.environ, **device_environment(capacity_bytes=2**31)},
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first_engine, *_, measured_step = done.stdout.splitlines()
    assert first_engine.startswith("native: protein-lm")
    values = json.loads(measured_step)["values"]
    predicted, measured = values["allocated"]
    assert predicted == pytest.approx(measured, rel=0.005)
    assert None not in values["time after calibration"]
