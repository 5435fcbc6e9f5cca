"""Several ranks of a test over gloo: child processes that run the test's own file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from memfit.conformance.monitor import Monitor
from memfit.jobs.training_step import TrainingStep
from memfit.runtime.ranks import free_port, rank_env
from memfit.types.conformance import NotConforming
from memfit.types.trace import Phase


def run_children(
    script: str | Path,
    arguments: Sequence[Sequence[str | Path]],
    *,
    env: Mapping[str, str] = {},
    limit_s: float = 240,
) -> None:
    """``python script *arguments[rank]`` on every rank, until each has ended well. One rank joins nothing."""
    ranks, port = len(arguments), free_port()
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", script, *of_rank],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": paths,
                **env,
                **(rank_env(rank, ranks, port) if ranks > 1 else {}),
            },
            stdout=subprocess.DEVNULL,
        )
        for rank, of_rank in enumerate(arguments)
    ]
    try:
        codes = [child.wait(limit_s) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert codes == [0] * ranks, f"the ranks of {Path(script).name} ended with {codes}"


def answers(script: str | Path, folder: Path, *, ranks: int = 2) -> list[Any]:
    """What each rank of ``script`` wrote, as JSON, to the file that is its argument."""
    files = [folder / f"{ranks}-{rank}.json" for rank in range(ranks)]
    run_children(script, [[file] for file in files])
    return [json.loads(file.read_text()) for file in files]


def told(step: TrainingStep, whole_elements: int) -> str:
    """What is said of one training step beside its plan; "fine: ..." where it conforms."""
    watch = Monitor(step.model, step.optimizer, step.plan, whole_elements=whole_elements)

    def on_phase(phase: Phase) -> None:
        if phase is Phase.OPTIMIZER:
            watch.before_update()

    part, terms = step.local(step.job.make_batch(0, 0))
    try:
        with watch:
            step.run(part, on_phase, terms_per_rank=terms)
        return f"fine: {watch.conclude()}"
    except NotConforming as error:
        return str(error)
    finally:
        step.close()


def leave() -> NoReturn:
    """End this rank at once. A thread of gloo that outlives its group can ask for the interpreter's lock
    while the interpreter ends, which aborts a process that has done all it should ("terminate called without
    an active exception", seen once in some hundred runs)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
