"""Nothing of memfit outlives it: child processes die with it, temporary folders go or are removed by the next
start, and a file is replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from child_ranks import start

from memfit.cli.app import main
from memfit.cli.request import writable
from memfit.cli.termination import interrupted_by_signals
from memfit.files import replace
from memfit.files.replace import write_whole
from memfit.files.temporary import OWNER, remove_abandoned, temporary_folder
from memfit.runtime import child_process
from memfit.runtime.ranks import run_ranks
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.launch import LaunchConfig, RunSpec
from memfit.types.plan import Plan
from memfit.types.result import OutcomeKind

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's kernel")
TRACING = """
import os, signal, time
from memfit.trace.trace_pool import run_parallel
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
os.sched_getaffinity = lambda _: {0, 1}
run_parallel([lambda: time.sleep(60)] * 2)
"""


def default_signals() -> None:
    """Undo what nohup, or a shell's background job, has set for its children."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def environment(folder: Path) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    return {**os.environ, "TMPDIR": str(folder), "MEMFIT_CACHE": "off"}


def children_of(process: int, count: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if len(children := psutil.Process(process).children(recursive=True)) >= count:
            return children
        time.sleep(0.05)
    raise AssertionError("no children were started")


def alive(processes: list[psutil.Process], within_s: float = 2.0) -> list[psutil.Process]:
    return [p for p in psutil.wait_procs(processes, within_s)[1] if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_arrives_in_a_callback_of_a_weak_reference_ends_the_command(
    number: signal.Signals,
) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    default_signals()
    thing = type("Thing", (), {})()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(number))
    try:
        with interrupted_by_signals():
            del thing
            assert reference() is None
            time.sleep(5)
        pytest.fail("the exception was swallowed")
    except KeyboardInterrupt:
        pass
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@LINUX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGINT])
def test_forked_traces_die_with_the_process_that_forked_them(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "tracing.py").write_text(TRACING)
    process = start([tmp_path / "tracing.py"], env=environment(tmp_path), errors=os.devnull)
    children = children_of(process.pid, 2)
    time.sleep(0.3)
    os.kill(process.pid, number)
    process.wait(5)
    assert not alive(children)


@LINUX
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_signal_ends_a_run_with_its_children_and_temporary_folders(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    command = ("run", "char-lm", "--steps", "100000", "--store", str(tmp_path / "store.sqlite3"))
    with subprocess.Popen(
        (sys.executable, "-m", "memfit", *command),
        env=environment(tmp_path / "temporary"),
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        preexec_fn=default_signals,  # noqa: PLW1509  no threads take locks that it needs
    ) as process:
        children = children_of(process.pid, 1)
        time.sleep(0.5)
        process.send_signal(number)
        errors = process.stderr.read().decode()
        assert process.wait(10) == code, errors
    assert not alive(children)
    assert [p.name for p in (tmp_path / "temporary").iterdir() if p.name.startswith("memfit")] == []
    assert errors.splitlines()[-1].startswith("memfit: interrupted")


@pytest.mark.parametrize("system", ["linux", "elsewhere"])
def test_a_child_process_is_killed_when_its_parent_is(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if system == "elsewhere":
        text = child_process._ASK.replace('sys.platform == "linux"', "False")
        monkeypatch.setattr(child_process, "_ASK", text)
    elif sys.platform != "linux":
        pytest.skip("asks Linux's kernel")
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    code = (
        "import subprocess, sys, os\n"
        f"argv = {child_process.dying_with_parent(sleep)!r}\n"
        "argv[argv.index(argv[5])] = str(os.getpid())\n"
        "subprocess.Popen(argv).wait()"
    )
    with subprocess.Popen((sys.executable, "-c", code)) as process:
        children = children_of(process.pid, 1 if system == "linux" else 2)
        process.kill()
    assert not alive(children)


def test_elsewhere_a_child_process_ends_as_its_program_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    text = child_process._ASK.replace('sys.platform == "linux"', "False")
    monkeypatch.setattr(child_process, "_ASK", text)
    for code, expected in (("import sys; sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 15)", -15)):
        argv = child_process.dying_with_parent([sys.executable, "-c", code])
        assert subprocess.run(argv, check=False).returncode == expected


def test_an_empty_entry_of_pythonpath_does_not_reach_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "/a", ""]))
    assert child_process.child_environment({"X": "1"})["PYTHONPATH"] == "/a"
    monkeypatch.setenv("PYTHONPATH", os.pathsep)
    assert "PYTHONPATH" not in child_process.child_environment({})


@contextlib.contextmanager
def abandoned(parent: Path, *, age_s: float = 10.0) -> Iterator[Path]:
    """A folder as a process that was killed leaves it."""
    path = parent / "memfit-abandoned"
    path.mkdir()
    (path / OWNER).touch()
    (path / "run.json").write_text("{}")
    os.utime(path / OWNER, (time.time() - age_s,) * 2)
    yield path


def test_temporary_folders_of_dead_processes_are_removed_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with abandoned(tmp_path) as path:
        assert main(["--version"]) == 0
        assert not path.exists()


def test_folders_of_living_processes_of_others_and_links_are_kept(tmp_path: Path) -> None:
    (tmp_path / "memfit-results").mkdir()
    (tmp_path / "memfit-results" / "mine.txt").touch()
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / OWNER).touch()
    os.utime(victim / OWNER, (0, 0))
    (tmp_path / "memfit-link").symlink_to(victim)
    with temporary_folder(parent=tmp_path) as path, abandoned(tmp_path, age_s=0.0) as young:
        os.utime(path / OWNER, (0, 0))
        assert remove_abandoned(parent=tmp_path) == []
        assert all(folder.exists() for folder in (path, young, victim))
        assert (tmp_path / "memfit-results" / "mine.txt").exists()
    assert not path.exists()


def test_writing_replaces_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "out.yaml"
    victim.write_text("precious")
    link.symlink_to(victim)
    write_whole(link, b"new")
    assert victim.read_text() == "precious"
    assert link.read_text() == "new"
    assert not link.is_symlink()


def test_writing_does_not_follow_a_link_at_a_name_that_could_be_predicted(tmp_path: Path) -> None:
    victim, target = tmp_path / "victim", tmp_path / "out.yaml"
    victim.write_text("precious")
    for name in (f".out.yaml.{os.getpid()}.part", "out.yaml.new", "out.yaml.draft"):
        (tmp_path / name).symlink_to(victim)
    write_whole(target, b"new")
    assert victim.read_text() == "precious"


def test_a_full_disk_leaves_the_old_file_and_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "plan.yaml"
    path.write_text("old")
    monkeypatch.setattr(replace.os, "fsync", full)
    with pytest.raises(UserError, match=r"plan\.yaml: No space left on device"):
        write_whole(path, b"new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


def test_a_full_disk_is_an_error_before_the_work_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(replace.os, "write", full)
    with pytest.raises(UserError, match=r"checkpoints cannot be written into .*: No space left on device"):
        replace.must_be_writable(tmp_path, "checkpoints")
    assert list(tmp_path.iterdir()) == []


def test_a_file_keeps_its_permissions_and_a_draft_of_a_dead_writer_goes(tmp_path: Path) -> None:
    path, dead, busy = tmp_path / "a.json", tmp_path / ".a.json.0123.part", tmp_path / ".a.json.4567.part"
    path.touch()
    path.chmod(0o640)
    for draft in (dead, busy):
        draft.touch()
        os.utime(draft, (0, 0))
    with busy.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_whole(path, b"{}")
        assert busy.exists()
    assert not dead.exists()
    assert path.stat().st_mode & 0o777 == 0o640


def test_writing_to_a_named_pipe_goes_to_its_reader(tmp_path: Path) -> None:
    pipe, received = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, b"new")
    reader.join(5)
    assert received == [b"new"]


def test_an_open_file_of_this_process_is_written_to_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "redirected.txt"
    with path.open("wb", buffering=0) as file:
        file.write(b"before, ")
        opened = Path(f"/dev/fd/{file.fileno()}")
        assert replace.is_stream(opened)
        assert writable(opened, overwrite=False) == opened
        assert write_whole(opened, b"new, ") == opened
        file.write(b"after")
    assert path.read_bytes() == b"before, new, after"
    assert not replace.is_stream(path)


@pytest.mark.parametrize("name", [".", "/", "", "nul\0"])
def test_what_is_no_file_name_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_whole(Path(name), b"new")


def test_only_drafts_are_removed_as_drafts(tmp_path: Path) -> None:
    mine = tmp_path / ".a.json.mine.part"
    mine.touch()
    os.utime(mine, (0, 0))
    write_whole(tmp_path / "a.json", b"{}")
    assert mine.exists()


@LINUX
@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "char-lm", "--steps", "2", "--save", "/proc/no/checkpoints"),
        ("poc", "char-lm", "--out", "/proc/report.html"),
        ("plan", "char-lm", "--save", "/proc/plan.yaml"),
    ],
)
def test_a_folder_that_cannot_be_written_is_an_error_before_training_begins(
    arguments: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("training has begun")

    monkeypatch.setattr(child_process, "run", start)
    monkeypatch.setattr("memfit.workflows.single_run.explain", start)
    for module in ("plan", "proof_of_concept"):
        monkeypatch.setattr(f"memfit.workflows.{module}.find_plan", start)
    store = () if arguments[0] == "plan" else ("--store", str(tmp_path / "s.sqlite3"))
    assert main([*arguments, *store]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written into /proc" in line


JOINING = """
import json, pathlib, sys
import psutil
import torch
from memfit.types.launch import RENDEZVOUS
from memfit.types.plan import Plan
from memfit.techniques.registry import make_use
from memfit.worker.train import join_world
plan = Plan(ranks=2, uses=(make_use("ddp", {}),))
with join_world(plan, rendezvous=pathlib.Path(sys.argv[1]) / RENDEZVOUS):
    torch.distributed.all_reduce(torch.ones(2))
    ports = [c for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    on = sorted({c.laddr.ip for c in ports})
    print(json.dumps({"event": "listens", "by": "memfit", "on": on}), flush=True)
    torch.distributed.barrier()
print(json.dumps({"event": "result", "by": "memfit", "measurement": {"outcome": "ok"}}))
"""


@LINUX
def test_ranks_listen_to_this_machine_alone() -> None:
    events: list[Any] = []
    spec = RunSpec(name="test", role="run", job=JobRef(spec="x"), plan=Plan(ranks=2), seed=0, steps=1)
    argv = (sys.executable, "-c", JOINING, "{dir}")
    config = LaunchConfig(engine="test", argv=argv, env={}, files={}, spec=spec)
    measurements = run_ranks(config, on_event=lambda rank, event: events.append(event))
    assert {m.outcome for m in measurements} == {OutcomeKind.OK}, measurements
    assert [e["on"] for e in events if e["event"] == "listens"] == [["127.0.0.1"]] * 2


SAYING = """
import json, os, time
print(json.dumps({"event": "hello", "by": "memfit"}), flush=True)
time.sleep(60)
"""


def test_an_error_of_on_event_for_one_rank_kills_all_at_once() -> None:
    spec = RunSpec(name="test", role="run", job=JobRef(spec="x"), plan=Plan(ranks=2), seed=0, steps=1)
    argv = (sys.executable, "-c", SAYING, "{dir}")
    config = LaunchConfig(engine="test", argv=argv, env={}, files={}, spec=spec)

    def fail(rank: int, event: Any) -> None:
        if rank == 1:
            raise ZeroDivisionError

    began_s = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        run_ranks(config, on_event=fail)
    assert time.monotonic() - began_s < 30, "rank 0 sleeps for a minute"
