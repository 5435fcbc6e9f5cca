"""Run one child process per rank of a plan, all on this machine, and watch over them."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from memfit.files.temporary import temporary_folder
from memfit.runtime.child_process import STOPPED, Child, Event, run
from memfit.runtime.interruption import NO_INTERRUPTION, Interruption
from memfit.runtime.stalls import Stall, StallWatch
from memfit.types.launch import RENDEZVOUS, LaunchConfig
from memfit.types.peer_errors import is_peer_error
from memfit.types.result import Measurement, OutcomeKind

GRACE_S: Final = 10.0  # time for the other ranks to report why they fail too
_TICK_S: Final = 0.2

OnEvent = Callable[[int, Event], None]


def run_ranks(
    config: LaunchConfig,
    *,
    on_event: OnEvent = lambda rank, event: None,
    interruption: Interruption = NO_INTERRUPTION,
) -> tuple[Measurement, ...]:
    """Run all ranks of the plan in ``config.spec``, one child process each, and return their measurements, in
    the order of the ranks. ``on_event(rank, event)`` is called with every event of a rank, from one thread
    per rank, and with ``(rank, {"event": "stalled", ...})`` if no rank makes progress (`StallWatch`).

    If a rank ends with another outcome than OK or interrupted, the other ranks wait in a collective. They end
    if the backend notices the closed connection, as gloo does. Those that have not ended `GRACE_S` (10)
    seconds later are killed, and their measurements have the outcome failed. The measurements of all failed
    ranks but the first have that rank in ``failed_after_rank`` (`name_first_failure`).

    Ranks that make no progress for too long are killed; the rank for which the others waited then counts as
    the first that failed. SIGTERM and SIGUSR1 that ``interruption`` has received go to rank 0, with which the
    others agree on a step to save at. After SIGTERM, ranks are killed that have not ended within its grace,
    and all at once if none has done a step. An interruption of this process by Ctrl-C, an error in
    ``on_event``, or an OSError of a rank that cannot be started kills all ranks and is raised.

    The ranks find each other through a file in a folder that only this user can read, so that no port is open
    for it, to this machine or others."""
    team = _Team(config, on_event, interruption)
    ranks, port = config.spec.plan.ranks, free_port()

    def one(rank: int) -> Measurement:
        rank_config = config
        if ranks > 1:
            env = {**config.env, **rank_env(rank, ranks, port)}
            files = {**config.files, RENDEZVOUS: str(meeting / "store")}
            rank_config = dataclasses.replace(config, env=env, files=files)
        with team.stopped_by_errors():
            measurement = run(
                rank_config, on_event=lambda event: team.hear(rank, event), child=team.children[rank]
            )
        team.ended(rank, measurement)
        return measurement

    with temporary_folder() as meeting, ThreadPoolExecutor(ranks + 1) as pool:
        watching = pool.submit(team.watch)
        try:
            # Also if interrupted: the pool waits for its threads, and these wait for their children.
            with team.stopped_by_errors():
                measurements = tuple(pool.map(one, range(ranks)))
        finally:
            team.done.set()
        watching.result()
    return name_first_failure(measurements, team.failures)


class _Team:
    """The child processes of a run. `watch` runs in a thread of its own until ``done`` is set."""

    def __init__(self, config: LaunchConfig, on_event: OnEvent, interruption: Interruption) -> None:
        spec = config.spec
        self.children = [Child() for _ in range(spec.plan.ranks)]
        self.failures: list[int] = []  # ranks in the order in which they failed
        self.done = threading.Event()
        self._has_trained = False
        self._on_event, self._interruption = on_event, interruption
        self._failed_s: float | None = None
        self._stalls = StallWatch(
            self.children,
            predicted_step_s=spec.predicted_step_s,
            limit_s=spec.stall_s,
            is_pipeline="pipeline" in spec.plan,
        )

    def hear(self, rank: int, event: Event) -> None:
        if event["event"] == "step":
            self._has_trained = True
            self._stalls.step_done(rank, time.monotonic())
        self._on_event(rank, event)

    def ended(self, rank: int, measurement: Measurement) -> None:
        if measurement.outcome not in (OutcomeKind.OK, OutcomeKind.INTERRUPTED):
            self.failures.append(rank)
            self._failed_s = self._failed_s or time.monotonic()

    def stop(self, reason: str, ranks: Sequence[int] | None = None) -> None:
        """Have ``ranks`` killed, None: all. ``reason``: why, in words."""
        for rank in range(len(self.children)) if ranks is None else ranks:
            self.children[rank].stop(reason)

    @contextlib.contextmanager
    def stopped_by_errors(self) -> Iterator[None]:
        """Have all ranks killed if the block raises an error."""
        try:
            yield
        except BaseException:
            self.stop(STOPPED)
            raise

    def watch(self) -> None:
        with self.stopped_by_errors():
            self._watch()

    def _watch(self) -> None:
        last_s = time.monotonic()
        while not self.done.wait(_TICK_S):
            now_s = time.monotonic()
            self._forward_signals()
            if self._failed_s is not None and now_s - self._failed_s > GRACE_S:
                self.stop(STOPPED)
            elif self._failed_s is None and (stall := self._stalls.poll(now_s - last_s)) is not None:
                self._report(stall)
            last_s = now_s

    def _forward_signals(self) -> None:
        for number in self._interruption.take():
            self.children[0].send(number)
        if self._interruption.is_terminating and not self._has_trained:  # there is nothing to save
            self.stop(self._interruption.too_early)
        if self._interruption.is_over:
            self.stop(self._interruption.too_late)

    def _report(self, stall: Stall) -> None:
        if stall.final:
            self.stop(f"ended after {stall.text}", stall.ranks)
            self.stop(STOPPED)
        stacks = {str(rank): text for rank, text in stall.stacks.items()}
        event = {
            "event": "stalled",
            "text": stall.text,
            "ranks": list(stall.ranks),
            "stacks": stacks,
            "final": stall.final,
        }
        self._on_event(stall.ranks[0], event)


def name_first_failure(
    measurements: tuple[Measurement, ...], failures: Sequence[int]
) -> tuple[Measurement, ...]:
    """Return the ranks' ``measurements``, which are in the order of the ranks, with the rank that failed
    first in ``failed_after_rank`` of all others that failed. ``failures``: the ranks that failed, in the
    order in which this was seen.

    Processes that die at nearly the same time may be seen in another order. So the first is one that ran out
    of memory, if any did; else one that was not stopped and whose error does not say that it lost another
    rank, if there is such a one."""
    if len(failures) < 2:
        return measurements

    def key(rank: int) -> tuple[bool, bool, bool, int]:
        m = measurements[rank]
        is_oom = m.outcome is OutcomeKind.OOM
        return not is_oom, m.reason == STOPPED, is_peer_error(m.reason), failures.index(rank)

    first = min(failures, key=key)
    return tuple(
        m if rank == first or rank not in failures else dataclasses.replace(m, failed_after_rank=first)
        for rank, m in enumerate(measurements)
    )


def rank_env(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets for a rank if all ``ranks`` are on one machine, and
    the one that makes gloo use the loopback interface. ``port`` is the TCP port on which rank 0 listens."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }


def free_port() -> int:
    """Return a TCP port of the loopback interface that is free now. It is not reserved."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
