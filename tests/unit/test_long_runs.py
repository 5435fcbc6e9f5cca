"""Long runs: which rank failed first, hangs, saves before a termination, restarts, old checkpoints."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies

from memfit.cli.run import RunOptions, checkpoint_settings, exit_code, lines, print_notice
from memfit.files.read import read_bytes
from memfit.jobs import checkpoints
from memfit.jobs.user_job import run_user_code
from memfit.runtime import stalls
from memfit.runtime.child_process import STOPPED, Child, Event
from memfit.runtime.heartbeat import HEARTBEAT, Beat, Heartbeat, read_beat
from memfit.runtime.interruption import Interruption
from memfit.runtime.ranks import run_ranks
from memfit.runtime.restart import StepLosses, run_with_restarts
from memfit.runtime.stalls import StallWatch, user_frame
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.launch import (
    RECORD_BYTES_PER_STEP,
    Checkpoint,
    CheckpointSettings,
    LaunchConfig,
    RunSpec,
)
from memfit.types.peer_errors import is_peer_error
from memfit.types.plan import Plan
from memfit.types.result import Estimate, Interval, Measurement, OutcomeKind, Restart, Run
from memfit.worker.save_requests import SaveRequests
from memfit.worker.train import _numbers
from memfit.workflows import single_run

GLOO = (
    "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:54918: "
    "Connection reset by peer"
)
TELL = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {source!r})
from memfit.runtime.heartbeat import Heartbeat
RANK, FOLDER = int(os.environ.get("RANK", "0")), Path(sys.argv[1])
def tell(kind, **fields):
    import json
    print(json.dumps({{"event": kind, "by": "memfit", **fields}}), flush=True)
def end(**fields):
    tell("result", measurement={{"outcome": "ok", **fields}})
""".format(source=str(Path(__file__).parents[2] / "src"))


def _spec(ranks: int = 1, **fields: Any) -> RunSpec:
    return RunSpec(
        name="x", role="run", job=JobRef(spec="x"), plan=Plan(ranks=ranks), seed=0, steps=9, **fields
    )


def _config(code: str, *, ranks: int, **fields: Any) -> LaunchConfig:
    argv = (sys.executable, "-c", TELL + code, "{dir}")
    return LaunchConfig(engine="test", argv=argv, env={}, files={}, spec=_spec(ranks, **fields))


# --- which rank failed first


def test_the_error_of_a_lost_connection_is_not_the_first_failure() -> None:
    code = f"""
tell("step", step=0, loss=1.0)
if RANK == 1:
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit({GLOO!r})  # seen before the death of rank 1
"""
    survivor, killed = run_ranks(_config(code, ranks=2))
    assert (killed.reason, killed.failed_after_rank) == ("killed by SIGKILL", None)
    assert survivor.reason == f"exit code 1: {GLOO}"
    assert survivor.failed_after_rank == 1


def test_a_warning_is_not_the_reason_of_a_kill() -> None:
    code = "print('a warning', file=sys.stderr, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    (killed,) = run_ranks(_config(code, ranks=1))
    assert killed.reason == "killed by SIGKILL"


def test_of_two_errors_the_earlier_one_is_the_first_failure() -> None:
    code = "time.sleep(0.7 * (1 - RANK))\nsys.exit(f'ValueError: {RANK}')"
    later, earlier = run_ranks(_config(code, ranks=2))
    assert (earlier.failed_after_rank, later.failed_after_rank) == (None, 1)


def test_a_reported_error_keeps_the_steps_before_it() -> None:
    code = """
tell("resumed", path="x", step=4)
tell("step", step=4, loss=1.5)
tell("result", measurement={"outcome": "failed", "reason": "not saved"})
"""
    (measured,) = run_ranks(_config(code, ranks=1))
    assert (measured.reason, measured.first_step, measured.steps_done) == ("not saved", 4, 1)
    assert measured.losses == (1.5,)


@pytest.mark.parametrize(
    "text",
    [
        GLOO,
        "Connection closed by peer [127.0.0.1]:1234",
        "[c10d] recvValue failed. Connection was likely closed. Did the remote server shutdown or crash?",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_a_lost_connection_to_another_rank_is_not_a_mistake_of_the_job(text: str) -> None:
    def fail() -> None:
        raise RuntimeError(text)

    assert is_peer_error(text)
    with pytest.raises(RuntimeError, match=re.escape(text)):
        run_user_code(fail, "job.py:job")


def test_other_errors_of_the_job_stay_mistakes() -> None:
    def fail() -> None:
        raise ConnectionResetError("Connection reset by peer")  # of the job's own data server

    with pytest.raises(UserError, match="raised ConnectionResetError"):
        run_user_code(fail, "job.py:job")


# --- restarts


def _ended(reason: str = "killed by SIGKILL", **fields: Any) -> Measurement:
    return Measurement(**{"outcome": OutcomeKind.FAILED, "reason": reason, "steps_done": 2, **fields})


OK = Measurement(outcome=OutcomeKind.OK, steps_done=9, peak_bytes=1)


def _through(
    attempts: Sequence[Sequence[Measurement]],
    tmp_path: Path,
    *,
    saves: Sequence[int] = (),
    prunes: bool = False,
    **keep: Any,
) -> tuple[Sequence[Measurement], list[RunSpec], list[str]]:
    """Run attempts that end as given; before the end of attempt i, a checkpoint of ``saves[i]`` steps is
    saved and, with ``prunes``, older ones are deleted."""
    specs: list[RunSpec] = []
    why: list[str] = []

    def start(spec: RunSpec, on_event: Callable[[int, Event], None]) -> Sequence[Measurement]:
        index = len(specs)
        specs.append(spec)
        if index < len(saves):
            _save(tmp_path, saves[index])
            if prunes:
                checkpoints.prune(tmp_path, 1)
        return attempts[index]

    def on_event(rank: int, event: Event) -> None:
        why.extend([str(event["why"])] if event["event"] == "restarted" else [])

    keep_settings = CheckpointSettings(**{"save": str(tmp_path), **keep})
    ends = run_with_restarts(_spec(len(attempts[0]), keep=keep_settings), start, on_event=on_event)
    return ends, specs, why


def _save(folder: Path, step: int) -> Path:
    said = Checkpoint(
        step=step, seed=0, job="x", plan="x", engine="native", ranks=1, shapes={}, optimizer="", state=(),
        files_bytes={},
    )  # fmt: skip
    return checkpoints.publish(checkpoints.begin(folder, step), said)


def test_the_first_failure_is_reported_and_all_ranks_restart(tmp_path: Path) -> None:
    survivor = _ended(f"exit code 1: {GLOO}", failed_after_rank=1)
    ends, specs, why = _through([[survivor, _ended()], [OK, OK]], tmp_path, saves=[2])
    assert why == ["rank 1: killed by SIGKILL"]
    expected = Restart(
        rank=1, reason="killed by SIGKILL", step=2, first_step=2, checkpoint=str(tmp_path / "step-00000002")
    )
    assert [m.restarts for m in ends] == [(expected,)] * 2
    assert specs[1].keep.resume == expected.checkpoint


def test_a_death_before_the_first_step_of_a_restart_restarts_again(tmp_path: Path) -> None:
    ends, _, why = _through([[_ended()], [_ended(steps_done=0)], [OK]], tmp_path)
    assert (ends[0].outcome, len(why)) == (OutcomeKind.OK, 2)


def test_a_rank_that_dies_before_it_resumed_had_done_the_steps_of_its_checkpoint(tmp_path: Path) -> None:
    ends, _, _ = _through([[_ended()], [_ended(steps_done=0)], [OK]], tmp_path, saves=[2])
    assert [(r.step, r.first_step) for r in ends[0].restarts] == [(2, 2), (2, 2)]


def test_a_run_restarts_also_when_the_checkpoint_that_it_resumed_from_is_pruned(tmp_path: Path) -> None:
    ends, specs, _ = _through([[_ended()], [_ended()], [OK]], tmp_path, saves=[2, 4], prunes=True)
    assert [(r.step, r.first_step) for r in ends[0].restarts] == [(2, 2), (2, 4)]
    assert specs[2].keep.resume == str(tmp_path / "step-00000004")


def test_a_run_goes_on_in_its_folder_after_its_newest_checkpoint_is_damaged(tmp_path: Path) -> None:
    _save(tmp_path, 2)
    (_save(tmp_path, 4) / checkpoints.ABOUT).write_text("{")
    keep = CheckpointSettings(save=str(tmp_path), resume=str(tmp_path))
    settled, _ = checkpoints.resolve_settings(keep, None, 9)
    assert (Path(settled.resume).name, len(settled.passed_over)) == ("step-00000002", 1)
    _save(tmp_path, 4)
    assert checkpoints.find(tmp_path)[1].step == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000004"]
    with pytest.raises(UserError, match="of another run"):
        checkpoints.resolve_settings(
            dataclasses.replace(keep, resume=str(tmp_path / "step-00000002")), None, 9
        )


def test_what_memfit_keeps_of_a_step_is_a_few_bytes() -> None:
    losses, count = StepLosses(), 20_000
    tracemalloc.start()
    try:
        for step in range(7, count):
            losses.add(step, step * 0.5)
        assert tracemalloc.get_traced_memory()[0] / count < 16
        series = _numbers()
        before = tracemalloc.get_traced_memory()[0]
        for step in range(count):
            series.append(step * 0.5)
        assert 6 * (tracemalloc.get_traced_memory()[0] - before) / count < RECORD_BYTES_PER_STEP
    finally:
        tracemalloc.stop()
    losses.add(9, -1.0)
    assert dict(losses) == {step: step * 0.5 for step in range(7, count)} | {9: -1.0}
    assert (len(losses), min(losses), losses.get(6)) == (count - 7, 7, None)


def test_a_link_or_a_file_where_a_save_is_written_neither_stops_it_nor_is_followed(tmp_path: Path) -> None:
    other, folder = tmp_path / "other", tmp_path / "kept"
    other.mkdir()
    folder.mkdir()
    (other / "file").write_text("precious")
    (folder / "step-00000001.partial").symlink_to(other)
    (folder / "step-00000002.partial").write_text("x")
    (folder / "step-00000003").symlink_to(other)
    (folder / "latest").symlink_to(other / "file")
    _save(folder, 3)
    assert checkpoints.find(folder)[1].step == 3
    assert not (folder / "step-00000003").is_symlink()
    assert [p.read_text() for p in other.iterdir()] == ["precious"]


@pytest.mark.parametrize("wrong", [{"step": -5}, {"ranks": 0}, {"seed": 2**70}, {"seed": -1}])
def test_a_checkpoint_with_impossible_numbers_is_refused(wrong: dict[str, int], tmp_path: Path) -> None:
    path = checkpoints.begin(tmp_path, 1)
    fields = {"step": 1, "seed": 0, "ranks": 1} | wrong
    said = Checkpoint(
        job="x", plan="x", engine="native", shapes={}, optimizer="", state=(), files_bytes={}, **fields
    )
    with pytest.raises(UserError, match=r"has step .*, ranks .* and seed "):
        checkpoints.about(checkpoints.publish(path, said))


def test_a_second_run_that_saves_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with (
        checkpoints.reserve(str(tmp_path)),
        pytest.raises(UserError, match="another run of memfit saves in "),
        checkpoints.reserve(str(tmp_path)),
    ):
        pass
    with checkpoints.reserve(str(tmp_path)):
        pass


def test_a_death_before_the_first_step_of_all_ends_the_run(tmp_path: Path) -> None:
    ends, _, why = _through([[_ended(steps_done=0)]], tmp_path)
    assert (ends[0].outcome, why) == (OutcomeKind.FAILED, [])


def test_each_new_checkpoint_allows_as_many_restarts_again(tmp_path: Path) -> None:
    deaths = [[_ended()]] * (2 * CheckpointSettings().restarts + 1)
    ends, _, why = _through(deaths, tmp_path, saves=[1])
    assert (ends[0].outcome, len(why)) == (OutcomeKind.FAILED, CheckpointSettings().restarts)
    other = tmp_path / "other"
    ends, _, why = _through([*deaths, [OK]], other, saves=[1, 2, 3, 4, 5, 6, 7])
    assert (ends[0].outcome, len(why)) == (OutcomeKind.OK, 2 * CheckpointSettings().restarts + 1)


def test_an_error_that_comes_again_in_the_same_step_is_not_tried_a_third_time(tmp_path: Path) -> None:
    error = _ended("exit code 1: ValueError: a bad sample")
    ends, _, why = _through([[error]] * 4, tmp_path)
    assert (ends[0].outcome, len(why)) == (OutcomeKind.FAILED, 1)


@pytest.mark.parametrize(
    "first",
    [
        Measurement(outcome=OutcomeKind.OOM, reason="out of memory", steps_done=2),
        Measurement(outcome=OutcomeKind.TIMEOUT, reason="time", steps_done=2),
        _ended("loss is nan at step 2", peak_bytes=5),
    ],
)
def test_what_would_happen_again_is_not_restarted(first: Measurement, tmp_path: Path) -> None:
    neighbour = _ended(GLOO, failed_after_rank=0)
    _, _, why = _through([[first, neighbour]], tmp_path)
    assert why == []


REFUSED = {"event": "refused", "given": "job.py:job raised ValueError: bad", "allowed": "", "hint": ""}


def _run_with(attempts: list[list[tuple[Event, ...]]], monkeypatch: pytest.MonkeyPatch, keep: str) -> Run:
    """Train in attempts whose ranks report these events, and then end by themselves or as they refused."""
    left = list(attempts)

    def run_ranks(config: LaunchConfig, *, on_event: Any, interruption: Any) -> Sequence[Measurement]:
        ends = []
        for rank, events in enumerate(left.pop(0)):
            for event in events:
                on_event(rank, event)
            is_refused = any(e["event"] == "refused" for e in events)
            ends.append(_ended(str(REFUSED["given"]), steps_done=1) if is_refused else OK)
        return ends

    monkeypatch.setattr(single_run, "run_ranks", run_ranks)
    monkeypatch.setattr(single_run, "render", lambda spec: None)
    none = Interval(value=0.0, low=0.0, high=0.0)
    estimate = Estimate(
        plan=Plan(ranks=2), allocated_bytes=none, phase_peak_bytes={}, at_peak_bytes={}, by_module_bytes={},
        step_s=None, flops_per_step=0,
    )  # fmt: skip
    spec = _spec(2, keep=CheckpointSettings(save=keep))
    return single_run.run_spec(spec, estimate, lambda *args: None, "x", strict=True)


STEP: Event = {"event": "step", "step": 0, "loss": 1.0}


def test_a_job_that_fails_before_its_first_step_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="raised ValueError"):
        _run_with([[(), (REFUSED,)]], monkeypatch, "")


def test_a_job_that_fails_later_is_tried_again_and_then_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing = [(STEP, REFUSED), (STEP,)]
    run = _run_with([failing, [(STEP,), (STEP,)]], monkeypatch, str(tmp_path))
    assert run.measurement.outcome is OutcomeKind.OK
    assert [r.reason for r in run.measurement.restarts] == [REFUSED["given"]]
    with pytest.raises(UserError, match="raised ValueError"):
        _run_with([failing, failing], monkeypatch, str(tmp_path / "again"))


# --- hangs


def test_a_stopped_rank_is_named_and_after_the_limit_the_run_is_ended() -> None:
    code = """
beat = Heartbeat(FOLDER / "heartbeat")
for step in range(3):
    beat.beat(step, "forward")
    tell("step", step=step, loss=1.0)
beat.beat(3, "forward")
if RANK == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(100)
"""
    events: list[Event] = []

    def on_event(rank: int, event: Event) -> None:
        events.extend([event] if event["event"] == "stalled" else [])

    begun = time.monotonic()
    waiting, stopped = run_ranks(_config(code, ranks=2, stall_s=4.0), on_event=on_event)
    assert time.monotonic() - begun < 60
    named, ended = events
    assert (named["final"], ended["final"]) == (False, True)
    assert str(named["text"]).endswith(
        "rank 1 in forward of step 3, stopped by a signal (SIGSTOP or a debugger)"
    )
    assert stopped.reason.startswith("ended after no progress for ")
    assert (waiting.reason, waiting.failed_after_rank) == (STOPPED, 1)


def test_a_rank_that_sleeps_in_its_own_code_is_named_with_its_line() -> None:
    code = """
import faulthandler
beat = Heartbeat(FOLDER / "heartbeat")
faulthandler.register(signal.SIGUSR2, file=open(FOLDER / "stacks.txt", "w"), all_threads=True)
beat.beat(0, "forward")
if RANK == 0:
    beat.beat(0, "backward")
time.sleep(100)
"""
    events: list[Event] = []
    run_ranks(
        _config(code, ranks=2, stall_s=3.0),
        on_event=lambda rank, event: events.append(event) if event["event"] == "stalled" else None,
    )
    assert "rank 1 in forward of step 0" in str(events[-1]["text"])
    stacks: Any = events[-1]["stacks"]
    assert all("<string>" in stacks[rank] for rank in ("0", "1"))


class _Paused(Child):
    """A child whose heartbeat a test writes."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        folder.mkdir()
        (folder / HEARTBEAT).touch()
        self.begin(folder, os.getpid())
        self.heart = Heartbeat(folder / HEARTBEAT)


@pytest.fixture
def children(tmp_path: Path) -> list[_Paused]:
    return [_Paused(tmp_path / str(rank)) for rank in range(2)]


def _trained(children: list[_Paused], watch: StallWatch, step_s: float) -> None:
    for step in range(3):
        for rank, child in enumerate(children):
            child.heart.beat(step, "forward")
            watch.step_done(rank, step * step_s)
    for child in children:
        child.heart.beat(3, "forward")
    assert watch.poll(0.2) is None


def _until_stall(watch: StallWatch, tick_s: float = 0.5) -> tuple[float, stalls.Stall]:
    for count in range(1, 10**5):
        if (stall := watch.poll(tick_s)) is not None:
            return count * tick_s, stall
    raise AssertionError("no stall")


def test_limits_follow_the_steps_seen(children: list[_Paused]) -> None:
    watch = StallWatch(children)
    _trained(children, watch, 10.0)
    children[0].heart.beat(3, "backward")
    watch.poll(0.5)
    named_s, stall = _until_stall(watch)
    assert 20.0 <= named_s + 0.5 <= 30.0  # within three steps
    assert (stall.ranks, stall.final) == ((1,), False)
    ended_s, stall = _until_stall(watch)
    assert named_s + ended_s == pytest.approx(300.0, abs=1.0)
    assert stall.final


def test_before_two_steps_the_predicted_step_counts(children: list[_Paused]) -> None:
    watch = StallWatch(children, predicted_step_s=4.0)
    for child in children:
        child.heart.beat(0, "forward")
    watch.poll(0.2)
    assert _until_stall(watch)[0] == 40.0


def test_starting_and_saving_may_take_long(children: list[_Paused]) -> None:
    watch = StallWatch(children, limit_s=5.0)
    _trained(children, watch, 0.1)
    for child in children:
        child.heart.beat(3, "save")
    watch.poll(0.2)
    assert _until_stall(watch)[0] == 600.0


def test_a_rank_that_is_stopped_while_it_saves_is_ended_at_the_limit_of_steps(
    children: list[_Paused], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = StallWatch(children, limit_s=5.0)
    _trained(children, watch, 0.1)
    for child in children:
        child.heart.beat(3, "save")
    watch.poll(0.2)
    monkeypatch.setattr(stalls, "_is_stopped", lambda child: child is children[1])
    named_s, stall = _until_stall(watch)
    assert (named_s, stall.ranks, stall.final) == (1.0, (1,), False)
    ended_s, stall = _until_stall(watch)
    assert (named_s + ended_s, stall.final) == (5.0, True)


def test_time_that_this_process_slept_is_no_time_without_progress(children: list[_Paused]) -> None:
    watch = StallWatch(children)
    _trained(children, watch, 0.1)
    assert watch.poll(10_000.0) is None  # the laptop was closed


def test_no_rank_is_accused_if_none_is_behind(children: list[_Paused]) -> None:
    watch = StallWatch(children)
    _trained(children, watch, 0.1)
    stall = _until_stall(watch)[1]
    assert stall.ranks == (0, 1)


def test_progress_after_a_stall_lets_a_later_one_be_named_again(children: list[_Paused]) -> None:
    watch = StallWatch(children)
    _trained(children, watch, 0.1)
    _until_stall(watch)
    for child in children:
        child.heart.beat(4, "forward")
    assert watch.poll(0.2) is None
    assert not _until_stall(watch)[1].final


def test_pauses_that_end_are_named_later_the_next_time(children: list[_Paused]) -> None:
    watch = StallWatch(children)
    _trained(children, watch, 0.1)
    assert _until_stall(watch)[0] == 2.0
    for _ in range(56):  # a pause of 30 seconds in all
        assert watch.poll(0.5) is None
    for child in children:
        child.heart.beat(4, "forward")
    watch.poll(0.5)
    assert _until_stall(watch)[0] == 45.0


STACK = """\
Thread 0x00007f (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 1 in wait
  File "/home/me/reader.py", line 3 in read

Current thread 0x00007a (most recent call first):
  File "/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 7 in _call_impl
  File "/home/me/train.py", line 31 in forward
"""


def test_the_users_line_is_that_of_the_main_thread() -> None:
    assert user_frame(STACK) == "train.py:31 in forward"
    assert not user_frame("")


def test_a_heartbeat_is_readable_and_needs_a_file(tmp_path: Path) -> None:
    file = tmp_path / HEARTBEAT
    Heartbeat(file).beat(1, "forward")
    assert read_beat(file) == Beat()
    file.touch()
    heart = Heartbeat(file)
    heart.beat(7, "backward")
    assert read_beat(file) == Beat(count=1, step=7, phase="backward")


def test_stack_traces_of_an_ended_run_are_stored_beside_its_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    event = {"event": "stalled", "text": "no progress", "stacks": {"0": STACK, "1": ""}, "final": True}
    print_notice(event, folder=tmp_path)
    (file,) = tmp_path.glob("stacks-*.txt")
    assert "train.py" in file.read_text()
    assert "rank 1\nno answer" in file.read_text()
    assert str(file) in capsys.readouterr().err
    print_notice({"event": "restarted", "why": "rank 1: killed", "restart": 2}, folder=tmp_path)
    assert capsys.readouterr().err == "memfit: rank 1: killed; restart 2\n"


# --- saves on SIGTERM and SIGUSR1


class _Store:
    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


@pytest.fixture
def handlers() -> Any:
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {n: signal.getsignal(n) for n in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


_SIGNALS = strategies.lists(
    strategies.tuples(
        strategies.integers(0, 2),  # rank
        strategies.integers(0, 30),  # at this turn
        strategies.sampled_from([signal.SIGUSR1, signal.SIGTERM]),
    ),
    max_size=4,
)


class _Ranks:
    """Three ranks that train. None completes a step that rank 0 has not begun, and a save waits for all."""

    def __init__(self) -> None:
        self.requests = [SaveRequests() for _ in range(3)]
        self.store = _Store()
        self.done = [0, 0, 0]
        self.saved: list[list[tuple[int, bool]]] = [[], [], []]  # after which steps, and whether it ended

    def turn(self, rank: int) -> None:
        """Let a rank complete its next step, unless it waits for others or has ended."""
        begun = self.done[0] + (not self._waits(0))
        if self._waits(rank) or self.done[rank] + 1 > begun:
            return
        self.done[rank] += 1
        self.requests[rank].exchange(self.done[rank], rank, self.store)
        if self.requests[rank].due(self.done[rank]):
            self.saved[rank].append((self.done[rank], self.requests[rank].ends(self.done[rank])))

    def _waits(self, rank: int) -> bool:
        own = self.saved[rank]
        if not own or own[-1][0] != self.done[rank]:
            return False
        return own[-1][1] or min(len(s) for s in self.saved) < len(own)


@pytest.mark.usefixtures("handlers")
@given(strategies.lists(strategies.integers(0, 2), min_size=60, max_size=60), _SIGNALS)
def test_all_ranks_save_after_the_same_steps(order: list[int], arrivals: Any) -> None:
    ranks = _Ranks()
    for turn, rank in enumerate([*order, *([0, 1, 2] * 40)]):
        for target, at, number in arrivals:
            if at == turn:
                ranks.requests[target]._receive(number, None)
        ranks.turn(rank)
    assert ranks.saved[0] == ranks.saved[1] == ranks.saved[2]
    assert bool(ranks.saved[0]) == bool(arrivals)
    is_terminated = any(number == signal.SIGTERM for _, _, number in arrivals)
    assert (bool(arrivals) and ranks.saved[0][-1][1]) == is_terminated


@pytest.mark.usefixtures("handlers")
def test_one_process_saves_at_once() -> None:
    requests = SaveRequests()
    requests.exchange(1, 0, None)
    assert not requests.due(1)
    os.kill(os.getpid(), signal.SIGUSR1)
    requests.exchange(2, 0, None)
    assert (requests.due(2), requests.ends(2)) == (True, False)
    requests.exchange(3, 0, None)
    assert not requests.due(3)
    os.kill(os.getpid(), signal.SIGTERM)
    requests.exchange(4, 0, None)
    assert (requests.due(4), requests.ends(4)) == (True, True)


@pytest.mark.usefixtures("handlers")
def test_processes_that_the_job_forks_die_of_sigterm() -> None:
    code = f"""{TELL.partition("from memfit")[0]}
from memfit.worker.save_requests import SaveRequests
from memfit.workflows import single_run
SaveRequests()
pid = os.fork()
if not pid:
    time.sleep(100)
time.sleep(0.2)
os.kill(pid, signal.SIGTERM)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGTERM)
"""
    assert (
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=60, check=False).returncode == 0
    )


OBEDIENT = """
tell("step", step=0, loss=1.0)
got = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda n, f: got.append(n))
tell("step", step=1, loss=1.0)
while not got and RANK == 0:
    time.sleep(0.05)
"""


def _interrupted(code: str, number: int, grace_s: float, folder: Path) -> tuple[Sequence[Measurement], float]:
    begun: list[float] = []

    def on_event(rank: int, event: Event) -> None:
        if event.get("step") == 1 and rank == 0:
            begun.append(time.monotonic())
            os.kill(os.getpid(), number)

    with Interruption(grace_s) as interruption:
        keep = CheckpointSettings(save=str(folder), grace_s=grace_s)
        ends = run_with_restarts(
            _spec(2, keep=keep),
            lambda spec, on: run_ranks(_config(code, ranks=2), on_event=on, interruption=interruption),
            on_event=on_event,
            interruption=interruption,
        )
    return ends, time.monotonic() - begun[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_of_the_command_reach_rank_0(number: int, tmp_path: Path) -> None:
    code = OBEDIENT + "end(reason=str(got))"
    ends, _ = _interrupted(code, number, 20.0, tmp_path)
    assert [m.outcome for m in ends] == [OutcomeKind.OK] * 2
    assert str(int(number)) in ends[0].reason or signal.Signals(number).name in ends[0].reason


def test_ranks_that_do_not_end_within_the_grace_are_killed_and_not_restarted(tmp_path: Path) -> None:
    code = OBEDIENT + "time.sleep(100)"
    ends, took_s = _interrupted(code, signal.SIGTERM, 1.0, tmp_path)
    assert took_s < 30
    assert ends[0].outcome is OutcomeKind.INTERRUPTED
    assert ends[0].reason == "stopped by SIGTERM; it did not save within 1 s; there is no checkpoint"
    assert ends[0].restarts == ()


def test_sigterm_before_the_first_step_ends_at_once_as_there_is_nothing_to_save(tmp_path: Path) -> None:
    code = OBEDIENT.replace('tell("step",', 'tell("begins",') + "time.sleep(100)"
    ends, took_s = _interrupted(code, signal.SIGTERM, 60.0, tmp_path)
    assert took_s < 30
    assert ends[0].outcome is OutcomeKind.INTERRUPTED
    assert ends[0].reason == "stopped by SIGTERM before the first step; there is no checkpoint"


def test_outside_its_block_signals_do_as_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption(1.0):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def _run(measurement: Measurement, keep: CheckpointSettings, ranks: int = 2) -> Run:
    return Run(
        spec=_spec(ranks, keep=keep),
        predicted_peak_bytes=None,
        predicted_phase_peak_bytes={},
        predicted_step_s=None,
        measurement=measurement,
    )


def test_the_exit_code_says_whether_an_interrupted_run_can_be_resumed(tmp_path: Path) -> None:
    keep = CheckpointSettings(save=str(tmp_path))
    interrupted = _run(Measurement(outcome=OutcomeKind.INTERRUPTED, reason="stopped by SIGTERM"), keep)
    assert exit_code(interrupted) == 143
    _save(tmp_path, 3)
    assert exit_code(interrupted) == 75
    assert exit_code(_run(OK, keep)) == 0
    assert exit_code(_run(_ended(), keep)) == 1


def test_the_summary_lists_the_restarts(tmp_path: Path) -> None:
    restart = Restart(
        rank=1, reason="killed by SIGKILL", step=7, first_step=4, checkpoint="run/step-00000004"
    )
    run = _run(dataclasses.replace(OK, restarts=(restart,)), CheckpointSettings(save=str(tmp_path)))
    assert "  restart after rank 1: killed by SIGKILL, in step 7; from run/step-00000004" in list(lines(run))


# --- old checkpoints


def test_only_the_newest_complete_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        _save(tmp_path, step)
    (tmp_path / "step-00000008" / checkpoints.ABOUT).unlink()  # the newest is damaged
    deleted = checkpoints.prune(tmp_path, 2)
    assert [p.name for p in deleted] == ["step-00000002"]
    assert checkpoints.find(tmp_path)[1].step == 6
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [
        "step-00000004", "step-00000006", "step-00000008",
    ]  # fmt: skip


def test_keep_last_needs_a_folder_to_save_in() -> None:
    with pytest.raises(UserError, match="--keep-last needs --save"):
        checkpoint_settings(RunOptions(keep_last=2))
    assert checkpoint_settings(RunOptions(keep_last=2, save=Path("x"))).keep_last == 2


def test_a_small_file_is_read_in_little_memory(tmp_path: Path) -> None:
    """Checkpoints are resumed under the memory cap of the run."""
    file = tmp_path / "memfit.json"
    file.write_text("{}")
    tracemalloc.start()
    try:
        assert read_bytes(file) == b"{}"
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert read_bytes(Path("/proc/self/status"))  # its size is said to be 0
    with pytest.raises(UserError, match="too large"):
        read_bytes(file, most_bytes=1)
