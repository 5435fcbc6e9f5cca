"""Calls made in parallel, in forked workers of the process."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable
from functools import partial

import pytest

from memfit.trace import trace_pool
from memfit.trace.trace_pool import ForkedWorkers, run_parallel

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers of a process are made by fork")


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(trace_pool, "_may_fork", lambda: True)


def told(number: int, seen: list[int]) -> tuple[int, int, int]:
    seen.append(number)
    return number, os.getpid(), len(seen)


def test_results_come_in_order_from_copies_that_make_several_calls() -> None:
    seen: list[int] = []
    found = run_parallel([partial(told, n, seen) for n in range(7)])
    assert [number for number, _, _ in found] == list(range(7))
    made = {process for _, process, _ in found}
    assert os.getpid() not in made
    assert len(made) == 2
    assert max(calls for _, _, calls in found) > 1, "what one call loads serves the next"
    assert not seen


def failing(number: int) -> int:
    if number % 2:
        raise ValueError(f"call {number}")
    return number


def test_the_first_failure_is_raised() -> None:
    with pytest.raises(ValueError, match="call 1"):
        run_parallel([partial(failing, n) for n in range(5)])


def test_a_call_whose_copy_dies_is_made_in_the_original_process() -> None:
    here = os.getpid()

    def dies(number: int) -> int:
        if number == 1 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    calls: list[Callable[[], int]] = [partial(dies, n) for n in range(5)]
    results: dict[int, int] = {}
    assert run_parallel(calls, results=results) == list(range(5))
    assert results == {n: n for n in range(5)}


def test_a_call_whose_result_cannot_be_sent_is_made_in_the_original_process(
    capfd: pytest.CaptureFixture[str],
) -> None:
    lock, number = run_parallel([threading.Lock, lambda: 2])
    assert lock.acquire()  # type: ignore[attr-defined]
    assert number == 2
    assert capfd.readouterr().err == ""


class RefusedValue(Exception):
    """Takes other arguments than it passes on, so pickle cannot make it again."""

    def __init__(self, name: str, *, allowed: str) -> None:
        super().__init__(f"{name} is not {allowed}")


class PrefixedError(Exception):
    """Its copy by pickle would say something else."""

    def __init__(self, text: str) -> None:
        super().__init__(f"refused: {text}")


@pytest.mark.parametrize(
    ("error", "message"),
    [(RefusedValue("a", allowed="b"), "a is not b"), (PrefixedError("text"), "refused: text")],
)
def test_an_exception_that_pickle_cannot_copy_is_raised_as_it_is(error: Exception, message: str) -> None:
    def fails(number: int) -> int:
        if number == 1:
            raise error
        return number

    results: dict[int, int] = {}
    with pytest.raises(type(error), match=f"^{message}$") as caught:
        run_parallel([partial(fails, n) for n in range(4)], results=results)
    assert caught.value.__context__ is None
    assert results == {0: 0, 2: 2, 3: 3}  # all other calls have ended


def refused(n: int, here: int) -> int:
    """Fails as autograd does in a forked copy after its device threads have started."""
    if os.getpid() != here:
        raise RuntimeError(
            "Unable to handle autograd's threading in combination with fork-based multiprocessing."
        )
    return n


def test_where_copies_cannot_run_backward_the_original_makes_every_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(trace_pool, "_REFUSED", seen)
    calls = [partial(refused, n, os.getpid()) for n in range(4)]
    assert run_parallel(calls) == list(range(4))
    assert run_parallel(calls) == list(range(4))
    assert len(seen) == 1  # it is not tried again


class Owner:
    """Cannot be pickled, and counts the calls that its process has made."""

    def __init__(self) -> None:
        self.cannot_be_pickled, self.count = lambda: None, 0

    def called(self, number: int) -> tuple[int, int, int]:
        self.count += 1
        return number, os.getpid(), self.count


def test_copies_that_stay_make_later_calls_too() -> None:
    owner = Owner()
    workers = ForkedWorkers(owner)
    first = run_parallel([partial(owner.called, n) for n in range(4)], workers=workers)
    processes = {process for _, process, _ in first}
    assert len(processes) == 2
    assert os.getpid() not in processes
    again = run_parallel([partial(owner.called, 7)], workers=workers)
    assert again[0][:2] in {(7, process) for process in processes}
    assert again[0][2] > 1, "the process that made an earlier call"
    assert owner.count == 0
    workers.end()
    assert not workers.processes
    assert run_parallel([partial(owner.called, 8)], workers=workers) == [(8, os.getpid(), 1)]


def test_copies_end_with_their_owner() -> None:
    owner = Owner()
    workers = ForkedWorkers(owner)
    run_parallel([partial(owner.called, n) for n in range(2)], workers=workers)
    processes = [process for _, process in workers.processes.items()]
    assert all(process.is_alive() for process in processes)
    del owner
    gc.collect()
    assert not workers.processes
    with pytest.raises(ValueError, match="closed"):
        processes[0].is_alive()
