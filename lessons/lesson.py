"""What the lessons share: a job at a small size, a training in a process of its own, and a question."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """The question at the end of a lesson. ``truth``: the letter of the right answer, as the lesson measured
    it; ``because``: the figures that decide it."""

    truth: str
    because: str
    choices: str = "abc"

    def grade(self, answer: str | None) -> bool:
        """Print whether ``answer`` is right, and why. None is no answer, and not right. Raises ValueError for
        anything that is not one of the letters."""
        if answer is None:
            print(f"Your answer? / 答えは？  {', '.join(self.choices)}")
            return False
        if answer not in (*self.choices,):
            raise ValueError(f"{answer!r} is not one of {', '.join(self.choices)}")
        right = answer == self.truth
        print(f"{'Right / 正解' if right else 'Not right / 不正解'}: {self.because}")
        return right


def answer() -> str | None:
    """Return the answer given to a lesson that runs as a script, its first argument, else None."""
    return sys.argv[1] if len(sys.argv) == 2 and len(sys.argv[1]) == 1 else None


def finish(question: Question, given: str | None) -> None:
    """Grade the answer; a script ends with exit code 1 if it is wrong."""
    if not question.grade(given) and given is not None:
        sys.exit(1)


def parts(at_peak: Mapping[Any, int]) -> str:
    """Return what the memory at the peak consists of, the largest part first."""
    largest = sorted(at_peak.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {mib(size)}" for name, size in largest if size >= 2**18)
