"""Executor ``slurm``: tasks as jobs of a Slurm cluster, several at once as one array."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from memfit.launch.executors.base import Task
from memfit.launch.executors.submitit_jobs import SubmititExecutor
from memfit.types.errors import UserError

_NUMBERS: Final = ("time", "gpus_per_node", "cpus_per_task", "array_parallelism")
_CANCEL_S: Final = 60.0
_TIME_MIN: Final = 60  # submitit's own default is 5
# States of squeue(1) in which a job has ended, and what they say. A requeued job is pending again.
_ENDS: Final[Mapping[str, str]] = {
    "BOOT_FAIL": "its node did not boot",
    "CANCELLED": "the job was cancelled",
    "COMPLETED": "",
    "DEADLINE": "Slurm ended it at its deadline",
    "FAILED": "",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "Slurm ended it: it ran out of the memory of its job (slurm:mem=SIZE)",
    "PREEMPTED": "it was preempted and not requeued",
    "REVOKED": "the job was revoked",
    "TIMEOUT": "Slurm ended it at its time limit (slurm:time=MINUTES)",
}
_READ_EVERY_S: Final = 1.0
_RUNS: Final = ("RUNNING", "COMPLETING", "STOPPED", "SUSPENDED")


class SlurmExecutor(SubmititExecutor):
    """Tasks as jobs of Slurm. They go on if the process that submitted them dies. The folders of the tasks,
    and this executor's, must be on a file system that the nodes share."""

    cluster = "slurm"
    keys: ClassVar[Mapping[str, str]] = {
        "partition": "partition of the nodes",
        "constraint": "features of the nodes",
        "gres": "generic resources of each node, such as gpu:a100:1",
        "nodelist": "names of nodes",
        "account": "account that pays",
        "qos": "quality of service",
        "time": f"minutes after which Slurm ends a trial, {_TIME_MIN} by default",
        "mem": "memory of a trial, such as 16G",
        "cpus_per_task": "processor cores of a trial",
        "gpus_per_node": "GPUs of a trial",
        "array_parallelism": "number of trials at a time",
    }
    device_keys = ("partition", "constraint", "gres", "nodelist")
    survives = True
    poll_s = 2.0

    def __init__(self, settings: Mapping[str, str], folder: Path, *, device_count: int = 1) -> None:
        super().__init__(settings, folder, device_count=device_count)
        self._states: Mapping[str, str] = {}  # as squeue said last, job ID -> state
        self._seen: dict[str, str] = {}  # last state of each job that it said
        self._read_s = -_READ_EVERY_S

    @classmethod
    def check(cls, settings: Mapping[str, str]) -> None:
        super().check(settings)
        for key in _NUMBERS:
            if not settings.get(key, "1").isdecimal():
                raise UserError(
                    f"--executor slurm:{key}={settings[key]} is no whole number",
                    allowed="a whole number, in digits only; slurm:time is in minutes",
                )

    def parameters(self) -> dict[str, Any]:
        # Not those of every executor (`SETTINGS`), which are memfit's own.
        settings = {k: v for k, v in self.settings.items() if k in self.keys}
        values = {f"slurm_{k}": int(v) if k in _NUMBERS else v for k, v in settings.items()}
        return {"name": "memfit", "stderr_to_stdout": True, "timeout_min": _TIME_MIN, **values}

    def submit(self, tasks: Sequence[Task]) -> Sequence[str]:
        job_ids = super().submit(tasks)
        self._read_s = -_READ_EVERY_S  # what squeue said before does not have them
        return job_ids

    def has_ended(self, task: Task, job_id: str) -> bool:
        """Return whether squeue says that the job has ended, or does not list it any more, as some minutes
        after its end. submitit is not asked: it takes a job for ended that is preempted and will start again,
        and needs Slurm's accounting database."""
        return self._state(job_id) in ("", *_ENDS)

    def is_running(self, task: Task, job_id: str) -> bool:
        return self._state(job_id) in _RUNS

    def reason(self, task: Task, job_id: str) -> str:
        end_text = _ENDS.get(self._seen.get(job_id, ""), "")
        return end_text or super().reason(task, job_id)

    def _state(self, job_id: str) -> str:
        """Return squeue's word for the state of a job, such as "RUNNING"; "" if squeue does not list the job.
        squeue is asked at most once a second. If it fails, its last answer counts; "UNKNOWN" if it has given
        none since the last `submit`."""
        if time.monotonic() - self._read_s >= _READ_EVERY_S:
            command = ["squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i %T"]
            answer = subprocess.run(command, check=False, capture_output=True, text=True)
            if answer.returncode == 0:
                self._states = dict(line.split(maxsplit=1) for line in answer.stdout.splitlines())
                self._seen |= self._states
                self._read_s = time.monotonic()
            elif not self._read_s > 0:
                return "UNKNOWN"
        return self._states.get(job_id, "")

    def cancel(self, jobs: Mapping[str, Task]) -> None:
        if not jobs:
            return
        subprocess.run(["scancel", *jobs], check=False, capture_output=True)
        until_s = time.monotonic() + _CANCEL_S
        while time.monotonic() < until_s and not all(self.has_ended(t, j) for j, t in jobs.items()):
            time.sleep(1.0)


EXECUTOR = SlurmExecutor
