"""Real deaths of processes under a memory cap are named right, from their logs alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memfit.monitoring.autopsy import diagnose_log
from memfit.monitoring.diagnosis import Certainty, DeathCause, Diagnosis
from memfit.runtime.child_process import CHILD_ENV
from memfit.types.units import MIB

SCRIPT = Path(__file__).with_name("dying_training.py")
KINDS = ("tensors-too-large", "leak", "longer-sample", "evaluation", "checkpoint", "optimizer-step")


def death_of(kind: str) -> tuple[str, Diagnosis]:
    """Return the log of a training that dies under a cap of its memory, and its diagnosis."""
    process = subprocess.run(
        [sys.executable, str(SCRIPT), kind, "cpu", str(48 * MIB)],
        env={**os.environ, **CHILD_ENV, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode, process.stdout[-2000:]
    return process.stdout, diagnose_log(process.stdout)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_real_death_under_a_memory_cap_is_named(kind: str) -> None:
    log, diagnosis = death_of(kind)
    assert diagnosis.cause == kind, log[-1500:]
    assert diagnosis.memory == "host"
    assert diagnosis.line.startswith(str(SCRIPT))


def test_a_real_death_of_another_kind_is_no_death_of_memory() -> None:
    _, diagnosis = death_of("not-memory")
    assert (diagnosis.cause, diagnosis.certainty) == (DeathCause.NOT_MEMORY, Certainty.CERTAIN)
