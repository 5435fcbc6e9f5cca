"""Native PyTorch: memfit's own worker, which is also the process in which the other engines train."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from memfit.engines.base import Engine
from memfit.engines.environment import recorded
from memfit.techniques.registry import TECHNIQUES
from memfit.types import serialization
from memfit.types.launch import LaunchConfig, RunSpec

_SOURCE = Path(__file__).parents[2]

ENGINE = Engine(
    name="native", summary="torch alone: DDP, FSDP2, tensor, pipeline, context, axial and expert parallelism",
    carries=frozenset(TECHNIQUES),
)  # fmt: skip


def render(spec: RunSpec, engine: Engine = ENGINE) -> LaunchConfig:
    """The very process that is run, with the engine's configuration beside it; `export` writes the same.
    An environment of the engine's own runs memfit from here."""
    home = recorded(engine.name) if engine.requirements else None
    return LaunchConfig(
        engine=engine.name,
        argv=(home.python if home else sys.executable, "-m", "memfit.worker", "run", "{dir}/run.json"),
        env={**_environment(spec.threads), **engine.env, **({"PYTHONPATH": str(_SOURCE)} if home else {})},
        files={"run.json": serialization.dumps(spec, indent=2), **engine.files(spec)},
        spec=spec,
    )


def render_calibration(
    spec: RunSpec,
    signatures: Sequence[str],
    *,
    budget_s: float,
    packages: Sequence[str] = (),
    rates: bool = True,
    memory_only: bool = False,
) -> LaunchConfig:
    """Probes operators in the same environment as the runs, with ``rates`` the machine's own rates too.
    ``spec`` gives threads and time limit. ``memory_only``: no times, no rates, one call each."""
    request = {
        "signatures": list(signatures),
        "budget_s": budget_s,
        "threads": spec.threads,
        "packages": list(packages),
        "rates": rates,
        "memory_only": memory_only,
    }
    return LaunchConfig(
        engine="native",
        argv=(sys.executable, "-m", "memfit.worker", "calibrate", "{dir}/request.json"),
        env=_environment(spec.threads),
        files={"request.json": json.dumps(request)},
        spec=spec,
    )


def _environment(threads: int) -> dict[str, str]:
    """Without the current folder on the path: a file of the user's named like a module of the standard
    library or of an installed package is not imported in its place."""
    return {"PYTHONSAFEPATH": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
