"""Notice that the ranks of a run make no progress, and name the rank for which the others wait.

All ranks of a run wait for each other in collectives. If one hangs, the others stop soon after. So the run
stalls when no rank moves, and the rank that hangs is one that is stopped, or else one that is behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import psutil

from memfit.runtime.child_process import Child
from memfit.runtime.heartbeat import HEARTBEAT, STACKS, Beat, read_beat
from memfit.types.units import format_seconds

_SEEN_STEPS: Final = 20  # steps whose longest is what a step is expected to take
_NAMED_AFTER_STEPS, _NAMED_AFTER_S = 2.0, 2.0
_STOPPED_AFTER_S: Final = 1.0  # of processes that are stopped, which the system says
_PAUSE_FACTOR: Final = 1.5  # over the longest pause that was named before and ended
_ENDED_AFTER_STEPS, _ENDED_AFTER_S = 20.0, 300.0
_OUTSIDE_NAMED_S, _OUTSIDE_ENDED_S = 600.0, 1800.0  # outside steps: start, resume, save, evaluate
_IN_STEPS: Final = ("data", "between", "forward", "backward", "optimizer")
_MOST_PER_POLL_S: Final = 1.0  # longer gaps are those of this process or of a machine that slept
_STACKS_WAIT_S: Final = 1.0
_FRAME: Final = re.compile(r'  File "(?P<file>.+)", line (?P<line>\d+) in (?P<name>.+)')


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """No rank has begun another phase of a step for ``idle_s`` seconds. ``ranks``: those that the others wait
    for, as far as known; all running ones if none of them is behind. ``text``: a description in words.
    ``stacks``: rank -> stack traces of its threads, for all running ranks; "" for one that did not answer.
    ``final``: whether the run is to be ended."""

    idle_s: float
    ranks: tuple[int, ...]
    text: str
    stacks: Mapping[int, str]
    final: bool


class StallWatch:
    """Watches the ``children`` of a run, one per rank. Call `step_done` for each step that a rank reports,
    and `poll` several times a second.

    ``limit_s``: seconds without progress in a step after which the run is ended; None: 20 times the longest
    of the last 20 steps of each rank, at least 5 minutes. Until a rank has done two steps, 5 times
    ``predicted_step_s`` counts as the longest; 10 minutes if that is None (unknown). Outside steps (start,
    resume, save, evaluate) it is half an hour, or ``limit_s`` if that is longer, unless a rank is stopped by
    a signal.
    ``is_pipeline``: whether the ranks are stages of a pipeline."""

    def __init__(
        self,
        children: Sequence[Child],
        *,
        predicted_step_s: float | None = None,
        limit_s: float | None = None,
        is_pipeline: bool = False,
    ) -> None:
        self._children, self._limit_s, self._is_pipeline = children, limit_s, is_pipeline
        self._predicted_s = predicted_step_s
        self._beats: dict[int, Beat] = {}
        self._idle_s: dict[int, float] = {}
        self._last_step: dict[int, float] = {}
        self._intervals: deque[float] = deque(maxlen=_SEEN_STEPS * len(children))
        self._named = False
        self._last_idle_s = self._longest_pause_s = 0.0

    def step_done(self, rank: int, now_s: float) -> None:
        """Note that ``rank`` reported a step at ``now_s``, in seconds of a monotonic clock."""
        if rank in self._last_step:
            self._intervals.append(now_s - self._last_step[rank])
        self._last_step[rank] = now_s

    def poll(self, passed_s: float) -> Stall | None:
        """Return the stall if there is one to report, else None. A stall is reported once when it has lasted
        for two of the longest steps and at least 2 s (10 minutes outside steps; 1 s if a rank is stopped by a
        signal; longer than pauses that were reported before), and at every call from when the run is to be
        ended. ``passed_s``: seconds since the last call. A call that reports takes up to a second, in which
        the ranks write their stack traces."""
        running = {r: c for r, c in enumerate(self._children) if c.pid is not None}
        for rank, child in running.items():
            beat = read_beat(child.folder / HEARTBEAT) if child.folder is not None else Beat()
            moved = beat.count != self._beats.get(rank, Beat(count=-1)).count
            self._idle_s[rank] = 0.0 if moved else self._idle_s[rank] + min(passed_s, _MOST_PER_POLL_S)
            self._beats[rank] = beat
        idle_s = min((self._idle_s[r] for r in running), default=0.0)
        if idle_s < _STOPPED_AFTER_S:
            if self._named:  # it was a pause
                self._longest_pause_s = max(self._longest_pause_s, self._last_idle_s)
            self._named = False
            return None
        self._last_idle_s = idle_s
        stopped = tuple(r for r, child in running.items() if _is_stopped(child))
        named_s, ended_s = self._limits(running, is_known=bool(stopped))
        is_final = idle_s >= ended_s
        if not is_final and (self._named or (idle_s < named_s and not stopped)):
            return None
        self._named = True
        return self._stall(running, stopped, idle_s, is_final=is_final)

    def _limits(self, running: Mapping[int, Child], *, is_known: bool) -> tuple[float, float]:
        """Return (seconds without progress after which the rank is named; those after which the run is to be
        ended). Outside steps they are longer, unless the reason of the stall ``is_known``: a rank is
        stopped."""
        is_outside = any(self._beats[r].phase not in _IN_STEPS for r in running)
        if is_outside and not is_known:
            return _OUTSIDE_NAMED_S, max(_OUTSIDE_ENDED_S, self._limit_s or 0.0)
        if self._intervals:
            step_s = max(self._intervals)
        elif self._predicted_s is not None:
            step_s = 5 * self._predicted_s  # of a step that also compiles and loads
        else:
            step_s = _OUTSIDE_NAMED_S
        ended_s = self._limit_s or max(_ENDED_AFTER_S, _ENDED_AFTER_STEPS * step_s)
        named_s = max(_NAMED_AFTER_S, _NAMED_AFTER_STEPS * step_s, _PAUSE_FACTOR * self._longest_pause_s)
        return min(ended_s, named_s), ended_s

    def _stall(
        self, running: Mapping[int, Child], stopped: tuple[int, ...], idle_s: float, *, is_final: bool
    ) -> Stall:
        stacks = _stacks({r: c for r, c in running.items() if r not in stopped})
        suspects = stopped or self._behind(tuple(running), stacks)
        where = "; ".join(self._where(rank, rank in stopped, stacks.get(rank, "")) for rank in suspects)
        return Stall(
            idle_s=idle_s,
            ranks=suspects,
            text=f"no progress for {format_seconds(idle_s)}: {where}",
            stacks={r: stacks.get(r, "") for r in running},
            final=is_final,
        )

    def _behind(self, running: tuple[int, ...], stacks: Mapping[int, str]) -> tuple[int, ...]:
        """Return the ranks that have made the fewest beats (`Heartbeat`), or in a pipeline, are in the
        earliest step. Of several, return those whose main thread is known not to be inside a collective, if
        there are any."""
        progress = {r: self._beats[r].step if self._is_pipeline else self._beats[r].count for r in running}
        last = tuple(r for r in running if progress[r] == min(progress.values()))
        outside = tuple(r for r in last if stacks.get(r) and "torch/distributed/" not in _main(stacks[r]))
        return outside or last

    def _where(self, rank: int, is_stopped: bool, stack: str) -> str:
        beat = self._beats[rank]
        phase = f"before step {beat.step}" if beat.phase == "between" else f"{beat.phase} of step {beat.step}"
        text = f"rank {rank} in {phase}" if beat.phase != "between" else f"rank {rank} {phase}"
        if is_stopped:
            return f"{text}, stopped by a signal (SIGSTOP or a debugger)"
        return text + (f", at {place}" if (place := user_frame(stack)) else "")


def user_frame(stack: str) -> str:
    """Return file, line and function of the main thread's innermost call that is neither in the standard
    library nor in an installed package nor in memfit, such as "train.py:31 in forward"; "" if there is none.
    ``stack``: stack traces of all threads as faulthandler writes them."""
    own_folder = str(Path(__file__).parents[1])
    for frame in _FRAME.finditer(_main(stack)):
        file = frame["file"]
        is_library = "site-packages" in file or file.startswith((own_folder, "<")) or "/lib/python" in file
        if not is_library:
            return f"{Path(file).name}:{frame['line']} in {frame['name']}"
    return ""


def _main(stack: str) -> str:
    """Return the part of a dump of faulthandler about the main thread, which comes last."""
    return re.split(r"^(?:Current thread|Thread) .*$", stack, flags=re.MULTILINE)[-1]


def _is_stopped(child: Child) -> bool:
    pid = child.pid
    with contextlib.suppress(psutil.Error):
        return pid is not None and psutil.Process(pid).status() in {
            psutil.STATUS_STOPPED,
            psutil.STATUS_TRACING_STOP,
        }
    return False


def _stacks(children: Mapping[int, Child]) -> dict[int, str]:
    """Send SIGUSR2 to the children, which then write stack traces of their threads, and return those that
    arrive within about a second: rank -> text, "" or missing for a child that did not answer."""
    files = {r: folder / STACKS for r, c in children.items() if (folder := c.folder) is not None}
    sizes = {r: size for r, file in files.items() if (size := _size(file)) is not None}
    files = {r: files[r] for r in sizes}  # without the file, the signal would end the process
    for rank in files:
        children[rank].send(signal.SIGUSR2)
    deadline_s = time.monotonic() + _STACKS_WAIT_S
    while time.monotonic() < deadline_s and any(_size(file) == sizes[r] for r, file in files.items()):
        time.sleep(_STACKS_WAIT_S / 20)
    time.sleep(_STACKS_WAIT_S / 20)  # for dumps that are being written
    result = {}
    for rank, file in files.items():
        with contextlib.suppress(OSError):
            result[rank] = file.read_text(encoding="utf-8", errors="replace")[sizes[rank] :]
    return result


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None
