"""Train steps on the simulated accelerator and write what was seen: python THIS_FILE JSON_FILE NAME...

Started by test_steps.py, in an environment in which torch finds the device. NAME: a technique, "plain", or a
job of cuda_jobs.py.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
sys.path.insert(0, str(Path(__file__).parents[1] / "cpu"))
import cuda_jobs  # type: ignore[import-not-found]
from test_prediction import JOBS, LOWERS  # type: ignore[import-not-found]

from memfit.cost.memory import memory_profile
from memfit.jobs.training_step import TrainingStep
from memfit.planner.recompute_budget import choose_tensors
from memfit.runtime.devices import AllocatorCounter, synchronize, use_device
from memfit.techniques.registry import make_use
from memfit.trace.tracer import trace
from memfit.types.machine import Calibration
from memfit.types.plan import Plan, use

KIND = "sim"
HOST_OFFLOAD = "activation-offload to host"
ZERO = ("zero 2 offloaded", "zero 3 offloaded")


class HostTensors(TorchDispatchMode):
    """Notes the operators that read or make a tensor in host memory. Tensors without dimensions are numbers,
    such as the counters of steps that torch's optimizers keep there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in _pytree.tree_leaves((args, kwargs, out)):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dim():
                self.seen.append(str(func))
                break
        return out


def case(name: str) -> tuple[str, Plan]:
    if name in cuda_jobs.JOBS:
        return name, Plan()
    if name == "plain":
        return "protein-ss", Plan()
    if name == HOST_OFFLOAD:
        return "protein-ss", Plan(uses=(make_use("activation-offload", {"to": "host", "minimum_kib": 4}),))
    if name == "adamw-single":
        return "wide", Plan(uses=(use(name),))
    if name in ZERO:
        knobs = {"stage": int(name[5]), "offload": "optimizer", "reduce_bucket_elements": 100_000}
        return "wide", Plan(uses=(make_use("zero", {"precision": "bf16", **knobs}),))
    job, used = LOWERS[name]
    return job, Plan(uses=(used,))


def seen_in(name: str) -> dict[str, Any]:
    job_name, plan = case(name)
    job = cuda_jobs.job_of(job_name) if job_name in cuda_jobs.JOBS else JOBS[job_name]()
    plan = choose_tensors(job, plan, device=KIND)
    traced = trace(job, plan, device=KIND)
    profile = memory_profile(traced, Calibration())
    gc.collect()
    device = use_device(KIND)
    counter = AllocatorCounter(device)
    base_bytes, peaks, phase = counter.live_bytes(), dict[str, int](), ["setup"]

    def turn(next_phase: str) -> None:
        peaks[phase[0]] = max(peaks.get(phase[0], 0), counter.peak_bytes() - base_bytes)
        counter.reset_peak()
        phase[0] = next_phase

    torch.manual_seed(0)
    step = TrainingStep(job, plan, device=KIND, torch_device=str(device))
    losses, host = [], HostTensors()
    for index in range(2):
        turn("between")
        inputs, terms = step.local(job.make_batch(index, 0))
        turn("between")
        loss, _ = step.run(inputs, lambda p: turn(str(p)), terms_per_rank=terms)
        losses.append(float(loss))
        turn("between")
        del inputs, loss
    synchronize(device)
    inputs, terms = step.local(job.make_batch(2, 0))
    with host:  # not in the steps before: torch takes more memory for some operators where a mode is
        step.run(inputs, terms_per_rank=terms)
    step.close()
    torch.manual_seed(0)
    on_host = TrainingStep(job, plan)
    return {
        "predicted": profile.peak_bytes,
        "predicted_phases": {str(p): b for p, b in profile.phase_peak_bytes.items()},
        "measured": max(peaks.values()),
        "measured_phases": peaks,
        "host_operators": sorted(set(host.seen)),
        "losses": losses,
        "losses_on_the_host": [float(on_host.run(*_batch(on_host, index))[0]) for index in range(2)],
    }


def _batch(step: TrainingStep, index: int) -> tuple[Any]:
    return (step.job.make_batch(index, 0),)


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in sys.argv[2:]:
        try:
            results[name] = seen_in(name)
        except Exception:  # noqa: BLE001  the test shows it
            results[name] = {"failed": traceback.format_exc()}
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
