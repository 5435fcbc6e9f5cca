"""Real deaths on the simulated accelerator are named right, from their logs alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from child_ranks import start

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from test_autopsy_cpu import KINDS, SCRIPT

from memfit.monitoring.autopsy import diagnose_log
from memfit.types.units import MIB

_ON_DEVICE = Path(__file__).with_name("on_the_device.py")


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_death_on_the_device_is_named(
    kind: str, device_environment: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    capacity_bytes, file = (20 if kind == "optimizer-step" else 40) * MIB, tmp_path / "log.txt"
    child = start(
        [_ON_DEVICE, SCRIPT, kind, "sim", str(capacity_bytes)],
        env=device_environment(capacity_bytes=capacity_bytes),
        output=str(file),
        errors=str(file),
    )
    code, log = child.wait(120), file.read_text()
    assert code == 1, log[-2000:]
    diagnosis = diagnose_log(log)
    assert diagnosis.cause == kind, log[-1500:]
    assert diagnosis.memory == "device"
    assert diagnosis.figures["capacity_bytes"] == capacity_bytes
