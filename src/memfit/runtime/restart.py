"""Restart ranks that die or hang, all together, from the newest complete checkpoint, as torchrun does.

docs/decisions/019-one-starter.md says why torchrun's elastic agent is not used.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from memfit.jobs import checkpoints
from memfit.runtime.child_process import Event
from memfit.runtime.interruption import NO_INTERRUPTION, Interruption
from memfit.runtime.ranks import OnEvent
from memfit.types.errors import UserError
from memfit.types.launch import CheckpointSettings, RunSpec
from memfit.types.result import Measurement, OutcomeKind, Restart


class StepLosses(Mapping[int, float]):
    """A mapping of steps, counted from 0, to losses. A step takes 9 bytes; in a dict it would take 100, and a
    run of a month gigabytes."""

    def __init__(self) -> None:
        self._values, self._has = array("d"), bytearray()

    def add(self, step: int, loss: float) -> None:
        """Set the loss of a step, in place of any earlier one."""
        if (missing := step + 1 - len(self._has)) > 0:
            self._values.frombytes(bytes(8 * missing))
            self._has.extend(bytes(missing))
        self._values[step], self._has[step] = loss, 1

    def __getitem__(self, step: int) -> float:
        if not (0 <= step < len(self._has) and self._has[step]):
            raise KeyError(step)
        return self._values[step]

    def __iter__(self) -> Iterator[int]:
        return (step for step, has in enumerate(self._has) if has)

    def __len__(self) -> int:
        return sum(self._has)


Losses = dict[int, Mapping[int, float]]
"""Rank -> step, counted from 0 -> loss."""


def run_with_restarts(
    spec: RunSpec,
    start: Callable[[RunSpec, OnEvent], Sequence[Measurement]],
    *,
    on_event: OnEvent,
    losses: Losses | None = None,
    interruption: Interruption = NO_INTERRUPTION,
) -> Sequence[Measurement]:
    """Call ``start(spec, on_event)``, which runs all ranks, and return its measurements, one per rank.

    If ``spec`` saves checkpoints and a rank died, raised an error or hung after the run's first step,
    ``start`` is called again to resume from the newest complete checkpoint; if there is none, from where the
    run began. Ranks that ran out of memory or time are not restarted, nor those with a loss that is not
    finite. At most ``spec.keep.restarts`` restarts are made without a new checkpoint in between. An error
    that comes again in the same step is not tried a third time. The measurements are those of the last call,
    with all restarts. If the last call ends well or is interrupted, its losses and number of steps are those
    of all calls together.

    ``on_event`` gets every event of a rank, and ``(0, {"event": "restarted", "why": ...})`` before each
    restart. ``losses``: an empty mapping that gets the loss of each step that a rank reports, also if the run
    fails; None: a new one, which is dropped. After SIGTERM, which ``interruption`` receives, nothing is
    started again, and ranks that have not completed are interrupted."""
    losses = {} if losses is None else losses
    series = {rank: StepLosses() for rank in range(spec.plan.ranks)}
    losses.update(series)
    restarts: list[Restart] = []
    tries_left, has_trained = spec.keep.restarts, False

    def listen(rank: int, event: Event) -> None:
        step, loss = event.get("step"), event.get("loss")
        if event["event"] == "step" and isinstance(step, int) and isinstance(loss, int | float):
            series[rank].add(step, float(loss))
        on_event(rank, event)

    while True:
        measurements = start(spec, listen)
        has_trained = has_trained or any(m.steps_done for m in measurements)
        failure = _death(measurements)
        if failure is None or not (spec.keep.save and has_trained) or interruption.is_terminating:
            break
        keep = resume_newest(spec.keep)
        if keep.resume != spec.keep.resume:
            tries_left = spec.keep.restarts
        restart = _restart(failure, measurements[failure], spec.keep, keep)
        if not tries_left or (restarts and _is_repeated(restarts[-1], restart)):
            break
        tries_left -= 1
        restarts.append(restart)
        rank_text = f"rank {failure}: " if spec.plan.ranks > 1 else ""
        on_event(0, {"event": "restarted", "why": rank_text + restart.reason, "restart": len(restarts)})
        spec = dataclasses.replace(spec, keep=keep)
    if interruption.is_terminating:
        measurements = [_interrupted(m, spec, interruption) for m in measurements]
    return [with_restarts(m, losses[rank], tuple(restarts)) for rank, m in enumerate(measurements)]


def _death(measurements: Sequence[Measurement]) -> int | None:
    """Return the rank that failed first, if it failed without a result. Return None if no rank failed, and
    if the first one ran out of memory or of time, or has a loss that is not finite."""
    for rank, m in enumerate(measurements):
        if m.outcome is not OutcomeKind.OK and m.failed_after_rank is None:
            return rank if m.outcome is OutcomeKind.FAILED and m.peak_bytes is None else None
    return None


def _restart(
    rank: int, measurement: Measurement, before: CheckpointSettings, keep: CheckpointSettings
) -> Restart:
    """Return the restart after ``rank`` failed in a run that began as ``before`` says and goes on as ``keep``
    does. A rank that failed before it had resumed had done the steps of its checkpoint."""
    return Restart(
        rank=rank,
        reason=measurement.reason,
        step=max(_steps_of(before), measurement.first_step + measurement.steps_done),
        first_step=_steps_of(keep),
        checkpoint=keep.resume,
    )


def _steps_of(keep: CheckpointSettings) -> int:
    """Return the steps of the checkpoint to resume from; 0 without one. Return 0, too, if it is gone: the run
    has pruned it after it had saved newer ones."""
    try:
        return checkpoints.about(Path(keep.resume)).step if keep.resume else 0
    except UserError:
        return 0


def _is_repeated(before: Restart, now: Restart) -> bool:
    """Return whether the same error came again in the same step. A signal, which comes from outside, never
    counts."""
    is_signal = now.reason.startswith("killed by")
    return not is_signal and (before.step, before.reason) == (now.step, now.reason)


def _interrupted(m: Measurement, spec: RunSpec, interruption: Interruption) -> Measurement:
    """Return the measurement of a rank after SIGTERM: as it is if the rank completed or saved and ended, else
    one with the outcome interrupted."""
    if m.outcome in (OutcomeKind.OK, OutcomeKind.INTERRUPTED):
        return m
    keep = resume_newest(spec.keep)
    why = interruption.too_late if m.steps_done else interruption.too_early
    saved = f"the newest checkpoint is {keep.resume}" if keep.resume else "there is no checkpoint"
    return dataclasses.replace(
        m, outcome=OutcomeKind.INTERRUPTED, reason=f"{why}; {saved}", failed_after_rank=None
    )


def resume_newest(keep: CheckpointSettings) -> CheckpointSettings:
    """Return ``keep`` with ``resume`` set to the newest complete checkpoint in the folder where the run
    saves, and ``passed_over`` to the reasons why newer ones were not taken. Return it unchanged if the run
    saves nowhere, if there is no complete checkpoint, or if ``resume`` is a complete one of a later step."""
    if not keep.save:
        return keep
    try:
        path, checkpoint, passed_over = checkpoints.find(Path(keep.save))
    except UserError:
        return keep
    is_complete = bool(keep.resume) and not checkpoints.why_incomplete(Path(keep.resume))
    if is_complete and checkpoint.step < _steps_of(keep):
        return keep
    return dataclasses.replace(keep, resume=str(path), passed_over=passed_over)


def with_restarts(m: Measurement, losses: Mapping[int, float], restarts: tuple[Restart, ...]) -> Measurement:
    """Return the measurement of a rank's last start with all ``restarts`` before it, and if it ended well or
    was interrupted, with the rank's ``losses`` of all starts (step, counted from 0 -> loss)."""
    if restarts and m.outcome in (OutcomeKind.OK, OutcomeKind.INTERRUPTED):
        m = dataclasses.replace(
            m,
            losses=tuple(losses[step] for step in sorted(losses)),
            steps_done=len(losses),
            first_step=min(losses, default=0),
        )
    return dataclasses.replace(m, restarts=restarts)
