"""Native PyTorch: memfit's own training step, and the launch of the worker, in which all engines train."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from memfit.engines.base import Engine
from memfit.engines.environment import load_environment
from memfit.techniques.registry import TECHNIQUES
from memfit.types import serialization
from memfit.types.launch import LaunchConfig, RunSpec

_SOURCE = Path(__file__).parents[2]

ENGINE = Engine(
    name="native",
    saves=True,
    summary="torch alone: DDP, FSDP2, tensor, pipeline, context, axial and expert parallelism",
    carries=frozenset(TECHNIQUES),
    applied_by_files=frozenset(),
)


def render(spec: RunSpec, engine: Engine = ENGINE) -> LaunchConfig:
    """Return the launch of the run ``spec`` on ``engine``: memfit's worker as a command, its environment
    variables, run.json and the engine's configuration files. It is what runs execute and what `memfit export`
    writes. The command uses the interpreter that runs now. If the engine has an environment of its own on
    record, the command uses that one's interpreter, which imports memfit from the folder from which it is
    imported now."""
    environment = load_environment(engine.name) if engine.requirements else None
    return LaunchConfig(
        engine=engine.name,
        argv=(
            environment.python if environment else sys.executable,
            "-m",
            "memfit.worker",
            "run",
            "{dir}/run.json",
        ),
        env={
            **_environment(spec.threads),
            **engine.variables(spec.device),
            **({"PYTHONPATH": str(_SOURCE)} if environment else {}),
        },
        files={"run.json": serialization.dumps(spec, indent=2), **engine.files(spec)},
        spec=spec,
    )


def render_calibration(spec: RunSpec) -> LaunchConfig:
    """Return the launch of a worker process that measures operators, with the environment variables of a run
    on the native engine. ``spec`` gives the kind of device, the number of threads and the time limit. Each
    line that the process reads from standard input is an `OperatorRequest` as JSON."""
    return LaunchConfig(
        engine="native",
        argv=(sys.executable, "-m", "memfit.worker", "calibrate", "{dir}/settings.json"),
        env=_environment(spec.threads),
        files={"settings.json": json.dumps({"threads": spec.threads, "device": spec.device})},
        spec=spec,
    )


def _environment(threads: int) -> dict[str, str]:
    """Return the worker's environment variables:

    - PYTHONSAFEPATH removes the current folder from the import path, so that a user's file cannot shadow a
      module of the standard library or of an installed package.
    - TORCH_CUDNN_SDPA_DEPRIORITIZED makes CUDA choose the attention kernels that a trace chooses
      (trace/device_kernels.py), and not cuDNN's, on devices for which torch prefers those.
    - OMP_NUM_THREADS has the value ``threads``; left out if that is 0.
    """
    variables = {"PYTHONSAFEPATH": "1", "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
    return variables | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
