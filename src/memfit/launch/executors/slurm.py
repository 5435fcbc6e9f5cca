"""Executor ``slurm``: tasks as jobs of a Slurm cluster, several at once as one array."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from memfit.launch.executors.base import Task
from memfit.launch.executors.submitit_jobs import SubmititExecutor

_NUMBERS: Final = ("time", "gpus_per_node", "cpus_per_task", "array_parallelism")
_CANCEL_S: Final = 60.0


class SlurmExecutor(SubmititExecutor):
    """Jobs of Slurm. They go on if the process that submitted them dies. The folder of the store must be on a
    file system that the nodes share."""

    cluster = "slurm"
    keys: ClassVar[Mapping[str, str]] = {
        "partition": "partition of the nodes",
        "constraint": "features of the nodes",
        "gres": "generic resources of each node, such as gpu:a100:1",
        "nodelist": "names of nodes",
        "account": "account that pays",
        "qos": "quality of service",
        "time": "minutes after which Slurm ends a trial",
        "mem": "memory of a trial, such as 16G",
        "cpus_per_task": "processor cores of a trial",
        "gpus_per_node": "GPUs of a trial",
        "array_parallelism": "number of trials at a time",
    }
    device_keys = ("partition", "constraint", "gres", "nodelist")
    survives = True
    poll_s = 2.0

    def parameters(self) -> dict[str, Any]:
        values = {f"slurm_{k}": int(v) if k in _NUMBERS else v for k, v in self.settings.items()}
        return {"name": "memfit", "stderr_to_stdout": True, **values}

    def cancel(self, jobs: Mapping[str, Task]) -> None:
        if not jobs:
            return
        subprocess.run(["scancel", *jobs], check=False, capture_output=True)
        until_s = time.monotonic() + _CANCEL_S
        while time.monotonic() < until_s and not all(self.has_ended(t, j) for j, t in jobs.items()):
            time.sleep(1.0)


EXECUTOR = SlurmExecutor
