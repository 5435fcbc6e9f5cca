"""Run a command whose Python processes are watched."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from memfit.monitoring.record import CommandExit, LineFile
from memfit.monitoring.startup.sitecustomize import SETTINGS
from memfit.runtime.cgroup import oom_kills_here
from memfit.runtime.child_process import machine_oom_kills
from memfit.runtime.local_machine import HostMemoryLimit, host_memory_limit
from memfit.types.errors import UserError
from memfit.types.serialization import to_plain

_PERIOD_S: Final = 1.0  # after which the free memory is read again
_STARTUP: Final = Path(__file__).parent / "startup"


def run_watched(
    command: Sequence[str], file: Path, *, prediction: Mapping[str, Any], limits: Mapping[str, float]
) -> CommandExit:
    """Run a command, wait for its end, and return how it ended. Each of its Python processes that trains with
    torch appends what it measures to ``file`` or, for ranks other than 0, to a file beside it (`rank_path`);
    the end of the command is appended to ``file``, unless that cannot be written any more. Standard input and
    output are those of this process. If called in the main thread, this process ignores Ctrl-C, which reaches
    the command, and passes the signals SIGTERM and SIGHUP on to it. ``prediction`` and ``limits``: as for
    `memfit.watch`, as plain data. Raises UserError if the command cannot be started, or if the file cannot be
    written at the beginning."""
    settings = {
        "file": str(file.absolute()),
        "prediction": to_plain(prediction) or None,
        "limits": dict(limits),
    }
    paths = [str(_STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, SETTINGS: json.dumps(settings), "PYTHONPATH": os.pathsep.join(paths)}
    with contextlib.ExitStack() as stack:
        try:
            record = stack.enter_context(contextlib.closing(LineFile(file)))
            record.write("command", {"time_s": time.time()})
        except OSError as error:
            raise UserError(
                f"cannot write the record {file}: {error.strerror or error}",
                hint="choose another file with --file",
            ) from error
        return _run(command, env, record)


def _run(command: Sequence[str], env: Mapping[str, str], record: LineFile) -> CommandExit:
    """Run a command, and write its end to the record. Raises UserError if it cannot be started."""
    kills_before, on_machine_before = oom_kills_here(), machine_oom_kills()
    try:
        child = subprocess.Popen(list(command), env=env)
    except OSError as error:
        raise UserError(f"cannot run {command[0]!r}: {error.strerror or error}") from error
    memory: HostMemoryLimit | None = None
    with _signals_to(child):
        while (code := _wait(child)) is None:
            memory = host_memory_limit()
    kills = oom_kills_here()
    known = kills is not None and kills_before is not None
    end = CommandExit(
        time_s=time.time(),
        code=code,
        oom_kills=(kills or 0) - (kills_before or 0) if known else None,
        machine_oom_kills=machine_oom_kills() - on_machine_before,
        free_bytes=memory.free_bytes if memory is not None else None,
        total_bytes=memory.total_bytes if memory is not None else None,
    )
    with contextlib.suppress(OSError):  # the command's own exit code matters more
        record.write("exit", to_plain(end))
    return end


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    """Return the exit code of a command that ends within a second, None for one that lives on."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(_PERIOD_S)
    return None


@contextlib.contextmanager
def _signals_to(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Inside this context, ignore Ctrl-C, which the terminal sends to the child, too, and pass SIGTERM and
    SIGHUP on to the child. Do nothing in a thread other than the main one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None),
        **{
            number: signal.signal(number, lambda number, frame: child.send_signal(number))
            for number in (signal.SIGTERM, signal.SIGHUP)
        },
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
