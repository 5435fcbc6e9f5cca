"""Run one child process per rank of a plan, all on this machine."""

from __future__ import annotations

import dataclasses
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from memfit.files.temporary import temporary_folder
from memfit.runtime.child_process import Event, run
from memfit.types.launch import RENDEZVOUS, LaunchConfig
from memfit.types.result import Measurement, OutcomeKind

GRACE_S: Final = 60.0  # time for the other ranks to report why they fail too


def run_ranks(
    config: LaunchConfig, *, on_event: Callable[[int, Event], None] = lambda rank, event: None
) -> tuple[Measurement, ...]:
    """Run all ranks of the plan, one child process each, and return their measurements, in the order of the
    ranks. ``on_event(rank, event)`` is called with every event of a rank, from one thread per rank.

    If a rank ends with another outcome than OK, the other ranks wait in a collective. They end if the backend
    notices the closed connection, as gloo does. Those that have not ended `GRACE_S` (60) seconds later are
    killed, and their measurements have the outcome failed. An interruption of this process, or an error in
    ``on_event``, kills all ranks and is raised.

    The ranks find each other through a file in a folder that only this user can read, so that no port is open
    for it, to this machine or others."""
    ranks, port, stop = config.spec.plan.ranks, free_port(), threading.Event()
    timers: list[threading.Timer] = []

    def one(rank: int) -> Measurement:
        env = {**config.env, **rank_env(rank, ranks, port)}
        files = {**config.files, RENDEZVOUS: str(meeting / "store")}
        rank_config = dataclasses.replace(config, env=env, files=files)
        measurement = run(rank_config, on_event=lambda event: on_event(rank, event), stop=stop)
        if measurement.outcome is not OutcomeKind.OK:
            timers.append(threading.Timer(GRACE_S, stop.set))
            timers[-1].start()
        return measurement

    with temporary_folder() as meeting, ThreadPoolExecutor(ranks) as pool:
        try:
            return tuple(pool.map(one, range(ranks)))
        # Including interruptions: the pool waits for its threads, and these wait for their children.
        except BaseException:
            stop.set()
            raise
        finally:
            for timer in timers:
                timer.cancel()


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
