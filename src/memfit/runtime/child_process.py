"""Run one child process: start it with its files, read its output line by line, and kill it when this process
stops waiting for it or ends (on Linux, also if this process is killed).

The child writes one JSON object per line to standard output::

    {"event": "step", "by": "memfit", "step": 3}       any event is passed on as it arrives
    {"event": "result", "by": "memfit", "measurement": {...}}    the last one is the run's Measurement

All other lines are ignored, such as what the job itself logs as JSON. Standard error is kept in a file, whose
end gives the reason if the child dies without a result.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Final, cast

from memfit.files.temporary import temporary_folder
from memfit.runtime.cgroup import Group, oom_kills_here
from memfit.runtime.heartbeat import HEARTBEAT
from memfit.runtime.oom import is_oom_text
from memfit.runtime.progress_events import SENDER
from memfit.types import serialization
from memfit.types.errors import UserError
from memfit.types.launch import LaunchConfig
from memfit.types.result import Measurement, OutcomeKind
from memfit.types.units import format_bytes

Event = Mapping[str, object]
STOPPED: Final = "stopped because another rank failed"
_EVENT: Final = re.compile(rb'\{"event": *"[^"]*", *"by": *"%b"' % SENDER.encode())


class Child:
    """A child process as other threads see it, from before its start until after its end. They can send it
    signals and stop it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid: int | None = None
        self._stopped = threading.Event()
        self.stop_reason = ""
        self.folder: Path | None = None
        """The temporary folder with the child's files, while it exists."""

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    @property
    def pid(self) -> int | None:
        """Number of the process; None before it starts and after it has ended."""
        return self._pid

    def stop(self, reason: str = STOPPED) -> None:
        """Have the child killed by the thread that runs it (`run`), soon after this call. ``reason``: why, in
        words; of several calls the first counts."""
        with self._lock:
            self.stop_reason = self.stop_reason or reason
        self._stopped.set()

    def send(self, number: int) -> None:
        """Send the signal ``number`` to the child's process. Do nothing unless it runs."""
        with self._lock:
            if self._pid is not None:
                os.kill(self._pid, number)

    def begin(self, folder: Path, pid: int) -> None:
        with self._lock:
            self.folder, self._pid = folder, pid

    def end(self) -> None:
        """Forget the process and its folder, so that nothing is sent to it any more. To be called before the
        process is reaped: its number may be reused afterwards."""
        with self._lock:
            self.folder = self._pid = None


CHILD_ENV: Final[Mapping[str, str]] = {
    # glibc maps blocks of at least 64 KiB separately and unmaps them when they are freed, and uses one heap
    # for all threads. The kernel's count then matches what tensors hold.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
    # Threads that spin at a barrier make a step 5-10x slower when another process needs the core.
    "OMP_WAIT_POLICY": "passive",
    "KINETO_LOG_LEVEL": "5",  # hides the profiler's messages, which would bury the reason on standard error
}
_FROM_OUTSIDE: Final = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_STDERR_KEPT_BYTES: Final = 4096
_TICK_S: Final = 0.2
_OOM_KILLS_S: Final = 2.0  # between readings of kills; one that is older than two readings is not the child's
_ASK: Final = """
import os, signal, sys
parent, argv = int(sys.argv[1]), sys.argv[2:]
def check_parent():
    if os.getppid() != parent:
        sys.exit("the parent process has died")
try:
    if sys.platform == "linux":
        import ctypes
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: holds across exec
        check_parent()
        os.execvp(argv[0], argv)
    import subprocess
    check_parent()
    with subprocess.Popen(argv) as child:
        while True:
            try:
                code = child.wait(0.2)
                break
            except subprocess.TimeoutExpired:
                if os.getppid() != parent:
                    child.kill()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    sys.exit(code)
except OSError as error:
    sys.exit(f"cannot start {argv[0]}: {error.strerror}")
"""
_PR_SET_PDEATHSIG: Final = 1  # of Linux's prctl
_VMSTAT: Final = Path("/proc/vmstat")


def run(
    config: LaunchConfig, *, on_event: Callable[[Event], None], child: Child | None = None
) -> Measurement:
    """Run the child process of `config` to its end and return its measurement. ``{dir}`` in argv is replaced
    by a temporary folder that contains `config.files`. ``on_event`` is called with every event when it
    arrives, the result included.

    The child is killed at the time limit of the spec, and soon after another thread stops it through
    ``child``. What goes wrong in the child is not raised: it is the outcome of the measurement (failed,
    timeout or oom). An interruption of this process (Ctrl-C, an error in `on_event`) is raised after the
    child and its process group have been killed. Raises OSError if the files cannot be written or no process
    can be started."""
    with start(config, child=child) as running:
        for event in running.events():
            on_event(event)
    return running.measurement()


@contextlib.contextmanager
def start(
    config: LaunchConfig, *, child: Child | None = None, takes_input: bool = False
) -> Iterator[RunningChild]:
    """Start the child process of `config`, with its files as `run` says, and kill it and its process group at
    the end of the context. ``takes_input``: the child reads what `RunningChild.write_line` writes from
    standard input. Raises OSError if the files cannot be written or no process can be started."""
    with temporary_folder() as folder, tempfile.TemporaryFile() as errors:
        for name, text in config.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / HEARTBEAT).touch()
        running = RunningChild(config, folder, errors, child or Child(), takes_input)
        try:
            yield running
        finally:
            running.end()


class RunningChild:
    """Starts a child process when it is constructed (see `start`), and keeps what the child reports. Iterate
    over `events`; `measurement` may be called after the end."""

    def __init__(
        self, config: LaunchConfig, folder: Path, errors: IO[bytes], child: Child, takes_input: bool
    ) -> None:
        self._spec, self._errors, self._child = config.spec, errors, child
        self._started_s = time.monotonic()
        self._oom_kills = deque([_OomKills.now()], maxlen=2)
        self._group_kills = self._steps = self._first_step = 0
        self._timed_out = False
        self._losses = array("d")
        self._result: object = None
        self._last_error_lines: list[str] = []
        self._process = subprocess.Popen(
            dying_with_parent([part.replace("{dir}", str(folder)) for part in config.argv]),
            env=child_environment({**CHILD_ENV, **config.env}),
            stdin=subprocess.PIPE if takes_input else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # a process group of its own, killed as a whole
        )
        child.begin(Path(folder), self._process.pid)

    def write_line(self, line: str) -> None:
        """Write a line to the child's standard input and let its time limit count from now. Raises OSError if
        the child has ended."""
        assert self._process.stdin is not None
        self._started_s = time.monotonic()
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def end_input(self) -> None:
        """Close the child's standard input."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def events(self) -> Iterator[Event]:
        """Yield every event of the child when it arrives, until the child exits, its time is over or the run
        is stopped."""
        for line in self._lines():
            event = parse_event(line)
            if event is not None:
                self._note(event)
                yield event
        pause_s = 0.01  # most children exit soon after they have closed their output
        while not self._has_exited() and self._left_s() > 0:
            time.sleep(min(pause_s, self._left_s()))
            pause_s = min(_TICK_S, 2 * pause_s)
        self._timed_out = not self._has_exited()

    def _note(self, event: Event) -> None:
        loss = event.get("loss")
        if event["event"] == "result":
            self._result = event.get("measurement")
        elif event["event"] == "resumed" and isinstance(event.get("step"), int):
            self._first_step = int(str(event["step"]))
        elif event["event"] == "step":
            self._steps += 1
            self._losses.extend([float(loss)] if isinstance(loss, int | float) else [])

    def _lines(self) -> Iterator[bytes]:
        """Yield the lines of the child's output, without their ends, until it closes its output, exits or
        runs out of time, or the run is stopped. The last one may be empty or cut off."""
        parts: list[bytes] = []
        for chunk in self._chunks():
            first, *lines = chunk.split(b"\n")
            parts.append(first)
            for line in lines:
                yield b"".join(parts)
                parts = [line]
        yield b"".join(parts)

    def _chunks(self) -> Iterator[bytes]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while self._left_s() > 0:
                if time.monotonic() - self._oom_kills[-1].at_s > _OOM_KILLS_S:
                    self._oom_kills.append(_OomKills.now())
                # Checked before reading, so that all its output is then in the pipe.
                has_exited = self._has_exited()
                if selector.select(0 if has_exited else min(_TICK_S, self._left_s())):
                    chunk = os.read(descriptor, 1 << 16)
                    if not chunk:
                        return
                    yield chunk
                elif has_exited:
                    return  # a grandchild holds the pipe open

    def _has_exited(self) -> bool:
        """Return whether the child has exited, without reaping it. Until it is reaped, its process group's
        number is not reused."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, flags) is not None

    def _left_s(self) -> float:
        """Return the seconds until the child's time limit: 0 after it or once the run is stopped, infinite if
        there is no limit."""
        limit_s = math.inf if self._spec.timeout_s is None else self._spec.timeout_s
        return 0.0 if self._child.stopped else max(0.0, self._started_s + limit_s - time.monotonic())

    def end(self) -> None:
        """Kill the child's process group and wait for the child. If the child may have made a control group
        (`Group.of`), read how many of its processes the kernel has killed because memory ran out, and remove
        it."""
        self._child.end()
        # macOS forbids signals to a group of zombies.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what the child did not read
                    pipe.close()
        self._last_error_lines = self._error_lines()
        group = Group.of(self._process.pid)
        if group is not None:
            self._group_kills = group.oom_kills()
            group.remove()

    def measurement(self) -> Measurement:
        """Return the measurement that the child reported, of several the last. If it cannot be parsed, return
        a failed one with the reason. If there is none, return one with the outcome and reason of `_ending`.
        These two, and one that reports only an error, have the reported steps and losses and the time."""
        if self._result is not None:
            try:
                result = serialization.loads(Measurement, json.dumps(self._result), what="the child's result")
            except UserError as error:
                return self._without_result(OutcomeKind.FAILED, str(error))
            is_error = result.outcome is OutcomeKind.FAILED and result.peak_bytes is None
            return self._without_result(result.outcome, result.reason) if is_error else result
        return self._without_result(*self._ending())

    def _without_result(self, outcome: OutcomeKind, reason: str) -> Measurement:
        return Measurement(
            outcome=outcome,
            reason=reason,
            steps_done=self._steps,
            first_step=self._first_step,
            losses=tuple(self._losses),
            wall_s=time.monotonic() - self._started_s,
        )

    def _ending(self) -> tuple[OutcomeKind, str]:
        """Return (outcome, reason) of an end without a result, by the first of these that applies: FAILED if
        another thread stopped it; TIMEOUT after the time limit; OOM if memory ran out; else FAILED.

        SIGKILL alone does not prove an out-of-memory kill: the kernel must have counted one (`_oom_kill`).
        Any exit code but 0 counts as out of memory if the end of standard error says so."""
        code, lines = self._process.returncode, self._last_error_lines
        if self._timed_out and self._child.stopped:
            return OutcomeKind.FAILED, self._child.stop_reason
        if self._timed_out:
            return OutcomeKind.TIMEOUT, f"stopped at its time limit of {self._spec.timeout_s:g} s"
        if code == -signal.SIGKILL and (oom_kill := self._oom_kill()):
            return OutcomeKind.OOM, oom_kill
        oom_lines = [line for line in lines if is_oom_text(line)]
        if code and oom_lines:
            return OutcomeKind.OOM, oom_lines[-1]
        ending = "ended without a result" if code == 0 else exit_text(code)
        if not lines or -code in _FROM_OUTSIDE:  # what it wrote before has nothing to do with its death
            return OutcomeKind.FAILED, ending
        return OutcomeKind.FAILED, f"{ending}: {lines[-1]}"

    def _oom_kill(self) -> str:
        """Return a text that says that the kernel killed the child, which has died of SIGKILL, because memory
        ran out; "" if the kernel did not.

        What decides is the kernel's count of such kills: that of the child's own control group if it is above
        0; else whether that of this process's group, where the child was then, rose in the last 2 to 5
        seconds, if the kernel keeps one; else whether that of the whole machine did, for which the text says
        "probably". A kill before that was of another process."""
        if self._group_kills:
            return f"killed by the kernel at its cap of {format_bytes(self._spec.cap_bytes or 0)}"
        before, now = self._oom_kills[0], _OomKills.now()
        if before.here is not None and now.here is not None:
            is_killed = now.here > before.here
            return "killed by the kernel: its group or the machine ran out of memory" if is_killed else ""
        if now.on_machine > before.on_machine:
            return "killed by SIGKILL, probably by the kernel: the machine ran out of memory then"
        return ""

    def _error_lines(self) -> list[str]:
        """Return the lines of the last 4 KiB that the child wrote to standard error, without empty ones. The
        first may be cut off."""
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - _STDERR_KEPT_BYTES))
        text = self._errors.read().decode("utf-8", "replace")
        return [line.strip() for line in text.splitlines() if line.strip()]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _OomKills:
    """How many processes the kernel had killed at ``at_s`` because memory ran out: in the control group of
    this process (None: it does not count them), and on this machine."""

    at_s: float
    here: int | None
    on_machine: int

    @classmethod
    def now(cls) -> _OomKills:
        return cls(at_s=time.monotonic(), here=oom_kills_here(), on_machine=machine_oom_kills())


def parse_event(line: bytes) -> Event | None:
    """Return the event that a line of a child's output contains, without its sender; None for all other
    output, and for a line that is cut off."""
    begin = _EVENT.search(line)  # after what the job has printed without the end of a line, such as dots
    if begin is None:
        return None
    try:
        event = json.loads(line[begin.start() :])
    except (ValueError, RecursionError):
        return None  # a line that was cut off
    del event["by"]
    return cast(Event, event)


def exit_text(code: int) -> str:
    """Return the exit code of a process in words, such as "exit code 1", or "killed by SIGTERM" for -15."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def machine_oom_kills() -> int:
    """Return how many processes of this machine the kernel has killed because memory ran out, since it
    booted; 0 if this is not known."""
    with contextlib.suppress(OSError):
        for line in _VMSTAT.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def child_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of this process together with ``variables``, which take precedence.
    Empty entries of PYTHONPATH, as a colon at its end makes them, are left out: they stand for the current
    folder, from which a child must not import unless the user names it."""
    environment = {**os.environ, **variables}
    if folders := [p for p in environment.pop("PYTHONPATH", "").split(os.pathsep) if p]:
        environment["PYTHONPATH"] = os.pathsep.join(folders)
    return environment


def die_with_parent(parent: int) -> None:
    """To be called in a forked copy of the process with the number ``parent``. On Linux, let the kernel kill
    this copy as soon as the thread that forked it ends. On every system, end it at once, with exit code 1, if
    ``parent`` has died already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


def dying_with_parent(argv: Sequence[str]) -> list[str]:
    """Return a command that runs `argv` in such a way that it is killed when this process dies, however it
    dies. On Linux it is killed already when the thread that has started it ends. If this process has died
    before it starts, `argv` is not run. If there is no such program, the command ends with exit code 1 and a
    line on standard error.

    The command is a small Python program, because running Python code between fork and exec is unsafe with
    threads. On Linux it asks the kernel for this and replaces itself with `argv`. Elsewhere it starts `argv`,
    looks five times a second whether this process lives, and ends as `argv` ended."""
    return [sys.executable, "-I", "-S", "-c", _ASK, str(os.getpid()), *argv]
