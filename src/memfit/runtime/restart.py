"""Restart ranks that die, all together, from the newest complete checkpoint, as torchrun does.

torchrun's elastic agent is not used, because it starts its own processes, whose messages, caps and reasons of
death memfit would not see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from memfit.jobs import checkpoints
from memfit.runtime.child_process import STOPPED, Event
from memfit.types.errors import UserError
from memfit.types.launch import CheckpointSettings, RunSpec
from memfit.types.result import Measurement, OutcomeKind

OnEvent = Callable[[int, Event], None]
Losses = dict[int, dict[int, float]]
"""Rank -> step, counted from 0 -> loss."""
RESTARTS: Final = 3


def run_through(
    spec: RunSpec,
    start: Callable[[RunSpec, OnEvent], Sequence[Measurement]],
    *,
    on_event: OnEvent,
    losses: Losses | None = None,
) -> Sequence[Measurement]:
    """Call ``start(spec, on_event)``, which runs all ranks, and return its measurements, one per rank.

    If ``spec`` saves checkpoints and a rank died in training (failed without a result after its first step),
    ``start`` is called again, up to `RESTARTS` (3) times, to resume from the newest complete checkpoint; if
    there is none, from where the run began. The measurements of the last call are returned, whether a rank
    died in it or not. If a restarted rank ends well, its losses and number of steps are those of all calls
    together.

    ``on_event`` gets every event of a rank, and ``(0, {"event": "restarted", "why": ...})`` before each
    restart. ``losses``: an empty mapping that gets the loss of each step that a rank reports, also if the run
    fails."""
    losses = {} if losses is None else losses
    losses.update({rank: {} for rank in range(spec.plan.ranks)})

    def listen(rank: int, event: Event) -> None:
        step, loss = event.get("step"), event.get("loss")
        if event["event"] == "step" and isinstance(step, int) and isinstance(loss, int | float):
            losses[rank][step] = float(loss)
        on_event(rank, event)

    measurements = start(spec, listen)
    for _ in range(RESTARTS if spec.keep.save else 0):
        failures = [m for m in measurements if _died(m)]
        if not failures:
            return measurements
        failure = min(failures, key=lambda m: (not m.reason.startswith("killed"), m.reason == STOPPED))
        on_event(0, {"event": "restarted", "why": failure.reason})
        spec = dataclasses.replace(spec, keep=newest(spec.keep))
        measurements = [_whole(m, losses[rank]) for rank, m in enumerate(start(spec, listen))]
    return measurements


def _died(measurement: Measurement) -> bool:
    """Return whether a rank failed without a result after at least one step. A failure before that would
    happen again. Running out of memory or of time does not count."""
    is_silent = measurement.outcome is OutcomeKind.FAILED and measurement.peak_bytes is None
    return is_silent and measurement.steps_done > 0


def newest(keep: CheckpointSettings) -> CheckpointSettings:
    """Return ``keep`` with ``resume`` set to the newest complete checkpoint in the folder where the run
    saves, and ``passed_over`` to the reasons why newer ones were not taken. Return it unchanged if the run
    saves nowhere, if there is no complete checkpoint, or if it is of an earlier step than ``resume``."""
    if not keep.save:
        return keep
    try:
        path, checkpoint, passed_over = checkpoints.find(Path(keep.save))
    except UserError:
        return keep
    if keep.resume and checkpoint.step < checkpoints.find(Path(keep.resume))[1].step:
        return keep
    return dataclasses.replace(keep, resume=str(path), passed_over=passed_over)


def _whole(measurement: Measurement, losses: dict[int, float]) -> Measurement:
    if measurement.outcome is not OutcomeKind.OK:
        return measurement
    return dataclasses.replace(
        measurement,
        losses=tuple(losses[step] for step in sorted(losses)),
        steps_done=len(losses),
        first_step=min(losses, default=0),
    )
