"""What one rank of the distributed benchmark measures: every allocation and free of whole trainings.

A settled repeat asks the system to let gloo's threads go first (memfit/runtime/gloo.py says why) and waits
half a millisecond longer for each collective, and for each of several gathers; the others take things as they
come.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Sequence

import torch

from memfit.jobs.training_step import TrainingStep
from memfit.runtime.counting_allocator import CountingAllocator, Log
from memfit.runtime.gloo import RUNS, gloo_first, gloo_threads
from memfit.techniques.rank_mesh import World
from memfit.types.job import Job
from memfit.types.plan import Plan
from memfit.types.trace import Phase

STEPS = 3
Mark = tuple[int, str]  # (events so far, phase that begins)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """One training. ``peaks``: highest live bytes by phase, and "peak" over all. ``inside``: a block that a
    thread of gloo takes for its collective reaches the peak. ``second_step``: its allocations and frees from
    its first forward on."""

    settled: bool
    peaks: dict[str, int]
    inside: bool
    losses: list[float]
    second_step: list[int]


def train(job: Job, plan: Plan, world: World, counter: CountingAllocator, *, settle: bool = False) -> Repeat:
    with gloo_first(settle, patient=settle) as ask:
        ask()
        gc.collect()
        base, begun, losses = counter.live_bytes(), _events(counter), list[float]()
        marks, steps = list[Mark](), list[tuple[int, int]]()

        def turn(phase: str) -> int:
            marks.append((_events(counter) - begun, phase))
            return marks[-1][0]

        def on_phase(phase: Phase) -> None:
            turn(str(phase))

        torch.manual_seed(0)
        counter.start_log()
        turn("setup")
        step = TrainingStep(job, plan, world=world)
        settled = ask()  # building made groups with threads of their own
        for index in range(STEPS):
            turn("between")
            part, terms = step.local(job.make_batch(index, 0))
            turn("between")
            first = len(marks)
            loss, norm = step.run(part, on_phase, terms_per_rank=terms)
            steps.append((marks[first][0], turn("between")))
            losses.append(float(loss))
            del part, loss, norm
        log = counter.stop_log()
        step.close()
    live = [v - base for v in itertools.accumulate(log.deltas_bytes, initial=log.start_bytes)]
    peaks = phase_peaks(live, marks)
    return Repeat(
        settled=settled,
        peaks=peaks,
        inside=_highest_of_gloo(log, live) == peaks["peak"],
        losses=losses,
        second_step=list(log.deltas_bytes[slice(*steps[1])]),
    )


def phase_peaks(live: Sequence[int], marks: Sequence[Mark]) -> dict[str, int]:
    """``live``: bytes before the first event and after each. A phase starts with what is there."""
    found: dict[str, int] = {}
    ends = [at for at, _ in marks[1:]] + [len(live) - 1]
    for (at, phase), end in zip(marks, ends, strict=True):
        found[str(phase)] = max(found.get(str(phase), 0), *live[at : end + 1])
    del found["between"]
    return {**found, "peak": max(found.values())}


def _highest_of_gloo(log: Log, live: Sequence[int]) -> int:
    """Highest live bytes just after an allocation by a thread of gloo."""
    threads, after = set(gloo_threads(RUNS)), zip(log.events, live[1:], strict=True)
    return max((level for e, level in after if e.thread in threads and e.delta_bytes > 0), default=0)


def _events(counter: CountingAllocator) -> int:
    counts = counter.counts()
    return counts.allocations + counts.frees
