"""The record of a watched training: one file of JSON lines for each rank, read and merged.

A file begins with a line ``start`` and has a line ``step`` for each recorded step, ``alarm`` for each alarm
and ``end`` if the process ended by itself. Lines of steps that take less than a tenth of a second are
written together, ten times a second. ``memfit watch -- COMMAND`` adds lines ``command`` before and
``exit`` after the others to the file of rank 0. Whole lines are written, by one call of the operating system.
A last line that is cut off is ignored. A new line ``command`` or ``start`` begins a new record.

::

    run.jsonl      rank 0
    run.1.jsonl    rank 1
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from memfit.files.read import open_regular
from memfit.monitoring.traceback_text import StackFrame
from memfit.types.errors import UserError
from memfit.types.result import Interval

FORMAT: Final = 1
_MOST_BYTES: Final = 2**30  # read at a time


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WatchStart:
    """What is known when the watch of one rank begins.

    ``host``: name of its machine. ``time_s``: seconds since 1970. ``device``: torch's name, such as "cuda:0",
    and ``device_name`` its product name, "" for a processor. ``total_bytes``: memory of the device or, for a
    processor, of the machine or its control group; None if unknown. ``memory_source``: what counts allocated
    bytes, such as "torch's allocator of cuda"; "" if nothing does. ``energy_boundary``: what the joules
    include, such as "board (NVML)"; "" without a meter. ``environment``: versions and settings
    (`memfit.store.environment.fingerprint`). ``prediction``: "allocated_bytes", "reserved_bytes",
    "device_bytes" and "host_bytes", those that were predicted. ``limits``: the thresholds of the alarms, name
    -> number.
    """

    rank: int
    world_size: int
    pid: int
    host: str
    time_s: float
    device: str
    device_name: str
    total_bytes: int | None
    memory_source: str
    energy_boundary: str
    environment: Mapping[str, str]
    prediction: Mapping[str, Interval]
    limits: Mapping[str, float]


# Not frozen: each step of a training makes one, and a frozen one takes three times as long.
@dataclasses.dataclass(slots=True, kw_only=True)
class WatchStep:
    """One recorded step of one rank. A field that is None was not measured in this step.

    ``step``: its number, from 1 unless the training gave another. ``time_s``: when it ended, in seconds
    since 1970. ``step_s``: its duration. ``before_backward_s``: the part of it before its first backward pass
    began: loading of data and forward pass, on the host. Memory is that right after the step:

    - ``allocated_bytes``: tensors, ``reserved_bytes``: what torch's allocator keeps for them.
    - ``peak_allocated_bytes``, ``peak_reserved_bytes``: their peaks since the process began, or since the
      training itself reset them. memfit never does.
    - ``allocator_retries``: how often the allocator freed its cache to find a block, since the process began.
    - ``device_bytes``: what all processes use of the device.
    - ``host_bytes``: resident memory of the process, ``peak_host_bytes``: its peak.
    - ``heap_bytes``: what the C library's allocator has handed out, the tensors of a processor among it.
    - ``headroom_bytes``: free memory of the device; for a processor, what the process can still take.

    ``energy_j``: joules since the watch began.
    """

    step: int
    time_s: float
    step_s: float | None = None
    before_backward_s: float | None = None
    allocated_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    allocator_retries: int | None = None
    device_bytes: int | None = None
    host_bytes: int | None = None
    peak_host_bytes: int | None = None
    heap_bytes: int | None = None
    headroom_bytes: int | None = None
    loss: float | None = None
    grad_norm: float | None = None
    energy_j: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Something unusual in a training.

    ``kind``: "creep", "maximum", "above-prediction", "fragmentation", "retries", "loss-spike", "non-finite",
    "headroom" or "slow-rank". ``quantity``: the field of WatchStep in which it was seen. ``value``: its
    value; but for "creep" its growth in bytes per step, for "fragmentation" the peak of reserved over that of
    allocated memory, for "loss-spike" by how many standard deviations the loss is above the median, and for
    "slow-rank" its ratio to that of the other ranks. ``limit``: the threshold that ``value`` crossed; for
    "retries" the value in the step before, for "non-finite" 0. ``text``: one sentence.
    """

    kind: str
    step: int
    rank: int
    quantity: str
    value: float
    limit: float
    text: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WatchEnd:
    """The end of a process by itself. ``error``: the type of the error that ended it, such as
    "OutOfMemoryError", or "". ``message``: the error's text, at most its first 4,000 characters. ``memory``:
    what could then be measured, by the names of WatchStep's fields. ``recovery``: what ``on_oom`` returned,
    such as the plan with which to start again; "" if there is nothing to start again with. ``frames``: the
    calls in which the error was raised, outermost first, with the names of files without the folders of the
    user.
    """

    time_s: float
    error: str = ""
    message: str = ""
    recovery: str = ""
    memory: Mapping[str, int] = dataclasses.field(default_factory=dict)
    frames: tuple[StackFrame, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutOfMemory:
    """An error with which a watched training ran out of memory. ``step``: number of the step that failed."""

    step: int
    error: BaseException


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CommandExit:
    """The end of a command that ``memfit watch -- COMMAND`` ran. ``code``: its exit status; -9 means killed
    by signal 9. ``oom_kills``: how many processes the kernel killed meanwhile in the command's control group
    because memory ran out; None: unknown. ``machine_oom_kills``: the same of the whole machine.
    ``free_bytes``: memory of the host that was free when the command was last seen alive, at most a second
    before its end, of ``total_bytes``; None if it ended earlier.
    """

    time_s: float
    code: int
    oom_kills: int | None = None
    machine_oom_kills: int = 0
    free_bytes: int | None = None
    total_bytes: int | None = None

    @property
    def is_killed(self) -> bool:
        """Whether the command died of SIGKILL: the code -9, or 137, with which a shell reports it."""
        return self.code in (-9, 137)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankRecord:
    """What one rank wrote since its watch last began. ``start`` is None if that line is missing. ``end`` is
    None while the process runs, and if it was killed. ``earlier_starts``: how often a watch began in this
    file before, as before a restart of the training. ``unreadable_lines``: number of lines that are left out
    because they are not valid.
    """

    path: Path
    rank: int
    start: WatchStart | None
    steps: tuple[WatchStep, ...]
    alarms: tuple[Alarm, ...]
    end: WatchEnd | None
    earlier_starts: int = 0
    unreadable_lines: int = 0

    def peak(self, quantity: str) -> int | None:
        """Return the highest value of a field of WatchStep over all steps, or None if it was never
        measured."""
        return max((v for s in self.steps if (v := getattr(s, quantity)) is not None), default=None)

    @property
    def least_headroom_bytes(self) -> int | None:
        """The least free memory after a step, or None if it was never measured."""
        return min((s.headroom_bytes for s in self.steps if s.headroom_bytes is not None), default=None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WatchRecord:
    """The records of all ranks of a training, sorted by rank. ``exit``: the end of the command, if memfit ran
    it.
    """

    ranks: tuple[RankRecord, ...]
    exit: CommandExit | None = None

    @property
    def lost_ranks(self) -> tuple[int, ...]:
        """The ranks without a record of their end, which a signal may have ended. Empty for one rank, and
        unless the training is over: another rank ended with an error, or the command with a positive exit
        status."""
        if len(self.ranks) == 1:
            return ()
        is_over = any(r.end is not None and r.end.error for r in self.ranks)
        is_over = is_over or (self.exit is not None and self.exit.code > 0)
        return tuple(r.rank for r in self.ranks if r.end is None) if is_over else ()

    @property
    def fullest(self) -> RankRecord | None:
        """The rank with the least free memory on its accelerator. On processors, and if free memory is
        unknown, the one with the highest peak of tensors, or else of its resident memory. None if nothing was
        measured."""
        free = [
            (r.least_headroom_bytes, r.rank, r)
            for r in self.ranks
            if r.least_headroom_bytes is not None and r.start is not None and r.start.device_name
        ]
        used = [
            (-peak, r.rank, r)
            for r in self.ranks
            if (peak := r.peak("peak_allocated_bytes") or r.peak("peak_host_bytes")) is not None
        ]
        return min(free or used, key=lambda item: item[:2])[2] if free or used else None


# -- files ------------------------------------------------------------------------------------------------


def rank_path(path: Path, rank: int) -> Path:
    """Return the file of a rank: ``path`` for rank 0, else with the rank before the suffix, as in
    run.1.jsonl."""
    return path.with_suffix(f".{rank}{path.suffix}") if rank else path


def rank_paths(path: Path) -> dict[int, Path]:
    """Return the files of all ranks that exist beside ``path``, the file of rank 0, by rank."""
    pattern = re.compile(re.escape(path.stem) + r"\.(\d+)" + re.escape(path.suffix))
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    others = {int(m[1]): p for p in siblings if (m := pattern.fullmatch(p.name))}
    paths = {0: path, **others} if path.is_file() else others
    return dict(sorted(paths.items()))


def read_records(path: str | Path) -> WatchRecord:
    """Read and merge what the ranks of a training wrote. ``path``: the file of rank 0. Files of other ranks
    are read from the same folder. Raises UserError if none of these files exists, if one cannot be read, or
    if no line in them is one of a watched training."""
    reader = RecordReader(path)
    record = reader.update()
    if not record.ranks:
        raise UserError(
            f"cannot read the record {path}: "
            + ("no line is one of a watched training" if Path(path).exists() else "there is no such file"),
            allowed="the file of rank 0 that `memfit watch -- COMMAND` or `memfit.watch` writes",
        )
    return record


class RecordReader:
    """Reads the record of a training that may still run: each `update` reads only what is new."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._files: dict[int, _RankFile] = {}

    def update(self) -> WatchRecord:
        """Return the whole record so far, without ranks that wrote no valid line and without files of an
        earlier training. Raises UserError if a file cannot be read."""
        for rank, path in rank_paths(self._path).items():
            self._files.setdefault(rank, _RankFile(path, rank)).update()
        first = self._files.get(0)
        files = [f for _, f in sorted(self._files.items()) if first is None or f is first or first.is_with(f)]
        exits = [f.exit for f in files if f.exit is not None]
        return WatchRecord(
            ranks=tuple(f.record() for f in files if f.has_lines), exit=exits[-1] if exits else None
        )


class _RankFile:
    """The lines of one rank that were read so far."""

    def __init__(self, path: Path, rank: int) -> None:
        self._path, self._rank, self._offset = path, rank, 0
        self._starts = self._commands = self._unreadable = 0
        self._command_s: float | None = None  # when the command began
        self._begin(None)

    def _begin(self, start: WatchStart | None) -> None:
        self._start: WatchStart | None = start
        self._end: WatchEnd | None = None
        self.exit: CommandExit | None = None
        self._steps: list[WatchStep] = []
        self._alarms: list[Alarm] = []

    @property
    def has_lines(self) -> bool:
        return bool(self._starts or self._commands or self._steps or self._end or self.exit)

    def is_with(self, other: _RankFile) -> bool:
        """Return whether the file of another rank is of the same training as this file, that of rank 0. Files
        of an earlier training may be left: those of ranks that this training does not have and, as long as
        rank 0 has not started, those that were started before the command."""
        if self._start is not None:
            return other._rank < self._start.world_size
        return self._command_s is None or other._start is None or other._start.time_s >= self._command_s

    def update(self) -> None:
        with open_regular(self._path) as file:
            left_bytes = file.seek(0, os.SEEK_END) - self._offset
            file.seek(self._offset)
            data = file.read(max(0, min(left_bytes, _MOST_BYTES)))
        whole_lines = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole_lines)
        for line in whole_lines.splitlines():
            if line.strip():
                self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            values = json.loads(line)
            self._add_values(values.pop("kind"), values)
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            AssertionError,
            ArithmeticError,
            RecursionError,
        ):
            self._unreadable += 1

    def _add_values(self, kind: str, values: dict[str, Any]) -> None:
        match kind:
            case "start":
                prediction = {name: Interval(**v) for name, v in values.pop("prediction").items()}
                self._begin(WatchStart(**_known_fields(WatchStart, values), prediction=prediction))
                self._starts += 1
            case "command":
                self._begin(None)
                self._commands += 1
                self._command_s = values.get("time_s")
            case "step":
                self._steps.append(WatchStep(**_known_fields(WatchStep, values)))
            case "values":
                self._complete(values)
            case "alarm":
                values["kind"] = values.pop("alarm")
                self._alarms.append(Alarm(**_known_fields(Alarm, values)))
            case "end":
                frames = tuple(StackFrame(**frame) for frame in values.pop("frames", ()))
                self._end = WatchEnd(**_known_fields(WatchEnd, values), frames=frames)
            case "exit":
                self.exit = CommandExit(**_known_fields(CommandExit, values))
            case _:
                raise ValueError(kind)

    def _complete(self, values: dict[str, Any]) -> None:
        """Add values that were read from the device after the line of their step had been written. They are
        dropped if their step is none of the last 1,000."""
        values = _known_fields(WatchStep, values)
        for i in range(len(self._steps) - 1, max(-1, len(self._steps) - 1001), -1):
            if self._steps[i].step == values["step"]:
                self._steps[i] = dataclasses.replace(self._steps[i], **values)
                return

    def record(self) -> RankRecord:
        return RankRecord(
            path=self._path,
            rank=self._start.rank if self._start else self._rank,
            start=self._start,
            steps=tuple(self._steps),
            alarms=tuple(self._alarms),
            end=self._end,
            earlier_starts=max(0, self._starts - 1),
            unreadable_lines=self._unreadable,
        )


_NUMBERS: Final = {"loss", "grad_norm", "value", "limit"}  # that may be "nan", "inf" or "-inf" in a file


def _known_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ``values`` that are fields of ``kind`` and need no further reading, those in `_NUMBERS`
    as floats. Others may come from a newer version."""
    names = {f.name for f in dataclasses.fields(kind)} - {"prediction", "frames"}
    return {
        name: float(v) if name in _NUMBERS and v is not None else v
        for name, v in values.items()
        if name in names
    }


# -- writing ----------------------------------------------------------------------------------------------


class LineFile:
    """A file to which lines are appended, by one call of the operating system for each write, so that a
    process can be killed at any time. The file and the folders above it are created. Raises OSError if that
    or writing fails."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._is_torn = False

    def write(self, kind: str, *rows: Mapping[str, Any]) -> None:
        """Append a line with ``kind``, such as "step", and its values for each of ``rows``, at least one.
        Values that are None are left out. Numbers that are not finite become text."""
        lines = []
        for row in rows:
            known = {name: v for name, v in row.items() if v is not None}
            texts = {n: str(v) for n, v in known.items() if isinstance(v, float) and not math.isfinite(v)}
            lines.append(json.dumps({"kind": kind, **known, **texts}) + "\n")
        text = "".join(lines).encode()
        data = b"\n" + text if self._is_torn else text
        self._is_torn = os.write(self._descriptor, data) < len(data)

    def write_alarms(self, alarms: Iterable[Alarm]) -> None:
        for alarm in alarms:
            values = dataclasses.asdict(alarm)
            self.write("alarm", {"alarm": values.pop("kind"), **values})

    def close(self) -> None:
        os.close(self._descriptor)
