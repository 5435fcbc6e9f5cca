"""Executors: tasks side by side as processes of this machine, and the interface that others implement."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from memfit.launch import executors
from memfit.launch.executors import make_executor, names, parse_executor
from memfit.launch.executors.base import CANCEL, OWNER, RECORD, USAGE, Executor, Task, TaskState, read_usage
from memfit.launch.executors.local import LocalExecutor
from memfit.launch.executors.on_node import run_task
from memfit.launch.executors.slurm import SlurmExecutor
from memfit.launch.executors.submitit_jobs import SubmititExecutor
from memfit.runtime import devices
from memfit.types.errors import UserError

WRITES = f"import sys; open(sys.argv[1] + '/{RECORD}', 'w').write('done')"
SLEEPS = "import sys, time; print('sleeping', flush=True); time.sleep(300)"
IS_KILLED = "import os; os.kill(os.getpid(), 9)"
FAILS = "import sys; print('{}', file=sys.stderr); sys.exit('memfit: no such job')"
START_S = 60.0  # on a loaded machine


def task(folder: Path, name: str, code: str) -> Task:
    own = folder / name
    own.mkdir()
    return Task(name=name, argv=(sys.executable, "-c", code, str(own)), folder=own, working_folder=folder)


@pytest.fixture
def owned(tmp_path: Path) -> Iterator[Path]:
    """A folder whose file OWNER this process keeps locked."""
    with (tmp_path / OWNER).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield tmp_path


def wait_for(executor: Executor, jobs: Mapping[str, Task], state: TaskState) -> None:
    until_s = time.monotonic() + START_S
    while any(executor.status(t, j).state is not state for j, t in jobs.items()):
        assert time.monotonic() < until_s
        time.sleep(0.1)


def test_tasks_run_side_by_side_and_their_records_and_ends_are_told(owned: Path) -> None:
    executor = make_executor("local", {"parallel": "3"}, owned / "own", device_count=1)
    tasks = [task(owned, n, c) for n, c in (("writes", WRITES), ("killed", IS_KILLED), ("fails", FAILS))]
    jobs = dict(zip(executor.submit(tasks), tasks, strict=True))
    wait_for(executor, jobs, TaskState.ENDED)
    reasons = {t.name: executor.status(t, j).reason for j, t in jobs.items()}
    assert reasons == {"writes": "", "killed": "killed by SIGKILL", "fails": "no such job"}
    assert [executor.fetch(t) for t in tasks] == ["done", None, None]
    for job_id, each in jobs.items():
        executor.forget(each, job_id)
    assert not [p for p in (owned / "own").rglob("*") if p.is_file()]


def test_a_cancelled_task_leaves_no_process(owned: Path) -> None:
    executor = make_executor("local", {}, owned / "own", device_count=1)
    sleeping = task(owned, "sleeps", SLEEPS)
    jobs = {executor.submit([sleeping])[0]: sleeping}
    wait_for(executor, jobs, TaskState.RUNNING)
    executor.cancel(jobs)
    (job_id,) = jobs
    status = executor.status(sleeping, job_id)
    assert (status.state, status.reason) == (TaskState.ENDED, "killed by SIGTERM")
    assert status.run_s > 0
    assert not _processes_with(str(sleeping.folder))


def test_a_task_ends_when_the_process_that_submitted_it_is_killed(tmp_path: Path) -> None:
    code = (
        "import fcntl, sys, time; from pathlib import Path\n"
        "from memfit.launch.executors import make_executor\n"
        "from memfit.launch.executors.base import Task\n"
        "folder = Path(sys.argv[1]); file = (folder / 'owner').open('w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "own = folder / 'task'; own.mkdir()\n"
        "argv = (sys.executable, '-c', 'import time; time.sleep(300)', str(own))\n"
        "task = Task(name='task', argv=argv, folder=own, working_folder=folder)\n"
        "make_executor('local', {}, folder / 'own', device_count=1).submit([task]); time.sleep(300)"
    )
    usage = tmp_path / "task" / USAGE
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) as submitter:
        until_s = time.monotonic() + START_S
        while not usage.exists():
            assert time.monotonic() < until_s
            time.sleep(0.1)
        submitter.kill()
    until_s = time.monotonic() + START_S
    while _processes_with(str(tmp_path)):
        assert time.monotonic() < until_s
        time.sleep(0.1)


def _processes_with(word: str) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline", "pid"])
        if process.pid != os.getpid() and any(word in part for part in process.info["cmdline"] or ())
    ]


def test_each_task_has_accelerators_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "accelerator_kind", lambda: "cuda")
    monkeypatch.setattr(devices, "accelerator_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    executor = LocalExecutor({}, tmp_path / "own", device_count=2)
    tasks = [task(tmp_path, name, WRITES) for name in "abc"]
    assert executor.slots == 2
    assert [executor.variables(each)["CUDA_VISIBLE_DEVICES"] for each in tasks[:2]] == ["4,5", "6,7"]
    executor.forget(tasks[0], "1")
    assert executor.variables(tasks[2]) == {"CUDA_VISIBLE_DEVICES": "4,5"}


# --- on the machine that runs a task


def test_the_time_of_every_start_of_a_requeued_task_counts(tmp_path: Path) -> None:
    each = task(tmp_path, "twice", "import time; time.sleep(0.2)")
    for _ in range(2):
        assert run_task(each.argv, str(each.folder), str(tmp_path)) == 0
    usage = read_usage(each.folder)
    assert len(usage.spans) == 2
    assert usage.run_s >= 0.4
    assert usage.exit_code == 0


def test_a_task_whose_cancel_file_exists_is_ended(tmp_path: Path) -> None:
    each = task(tmp_path, "cancelled", SLEEPS)
    (each.folder / CANCEL).touch()
    assert run_task(each.argv, str(each.folder), str(tmp_path)) == -signal.SIGTERM


# --- what users write


def test_an_executor_and_its_settings_are_one_text() -> None:
    assert parse_executor("local") == ("local", {})
    assert parse_executor("slurm:partition=a100,time=60") == ("slurm", {"partition": "a100", "time": "60"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lokal", "unknown executor 'lokal'; allowed: local, slurm; did you mean 'local'?"),
        ("local:parallel", "'parallel' is not KEY=VALUE"),
        ("local:parallel=1,parallel=2", "'parallel=2' is not KEY=VALUE"),
        ("local:parallel=0", "a whole number from 1 to 1024"),
        ("local:partition=a", "has no setting partition"),
        ("slurm:time=1h", "slurm:time=1h is no whole number; allowed: a whole number, in digits only"),
    ],
)
def test_a_wrong_executor_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_executor(text)
    assert message in str(error.value)


def test_settings_of_every_executor_are_not_passed_to_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    text = "slurm:partition=a100,time=90,mem=16G,gres=gpu:1,nodelist=n1,device=H100-SXM,usd_per_hour=1.5"
    name, settings = parse_executor(text)
    executor = make_executor(name, settings, tmp_path / "own", device_count=1)
    assert isinstance(executor, SlurmExecutor)
    assert executor.parameters() == {
        "name": "memfit",
        "stderr_to_stdout": True,
        "timeout_min": 60,
        "slurm_partition": "a100",
        "slurm_time": 90,
        "slurm_mem": "16G",
        "slurm_gres": "gpu:1",
        "slurm_nodelist": "n1",
    }


def test_slurm_itself_says_whether_a_trial_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is preempted and requeued leaves submitit's result, but will start again."""
    answer = tmp_path / "squeue.txt"
    for name, text in (("srun", ""), ("squeue", f"[ -e {answer} ] && cat {answer}\n")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("memfit.launch.executors.slurm._READ_EVERY_S", 0.0)
    executor, trial = make_executor("slurm", {}, tmp_path / "own", device_count=1), task(tmp_path, "a", "")
    states = []
    for text in (None, "7_0 RUNNING", "7_0 PENDING", None, "7_0 OUT_OF_MEMORY", "8 RUNNING"):
        answer.unlink(missing_ok=True)
        if text is not None:
            answer.write_text(f"{text}\n7_1 COMPLETED\n")
        states.append(executor.status(trial, "7_0"))
    assert [status.state for status in states] == [
        TaskState.WAITING,  # Slurm has not answered yet
        TaskState.RUNNING,
        TaskState.WAITING,
        TaskState.WAITING,  # it does not answer: as before
        TaskState.ENDED,
        TaskState.ENDED,  # it has forgotten the job
    ]
    assert "ran out of the memory of its job" in states[4].reason
    assert "ran out of the memory of its job" in states[5].reason


def test_settings_that_choose_a_device_are_part_of_what_a_trial_is() -> None:
    assert SlurmExecutor.kind_of({"time": "60", "partition": "a100"}) == "slurm:partition=a100"
    assert SlurmExecutor.kind_of({"time": "60"}) == "slurm"


def test_one_more_executor_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from memfit.launch.executors.base import Executor, TaskState, TaskStatus\n"
        "class MyExecutor(Executor):\n"
        "    keys = {'queue': 'queue of the tasks'}\n"
        "    def submit(self, tasks): return [t.name for t in tasks]\n"
        "    def status(self, task, job_id): return TaskStatus(state=TaskState.ENDED)\n"
        "    def cancel(self, jobs): pass\n"
        "EXECUTOR = MyExecutor\n"
    )
    monkeypatch.setattr(executors, "__path__", [*executors.__path__, str(tmp_path)])
    assert set(names()) == {"local", "mine", "slurm"}
    assert parse_executor("mine:queue=long") == ("mine", {"queue": "long"})
    each = task(tmp_path, "t", WRITES)
    assert make_executor("mine", {}, tmp_path, device_count=1).submit([each]) == ["t"]


def test_tasks_are_asked_to_end_if_a_later_one_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: object, tasks: object) -> None:
        raise OSError("no process is left")

    monkeypatch.setattr(SubmititExecutor, "start", start)
    executor = LocalExecutor({}, tmp_path / "own", device_count=1)
    tasks = [task(tmp_path, name, SLEEPS) for name in "ab"]
    with pytest.raises(UserError, match="could not submit the tasks: no process is left"):
        executor.submit(tasks)
    assert all((each.folder / CANCEL).exists() for each in tasks)
