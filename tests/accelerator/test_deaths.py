"""Real deaths on the simulated accelerator are named right, from their logs alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from test_autopsy_cpu import KINDS, death_of

from memfit.types.units import MIB


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_death_on_the_device_is_named(
    kind: str, device_environment: Callable[..., dict[str, str]]
) -> None:
    capacity_bytes = (20 if kind == "optimizer-step" else 40) * MIB
    environment = device_environment(capacity_bytes=capacity_bytes)
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], *sys.path])
    log, diagnosis = death_of(kind, "sim", capacity_bytes, environment)
    assert diagnosis.cause == kind, log[-1500:]
    assert diagnosis.memory == "device"
    assert diagnosis.figures["capacity_bytes"] == capacity_bytes
