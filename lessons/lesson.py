"""What the lessons share: a job at a small size, a training in a process of its own, and a question."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memfit.inputs import plan_of
from memfit.jobs.registry import load
from memfit.types.job import Job, JobRef
from memfit.types.launch import CheckpointSettings, RunSpec
from memfit.types.result import Measurement, OutcomeKind
from memfit.workflows.single_run import measure_spec

ALPHAFOLD = JobRef(spec="alphafold2", batch=1, dimensions={"crop": 32})  # two Evoformer blocks, 32 residues
ESM = JobRef(spec="protein-lm", batch=8, length=64)  # four ESM-2 blocks, 64 residues


def job(ref: JobRef) -> Job:
    """Return the job that ``ref`` names."""
    return load(ref)


def train(
    ref: JobRef, plan: Any = None, *, steps: int = 2, memory_bytes: int | None = None, **keep: Any
) -> Measurement:
    """Train a job in a process of its own for each rank of the plan, and return what was measured there.

    ``plan``: as for `memfit.estimate`; None: plain training. ``memory_bytes``: a hard limit of what it may
    use while it trains; None: none. ``keep``: ``save`` and ``resume``, folders of checkpoints. Running out of
    memory is an outcome of the measurement; raises RuntimeError if anything else goes wrong."""
    spec = RunSpec(
        name="lesson",
        role="run",
        job=ref,
        plan=plan_of(plan),
        seed=0,
        steps=steps,
        cap_bytes=memory_bytes,
        threads=1,
        evaluate=False,
        keep=CheckpointSettings(**keep),
    )
    measurement = measure_spec(spec)
    if measurement.outcome is OutcomeKind.FAILED:
        raise RuntimeError(measurement.reason)
    return measurement


def mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"


CHOICES = "abc"  # of every question


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """The question at the end of a lesson. ``truth``: the letter of the right answer, as the lesson measured
    it; ``because``: the figures that decide it."""

    truth: str
    because: str

    def grade(self, given: str | None) -> bool:
        """Print whether the answer ``given`` is right, and why. None, and anything that is not one of the
        letters, is no answer, and not right; the question is asked again."""
        letter = given.strip().lower() if given else ""
        if letter not in [*CHOICES]:
            print(f"Your answer? / 答えは？  {', '.join(CHOICES)}")
            return False
        is_right = letter == self.truth
        print(f"{'Right / 正解' if is_right else 'Not right / 不正解'}: {self.because}")
        return is_right


def answer() -> str | None:
    """Return the answer given to a lesson that runs as a script, its only argument; None if there is none, and
    in a notebook. Exits with one line if the arguments are anything else."""
    given = sys.argv[1:]
    if not given or Path(sys.argv[0]).resolve().parent != Path(__file__).resolve().parent:
        return None
    if len(given) > 1 or given[0].lower() not in [*CHOICES]:
        wanted = ", ".join(CHOICES)
        sys.exit(
            f"{' '.join(given)!r} is no answer: give one of {wanted}, or nothing to read the question first"
            f" / 答えは {wanted} のどれかです。先に問題を読むには、何も付けずに実行してください"
        )
    return given[0].lower()


def finish(question: Question, given: str | None) -> None:
    """Grade the answer; a script ends with exit code 1 if it is wrong."""
    if not question.grade(given) and given is not None:
        sys.exit(1)


def parts(at_peak: Mapping[Any, int]) -> str:
    """Return what the memory at the peak consists of, the largest part first."""
    largest = sorted(at_peak.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {mib(size)}" for name, size in largest if size >= 2**18)


answer()  # what is no answer ends a script here, before its lesson runs
