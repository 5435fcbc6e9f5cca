"""Child processes that run a script: several ranks of a test over gloo, or one program by itself."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from forked import Popen

from memfit.conformance.monitor import Monitor
from memfit.jobs.training_step import TrainingStep
from memfit.runtime.ranks import free_port, rank_env
from memfit.types.conformance import NotConforming
from memfit.types.trace import Phase


def start(
    argv: Sequence[str | Path], *, env: Mapping[str, str] = {}, output: str = os.devnull, errors: str = ""
) -> Popen | subprocess.Popen[bytes]:
    """Start ``python *argv`` in the current folder, with ``env`` in addition to this process's variables and
    without warnings; it finds the modules beside this one. What it prints is appended to the files ``output``
    and ``errors`` (by default, its standard error is that of this process)."""
    paths = [str(Path(__file__).parent), env.get("PYTHONPATH") or os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, **env, "PYTHONPATH": os.pathsep.join(paths)}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(Path(name).open("ab")) if name else None for name in (output, errors)]
        words = ["-W", "ignore", *argv]
        if sys.platform == "linux":
            return Popen(words, env=variables, stdout=files[0], stderr=files[1])
        return subprocess.Popen([sys.executable, *words], env=variables, stdout=files[0], stderr=files[1])


def run_script(
    *argv: str | Path, cwd: str | Path = ".", env: Mapping[str, str] = {}, limit_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run ``python *argv`` in the folder ``cwd`` to its end, and return its exit code and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        with contextlib.chdir(cwd):
            child = start(argv, env=env, output=str(output), errors=str(errors))
        try:
            code = child.wait(limit_s)
        finally:
            child.kill()
        return subprocess.CompletedProcess(argv, code, output.read_text(), errors.read_text())


def run_children(
    script: str | Path,
    arguments: Sequence[Sequence[str | Path]],
    *,
    env: Mapping[str, str] = {},
    limit_s: float = 240,
) -> None:
    """``python script *arguments[rank]`` on every rank, until each has ended well. One rank joins nothing.

    A rank that fails ends the others, which would wait for it until the limit."""
    ranks, port = len(arguments), free_port()
    children = [
        start([script, *of_rank], env={**env, **(rank_env(rank, ranks, port) if ranks > 1 else {})})
        for rank, of_rank in enumerate(arguments)
    ]
    end_s = time.monotonic() + limit_s
    try:
        while None in (codes := [child.poll() for child in children]) and not any(codes):
            assert time.monotonic() < end_s, f"{Path(script).name}: {codes} after {limit_s} s, by rank"
            time.sleep(0.01)
    finally:
        for child in children:
            child.kill()
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
