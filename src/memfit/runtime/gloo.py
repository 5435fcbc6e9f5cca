"""gloo's threads on the CPU: find them, and ask the system to run them first.

A collective runs on a thread of gloo while the program continues. That thread may hold tensors, its own or
those it received, after it has reported that the collective is done. How long depends on the operating
system, so peaks of the same training differ between runs by what was still held. A GPU has no such thread.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

RUNS, _SENDS = "pt_gloo_runloop", "gloo_tcp_loop"  # names that torch and gloo give their threads
_PATIENCE_S = 5e-4


def gloo_threads(*names: str) -> list[int]:
    """Return the operating system's IDs of this process's threads that have one of ``names``; [] if there are
    none, or if the system does not list threads in /proc."""
    tasks, ids = Path("/proc/self/task"), list[int]()
    for task in tasks.iterdir() if tasks.exists() else ():
        with contextlib.suppress(OSError):  # the thread has ended in the meantime
            if (task / "comm").read_text().strip() in names:
                ids.append(int(task.name))
    return ids


@contextlib.contextmanager
def gloo_first(settle: bool = True, *, patient: bool = False) -> Iterator[Callable[[], bool]]:
    """Yield a function without arguments. It asks the system to run gloo's current threads before others
    whenever they are ready (real-time scheduling), and returns whether the system agreed for all of them. It
    returns False if the user has no permission, and if there are no such threads. When the context ends,
    gloo's threads get ordinary scheduling again. If ``settle`` is False, the function asks for nothing and
    returns False.

    With ``patient``, waiting for a collective takes half a millisecond longer inside the context, and gathers
    run one after the other. This makes memory measurements accurate and time measurements inaccurate."""

    def ask() -> bool:
        threads = gloo_threads(RUNS, _SENDS)
        return settle and bool(threads) and all(_schedule(t, os.SCHED_FIFO, 1) for t in threads)

    try:
        with _patient() if patient else contextlib.nullcontext():
            yield ask
    finally:
        for thread in gloo_threads(RUNS, _SENDS) if settle else ():
            _schedule(thread, os.SCHED_OTHER, 0)


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """Inside this context, waiting for a collective takes half a millisecond longer, so that a gloo thread
    that has reported completion can free what it holds. Without this, threads on several cores race, whatever
    their priority.

    A call that starts a gather into one tensor, as ZeRO makes, returns only when the gather is complete.
    Gathers thus run one after the other, as the memory prediction assumes, and not two at a time on two
    threads."""
    import torch.distributed as dist
    from torch.distributed import _functional_collectives as functional

    waits, gathers, tensor_waits = dist.Work.wait, dist.ProcessGroup._allgather_base, functional.wait_tensor

    def wait(work: Any, *args: Any) -> Any:
        result = waits(work, *args)
        time.sleep(_PATIENCE_S)
        return result

    def wait_tensor(tensor: Any) -> Any:
        result = tensor_waits(tensor)  # type: ignore[no-untyped-call]
        time.sleep(_PATIENCE_S)
        return result

    def gather(group: Any, *args: Any) -> Any:
        work = gathers(group, *args)
        while not work.is_completed():
            time.sleep(_PATIENCE_S)
        return work

    with (
        mock.patch.object(dist.Work, "wait", wait),
        mock.patch.object(dist.ProcessGroup, "_allgather_base", gather),
        mock.patch.object(functional, "wait_tensor", wait_tensor),
    ):
        yield


def _schedule(thread: int, policy: int, priority: int) -> bool:
    try:
        os.sched_setscheduler(thread, policy, os.sched_param(priority))
    except OSError:
        return False
    return True
