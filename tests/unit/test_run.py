"""Every way a child process can end, tried with tiny children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from memfit.runtime import child_process
from memfit.runtime.cgroup import Group
from memfit.runtime.child_process import CHILD_ENV, run
from memfit.types.job import JobRef
from memfit.types.launch import LaunchConfig, RunSpec
from memfit.types.plan import Plan
from memfit.types.result import Measurement, OutcomeKind

MIB = 2**20
TELL = """import json, sys
def tell(event, **more):
    print(json.dumps({"event": event, "by": "memfit", **more}), flush=True)
"""
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Temporary folders are made here, and none may be left after a test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.glob("memfit-*")) == []


def config(code: str, *, timeout_s: float = 60, cap_bytes: int | None = None, **env: str) -> LaunchConfig:
    return LaunchConfig(
        engine="test",
        argv=(sys.executable, "{dir}/child.py", "{dir}"),
        env=env,
        files={"child.py": TELL + code, "spec.json": '{"answer": 42}'},
        spec=RunSpec(
            name="test",
            role="baseline",
            job=JobRef(spec="x"),
            plan=Plan(),
            seed=0,
            steps=2,
            timeout_s=timeout_s,
            cap_bytes=cap_bytes,
        ),
    )


def ending(code: str, *, timeout_s: float = 60, cap_bytes: int | None = None) -> Measurement:
    return run(config(code, timeout_s=timeout_s, cap_bytes=cap_bytes), on_event=lambda _: None)


def gone(pid: int, within_s: float = 10) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        state = Path(f"/proc/{pid}/stat")
        if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True  # dead, waiting for init to collect it
        time.sleep(0.02)
    return False


# --- what a child reports


def test_the_result_and_every_event_arrive_in_order() -> None:
    seen: list[Mapping[str, object]] = []
    code = """
from pathlib import Path
tell("stage", stage=json.loads((Path(sys.argv[1]) / "spec.json").read_text())["answer"])
tell("step", step=0, loss=2.5)
tell("result", measurement={"outcome": "failed"})          # the last one counts
tell("result", measurement={"outcome": "ok", "losses": [2.5], "peak_bytes": 64})
"""
    measured = run(config(code), on_event=seen.append)
    assert measured == Measurement(outcome=OutcomeKind.OK, losses=(2.5,), peak_bytes=64)
    assert [e["event"] for e in seen] == ["stage", "step", "result", "result"]
    assert seen[0]["stage"] == 42


def test_child_output_that_is_not_an_event_is_ignored() -> None:
    seen: list[Mapping[str, object]] = []
    code = r"""
sys.stdout.buffer.write(b'\xff\xfe\x00 loading\n{"event": oops\n{"event": 3}\n{"other": 1}\n\n')
print('{"event": "step", "by": "memfit", "loss": 1' + '0' * 200_000 + '}')  # longer than a pipe holds
print('{"event": "step", "by": "memfit", "loss": ' + '[' * 100_000)
tell("result", measurement={"outcome": "ok"})
sys.stdout.write('{"event": "cut sh')
"""
    assert run(config(code), on_event=seen.append).outcome is OutcomeKind.OK
    assert [e["event"] for e in seen][-1] == "result"


def test_json_lines_that_the_job_logs_are_not_taken_for_events() -> None:
    code = """
print('{"event": "step"}', flush=True)  # as structlog writes it
print('{"event": "step", "step": 7, "loss": 9.5}')
print('{"event": "epoch"} ', end="")
tell("step", step=0, loss=2.5)
tell("result", measurement={"outcome": "ok", "peak_bytes": 64})
print('{"event": "result", "measurement": 5}')
"""
    seen: list[Mapping[str, object]] = []
    assert run(config(code), on_event=seen.append).peak_bytes == 64
    assert [(e["event"], e.get("step")) for e in seen] == [("step", 0), ("result", None)]


def test_output_without_the_end_of_a_line_is_read_in_linear_time() -> None:
    code = """
for _ in range(640): sys.stdout.write("x" * 65536)
tell("result", measurement={"outcome": "ok"})
"""
    begun_s = time.process_time()
    assert run(config(code), on_event=lambda _: None).outcome is OutcomeKind.OK
    assert time.process_time() - begun_s < 2  # 40 MiB; each chunk anew copied them 320 times


def test_an_event_after_dots_that_the_job_prints_is_read() -> None:
    code = 'for i in range(2): print(".", end=""); tell("step", step=i, loss=1.0)'
    assert run(config(code), on_event=lambda _: None).steps_done == 2


def test_events_arrive_while_the_child_runs() -> None:
    """The child waits for a file that only the receiver of its event makes."""
    code = """
import time
from pathlib import Path
tell("ready", path=sys.argv[1] + "/go")
while not Path(sys.argv[1] + "/go").exists(): time.sleep(0.01)
tell("result", measurement={"outcome": "ok"})
"""

    def answer(event: Mapping[str, object]) -> None:
        if event["event"] == "ready":
            Path(str(event["path"])).write_text("")

    assert run(config(code, timeout_s=30), on_event=answer).outcome is OutcomeKind.OK


def test_the_child_inherits_the_environment_with_the_runs_values_on_top(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FROM_PARENT", "1")
    monkeypatch.setenv("OVER", "parent")
    names = [*CHILD_ENV, "FROM_PARENT", "OVER"]
    code = f"import os\nvalues = '|'.join(os.environ[name] for name in {names})\n"
    code += "tell('result', measurement={'outcome': 'ok', 'reason': values})"
    measured = run(config(code, OVER="run"), on_event=lambda _: None)
    assert measured.reason == "|".join([*CHILD_ENV.values(), "1", "run"])


def test_an_invalid_result_fails_the_run_and_names_the_field() -> None:
    measured = ending("tell('step', step=0, loss=1.0)\ntell('result', measurement={'outcome': 'splendid'})")
    assert measured.outcome is OutcomeKind.FAILED
    assert "the child's result is invalid at outcome" in measured.reason
    assert measured.steps_done == 1


# --- how a child dies


def test_a_crash_keeps_the_steps_done_and_the_last_error_line() -> None:
    steps = "tell('step', loss=2)\ntell('step', loss=None)\ntell('step', loss=1.5)\n"
    measured = ending(steps + "raise ValueError('no such residue')")
    assert measured.outcome is OutcomeKind.FAILED
    assert measured.reason == "exit code 1: ValueError: no such residue"
    assert (measured.steps_done, measured.losses) == (3, (2.0, 1.5))
    assert measured.wall_s > 0


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("", "ended without a result"),
        ("sys.exit(3)", "exit code 3"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("import os\nos.kill(os.getpid(), 40)", "killed by signal 40"),
        (
            "sys.stderr.write('out of memory? no, all is well\\n')",
            "ended without a result: out of memory? no, all is well",
        ),
    ],
)
def test_a_child_that_ends_without_a_result_has_failed(
    code: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_process, "machine_oom_kills", lambda: 0)
    measured = ending(code, cap_bytes=MIB)
    assert (measured.outcome, measured.reason) == (OutcomeKind.FAILED, reason)


def test_only_the_end_of_standard_error_is_kept() -> None:
    text = "'x' * 50_000 + '\\nMemoryError long ago\\n' + 'y' * 5000 + '\\nlast\\n'"
    measured = ending(f"sys.stderr.write({text})\nsys.exit(1)")
    assert (measured.outcome, measured.reason) == (OutcomeKind.FAILED, "exit code 1: last")


def test_a_missing_program_is_a_failed_run() -> None:
    spec = config("").spec
    broken = LaunchConfig(engine="x", argv=("/no/such/program",), env={}, files={}, spec=spec)
    measured = run(broken, on_event=lambda _: None)
    assert (measured.outcome, measured.reason) == (
        OutcomeKind.FAILED,
        "exit code 1: cannot start /no/such/program: No such file or directory",
    )


@LINUX
def test_exceeding_rlimit_data_is_out_of_memory() -> None:
    code = f"""
import resource
tell("step", loss=1.0)
resource.setrlimit(resource.RLIMIT_DATA, ({64 * MIB}, {64 * MIB}))
block = bytearray({256 * MIB})
"""
    measured = ending(code, cap_bytes=64 * MIB)
    assert (measured.outcome, measured.reason, measured.losses) == (OutcomeKind.OOM, "MemoryError", (1.0,))


def test_torchs_allocator_error_is_out_of_memory() -> None:
    words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."
    measured = ending(f"sys.stderr.write({words!r} + '\\n(more words)\\n')\nsys.exit(1)")
    assert (measured.outcome, measured.reason) == (OutcomeKind.OOM, words)


SUICIDE = "import os, signal\ntell('step', loss=1.0)\nos.kill(os.getpid(), signal.SIGKILL)"


def test_sigkill_counted_by_the_control_group_is_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(pid: int) -> Group:
        path = tmp_path / f"group-{pid}"
        path.mkdir(exist_ok=True)
        (path / "memory.events").write_text("oom_kill 1\n")
        return Group(path=path, home=tmp_path, pid=pid)

    monkeypatch.setattr(Group, "of", of)
    measured = ending(SUICIDE, cap_bytes=64 * MIB)
    assert (measured.outcome, measured.reason) == (
        OutcomeKind.OOM,
        "killed by the kernel at its cap of 64 MiB",
    )
    assert measured.steps_done == 1


def test_sigkill_counted_only_by_the_machine_is_probably_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("nr_free 1\noom_kill 4\n")
    monkeypatch.setattr(child_process, "oom_kills_here", lambda: None)
    monkeypatch.setattr(child_process, "_VMSTAT", vmstat)
    assert ending(SUICIDE).outcome is OutcomeKind.FAILED  # a kill that no counter recorded
    measured = run(config(SUICIDE), on_event=lambda _: vmstat.write_text("oom_kill 5\n") and None)
    assert (measured.outcome, measured.reason) == (
        OutcomeKind.OOM,
        "killed by SIGKILL, probably by the kernel: the machine ran out of memory then",
    )
    monkeypatch.setattr(child_process, "_VMSTAT", tmp_path / "none")
    assert ending(SUICIDE).outcome is OutcomeKind.FAILED


def test_an_out_of_memory_kill_long_before_is_not_blamed_on_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("oom_kill 4\n")
    monkeypatch.setattr(child_process, "oom_kills_here", lambda: None)
    monkeypatch.setattr(child_process, "_VMSTAT", vmstat)
    monkeypatch.setattr(child_process, "_OOM_KILLS_S", 0.2)
    code = SUICIDE.replace("os.kill", "__import__('time').sleep(1.5); os.kill")
    measured = run(config(code), on_event=lambda _: vmstat.write_text("oom_kill 5\n") and None)
    assert (measured.outcome, measured.reason) == (OutcomeKind.FAILED, "killed by SIGKILL")


def test_an_out_of_memory_kill_outside_the_childs_control_group_is_not_blamed_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmstat, kills = tmp_path / "vmstat", [2]
    vmstat.write_text("oom_kill 4\n")
    monkeypatch.setattr(child_process, "oom_kills_here", lambda: kills[-1])
    monkeypatch.setattr(child_process, "_VMSTAT", vmstat)
    measured = run(config(SUICIDE), on_event=lambda _: vmstat.write_text("oom_kill 5\n") and None)
    assert (measured.outcome, measured.reason) == (OutcomeKind.FAILED, "killed by SIGKILL")
    measured = run(config(SUICIDE), on_event=lambda _: kills.append(3))
    assert (measured.outcome, measured.reason) == (
        OutcomeKind.OOM,
        "killed by the kernel: its group or the machine ran out of memory",
    )


# --- no process or folder is left behind

GRANDCHILD = """
import subprocess, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
tell("pids", pids=[other.pid, __import__("os").getpid()])
"""


def pids_of(code: str, *, timeout_s: float) -> tuple[Measurement, list[int]]:
    pids: list[int] = []

    def note(event: Mapping[str, object]) -> None:
        found = event.get("pids")
        pids.extend(found if isinstance(found, list) else [])

    return run(config(code, timeout_s=timeout_s), on_event=note), pids


@pytest.mark.parametrize(
    "tail", ["time.sleep(100)", "sys.stdout.close()\nimport os\nos.close(1)\ntime.sleep(100)"]
)
def test_a_timeout_kills_the_whole_process_group(tail: str) -> None:
    measured, pids = pids_of(GRANDCHILD + tail, timeout_s=1.5)
    assert (measured.outcome, measured.reason) == (OutcomeKind.TIMEOUT, "stopped at its time limit of 1.5 s")
    assert 1.5 <= measured.wall_s < 6
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_a_grandchild_that_keeps_the_pipe_open_does_not_block_the_run() -> None:
    measured, pids = pids_of(GRANDCHILD + "tell('result', measurement={'outcome': 'ok'})", timeout_s=60)
    assert measured.outcome is OutcomeKind.OK
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interruption_kills_the_child_and_is_raised(error: type[BaseException]) -> None:
    pids: list[int] = []

    def interrupt(event: Mapping[str, object]) -> None:
        pids.append(int(str(event["pid"])))
        raise error

    with pytest.raises(error):
        run(config("import os, time\ntell('pid', pid=os.getpid())\ntime.sleep(100)"), on_event=interrupt)
    assert gone(pids[0])


@LINUX
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_parent_is_killed_the_child_dies(sign: signal.Signals, tmp_path: Path) -> None:
    parent_code = f"""
import sys, tempfile
sys.path.insert(0, {str(Path(__file__).parent)!r})
from memfit.runtime.child_process import run
from memfit.types.launch import LaunchConfig, RunSpec
from memfit.types.job import JobRef
from memfit.types.plan import Plan
child = '''
import os, time
print('{{"event": "pid", "by": "memfit", "pid": %d}}' % os.getpid(), flush=True)
time.sleep(100)
'''
spec = RunSpec(name="n", role="baseline", job=JobRef(spec="x"), plan=Plan(), seed=0, steps=1)
config = LaunchConfig(engine="x", argv=(sys.executable, "-c", child), env={{}}, files={{}}, spec=spec)
run(config, on_event=lambda e: print(e["pid"], flush=True))
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", parent_code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "..")},
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(sign)
    parent.wait()
    parent.stdout.close()
    assert gone(pid)


@LINUX
def test_a_child_whose_parent_is_already_gone_does_not_start() -> None:
    command = child_process.dying_with_parent([sys.executable, "-c", "print('started')"])
    command[command.index(str(os.getpid()))] = "1"  # the parent that it is started for is another process
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "the parent process has died\n")


def test_events_are_plain_json() -> None:
    assert child_process.parse_event(b'{"event":"step","by":"memfit","loss":1}') == {
        "event": "step",
        "loss": 1,
    }
