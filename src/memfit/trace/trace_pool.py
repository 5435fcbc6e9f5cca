"""Run independent traces in parallel, each in a forked copy of this process."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from memfit.runtime.child_process import die_with_parent

_T = TypeVar("_T")
Tell = Callable[[int, int], None]


def side_by_side(
    calls: Sequence[Callable[[], _T]],
    tell: Tell = lambda done, index: None,
    results: dict[int, _T] | None = None,
) -> list[_T]:
    """Return the results of the calls, in order. If calls raise exceptions, raise that of the first such call
    in the list; if calls run in forked processes, only after all of them have ended.

    ``tell(done, index)`` is called whenever a call begins or ends: ``done`` calls are finished, and call
    ``index`` is running (or, if none is running, has just ended). ``results`` receives each result by the
    index of its call as soon as it is known, for callers that may be interrupted.

    A forked process needs no imports and no picklable job, but forking is safe only on Linux, without other
    threads and without initialised CUDA. Otherwise, with one CPU core or one call, and inside a daemon
    process such as a forked one, the calls run one after the other in this process and stop at the first
    exception. Else as many processes are forked as there are CPU cores, at most one for each call. Each makes
    several calls one after another, so that what torch loads and caches for the first serves the others.
    Every second process takes calls from the end of the list, so put calls with the least in common first and
    last.

    If a forked process is killed, or if no faithful copy of its exception can be sent here, its call runs in
    this process. If autograd refuses to run in a forked process, all calls run in this process, and so do
    those of later calls of this function.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    results = {} if results is None else results
    if min(len(calls), cores) < 2 or _REFUSED or not _may_fork():
        return _one_by_one(calls, tell, results)
    queue, index_by_channel = list(range(len(calls))), dict[Connection, int]()
    outcomes: dict[int, tuple[bool, Any]] = {}
    processes = [_copy(calls) for _ in range(min(cores, len(calls)))]
    idle_channels = [channel for channel, _ in processes]
    end_channels = set(idle_channels[1::2])
    try:
        while queue or index_by_channel:
            while queue and idle_channels:
                channel = idle_channels.pop(0)
                index_by_channel[channel] = queue.pop(-1 if channel in end_channels else 0)
                channel.send(index_by_channel[channel])
                tell(len(outcomes), index_by_channel[channel])
            for ready_channel in [c for c in wait(list(index_by_channel)) if isinstance(c, Connection)]:
                index = index_by_channel.pop(ready_channel)
                outcome: tuple[bool, Any] | None = None
                with contextlib.suppress(EOFError):
                    outcome = ready_channel.recv()
                if outcome is None:  # it has ended: run the call here, where the error is visible
                    outcome = _outcome(calls[index])
                    processes.append(_copy(calls))
                    idle_channels.append(processes[-1][0])
                else:
                    idle_channels.append(ready_channel)
                outcomes[index] = outcome
                results.update({index: outcome[1]} if outcome[0] else {})
                if _no_backward(*outcome):
                    _REFUSED.append(str(outcome[1]))
                    return _one_by_one(calls, tell, results)
                tell(len(outcomes), next(iter(index_by_channel.values()), index))
    finally:
        for channel, process in processes:
            channel.close()
            process.terminate()
            process.join()
    for index in sorted(outcomes):
        is_ok, value = outcomes[index]
        if not is_ok:
            raise value
    return [outcomes[i][1] for i in range(len(calls))]


_REFUSED: list[str] = []  # autograd's message from a forked process; later calls then do not fork


def _one_by_one(calls: Sequence[Callable[[], _T]], tell: Tell, results: dict[int, _T]) -> list[_T]:
    for index, call in enumerate(calls):
        tell(index, index)
        results[index] = call()
        tell(index + 1, index)
    return [results[index] for index in range(len(calls))]


def _no_backward(is_ok: bool, value: Any) -> bool:
    """Return whether a call in a forked process, with the outcome ``is_ok``, ``value`` (`_outcome`), failed
    because autograd has device threads (CUDA builds). No backward can then run in a forked process after one
    has run in the original process."""
    return not is_ok and isinstance(value, RuntimeError) and "fork-based multiprocessing" in str(value)


def _copy(calls: Sequence[Callable[[], Any]]) -> tuple[Connection, Any]:
    """Fork a process. Return (connection, process). The connection takes the index of a call and gives back
    (True, its result) or (False, its exception). If the exception cannot be sent faithfully, the process ends
    without an answer."""
    context = multiprocessing.get_context("fork")
    parent_end, child_end = context.Pipe()
    process = context.Process(target=_answer, args=(calls, child_end, os.getpid()), daemon=True)
    process.start()
    child_end.close()
    return parent_end, process


def _answer(calls: Sequence[Callable[[], Any]], channel: Connection, parent: int) -> None:
    die_with_parent(parent)
    # Ctrl-C is handled by the original process, which ends its copies by SIGTERM
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)  # the original's threads do not exist in a copy
    gc.freeze()  # objects of the original stay: collect only what the calls leave
    while True:
        try:
            index = channel.recv()
        except EOFError:
            return
        outcome = _outcome(calls[index])
        if not outcome[0] and not _has_faithful_copy(outcome[1]):
            return  # the original process makes this call again
        channel.send(outcome)
        del outcome
        gc.collect()


def _outcome(call: Callable[[], Any]) -> tuple[bool, Any]:
    """Return (True, the result of the call) or (False, its exception)."""
    try:
        return True, call()
    except Exception as error:  # noqa: BLE001  any error: it is raised in the original process
        return False, error


def _has_faithful_copy(error: Exception) -> bool:
    """Return whether pickle copies the exception with its class and message. It does not if, for example, the
    constructor of the class takes other arguments than it passes on to that of Exception."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  any error of the methods of the user's class
        return False
    return type(copy) is type(error) and str(copy) == str(error)


def _may_fork() -> bool:
    return (
        sys.platform == "linux"
        and all(
            t is threading.main_thread() or getattr(t, "safe_to_fork", False) for t in threading.enumerate()
        )
        and not torch.cuda.is_initialized()
        and not multiprocessing.current_process().daemon
    )
