"""memfit.watch records a training that runs unchanged, and never disturbs it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any
from unittest import mock

import forked
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

import memfit
from memfit.cli import main
from memfit.cli.safe_console import SafeConsole
from memfit.monitoring.alarms import alarms_of
from memfit.monitoring.autopsy import diagnose_log, diagnose_record
from memfit.monitoring.command import run_watched
from memfit.monitoring.readings import MemoryReadings
from memfit.monitoring.record import RankRecord, read_records
from memfit.types.errors import UserError
from memfit.types.units import MIB

SOURCE = Path(__file__).parents[2] / "src" / "memfit"
TRAINING = """
import sys, torch
from torch import nn
model = nn.Linear(8, 8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(5):
    optimizer.zero_grad()
    model(torch.ones(2, 8)).square().mean().backward()
    optimizer.step()
"""


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{SOURCE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


class Training:
    """A small model whose steps can be taken one by one."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(8, 8)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.losses: list[float] = []

    def steps(self, count: int = 1) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            loss = self.model(torch.ones(2, 8)).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.losses.append(float(loss.detach()))


def recorded(path: str = "run.jsonl") -> RankRecord:
    (rank,) = read_records(path).ranks
    return rank


# --- what is recorded


def test_a_training_is_recorded_without_a_change_of_its_loop() -> None:
    training = Training()
    with memfit.watch(prediction={"allocated_bytes": 7}):
        training.steps(4)
    record = recorded()
    assert [s.step for s in record.steps] == [1, 2, 3, 4]
    assert [s.loss for s in record.steps] == training.losses
    assert all(s.grad_norm for s in record.steps)
    assert all(s.step_s and s.before_backward_s and s.step_s > s.before_backward_s for s in record.steps[1:])
    assert record.steps[0].host_bytes
    assert record.start is not None
    assert record.start.prediction["allocated_bytes"].value == 7
    assert record.end is not None
    assert record.end.error == ""


def test_after_the_watch_nothing_of_it_is_left() -> None:
    before = torch.autograd.backward, nn.utils.clip_grad_norm_
    training = Training()
    with memfit.watch():
        training.steps()
    assert (torch.autograd.backward, nn.utils.clip_grad_norm_) == before
    training.steps()
    assert len(recorded().steps) == 1


def test_the_training_can_end_steps_itself() -> None:
    training = Training()
    with memfit.watch(optimizer=False) as watch:
        for number in (10, 20):
            training.steps(3)
            watch.step(loss=0.5, grad_norm=torch.tensor(2.0), step=number)
    assert [(s.step, s.loss, s.grad_norm) for s in recorded().steps] == [(10, 0.5, 2.0), (20, 0.5, 2.0)]


def test_a_loss_given_after_the_optimizers_step_belongs_to_it() -> None:
    training = Training()
    with memfit.watch() as watch:
        for loss in (3.0, 2.0, 1.0):
            training.steps()
            watch.step(loss=loss)
    assert [(s.step, s.loss) for s in recorded().steps] == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_of_two_optimizers_the_first_ends_steps() -> None:
    training, second = Training(), Training()
    with memfit.watch():
        for _ in range(3):
            training.steps()
            second.steps(2)
    assert len(recorded().steps) == 3


def test_the_steps_of_the_named_optimizer_are_recorded() -> None:
    training, other = Training(), Training()
    with memfit.watch(optimizer=other.optimizer):
        training.steps(5)
        other.steps(2)
    assert len(recorded().steps) == 2


def test_steps_on_fake_tensors_are_none() -> None:
    with memfit.watch() as watch:
        with FakeTensorMode():
            model = nn.Linear(8, 8)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(torch.ones(2, 8)).mean().backward()
            optimizer.step()
        assert not watch.is_recording
    assert not Path("run.jsonl").exists()


def test_tensors_are_counted_where_the_counting_allocator_is_active(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counter:
        source = "counting allocator"

        def live_bytes(self) -> int:
            return 5

        def peak_bytes(self) -> int:
            return 9

    monkeypatch.setattr("memfit.monitoring.readings.active_allocator", Counter)
    with memfit.watch():
        Training().steps()
    record = recorded()
    assert record.start is not None
    assert record.start.memory_source == "counting allocator"
    assert (record.steps[0].allocated_bytes, record.steps[0].peak_allocated_bytes) == (5, 9)


def test_the_error_that_ends_a_training_is_recorded_with_its_memory() -> None:
    def train() -> None:
        with memfit.watch():
            Training().steps(2)
            raise MemoryError("no more")

    with pytest.raises(MemoryError):
        train()
    end = recorded().end
    assert end is not None
    assert (end.error, end.message) == ("MemoryError", "no more")
    assert end.memory["heap_bytes"] > 0


_LEAK = """
import time, torch, memfit
from torch import nn
model = nn.Linear(8, 8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
leaked = []
with memfit.watch() as watch:
    for _ in range(60):
        model(torch.ones(2, 8)).square().mean().backward()
        optimizer.step()
        leaked.append(torch.ones(2**18))
        time.sleep(0.03)  # of much shorter steps, not all are recorded
"""


def test_a_leak_of_one_mib_a_step_is_reported_within_60_steps() -> None:
    # in a process of its own: what earlier tests leave to be freed hides a leak
    done = subprocess.run([sys.executable, script(_LEAK)], check=True, capture_output=True, text=True)
    creeps = [a for a in recorded().alarms if (a.kind, a.quantity) == ("creep", "heap_bytes")]
    assert creeps
    assert creeps[0].value == pytest.approx(MIB, rel=0.1)
    assert "memfit: creep, step" in done.stderr


def test_a_training_that_keeps_nothing_raises_no_alarm() -> None:
    training = Training()
    with memfit.watch() as watch:
        for i in range(300):
            training.steps()
            torch.ones(MIB * (1 + i * 7 % 5))
    assert [a for a in watch.alarms if a.kind == "creep"] == []


# --- it does not disturb


def test_an_error_in_memfit_ends_the_watch_and_not_the_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Any) -> None:
        raise ZeroDivisionError("of memfit")

    monkeypatch.setattr(MemoryReadings, "read", fail)
    training = Training()
    with memfit.watch():
        training.steps(3)
    assert len(training.losses) == 3
    assert capsys.readouterr().err == "memfit: the watch has ended: ZeroDivisionError: of memfit\n"


def test_a_file_that_cannot_be_written_does_not_end_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    Path("blocked").write_text("")
    training = Training()
    with memfit.watch(file="blocked/run.jsonl"):
        training.steps(2)
    assert len(training.losses) == 2
    assert "the watch has ended" in capsys.readouterr().err


def test_an_exception_of_on_alarm_stops_the_training() -> None:
    def stop(alarm: Any) -> None:
        raise KeyboardInterrupt(alarm.kind)

    def train() -> None:
        with memfit.watch(on_alarm=stop) as watch:
            Training().steps(2)
            watch.step(loss=float("nan"))

    with pytest.raises(KeyboardInterrupt, match="non-finite"):
        train()
    assert recorded().alarms[0].kind == "non-finite"


def test_no_module_of_the_watch_resets_a_counter_or_waits_for_a_device_in_a_step() -> None:
    for name in ("readings", "watch", "training_hooks"):
        text = (SOURCE / "monitoring" / f"{name}.py").read_text()
        assert "reset" not in text.replace("No counter is reset", "")
        assert "synchronize" not in text


def test_short_steps_are_thinned_out_so_that_the_watch_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memfit.monitoring.watch._ALLOWANCE_S", 0.0)
    training = Training()
    with memfit.watch():
        training.steps(400)
    assert 1 <= len(recorded().steps) < 200


@pytest.mark.parametrize("file", ["run", "."])
def test_a_file_without_a_name_is_refused(file: str) -> None:
    with pytest.raises(UserError, match="a file name with a suffix"):
        memfit.watch(file=file)


# --- loggers


class Board:
    def __init__(self) -> None:
        self.values: dict[str, tuple[float, int]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.values[name] = (value, step)


def test_values_go_to_a_tensorboard_writer() -> None:
    board = Board()
    with memfit.watch(logger=board):
        Training().steps(2)
    assert board.values["memfit/host_bytes"][1] == 1
    assert all(name.startswith("memfit/") for name in board.values)


def test_values_join_the_active_run_of_wandb_without_a_step_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logged: list[tuple[dict[str, float], bool]] = []

    def log(values: dict[str, float], commit: bool = True) -> None:
        logged.append((values, commit))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=types.SimpleNamespace(log=log)))
    with memfit.watch():
        Training().steps(2)
    ((values, commit),) = logged
    assert "memfit/host_bytes" in values
    assert commit is False


def test_values_go_to_the_active_run_of_mlflow_and_nowhere_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logged: list[tuple[Any, ...]] = []
    mlflow = types.SimpleNamespace(
        active_run=lambda: None, log_metrics=lambda values, **more: logged.append((values, more))
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with memfit.watch():
        Training().steps()
    assert logged == []
    mlflow.active_run = lambda: "a run"
    with memfit.watch():
        Training().steps()
    assert logged[0][1] == {"step": 1, "synchronous": False}


# --- files


def lines(count: int, rank: int = 0, world_size: int = 1) -> list[bytes]:
    start = {"kind": "start", "rank": rank, "world_size": world_size, "pid": 1, "host": "h", "time_s": 0.0}
    start |= {"device": "cpu", "device_name": "", "total_bytes": None, "memory_source": ""}
    start |= {"energy_boundary": "", "environment": {}, "prediction": {}, "limits": {}, "newer": 1}
    steps = [{"kind": "step", "step": i, "time_s": float(i), "loss": "nan"} for i in range(1, count + 1)]
    return [json.dumps(line).encode() + b"\n" for line in (start, *steps)]


@settings(max_examples=60)
@given(cut=st.integers(1, 700))
def test_a_file_that_is_cut_off_anywhere_is_readable(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "run.jsonl"
    data = b"".join(lines(8))
    path.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    if whole:
        record = recorded(str(path))
        assert (len(record.steps), record.unreadable_lines) == (whole - 1, 0)
    else:
        with pytest.raises(UserError, match="no line is one of a watched training"):
            read_records(path)


def test_a_broken_line_is_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"".join([*lines(2), b'{"kind": "step", "st\n', *lines(5)[4:]]))
    record = recorded(str(path))
    assert [s.step for s in record.steps] == [1, 2, 4, 5]
    assert record.unreadable_lines == 1


def test_ranks_are_merged_and_those_of_an_earlier_larger_training_left_out(tmp_path: Path) -> None:
    for rank in range(3):
        path = tmp_path / ("run.jsonl" if rank == 0 else f"run.{rank}.jsonl")
        path.write_bytes(b"".join(lines(4 + rank, rank, world_size=2)))
    record = read_records(tmp_path / "run.jsonl")
    assert [(r.rank, len(r.steps)) for r in record.ranks] == [(0, 4), (1, 5)]


def test_ranks_from_before_a_command_that_has_not_trained_are_left_out(tmp_path: Path) -> None:
    command = b'{"kind": "command", "time_s": 9e9}\n'
    (tmp_path / "run.jsonl").write_bytes(b"".join(lines(4, 0, world_size=2)) + command)
    (tmp_path / "run.1.jsonl").write_bytes(b"".join(lines(4, 1, world_size=2)))
    assert [(r.rank, len(r.steps)) for r in read_records(tmp_path / "run.jsonl").ranks] == [(0, 0)]


def test_a_restarted_training_begins_a_new_record_in_the_same_file() -> None:
    for count in (3, 2):
        with memfit.watch():
            Training().steps(count)
    assert (len(recorded().steps), recorded().earlier_starts) == (2, 1)


def test_a_missing_record_is_an_error() -> None:
    with pytest.raises(UserError, match="there is no such file"):
        read_records("none.jsonl")


# --- commands


def run(*words: str) -> int:
    return run_watched(words, Path("run.jsonl"), prediction={}, limits={}).code


@pytest.fixture
def forked_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """How the watch begins where a script's process starts, and where ranks start, is tested in others."""
    by = Path(__file__).with_name("watched_script.py")
    monkeypatch.setattr("memfit.monitoring.command.subprocess", forked.processes(".py", by=by))


def script(text: str, name: str = "train.py") -> str:
    Path(name).write_text(text)
    return name


def test_a_command_is_recorded_and_its_exit_code_kept() -> None:
    assert main(["watch", "--", sys.executable, script(TRAINING + "sys.exit(7)\n")]) == 7
    record = read_records("run.jsonl")
    assert len(record.ranks[0].steps) == 5
    assert record.exit is not None
    assert record.exit.code == 7


@pytest.mark.usefixtures("forked_scripts")
def test_a_command_that_is_killed_ends_as_in_a_shell() -> None:
    text = TRAINING + f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
    assert main(["watch", "--", sys.executable, script(text)]) == 128 + 9
    record = read_records("run.jsonl")
    assert record.exit is not None
    assert record.exit.code == -9
    assert record.ranks[0].end is None


FULL = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 307200000 bytes. Error code 12 (Cannot allocate memory)"
)
DEATHS = {
    "validation": (
        "evaluation",
        "def validate(net):\n    net(torch.ones(2, 8)); full()\nvalidate(model)",
    ),
    "gathering": ("checkpoint", "class Whole:\n    def state_dict(self): full()\nWhole().state_dict()"),
    "a step": ("longer-sample", "full()"),
}


@pytest.mark.usefixtures("forked_scripts")
@pytest.mark.parametrize("where", DEATHS)
def test_the_record_of_a_death_names_the_cause_that_its_traceback_names(
    where: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A watch had called each death after steps that fitted that of a longer sample."""
    cause, text = DEATHS[where]
    full = f"def full():\n    raise RuntimeError({FULL!r})\n"
    path = script(f"{TRAINING.replace('range(5)', 'range(20)')}{full}{text}\n")
    assert main(["watch", "--", sys.executable, path]) == 1
    printed = capfd.readouterr().err
    diagnosis = diagnose_record(read_records("run.jsonl"))
    assert (diagnosis.cause, diagnosis.line.partition(":")[0]) == (cause, "train.py")
    assert f"why it ended: {cause}" in printed
    if cause != "longer-sample":
        assert diagnose_log(printed.partition("memfit:")[0]).cause == diagnosis.cause
    assert str(Path.cwd()) not in Path("run.jsonl").read_text()


@pytest.mark.usefixtures("forked_scripts")
def test_a_kill_with_free_memory_is_not_called_one_for_lack_of_memory(
    capfd: pytest.CaptureFixture[str],
) -> None:
    text = TRAINING + f"import os, time; time.sleep(1.5); os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
    assert main(["watch", "--", sys.executable, script(text)]) == 128 + 9
    end = read_records("run.jsonl").exit
    assert end is not None
    assert end.free_bytes is not None
    printed = capfd.readouterr().err
    assert "host-killed" not in printed.partition("(")[0]
    assert "it is not known by whom" in printed


def test_a_watch_says_why_a_command_ended_whose_rank_was_killed(capfd: pytest.CaptureFixture[str]) -> None:
    text = """
import os, signal, subprocess, sys
if "RANK" not in os.environ:
    ranks = [{**os.environ, "RANK": rank, "WORLD_SIZE": "2"} for rank in "01"]
    sys.exit(any([p.wait() for p in [subprocess.Popen([sys.executable, __file__], env=e) for e in ranks]]))
"""
    text += TRAINING + "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
    text += "raise RuntimeError('Read error [127.0.0.1]:62666: Connection reset by peer')\n"
    assert main(["watch", "--", sys.executable, script(text)]) == 1
    (line,) = [x for x in capfd.readouterr().err.splitlines() if "why it ended" in x]
    assert "rank 1 has no record of its end" in line
    assert "certain" not in line


@pytest.mark.usefixtures("forked_scripts")
def test_an_uncaught_error_and_running_out_of_memory_before_training_are_recorded() -> None:
    assert run(sys.executable, script(TRAINING + "raise LookupError('lost')\n")) == 1
    end = recorded().end
    assert end is not None
    assert (end.error, end.message) == ("LookupError", "lost")
    assert (
        run(sys.executable, script("import torch\nraise torch.OutOfMemoryError('CUDA out of memory.')\n"))
        == 1
    )
    end = recorded().end
    assert end is not None
    assert end.error == "OutOfMemoryError"
    assert recorded().steps == ()


def test_an_uncaught_error_is_recorded_if_the_program_replaces_the_hook() -> None:
    hook = "sys.excepthook = lambda *error: None\n"
    assert run(sys.executable, script(TRAINING + hook + "raise LookupError('lost')\n")) == 1
    end = recorded().end
    assert end is not None
    assert (end.error, end.message) == ("LookupError", "lost")


@pytest.mark.usefixtures("forked_scripts")
def test_processes_that_do_not_train_write_nothing() -> None:
    assert run(sys.executable, script("import torch\nraise ValueError\n")) == 1
    (rank,) = read_records("run.jsonl").ranks
    assert (rank.start, rank.steps, rank.end) == (None, (), None)


def test_the_sitecustomize_of_the_environment_still_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text("import sys\nsys.customized = True\n")
    monkeypatch.setenv("PYTHONPATH", f"{SOURCE.parent}{os.pathsep}{other}")
    text = TRAINING + "assert sys.customized\nassert not [p for p in sys.path if p.endswith('startup')]\n"
    assert run(sys.executable, script(text)) == 0
    assert len(recorded().steps) == 5


def test_a_watch_that_cannot_begin_leaves_the_command_alone() -> None:
    startup = SOURCE / "monitoring" / "startup"
    env = {**os.environ, "PYTHONPATH": f"{startup}{os.pathsep}{SOURCE.parent}", "MEMFIT_WATCH": "not JSON"}
    done = subprocess.run(
        [sys.executable, script(TRAINING)], env=env, check=True, capture_output=True, text=True
    )
    assert "memfit: this process is not watched: JSONDecodeError" in done.stderr


def test_a_command_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(UserError, match="cannot run 'no-such-program'"):
        run("no-such-program")


def test_two_ranks_are_recorded_and_the_slow_one_is_named() -> None:
    text = """
import os, time, torch, torch.distributed as dist
from torch import nn
dist.init_process_group("gloo")
model = nn.parallel.DistributedDataParallel(nn.Linear(8, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(15):
    time.sleep(0.05 * dist.get_rank())
    model(torch.ones(2, 8)).square().mean().backward()
    optimizer.step()
dist.destroy_process_group()
os._exit(0)  # as child_ranks.leave: a thread of gloo may abort a process that ends
"""
    ranks = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    assert run(*ranks, script(text)) == 0
    record = read_records("run.jsonl")
    assert [len(r.steps) for r in record.ranks] == [15, 15]
    assert [(a.kind, a.rank) for a in alarms_of(record) if a.kind == "slow-rank"] == [("slow-rank", 1)]


# --- the command line


def test_a_record_is_shown_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with memfit.watch(on_alarm=lambda alarm: None, prediction={"host_bytes": 10**9}) as watch:
        Training().steps(3)
        watch.step(loss=float("nan"))
    assert main(["watch", "run.jsonl"]) == 0
    text = capsys.readouterr().out
    assert "1 rank on processor, step 3" in text
    assert "non-finite, step 3, rank 0: the loss is nan in step 3" in text
    assert "host: " in text
    assert "953.7 MiB predicted" in text
    assert main(["watch", "run.jsonl", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["ranks"][0]["recorded_steps"] == 3
    # a long-lived process may be above the prediction, too
    assert [a["value"] for a in summary["alarms"] if a["kind"] == "non-finite"] == ["nan"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "memfit watch has nothing to watch"),
        (("none.jsonl",), "cannot read the record none.jsonl: there is no such file"),
        (("--json", "--", "true"), "--json is for a record"),
        (("--file", "x.jsonl", "none.jsonl"), "--file is for a command"),
        (("--file", "x", "--", "true"), "--file x is not a file name"),
        (("--limits", "none.toml", "--", "true"), "cannot read none.toml"),
    ],
)
def test_wrong_use_is_one_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("run.jsonl").exists()


def test_a_record_is_shown_live_until_its_training_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("memfit.cli.watch._PERIOD_S", 0.05)
    monkeypatch.setattr(
        "memfit.cli.watch.console", lambda: SafeConsole(file=screen, force_terminal=True, width=100)
    )
    path = Path("run.jsonl")
    path.write_bytes(b"".join(lines(3)))

    def go_on_once_shown() -> None:
        end_s = time.monotonic() + 60
        while "step 3" not in screen.getvalue() and time.monotonic() < end_s:
            time.sleep(0.05)
        with path.open("ab") as file:
            file.write(b'{"kind": "step", "step": 77, "time_s": 1.0}\n{"kind": "end", "time_s": 2.0}\n')

    threading.Thread(target=go_on_once_shown).start()
    assert main(["watch", "run.jsonl"]) == 0
    assert "step 3" in screen.getvalue()
    assert "step 77" in screen.getvalue()


def test_short_steps_are_written_together_and_none_is_lost_at_the_end(tmp_path: Path) -> None:
    file, model = tmp_path / "run.jsonl", torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mock.patch("memfit.monitoring.watch._WRITE_PERIOD_S", 3600.0), memfit.watch(file=file) as watch:
        for _ in range(5):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        assert len(read_records(file).ranks[0].steps) == 1  # the first is written at once
        assert watch.alarms == []
    assert [s.step for s in read_records(file).ranks[0].steps] == [1, 2, 3, 4, 5]
