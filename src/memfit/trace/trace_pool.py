"""Run independent traces in parallel, in forked workers of this process."""

from __future__ import annotations

import contextlib
import gc
import io
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import threadpoolctl
import torch

from memfit.runtime.child_process import die_with_parent
from memfit.types.deadline import Deadline

_T = TypeVar("_T")
Progress = Callable[[int, int], None]


class ForkedWorkers:
    """Forked workers of this process that stay for later calls of `run_parallel`, so that later calls find
    what earlier ones have imported and what torch has cached.

    ``owner``: the object whose methods are called. It is not sent to a worker, which has a copy of it from
    the moment at which it was forked. All else in a call must be picklable. The workers end with `end`, when
    the owner is freed, or with this process.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = weakref.ref(owner)
        self.processes: dict[Connection, Any] = {}
        self._finalizer = weakref.finalize(owner, _end, self.processes)

    @property
    def owner(self) -> Any:
        return self._owner()

    def end(self) -> None:
        """End the workers; the next call of `run_parallel` forks new ones."""
        _end(self.processes)

    def grow(self, count: int) -> list[Connection]:
        """Fork workers until there are at least ``count``. Return the connections of all."""
        while len(self.processes) < count:
            self.add()
        return list(self.processes)

    def add(self) -> Connection:
        """Fork a worker and return its connection. The worker takes messages (see `message`) and answers each
        by (True, the result of the call) or (False, its exception). If a result cannot be pickled, or an
        exception not faithfully (`_has_faithful_copy`), the worker ends without an answer."""
        context = multiprocessing.get_context("fork")
        parent_end, child_end = context.Pipe()
        inherited = [parent_end, *self.processes]
        arguments = self._call, child_end, inherited, os.getpid()
        process = context.Process(target=_answer, args=arguments, daemon=True)
        process.start()
        child_end.close()
        self.processes[parent_end] = process
        return parent_end

    def remove(self, channel: Connection) -> None:
        """End the worker with the connection ``channel``."""
        _end({channel: self.processes.pop(channel)})

    def message(self, calls: Sequence[Callable[[], Any]], index: int) -> Any:
        """Return what is sent to a worker so that it makes the call ``calls[index]``: the pickled call, in
        which the owner is left out. Raises what pickle raises for a call that cannot be pickled."""
        buffer = io.BytesIO()
        _OwnerPickler(buffer, self.owner).dump(calls[index])
        return buffer.getvalue()

    def _call(self, message: Any) -> Callable[[], Any]:
        """Return the call that ``message`` (see `message`) stands for. Runs in a worker."""
        call: Callable[[], Any] = _OwnerUnpickler(io.BytesIO(message), self.owner).load()
        return call


class _WorkersOfCalls(ForkedWorkers):
    """Forked workers for certain calls only, which need not be picklable."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        super().__init__(self)
        self._calls = calls

    def message(self, calls: Sequence[Callable[[], Any]], index: int) -> int:
        return index

    def _call(self, message: Any) -> Callable[[], Any]:
        call: Callable[[], Any] = self._calls[message]
        return call


def _end(processes: dict[Connection, Any]) -> None:
    for channel, process in processes.items():
        channel.close()
        process.terminate()
        process.join()
        process.close()
    processes.clear()


class _OwnerPickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, owner: Any) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._owner = owner

    def persistent_id(self, value: Any) -> str | None:
        return "owner" if value is self._owner else None


class _OwnerUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, owner: Any) -> None:
        super().__init__(file)
        self._owner = owner

    def persistent_load(self, name: Any) -> Any:
        return self._owner


def run_parallel(
    calls: Sequence[Callable[[], _T]],
    progress: Progress = lambda done, index: None,
    results: dict[int, _T] | None = None,
    *,
    workers: ForkedWorkers | None = None,
    deadline: Deadline | None = None,
) -> list[_T]:
    """Return the results of the calls, in order. If calls raise exceptions, raise that of the first such call
    in the list; if calls run in forked processes, only after all of them have ended.

    ``progress(done, index)`` is called whenever a call begins or ends: ``done`` calls are finished, and call
    ``index`` is running (or, if none is running, has just ended). ``results`` receives each result by the
    index of its call as soon as it is known, for callers that may be interrupted. ``workers``: the calls are
    made by these forked processes, which stay; None: by new ones, which end. ``deadline``: when it has
    passed, forked processes are ended, and TimeUp is raised unless all calls are finished; None: none. A call
    that runs in this process is finished first. Where this process is itself a forked one, ``deadline`` has
    no effect; the original process ends it.

    A forked process needs no imports, and without ``workers`` no picklable job, but forking is safe only on
    Linux, without other threads and without initialised CUDA. Where it is not safe, inside a daemon process
    such as a forked one, with one CPU core, and for a single call, the calls run one after the other in this
    process and stop at the first exception. (A single call is nevertheless made by a forked process if there
    is a ``deadline``, or on several cores if ``workers`` has processes already.) Else as many processes are
    forked as there are CPU cores, at most one for each call. Each makes several calls one after another, so
    that what torch loads and caches for the first serves the others. Every second process takes calls from
    the end of the list, so put calls with the least in common first and last.

    If a forked process is killed, or if its result or a faithful copy of its exception cannot be sent here,
    its call runs in this process. If autograd refuses to run in a forked process, all calls run in this
    process, and so do those of later calls of this function.
    """
    results = {} if results is None else results
    deadline = deadline or Deadline()
    if not _is_worth(len(calls), workers, deadline) or _REFUSED or not _may_fork():
        return _one_by_one(calls, progress, results, deadline)
    pool, outcomes = workers or _WorkersOfCalls(calls), dict[int, tuple[bool, Any]]()
    try:
        for index, outcome in _outcomes(calls, pool, min(_cores(), len(calls)), progress, deadline):
            outcomes[index] = outcome
            results.update({index: outcome[1]} if outcome[0] else {})
            if not outcome[0] and is_fork_refused(outcome[1]):
                _REFUSED.append(str(outcome[1]))
                break
    finally:
        if workers is None or len(outcomes) < len(calls):  # some may still be at work
            pool.end()
    if _REFUSED:
        return _one_by_one(calls, progress, results, deadline)
    for index in sorted(outcomes):
        is_ok, value = outcomes[index]
        if not is_ok:
            raise value
    return [outcomes[i][1] for i in range(len(calls))]


def from_both_ends(items: Sequence[_T]) -> list[_T]:
    """Return the items in another order: those at even indices, then those at odd indices backwards. Two
    processes of `run_parallel`, of which one takes calls from the start and one from the end, so begin with
    the first items."""
    return [*items[::2], *items[1::2][::-1]]


def _outcomes(
    calls: Sequence[Callable[[], Any]],
    pool: ForkedWorkers,
    count: int,
    progress: Progress,
    deadline: Deadline,
) -> Iterator[tuple[int, tuple[bool, Any]]]:
    """Make the calls in ``count`` workers of the pool, or as many as it has if they are more. Yield (index of
    a call, its `_outcome`) in the order in which the calls end. Raises TimeUp if the deadline passes."""
    queue, index_by_channel, done = list(range(len(calls))), dict[Connection, int](), 0
    deadline.check()
    idle_channels = pool.grow(count)
    end_channels = set(idle_channels[1::2])
    while queue or index_by_channel:
        while queue and idle_channels:
            deadline.check()
            channel = idle_channels.pop(0)
            index = index_by_channel[channel] = queue.pop(-1 if channel in end_channels else 0)
            channel.send(pool.message(calls, index))
            progress(done, index)
        for ready_channel in _ready(list(index_by_channel), deadline):
            index = index_by_channel.pop(ready_channel)
            outcome: tuple[bool, Any] | None = None
            with contextlib.suppress(EOFError):
                outcome = ready_channel.recv()
            if outcome is None:  # it has ended: run the call here, where the error is visible
                pool.remove(ready_channel)
                outcome = _outcome(calls[index])
                idle_channels += [pool.add()] if queue else []
            else:
                idle_channels.append(ready_channel)
            done += 1
            yield index, outcome
            progress(done, next(iter(index_by_channel.values()), index))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _is_worth(calls: int, workers: ForkedWorkers | None, deadline: Deadline) -> bool:
    """Return whether forked processes are of use for this number of calls: for several on several cores, and
    for a single one if there is a deadline, or if workers are forked already and there are several cores."""
    has_workers = workers is not None and bool(workers.processes)
    if calls == 1:
        return deadline.left_s < math.inf or (has_workers and _cores() > 1)
    return min(calls, _cores()) > 1


def _ready(channels: list[Connection], deadline: Deadline) -> list[Connection]:
    """Wait until a forked process has sent something or ended, and return the connections of those that have.
    Raises TimeUp if the deadline passes before."""
    ready = wait(channels, None if deadline.left_s == math.inf else deadline.left_s)
    if not ready:
        deadline.check()
    return [c for c in ready if isinstance(c, Connection)]


_REFUSED: list[str] = []  # autograd's message from a forked process; later calls then do not fork


def _one_by_one(
    calls: Sequence[Callable[[], _T]], progress: Progress, results: dict[int, _T], deadline: Deadline
) -> list[_T]:
    is_original = not multiprocessing.current_process().daemon
    for index, call in enumerate(calls):
        if is_original:
            deadline.check()
        progress(index, index)
        results[index] = call()
        progress(index + 1, index)
    return [results[index] for index in range(len(calls))]


def is_fork_refused(error: Exception) -> bool:
    """Return whether a call in a forked process failed with this error because autograd has device threads
    (CUDA builds). No backward can then run in a forked process after one has run in the original process."""
    return "fork-based multiprocessing" in str(error)


def _answer(
    call_of: Callable[[Any], Callable[[], Any]], channel: Connection, inherited: list[Connection], parent: int
) -> None:
    die_with_parent(parent)
    # Ctrl-C is handled by the original process, which ends its workers by SIGTERM
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    for other in inherited:
        other.close()
    torch.set_num_threads(1)  # the original's threads do not exist in a worker
    threadpoolctl.threadpool_limits(1)  # those of NumPy in several workers wait for the same cores
    gc.freeze()  # objects of the original stay: collect only what the calls leave
    while True:
        try:
            call = call_of(channel.recv())
        except EOFError:
            return
        outcome = _outcome(call)
        if not outcome[0] and not _has_faithful_copy(outcome[1]):
            return  # the original process makes this call again
        try:
            channel.send(outcome)
        except (pickle.PicklingError, AttributeError, TypeError):  # a result that cannot be pickled
            return
        del outcome, call
        gc.collect()
        gc.freeze()  # what is still alive, such as cached results, is not looked through again


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
