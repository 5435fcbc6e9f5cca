"""Run the command of one task on the machine to which an executor has submitted it, and note when it runs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from memfit.files.replace import write_whole
from memfit.launch.executors.base import CANCEL, OUTPUT, USAGE, read_usage
from memfit.runtime.child_process import child_environment, dying_with_parent
from memfit.types.errors import UserError

_TICK_S: Final = 0.2
_NOTE_EVERY_S: Final = 1.0
_GRACE_S: Final = 10.0  # from the request to end until the command is killed


def run_task(
    argv: Sequence[str],
    folder: str,
    working_folder: str,
    owner: str = "",
    variables: Mapping[str, str] | None = None,
) -> int:
    """Run ``argv`` in ``working_folder`` and return its exit code; negative: minus the signal that ended it;
    1 if there is no such program. What it prints is added to output.txt in ``folder``, which must exist;
    usage.json there says when it runs (`Usage`). ``variables``: environment variables, name -> value, that
    are added to those of this process for the command or replace them. To be called in the main thread.

    The command receives SIGTERM, and SIGKILL 10 s later, if this process receives SIGTERM, if there is a file
    called cancel in ``folder``, or if no process keeps the file ``owner`` locked any more ("": not checked).
    It is killed if this process dies. The processes that it leaves in its process group are killed."""
    task = _RunningTask(Path(folder), owner)
    with (Path(folder) / OUTPUT).open("ab") as output:
        process = subprocess.Popen(
            dying_with_parent(list(argv)),
            cwd=working_folder,
            env=child_environment(variables or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        before = signal.signal(signal.SIGTERM, task.receive)
        try:
            task.follow(process)
        finally:
            signal.signal(signal.SIGTERM, before)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            task.note(code)
    return code


class _RunningTask:
    def __init__(self, folder: Path, owner: str) -> None:
        self._folder, self._owner = folder, owner
        self._must_end = False
        now_s = time.time()
        # After the earlier starts of a task that a scheduler has requeued.
        self._spans = [*map(list, read_usage(folder).spans), [now_s, now_s]]
        self.note(None)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self._must_end = True

    def follow(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until the process ends, and end it if one of the conditions of `run_task` is met."""
        noted_s = kill_s = 0.0
        while process.poll() is None:
            now_s = time.monotonic()
            if now_s - noted_s >= _NOTE_EVERY_S:
                noted_s = now_s
                self.note(None)
                self._must_end |= (self._folder / CANCEL).exists() or self._is_orphan()
            if self._must_end and not kill_s:
                kill_s = now_s + _GRACE_S
                process.terminate()
            if kill_s and now_s >= kill_s:
                process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_TICK_S)

    def note(self, exit_code: int | None) -> None:
        """Write usage.json: the spans of all starts, the last one until now, and the exit code (None: it
        runs). Do nothing if it cannot be written."""
        self._spans[-1][1] = time.time()
        text = json.dumps({"spans": self._spans, "exit_code": exit_code})
        with contextlib.suppress(UserError):  # the folder is gone: nobody asks any more
            write_whole(self._folder / USAGE, text.encode(), durable=False)

    def _is_orphan(self) -> bool:
        """Return whether the process that submitted the task has died: the file ``owner`` is gone or no
        longer locked. Return False without ``owner``."""
        if not self._owner:
            return False
        try:
            with Path(self._owner).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return True
        except FileNotFoundError:
            return True
        except OSError:
            return False
