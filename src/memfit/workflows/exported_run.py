"""Read what an exported folder has trained. Torch's launcher, whoever started it, keeps the output of each
rank in the folder: LOGS/RUN/attempt_N/LOCAL_RANK/stdout.log with the worker's events, and stderr.log."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from memfit.export.base import RUN as RUN_FILE
from memfit.files.read import read_text
from memfit.monitoring.host_kill import host_kills
from memfit.runtime.child_process import Event, parse_event
from memfit.runtime.ranks import name_first_failure
from memfit.runtime.restart import with_restarts
from memfit.store.exchange.run_record import RUN as RUN_LABEL
from memfit.store.exchange.run_record import RunRecord
from memfit.types import serialization
from memfit.types.errors import UserError
from memfit.types.launch import RunSpec
from memfit.types.result import Measurement, OutcomeKind, Restart, Run
from memfit.workflows.single_run import merge_ranks

LOST: Final = "killed, or lost with its machine"
"""The reason of a rank that left neither a result nor an error."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankStart:
    """What one process wrote. ``attempt``: the same for all processes that were started together. ``time_s``:
    when it started, in seconds since 1970. ``first_step``: number of steps that its checkpoint had done.
    ``checkpoint``: path of that; "": none. ``losses``: step, counted from 0 -> loss. ``result``: None if it
    ended without one. ``error``: the last line of its error output that names an exception, if there is a
    traceback; else "". ``log``: the file of its output."""

    rank: int
    attempt: str
    time_s: float
    first_step: int
    checkpoint: str
    losses: Mapping[int, float]
    result: Measurement | None
    error: str
    log: Path

    @property
    def steps_done(self) -> int:
        return len(self.losses)


def read_exported_run(folder: Path) -> RunRecord:
    """Return the record of the run that the files of an export in ``folder`` have trained by memfit's worker:
    its last complete training, or what was started after that. Restarts, also those by a scheduler that has
    started the job again, are in the measurement, and the losses are those of all starts. There is no
    prediction, and the environment of the machines that trained is unknown. The record's time is that of the
    last start.

    Raises UserError if ``folder`` is no such folder, if nothing was started from it, if the output of a rank
    is missing, as on machines that do not share the folder, and if run.json or a result is damaged."""
    if not (folder / RUN_FILE).is_file():
        raise UserError(
            f"{folder} has no {RUN_FILE}: it is not the folder of an export whose training memfit records",
            allowed="a folder that `memfit export` wrote without --script for torchrun, slurm or skypilot",
        )
    spec = serialization.loads(RunSpec, read_text(folder / RUN_FILE), what=str(folder / RUN_FILE))
    attempts = _last_training(_attempts(folder), spec)
    ranks = spec.plan.ranks
    if not attempts:
        raise UserError(
            f"no rank of {folder} has started",
            hint="start it as its README.md says; the launcher's output says why it did not start",
        )
    if missing := sorted(set(range(ranks)) - {rank for attempt in attempts for rank in attempt}):
        raise UserError(
            f"{folder} has no output of rank {', '.join(map(str, missing))}, of {ranks} ranks",
            hint=f"if the machines do not share the folder, copy each machine's folder logs into {folder}",
        )
    losses: dict[int, dict[int, float]] = {rank: {} for rank in range(ranks)}
    restarts: list[Restart] = []
    kills = _Kills(folder)
    for attempt, after in itertools.zip_longest(attempts, attempts[1:]):
        for rank, start in attempt.items():
            losses[rank] |= start.losses
        measurements = _measurements(attempt, ranks, kills)
        if after is not None:
            restarts.append(_restart(measurements, attempt, after))
    merged = merge_ranks([with_restarts(m, losses[r], tuple(restarts)) for r, m in enumerate(measurements)])
    save = str(folder / spec.keep.save) if spec.keep.save else ""
    keep = dataclasses.replace(spec.keep, save=save, resume=_checkpoint_of(attempts[0]))
    run = Run(
        spec=dataclasses.replace(spec, keep=keep),
        predicted_peak_bytes=None,
        predicted_phase_peak_bytes={},
        predicted_step_s=None,
        measurement=merged,
    )
    start_s = max(start.time_s for start in attempts[-1].values())
    created = datetime.datetime.fromtimestamp(start_s, datetime.UTC).isoformat(timespec="milliseconds")
    return RunRecord(label=RUN_LABEL, created=created, environment={}, run=run)


Attempt = Mapping[int, RankStart]
"""Rank -> its process, of those that were started together."""


def _checkpoint_of(attempt: Attempt) -> str:
    return next(iter(attempt.values())).checkpoint


def _attempts(folder: Path) -> list[Attempt]:
    """Return all starts, in their order."""
    attempts: dict[str, dict[int, RankStart]] = {}
    logs = folder.rglob("attempt_*/*/stdout.log")
    for start in sorted(filter(None, map(_read_start, logs)), key=lambda s: s.time_s):
        attempts.setdefault(start.attempt, {})[start.rank] = start
    return list(attempts.values())


def _last_training(attempts: Sequence[Attempt], spec: RunSpec) -> Sequence[Attempt]:
    """Return those of the attempts that belong to the last training: a training that has completed ends
    there, and what was started later is another one."""
    ends = [n for n, attempt in enumerate(attempts) if _is_complete(attempt, spec.plan.ranks)]
    begin = next((n + 1 for n in reversed(ends) if n + 1 < len(attempts)), 0)
    return attempts[begin:]


def _is_complete(attempt: Attempt, ranks: int) -> bool:
    results = [start.result for start in attempt.values()]
    return len(results) == ranks and all(r is not None and r.outcome is OutcomeKind.OK for r in results)


def _read_start(log: Path) -> RankStart | None:
    """Return what the process with the output ``log`` did; None if it wrote no event "started"."""
    with log.open("rb") as file:
        events = [event for line in file if (event := parse_event(line)) is not None]
    begun = next((e for e in events if e["event"] == "started"), None)
    if begun is None:
        return None
    resumed: Event = next((e for e in events if e["event"] == "resumed"), {})
    results = [e["measurement"] for e in events if e["event"] == "result"]
    steps = [e for e in events if e["event"] == "step"]
    return RankStart(
        rank=int(str(begun["rank"])),
        attempt=str(begun["attempt"]),
        time_s=float(str(begun["time_s"])),
        first_step=int(str(resumed.get("step", 0))),
        checkpoint=str(resumed.get("path", "")),
        losses={int(str(e["step"])): float(str(e["loss"])) for e in steps},
        result=serialization.loads(Measurement, json.dumps(results[-1]), what=str(log)) if results else None,
        error=_error(log.with_name("stderr.log")),
        log=log,
    )


_MOST_ERROR_BYTES: Final = 64 * 2**10


def _error(log: Path) -> str:
    """Return the last line of ``log``, a process's error output, that names an exception. Return "" if there
    is no traceback in its last 64 KiB, and if the file cannot be read."""
    try:
        text = log.read_bytes()[-_MOST_ERROR_BYTES:].decode("utf-8", "replace")
    except OSError:
        return ""
    text = re.sub(r"^\[rank\d+\]:[ \t]?", "", text, flags=re.MULTILINE)  # as torch marks lines of a rank
    lines = re.findall(r"^\w[\w.]*(?:Error|Exception|Interrupt)\b.*", text, re.MULTILINE)
    return lines[-1].strip() if lines and "Traceback (most recent call last)" in text else ""


class _Kills:
    """What Slurm says in its output files in ``folder``, NAME-JOB.log, about jobs that ran out of memory."""

    def __init__(self, folder: Path) -> None:
        self._lines: dict[str, str] = {}
        for path in sorted(folder.glob("*-*.log")):
            lines = path.read_bytes().decode("utf-8", "replace").splitlines()
            stated = [k.text for k in host_kills(lines) if k.kind in ("stated", "kernel")]
            if stated:
                self._lines[path.stem.rpartition("-")[2]] = stated[0]

    def of(self, log: Path) -> str:
        """Return the line about the job that wrote ``log``, a file in LOGS/JOB-RESTARTS/, or ""."""
        jobs = (part.rpartition("-")[0] for part in log.parts)
        return next((self._lines[job] for job in jobs if job in self._lines), "")


def _measurements(attempt: Attempt, ranks: int, kills: _Kills) -> tuple[Measurement, ...]:
    """Return the measurement of each rank. Of the ranks that failed, all but the first to fail name it
    (``failed_after_rank``)."""
    measurements = tuple(_measurement(attempt.get(rank), kills) for rank in range(ranks))
    failures = [
        r for r, m in enumerate(measurements) if m.outcome not in (OutcomeKind.OK, OutcomeKind.INTERRUPTED)
    ]
    # A rank without any word was killed; those with an error of a lost connection came after it.
    return name_first_failure(measurements, failures)


def _measurement(start: RankStart | None, kills: _Kills) -> Measurement:
    if start is None:
        return Measurement(outcome=OutcomeKind.FAILED, reason="did not start")
    if start.result is not None and (
        start.result.outcome is not OutcomeKind.FAILED or start.result.peak_bytes
    ):
        return start.result
    outcome, reason = OutcomeKind.FAILED, start.result.reason if start.result is not None else start.error
    if not reason:
        line = kills.of(start.log)
        outcome, reason = (OutcomeKind.OOM, line) if line else (outcome, LOST)
    return Measurement(
        outcome=outcome,
        reason=reason,
        first_step=start.first_step,
        steps_done=start.steps_done,
        losses=tuple(start.losses.values()),
    )


def _restart(measurements: Sequence[Measurement], attempt: Attempt, after: Attempt) -> Restart:
    """Return the restart between ``attempt``, of which ``measurements`` has one for each rank, and the next,
    ``after``. It names a rank that failed by itself, if there is one, and the most steps that a rank had
    done."""
    ended = [(r, m) for r, m in enumerate(measurements) if m.outcome is not OutcomeKind.OK]
    rank, m = min(ended, key=lambda pair: pair[1].failed_after_rank is not None)
    return Restart(
        rank=rank,
        reason=m.reason,
        step=max(start.first_step + start.steps_done for start in attempt.values()),
        first_step=next(iter(after.values())).first_step,
        checkpoint=_checkpoint_of(after),
    )
