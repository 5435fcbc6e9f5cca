from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from memfit.planner.operator_timer import OperatorTimer
from memfit.types.errors import RunError
from memfit.types.job import JobRef

TENSOR = '{"t": [[64], [1], "float32"]}'
ADD = f'["aten.add.Tensor", [{TENSOR}, {TENSOR}], {{}}]'
MUL = f'["aten.mul.Tensor", [{TENSOR}, {TENSOR}], {{}}]'


@pytest.fixture(scope="module")
def timer() -> Iterator[OperatorTimer]:
    timer = OperatorTimer(job=JobRef(spec="words"), device="cpu", threads=1)
    yield timer
    timer.close()


def process_of(timer: OperatorTimer) -> int:
    assert timer._running is not None
    return timer._running[0]._process.pid


def test_one_process_measures_what_is_asked_one_after_the_other(timer: OperatorTimer) -> None:
    first = timer.measure([ADD], 10.0, True)
    process = process_of(timer)
    second = timer.measure([MUL, "[]"], 10.0, False)
    assert process_of(timer) == process
    assert list(first.op_s) == [ADD]
    assert first.flops_s
    assert list(second.op_s) == [MUL]
    assert (second.not_timed, second.flops_s) == (("[]",), {})


def test_a_process_that_has_died_between_two_measurements_is_replaced(timer: OperatorTimer) -> None:
    timer.measure([ADD], 10.0, False)
    process = process_of(timer)
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert list(timer.measure([MUL], 10.0, False).op_s) == [MUL]
    assert process_of(timer) != process


def test_no_process_is_left_after_the_timer_is_closed() -> None:
    timer = OperatorTimer(job=JobRef(spec="words"), device="cpu", threads=1)
    timer.measure([], 1.0, False)
    process = process_of(timer)
    timer.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_measurement_without_a_result_says_why() -> None:
    timer = OperatorTimer(job=JobRef(spec="words"), device="no-such-device", threads=1)
    with pytest.raises(RunError, match=r"ended without a result: .*no-such-device"):
        timer.measure([ADD], 1.0, False)
