"""Train a job that only this process has, in a forked copy of it, as the worker would."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from typing import NoReturn

from memfit.files.temporary import temporary_folder
from memfit.jobs.registry import add_job
from memfit.runtime.child_process import die_with_parent, parse_event
from memfit.runtime.oom import is_oom_error
from memfit.types import serialization
from memfit.types.device_kind import HOST
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.launch import RunSpec
from memfit.types.result import Measurement, OutcomeKind

# Of glibc's mallopt: blocks of at least 64 KiB are mapped separately, freed memory is returned at once, and
# all threads use one heap, as the environment of the worker has it.
_MALLOC_OPTIONS = ((-3, 65536), (-1, 0), (-8, 1))


def train_forked(spec: RunSpec, job: Job) -> Measurement:
    """Train ``job`` as ``spec`` says in a forked copy of this process, and return what was measured.
    ``spec.job`` is only a name. An error in the copy becomes the outcome of the measurement. Raises UserError
    if this system cannot fork, for a device other than the processor, and if the plan has several ranks."""
    if not hasattr(os, "fork") or spec.device != HOST or spec.plan.ranks > 1:
        raise UserError(
            "memfit.largest(measure=True) can train an object of this process only on Linux, on the "
            "processor (CPU) and with one rank",
            allowed="a function FILE.py:NAME that returns a memfit.Job, with "
            "`memfit plan FILE.py:NAME --largest SIZE --measure`",
        )
    parent = os.getpid()
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        os.close(reader)
        die_with_parent(parent)
        _train(spec, job, writer)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as output:
            events = [event for line in output if (event := parse_event(line)) is not None]
    except BaseException:  # an interrupt: the copy must not train on
        os.kill(process, signal.SIGKILL)
        raise
    finally:
        status = os.waitpid(process, 0)[1]
    results = [event for event in events if event["event"] == "result"]
    if results:
        return serialization.loads(Measurement, json.dumps(results[-1]["measurement"]), what="measurement")
    return Measurement(
        outcome=OutcomeKind.FAILED, reason=f"the process ended with status {status} without a result"
    )


def _train(spec: RunSpec, job: Job, writer: int) -> NoReturn:
    """Train in this process, write the result as an event to ``writer``, and end the process: nothing may
    return or raise into the program that was copied."""
    code = 1
    try:
        os.dup2(writer, 1)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        code = _run(spec, job)
        sys.stdout.flush()
    finally:
        os._exit(code)


def _run(spec: RunSpec, job: Job) -> int:
    from memfit.runtime.progress_events import tell
    from memfit.worker.train import main

    try:
        if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:  # glibc only
            for option, value in _MALLOC_OPTIONS:
                mallopt(option, value)
        add_job(spec.job.spec, job)
        with temporary_folder() as folder:
            path = folder / "spec.json"
            path.write_text(serialization.dumps(spec), encoding="utf-8")
            main(path)
    except BaseException as error:  # noqa: BLE001  the parent must hear of it, whatever it is
        text = traceback.format_exception_only(error)[-1].strip()
        outcome = OutcomeKind.OOM if is_oom_error(error) else OutcomeKind.FAILED
        tell("result", measurement=Measurement(outcome=outcome, reason=text))
        return 1
    return 0
