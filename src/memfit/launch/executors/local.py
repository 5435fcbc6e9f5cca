"""Executor ``local``: tasks as processes of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from memfit.launch.executors.base import CANCEL, Task, ignoring_ctrl_c
from memfit.launch.executors.submitit_jobs import SubmititExecutor
from memfit.runtime import devices
from memfit.types.errors import UserError

_WEEK_MIN: Final = 7 * 24 * 60
_CANCEL_S: Final = 20.0
_TICK_S: Final = 0.1
_STARTING: Final = threading.Lock()


class LocalExecutor(SubmititExecutor):
    """Tasks as processes of this machine. They are ended when the process that submitted them ends, however
    it ends."""

    cluster = "local"
    keys: ClassVar[Mapping[str, str]] = {
        "parallel": "number of trials at a time; default: as many as there are GPUs for, without GPUs 1",
    }
    poll_s = 0.2

    def __init__(self, settings: Mapping[str, str], folder: Path, *, device_count: int = 1) -> None:
        super().__init__(settings, folder, device_count=device_count)
        self._shares = max(1, devices.accelerator_count() // device_count)
        self._share_of: dict[str, int] = {}

    @property
    def slots(self) -> int:
        return int(self.settings.get("parallel", self._shares))

    def variables(self, task: Task) -> Mapping[str, str]:
        """Give the task ``device_count`` accelerators, those that the fewest other tasks have, and return the
        environment variable, name -> value, under which it sees only these. It has them until `forget`. Tasks
        share accelerators if there are not enough for all that run. Empty without accelerators, and for a
        kind of accelerator of which memfit knows no such variable: then each task sees all."""
        users = list(self._share_of.values())
        share = min(range(self._shares), key=users.count)
        self._share_of[task.name] = share
        return devices.visible_accelerators(share * self.device_count, self.device_count)

    def forget(self, task: Task, job_id: str) -> None:
        super().forget(task, job_id)
        self._share_of.pop(task.name, None)

    @classmethod
    def check(cls, settings: Mapping[str, str]) -> None:
        super().check(settings)
        parallel = settings.get("parallel", "1")
        if not (parallel.isdecimal() and 1 <= int(parallel) <= 1024):
            raise UserError(
                f"--executor local:parallel={parallel} is no number of trials at a time",
                allowed="a whole number from 1 to 1024",
            )

    def parameters(self) -> dict[str, Any]:
        return {"timeout_min": _WEEK_MIN, "stderr_to_stdout": True}

    def start(self, tasks: Sequence[Task]) -> Sequence[Any]:
        from submitit.core.utils import environment_variables

        # The processes do not import from the user's folder, and leave Ctrl-C to this one. Both change this
        # whole process while they start, so two threads must not do it at once.
        try:
            with _STARTING, ignoring_ctrl_c(), environment_variables(PYTHONSAFEPATH="1"):
                return super().start(tasks)
        except OSError:
            self._request_end(tasks)  # of those that were started before one could not be
            raise

    def _request_end(self, tasks: Iterable[Task]) -> None:
        for task in tasks:
            (task.folder / CANCEL).touch()

    def cancel(self, jobs: Mapping[str, Task]) -> None:
        self._request_end(jobs.values())
        until_s = time.monotonic() + _CANCEL_S
        while time.monotonic() < until_s and not all(self.has_ended(t, j) for j, t in jobs.items()):
            time.sleep(_TICK_S)
        for job_id, task in jobs.items():
            if not self.has_ended(task, job_id):
                self.job(job_id)._process.kill()
                self.job(job_id)._process.wait()


EXECUTOR = LocalExecutor
