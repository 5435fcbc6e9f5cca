"""What the executors on submitit share: submit a Python function as a job, and remove the job's files."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from memfit.launch.executors.base import (
    OWNER,
    Executor,
    Task,
    TaskState,
    TaskStatus,
    last_output_line,
    read_usage,
)
from memfit.launch.executors.on_node import run_task
from memfit.runtime.child_process import exit_text
from memfit.types.errors import UserError


class SubmititExecutor(Executor):
    """Tasks as jobs of one of submitit's clusters, ``cluster``: "local" or "slurm". Constructing it raises
    UserError if submitit is not installed or cannot use the cluster here."""

    cluster: ClassVar[str]

    def __init__(self, settings: Mapping[str, str], folder: Path, *, device_count: int = 1) -> None:
        super().__init__(settings, folder, device_count=device_count)
        try:
            import submitit
        except ImportError as error:
            raise UserError(
                f"the executor {self.name()} needs submitit, which is not installed",
                hint="install it: pip install 'memfit[cluster]'",
            ) from error
        logging.getLogger("submitit").setLevel(logging.ERROR)
        try:
            self._executor = submitit.AutoExecutor(folder / "jobs" / "%j", cluster=self.cluster)
            self._executor.update_parameters(**self.parameters())
        except (RuntimeError, ValueError, TypeError, NameError) as error:
            raise UserError(f"the executor {self.name()} cannot be used: {error}") from error
        self._jobs: dict[str, Any] = {}

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of submitit's executor that follow from the settings, name -> value."""
        return {}

    def submit(self, tasks: Sequence[Task]) -> Sequence[str]:
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            jobs = self.start(tasks)
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            last_line = lines[-1] if lines else "no reason is known"
            raise UserError(f"the executor {self.name()} could not submit the tasks: {last_line}") from error
        self._jobs |= {job.job_id: job for job in jobs}
        return [job.job_id for job in jobs]

    def start(self, tasks: Sequence[Task]) -> Sequence[Any]:
        """Submit the tasks and return submitit's jobs, in their order. Raises OSError, and submitit's
        FailedJobError and FailedSubmissionError."""
        with self._executor.batch():
            return [self._executor.submit(run_task, *self.arguments(task)) for task in tasks]

    def arguments(self, task: Task) -> tuple[Any, ...]:
        """Return the arguments of `run_task` for the task. It ends with the process that submits it, which
        keeps the file ``owner`` beside the tasks' folders locked, unless the executor ``survives``."""
        owner = "" if self.survives else str(task.folder.parent / OWNER)
        places = (str(task.folder), str(task.working_folder))
        return list(task.argv), *places, owner, self.variables(task)

    def variables(self, task: Task) -> Mapping[str, str]:
        """Return further environment variables for the task's command, name -> value; none by default."""
        return {}

    def job(self, job_id: str) -> Any:
        """Return submitit's object for the job; a new one, from the job's files, if another process has
        submitted it."""
        if job_id not in self._jobs:
            self._jobs[job_id] = self._executor._executor.job_class(self.folder / "jobs" / "%j", job_id)
        return self._jobs[job_id]

    def status(self, task: Task, job_id: str) -> TaskStatus:
        state, reason = TaskState.ENDED, ""
        if not self.has_ended(task, job_id):
            state = TaskState.RUNNING if self.is_running(task, job_id) else TaskState.WAITING
        elif self.fetch(task) is None:
            reason = self.reason(task, job_id)
        usage = read_usage(task.folder)
        return TaskStatus(state=state, run_s=usage.run_s, starts=len(usage.spans), reason=reason)

    def has_ended(self, task: Task, job_id: str) -> bool:
        """Return whether the job has ended and none of its processes is left."""
        return bool(self.job(job_id).done())

    def is_running(self, task: Task, job_id: str) -> bool:
        """Return whether the command of a job that has not ended has been started."""
        return bool(read_usage(task.folder).spans)

    def reason(self, task: Task, job_id: str) -> str:
        """Return in words why the task has ended without a record: the signal that ended it, else the last
        line that it printed, else its exit code. If none is noted, the process that ran it was killed or
        never started."""
        code = read_usage(task.folder).exit_code
        if code is None:
            return "the process that ran it was killed, or never started"
        return (last_output_line(task) if code >= 0 else "") or exit_text(code)

    def forget(self, task: Task, job_id: str) -> None:
        self._jobs.pop(job_id, None)
        shutil.rmtree(self.folder / "jobs" / job_id, ignore_errors=True)
