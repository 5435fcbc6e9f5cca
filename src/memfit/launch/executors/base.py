"""The interface of executors. An executor runs tasks side by side: it submits them, says how they are,
cancels them, and fetches what they have written."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import enum
import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final

from memfit.types.errors import UserError

RECORD: Final = "record.json"  # what a task writes into its folder
OUTPUT: Final = "output.txt"  # what its command prints
USAGE: Final = "usage.json"  # when it ran, and its exit code
CANCEL: Final = "cancel"  # a file that asks it to end
OWNER: Final = (
    "owner"  # a file beside the folders of tasks that the process which submitted them keeps locked
)
SETTINGS: Final[Mapping[str, str]] = {
    "device": "the nodes' device in memfit's catalog, for predictions and its price, such as H100-SXM",
    "usd_per_hour": "price of one device for one hour, in USD; default: the catalog's for the device",
}
"""The settings that every executor has, KEY -> what it means."""
_MOST_REASON: Final = 300
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class TaskState(enum.StrEnum):
    """State of a task. WAITING: submitted and not started yet, or preempted and to be started again. RUNNING:
    its command runs. ENDED: for good, whether it succeeded or not."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One command. ``name``: no other task of the executor has it. ``argv``: the program and its arguments.
    It is run in ``working_folder`` and writes its result, one text, to record.json in ``folder``. This folder
    is the task's own, and the machine that runs the task can read and write it under the same path.
    ``device_count``: number of devices on which the task trains."""

    name: str
    argv: tuple[str, ...]
    folder: Path
    working_folder: Path
    device_count: int = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskStatus:
    """The state of a task. ``run_s``: seconds for which it has run, over all its starts, noted once a second.
    ``reason``: why it has ended without a record, as far as this is known; "" for any other task. ``starts``:
    how often it was started; more than 1 after a scheduler has preempted and requeued it."""

    state: TaskState
    run_s: float = 0.0
    reason: str = ""
    starts: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """When a task has run. ``spans``: (start, last sign of life) of each start, in seconds since 1970 on the
    clock of the machine that ran it. ``exit_code``: of its command; negative: minus the signal that ended it;
    None: unknown, as while it runs."""

    spans: tuple[tuple[float, float], ...] = ()
    exit_code: int | None = None

    @property
    def run_s(self) -> float:
        return sum(end - start for start, end in self.spans)


class Executor(abc.ABC):
    """Runs tasks. ``settings``: the user's, KEY -> VALUE, as `check` allows them. ``folder``: where it may
    keep files; the caller removes it when no task is left. ``device_count``: number of devices of each
    task."""

    keys: ClassVar[Mapping[str, str]] = {}
    """The settings that it has beside `SETTINGS`, KEY -> what it means, in one line."""
    device_keys: ClassVar[tuple[str, ...]] = ()
    """Those of them that decide on which kind of device a task runs."""
    survives: ClassVar[bool] = False
    """Whether its tasks go on if the process that submitted them dies."""
    poll_s: ClassVar[float] = 1.0
    """Seconds between two calls of `status`."""

    def __init__(self, settings: Mapping[str, str], folder: Path, *, device_count: int = 1) -> None:
        self.settings, self.folder, self.device_count = settings, folder, device_count

    @classmethod
    def check(cls, settings: Mapping[str, str]) -> None:
        """Raise UserError if ``settings`` (KEY -> VALUE) contain one that the executor does not have, or a
        value that it does not allow. Whether the catalog has the ``device`` is not checked here."""
        known = {**cls.keys, **SETTINGS}
        if unknown := sorted(settings.keys() - known.keys()):
            raise UserError(
                f"the executor {cls.name()} has no setting {', '.join(unknown)}",
                allowed=", ".join(f"{key} ({text})" for key, text in known.items()),
            )
        price = settings.get("usd_per_hour", "0")
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", price):
            raise UserError(
                f"usd_per_hour={price} is no price of one device for one hour",
                allowed="USD as a number such as 1.5, with at most six digits before and after the point",
            )

    @classmethod
    def name(cls) -> str:
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def kind_of(cls, settings: Mapping[str, str]) -> str:
        """Return the executor's name and those settings that decide on the kind of device (``device_keys``),
        such as "slurm:partition=a100". The same trial on another kind counts as another trial."""
        chosen = ",".join(f"{key}={settings[key]}" for key in cls.device_keys if key in settings)
        return f"{cls.name()}:{chosen}" if chosen else cls.name()

    @property
    def slots(self) -> int | None:
        """How many tasks may be submitted and not ended at a time; None: any number, because the scheduler
        queues them."""
        return None

    @abc.abstractmethod
    def submit(self, tasks: Sequence[Task]) -> Sequence[str]:
        """Submit the tasks and return a job ID for each, in their order. Raises UserError if the scheduler
        refuses them, or their processes cannot be started; then none runs."""

    @abc.abstractmethod
    def status(self, task: Task, job_id: str) -> TaskStatus:
        """Return the task's status. A status of ENDED means that none of its processes is left."""

    @abc.abstractmethod
    def cancel(self, jobs: Mapping[str, Task]) -> None:
        """End the tasks in ``jobs`` (job ID -> task). Return when none of their jobs and processes is left,
        or after an executor's time limit."""

    def fetch(self, task: Task) -> str | None:
        """Return the text that the task wrote to record.json; None if there is no such file. Raises OSError
        if it cannot be read."""
        try:
            return (task.folder / RECORD).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def forget(self, task: Task, job_id: str) -> None:  # noqa: B027
        """Remove what the executor keeps of a task that has ended. The task's own folder stays."""


def read_usage(folder: Path) -> Usage:
    """Return when a task has run, from usage.json, which the machine that runs it writes into the task's
    folder; an empty Usage if the task has not started, or the file cannot be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        usage = json.loads((folder / USAGE).read_text(encoding="utf-8"))
        return Usage(
            spans=tuple((float(start), float(end)) for start, end in usage["spans"]),
            exit_code=usage["exit_code"],
        )
    return Usage()


def last_output_line(task: Task) -> str:
    """Return the last line that the task's command printed (output.txt in its folder), cut to 300 characters,
    without a leading "memfit: ". Empty lines and lines with nothing but a brace are passed over. Return "" if
    there is no other line, or the file cannot be read."""
    try:
        text = (task.folder / OUTPUT).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip() not in ("", "}", "{")]
    return lines[-1].removeprefix("memfit: ")[:_MOST_REASON] if lines else ""


@contextlib.contextmanager
def ignoring_ctrl_c() -> Iterator[None]:
    """Inside this context, this process and those that it starts ignore Ctrl-C; the started ones go on
    ignoring it, so this process must end them. Outside the main thread, the context does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def deferring_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP that this process receives inside this context take effect at its end.
    Outside the main thread, the context does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in _ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda received_number, frame: received.append(received_number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for received_number in received:
            signal.raise_signal(received_number)
