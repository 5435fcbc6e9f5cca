"""Run a public script for a few optimizer steps and count its bytes; ask memfit for its prediction."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from memfit.store.environment import fingerprint
from scripts.corpus import PublicScript, ScriptError
from scripts.prepare import PREPARE

_HOOKS: Final = Path(__file__).with_name("counting")
_SOURCE: Final = Path(__file__).parents[2] / "src"
LIMIT_S: Final = 600.0
PREDICTED_STEPS: Final = 2  # `memfit estimate` runs a script so far, or farther if it may collect memory


def prepare(script: PublicScript, sources: Path) -> Path:
    """Make the script's data once, and return its work folder."""
    work = sources / "work" / script.name
    mark = work / ".prepared"
    if not mark.exists():
        work.mkdir(parents=True, exist_ok=True)
        PREPARE[script.prepare](sources, work)
        mark.touch()
    return work


def measure(
    script: PublicScript,
    sources: Path,
    work: Path,
    *,
    repeats: int,
    steps: int = PREDICTED_STEPS,
    peak_steps: int = PREDICTED_STEPS,
    nudge: float = 0.0,
    nudge_seed: int = 1,
) -> dict[str, Any]:
    """Run the script `repeats` times to the end of its optimizer step number `steps`. `nudge`: the relative
    change of its first weights, with signs drawn from `nudge_seed`; 0: none. Return the peaks to the end of
    step number `peak_steps`, their median (`peak_bytes`), and the periods of the last run's ranks. Raise
    ScriptError if a rank does not take the steps in 10 minutes."""
    nudges = {"MEMFIT_TRUTH_NUDGE": str(nudge), "MEMFIT_TRUTH_NUDGE_SEED": str(nudge_seed)}
    runs = [_measure_once(script, sources, work, steps, peak_steps, nudges) for _ in range(repeats)]
    peaks = [run["peak_bytes"] for run in runs]
    return runs[-1] | {"peak_bytes": statistics.median(peaks), "peaks_bytes": peaks}


def _measure_once(
    script: PublicScript, sources: Path, work: Path, steps: int, peak_steps: int, nudges: dict[str, str]
) -> dict[str, Any]:
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counting = {"MEMFIT_TRUTH": folder, "MEMFIT_TRUTH_STEPS": str(steps)}
        environment = _child_environment(script, work) | counting | nudges
        done = _call(script.arguments(sources, work), script, sources, work, environment)
        ranks = [json.loads(p.read_text()) for p in sorted(Path(folder).glob("rank-*.json"))]
    if len(ranks) != script.ranks:
        raise ScriptError(f"{len(ranks)} of {script.ranks} ranks took {steps} steps: {_last_lines(done)}")
    return {
        "peak_bytes": max(step["peak_bytes"] for r in ranks for step in r["steps"][:peak_steps]),
        "from_start_bytes": max(p["peak_bytes"] for r in ranks for p in (r["setup"], *r["steps"]) if p),
        "wall_s": time.monotonic() - begin_s,
        "ranks": ranks,
    }


def predict(script: PublicScript, sources: Path, work: Path) -> dict[str, Any]:
    """Return what `memfit estimate --json -- COMMAND` answers: its bytes and the number of steps that it
    traced, or the last lines of its error."""
    begin_s = time.monotonic()
    command = [sys.executable, "-m", "memfit", "estimate", "--json", "--", *script.arguments(sources, work)]
    done = _call(command, script, sources, work, _child_environment(script, work))
    wall = {"wall_s": time.monotonic() - begin_s}
    try:
        answer = json.loads(done.stdout)
        return wall | {
            "allocated_bytes": answer["estimate"]["allocated_bytes"],
            "steps": answer["script"]["steps"],
        }
    except (ValueError, KeyError, TypeError):
        return wall | {"error": _last_lines(done)}


def _call(
    command: Sequence[str], script: PublicScript, sources: Path, work: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    folder = script.folder.format(sources=sources, work=work)
    try:
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ScriptError(f"not done after {LIMIT_S:.0f} s") from error


def _child_environment(script: PublicScript, work: Path) -> dict[str, str]:
    """Return the environment in which the script and the prediction run: this one's programs first, no
    network, no accelerator."""
    programs = str(Path(sys.executable).parent)
    paths = (str(_HOOKS), str(_SOURCE), os.environ.get("PYTHONPATH", ""))
    return (
        os.environ
        | {
            "PATH": os.pathsep.join((programs, os.environ["PATH"])),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(work / "hf"),
        }
        | ({"MEMFIT_ANY_CIFAR": "1"} if script.any_cifar else {})
        | ({} if script.torch_seed is None else {"MEMFIT_TORCH_SEED": str(script.torch_seed)})
    )


def _last_lines(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return f"exit code {done.returncode}: " + " | ".join(lines[-3:])[-400:]


def environment_of(script: PublicScript) -> dict[str, str]:
    """Return the fingerprint of this machine, the versions of the script's packages and memfit's commit."""
    head = ["git", "-C", str(_SOURCE), "describe", "--always", "--abbrev=12", "--dirty"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
    return dict(fingerprint()) | {p: version(p) for p in script.packages} | {"memfit commit": commit}
