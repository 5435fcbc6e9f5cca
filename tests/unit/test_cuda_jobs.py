"""Whole trainings traced for CUDA take the memory that torch's own fake CUDA tensors show."""

from __future__ import annotations

import json
from typing import Any

import cuda_jobs
import pytest

from memfit.cost.memory import memory_profile
from memfit.trace.tracer import trace
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.trace import Phase

RECORD: dict[str, Any] = json.loads(cuda_jobs.RECORD.read_text(encoding="utf-8"))["jobs"]
WORST_RATIO = 0.005


@pytest.mark.parametrize("name", cuda_jobs.NAMES)
def test_a_trained_job_takes_what_torch_takes_on_cuda(name: str) -> None:
    with cuda_jobs.kernels(name):
        traced = trace(cuda_jobs.job_of(name), Plan(), device="cuda")
    peaks = memory_profile(traced, Calibration()).phase_peak_bytes
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        assert peaks[phase] == pytest.approx(RECORD[name][phase], rel=WORST_RATIO), phase
