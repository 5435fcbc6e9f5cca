"""`Popen` for programs that need torch: they are forked from a process that has imported it and memfit.

Importing these takes a program longer than what most tests do in it. What happens when a program starts, and
what memory a process takes by itself, is tested with processes that are started anew.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import IO, Any, NoReturn

_IMPORTED = (
    "memfit.api",
    "memfit.capture.child",
    "memfit.cli.app",
    "memfit.runtime.gloo",
    "memfit.worker.calibrate",
    "memfit.worker.checkpoint",
    "memfit.worker.degraded_training",
    "memfit.worker.train",
    "torch._dynamo",  # by every optimizer of torch
    "torch._inductor.compile_fx",  # by DeepSpeed
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("esm", "llama", "mixtral")),
    "hypothesis",
    "annotated_types",
    "pydantic.dataclasses",
    "pydantic.fields",
    "pydantic.json_schema",
    "pydantic.type_adapter",
    "pytest",
)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of Linux's prctl
_MALLOPT = {"MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_ARENA_MAX": -8}  # of glibc
_MOST_BYTES = 1 << 18
_END = b"end"
_LOCK = threading.Lock()
_SERVERS: list[socket.socket] = []  # at most one
_FIRST_VARIABLES = dict(os.environ)  # without those that a test sets
# In the variables of a forked process: the programs that memfit's processes there fork, too, and the script
# by which they start.
_PROGRAMS, _BY = "FORKED_PROGRAMS", "FORKED_BY"


class Popen:
    """``python *argv`` in a session of its own, which reads nothing unless ``stdin`` is a pipe, with what the
    tests need of `subprocess.Popen`. It is a child of this process, and killed when this process dies."""

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        stdin: int | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        **_: Any,
    ) -> None:
        self.returncode: int | None = None
        reader, writer = os.pipe() if stdout == subprocess.PIPE else (None, None)
        self.stdout = None if reader is None else os.fdopen(reader, "rb", buffering=0)
        asked = {
            "argv": [str(word) for word in argv],
            "env": dict(os.environ if env is None else env),
            "folder": str(Path.cwd()),
            "parent": os.getpid(),
        }
        self.stdin = None
        with Path(os.devnull).open("r+b", buffering=0) as nothing:
            source = nothing.fileno()
            if stdin == subprocess.PIPE:
                source, target = os.pipe()
                self.stdin = os.fdopen(target, "wb")
            files = [1 if stdout is None else writer or stdout, 2 if stderr is None else stderr]
            files = [nothing if file == subprocess.DEVNULL else file for file in files]
            descriptors = [file if isinstance(file, int) else file.fileno() for file in files]
            self.pid = _forked(json.dumps(asked).encode(), [source, *descriptors])
            if self.stdin is not None:
                os.close(source)
        if writer is not None:
            os.close(writer)

    def wait(self, timeout: float | None = None) -> int:
        end_s = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end_s is not None and time.monotonic() > end_s:
                raise subprocess.TimeoutExpired("a forked program", timeout or 0.0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def variables(*programs: str, by: str | Path = "") -> dict[str, str]:
    """Return the variables by which memfit in a forked process forks these programs, as in `processes`."""
    return {_PROGRAMS: "\n".join(programs), _BY: str(by)}


def processes(*programs: str, by: str | Path = "") -> SimpleNamespace:
    """Return a stand-in for the module `subprocess` in a module of memfit. Its `Popen` and `run` fork the
    programs of ``python -m PROGRAM`` that begin with one of these words, with the word ``.py`` also
    ``python SCRIPT.py``, and start others anew. ``by``: a script that is run in place of such a program, with
    its words as arguments."""

    def forked_argv(argv: Sequence[str]) -> list[str | Path]:
        if sys.platform != "linux":
            return []
        if ".py" in programs and argv[0] == sys.executable and argv[1].endswith(".py"):
            return [*([by] if by else []), *argv[1:]]
        if "-m" not in argv:
            return []
        options, program = argv[: argv.index("-m")], argv[argv.index("-m") + 1 :]
        python = [word for word in options if not word.startswith("-")][-1:]  # others have another torch
        known = any(" ".join(program).startswith(words) for words in programs)
        return [*([by] if by else []), "-m", *program] if known and python == [sys.executable] else []

    def popen(argv: Sequence[str], **options: Any) -> Popen | subprocess.Popen[bytes]:
        forked = forked_argv(argv)
        return Popen(forked, **options) if forked else subprocess.Popen(argv, **options)

    def run(argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        """What it prints is captured, as text."""
        if not (forked := forked_argv(argv)):
            return subprocess.run(argv, **options)  # noqa: PLW1510
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            child = Popen(forked, env=options.get("env"), stdout=output, stderr=errors)
            try:
                code = child.wait(options.get("timeout"))
            finally:
                child.kill()
            for file in (output, errors):
                file.seek(0)
            return subprocess.CompletedProcess(argv, code, output.read(), errors.read())

    return SimpleNamespace(**vars(subprocess) | {"Popen": popen, "run": run})


def _forked(asked: bytes, files: Sequence[int]) -> int:
    """Have a process forked, with these files as its standard input, output and error. Return its number."""
    libc = ctypes.CDLL(None)
    with _LOCK:
        # Its grandparent's child becomes one of this process when the one between them ends.
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        try:
            connection = _server()
            socket.send_fds(connection, [asked], files)
            return int(connection.recv(32))
        finally:
            libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _pair() -> tuple[socket.socket, socket.socket]:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _MOST_BYTES)
    return here, there


def _server() -> socket.socket:
    """Return the connection to the process that others are forked from, which ends when this one does."""
    if _SERVERS:
        return _SERVERS[0]
    here, there = _pair()
    with there:
        command = [sys.executable, "-P", __file__, str(there.fileno())]
        server = subprocess.Popen(
            command, env=_FIRST_VARIABLES, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL
        )
    atexit.register(server.wait)
    atexit.register(here.send, _END)  # a forked process may hold the connection open
    _SERVERS.append(here)
    return here


def _serve(connection: socket.socket) -> NoReturn:
    while True:
        asked, files, _, _ = socket.recv_fds(connection, _MOST_BYTES, 3)
        if asked in (b"", _END):
            os._exit(0)
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            if os.fork():
                os._exit(0)
            os.setsid()
            os.write(writer, str(os.getpid()).encode())
            for descriptor in (connection.fileno(), reader, writer):
                os.close(descriptor)
            _run(files, **json.loads(asked))
        os.waitpid(between, 0)
        connection.send(os.read(reader, 32))
        for descriptor in (reader, writer, *files):
            os.close(descriptor)


def _fork_server(files: Sequence[int]) -> None:
    """Fork the process that this one's own are forked from, before anything has run here."""
    here, there = _pair()
    if os.fork() == 0:
        here.close()
        for descriptor in files:
            os.close(descriptor)
        _serve(there)
    there.close()
    _SERVERS.append(here)


def _run(files: Sequence[int], argv: list[str], env: dict[str, str], folder: str, parent: int) -> NoReturn:
    code = 1
    try:
        if programs := env.get(_PROGRAMS):
            _fork_server(files)
            for name in ("capture.estimate", "runtime.child_process", "runtime.devices"):
                module = importlib.import_module(f"memfit.{name}")
                setattr(module, "subprocess", processes(*programs.splitlines(), by=env[_BY]))  # noqa: B010
        libc = ctypes.CDLL(None)
        while os.getppid() != parent:  # the process between them has not ended yet
            time.sleep(0.001)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.chdir(folder)
        for number, descriptor in enumerate(files):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(env)
        for name, option in _MALLOPT.items():
            if name in env:
                libc.mallopt(option, int(env[name]))
        sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
        code = _exit_code(argv)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _exit_code(argv: list[str]) -> int:
    """Run the program, and return the code with which Python would exit."""
    if argv[0] == "-W":
        warnings.simplefilter(argv[1])  # type: ignore[arg-type]
        return _exit_code(argv[2:])
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            sys.path.insert(0, str(Path(argv[0]).resolve().parent))
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as ending:
        if ending.code is None or isinstance(ending.code, int):
            return ending.code or 0
        print(ending.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001  as Python does
        started_by = argv[0] if sys.argv[0] != argv[0] else ""  # a script that runs the program
        error.__traceback__ = _of_program(error.__traceback__, started_by)
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def _of_program(frames: TracebackType | None, started_by: str) -> TracebackType | None:
    """Return the frames of a traceback from the program's own code on."""
    others = (__file__, "<frozen runpy>", runpy.__file__, started_by)
    while frames and frames.tb_frame.f_code.co_filename in others:
        frames = frames.tb_next
    return frames


if __name__ == "__main__":
    for name in _IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))
